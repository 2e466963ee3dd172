"""Offline training of reward models on preference pairs: what `r2m reward-model train` does.

    RUN/config.yaml                  the resolved config
    RUN/seed-0/metrics.jsonl         one line per step
    RUN/seed-0/evaluation.jsonl      one line per evaluation: accuracy, and what `training_states` measures
    RUN/seed-0/checkpoints/          the newest checkpoint, if `checkpoint.every` is set and the model is not done
    RUN/seed-0/model/                for AutoModelForSequenceClassification and AutoTokenizer (two layers:
                                     `load_classifier`)
    RUN/training.png, states.png     the figures

An ensemble has one such folder per seed, and `RewardEnsemble(RUN)` scores with all its models. Models are trained
without dropout but that of `head.dropout`, and entirely in float32 or in bfloat16. On a CPU every run of the same config
gives the same bits, even if it was interrupted and resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from r2m_async.cpu_threads import one_thread
from r2m_async.errors import ConfigError, DataError
from r2m_async.models.attention import check_attention
from r2m_async.models.liger import check_liger
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.reward_models.ensemble import seed_directory
from r2m_async.reward_models.preferences import (
    PreferenceData,
    load_preference_data,
    start_reader,
)
from r2m_async.reward_models.process_group import first_rank_first, made_by_first, rank
from r2m_async.reward_models.trainer import RewardTrainer
from r2m_async.runs.checkpoints import checkpoint_path, checkpoints
from r2m_async.runs.directory import as_only_writer, new_directory
from r2m_async.runs.records import append_records
from r2m_async.whole import cut_partial_line, disk_errors, remove_directory, whole_directory


def train(config: RewardModelConfig) -> Path:
    """Trains the model or the models of a config into a new run directory, and returns that directory.

    Within a process group all ranks train together, and the first one alone writes.

    Raises ConfigError and DataError for a config and for pairs that cannot be used, NonFiniteStep if training diverges,
    and DiskError.
    """
    run = made_by_first(lambda: new_directory(config.run.output_dir, config.run.name, config))
    try:
        return resume(run)
    except (ConfigError, DataError):
        if rank() == 0 and not any(seed_directory(run, seed).exists() for seed in config.seeds):
            remove_directory(run)  # it has nothing but the config that was refused
        raise


def resume(run: Path) -> Path:
    """Goes on with a run where it ended, and returns its directory.

    Models that are finished stay as they are. An unfinished model starts from its newest checkpoint, or anew if it has
    none. Raises the errors of `train`, and ConfigError if another process writes into the directory.
    """
    from r2m_async.reward_models.plots import plot_reward_training, plot_training_states
    from r2m_async.runs.progress import TrainingProgress

    config = RewardModelConfig.from_yaml(run / "config.yaml")
    check_attention(config.model.attention, config.run.device, config.model.dtype)
    if config.model.liger:
        check_liger(config.run.device)
    with ExitStack() as stack:
        with first_rank_first():
            if rank() == 0:
                stack.enter_context(as_only_writer(run))
        stack.enter_context(_naming_what_is_left(run))
        stack.enter_context(one_thread())
        progress = stack.enter_context(TrainingProgress(config.logging.live))
        # The first rank builds or downloads what is missing; the other ranks then find it on the disk.
        with first_rank_first():
            start, data = _found(config, progress)
        for reason, count in data.skipped.items():
            progress.message(f"data: skipped {count} records: {reason}")
        progress.message(f"{len(data.training)} training pairs, {len(data.held_out)} held out; run directory {run}")
        for seed in config.seeds:
            # This directory is there whole or not at all: if it is there, the model is done.
            if not (seed_directory(run, seed) / "model").is_dir():
                _train_one(config.run(seed=seed), data, start, seed_directory(run, seed), progress)
    if rank() == 0:
        directories = {f"seed {seed}": seed_directory(run, seed) for seed in config.seeds}
        plot_reward_training(directories, run / "training.png")
        plot_training_states(directories, run / "states.png")
    return run


@contextmanager
def _naming_what_is_left(run: Path) -> Iterator[None]:
    """Adds a note to an error in the block once a model has begun: where the measurements are, and how the run goes on."""
    try:
        yield
    except BaseException as error:
        # If the disk fails here, too, that must not hide the error of the run.
        with suppress(OSError):
            if begun := sorted(path for path in run.glob("seed-*") if path.is_dir()):
                saved = [path for seed in begun for path in checkpoints(seed)]
                last = f" from {saved[-1]}" if saved else ", an unfinished model anew (checkpoint.every)"
                error.add_note(f"What was measured is in {run}: `r2m reward-model resume {run}` goes on{last}.")
        raise


def _found(config: RewardModelConfig, progress: Any) -> tuple[str, PreferenceData]:
    """The name or directory of the model to start from, and the pairs.

    The embedded language's models and pairs are built if they are not in the cache.
    """
    start = config.model.start
    if start in ("embedded", "embedded_reward"):
        from r2m_async.from_scratch.embedded import embedded_models
        from r2m_async.from_scratch.preferences import embedded_preferences

        progress.message("the embedded language's models and preferences: found or built")
        start = str(embedded_preferences().start if start == "embedded" else embedded_models().reward_model)
    progress.message(f"reading the pairs of {config.data.preferences}")
    return start, load_preference_data(config, start_reader(config))


def _train_one(config: RewardModelConfig, data: PreferenceData, start: str, directory: Path, progress: Any) -> None:
    """Trains one model in its folder, from its newest checkpoint if it has one."""
    progress.message(f"seed {config.run.seed}: loading {start}")
    trainer = RewardTrainer(config, data, start, progress.work)
    saved = checkpoints(directory)
    if saved:
        trainer.restore(saved[-1])
    if rank() == 0:
        with disk_errors(directory):
            directory.mkdir(exist_ok=True)
        for name in ("metrics.jsonl", "evaluation.jsonl"):
            # A run that was killed may have written half of its last line.
            cut_partial_line(directory / name)
    if not saved:
        # All ranks evaluate, since they share the work. The first one alone writes.
        _append(directory / "evaluation.jsonl", trainer.evaluate())
    while not trainer.finished:
        metrics = trainer.step()
        if trainer.finished or _due(config.evaluation.every, trainer.steps_done):
            evaluation = trainer.evaluate()
            metrics["held_out/accuracy"] = evaluation["held_out/accuracy"]
            _append(directory / "evaluation.jsonl", evaluation)
        _append(directory / "metrics.jsonl", metrics)
        progress.update(config.run.seed, metrics, trainer.num_steps)
        if rank() == 0 and _due(config.checkpoint.every, trainer.steps_done):
            trainer.save(checkpoint_path(directory, trainer.steps_done))
            # Older ones go only after the new one is whole, so that there is always one to resume from.
            for old in checkpoints(directory)[:-1]:
                remove_directory(old)
    if rank() == 0:
        _finish(trainer, directory)


def _append(path: Path, record: dict[str, float]) -> None:
    """Appends a record to a file, in the first rank alone."""
    if rank() == 0:
        append_records(path, [record])


def _finish(trainer: RewardTrainer, directory: Path) -> None:
    """Writes the trained model, whole or not at all, and then removes its checkpoints."""
    with whole_directory(directory / "model") as building:
        trainer.save_model(building)
    remove_directory(directory / "checkpoints")


def _due(every: int | None, step: int) -> bool:
    """Whether `step` is a multiple of `every`; never, if `every` is None."""
    return every is not None and step % every == 0
