"""`r2m init`: a commented config that `r2m check` accepts, and what it refuses to guess."""

import re
import sys

import pytest

from r2m_async.cli import main
from r2m_async.config import R2MConfig
from r2m_async.config_reference import commented

pytestmark = pytest.mark.models


@pytest.fixture(autouse=True)
def own_search_path(monkeypatch, tmp_path):
    """`main` puts the working directory on it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def named(tiny, prompts_file) -> list[str]:
    return ["--policy", tiny("qwen2", False), "--reward", tiny("llama", True), "--prompts", prompts_file]


@pytest.mark.parametrize(
    "hardware",
    [["--cpu"], ["--gpus", "1", "--gpu-memory", "80"], ["--gpus", "8", "--gpu-memory", "80"]],
    ids=["cpu", "one_gpu", "eight_gpus"],
)
def test_check_accepts_what_init_writes_and_every_key_has_a_comment(capsys, named, hardware, tmp_path):
    out = tmp_path / "first.yaml"
    assert main(["init", *named, *hardware, "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    for line, above in zip(text.splitlines()[1:], text.splitlines(), strict=False):
        if re.match(r" {0,2}\w+:", line):
            assert above.lstrip().startswith("#"), line
    on_cpu = ["run.device=cpu"]  # there is no GPU here
    assert main(["check", str(out), *on_cpu]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("# ok")
    config = R2MConfig.from_yaml(out)
    users = config.rollouts.num_actors + config.reward.replicas + config.learner.num_ranks
    assert users == {"--cpu": 3, "1": 3, "8": 8}[hardware[min(1, len(hardware) - 1)]]


def test_models_that_do_not_fit_get_adapters_and_then_are_refused(capsys, named):
    def written(gpu_memory: str) -> str:
        assert main(["init", *named, "--gpus", "3", "--gpu-memory", gpu_memory]) == 0
        return capsys.readouterr().out

    assert "lora:" not in written("80") and "activation_checkpointing" not in written("80")
    assert main(["init", *named, "--gpus", "3", "--gpu-memory", "0.001"]) == 2
    assert "the models do not fit, even with adapters" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, told",
    [
        (
            ["--policy", "no/where", "--reward", "no/where", "--prompts", "a", "--cpu"],
            "--policy no/where: is no directory",
        ),
        (["--policy", "no/where", "--reward", "no/where", "--cpu"], "--prompts is not given"),
        (["--policy", "embedded", "--reward", "no/where", "--cpu"], "name both or neither"),
        (["--policy", "embedded:letters", "--reward", "embedded", "--cpu"], "--policy is 'embedded:letters': only the"),
        (["--policy", "embedded", "--reward", "embedded", "--gpus", "0"], "--gpus is 0"),
    ],
)
def test_what_cannot_be_known_is_refused(capsys, arguments, told):
    assert main(["init", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and told in err


def test_what_check_would_refuse_is_not_written(capsys, tiny, prompts_file, tmp_path):
    policy, reward = tiny("qwen2", False), tiny("llama", True)
    for models, prompts, told in (
        ((reward, reward), prompts_file, "name a causal language model"),
        ((policy, policy), prompts_file, "r2m: reward.model"),
        ((policy, reward), str(tmp_path / "none.jsonl"), "no such file"),
    ):
        named = ["--policy", models[0], "--reward", models[1], "--prompts", prompts]
        assert main(["init", *named, "--cpu", "--out", str(tmp_path / "first.yaml")]) == 2
        assert told in capsys.readouterr().err
    assert (
        main(["init", *named[:4], "--prompts", prompts_file, "--cpu", "--out", str(tmp_path / "no" / "first.yaml")])
        == 2
    )
    assert f"{tmp_path}/no is no directory" in capsys.readouterr().err
    assert not (tmp_path / "first.yaml").exists()


def test_the_memory_of_a_gpu_that_is_not_here_is_asked_for(capsys, named, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["init", *named, "--gpus", "1"]) == 2
    assert "say it by --gpu-memory GIB" in capsys.readouterr().err


def test_the_embedded_models_need_nothing_and_no_file_is_replaced(capsys, tmp_path):
    out = str(tmp_path / "first.yaml")
    assert main(["init", "--policy", "embedded", "--reward", "embedded", "--cpu", "--out", out]) == 0
    assert R2MConfig.from_yaml(out).rollouts.max_new_tokens == 40
    assert main(["init", "--policy", "embedded", "--reward", "embedded", "--cpu", "--out", out]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_commented_config_reads_back_as_it_was(tmp_path):
    values = {"reward": {"functions": {"mine": {"function": "a:b", "weight": 2.0}}}, "queue": {"max_bytes": 7}}
    path = tmp_path / "config.yaml"
    path.write_text(commented(R2MConfig, values), encoding="utf-8")
    assert R2MConfig.from_yaml(path) == R2MConfig.from_dict(values)
    assert "  # The most bytes that all groups together may take in the queue.\n  max_bytes: 7\n" in path.read_text()
