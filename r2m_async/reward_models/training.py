"""Offline training of reward models on preference pairs: what `r2m reward-model train` does.

    RUN/config.yaml                  the resolved config
    RUN/seed-0/metrics.jsonl         one line per step
    RUN/seed-0/evaluation.jsonl      one line per evaluation: accuracy, and what `reward_states` finds out
    RUN/seed-0/checkpoints/          the newest, where `checkpoint.every` is set and the model is not done
    RUN/seed-0/model/                for AutoModelForSequenceClassification and AutoTokenizer (two layers: `load_classifier`)
    RUN/training.png, states.png

An ensemble has one such folder per seed, and `RewardEnsemble(RUN)` scores with all. Models train without dropout, in
whole float32 or bfloat16, and on a CPU to the same bits in every run, resumed ones too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from r2m_async.errors import ConfigError, DataError
from r2m_async.models.loading import one_thread
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.reward_models.ensemble import seed_directory
from r2m_async.reward_models.preferences import (
    PreferenceData,
    load_preference_data,
)
from r2m_async.reward_models.process_group import first_rank_first, made_by_first, rank
from r2m_async.reward_models.trainer import RewardTrainer
from r2m_async.runs.checkpoints import checkpoint_path, checkpoints
from r2m_async.runs.directory import new_directory
from r2m_async.runs.records import append_records, cut_partial_line
from r2m_async.whole import disk_errors, remove_directory, whole_directory


def train(config: RewardModelConfig) -> Path:
    """Trains the config's model or models into a new run directory; returns it.

    Within a process group the ranks train together, and the first one alone writes.
    """
    run = made_by_first(lambda: new_directory(config.run.output_dir, config.run.name, config))
    try:
        return resume(run)
    except (ConfigError, DataError):
        if rank() == 0 and not any(seed_directory(run, seed).exists() for seed in config.seeds):
            remove_directory(run)  # nothing but the config that was refused
        raise


def resume(run: Path) -> Path:
    """Goes on with a run where it ended: finished models stay, an unfinished one starts from its newest checkpoint."""
    from r2m_async.reward_models.plots import plot_reward_training, plot_training_states
    from r2m_async.runs.progress import TrainingProgress

    config = RewardModelConfig.from_yaml(run / "config.yaml")
    with one_thread(), TrainingProgress(config.logging.live) as progress:
        with first_rank_first():
            start, data = _found(config, progress)
        for reason, count in data.skipped.items():
            progress.message(f"data: skipped {count} records: {reason}")
        progress.message(f"{len(data.training)} training pairs, {len(data.held_out)} held out; run directory {run}")
        for seed in config.seeds:
            if not (seed_directory(run, seed) / "model").is_dir():
                _train_one(config.run(seed=seed), data, start, seed_directory(run, seed), progress)
    if rank() == 0:
        directories = {f"seed {seed}": seed_directory(run, seed) for seed in config.seeds}
        plot_reward_training(directories, run / "training.png")
        plot_training_states(directories, run / "states.png")
    return run


def _found(config: RewardModelConfig, progress: Any) -> tuple[str, PreferenceData]:
    """The name or directory of the start, and the pairs; the embedded language's are built where they are not there."""
    start = config.model.start
    if start in ("embedded", "embedded_reward"):
        from r2m_async.from_scratch.embedded import embedded_models
        from r2m_async.from_scratch.preferences import embedded_preferences

        progress.message("the embedded language's models and preferences: found or built")
        start = str(embedded_preferences().start if start == "embedded" else embedded_models().reward_model)
    return start, load_preference_data(config)


def _train_one(config: RewardModelConfig, data: PreferenceData, start: str, directory: Path, progress: Any) -> None:
    trainer = RewardTrainer(config, data, start)
    saved = checkpoints(directory)
    if saved:
        trainer.restore(saved[-1])
    if rank() == 0:
        with disk_errors(directory):
            directory.mkdir(exist_ok=True)
        for name in ("metrics.jsonl", "evaluation.jsonl"):
            cut_partial_line(directory / name)
    if not saved:
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
            for old in checkpoints(directory)[:-1]:
                remove_directory(old)
    if rank() == 0:
        _finish(trainer, directory)


def _append(path: Path, record: dict[str, float]) -> None:
    if rank() == 0:
        append_records(path, [record])


def _finish(trainer: RewardTrainer, directory: Path) -> None:
    """The model, whole or not at all, in place of its checkpoints."""
    with whole_directory(directory / "model") as building:
        trainer.model.save(building)
    remove_directory(directory / "checkpoints")


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
