"""The benchmarks do what their numbers claim, at sizes that take seconds."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from r2m_async.config import R2MConfig

pytestmark = pytest.mark.ring

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def learner_step() -> ModuleType:
    spec = importlib.util.spec_from_file_location("learner_step", ROOT / "benchmarks" / "learner_step.py")
    module = sys.modules["learner_step"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stages, how", [((0, 2), []), pytest.param((2,), ["--alone"], marks=pytest.mark.cross)])
def test_the_learner_step_is_measured_for_every_contender(stages, how, tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "learner_step.py", "--shape", "tiny", "--rounds", "1"]
    command += ["--device", "cpu", "--stages", *map(str, stages), "--json", tmp_path / "result.json", *how]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, capture_output=True, timeout=200, env=os.environ | {"PYTHONPATH": path})
    result = json.loads((tmp_path / "result.json").read_text())
    engines = ("torch", *(f"zero-{stage}" for stage in stages))
    ours = {f"ours {engine}{refresh}" for engine in engines for refresh in ("", ", no refresh")}
    contenders = {"plain", *(f"bare zero-{stage}" for stage in stages)} | ours
    assert result["seconds"].keys() == contenders | {f"{name}, proximal" for name in ours}
    assert result["tokens_per_s"].keys() == contenders
    assert result["ratios"].keys() == {
        "ours torch / plain",
        *(f"bare zero-{stage} / plain" for stage in stages),
        *(f"ours zero-{stage} / bare zero-{stage}" for stage in stages),
        *(f"ours {engine} / ours {engine}, no refresh" for engine in engines),
    }
    numbers = [number for section in ("seconds", "ratios", "tokens_per_s") for number in result[section].values()]
    assert all(number > 0 for number in numbers)


def test_the_queues_own_time_is_measured_with_few_groups_and_with_many(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    importlib.import_module("codec").metadata(rounds=1)
    row = json.loads(capsys.readouterr().out.partition("ROW ")[2])
    assert row["ours"] > 0 and row["other"] > 0 and row["unit"] == "us"


def test_a_table_of_one_command_alone_keeps_what_it_has_of_the_others_each_once(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench, rows = importlib.import_module("bench"), importlib.import_module("rows")
    monkeypatch.setattr(bench, "SET", {"a.py": 1, "a.py --more": 1, "b.py": 1, "c.py": 1})
    monkeypatch.setattr(bench, "run", lambda command, limit, name: rows.Outcome(command=name, seconds=2.0))
    before = [
        rows.Outcome(command=f"python {one}", seconds=1.0)
        for one in ("a.py", "a.py --more", "b.py", "c.py --trl PYTHON")
    ]
    rows.write(before, tmp_path / "out.md", "before")
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only", "b.py", "--out", str(tmp_path / "out.md")])
    with pytest.raises(SystemExit, match="False"):
        bench.main()
    after = rows.outcomes_of((tmp_path / "out.json").read_text())
    assert [(one.command, one.seconds) for one in after] == [
        ("python a.py", 1.0), ("python a.py --more", 1.0), ("python b.py", 2.0), ("python c.py --trl PYTHON", 1.0)
    ]  # fmt: skip


def test_ten_thousand_damaged_inputs_are_accepted_or_refused_by_the_one_error_of_their_reader():
    command = [sys.executable, ROOT / "benchmarks" / "fuzz.py", "--inputs", "10000"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["codec", "journal", "metrics", "data", "checkpoint", "config"]
    assert sum(int(row[1]) for row in rows) == 10_000 and all(int(row[3]) > 0 for row in rows)


def test_a_run_that_is_hurt_ends_as_one_that_nothing_disturbed(tmp_path):
    table, kinds = tmp_path / "table.md", ["kill policy-learner", "kill driver", "messages twice"]
    table.write_text("before\n<!-- the table of benchmarks/chaos.py -->\nold\n<!-- its end -->\nbehind\n")
    command = [
        sys.executable,
        ROOT / "benchmarks" / "chaos.py",
        "--ring",
        "transformers",
        "--each",
        "1",
        "--steps",
        "10",
    ]
    command += ["--json", tmp_path / "result.json", "--table", table, "--kinds", *kinds]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    ring = json.loads((tmp_path / "result.json").read_text())["transformers"]
    assert ring["wrong"] == []
    assert {kind: (one["tried"], one["survived"]) for kind, one in ring["faults"].items()} == dict.fromkeys(
        kinds, (1, 1)
    )
    assert all(one["by"] == {"itself": 1} for kind, one in ring["faults"].items() if kind != "kill driver")
    text = table.read_text()
    assert text.startswith("before\n<!-- the") and text.endswith("<!-- its end -->\nbehind\n") and "old" not in text
    assert "| kill driver | 1 | 1 | 0 |" in text


def test_every_ring_that_chaos_hurts_has_a_config_that_can_run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    chaos = importlib.import_module("chaos")
    for ring in chaos.RINGS:
        for lag in ("exact", "bounded"):
            config = chaos.config_of(ring, argparse.Namespace(steps=4, lag=lag), tmp_path)
            assert config.scheduling.lag == ("bounded" if ring in ("deepspeed", "vllm-in-flight") else lag)


def test_a_head_update_is_measured_against_a_full_one(tmp_path):
    command = [
        sys.executable,
        ROOT / "benchmarks" / "head_update.py",
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--hidden",
        "64",
    ]
    command += ["--layers", "2", "--policy-hidden", "32", "--width", "16", "--groups", "2", "--tokens", "16"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command += ["--json", tmp_path / "result.json"]
    subprocess.run(command, check=True, capture_output=True, timeout=400, env=os.environ | {"PYTHONPATH": path})
    result = json.loads((tmp_path / "result.json").read_text())
    parameters, peaks = result["parameters"], result["peak_mb"]
    assert parameters["head"] == 2 * 64 * 16 + 2 * 32 * 16 + 64 < parameters["full"]
    # Float32 weights, gradients and two moments of each, and the head's states: 2 groups x 4 x 15 positions x 32.
    held = {"head": 16 * parameters["head"] + 4 * 2 * 4 * 15 * 32, "full": 16 * parameters["full"]}
    for name, num_bytes in held.items():
        assert num_bytes / 1e6 < peaks[name] < 5 * num_bytes / 1e6
    assert result["full / head"]["peak_mb"] == pytest.approx(peaks["full"] / peaks["head"])
    assert result["full / head"]["seconds"] == pytest.approx(result["seconds"]["full"] / result["seconds"]["head"])


def test_the_forms_of_every_stage_are_measured_on_the_same_step(tmp_path, tiny_config):
    (tmp_path / "tiny.yaml").write_text(tiny_config.to_yaml(), encoding="utf-8")
    command = [sys.executable, ROOT / "benchmarks" / "stage_costs.py", "--config", tmp_path / "tiny.yaml"]
    command += ["--rounds", "1", "--json", tmp_path / "result.json"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, capture_output=True, timeout=200, env=os.environ | {"PYTHONPATH": path})
    result = json.loads((tmp_path / "result.json").read_text())
    stages = Counter(name.partition(":")[0] for name in result["cpu_seconds_of_a_step"])
    assert stages == {"generate": 4, "train": 3, "embed": 2, "adamw": 2}
    assert len(result["ratios"]) == stages.total() - len(stages)
    assert "train: one padded pass / similar lengths" in result["ratios"]
    assert result["tokens"]["own"] <= result["tokens"]["with padding"]


def test_the_loops_start_at_the_learners_log_probs_and_the_flops_are_those_that_torch_counts(learner_step):
    shape = learner_step.SHAPES["tiny"]
    config = R2MConfig.from_dict({"run": {"device": "cpu"}, "learner": {"tokens_per_microbatch": 64}})
    work, model = learner_step.work_for(shape, config), shape.model(config)
    with FlopCounterMode(display=False) as counter:
        losses = list(learner_step.losses(work, learner_step.ResponseLogprobs(model)))
        for loss in losses:
            loss.backward()
    torch.testing.assert_close(sum(loss.detach() for loss in losses), -work.advantages_B.mean())  # all ratios are 1
    assert counter.get_total_flops() == pytest.approx(shape.flops(), rel=0.15)  # one input token fewer of 16


def test_the_table_of_rounding_is_that_of_the_measurement_and_the_presets_follow_it():
    docs = ROOT / "docs"
    rows = json.loads((docs / "sampler_mismatch.json").read_text())["rows"]
    table = (docs / "algorithms.md").read_text().partition("### How much of w is rounding")[2].partition("\n\nSo in")[0]
    told = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines() if line.startswith("| ")][
        1:
    ]
    measured = []
    for row in rows:
        (ess, outside), (token_ess, token_outside) = (
            (row[level]["effective_sample_size"], 100 * row[level]["outside_half_and_double"])
            for level in ("sequence", "token")
        )
        few = f"{token_outside:.1f}".removesuffix(".0")
        measured.append([str(row["tokens"]), f"{ess:.2f}", f"{outside:.0f} %", f"{token_ess:.3f}", f"{few} %"])
    assert told == measured[:6] + measured[-1:]
    for preset in sorted((ROOT / "configs" / "presets").glob("*.yaml")):
        assert R2MConfig.from_yaml(preset).objective.off_policy_level == "token", preset.name
