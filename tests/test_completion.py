"""Completions of the command line, asked for as bash does it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from r2m_async.commands.completion import key_candidates
from r2m_async.config import R2MConfig
from r2m_async.config_reference import allowed_values, explain
from r2m_async.reward_models.config import RewardModelConfig

ROOT = Path(__file__).resolve().parents[1]
ASK = """
eval "$(register-python-argcomplete r2m)"
COMP_LINE=$1; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9
_python_argcomplete r2m
printf '%s\\n' "${COMPREPLY[@]}"
"""
"""Bash's own way: it calls the function of the completion with the line, and reads COMPREPLY."""


@pytest.fixture
def completed(tmp_path):
    (tmp_path / "r2m").write_text(f"#!/bin/sh\nexec {sys.executable} -m r2m_async.cli\n")
    (tmp_path / "r2m").chmod(0o755)
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "mine.txt").write_text("")
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])

    def ask(line: str) -> list[str]:
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        bash = ["bash", "--noprofile", "--norc", "-c", ASK, "bash", line]
        done = subprocess.run(bash, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
        return [word.strip() for word in done.stdout.splitlines()]

    return ask


@pytest.mark.parametrize(
    "line, answer",
    [
        ("r2m wat", ["watch"]),
        ("r2m train mi", ["mine.yaml"]),
        ("r2m train mine.yaml scheduling.la", ["scheduling.lag="]),
        ("r2m train mine.yaml scheduling.lag=e", ["exact"]),  # bash splits words at `=`
        ("r2m reward-model train mine.yaml loss.prefere", ["loss.preference="]),
        ("r2m config --explain queue.j", ["queue.journal"]),
    ],
)
def test_bash_completes_commands_files_keys_and_values(completed, line, answer):
    assert completed(line) == answer


@pytest.mark.parametrize("tree", [R2MConfig, RewardModelConfig])
def test_every_key_is_a_candidate_and_its_values_are_those_that_its_explanation_names(tree):
    known = allowed_values(tree)
    sections = {name for name in known if name.count(".") == 1}
    assert sections == {
        f"{section}.{key}" for section, field in tree.model_fields.items() for key in field.annotation.model_fields
    }
    for name, values in known.items():
        told = explain(tree, name)
        assert all(value in told or value in ("true", "false") for value in values), name
    assert known["run.seed"] == ()
    assert key_candidates("rollouts.engine=v", False, True) == ["rollouts.engine=vllm"]
