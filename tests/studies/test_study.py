"""`r2m study`: the grid, going on after a stop, and what it makes of runs' metrics, by hand."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from processes import left_of, word_of
from scipy import stats

from r2m_async import reference
from r2m_async.cli import main
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.evaluation.plots import best_of_n_figure, plot_best_of_n
from r2m_async.export import export
from r2m_async.runs.records import append_records, read_metrics
from r2m_async.studies.cells import accuracies, area_to_kl, compare_cells, summary
from r2m_async.studies.intervals import interval, seeds_row, seeds_table
from r2m_async.studies.reward_models import summary as reward_summary
from r2m_async.studies.study import _is_there, read_study, run_study
from r2m_async.whole import only_writer

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
    files = sorted((Path(__file__).resolve().parents[2] / "configs" / "studies").glob("*.yaml"))
    assert files and all(any(read_study(path, Path())[1:]) for path in files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "study.yaml: seeds: Tuple should have at least 1 item"),
        ({"sedes": [1]}, "study.yaml: sedes: no such key; valid are base, set, seeds, grid,"),
        ({"seeds": [1, 1]}, "two runs have the same labels and seed"),
        ({"set": {"head.variannt": "r2m"}}, r"vanilla-rloo: head.variannt: no such key; did you mean head.variant\?"),
        ({"set": {"steps": 3}}, "vanilla-rloo: 'steps' is not of the form section.key, e.g. run.num_steps"),
        ({"draw": "vanilla-rloo"}, "draw: Input should be a valid list; got 'vanilla-rloo'"),
        ({"kl_levels": [1, 0]}, "kl_levels.1: Input should be greater than 0; got 0"),
        ({"best_of_n": {"samples": 9}}, "best_of_n.samples: no such key; valid are n, prompts, seed"),
        ({"base": "absent.yaml"}, "absent.yaml: cannot be read"),
        (
            {"against": ["vanilla"]},
            "against: 'vanilla' is neither a cell nor a reward model of this study; its cells are vanilla-rloo, vanilla-grpo, r2m-rloo",
        ),
        (
            {"draw": ["r2m-rloo", "r2m"]},
            "draw: 'r2m' is neither a cell nor a reward model of this study; its cells are vanilla-rloo",
        ),
        ({"best_of_n": {"prompts": 300}}, "best_of_n.prompts: Input should be less than or equal to 200; got 300"),
        ({"grid": {"lr": {1.5e-4: {}}}}, r"grid.lr.0.00015.\[key\]: Input .* got 0.00015 \(.*put it in quotes"),
    ],
)
def test_what_is_wrong_in_a_study_is_told_before_anything_runs(study_file, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_study(study_file(**changes), Path())


def test_a_file_that_is_no_study_is_told(tmp_path):
    (tmp_path / "list.yaml").write_text("[seeds, 1]")
    with pytest.raises(ConfigError, match=r"list.yaml: the file: Input should be .*; got \['seeds', 1\]"):
        read_study(tmp_path / "list.yaml", Path())


@pytest.mark.models
def test_a_study_runs_what_is_missing_and_its_runs_are_the_ones_of_their_configs(study_file, tmp_path, capsys):
    grid = {"variant": GRID["variant"]}
    path, out, told = study_file(grid=grid, against=["vanilla"]), tmp_path / "out", []
    assert run_study(path, out, workers=2, tell=told.append) == [], told
    assert told[0] == "4 runs, 0 there already" and len(told) == 5
    results = json.loads((out / "results.json").read_text())
    assert set(results["cells"]) == {"vanilla", "r2m"} and results["cells"]["r2m"]["num_seeds"] == 2
    assert results["failed"] == {} and set(results["against"]["vanilla"]) == {"r2m"}
    assert (out / "comparison.png").stat().st_size > 10_000

    (run,) = [run for run in read_study(path, out)[2] if run.name == "r2m-seed5"]
    rewards = reference.train(run.config).rewards
    steps = read_metrics(out / "runs" / "r2m-seed5" / "metrics.jsonl")
    assert [step["reward/mean"] for step in steps] == pytest.approx([np.mean(one) for one in rewards], abs=1e-6)

    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("metrics.jsonl")}
    left = out / "runs" / ".r2m-seed5.r2m-00000000.partial"
    shutil.move(out / "runs" / "r2m-seed5", left)  # as if it had been killed
    assert main(["study", str(path), str(out), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "4 runs, 3 there already" in said and "1/1 r2m-seed5: " in said and "| vanilla | " in said
    after = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("metrics.jsonl")}
    assert after.keys() == before.keys()
    assert [path.parent.name for path in before if before[path] != after[path]] == ["r2m-seed5"]
    assert without_seconds(json.loads((out / "results.json").read_text())) == without_seconds(results)
    export(out / "runs" / "r2m-seed5", tmp_path / "exported")
    assert (tmp_path / "exported" / "policy" / "config.json").exists()

    with pytest.raises(
        ConfigError, match="vanilla-seed3 is a run of another config: run.num_steps was .* and is 3; remove it, or name"
    ):
        run_study(study_file(grid=grid, set={"run.num_steps": 3}), out)


def test_two_processes_do_not_make_one_study(study_file, tmp_path):
    (tmp_path / "out").mkdir()
    with only_writer(tmp_path / "out") as alone:
        assert alone
        with pytest.raises(ConfigError, match="out: another process writes into this study"):
            run_study(study_file(), tmp_path / "out", workers=1)


def test_at_least_one_run_goes_on_at_a_time(study_file, tmp_path, capsys):
    for workers in ("0", "-1"):
        assert main(["study", str(study_file()), str(tmp_path / "out"), "--workers", workers]) == 2
        assert f"--workers is {workers}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def without_seconds(results: dict) -> dict:
    cells = results["cells"].items()
    return results | {"cells": {cell: {key: row[key] for key in row if key != "seconds"} for cell, row in cells}}


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
def test_reward_models_are_trained_once_per_seed_and_their_runs_start_from_them(
    with_reward_models, tmp_path, monkeypatch
):
    out, told = tmp_path / "out", []
    (out / "reward_models" / "further-seed3").mkdir(parents=True)  # killed before it had written its config
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
    monkeypatch.chdir(tmp_path)
    assert run_study(with_reward_models(seeds=[3, 5]), Path("out"), workers=1, tell=told.append) == []
    assert told == ["4 runs, 4 there already", "2 reward models, 2 there already"]
    with pytest.raises(ConfigError, match="further-seed3 is a run of another config"):
        run_study(with_reward_models(seeds=[3, 5], reward_models={"further": {"config": "reward.yaml"}}), out)


def test_a_reward_model_that_the_study_lacks_or_cannot_configure_is_told(with_reward_models):
    with pytest.raises(ConfigError, match="'trained:further' is no reward model of this study; reward_models has none"):
        read_study(with_reward_models(reward_models={}), Path())
    wrong = {"further": {"config": "reward.yaml", "set": {"loss.preferense": "bt"}}}
    with pytest.raises(ConfigError, match="reward_models.further: loss.preferense: no such key"):
        read_study(with_reward_models(reward_models=wrong), Path())


def test_an_ensemble_is_no_runs_start_and_shares_no_member_with_that_of_another_seed(with_reward_models):
    several = {"further": {"config": "reward.yaml", "set": {"ensemble.size": 3}}}
    with pytest.raises(ConfigError, match="'trained:further' has ensemble.size 3: a run starts from one reward model"):
        read_study(with_reward_models(seeds=[3, 6], reward_models=several), Path())
    alone = {"reward_models": several, "grid": {}}
    with pytest.raises(ConfigError, match="seeds 3 and 5: .*ensemble.size 3, .*use seeds that differ by 3 or more"):
        read_study(with_reward_models(seeds=[9, 5, 3], **alone), Path())
    assert len(read_study(with_reward_models(seeds=[9, 6, 3], **alone), Path())[1]) == 3


@pytest.mark.models
@pytest.mark.parametrize("by", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.cross)])
def test_a_study_that_is_killed_takes_its_runs_with_it(study_file, tmp_path, by):
    (tmp_path / "bell.py").write_text(
        "from pathlib import Path\n"
        "def gold(prompt, text, finished):\n"
        "    with open(Path(__file__).with_name('rung'), 'w') as pipe:\n"
        "        pipe.write('.')\n"
        "    return 0.0\n"
    )
    os.mkfifo(tmp_path / "rung")
    rung = os.open(tmp_path / "rung", os.O_RDWR)
    grid = {"gold": {"bell": {"evaluation.gold": "bell:gold"}}}
    path, out = study_file(set={"run.num_steps": 10_000}, seeds=[1], grid=grid), tmp_path / "out"
    command = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command += "from r2m_async.cli import main; sys.exit(main(sys.argv[1:]))"
    study = subprocess.Popen([sys.executable, "-c", command, "study", path, out, "--workers", "1"], cwd=tmp_path)
    scored = 0
    while scored < 4 * 6:  # responses of four steps
        word = word_of(rung, seconds=300)
        assert word
        scored += len(word)
    (metrics,) = (out / "runs").glob(".*.partial/metrics.jsonl")
    assert len(metrics.read_text().splitlines()) > 1
    running = at_work_in(tmp_path)
    assert len(running) >= 2
    study.send_signal(by)
    assert study.wait(timeout=120) == (130 if by == signal.SIGINT else -by)
    assert left_of(running) == at_work_in(tmp_path) == []
    os.close(rung)


def at_work_in(directory: Path) -> list[psutil.Process]:
    """All processes whose working directory it is and that may be looked at."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(directory):
                found.append(process)
    return found


@pytest.mark.models
def test_a_run_that_fails_is_told_and_the_others_go_on(study_file, tmp_path):
    (tmp_path / "moody.py").write_text(
        "from pathlib import Path\n"
        "def gold(prompt, text, finished):\n"
        "    return float(Path(__file__).with_name('mood').read_text())\n"
    )
    grid = {"gold": {"bad": {"evaluation.gold": "moody:gold"}, "good": {}}}
    path, out, told = study_file(grid=grid, seeds=[1]), tmp_path / "out", []
    missing = f"FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path / 'mood'}'"
    assert run_study(path, out, workers=1, tell=told.append) == ["bad-seed1"]
    reason = (out / "runs" / "bad-seed1.failed").read_text().strip()
    assert reason.startswith("FunctionFailed: step 0, group 0 (prompt 'prompts.jsonl:")
    assert f"evaluation.gold 'moody:gold' raised {missing}\n" in reason
    assert f"bad-seed1 failed: {reason}" in told
    results = json.loads((out / "results.json").read_text())
    assert results["failed"] == {"bad-seed1": reason}
    assert results["cells"]["bad"] == {"num_seeds": 0, "num_planned": 1} and results["cells"]["good"]["num_seeds"] == 1
    assert table_rows(out)["bad"][-1] == "0 of 1" and table_rows(out)["good"][-1] == "1"

    (tmp_path / "mood").write_text("1.5")
    assert run_study(path, out, workers=1, tell=told.append) == []
    assert not (out / "runs" / "bad-seed1.failed").exists()
    results = json.loads((out / "results.json").read_text())
    assert results["failed"] == {} and results["cells"]["bad"]["gold_end"]["mean"] == 1.5


def table_rows(out: Path) -> dict[str, list[str]]:
    """Of the first table, by label."""
    lines = (out / "table.md").read_text().split("\n\n")[0].splitlines()[2:]
    entries = [[entry.strip() for entry in line.strip("|").split("|")] for line in lines]
    return {label: rest for label, *rest in entries}


def test_the_heads_accuracy_is_that_of_the_last_evaluation(tmp_path):
    assert accuracies_of(tmp_path, []) == {}
    first = {"proxy_accuracy": 0.7, "frozen_accuracy": 0.7}
    last = {"proxy_accuracy": 0.4, "frozen_accuracy": 0.6}
    assert accuracies_of(tmp_path, [first, last]) == {"accuracy_end": 0.4, "accuracy_frozen": 0.6}
    assert math.isnan(accuracies_of(tmp_path, [first, {"proxy": 1.0}])["accuracy_end"])


def accuracies_of(run: Path, evaluations: list[dict]) -> dict[str, float]:
    (run / "evaluation.jsonl").write_text(
        "".join(json.dumps(one | {"step": step}) + "\n" for step, one in enumerate(evaluations))
    )
    return accuracies(run)


STABLE = {"policy/effective_sample_size": 1.0, "policy/grad_norm": 0.5}


def steps_of(kl: list[float], gold: list[float], key: str = "kl/sequence") -> list[dict]:
    """Every point five times over, so that smoothing leaves it as it is at its last."""
    return [
        {key: k, "reward/gold": g, "reward/mean": 2 * g, "time/since_start": 3.0 * at} | STABLE
        for at, (k, g) in enumerate(zip(kl, gold, strict=True))
        for _ in range(5)
    ]


def test_gold_is_told_at_matched_kl_at_its_peak_and_over_the_area():
    told = summary(steps_of([0, 2, 4, 5], [0.0, 1.0, 3.0, 2.0]), (1, 4), 4.0)
    assert told["gold_at_kl_1"] == pytest.approx(0.5) and told["gold_at_kl_4"] == pytest.approx(3.0)
    assert told["gold_peak"] == pytest.approx(3.0)
    assert told["gold_area"] == pytest.approx((0.5 * 2 * 1 + 0.5 * 2 * (1 + 3)) / 4)
    assert (told["gold_end"], told["kl_end"], told["proxy_end"]) == pytest.approx((2.0, 5.0, 4.0))
    assert told["seconds"] == 9.0


def test_stability_is_the_worst_of_five_step_means():
    """Steps 0..5: effective sample sizes 1, .9, .8, .7, .6, .1; gradient norms 5, 4, 3, 2, 1, 0."""
    sizes = [1.0, 0.9, 0.8, 0.7, 0.6, 0.1]
    steps = [
        step | {"policy/effective_sample_size": size, "policy/grad_norm": 5.0 - at}
        for at, (step, size) in enumerate(zip(steps_of([0, 1], [0.0, 1.0]), sizes, strict=False))
    ]
    told = summary(steps, (1,), 1.0)
    assert told["ess_min"] == pytest.approx(3.1 / 5) and told["grad_norm_max"] == pytest.approx(15 / 5)
    bare = [{key: step[key] for key in step if key not in STABLE} for step in steps]
    assert math.isnan(summary(bare, (1,), 1.0)["ess_min"])


def test_a_run_that_did_not_reach_a_level_has_no_gold_there():
    told = summary(steps_of([0, 2, 4, 5], [0.0, 1.0, 3.0, 2.0]), (4, 8), 3.0)
    assert told["gold_at_kl_4"] == pytest.approx(3.0)
    assert math.isnan(told["gold_at_kl_8"])
    assert told["gold_area"] == pytest.approx((0.5 * 2 * 1 + 0.5 * 1 * (1 + 2)) / 3)


def test_the_area_goes_to_the_highest_kl_that_every_run_passed_or_to_the_highest_level():
    runs = [steps_of([0, 2, 9], [0.0, 1.0, 2.0]), steps_of([0, 5, 3], [0.0, 1.0, 2.0])]
    assert area_to_kl(runs, (1, 8)) == pytest.approx(5) and area_to_kl(runs, (1, 4)) == 4
    unknown = steps_of([0, 1], [math.nan, math.nan])
    assert area_to_kl([*runs, unknown], (8,)) == pytest.approx(5) and math.isnan(area_to_kl([unknown], (8,)))


def test_where_kl_falls_back_its_first_passage_counts():
    told = summary(steps_of([0, 4, 1, 6], [0.0, 4.0, 100.0, 6.0]), (1, 4), 4.0)
    assert told["gold_at_kl_1"] == pytest.approx(1.0) and told["gold_at_kl_4"] == pytest.approx(4.0)


def test_a_run_that_never_leaves_the_reference_has_no_area():
    told = summary(steps_of([0, 0], [1.0, 1.0]), (1,), 0.0)
    assert math.isnan(told["gold_at_kl_1"]) and math.isnan(told["gold_area"]) and told["gold_peak"] == 1.0


def test_a_fast_runs_gold_starts_at_the_reference_with_its_first_step():
    """The first smoothed point is the mean of KL 0, 2, 4, 6, 8 and of the golds: at KL 4."""
    steps = [{"kl/sequence": 2.0 * at, "reward/gold": float(at**2), "time/since_start": 0.0} for at in range(5)]
    told = summary(steps, (0.0, 1.0, 4.0), 4.0)
    assert told["gold_at_kl_0"] == 0.0
    assert told["gold_at_kl_1"] == pytest.approx(6 / 4) and told["gold_at_kl_4"] == pytest.approx(6.0)
    assert told["gold_area"] == pytest.approx(3.0)
    assert math.isnan(summary([{**steps[0], "reward/gold": math.nan}, *steps[1:]], (1.0,), 4.0)["gold_at_kl_1"])


def test_steps_without_a_number_are_left_out():
    steps = steps_of([0, 2, 4], [0.0, 1.0, 3.0])
    for wrong in ({"kl/sequence": math.nan}, {"reward/gold": math.inf}, {"kl/sequence": -math.inf}):
        told = summary([*steps[:7], steps[7] | wrong, *steps[7:]], (2, 4), 4.0)
        assert told == pytest.approx(summary(steps, (2, 4), 4.0))
    for lost in ("kl/sequence", "reward/gold"):
        told = summary([step | {lost: math.nan} for step in steps], (2,), 4.0)
        assert all(math.isnan(told[key]) for key in ("gold_at_kl_2", "gold_peak", "gold_area", "gold_end"))
        assert told["seconds"] == 6.0


def test_kl_is_that_of_the_policy_that_sampled_where_a_run_has_it():
    steps = [step | {"kl/sequence": 77.0} for step in steps_of([0, 2, 4], [0.0, 1.0, 3.0], key="kl/behaviour")]
    assert summary(steps, (2, 4), 4.0) == pytest.approx(summary(steps_of([0, 2, 4], [0.0, 1.0, 3.0]), (2, 4), 4.0))


def test_gold_is_told_at_steps_as_the_mean_of_the_five_that_end_there_and_over_all_steps():
    steps = [
        {
            "step": at,
            "kl/sequence": float(at),
            "reward/gold": float(at**2),
            "time/since_start": 0.0,
            "labels/used": 2.0 * at,
        }
        for at in range(1, 9)
    ]
    told = summary(steps, (1.0,), 4.0, at_steps=(3, 7, 9))
    assert told["gold_at_step_7"] == pytest.approx((9 + 16 + 25 + 36 + 49) / 5)
    assert told["gold_at_step_3"] == pytest.approx((1 + 4 + 9) / 3) and math.isnan(told["gold_at_step_9"])
    assert told["gold_mean"] == pytest.approx(204 / 8) and told["labels"] == 16
    assert "labels" not in summary(steps_of([0, 1], [0.0, 1.0]), (1.0,), 1.0)


@pytest.fixture
def runs_of(tmp_path):
    """`runs_of(cell, {seed: gold})`: run directories whose gold is 0 at KL 0 and that at KL 4; not there for None."""

    def write(cell: str, golds: dict[int, float | None], kl: float = 4.0, accuracy: float | None = None):
        paths = {}
        for seed, gold in golds.items():
            paths[seed] = tmp_path / "runs" / f"{cell}-seed{seed}"
            if gold is not None:
                paths[seed].mkdir(parents=True)
                steps = [{"step": at} | step for at, step in enumerate(steps_of([0, kl], [0.0, gold]), 1)]
                append_records(paths[seed] / "metrics.jsonl", steps)
                append_records(
                    paths[seed] / "evaluation.jsonl", [{"step": 1.0, "proxy_accuracy": accuracy}] if accuracy else []
                )
        return paths

    return write


def test_a_figure_shows_what_is_named_of_its_kind_or_all(runs_of, tmp_path, monkeypatch):
    shown: list[list[str]] = []
    monkeypatch.setattr("r2m_async.studies.cells.compare_runs", lambda drawn, out, curves: shown.append(list(drawn)))
    cells = {name: runs_of(name, {1: 1.0, 2: gold}) for name, gold in (("one", 2.0), ("two", 3.0), ("lost", 4.0))}
    shutil.rmtree(cells["lost"][1])
    shutil.rmtree(cells["lost"][2])
    for draw in ((), ("two", "bt"), ("two", "one"), ("bt",), ("lost", "one")):
        compare_cells(cells, (4.0,), [], tmp_path, draw)
    assert shown == [["one", "two"], ["two"], ["one", "two"], ["one", "two"], ["one"]]
    assert list(json.loads((tmp_path / "results.json").read_text())["cells"]) == ["one", "two", "lost"]


def test_cells_are_compared_seed_by_seed_with_those_named(runs_of, tmp_path):
    cells = {
        "base": runs_of("base", {1: 1.0, 2: 5.0, 3: 3.0, 4: 9.0}, accuracy=0.5),
        "more": runs_of("more", {1: 2.0, 2: 6.5, 3: 4.5, 4: None}, accuracy=0.75),
        "bare": runs_of("bare", {1: 1.0, 2: 5.0, 3: None, 4: None}),
    }
    compare_cells(cells, (4.0, 8.0), ["base", "more"], tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["cells", "against", "area_to_kl", "failed", "curves"]
    assert results["area_to_kl"] == pytest.approx(4.0)
    assert [list(results["against"][baseline]) for baseline in results["against"]] == [
        ["more", "bare"],
        ["base", "bare"],
    ]
    told = results["against"]["base"]["more"]
    assert (told["num_seeds"], told["num_planned"]) == (3, 4)
    assert told["gold_end"] == pytest.approx(interval([1.0, 1.5, 1.5]))
    assert told["gold_at_kl_4"] == pytest.approx(told["gold_end"]) and told["gold_at_kl_8"]["count"] == 0
    assert told["gold_area"]["mean"] == pytest.approx(told["gold_end"]["mean"] / 2)
    assert told["accuracy_end"]["mean"] == pytest.approx(0.25)
    assert not {"seconds", "kl_end", "proxy_end", "accuracy_frozen"} & set(told)
    assert "accuracy_end" not in results["against"]["base"]["bare"]
    assert results["cells"]["base"]["gold_end"]["half_width"] > 4 > 1 > told["gold_end"]["half_width"]

    table = (tmp_path / "table.md").read_text()
    assert "KL from 0 to 4, which" in table and table.count("\n## Less ") == 2
    assert table_rows(tmp_path)["more"][-1] == "3 of 4" and table_rows(tmp_path)["base"][-1] == "4"
    assert "" in table_rows(tmp_path)["bare"] and "" not in table_rows(tmp_path)["base"]


def test_curves_are_the_means_over_seeds_at_each_step_that_every_run_has(runs_of, tmp_path):
    cells = {
        "three": runs_of("three", {1: 1.0, 2: 2.0, 3: 6.0}),
        "one": runs_of("one", {1: 4.0}),
        "none": {1: tmp_path / "absent"},
    }
    records = read_metrics(cells["three"][3] / "metrics.jsonl")
    (cells["three"][3] / "metrics.jsonl").unlink()
    append_records(cells["three"][3] / "metrics.jsonl", [records[0] | {"reward/gold": None}, *records[1:9]])
    compare_cells(cells, (4.0,), [], tmp_path, at_steps=[8])
    results = json.loads((tmp_path / "results.json").read_text())
    three, one = results["curves"]["three"], results["curves"]["one"]
    assert three["step"] == list(range(1, 10)) and one["step"] == list(range(1, 11))
    assert three["gold"] == pytest.approx([0] * 5 + [3.0] * 4) and three["kl"] == pytest.approx([0] * 5 + [4.0] * 4)
    assert three["gold_half_width"][-1] == pytest.approx(interval([1.0, 2.0, 6.0])["half_width"])
    assert three["proxy"][-1] == pytest.approx(6.0) and one["gold_half_width"] == [None] * 10
    assert results["cells"]["three"]["gold_at_step_8"]["mean"] == pytest.approx(3.0 * 3 / 5)


def test_the_area_of_all_cells_goes_equally_far(runs_of, tmp_path):
    cells = {"slow": runs_of("slow", {1: 1.0}, kl=2.0), "fast": runs_of("fast", {1: 4.0}, kl=8.0)}
    compare_cells(cells, (1.0, 8.0), [], tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["area_to_kl"] == pytest.approx(2.0)
    assert [results["cells"][cell]["gold_area"]["mean"] for cell in cells] == pytest.approx([0.5, 0.5])


def test_a_table_has_the_columns_of_all_rows():
    rows = {"none": seeds_row([], 2), "a": seeds_row([{"x": 1.0}], 2), "b": seeds_row([{"y": 2.0, "x": 3.0}], 1)}
    assert seeds_table(rows).splitlines() == [
        "| | x | y | seeds |",
        "|---|---|---|---|",
        "| none |  |  | 0 of 2 |",
        "| a | 1.00 |  | 1 of 2 |",
        "| b | 3.00 | 2.00 | 1 |",
    ]


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
            "lost": {"config": "bt.yaml", "set": {"data.preferences": str(tmp_path / "absent.jsonl")}},
        },
        "evaluate": True,
        "best_of_n": {"n": 6, "prompts": 3},
        "against": ["bt"],
        "draw": ["bsr"],
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
    monkeypatch.setattr(
        "r2m_async.from_scratch.embedded.embedded_models", lambda: little_embedded
    )  # whose samples are the pool
    drawn: list[list[str]] = []

    def drawing(results, out, *, band):
        drawn.append(list(results["models"]))
        return plot_best_of_n(results, out, band=band)

    monkeypatch.setattr("r2m_async.evaluation.plots.plot_best_of_n", drawing)
    assert sorted(run_study(path, out, workers=1, tell=told.append)) == ["lost-seed2", "lost-seed4"], told
    results = json.loads((out / "reward_models" / "results.json").read_text())
    assert list(results["models"]) == ["bt", "bsr", "lost"] and list(results["best_of_n"]["models"]) == ["bt", "bsr"]
    assert (
        results["models"]["bsr"]["num_seeds"] == 2 and (out / "reward_models" / "best_of_n.png").stat().st_size > 5000
    )
    assert drawn == [["bsr"]]
    assert table_rows(out / "reward_models")["lost"][-1] == "0 of 2"
    assert set(results["failed"]) == {"lost-seed2", "lost-seed4"} and "absent.jsonl" in results["failed"]["lost-seed2"]
    assert (out / "reward_models" / "lost-seed4.failed").read_text().strip() == results["failed"]["lost-seed4"]

    folder = "best_of_n-n6-prompts3-seed0"
    ones = [
        json.loads((out / "reward_models" / f"bt-seed{seed}" / folder / "results.json").read_text()) for seed in (2, 4)
    ]
    gold = [next(iter(one["models"].values()))["gold"] for one in ones]
    assert results["models"]["bt"]["bon_gold"]["mean"] == pytest.approx((gold[0][-1] + gold[1][-1]) / 2)
    told_gold = results["best_of_n"]["models"]["bt"]
    assert told_gold["gold"] == pytest.approx(np.mean(gold, 0))
    assert told_gold["gold_half_width"] == pytest.approx(
        [interval(of_n)["half_width"] for of_n in zip(*gold, strict=True)]
    )
    assert results["models"]["bt"]["bon_gold_peak"]["mean"] == pytest.approx((max(gold[0]) + max(gold[1])) / 2)
    lost = [max(of_seed) - of_seed[-1] for of_seed in gold]
    assert results["models"]["bt"]["bon_gold_lost"]["mean"] == pytest.approx((lost[0] + lost[1]) / 2)
    table = (out / "reward_models" / "table.md").read_text()
    assert "| bsr | " in table and "\n## Less bt\n" in table
    less = results["against"]["bt"]
    assert set(less) == {"bsr", "lost"} and less["bsr"]["bon_gold"]["count"] == 2 and less["lost"]["num_seeds"] == 0
    means = [results["models"][name]["bon_gold"]["mean"] for name in ("bsr", "bt")]
    assert less["bsr"]["bon_gold"]["mean"] == pytest.approx(means[0] - means[1])

    told.clear()
    del study["reward_models"]["lost"]
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    stopped = out / "reward_models" / "bt-seed4"
    shutil.rmtree(stopped / folder)  # as if it had been stopped there
    evaluated = (stopped / "evaluation" / "results.json").stat().st_mtime_ns
    assert run_study(path, out, workers=1, tell=told.append) == []
    assert told[:2] == ["0 runs, 0 there already", "4 reward models, 3 there already"]
    assert (stopped / "evaluation" / "results.json").stat().st_mtime_ns == evaluated
    del results["models"]["lost"], less["lost"]
    assert json.loads((out / "reward_models" / "results.json").read_text()) == results | {"failed": {}}

    told.clear()
    path.write_text(yaml.safe_dump(study | {"best_of_n": {"n": 4, "prompts": 2}}, sort_keys=False))
    assert run_study(path, out, workers=1, tell=told.append) == []
    assert told[1] == "4 reward models, 0 there already"
    changed = json.loads((out / "reward_models" / "results.json").read_text())
    assert changed["best_of_n"]["ns"][-1] == 4 and changed["models"]["bt"]["bon_gold"]["count"] == 2
    assert {pool.name for pool in out.glob("pool*")} == {
        "pool-n6-prompts3-seed0.jsonl",
        "pool-n4-prompts2-seed0.jsonl",
    }


def test_the_effective_rank_is_compared_in_domain_and_with_that_of_training_pairs(tmp_path):
    ranks = {
        "training pairs": 2.0,
        "in_domain": 3.0,
        "prompt_disjoint": 4.0,
        "response_disjoint": 5.0,
        "mutual_disjoint": 7.0,
    }
    results = {
        "pairs": None,
        "splits": {"in_domain": {"accuracy": 0.5, "tau": 0.25}},
        "states": {name: {"effective_rank": rank, "norm_dispersion": 0.5} for name, rank in ranks.items()},
    }
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(results))
    told = reward_summary(tmp_path, {"evaluation": "evaluation"})
    assert (told["erank_gain"], told["erank_over_training"]) == (2.0, 5.0)


@pytest.mark.parametrize("band", ["se", "half_width"])
def test_best_of_n_is_drawn_with_the_band_that_is_asked_for(band):
    curves = {"proxy": [0.0, 1.0], f"proxy_{band}": [0.0, 0.5], "gold": [0.0, -1.0], f"gold_{band}": [None, 0.25]}
    figure = best_of_n_figure({"kl": [0.0, 1.0], "models": {"bt": curves}}, band=band)
    for axes, (low, high) in zip(figure.axes, ((0.0, 1.5), (-1.25, 0.0)), strict=True):
        drawn = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert (drawn.min(), drawn.max()) == (low, high)
    many = best_of_n_figure({"kl": [0.0, 1.0], "models": {str(number): curves for number in range(7)}}, band=band)
    assert all(len(axes.lines) == 7 and not axes.collections for axes in many.axes)


def test_a_run_is_known_by_the_values_of_its_config_and_not_by_its_text(tmp_path):
    config = R2MConfig(run={"num_steps": 7})
    written = config.to_dict()
    del written["weights"], written["scheduling"]["overage"]  # as a version before these keys wrote it
    (tmp_path / "config.yaml").write_text("# a comment\n" + yaml.safe_dump(written))
    assert _is_there(tmp_path, config)
    with pytest.raises(
        ConfigError, match=r"another config: run.num_steps was 7 and is 8; head.lr was 1e-06 and is 0.1;"
    ):
        _is_there(tmp_path, config.run(num_steps=8).head(lr=0.1))
    assert not _is_there(tmp_path / "absent", config)
