"""Texts that a model cannot read are told in a line by every command: a template refuses them, or a token has no embedding."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from r2m_async.cli import main
from r2m_async.data.chat import TemplateRefusal
from r2m_async.data.prompts import prompt_text
from r2m_async.errors import ConfigError
from r2m_async.reward_models.ensemble import RewardEnsemble

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ONE_QUESTION = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + TURNS
WRONG_TYPE = "{% for m in messages %}{{ m.role + 1 }}{% endfor %}"


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """A folder with `policy` and `reward`, whose tokenizers know a token more than the models, and with data."""
    monkeypatch.chdir(tmp_path)
    for name, family, classifier in (("policy", "qwen2", False), ("reward", "llama", True)):
        shutil.copytree(tiny(family, classifier), tmp_path / name)
        change_tokenizer(tmp_path / name, lambda tokenizer: tokenizer.add_tokens(["<|new|>"]))
    (tmp_path / "rm.yaml").write_text(
        "run: {name: rm, device: cpu}\nmodel: {start: policy}\nlogging: {live: false}\n"
        "data: {preferences: pairs.jsonl, held_out: 0.0}\n"
    )
    return tmp_path


def change_tokenizer(directory, change):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    change(tokenizer)
    tokenizer.save_pretrained(directory)


def give_template(directory, template):
    change_tokenizer(directory, lambda tokenizer: setattr(tokenizer, "chat_template", template))


def write_data(folder, prompt, response=" warm"):
    """One prompt in the form of every command."""
    pair = {"prompt": prompt, "chosen": response, "rejected": " cold"}
    pool = {"prompt": prompt, "responses": [" cold", response], "golds": [0, 1]}
    asked = {"question_id": 1, "category": "writing", "turns": ["the river", f"and {prompt}"]}
    answer = {"instruction": prompt, "output": response}
    (folder / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 2)
    (folder / "pool.jsonl").write_text(json.dumps(pool) + "\n")
    (folder / "asked.jsonl").write_text(json.dumps(asked) + "\n")
    (folder / "answers.json").write_text(json.dumps([answer]))


GENERATE = "eval generate policy --prompts asked.jsonl --format mt_bench --out said.jsonl --engine transformers"
READERS = {
    "training": "reward-model train rm.yaml",
    "evaluation": "reward-model eval reward --pairs pairs.jsonl --out out",
    "best of n": "bon reward --pool pool.jsonl --n 2 --out out",
    "judge": "eval judge answers.json --judge reward --out out",
    "states": "policy-states policy --pairs pairs.jsonl --out out",
    "answers": GENERATE,
}


@pytest.mark.parametrize("command", READERS.values(), ids=READERS)
def test_a_token_beyond_the_embeddings_is_told_by_every_command(folder, capsys, command):
    write_data(folder, "the <|new|> river")
    assert main(command.split()) == 2
    assert "'<|new|>'" in (told := capsys.readouterr().err) and "has no embedding in" in told


def test_pairs_with_a_token_beyond_the_embeddings_can_be_skipped(folder):
    write_data(folder, "the river", " <|new|>")
    good = json.dumps({"prompt": "the river", "chosen": " warm", "rejected": " cold"}) + "\n"
    with open(folder / "pairs.jsonl", "a") as pairs:
        pairs.write(good)
    assert main([*READERS["training"].split(), "data.on_bad_record=skip", "optimizer.batch_size=1"]) == 0


@pytest.mark.parametrize(
    "command", ["bon reward --pool pool.jsonl --n 2 --out out", READERS["judge"], READERS["states"]]
)
def test_whatever_a_chat_template_raises_is_told_in_a_line(folder, capsys, command):
    write_data(folder, [{"role": "user", "content": "the river"}])
    (folder / "answers.json").write_text(json.dumps([{"instruction": "the river", "output": " warm"}]))
    for name in ("policy", "reward"):
        give_template(folder / name, WRONG_TYPE)
    assert main(command.split()) == 2
    assert "refuses the" in (told := capsys.readouterr().err) and "can only concatenate str" in told


def test_a_template_that_refuses_a_later_turn_is_told_before_anything_is_answered(folder, capsys):
    write_data(folder, "the wind")
    give_template(folder / "policy", ONE_QUESTION)
    assert main(GENERATE.split()) == 2
    assert "refuses turn 2 (one turn only)" in capsys.readouterr().err
    assert not list(folder.glob(".said*"))


def test_a_refusal_says_which_turns_and_why(tiny, folder):
    give_template(folder / "reward", WRONG_TYPE)
    with pytest.raises(TemplateRefusal, match=r"'reward' refuses the turns \[user: 'hi'\] \(can only"):
        prompt_text((("user", "hi"),), AutoTokenizer.from_pretrained("reward"))
    with pytest.raises(TemplateRefusal, match=r"assistant: ' warm'"):
        RewardEnsemble("reward").score([("user", "hi")], [" warm"])


@pytest.mark.parametrize("what", ["eos_token", "bos_token", "pad_token"])
def test_a_reward_model_that_lacks_its_tokenizers_special_token_scores_nothing(folder, what):
    change_tokenizer(folder / "reward", lambda tokenizer: setattr(tokenizer, what, "<|new|>"))
    if what == "pad_token":
        config = json.loads((folder / "reward" / "config.json").read_text())
        (folder / "reward" / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    with pytest.raises(ConfigError, match="reward.*embeddings for"):
        RewardEnsemble("reward")
