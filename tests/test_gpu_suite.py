"""What is prepared for a machine with a GPU runs as it will there: without packages it lacks, each part with its own end."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.models

ROOT = Path(__file__).resolve().parents[1]
ABSENT = (
    "ray",
    "vllm",
    "deepspeed",
    "flash_attn",
    "rich",
    "matplotlib",
    "scipy",
    "fsspec",
    "datasets",
    "peft",
    "tensorboard",
)


@pytest.fixture(scope="module")
def rows() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rows", ROOT / "benchmarks" / "rows.py")
    module = sys.modules["rows"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_part_runs_on_a_cpu_without_what_the_machine_lacks(rows):
    """All in one process, which has to import torch and transformers once only."""
    script = f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT}))\n"  # importing them fails from here on
    script += "sys.argv = ['parts.py', '--dry-run']; runpy.run_path('benchmarks/gpu/parts.py', run_name='__main__')"
    outcome = rows.run([sys.executable, "-c", script], 600)
    assert outcome.failure == ""
    names = {row.name.partition(":")[0].partition(",")[0] for row in outcome.rows}
    assert names == {
        "copy on the device", "bfloat16 product", "head", "learner", "log-probabilities", "weights by gloo", "weights",
        "SmolLM2-135M on the transformers engine",
    }  # fmt: skip
    (error,) = (row for row in outcome.rows if "in float64" in row.name)
    assert error.met


def test_a_part_that_fails_or_hangs_costs_the_others_nothing(rows, tmp_path):
    good = "from rows import Row, emit; emit(Row(name={!r}, unit='s', ours=1.0, ratio=2.0, means='m', goal='>= {}'))"
    scripts = {
        "fails": good.format("first", 3) + "; raise ValueError('a | reason')",
        "hangs": "import os, time; os.fork(); " + good.format("second", 1) + "; time.sleep(60)",
        "ends": good.format("third", 1),
    }
    environment = {"PYTHONPATH": str(ROOT / "benchmarks")}
    outcomes = []
    for name, script in scripts.items():
        command = ["env", *(f"{key}={value}" for key, value in environment.items()), sys.executable, "-c", script]
        outcomes.append(rows.run(command, 3 if name == "hangs" else 60, name))
    assert [bool(one.failure) for one in outcomes] == [True, True, False]
    assert "a | reason" in outcomes[0].failure and "3 s were up" in outcomes[1].failure
    assert [one.rows[0].name for one in outcomes[::2]] == ["first", "third"]
    assert {row.name for row in outcomes[1].rows} == {"second"}
    rows.write(outcomes, tmp_path / "RESULTS.md", "Title")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| first | s | 1 |  |  | 2 | m | >= 3 **not met** | `fails` |" in text
    assert "a / reason" in text and "3 s were up" in text
    then = rows.rows_of((tmp_path / "RESULTS.json").read_text())
    assert then["third"] == outcomes[2].rows[0]


def test_what_got_slower_is_named_in_the_direction_of_its_goal(rows):
    def row(name, ratio, goal):
        return rows.Row(name=name, unit="", ours=1.0, ratio=ratio, means="ours / limit", goal=goal)

    then = {one.name: one for one in (row("high", 1.0, ">= 0.5"), row("low", 1.0, "<= 2"), row("gone", 1.0, ""))}
    now = {one.name: one for one in (row("high", 0.5, ">= 0.5"), row("low", 0.5, "<= 2"), row("new", 1.0, ""))}
    told = rows.slower(now, then, 0.2)
    assert [line.partition(":")[0] for line in told] == ["high", "gone"]
    assert "was 1 and is 0.5, worse by 100%" in told[0]
    assert [line.partition(":")[0] for line in rows.slower(then, now, 0.2)] == ["low", "new"]
    with pytest.raises(ValueError, match="must be '>= NUMBER'"):
        row("bad", 1.0, "> 3")


def test_the_script_for_the_gpu_runs_the_parts_that_are_asked_for_and_writes_the_table(tmp_path):
    command = ["bash", ROOT / "benchmarks" / "gpu" / "run.sh", "--dry-run", "--only", "ceilings"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dry run: these numbers mean nothing" in (tmp_path / "RESULTS.md").read_text()
    (outcome,) = json.loads((tmp_path / "RESULTS.json").read_text())["outcomes"]
    assert outcome["failure"] == "" and [row["unit"] for row in outcome["rows"]] == ["TB/s read + written", "TFLOP/s"]
