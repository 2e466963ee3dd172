"""What a run answered to held-out prompts is kept at every evaluation, and `r2m samples` shows the first and the last."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r2m_async.cli import main
from r2m_async.commands.samples import _printable
from r2m_async.errors import DataError
from r2m_async.launch.training import train
from r2m_async.runs.records import append_records, read_metrics, read_records
from r2m_async.runs.samples import read_samples

pytestmark = pytest.mark.models


@pytest.fixture
def run(tiny_config, tmp_path):
    """Two steps, evaluated before each and at the end."""
    config = tiny_config.run(num_steps=2, output_dir=str(tmp_path)).evaluation(every=1, num_prompts=2)
    config = config.reward(missing_eos_penalty=0.25, length_penalty=0.125).rollouts(temperature=1e-3)
    return train(config.logging(tensorboard=False, live=False), in_process=True)


def test_each_evaluation_leaves_the_first_response_to_every_held_out_prompt(run, prompts_file):
    samples, evaluations = read_records(run / "samples.jsonl"), read_metrics(run / "evaluation.jsonl")
    held_out = [json.loads(line)["prompt"] for line in Path(prompts_file).read_text().splitlines()][-2:]
    assert [(one["step"], one["prompt"]) for one in samples] == [(s, p) for s in (0, 1, 2) for p in held_out]
    for step, evaluation in enumerate(evaluations):
        # At a temperature next to 0 all responses of a group are the same, so the first one stands for their mean.
        rewards = [one["reward"] for one in samples if one["step"] == step]
        assert evaluation["reward"] == pytest.approx(sum(rewards) / 2, abs=1e-4)
        assert evaluation["reward"] < evaluation["frozen"] - 0.1  # the penalties


def test_the_command_shows_rewards_of_all_evaluations_and_the_first_and_the_last_answer(run, capsys):
    samples = read_records(run / "samples.jsonl")
    assert main(["samples", str(run), "--num", "1"]) == 0
    out = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert rows == ["step", "---", "0", "1", "2"]
    shown = {one["step"]: one for one in samples if one["prompt"] == samples[0]["prompt"]}
    assert samples[0]["prompt"] in out
    assert samples[1]["prompt"] not in out
    assert f"step 0, reward {shown[0]['reward']:.2f}" in out
    assert f"step 2, reward {shown[2]['reward']:.2f}" in out
    assert "step 1, reward" not in out
    word = shown[2]["response"].split()[0]  # of a model that has learnt nothing: it may have any character
    assert _printable(word) in out.partition("step 2,")[2]


def test_answers_of_an_evaluation_that_a_kill_cut_off_are_left_out(tmp_path, capsys):
    """The last evaluation has the answer to the first of two prompts alone."""
    sample = {"prompt_id": "a", "prompt": "once", "response": "upon", "reward": None, "gold": None, "finished": True}
    records = [sample | {"step": 0.0, "prompt_id": "b"}, sample | {"step": 0.0}, sample | {"step": 1.0}]
    append_records(tmp_path / "samples.jsonl", records)
    append_records(tmp_path / "evaluation.jsonl", [{"step": 0.0, "reward": 1.0, "length": 2.0}])
    assert main(["samples", str(tmp_path)]) == 0
    of_b, of_a = capsys.readouterr().out.partition("\na: ")[::2]
    assert of_b.count("  step 0:") == 1 and "step 1" not in of_b and of_a.count("  step 1:") == 1


@pytest.mark.parametrize("name", ["reward", "gold"])
def test_a_score_that_was_changed_is_told(tmp_path, name):
    sample = {"step": 0.0, "prompt_id": "a", "prompt": "once", "response": "upon", name: "high"}
    append_records(tmp_path / "samples.jsonl", [sample])
    with pytest.raises(DataError, match=f"samples.jsonl: step 0 has 'high' as '{name}': it was changed"):
        read_samples(tmp_path / "samples.jsonl")


def test_a_run_without_evaluations_is_refused_with_the_key(tiny_config, tmp_path, capsys):
    assert main(["samples", str(tmp_path)]) == 2
    assert "evaluation.every" in capsys.readouterr().err


@pytest.fixture
def written(tmp_path):
    """Writes the files that `r2m samples` reads: one evaluation, and one answer."""

    def write(evaluation=None, **sample):
        given = {"step": 0.0, "prompt_id": "a", "prompt": "once", "response": "upon", "reward": 1.0, "finished": True}
        append_records(tmp_path / "samples.jsonl", [given | sample])
        append_records(tmp_path / "evaluation.jsonl", [{"step": 0.0} | (evaluation or {"reward": 1.0, "length": 2.0})])
        return str(tmp_path)

    return write


def test_what_a_model_wrote_cannot_command_the_terminal(written, capsys):
    run = written(prompt="\x1b[2J first", response="\x1b]0;title\x07 \u202edear \u0645\u0631\u062d\u0628\u0627 \u200d")
    assert main(["samples", run]) == 0
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\u202e") and r"\x1b[2J first" in out and r"\u202edear" in out
    assert "\u0645\u0631\u062d\u0628\u0627 \u200d" in out, (
        "letters that are written from right to left stay, and joiners do"
    )


def test_lines_are_as_long_as_the_terminal_is_wide(written, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["samples", written(prompt="dear " * 50, response="river " * 50)]) == 0
    lines = capsys.readouterr().out.split("a: ")[1].splitlines()
    assert len(lines) > 10 and max(map(len, lines)) <= 40


def test_an_evaluation_without_a_number_has_a_dash_in_its_place(written, capsys):
    assert main(["samples", written({"reward": 1.5, "reward_se": None, "gold": None, "gold_se": 0.5})]) == 0
    assert "| 0 | 1.500 | – ± 0.500 | – |" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["-1", "few"])
def test_the_number_of_prompts_is_a_whole_one(number, capsys):
    with pytest.raises(SystemExit):
        main(["samples", "RUN", "--num", number])
    assert "is no whole number of 0 or more" in capsys.readouterr().err


def test_a_terminal_that_lacks_a_letter_shows_its_escape(written):
    command = [sys.executable, "-m", "r2m_async.cli", "samples", written(response="\u6f22 \ud800")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "") and r"\u6f22 \ud800" in done.stdout
