"""What an environment writes into a response: tokens of its own, and what the chat template puts between turns."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS, save_tokenizer
from transformers import AutoTokenizer

from r2m_async.models.conversation import Conversation
from r2m_async.trajectories import Prompt

pytestmark = pytest.mark.models

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim")
FORGETFUL = (
    "{% for m in messages %}<s>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'].split('stone')[-1] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
THINKS_FIRST = CHATML.replace("<s>assistant\n{% endif %}", "<s>assistant\n<think>{% endif %}")
MOVES = "{{ messages | length }} turns:" + CHATML


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, WORDS)
    return AutoTokenizer.from_pretrained(directory)


def begun(tokenizer, template=CHATML, content=(("user", "the river"),)) -> Conversation:
    from r2m_async.data.prompts import policy_reads

    tokenizer.chat_template = template
    text, ids = policy_reads(content, tokenizer)
    prompt = Prompt(prompt_id="p", content=content, text=text, token_ids=tuple(ids))
    return Conversation(prompt, tokenizer, [tokenizer.eos_token_id])


def says(conversation, tokenizer, text, ends=False):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * ends
    conversation.add_sampled(ids, [-1.0] * len(ids), [3] * len(ids))


def appended(conversation, messages):
    conversation.add_messages(conversation.ids_of(conversation.text_after_turn(messages)), messages)


ASKS = [{"role": "user", "content": "a stone"}]


@pytest.mark.parametrize("template", [CHATML, TRIMMED])
@pytest.mark.parametrize("ends", [True, False])
def test_all_turns_are_together_what_the_template_makes_of_them(tokenizer, template, ends):
    conversation = begun(tokenizer, template)
    said = []
    for number in range(3):
        said += [{"role": "assistant", "content": f" wind {number}" if template == CHATML else f"wind {number}"}]
        says(conversation, tokenizer, said[-1]["content"], ends)
        said += [{"role": "user", "content": f"number {number}"}, {"role": "tool", "content": "one"}]
        appended(conversation, said[-2:])
    turns = [{"role": "user", "content": "the river"}, *said]
    whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(conversation.token_ids) == whole
    assert conversation.messages == turns
    one = conversation.trajectory("stop", None, {})
    assert one.num_turns == 3 and not one.written[: one.prompt_len].any()
    # The end-of-text token is the policy's if it wrote it, and the environment's if not.
    assert (one.of_policy(one.token_ids) == tokenizer.eos_token_id).sum() == 3 * ends
    assert (one.behaviour_logprobs[~one.written] == 0).all() and (one.policy_versions[~one.written] == -1).all()


@pytest.mark.parametrize("template", [FORGETFUL, THINKS_FIRST, MOVES], ids=["forgetful", "thinks first", "moves"])
def test_a_template_that_changes_earlier_turns_is_refused(tokenizer, template):
    conversation = begun(tokenizer, template)
    says(conversation, tokenizer, " old stone wind", ends=True)
    with pytest.raises(
        ValueError, match=r"the chat template is not stable: .* It was '.*', and becomes '.*'. .*Use append"
    ):
        conversation.text_after_turn(ASKS)


def test_a_template_may_change_what_no_turn_here_has(tokenizer):
    conversation = begun(tokenizer, FORGETFUL)
    says(conversation, tokenizer, " old wind", ends=True)
    appended(conversation, ASKS)
    assert tokenizer.decode(conversation.token_ids).endswith(" old wind</s>\n<s>user\na stone</s>\n<s>assistant\n")


def test_raw_appends_are_a_part_of_the_policys_open_turn(tokenizer):
    conversation = begun(tokenizer)
    says(conversation, tokenizer, " one")
    conversation.add_written(conversation.ids_of(" two"))
    says(conversation, tokenizer, " three", ends=True)
    assert conversation.messages[-1] == {"role": "assistant", "content": " one two three"}
    appended(conversation, ASKS)
    assert [one["role"] for one in conversation.messages] == ["user", "assistant", "user"]
    assert conversation.response.startswith(" one two three\n") and conversation.response.endswith("assistant\n")


def test_an_empty_turn_is_a_turn_and_none_is_none(tokenizer):
    conversation = begun(tokenizer)
    with pytest.raises(ValueError, match="the policy has written nothing since the last messages: call generate"):
        conversation.text_after_turn(ASKS)
    says(conversation, tokenizer, "", ends=True)
    appended(conversation, ASKS)
    assert conversation.messages[1] == {"role": "assistant", "content": ""}
    with pytest.raises(ValueError, match="written nothing since"):
        conversation.text_after_turn(ASKS)


@pytest.mark.parametrize(
    ("messages", "says_so"),
    [([], "no message"), ([{"role": "user"}], "`content`"), ([{"role": "user", "content": 3}], "`content`")],
)
def test_messages_that_are_none_are_refused(tokenizer, messages, says_so):
    conversation = begun(tokenizer)
    says(conversation, tokenizer, " one")
    with pytest.raises(ValueError, match=says_so):
        conversation.text_after_turn(messages)


def test_raw_prompts_have_no_turns_and_prompts_without_a_template_join_theirs(tokenizer):
    raw = begun(tokenizer, content="the river")
    says(raw, tokenizer, " one")
    with pytest.raises(ValueError, match="the prompt is raw text, which has no turns: use append"):
        raw.text_after_turn(ASKS)
    joined = begun(tokenizer, None)
    says(joined, tokenizer, "one", ends=True)
    appended(joined, ASKS)
    assert tokenizer.decode(joined.token_ids, skip_special_tokens=True) == "the river\none\na stone\n"


@given(
    st.text(alphabet="theriv stonwd.12\n\u00e4", max_size=12), st.text(alphabet="theriv stonwd.12\n\u00e4", max_size=12)
)
@settings(deadline=None, max_examples=60)
def test_an_append_adds_its_text_and_changes_no_token_before(tokenizer, sampled, text):
    conversation = begun(tokenizer)
    for letter in sampled:  # in other tokens than the tokenizer would take
        says(conversation, tokenizer, letter)
    before = list(conversation.token_ids)
    conversation.add_written(conversation.ids_of(text))
    assert conversation.token_ids[: len(before)] == before
    assert conversation.response == sampled + text


def test_a_tokenizer_that_puts_a_space_before_a_text_does_not_put_it_into_an_append(tokenizer, tmp_path):
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "\n", "\u2581", "one", "\u2581one", "two", "\u2581two"]
    words += ["\u2581" + "one"[:n] for n in (1, 2)] + list("onetw") + ["tw", "on"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    merges = [("o", "n"), ("on", "e"), ("t", "w"), ("tw", "o"), ("\u2581", "one"), ("\u2581", "two")]
    llama = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    llama.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=llama, eos_token="</s>", unk_token="<unk>")
    conversation = begun(wrapped, content="one")
    conversation.add_written(conversation.ids_of("two"))
    assert conversation.response == "two"
    conversation.add_written(conversation.ids_of(" two"))
    assert conversation.response == "two two"


@given(st.lists(st.sampled_from([" river", "st", "one", " ", "\u00e4", "wind", "</s>"]), max_size=12))
@settings(deadline=None, max_examples=60)
def test_a_stop_string_is_found_at_the_token_that_completes_it(tokenizer, parts):
    conversation = begun(tokenizer)
    ids = [number for part in parts for number in tokenizer(part, add_special_tokens=False)["input_ids"]]
    stops, start = ("\u00e4", "stone", "rw"), len(conversation.token_ids)
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        expected = next((stop for stop in stops if stop in text), None)
        assert conversation.stop_in(ids[:end], start, stops) == expected
        if expected:
            break
