"""`r2m study STUDY OUT`: a grid of runs, as many at once as there are cores, and their comparison at matched KL.

    base: ../quickstart.yaml            # every run's config, relative to this file
    set: {run.num_steps: 80}            # keys changed in the base, for all runs
    seeds: [11, 12, 13]
    grid:                               # a run for every choice of one label per axis, and every seed
      variant:
        vanilla: {head.variant: vanilla, learner.lr: 5.0e-5}
        r2m: {head.variant: r2m, learner.lr: 3.0e-5}
        pretrained_rm: {head.variant: vanilla, reward.model: "trained:golden"}
    reward_models:                      # what `trained:NAME` stands for, each trained with the seed of its run
      golden: {config: ../reward_model/pretrained.yaml, set: {optimizer.epochs: 3}}
    against: [vanilla]                  # cells or reward models that all others are compared with, seed by seed
    draw: [vanilla, r2m]                # cells or reward models that the figures show; without this key all

A cell is a choice of one label per axis. OUT/runs/<labels>-seed<n> is a run directory, which is there only once it is
whole. OUT/reward_models/<name>-seed<n> is a run directory of `r2m reward-model train`. So the command can be stopped
and started again. A run leaves its last checkpoint for `r2m export`, if `checkpoint.at_end` is set. What fails leaves
its reason in NAME.failed, beside the place of its directory, and is tried again at the next start. OUT gets table.md,
results.json and comparison.png (`studies.cells`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from r2m_async.config import ConfigTree, R2MConfig
from r2m_async.config_tree import Keys
from r2m_async.errors import ConfigError, DataError
from r2m_async.from_scratch.language import NUM_HELD_OUT_PROMPTS
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.reward_models.preferences import load_preference_data
from r2m_async.runs.directory import as_only_writer
from r2m_async.runs.resuming import keys_of
from r2m_async.studies.cells import compare_cells
from r2m_async.studies.jobs import WorkerProcesses, wait_for
from r2m_async.studies.reward_models import compare_reward_models, is_measured, train_and_measure
from r2m_async.whole import disk_errors, whole_directory, write_file
from r2m_async.yaml_tree import cut_repr, read_yaml

QUIET: dict[str, Any] = dict(live=False, tensorboard=False, wandb=None, mlflow=None, trackio=None, prometheus=False)
"""The section `logging` of each run: a study reads the run directories alone."""
TRAINED = "trained:"
"""How a run's config names a reward model of the study: `trained:NAME`."""


class RewardModelSource(Keys):
    """How a reward model of the study is trained."""

    config: str
    """A config of `r2m reward-model train`, relative to the study's file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys that are changed in that config, as `section.key`."""


class BestOfN(Keys):
    """Best-of-n by all reward models of the study, from one pool of samples of the embedded policy."""

    n: int = Field(405, gt=1)
    """Samples per prompt, and also the largest n. At that n each prompt has a single favourite, so more prompts mean
    less noise there."""
    prompts: int = Field(40, gt=1, le=NUM_HELD_OUT_PROMPTS)
    """Prompts in the pool."""
    seed: int = 0
    """Seed of the pool's prompts and samples."""

    @property
    def label(self) -> str:
        """Part of the names of files that belong to these settings alone."""
        return f"n{self.n}-prompts{self.prompts}-seed{self.seed}"


class Study(Keys):
    """The contents of a study's file."""

    base: str | None = None
    """Config of every run, relative to the study's file. None makes no runs, and trains the reward models alone."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys that are changed in the base for all runs, as `section.key`."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """Each cell has a run with each of these seeds, and each reward model is trained with each."""
    grid: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    """For each axis its labels, and for each label the keys that it changes."""
    reward_models: dict[str, RewardModelSource] = Field(default_factory=dict)
    """Reward models to train, by the name in `trained:NAME`."""
    evaluate: bool = False
    """Whether the reward models are measured as by `r2m reward-model eval`."""
    best_of_n: BestOfN | None = None
    """Settings of best-of-n by the reward models; None leaves it out."""
    against: tuple[str, ...] = ()
    """Cells or reward models with which all others are compared."""
    draw: tuple[str, ...] = ()
    """Cells or reward models that the figures show. If no cell is named, all are shown, and so it is with reward
    models."""
    kl_levels: tuple[PositiveFloat, ...] = Field((1.0, 2.0, 4.0, 8.0), min_length=1)
    """KL from the reference at which gold rewards are compared, in nats per response."""
    at_steps: tuple[PositiveInt, ...] = ()
    """Steps at which gold rewards are compared, each as the mean over the five steps that end there."""
    in_process: bool = True
    """Whether runs use the one-process ring, without Ray. Its numbers are the same unless the question is one of
    asynchrony."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """A run of the study: a cell with a seed."""

    cell: str
    """The labels of the cell, one per axis, joined by `-`."""
    seed: int
    config: R2MConfig

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return f"{self.cell}-seed{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRewardModel:
    """A reward model of the study with a seed."""

    name: str
    config: RewardModelConfig
    directory: Path
    """Its run directory."""

    @property
    def model(self) -> Path:
        """Where the trained model is; of an ensemble, the first of its models."""
        return self.directory / f"seed-{self.config.run.seed}" / "model"


def read_study(path: Path, out: Path) -> tuple[Study, list[StudyRewardModel], list[StudyRun]]:
    """Reads a study's file. Returns the study, the reward models that it trains, and its runs, cell by cell.

    path: the study's file.
    out: OUT, in which the reward models will be.

    Raises ConfigError for whatever is wrong in the file or in a config.
    """
    try:
        study = Study.model_validate(read_yaml(path) or {})
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_explain(one)}" for one in error.errors())) from None
    reward_models = _reward_models(path, study, out.resolve())
    runs = _runs(path, study, reward_models)
    cells = dict.fromkeys(run.cell for run in runs)
    for key, names in (("against", study.against), ("draw", study.draw)):
        for name in names:
            if name not in cells and name not in study.reward_models:
                raise ConfigError(
                    f"{path}: {key}: {name!r} is neither a cell nor a reward model of this study; its cells are "
                    f"{', '.join(cells) or 'none'}, and its reward models are {', '.join(study.reward_models) or 'none'}"
                )
    return study, list(reward_models.values()), runs


def _explain(problem: Any) -> str:
    """One line about an error that pydantic found."""
    place = [str(part) for part in problem["loc"]]
    key = ".".join(place) or "the file"
    if problem["type"] == "extra_forbidden":
        kinds: dict[str, type[Keys]] = {"best_of_n": BestOfN, "reward_models": RewardModelSource}
        owner = kinds[place[0]] if len(place) > 1 else Study
        return f"{key}: no such key; valid are {', '.join(owner.model_fields)}"
    told = f"{key}: {problem['msg'].replace('tuple', 'list')}; got {cut_repr(problem['input'])}"
    return told + " (YAML reads it as a number or a truth value; put it in quotes)" * (place[-1:] == ["[key]"])


def _set(tree: dict[str, dict[str, Any]], key: str, value: Any) -> None:
    """Changes a key in a tree of sections. Raises ConfigError unless the key is `section.key`."""
    section, dot, field = key.partition(".")
    if not dot:
        raise ConfigError(f"{key!r} is not of the form section.key, e.g. run.num_steps")
    tree.setdefault(section, {})[field] = value


def _runs(path: Path, study: Study, reward_models: dict[tuple[str, int], StudyRewardModel]) -> list[StudyRun]:
    """All runs of the grid. Raises ConfigError for a config that is not valid, and for two runs of one name."""
    if study.base is None:
        return []
    base, runs = R2MConfig.from_yaml(path.parent / study.base), []
    for labels in itertools.product(*(axis.items() for axis in study.grid.values())):
        cell = "-".join(label for label, _ in labels) or "base"
        changes = study.set | {key: value for _, keys in labels for key, value in keys.items()}
        for seed in study.seeds:
            # Each run changes a tree of its own, so its changes do not reach the next run.
            tree = base.to_dict()
            try:
                for key, value in (changes | {"run.seed": seed}).items():
                    if isinstance(value, str) and value.startswith(TRAINED):
                        value = _trained_model(value, seed, reward_models)
                    _set(tree, key, value)
                config = R2MConfig.from_dict(tree)
            except ConfigError as error:
                raise ConfigError(f"{path}: {cell}: {error}") from None
            runs.append(StudyRun(cell=cell, seed=seed, config=config.logging(**QUIET)))
    if len({run.name for run in runs}) < len(runs):
        raise ConfigError(f"{path}: two runs have the same labels and seed; give every label and seed once")
    return runs


def _reward_models(path: Path, study: Study, out: Path) -> dict[tuple[str, int], StudyRewardModel]:
    """The study's reward models, by name and seed. Raises ConfigError for a config that is not valid."""
    found = {}
    closest = min(((high - low, low, high) for low, high in itertools.pairwise(sorted(study.seeds))), default=None)
    for name, source in study.reward_models.items():
        base = RewardModelConfig.from_yaml(path.parent / source.config)
        for seed in study.seeds:
            tree = base.to_dict()
            try:
                for key, value in (source.set | {"run.seed": seed, "logging.live": False}).items():
                    _set(tree, key, value)
                config = RewardModelConfig.from_dict(tree)
            except ConfigError as error:
                raise ConfigError(f"{path}: reward_models.{name}: {error}") from None
            size = config.ensemble.size
            # Ensembles that share a model are not independent, and an interval over seeds would be too narrow.
            if size > 1 and closest is not None and closest[0] < size:
                raise ConfigError(
                    f"{path}: seeds {closest[1]} and {closest[2]}: reward_models.{name} has ensemble.size {size}, so each "
                    f"ensemble trains models with the seeds run.seed to run.seed + {size - 1}: the ensembles of these two "
                    f"seeds would share models; use seeds that differ by {size} or more"
                )
            directory = out / "reward_models" / f"{name}-seed{seed}"
            found[name, seed] = StudyRewardModel(name=name, config=config, directory=directory)
    return found


def _trained_model(value: str, seed: int, known: dict[tuple[str, int], StudyRewardModel]) -> str:
    """The directory of the model that `trained:NAME` stands for in a run with this seed. Raises ConfigError."""
    name = value.removeprefix(TRAINED)
    if (name, seed) not in known:
        names = ", ".join(dict.fromkeys(one for one, _ in known)) or "none"
        raise ConfigError(f"{value!r} is no reward model of this study; reward_models has {names}")
    if (size := known[name, seed].config.ensemble.size) > 1:
        raise ConfigError(
            f"{value!r} has ensemble.size {size}: a run starts from one reward model; name one of ensemble.size 1"
        )
    return str(known[name, seed].model)


def run_study(path: Path, out: Path, workers: int | None = None, tell: Callable[[str], None] = print) -> list[str]:
    """Makes what OUT lacks, and writes its tables. Returns the names of what failed.

    path: the study's file.
    workers: jobs at once; None means the number of cores.
    tell: gets a line for whatever ends or fails.

    Raises ConfigError if OUT has a run or a reward model of the same name with another config, and if another process
    writes into OUT.
    """
    if workers is not None and workers < 1:
        raise ConfigError(
            f"--workers is {workers}: this is the number of runs at once; give 1 or more, or leave it out for one per core"
        )
    out = out.resolve()  # it enters the configs of runs that start from the study's reward models
    found = read_study(path, out)
    with disk_errors(out):
        (out / "runs").mkdir(parents=True, exist_ok=True)
    # Two commands would make the same runs, and of each run the second would fail once it is done.
    with as_only_writer(out, "study"):
        return _make(*found, out, workers, tell)


def _make(
    study: Study,
    reward_models: Sequence[StudyRewardModel],
    runs: Sequence[StudyRun],
    out: Path,
    workers: int | None,
    tell: Callable[[str], None],
) -> list[str]:
    """Does what `run_study` does, as the only process that writes into OUT. The first arguments are those of the study's file."""
    from r2m_async.launch.workload import resolve

    missing = [run for run in runs if not _is_there(out / "runs" / run.name, run.config)]
    tell(f"{len(runs)} runs, {len(runs) - len(missing)} there already")
    with WorkerProcesses(workers or os.cpu_count() or 1) as processes:
        failed = _train_reward_models(study, reward_models, out, processes, tell) if reward_models else []
        # Configs that differ in their seed alone need the same models and data.
        for config in {run.config.run(seed=0).to_yaml(): run.config for run in missing}.values():
            with contextlib.suppress(ConfigError, DataError):  # the runs themselves will report it
                resolve(config)  # builds here, once, what all runs would otherwise build at the same time
        places = [out / "runs" / run.name for run in missing]
        running = {
            processes.submit(_run, run.config.to_dict(), place, study.in_process): place
            for run, place in zip(missing, places, strict=True)
        }
        failed += wait_for(running, tell)
    if runs:
        cells: dict[str, dict[int, Path]] = defaultdict(dict)
        for run in runs:
            cells[run.cell][run.seed] = out / "runs" / run.name
        compare_cells(cells, study.kl_levels, study.against, out, study.draw, study.at_steps)
    return failed


def _train_reward_models(
    study: Study, models: Sequence[StudyRewardModel], out: Path, processes: WorkerProcesses, tell: Callable[[str], None]
) -> list[str]:
    """Trains and measures the reward models that OUT lacks, and writes their tables.

    Returns the names of what failed.
    """
    best_of_n = study.best_of_n or BestOfN()
    parts = {"evaluation": "evaluation"} if study.evaluate else {}
    if study.best_of_n is not None:
        parts["best_of_n"] = f"best_of_n-{best_of_n.label}"
    missing = [
        one
        for one in models
        if not (_is_there(one.directory, one.config) and one.model.is_dir() and is_measured(one.directory, parts))
    ]
    tell(f"{len(models)} reward models, {len(models) - len(missing)} there already")
    samples = out / f"pool-{best_of_n.label}.jsonl"
    if missing:
        with contextlib.suppress(ConfigError, DataError):  # the training itself will report it
            load_preference_data(missing[0].config)  # builds here, once, what all trainings would otherwise build
        if study.best_of_n and not samples.exists():
            _sample_pool(best_of_n, samples)
    work = {
        processes.submit(
            train_and_measure, one.config.to_yaml(), one.directory, parts, samples, best_of_n.n
        ): one.directory
        for one in missing
    }
    failed = wait_for(work, tell)
    if parts:
        by_name: dict[str, dict[int, Path]] = defaultdict(dict)
        for one in models:
            by_name[one.name][one.config.run.seed] = one.directory
        compare_reward_models(by_name, parts, study.against, out / "reward_models", study.draw)
    return failed


def _sample_pool(best_of_n: BestOfN, path: Path) -> None:
    """Draws the samples for best-of-n and writes them to `path`."""
    from r2m_async.cpu_threads import one_thread
    from r2m_async.evaluation.best_of_n import embedded_pool, write_pool
    from r2m_async.from_scratch.embedded import embedded_models

    with one_thread():
        write_pool(embedded_pool(embedded_models(), best_of_n.seed, best_of_n.prompts, best_of_n.n), path)


def _is_there(directory: Path, config: ConfigTree) -> bool:
    """Whether `directory` is a run with this config. Raises ConfigError if it is one with another config."""
    written = directory / "config.yaml"
    if not written.is_file():  # nothing is there, or it was killed before its first file
        return False
    # Values are compared, not text: a key that a later version has added stands at its default in both.
    old, new = keys_of(type(config).from_yaml(written)), keys_of(config)
    if changed := [key for key in new if old.get(key) != new[key]]:
        values = "; ".join(f"{key} was {old.get(key)!r} and is {new[key]!r}" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(f"{directory} is a run of another config: {values}{more}; remove it, or name another OUT")
    return True


def _run(tree: dict[str, Any], directory: Path, in_process: bool) -> float:
    """Makes one run of the ring, and returns the seconds that it took. It is called in a process of its own.

    tree: the config as plain values, which can be pickled.
    directory: where the run directory appears once it is whole.
    """
    from r2m_async.launch.ring import Ring
    from r2m_async.launch.training import keep_checkpoint
    from r2m_async.runs.directory import RunDirectory

    config = R2MConfig.from_dict(tree)
    with whole_directory(directory) as building:
        write_file(building / "config.yaml", config.to_yaml())
        with RunDirectory(building, config) as run, Ring.of(config, in_process=in_process) as ring:
            while not ring.finished:
                metrics = ring.step()
                run.write_step(metrics)
            run.write_evaluations(ring.drain(), ring.controller.samples)
            keep_checkpoint(ring, run)
    return metrics["time/since_start"]
