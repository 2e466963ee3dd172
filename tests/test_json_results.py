"""`--json`: standard output is one JSON document and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r2m_async.cli import main
from r2m_async.commands.results import document, only_to_stderr

QUICKSTART = str(Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml")


@pytest.fixture(autouse=True)
def own_search_path(monkeypatch, tmp_path):
    """`main` puts the working directory on it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)


def answered(capsys, *arguments: str, status: int = 0) -> dict:
    """The document that a command prints with `--json`, which may stand anywhere."""
    for where in ([*arguments, "--json"], ["--json", *arguments]):
        assert main(where) == status
        found = json.loads(capsys.readouterr().out)
        assert found["status"] == status
    return found


def test_a_plan_is_a_document(capsys):
    result = answered(capsys, "plan", QUICKSTART, "run.num_steps=4", "--generate", "2")["result"]
    assert result["stage_times"]["generate"] == 2
    assert result["policy_age_max"] <= 1 and result["discarded"] == 0 and result["idle"]


def test_an_explanation_and_a_schema_are_documents(capsys):
    assert "policy steps" in answered(capsys, "config", "--explain", "run.num_steps")["result"]["explanation"]
    assert "scheduling" in answered(capsys, "config", "--schema")["result"]["properties"]


def test_a_users_mistake_is_a_document_with_the_message_that_standard_error_has(capsys):
    assert main(["plan", QUICKSTART, "run.num_step=4", "--json"]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found == {"status": 2, "error": err.removeprefix("r2m: ").rstrip("\n")}
    assert "did you mean run.num_steps?" in found["error"]


def test_arguments_that_cannot_be_read_and_errors_that_nobody_foresaw_are_documents_too(capsys, monkeypatch):
    assert main(["nonsense", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["status"] == 2 and "invalid choice: 'nonsense'" in json.loads(out)["error"]
    assert err.startswith("usage: r2m")
    monkeypatch.setattr("r2m_async.commands.ring.simulate", lambda *_, **__: 1 / 0)
    assert main(["plan", QUICKSTART, "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"status": 1, "error": "ZeroDivisionError: division by zero"}
    assert "Traceback" in err


def test_what_libraries_and_processes_print_goes_to_standard_error(capfd):
    with only_to_stderr():
        print("python")
        os.write(1, b"library\n")
        subprocess.run([sys.executable, "-c", "print('process')"], check=True)
    print("afterwards")
    out, err = capfd.readouterr()
    assert out == "afterwards\n"
    assert all(word in err for word in ("python", "library", "process"))


def test_numbers_that_json_does_not_have_are_null():
    assert json.loads(document(0, {"a": float("nan"), "b": [float("inf")]}))["result"] == {"a": None, "b": [None]}


@pytest.mark.ring
def test_check_train_and_samples_are_documents(capsys, tiny_config, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_config.evaluation(every=3, num_prompts=2).to_yaml(), encoding="utf-8")
    assert main(["check", str(path), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)["result"]
    assert checked["config"]["run"]["num_steps"] == 3 and checked["not_checked"] == [] and checked["lines"][-1] == "ok"
    assert main(["train", str(path), "--in-process", "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)["result"]
    assert trained["steps"] == 3 and "kl/sequence" in trained["metrics"]
    assert main(["samples", trained["run_directory"], "--json"]) == 0
    assert {one["step"] for one in json.loads(capsys.readouterr().out)["result"]["evaluations"]} == {0, 3}


@pytest.mark.parametrize(("rank", "documents"), [("0", 1), ("1", 0)])
def test_of_the_ranks_that_torchrun_started_the_first_alone_answers(capsys, monkeypatch, rank, documents):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", rank)
    assert main(["config", "--explain", "run.num_steps", "--json"]) == 0
    assert capsys.readouterr().out.count('"status": 0') == documents
