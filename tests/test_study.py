"""`r2m study`: the grid, going on after a stop, and what it makes of runs' metrics, by hand."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from r2m_async import reference
from r2m_async.cli import main
from r2m_async.errors import ConfigError
from r2m_async.export import export
from r2m_async.intervals import interval
from r2m_async.run_directory import read_metrics
from r2m_async.study import accuracies, read_study, run_study, summary

GRID = {
    "variant": {"vanilla": {"head.variant": "vanilla"}, "r2m": {"head.variant": "r2m", "head.lr": 2e-5}},
    "estimator": {"rloo": {}, "grpo": {"advantage.name": "grpo"}},
}


@pytest.fixture
def study_file(tiny_config, tmp_path, monkeypatch):
    """`study_file(**changes)`: a study of the tiny ring, four cells, two seeds, two steps."""
    (tmp_path / "vowels.py").write_text("def gold(prompt, text, finished):\n    return float(text.count('o'))\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny_config.evaluation(gold="vowels:gold", every=None)
    (tmp_path / "base.yaml").write_text(config.to_yaml())

    def write(**changes):
        study = {"base": "base.yaml", "set": {"run.num_steps": 2}, "seeds": [3, 5], "grid": GRID} | changes
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(study, sort_keys=False))
        return path

    return write


def test_a_study_is_every_choice_of_labels_with_every_seed(study_file):
    _, _, runs = read_study(study_file(), Path())
    cells = ["vanilla-rloo", "vanilla-grpo", "r2m-rloo", "r2m-grpo"]
    assert [run.name for run in runs] == [f"{cell}-seed{seed}" for cell in cells for seed in (3, 5)]
    last = runs[-1].config
    assert (last.head.variant, last.head.lr, last.advantage.name) == ("r2m", 2e-5, "grpo")
    assert (last.run.num_steps, last.run.seed, runs[0].config.advantage.name) == (2, 5, "rloo")


def test_the_studies_that_ship_can_be_read():
    files = sorted((Path(__file__).resolve().parents[1] / "configs" / "studies").glob("*.yaml"))
    assert files and all(any(read_study(path, Path())[1:]) for path in files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "study.yaml: seeds: Tuple should have at least 1 item"),
        ({"sedes": [1]}, "study.yaml: sedes: Extra inputs are not permitted"),
        ({"seeds": [1, 1]}, "two runs have the same labels and seed"),
        ({"set": {"head.variannt": "r2m"}}, r"vanilla-rloo: head.variannt: no such key; did you mean head.variant\?"),
        ({"set": {"steps": 3}}, "vanilla-rloo: steps: no such key"),
        ({"base": "absent.yaml"}, "absent.yaml: cannot be read"),
        ({"grid": {"lr": {1.5e-4: {}}}}, r"grid.lr.0.00015.\[key\]: Input .* got 0.00015 \(.*put it in quotes"),
    ],
)
def test_what_is_wrong_in_a_study_is_told_before_anything_runs(study_file, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_study(study_file(**changes), Path())


@pytest.mark.models
def test_a_study_runs_what_is_missing_and_its_runs_are_the_ones_of_their_configs(study_file, tmp_path, capsys):
    grid = {"variant": GRID["variant"]}
    path, out, told = study_file(grid=grid), tmp_path / "out", []
    assert run_study(path, out, workers=2, tell=told.append) == [], told
    assert told[0] == "4 runs, 0 there already" and len(told) == 5
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"vanilla", "r2m"} and results["r2m"]["num_seeds"] == 2
    assert (out / "comparison.png").stat().st_size > 10_000

    (run,) = [run for run in read_study(path, out)[2] if run.name == "r2m-seed5"]
    rewards = reference.train(run.config).rewards
    steps = read_metrics(out / "runs" / "r2m-seed5" / "metrics.jsonl")
    assert [step["reward/mean"] for step in steps] == pytest.approx([np.mean(one) for one in rewards], abs=1e-6)

    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("metrics.jsonl")}
    shutil.move(out / "runs" / "r2m-seed5", out / "runs" / ".r2m-seed5.partial")  # as if it had been stopped
    assert main(["study", str(path), str(out), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "4 runs, 3 there already" in said and "1/1 r2m-seed5: " in said and "| vanilla | " in said
    after = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("metrics.jsonl")}
    assert after.keys() == before.keys()
    assert [path.parent.name for path in before if before[path] != after[path]] == ["r2m-seed5"]
    assert without_seconds(json.loads((out / "results.json").read_text())) == without_seconds(results)
    export(out / "runs" / "r2m-seed5", tmp_path / "exported")
    assert (tmp_path / "exported" / "policy" / "config.json").exists()

    with pytest.raises(ConfigError, match="vanilla-seed3 is a run of another config; remove it, or name another OUT"):
        run_study(study_file(grid=grid, set={"run.num_steps": 3}), out)


def without_seconds(results: dict) -> dict:
    return {cell: {key: value for key, value in row.items() if key != "seconds"} for cell, row in results.items()}


@pytest.fixture
def with_reward_models(study_file, tiny, tmp_path):
    """A study of the frozen reward model and of one that each seed trains for itself."""
    pairs = [{"prompt": f"the {word} :", "chosen": "lamp house", "rejected": "old stone"} for word in ("cat", "dog")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = {
        "run": {"device": "cpu"},
        "model": {"start": tiny("llama", True)},
        "head": {"init": "keep"},
        "data": {"preferences": str(tmp_path / "pairs.jsonl"), "held_out": 0.0},
        "optimizer": {"lr": 1e-2, "batch_size": 2},
    }
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(config))
    trained = {"config": "reward.yaml", "set": {"optimizer.epochs": 2}}
    grid = {"model": {"frozen": {}, "further": {"reward.model": "trained:further"}}}
    return lambda **changes: study_file(**{"grid": grid, "reward_models": {"further": trained}} | changes)


@pytest.mark.models
def test_reward_models_are_trained_once_per_seed_and_their_runs_start_from_them(with_reward_models, tmp_path):
    out, told = tmp_path / "out", []
    assert run_study(with_reward_models(seeds=[3, 5]), out, workers=2, tell=told.append) == [], told
    assert told[:2] == ["4 runs, 0 there already", "2 reward models, 0 there already"]
    first = [
        read_metrics(out / "runs" / f"{cell}-seed{seed}" / "metrics.jsonl")[0]["reward/mean"]
        for cell in ("frozen", "further")
        for seed in (3, 5)
    ]
    assert len(set(first)) == 4
    config = yaml.safe_load((out / "runs" / "further-seed5" / "config.yaml").read_text())
    assert config["reward"]["model"] == str(out / "reward_models" / "further-seed5" / "seed-5" / "model")

    told.clear()
    assert run_study(with_reward_models(seeds=[3, 5]), out, workers=1, tell=told.append) == []
    assert told == ["4 runs, 4 there already", "2 reward models, 2 there already"]
    with pytest.raises(ConfigError, match="further-seed3 is a run of another config"):
        run_study(with_reward_models(seeds=[3, 5], reward_models={"further": {"config": "reward.yaml"}}), out)


def test_a_reward_model_that_the_study_lacks_or_cannot_configure_is_told(with_reward_models):
    with pytest.raises(ConfigError, match="'trained:further' is no reward model of this study; reward_models has none"):
        read_study(with_reward_models(reward_models={}), Path())
    wrong = {"further": {"config": "reward.yaml", "set": {"loss.preferense": "bt"}}}
    with pytest.raises(ConfigError, match="reward_models.further: loss.preferense: no such key"):
        read_study(with_reward_models(reward_models=wrong), Path())


@pytest.mark.models
def test_a_study_that_is_killed_takes_its_runs_with_it(study_file, tmp_path):
    path, out = study_file(set={"run.num_steps": 10_000}, seeds=[1]), tmp_path / "out"
    study = subprocess.Popen(
        [sys.executable, "-m", "r2m_async.cli", "study", path, out, "--workers", "1"], cwd=tmp_path
    )
    metrics = wait_for(lambda: next((out / "runs").glob(".*.partial/metrics.jsonl"), None))
    wait_for(lambda: len(metrics.read_text().splitlines()) > 1)
    assert tmp_path in working_directories()
    study.kill()
    study.wait()
    wait_for(lambda: tmp_path not in working_directories(), seconds=30)


def wait_for(condition, seconds=120.0):
    """What it gives once that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "did not come true in time"
        time.sleep(0.2)
    return found


def working_directories() -> set[Path]:
    """Of all processes that may be looked at."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            found.add(Path(os.readlink(link)))
    return found


@pytest.mark.models
def test_a_run_that_fails_is_told_and_the_others_go_on(study_file, tmp_path):
    grid = {"gold": {"good": {}, "bad": {"evaluation.gold": "math:sqrt"}}}  # which takes one argument
    path, out, told = study_file(grid=grid, seeds=[1]), tmp_path / "out", []
    assert run_study(path, out, workers=1, tell=told.append) == ["bad-seed1"]
    assert any(line.startswith("bad-seed1 failed: ") for line in told)
    assert list(json.loads((out / "results.json").read_text())) == ["good"]


def test_the_heads_accuracy_is_that_of_the_last_evaluation(tmp_path):
    assert accuracies_of(tmp_path, []) == {}
    first = {"proxy_accuracy": 0.7, "frozen_accuracy": 0.7}
    last = {"proxy_accuracy": 0.4, "frozen_accuracy": 0.6}
    assert accuracies_of(tmp_path, [first, last]) == {"accuracy_end": 0.4, "accuracy_frozen": 0.6}
    assert math.isnan(accuracies_of(tmp_path, [first, {"proxy": 1.0}])["accuracy_end"])


def accuracies_of(run: Path, evaluations: list[dict]) -> dict[str, float]:
    (run / "evaluation.jsonl").write_text("".join(json.dumps(one) + "\n" for one in evaluations))
    return accuracies(run)


def steps_of(kl: list[float], gold: list[float]) -> list[dict]:
    """Every point five times over, so that smoothing leaves it as it is at its last."""
    return [
        {"kl/sequence": k, "reward/gold": g, "reward/mean": 2 * g, "time/since_start": 3.0 * at}
        for at, (k, g) in enumerate(zip(kl, gold, strict=True))
        for _ in range(5)
    ]


def test_gold_is_told_at_matched_kl_at_its_peak_and_over_the_area():
    told = summary(steps_of([0, 2, 4, 5], [0.0, 1.0, 3.0, 2.0]), (1, 4))
    assert told["gold_at_kl_1"] == pytest.approx(0.5) and told["gold_at_kl_4"] == pytest.approx(3.0)
    assert told["gold_peak"] == pytest.approx(3.0)
    assert told["gold_area"] == pytest.approx((0.5 * 2 * 1 + 0.5 * 2 * (1 + 3)) / 4, rel=1e-3)
    assert (told["gold_end"], told["kl_end"], told["proxy_end"]) == pytest.approx((2.0, 5.0, 4.0))
    assert told["seconds"] == 9.0


def test_a_run_that_did_not_reach_a_level_has_no_gold_there_and_no_area_up_to_it():
    told = summary(steps_of([0, 2, 4, 5], [0.0, 1.0, 3.0, 2.0]), (4, 8))
    assert told["gold_at_kl_4"] == pytest.approx(3.0)
    assert math.isnan(told["gold_at_kl_8"]) and math.isnan(told["gold_area"])


def test_where_kl_falls_back_its_first_passage_counts():
    told = summary(steps_of([0, 4, 1, 6], [0.0, 4.0, 100.0, 6.0]), (1, 4))
    assert told["gold_at_kl_1"] == pytest.approx(1.0) and told["gold_at_kl_4"] == pytest.approx(4.0)


def test_a_run_that_never_leaves_the_reference_has_no_area():
    told = summary(steps_of([0, 0.1], [1.0, 1.0]), (1,))
    assert math.isnan(told["gold_at_kl_1"]) and math.isnan(told["gold_area"]) and told["gold_peak"] == 1.0


def test_intervals_are_students():
    values = [1.0, 2.0, 4.0, 4.5]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    told = interval([*values, float("nan")])
    assert (told["mean"] - told["half_width"], told["mean"] + told["half_width"]) == pytest.approx((low, high))
    assert told["count"] == 4
    assert interval([1.0]) == {"mean": 1.0, "half_width": None, "count": 1}
    assert interval([float("nan")]) == {"mean": None, "half_width": None, "count": 0}


@pytest.mark.models
def test_a_study_of_reward_models_alone_measures_each_and_tells_them_by_name(tmp_path, little_embedded, monkeypatch):
    study = {
        "seeds": [2, 4],
        "reward_models": {
            "bt": {"config": "bt.yaml"},
            "bsr": {"config": "bt.yaml", "set": {"loss.bsr": "squared_mean"}},
        },
        "evaluate": True,
        "best_of_n": {"n": 6, "prompts": 3},
    }
    pairs = [
        {
            "prompt": f"say something warm about a {noun} :",
            "chosen": f"the {noun} moves .",
            "rejected": f"a {noun} sees .",
        }
        for noun in ("lamp", "river", "house", "cat")
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = {
        "run": {"device": "cpu"},
        "model": {"start": str(little_embedded.reward_model)},
        "head": {"init": "keep"},
        "data": {"preferences": str(tmp_path / "pairs.jsonl"), "held_out": 0.25},
        "optimizer": {"lr": 1e-2, "batch_size": 2},
    }
    (tmp_path / "bt.yaml").write_text(yaml.safe_dump(config))
    path, out, told = tmp_path / "study.yaml", tmp_path / "out", []
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    monkeypatch.setattr("r2m_async.embedded.embedded_models", lambda: little_embedded)  # whose samples are the pool
    assert run_study(path, out, workers=2, tell=told.append) == [], told
    results = json.loads((out / "reward_models" / "results.json").read_text())
    assert list(results["models"]) == list(results["best_of_n"]["models"]) == ["bt", "bsr"]
    assert (
        results["models"]["bsr"]["num_seeds"] == 2 and (out / "reward_models" / "best_of_n.png").stat().st_size > 5000
    )

    ones = [
        json.loads((out / "reward_models" / f"bt-seed{seed}" / "best_of_n" / "results.json").read_text())
        for seed in (2, 4)
    ]
    gold = [next(iter(one["models"].values()))["gold"] for one in ones]
    assert results["models"]["bt"]["bon_gold"]["mean"] == pytest.approx((gold[0][-1] + gold[1][-1]) / 2)
    assert results["best_of_n"]["models"]["bt"]["gold"] == pytest.approx(np.mean(gold, 0))
    assert results["models"]["bt"]["bon_gold_peak"]["mean"] == pytest.approx((max(gold[0]) + max(gold[1])) / 2)
    assert "| bsr | " in (out / "reward_models" / "table.md").read_text()

    told.clear()
    shutil.rmtree(out / "reward_models" / "bt-seed4" / "best_of_n")  # as if it had been stopped there
    assert run_study(path, out, workers=1, tell=told.append) == []
    assert told[:2] == ["0 runs, 0 there already", "4 reward models, 3 there already"]
    assert json.loads((out / "reward_models" / "results.json").read_text()) == results
