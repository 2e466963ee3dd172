"""Tokenizer, config and generation config are held against each other; the text of a response is what follows its prompt."""

import json
from pathlib import Path

import pytest
from test_pretrained import changed_config, copy_of  # noqa: F401
from tiny import WORDS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from r2m_async.data.prompts import policy_reads
from r2m_async.errors import ConfigError, DataError
from r2m_async.launch.workload import resolve
from r2m_async.models.pretrained import pretrained_config, pretrained_generation_config, pretrained_tokenizer
from r2m_async.models.tokens import ResponseText, end_of_text, response_ids

pytestmark = pytest.mark.models


def sentence_pieces(prefix: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer in the style of SentencePiece: a word begins with a mark, and a text with a space that is not there."""
    marked = ["<unk>", "<s>", "</s>", *(f"▁{word}" for word in WORDS), *"▁abcdefghijklmnopqrstuvwxyz.:'?"]
    raw = Tokenizer(models.BPE({token: at for at, token in enumerate(dict.fromkeys(marked))}, [], unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<unk>")


def byte_level() -> PreTrainedTokenizerFast:
    vocab = {token: at for at, token in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocab, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", clean_up_tokenization_spaces=True)


@pytest.mark.parametrize("response", [" the river sings", "the river", " .", "a :", "n't it ? don 't ."])
@pytest.mark.parametrize("tokenizer", [sentence_pieces(), sentence_pieces(prefix=False), byte_level()])
def test_the_text_of_a_response_is_what_its_tokens_add_to_the_prompt(tokenizer, response):
    prompt = "the old stone"
    together, start = (tokenizer(text)["input_ids"] for text in (prompt + response, prompt))
    assert together[: len(start)] == start and "<unk>" not in tokenizer.decode(together)
    text = ResponseText(tokenizer, start)(together[len(start) :])
    assert text == response


def test_a_character_that_the_response_completes_belongs_to_it():
    tokenizer = byte_level()
    ids = tokenizer("aé")["input_ids"]
    assert len(ids) == 3
    assert ResponseText(tokenizer, ids[:2])(ids[2:]) == "é"


@pytest.mark.parametrize("tokenizer", [sentence_pieces(), byte_level()])
@pytest.mark.parametrize("response", [" the river", "the river"])
def test_a_response_given_as_text_becomes_tokens_that_read_the_same(tokenizer, response):
    prompt = "the old stone"
    text, ids = policy_reads(prompt, tokenizer)
    tokens = response_ids(tokenizer, text, ids, response, finished=True)
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode([*ids, *tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False) == (
        prompt + response
    )


def test_a_prompt_does_not_end_with_the_end_of_text_that_a_tokenizer_appends():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level()
    plain = tokenizer("a river")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    assert tokenizer("a river")["input_ids"] == [*plain, 0]
    assert policy_reads("a river", tokenizer)[1] == plain


# What ends a response


def ends_of(directory: str) -> tuple[int, ...]:
    configs = (load("k", directory) for load in (pretrained_config, pretrained_generation_config))
    return end_of_text(pretrained_tokenizer("k", directory), *configs)


def test_every_source_may_name_an_end_of_text(copy_of):  # noqa: F811
    directory = copy_of("qwen2", False)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert ends_of(directory) == (1,)
    GenerationConfig(eos_token_id=[0], pad_token_id=0).save_pretrained(directory)
    assert ends_of(directory) == (1, 0)
    changed_config(directory, eos_token_id=[0, 1])
    assert ends_of(directory) == (1, 0)
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(directory)
    GenerationConfig(eos_token_id=1, pad_token_id=0).save_pretrained(directory)
    assert ends_of(directory) == (0, 1)


def test_a_contradiction_is_told_and_agreement_is_not(tiny_config, copy_of):  # noqa: F811
    directory = copy_of("qwen2", False)
    assert resolve(tiny_config.model(policy=directory)).notes == ()
    GenerationConfig(eos_token_id=0, pad_token_id=0).save_pretrained(directory)
    (note,) = resolve(tiny_config.model(policy=directory)).notes
    assert "its files name different end-of-text tokens" in note and "'<pad>' (0)" in note and "'</s>' (1)" in note


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_of_text_without_embedding_is_refused_and_an_ordinary_token_as_one_is_told(tiny_config, copy_of, file):  # noqa: F811
    directory = Path(copy_of("qwen2", False))
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')
    keys = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(keys | {"eos_token_id": [1, 77]}))
    notes = resolve(tiny_config.model(policy=str(directory))).notes
    assert any("(77) ends a response, and to the tokenizer it is an ordinary token" in note for note in notes)
    (directory / file).write_text(json.dumps(keys | {"eos_token_id": 100_000}))
    with pytest.raises(ConfigError, match="names 100000 as end of text .*the model has embeddings"):
        resolve(tiny_config.model(policy=str(directory)))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"eos_token_id": "</s>"}', "names '</s>' as end of text .*which is no token's id"),
        ('{"eos_token_id": [1, null]}', "names None as end of text"),
        ('{"eos_token_id": 1', "generation_config.json cannot be read: .*; correct it, or take it out"),
        ("[1]", "generation_config.json cannot be read"),
    ],
)
def test_a_generation_config_that_says_nothing_usable_is_refused(tiny_config, copy_of, text, why):  # noqa: F811
    directory = Path(copy_of("qwen2", False))
    (directory / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=why):
        resolve(tiny_config.model(policy=str(directory)))


# Rows and positions


def test_tokens_without_embedding_are_refused_where_they_would_be_read(tiny_config, copy_of, tmp_path):  # noqa: F811
    policy, reward = Path(copy_of("qwen2", False)), Path(copy_of("llama", True))
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tokenizer.add_special_tokens({"pad_token": "<more>"})
    tokenizer.save_pretrained(policy)
    # Nobody reads the policy's padding token, and no prompt has the other.
    resolve(tiny_config.model(policy=str(policy)))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a river"}\n{"prompt": "a <new> river"}\n')
    prompts = tiny_config.model(policy=str(policy)).data(prompts=str(tmp_path / "prompts.jsonl"))
    with pytest.raises(DataError, match=r"line 2: .*its token '<new>' \(\d+\) has no embedding in model.policy"):
        resolve(prompts)
    assert resolve(prompts.data(on_bad_record="skip")).skipped == {"unreadable": 1}
    tokenizer.save_pretrained(reward)
    with pytest.raises(DataError, match=r"has no embedding in reward.model"):
        resolve(tiny_config.reward(model=str(reward)).data(prompts=str(tmp_path / "prompts.jsonl")))
    tokenizer.eos_token = "<new>"
    tokenizer.save_pretrained(policy)
    with pytest.raises(ConfigError, match="its tokenizer's eos_token '<new>' has the id .* resize the embeddings"):
        resolve(tiny_config.model(policy=str(policy)))


def test_a_padding_token_of_the_tokenizer_alone_serves_and_one_without_embedding_is_refused(tiny_config, copy_of):  # noqa: F811
    reward = copy_of("llama", True)
    resolve(tiny_config.reward(model=changed_config(reward, pad_token_id=None)))
    with pytest.raises(ConfigError, match="has pad_token_id 9999 in its config.json"):
        resolve(tiny_config.reward(model=changed_config(reward, pad_token_id=9999)))
    changed_config(reward, pad_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(reward)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(reward)
    with pytest.raises(ConfigError, match="names a padding token"):
        resolve(tiny_config.reward(model=reward))


def test_texts_longer_than_the_models_positions_are_refused(tiny_config):
    with pytest.raises(
        ConfigError, match="max_new_tokens is 250: a text may then have 2.. tokens, .* has 256 positions"
    ):
        resolve(tiny_config.rollouts(max_new_tokens=250))
    with pytest.raises(ConfigError, match="reward.max_tokens is 300"):
        resolve(tiny_config.reward(max_tokens=300))


REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def test_a_prompt_that_only_the_reward_models_template_refuses_is_a_bad_record(tiny_config, copy_of, tmp_path):  # noqa: F811
    policy, reward = copy_of("qwen2", False), copy_of("llama", True)
    for directory, template in ((policy, TURNS), (reward, REFUSES_SYSTEM + TURNS)):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(directory)
    user = {"role": "user", "content": "a river"}
    records = [{"prompt": [user]}, {"prompt": [{"role": "system", "content": "the"}, user]}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = tiny_config.model(policy=policy).reward(model=reward).data(prompts=str(tmp_path / "chat.jsonl"))
    config = config.rollouts(max_prompt_tokens=64)
    with pytest.raises(
        DataError, match=r"line 2: .*the chat template of reward.model's tokenizer refuses it \(no system\)"
    ):
        resolve(config)
    assert resolve(config.data(on_bad_record="skip")).skipped == {"unreadable": 1}
