import datetime
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import PLAIN, TEMPLATE, byte_tokenizer, user, write

from r2m_async.codec import decode, encode
from r2m_async.data.prompts import Preference, PromptStream, load_preferences, load_prompts
from r2m_async.data.records import read_records
from r2m_async.data.seeds import sampling_seed
from r2m_async.errors import ConfigError, DataError
from r2m_async.trajectories import Prompt

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def load(source, **options):
    return load_prompts(source, **({"tokenizer": PLAIN, "max_prompt_tokens": 64} | options))


def test_raw_text_reaches_the_policy_unchanged(tmp_path):
    path = write(tmp_path / "posts.jsonl", {"prompt": "  A post.\n"})
    (prompt,) = load(path, tokenizer=byte_tokenizer(TEMPLATE)).prompts
    assert prompt == Prompt(
        prompt_id="posts.jsonl:1",
        content="  A post.\n",
        text="  A post.\n",
        token_ids=tuple(PLAIN("  A post.\n")["input_ids"]),
    )


def test_turns_go_through_the_chat_template_with_the_assistants_opening(tmp_path):
    tokenizer = byte_tokenizer(TEMPLATE)
    turns = [*user("hi"), {"role": "assistant", "content": "yes?"}, *user("bye")]
    (prompt,) = load(write(tmp_path / "a.jsonl", {"prompt": turns}), tokenizer=tokenizer).prompts
    assert prompt.text == "<s>[user]hi\n[assistant]yes?\n[user]bye\n[assistant]"
    assert prompt.content == (("user", "hi"), ("assistant", "yes?"), ("user", "bye"))
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert list(prompt.token_ids) == rendered
    assert rendered.count(tokenizer.bos_token_id) == 1


def test_the_beginning_of_text_is_the_templates_or_the_tokenizers_and_never_both(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": user("hi")}, {"prompt": "raw"})
    for template in (TEMPLATE, None):
        tokenizer = byte_tokenizer(template, adds_bos=True)
        for prompt in load(path, tokenizer=tokenizer).prompts:
            assert prompt.token_ids[0] == tokenizer.bos_token_id
            assert prompt.token_ids.count(tokenizer.bos_token_id) == 1


def test_without_a_chat_template_the_contents_follow_each_other_a_newline_after_each(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, *user("Hello")]
    (prompt,) = load(write(tmp_path / "a.jsonl", {"prompt": turns})).prompts
    assert prompt.text == "Be brief.\nHello\n"
    assert prompt.token_ids == tuple(PLAIN("Be brief.\nHello\n")["input_ids"])


def test_lines_are_numbered_as_an_editor_numbers_them_and_blank_ones_tolerated(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + b'{"prompt": "a\xe2\x80\xa8b"}\r', b"", b"  ", {"prompt": "c"})
    assert [prompt.prompt_id for prompt in load(path).prompts] == ["a.jsonl:1", "a.jsonl:4"]


def test_several_files_are_read_in_order_and_named_apart_where_their_names_agree(tmp_path):
    (tmp_path / "x").mkdir()
    one, two = write(tmp_path / "a.jsonl", {"prompt": "1"}), write(tmp_path / "b.jsonl", {"prompt": "2"})
    twin = write(tmp_path / "x" / "a.jsonl", {"prompt": "3"})
    assert [prompt.prompt_id for prompt in load([two, one]).prompts] == ["b.jsonl:1", "a.jsonl:1"]
    assert load(f"{two}, {one}") == load([two, one])
    assert [prompt.prompt_id for prompt in load([one, twin]).prompts] == [f"{one}:1", f"{twin}:1"]


def test_a_file_whose_name_has_a_comma_is_one_file(tmp_path):
    assert len(load(str(write(tmp_path / "a,b.jsonl", {"prompt": "1"}))).prompts) == 1


def test_the_limit_counts_usable_prompts_and_stops_reading_there(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": ""}, {"prompt": "a"}, {"prompt": "b"}, b"never read")
    loaded = load(path, limit=2, on_bad_record="skip")
    assert [prompt.text for prompt in loaded.prompts] == ["a", "b"]
    assert loaded.skipped == {"empty": 1}


def test_a_prompt_may_have_any_field_name(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "why?"})
    assert load(path, prompt_field="question").prompts[0].text == "why?"


def test_a_prompt_carries_every_further_field_of_its_record_through_the_codec(tmp_path):
    record = {"question": "2 + 2?", "answer": 4, "none": None, "tests": [{"in": [1.5], "ok": True}]}
    (prompt,) = load(write(tmp_path / "a.jsonl", record), prompt_field="question").prompts
    assert prompt.columns == {key: value for key, value in record.items() if key != "question"}
    assert decode(bytes(encode(prompt))) == prompt and hash(prompt)


def test_a_data_sets_dates_and_bytes_reach_the_columns_and_its_other_objects_do_not(tmp_path):
    import datasets

    when = datetime.datetime(2024, 5, 1, 12, 30)
    rows = [{"prompt": "a", "when": when, "days": [when.date()], "raw": b"x"}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "good"))
    (prompt,) = load(tmp_path / "good").prompts
    assert prompt.columns == {"when": "2024-05-01T12:30:00", "days": ["2024-05-01"], "raw": b"x"}
    datasets.Dataset.from_list([{"prompt": "a", "took": when - when}]).save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(DataError, match=r"row 0: took = .*reward functions \(cannot write a datetime.timedelta\)"):
        load(tmp_path / "bad")


BAD = [
    (
        {"prompt": "a", "id": 2**64},
        "column",
        "id = 18446744073709551616: no value of JSON with integers of up to 64 bits",
    ),
    (b'{"prompt": "a", "answer": ["\\ud83d"]}', "column", "answer = ['\\ud83d']: "),
    (b'{"prompt": "a"', "invalid_json", "line = '{\"prompt\": \"a\"': not JSON, Expecting ',' delimiter at column 15"),
    (b"[1]", "invalid_json", "line = '[1]': a JSON list, not an object"),
    (b'{"prompt": ' + b"1" * 5000 + b"}", "invalid_json", "not JSON, Exceeds the limit"),
    (b'{"prompt": "caf\xe9"}', "not_utf8", "not UTF-8 at byte 16 of the line; convert the file to UTF-8"),
    (b'{"prompt": "\\ud800"}', "not_utf8", "half of a surrogate pair at character 1"),
    ({"text": "a", "id": 3}, "missing_field", "prompt: missing, the record has 'text', 'id'; add it"),
    ({"prompt": 7}, "wrong_type", "prompt = 7: int, neither text nor a list of turns"),
    ({"prompt": ["a"]}, "wrong_type", "prompt[0] = 'a': a turn needs a role and a content, both text"),
    (
        {
            "prompt": [
                {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]},
                {"role": "user", "content": "a"},
            ]
        },
        "wrong_type",
        "prompt[0].tool_calls = [{'name': 'f'}]: a part of the turn beside its content, which no model would read",
    ),
    ({"prompt": [{"role": "user"}]}, "wrong_type", "prompt[0] = {'role': 'user'}: a turn needs"),
    ({"prompt": ""}, "empty", "prompt = '': no text"),
    ({"prompt": " \n"}, "empty", "prompt = ' \\n': no text"),
    ({"prompt": []}, "empty", "prompt = []: no turn"),
    ({"prompt": user(" ")}, "empty", "prompt[0].content = ' ': no text"),
    (
        {"prompt": [*user("a"), {"role": "assistant", "content": "b"}]},
        "last_turn",
        "prompt[1].role = 'assistant': the last turn must be the user's",
    ),
    (
        {"prompt": "x" * 65},
        "too_long",
        "65 tokens where rollouts.max_prompt_tokens allows 64; raise that limit, shorten the prompt",
    ),
]


@pytest.mark.parametrize(
    ("record", "reason", "text"), BAD, ids=[f"{reason}-{i}" for i, (_, reason, _) in enumerate(BAD)]
)
def test_a_bad_record_is_refused_with_place_value_reason_and_remedy_or_skipped_and_counted(
    tmp_path, record, reason, text
):
    path = write(tmp_path / "a.jsonl", {"prompt": "good"}, b"", record, {"prompt": "x" * 64})
    with pytest.raises(DataError) as refusal:
        load(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}, line 3: ")
    assert text in message
    assert message.endswith("or set data.on_bad_record: skip")
    assert len(message) < len(str(path)) + 400
    loaded = load(path, on_bad_record="skip")
    assert [prompt.text for prompt in loaded.prompts] == ["good", "x" * 64]
    assert loaded.skipped == {reason: 1}


def test_what_the_chat_template_refuses_is_a_bad_record(tmp_path):
    tokenizer = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    path = write(tmp_path / "a.jsonl", {"prompt": "raw text needs no template"}, {"prompt": user("a")})
    with pytest.raises(DataError, match=r"line 2: prompt = .*chat template refuses it \(roles must alternate\)"):
        load(path, tokenizer=tokenizer)
    assert load(path, tokenizer=tokenizer, on_bad_record="skip").skipped == {"chat_template": 1}


def test_a_source_with_no_usable_prompt_is_an_error_that_says_why(tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl: no usable record \(1 empty, 2 wrong_type\)"):
        load(write(tmp_path / "a.jsonl", {"prompt": ""}, {"prompt": 1}, {"prompt": 2}), on_bad_record="skip")
    with pytest.raises(DataError, match=r"no usable record \(it is empty\)"):
        load(write(tmp_path / "b.jsonl"))


def test_a_path_that_is_not_there_is_named_without_asking_the_hub(tmp_path):
    with pytest.raises(DataError, match=r"data source '.*none.jsonl': no such file or directory; correct the path"):
        load(tmp_path / "none.jsonl")


def test_a_directory_without_data_and_a_split_that_is_not_there_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="neither a file nor a data set that can be read"):
        load(tmp_path)
    import datasets

    both = datasets.DatasetDict(test=datasets.Dataset.from_list([{"prompt": "a"}]))
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match="split 'train', KeyError"):
        load(tmp_path / "both")


def test_an_unknown_answer_to_bad_records_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.on_bad_record: 'ignore' is neither 'error' nor 'skip'"):
        load(write(tmp_path / "a.jsonl", {"prompt": "a"}), on_bad_record="ignore")


def test_data_sets_saved_to_disk_and_directories_of_files_are_sources(tmp_path):
    import datasets

    rows = [{"prompt": user("a")}, {"prompt": []}, {"prompt": user("b")}]
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(rows).save_to_disk(str(saved))
    loaded = load(str(saved), on_bad_record="skip")
    assert [prompt.text for prompt in loaded.prompts] == ["a\n", "b\n"]
    assert [prompt.prompt_id for prompt in loaded.prompts] == [f"{saved}:0", f"{saved}:2"]
    with pytest.raises(DataError, match=r"saved \(train\), row 1: prompt = \[\]: no turn"):
        load(str(saved))
    files = tmp_path / "files"
    files.mkdir()
    write(files / "test.jsonl", {"prompt": "from a file"})
    assert load(files, split="test").prompts[0].text == "from a file"


def test_preferences_are_checked_like_prompts(tmp_path):
    good = {"prompt": user("p"), "chosen": "c", "rejected": "r"}
    path = write(
        tmp_path / "pairs.jsonl", good, good | {"chosen": " "}, good | {"rejected": user("r")}, {"prompt": "p"}
    )
    with pytest.raises(DataError, match="line 2: chosen = ' ': no text"):
        load_preferences(path)
    loaded = load_preferences(path, on_bad_record="skip")
    assert loaded.pairs == (Preference((("user", "p"),), "c", "r"),)
    assert loaded.skipped == {"empty": 1, "last_turn": 1, "missing_field": 1}


TURNS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text()}))
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(
        st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b""))
        | st.fixed_dictionaries({"prompt": st.text() | TURNS | ANY_JSON}).map(
            lambda record: json.dumps(record).encode()
        ),
        max_size=8,
    )
)
def test_every_line_is_kept_skipped_or_blank_and_nothing_else_is_raised(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    write(path, {"prompt": "good"}, *records)
    loaded = load(path, on_bad_record="skip", max_prompt_tokens=20)
    blank = sum(not record.strip() for record in records)
    assert len(loaded.prompts) + sum(loaded.skipped.values()) + blank == 1 + len(records)
    for prompt in loaded.prompts:
        assert 0 < len(prompt.token_ids) <= 20
        assert PLAIN.decode(prompt.token_ids) == prompt.text


def numbered(count):
    return [Prompt(prompt_id=str(index), content="x", text="x", token_ids=(1,)) for index in range(count)]


@settings(deadline=None)
@given(count=st.integers(1, 50), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_each_pass_deals_every_prompt_once(count, seed, epoch):
    stream = PromptStream(numbered(count), seed)
    dealt = Counter(stream.prompt_of(epoch * count + place).prompt_id for place in range(count))
    assert dealt == Counter(str(index) for index in range(count))


@given(seed=st.integers(0, 9), groups=st.lists(st.integers(0, 500), min_size=1, max_size=40), data=st.data())
def test_a_groups_prompt_and_seed_do_not_depend_on_the_order_of_calls(seed, groups, data):
    stream, other = PromptStream(numbered(7), seed), PromptStream(numbered(7), seed)
    dealt = {group: (stream.prompt_of(group), sampling_seed(seed, group)) for group in groups}
    for group in data.draw(st.permutations(groups)):
        assert (other.prompt_of(group), sampling_seed(seed, group)) == dealt[group]


def test_passes_and_seeds_shuffle_differently():
    orders = {
        tuple(PromptStream(numbered(20), seed).prompt_of(20 * epoch + place).prompt_id for place in range(20))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_a_stream_needs_a_prompt():
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptStream([], seed=0)


def test_sampling_seeds_are_distinct_and_use_all_63_bits():
    seeds = [sampling_seed(seed, group) for seed in range(4) for group in range(500)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    for bit in range(63):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert abs(ones - 1000) < 150, f"bit {bit} is set in {ones} of 2000"


@pytest.fixture
def posts(tmp_path):
    real = DATA / "tldr_prompts.jsonl"
    if real.exists():
        return real
    return write(tmp_path / "posts.jsonl", *({"prompt": user(f"POST: my day {i}.\n\nTL;DR:")} for i in range(900)))


@pytest.fixture
def pairs(tmp_path):
    real = DATA / "tldr_sample.jsonl"
    if real.exists():
        return real
    return write(
        tmp_path / "pairs.jsonl",
        *({"prompt": user(f"POST: {i}\n\nTL;DR:"), "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(959)),
    )


def test_the_shared_posts_load_without_a_bad_record(posts):
    loaded = load(posts, max_prompt_tokens=10_000)
    assert len(loaded.prompts) == 900
    assert all(prompt.text.endswith("TL;DR:\n") for prompt in loaded.prompts)


def test_the_shared_pairs_load_without_a_bad_record(pairs):
    loaded = load_preferences(pairs)
    assert len(loaded.pairs) == 959
    assert all(prompt[-1][0] == "user" for prompt, _, _ in loaded.pairs)


def test_a_folder_of_empty_files_is_told_as_one(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").touch()
    with pytest.raises(DataError, match="neither a file nor a data set that can be read"):
        list(read_records(str(tmp_path / "folder")))


@pytest.mark.parametrize("name", [" answer", "answer\u200b", "\ufeffanswer", "answer\n"])
def test_a_column_whose_name_has_something_at_an_end_that_nobody_sees_is_refused(tmp_path, name):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", name: "4"}) + "\n")
    with pytest.raises(DataError, match="line 1: .*white space at an end, so it is not the column 'answer'; rename it"):
        load_prompts(tmp_path / "a.jsonl", tokenizer=byte_tokenizer(), max_prompt_tokens=9)
