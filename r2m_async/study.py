"""`r2m study STUDY OUT`: a grid of runs, as many at once as there are cores, and what they say at matched KL.

    base: ../quickstart.yaml            # every run's config, relative to this file
    set: {run.num_steps: 80}            # over the base, for all
    seeds: [11, 12, 13]
    grid:                               # a run for every choice of one label per axis, and every seed
      variant:
        vanilla: {head.variant: vanilla, learner.lr: 5.0e-5}
        r2m: {head.variant: r2m, learner.lr: 3.0e-5}
        pretrained_rm: {head.variant: vanilla, reward.model: "trained:golden"}
    reward_models:                      # those that `trained:NAME` stands for, each trained with the seed of its run
      golden: {config: ../reward_model/pretrained.yaml, set: {optimizer.epochs: 3}}

OUT/runs/<labels>-seed<n> is a run directory, there only once it is whole, and OUT/reward_models/<name>-seed<n> one of
`r2m reward-model train`: the command can be stopped and started again. A run leaves its last checkpoint, for `r2m export`
(`checkpoint.at_end`). OUT gets table.md, results.json and comparison.png. Comparing at equal steps flatters whatever learns
slowest, so the table leads with the gold reward at matched KL, its peak, and the area under gold against KL.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from r2m_async.child_process import end_with_parent
from r2m_async.config import ConfigTree, R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.intervals import interval, seeds_table
from r2m_async.plots import column, compare_runs
from r2m_async.preference_data import load_preference_data
from r2m_async.reward_config import RewardModelConfig
from r2m_async.reward_study import compare_reward_models, is_measured, train_and_measure
from r2m_async.run_directory import read_metrics, read_records, write_results

SMOOTHING = 5
"""Steps over which gold and KL are averaged before they are compared: a step is few responses."""


TRAINED = "trained:"


class RewardModelSource(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    config: str
    """Of `r2m reward-model train`, relative to the study's file."""
    set: dict[str, Any] = {}


class BestOfN(BaseModel):
    """Of all the study's reward models, from one pool of the embedded policy's samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(405, gt=1)
    prompts: int = Field(40, gt=1)
    seed: int = 0


class Study(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base: str | None = None
    """None: no runs, the reward models alone."""
    set: dict[str, Any] = {}
    seeds: tuple[int, ...] = Field(min_length=1)
    grid: dict[str, dict[str, dict[str, Any]]] = {}
    reward_models: dict[str, RewardModelSource] = {}
    evaluate: bool = False
    """The reward models, as `r2m reward-model eval` does."""
    best_of_n: BestOfN | None = None
    kl_levels: tuple[float, ...] = Field((1.0, 2.0, 4.0, 8.0), min_length=1)
    """Nats per response."""
    in_process: bool = True
    """Without Ray: the one-process ring, which gives the same numbers where asynchrony is not the question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    cell: str
    """One label per axis."""
    seed: int
    config: R2MConfig

    @property
    def name(self) -> str:
        return f"{self.cell}-seed{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRewardModel:
    name: str
    config: RewardModelConfig
    directory: Path

    @property
    def model(self) -> Path:
        return self.directory / f"seed-{self.config.run.seed}" / "model"


def read_study(path: Path, out: Path) -> tuple[Study, list[StudyRewardModel], list[StudyRun]]:
    """The study, the reward models that it trains under `out`, and its runs, cell by cell.

    Raises ConfigError for whatever is wrong in it or in a config.
    """
    try:
        study = Study.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except ValidationError as error:
        told = [
            f"{path}: {'.'.join(map(str, one['loc']))}: {one['msg']}; got {one['input']!r}"
            + " (YAML reads it as a number or a truth value; put it in quotes)" * (one["loc"][-1:] == ("[key]",))
            for one in error.errors()
        ]
        raise ConfigError("\n".join(told)) from None
    reward_models = _reward_models(path, study, out)
    if study.base is None:
        return study, list(reward_models.values()), []
    base, runs = R2MConfig.from_yaml(path.parent / study.base), []
    for labels in itertools.product(*(axis.items() for axis in study.grid.values())):
        cell = "-".join(label for label, _ in labels) or "base"
        changes = study.set | {key: value for _, keys in labels for key, value in keys.items()}
        for seed in study.seeds:
            tree = base.to_dict()
            for key, value in (changes | {"run.seed": seed}).items():
                section, _, field = key.partition(".")
                if isinstance(value, str) and value.startswith(TRAINED):
                    value = _trained_model(path, value, seed, reward_models)
                tree.setdefault(section, {})[field] = value
            try:
                config = R2MConfig.from_dict(tree)
            except ConfigError as error:
                raise ConfigError(f"{path}: {cell}: {error}") from None
            runs.append(StudyRun(cell=cell, seed=seed, config=config.logging(live=False, tensorboard=False)))
    if len({run.name for run in runs}) < len(runs):
        raise ConfigError(f"{path}: two runs have the same labels and seed; give every label and seed once")
    return study, list(reward_models.values()), runs


def _reward_models(path: Path, study: Study, out: Path) -> dict[tuple[str, int], StudyRewardModel]:
    """By name and seed."""
    found = {}
    for name, source in study.reward_models.items():
        base = RewardModelConfig.from_yaml(path.parent / source.config)
        for seed in study.seeds:
            tree = base.to_dict()
            for key, value in (source.set | {"run.seed": seed, "logging.live": False}).items():
                section, _, field = key.partition(".")
                tree.setdefault(section, {})[field] = value
            try:
                config = RewardModelConfig.from_dict(tree)
            except ConfigError as error:
                raise ConfigError(f"{path}: reward_models.{name}: {error}") from None
            directory = out / "reward_models" / f"{name}-seed{seed}"
            found[name, seed] = StudyRewardModel(name=name, config=config, directory=directory)
    return found


def _trained_model(path: Path, value: str, seed: int, known: dict[tuple[str, int], StudyRewardModel]) -> str:
    name = value.removeprefix(TRAINED)
    if (name, seed) not in known:
        names = ", ".join(dict.fromkeys(one for one, _ in known)) or "none"
        raise ConfigError(f"{path}: {value!r} is no reward model of this study; reward_models has {names}")
    return str(known[name, seed].model)


def run_study(path: Path, out: Path, workers: int | None = None, tell: Callable[[str], None] = print) -> list[str]:
    """Trains and runs what OUT lacks and writes its tables; the names of what failed, whose errors are told.

    Raises ConfigError if OUT has a run or a reward model of that name with another config.
    """
    from r2m_async.workload import resolve

    study, reward_models, runs = read_study(path, out)
    (out / "runs").mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs if not _is_there(out / "runs" / run.name, run.config)]
    tell(f"{len(runs)} runs, {len(runs) - len(missing)} there already")
    workers = workers or os.cpu_count() or 1
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        failed = _train_reward_models(study, reward_models, out, pool, tell) if reward_models else []
        for config in {run.config.run(seed=0).to_yaml(): run.config for run in missing}.values():
            with contextlib.suppress(ConfigError):  # which its runs will tell
                resolve(config)  # builds what runs share, once
        running = {
            pool.submit(_run, run.config.to_dict(), out / "runs" / run.name, study.in_process): run.name
            for run in missing
        }
        failed += _wait_for(running, tell)
    if runs:
        compare(study, runs, out)
    return failed


def _train_reward_models(
    study: Study, models: Sequence[StudyRewardModel], out: Path, pool: ProcessPoolExecutor, tell: Callable[[str], None]
) -> list[str]:
    """Trains and measures what OUT lacks and writes their tables; the names of what failed."""
    parts = [name for name, wanted in (("evaluation", study.evaluate), ("best_of_n", study.best_of_n)) if wanted]
    missing = [
        one
        for one in models
        if not (_is_there(one.directory, one.config) and one.model.is_dir() and is_measured(one.directory, parts))
    ]
    tell(f"{len(models)} reward models, {len(models) - len(missing)} there already")
    best_of_n, samples, by_name = study.best_of_n or BestOfN(), out / "pool.jsonl", defaultdict(list)
    if missing:
        load_preference_data(missing[0].config)  # builds what trainings share, once
        if study.best_of_n and not samples.exists():
            _sample_pool(best_of_n, samples)
    work = {
        pool.submit(train_and_measure, one.config.to_yaml(), one.directory, parts, samples, best_of_n.n): one
        for one in missing
    }
    failed = _wait_for({future: one.directory.name for future, one in work.items()}, tell)
    for one in models:
        by_name[one.name].append(one.directory)
    if parts:
        compare_reward_models(by_name, parts, out / "reward_models")
    return failed


def _sample_pool(best_of_n: BestOfN, path: Path) -> None:
    from r2m_async.best_of_n import embedded_pool, write_pool
    from r2m_async.embedded import embedded_models
    from r2m_async.policy_model import one_thread

    with one_thread():
        write_pool(embedded_pool(embedded_models(), best_of_n.seed, best_of_n.prompts, best_of_n.n), path)


def _is_there(directory: Path, config: ConfigTree) -> bool:
    if not directory.exists():
        return False
    if (directory / "config.yaml").read_text(encoding="utf-8") != config.to_yaml():
        raise ConfigError(f"{directory} is a run of another config; remove it, or name another OUT")
    return True


def _wait_for(work: dict[Future[float], str], tell: Callable[[str], None]) -> list[str]:
    """Tells what ends and in how many seconds; the names of what failed."""
    failed = []
    for number, done in enumerate(as_completed(work), 1):
        if error := done.exception():
            failed.append(work[done])
            tell(f"{work[done]} failed: {error}")
        else:
            tell(f"{number}/{len(work)} {work[done]}: {done.result():.0f} s")
    return failed


def _run(tree: dict[str, Any], directory: Path, in_process: bool) -> float:
    """One run in a process of its own; seconds of the ring."""
    from r2m_async.launch import Ring
    from r2m_async.policy_model import one_thread
    from r2m_async.run_directory import RunDirectory
    from r2m_async.training import keep_checkpoint

    config, building = R2MConfig.from_dict(tree), directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    (building / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    threads = one_thread() if in_process else contextlib.nullcontext()
    with threads, RunDirectory(building, config) as run, Ring.of(config, in_process=in_process) as ring:
        while not ring.finished:
            metrics = ring.step()
            run.write_step(metrics)
        run.write_evaluations(ring.drain())
        keep_checkpoint(ring, run.path)
    building.rename(directory)
    return metrics["time/since_start"]


# What the runs say


def compare(study: Study, runs: Sequence[StudyRun], out: Path) -> dict[str, dict[str, Any]]:
    """results.json, table.md and comparison.png of the runs that are there; the results by cell."""
    there: dict[str, list[Path]] = {}
    for run in runs:
        if (directory := out / "runs" / run.name).exists():
            there.setdefault(run.cell, []).append(directory)
    summaries = {
        cell: [summary(read_metrics(path / "metrics.jsonl"), study.kl_levels) | accuracies(path) for path in paths]
        for cell, paths in there.items()
    }
    results = {
        cell: {key: interval([one[key] for one in ones]) for key in ones[0]} | {"num_seeds": len(ones)}
        for cell, ones in summaries.items()
    }
    write_results(out, results, seeds_table(results))
    if there:
        compare_runs(there, out / "comparison.png")
    return results


def summary(steps: Sequence[dict[str, Any]], kl_levels: Sequence[float]) -> dict[str, float]:
    """Of one run: gold where its KL first reached each level (NaN if never), its peak, the area, how it ended and when.

    The area is the mean of gold over KL from 0 to the highest level, by the trapezoid rule; NaN if the run did not reach it.
    """
    gold, kl = _smooth(column(steps, "reward/gold")), _smooth(column(steps, "kl/sequence"))
    reached = np.maximum.accumulate(kl)
    first = np.flatnonzero(np.diff(reached, prepend=-np.inf) > 0)
    levels, gold_at = reached[first], gold[first]
    told = {
        f"gold_at_kl_{level:g}": float(np.interp(level, levels, gold_at, left=gold_at[0], right=np.nan))
        for level in kl_levels
    }
    points = np.linspace(0, max(kl_levels), 101)
    return told | {
        "gold_peak": float(gold.max()),
        "gold_area": float(np.trapezoid(np.interp(points, levels, gold_at, right=np.nan), points) / max(kl_levels)),
        "gold_end": float(gold[-1]),
        "kl_end": float(kl[-1]),
        "proxy_end": float(_smooth(column(steps, "reward/mean"))[-1]),
        "seconds": float(steps[-1]["time/since_start"]),
    }


def accuracies(run: Path) -> dict[str, float]:
    """Of the run's last evaluation, of pairs of responses by the policy as it is then, the share ranked as gold does: by
    the run's head, and by the frozen reward model. Nothing without evaluations."""
    if not (evaluations := read_records(run / "evaluation.jsonl")):
        return {}
    names = {"accuracy_end": "proxy_accuracy", "accuracy_frozen": "frozen_accuracy"}
    return {name: evaluations[-1].get(key, float("nan")) for name, key in names.items()}


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over SMOOTHING steps, or over all there are."""
    width = min(SMOOTHING, len(values))
    return np.convolve(values, np.full(width, 1 / width), mode="valid")
