import json

import pytest
from records import PLAIN, TEMPLATE, byte_tokenizer, user, write

from r2m_async.config import R2MConfig
from r2m_async.config_records import Filters
from r2m_async.data.prompts import Preference, load_preferences, load_prompts
from r2m_async.errors import ConfigError, DataError
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.reward_models.preferences import given_pairs, load_preference_data


def said(text):
    return {"role": "assistant", "content": text}


ASKED = (("user", "hi"), ("assistant", "yes?"), ("user", "bye"))
TURNS = [{"role": role, "content": content} for role, content in ASKED]
HH = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: bye\n\nAssistant:"
WHOLE = {"chosen": [*TURNS, said("c")], "rejected": [*TURNS, said("r")]}
SYSTEM = {"role": "system", "content": "Be brief."}

FORMS = {
    "texts": ({"prompt": TURNS, "chosen": "c", "rejected": "r"}, ASKED),
    "one turn each": ({"prompt": TURNS, "chosen": [said("c")], "rejected": [said("r")]}, ASKED),
    "conversations": (WHOLE, ASKED),
    "conversations and their prompt": (WHOLE | {"prompt": TURNS}, ASKED),
    "conversations and an empty prompt": (WHOLE | {"prompt": None}, ASKED),
    "one conversation": ({"prompt": TURNS, "chosen": WHOLE["chosen"], "rejected": "r"}, ASKED),
    "the instruction as prompt": (
        {"prompt": "hi", "chosen": [*user("hi"), said("c")], "rejected": [*user("hi"), said("r")]},
        (("user", "hi"),),
    ),
    "a system's turn": (
        {"prompt": "hi", "chosen": [SYSTEM, *user("hi"), said("c")], "rejected": [SYSTEM, *user("hi"), said("r")]},
        (("system", "Be brief."), ("user", "hi")),
    ),
    "transcripts": ({"chosen": f"{HH} c", "rejected": f"{HH} r\n"}, ASKED),
    "transcripts and their prompt": ({"prompt": HH, "chosen": f"{HH} c", "rejected": f"{HH} r"}, ASKED),
    "a transcript's prompt": ({"prompt": HH, "chosen": "c", "rejected": "r"}, HH),
    "Unified-Feedback": (
        {"conv_A": WHOLE["rejected"], "conv_B": WHOLE["chosen"], "conv_A_rating": 0.5, "conv_B_rating": 2.0},
        ASKED,
    ),
    "HHH-Alignment": ({"input": "hi", "targets": {"choices": ["r", "c"], "labels": [0, 1]}}, (("user", "hi"),)),
    "HHH-Alignment, turns": (
        {"input": "hi\n\nAssistant: yes?\n\nHuman: bye", "targets": {"choices": ["c", "r"], "labels": [1, 0]}},
        ASKED,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_is_read_in_every_form_and_so_is_its_prompt(tmp_path, form):
    record, prompt = FORMS[form]
    path = write(tmp_path / "a.jsonl", record)
    assert load_preferences(path).pairs == (Preference(prompt, "c", "r"),)
    assert load_prompts(path, tokenizer=PLAIN, max_prompt_tokens=90).prompts[0].content in (
        prompt,
        record.get("prompt"),
    )


WRONG = [
    (WHOLE | {"rejected": [*user("another"), said("r")]}, "transcripts", "differ before their last turn"),
    (WHOLE | {"prompt": "another"}, "transcripts", "prompt = 'another': the conversations begin with another prompt"),
    (
        {"chosen": f"{HH} c", "rejected": "\n\nHuman: hm\n\nAssistant: r"},
        "transcripts",
        "differ before their last turn",
    ),
    ({"chosen": "c", "rejected": "r"}, "missing_field", "prompt: missing, the record has 'chosen', 'rejected'"),
    ({"prompt": "p", "chosen": f"{HH} c\n\nHuman: so", "rejected": "r"}, "last_turn", "the last turn is 'user''s"),
    ({"prompt": "p", "chosen": [], "rejected": "r"}, "empty", "chosen = []: no turn"),
    ({"prompt": "p", "chosen": {"text": "c"}, "rejected": "r"}, "wrong_type", "dict, neither text nor a list of turns"),
    ({"prompt": "p", "chosen": [said("  ")], "rejected": "r"}, "empty", "chosen[0].content = '  ': no text"),
    ({"prompt": "p", "chosen": [{"from": "gpt", "value": "c"}], "rejected": "r"}, "wrong_type", "a turn needs a role"),
    (
        {"prompt": json.dumps(TURNS), "chosen": "c", "rejected": "r"},
        "wrong_type",
        "a list of turns that was written as",
    ),
    ({"prompt": "p", "chosen": str([said("c")]), "rejected": "r"}, "wrong_type", "a list of turns that was written as"),
    (FORMS["Unified-Feedback"][0] | {"conv_A_rating": 2.0}, "tie", "both responses have this rating"),
    ({"input": "hi", "targets": {"choices": ["c", "r"], "labels": [1, 1]}}, "wrong_type", "no two `choices`"),
]


@pytest.mark.parametrize(("record", "reason", "why"), WRONG, ids=[f"{one[1]}-{i}" for i, one in enumerate(WRONG)])
def test_a_pair_that_is_none_is_refused_with_its_place_or_counted(tmp_path, record, reason, why):
    path = write(tmp_path / "a.jsonl", FORMS["texts"][0], record)
    with pytest.raises(DataError) as refusal:
        load_preferences(path)
    assert str(refusal.value).startswith(f"{path}, line 2: ") and why in str(refusal.value)
    assert load_preferences(path, on_bad_record="skip").skipped == {reason: 1}


def test_an_answer_in_json_is_no_conversation(tmp_path):
    answer = '[{"role": "admin", "content": "x"}, {"value": 3}]'
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "chosen": answer, "rejected": '[{"value": 3}]'})
    assert load_preferences(path).pairs == (Preference("p", answer, '[{"value": 3}]'),)


def test_columns_rename_what_is_read_and_what_reward_functions_get(tmp_path):
    record = {"question": "2 + 2?", "solution": "4", "better": "c", "worse": "r", "answer": "hidden", "id": 3}
    path = write(tmp_path / "a.jsonl", record)
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse", "answer": "solution"}
    assert load_preferences(path, columns=columns).pairs == (Preference("2 + 2?", "c", "r"),)
    (prompt,) = load_prompts(path, tokenizer=PLAIN, max_prompt_tokens=90, columns=columns).prompts
    assert prompt.text == "2 + 2?" and prompt.columns == {"answer": "4", "chosen": "c", "rejected": "r", "id": 3}


def test_a_renamed_column_that_is_not_there_is_refused_by_the_key_that_names_it(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "c", "rejected": "r"})
    with pytest.raises(
        DataError, match=r"better: missing, .*; add it, name another field as data.columns.chosen or set"
    ):
        load_preferences(path, columns={"chosen": "better"})
    with pytest.raises(DataError, match=r"solution: missing, and data.columns.answer names it"):
        load_prompts(path, tokenizer=PLAIN, max_prompt_tokens=90, columns={"answer": "solution"})
    # One config may name the columns of pairs, which prompts need not have.
    load_prompts(path, tokenizer=PLAIN, max_prompt_tokens=90, columns={"chosen": "better"})


@pytest.mark.parametrize("kind", [R2MConfig, RewardModelConfig])
def test_two_names_for_the_prompt_must_agree(kind):
    source = {"prompts": "a.jsonl"} if kind is R2MConfig else {"preferences": "a.jsonl"}
    for data in (
        {"columns": {"prompt": "q"}},
        {"prompt_field": "q"},
        {"prompt_field": "q", "columns": {"prompt": "q"}},
    ):
        assert kind(data=source | data).data.names["prompt"] == "q"
    with pytest.raises(ConfigError, match=r"data.prompt_field is 'q' and data.columns.prompt is 'question'"):
        kind(data=source | {"prompt_field": "q", "columns": {"prompt": "question"}})


def test_keys_that_say_how_records_are_read_need_records():
    for data in ({"columns": {"prompt": "q"}}, {"chat": True}, {"filters": {"max_prompt_tokens": 3}}):
        with pytest.raises(ConfigError, match=r"data.prompts is 'embedded': these prompts are no records"):
            R2MConfig(data=data)


def test_a_text_is_the_users_turn_if_the_config_says_so(tmp_path):
    path, tokenizer = (
        write(tmp_path / "a.jsonl", {"prompt": "hi", "chosen": "c", "rejected": "r"}),
        byte_tokenizer(TEMPLATE),
    )
    (prompt,) = load_prompts(path, tokenizer=tokenizer, max_prompt_tokens=90, chat=True).prompts
    assert prompt.text == "<s>[user]hi\n[assistant]"
    assert load_preferences(path, chat=True).pairs == (Preference((("user", "hi"),), "c", "r"),)


def test_filters_leave_out_what_is_longer_and_count_it_under_every_policy_for_bad_records(tmp_path):
    def record(prompt, chosen, rejected):
        return {"prompt": "p" * prompt, "chosen": [said("c" * chosen)], "rejected": "r" * rejected}

    path = write(
        tmp_path / "a.jsonl", record(8, 4, 2), record(9, 1, 1), record(1, 5, 1), record(1, 1, 3), record(1, 1, 1)
    )
    filters = Filters(max_prompt_tokens=8, max_chosen_tokens=4, max_rejected_tokens=2)
    dropped = {f"beyond data.filters.max_{side}_tokens": 1 for side in ("prompt", "chosen", "rejected")}
    loaded = load_prompts(path, tokenizer=PLAIN, max_prompt_tokens=90, filters=filters)
    assert [len(prompt.text) for prompt in loaded.prompts] == [8, 1] and loaded.skipped == dropped
    PLAIN.save_pretrained(tmp_path / "model")
    of_rewards = RewardModelConfig(
        model={"start": str(tmp_path / "model")},
        data={"preferences": str(path), "filters": filters.model_dump(), "held_out": 0.0},
    )
    data = load_preference_data(of_rewards)
    assert [len(pair.prompt) for pair in data.training] == [8, 1] and data.skipped == dropped
    assert len(given_pairs(str(path), of_rewards)) == 5  # a model is measured on all that it is given


def test_a_filter_of_a_text_that_a_record_lacks_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p"})
    with pytest.raises(DataError, match="line 1: chosen: missing"):
        load_prompts(path, tokenizer=PLAIN, max_prompt_tokens=90, filters=Filters(max_chosen_tokens=4))


def test_a_stride_takes_every_so_many_th_usable_pair(tmp_path):
    path = write(
        tmp_path / "a.jsonl", *({"prompt": f"p{i}", "chosen": "c", "rejected": "r" * (i > 0)} for i in range(8))
    )
    config = RewardModelConfig(data={"preferences": str(path), "stride": 3, "held_out": 0.0, "on_bad_record": "skip"})
    assert [pair.prompt for pair in load_preference_data(config).training] == ["p1", "p4", "p7"]


def test_scores_of_unified_feedback_are_its_ratings(tmp_path):
    path = write(tmp_path / "a.jsonl", FORMS["Unified-Feedback"][0])
    config = RewardModelConfig(loss={"preference": "bt_margin"}, data={"preferences": str(path), "held_out": 0.0})
    assert [pair.margin for pair in load_preference_data(config).training] == [1.5]
