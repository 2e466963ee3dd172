"""Sweeps of Ray Tune over R2M: ASHA stops trials that lag behind, and PBT lets them go on from a better one's checkpoint.

    python examples/sweep.py asha configs/quickstart.yaml sweeps
    python examples/sweep.py pbt configs/quickstart.yaml sweeps

Both try learning rates of policy and head on the embedded language, by its gold reward, which training never sees. A sweep that
was interrupted goes on: `tune.Tuner.restore("sweeps/pbt", R2M).fit()`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler

from r2m_async import R2M, R2MConfig

RATES = {"learner": {"lr": tune.loguniform(1e-5, 3e-4)}, "head": {"lr": tune.loguniform(1e-5, 3e-4)}}
"""What is searched, by section and key."""


def scheduler_of(name: str, every: int, share: float = 0.25) -> TrialScheduler:
    """The scheduler `asha` or `pbt`, which looks at the trials after every so many steps.

    share: for PBT, how many of the trials are among the worst, and how many among the best.
    """
    if name == "asha":
        # At 1, 2, 4, ... times `every` steps the worse half of the trials that came so far is stopped.
        return ASHAScheduler(grace_period=every, reduction_factor=2, max_t=10**6)
    # One of the worst takes over checkpoint and rates of one of the best, and changes the rates. Trials wait for each other:
    # on few cores one would otherwise end before another has begun.
    return PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=every,
        hyperparam_mutations=RATES,
        quantile_fraction=share,
        synch=True,
    )


def sweep(
    scheduler: TrialScheduler,
    space: dict[str, Any],
    place: Path,
    metric: str = "r2m/reward/gold",
    trials: int = 4,
    every: int = 20,
    at_once: int = 2,
) -> tune.ResultGrid:
    """Runs the trials of a sweep, each a whole ring, and returns their results.

    Args:
        scheduler: decides which trials go on, and how.
        space: the tree of a config, with what is searched in the place of values.
        place: the folder of the sweep, which is made.
        metric: what the trials are compared by. The larger, the better.
        trials: how many, for each point of a grid in `space`.
        every: steps between two checkpoints. A trial that fails or is taken over goes on from one.
        at_once: trials that run at the same time.
    """
    tuner = tune.Tuner(
        R2M,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=metric, mode="max", scheduler=scheduler, num_samples=trials, max_concurrent_trials=at_once
        ),
        run_config=tune.RunConfig(
            name=place.name,
            storage_path=str(place.parent.absolute()),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=every, checkpoint_at_end=True),
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )
    return tuner.fit()


def main(name: str, config: str, out: str) -> None:
    """Sweeps, and says which trial was the best and where its checkpoint is."""
    space = R2MConfig.from_yaml(config).to_dict()
    for section, keys in RATES.items():
        space[section] |= keys
    best = sweep(scheduler_of(name, every=20), space, Path(out) / name).get_best_result()
    rates = {section: best.config[section]["lr"] for section in RATES}
    print(
        f"best after {best.metrics['training_iteration']} steps: {rates}, gold {best.metrics['r2m']['reward/gold']:.3f}"
    )
    print(f"its policy: r2m export {best.checkpoint.path}/ring exported")


if __name__ == "__main__":
    main(*sys.argv[1:])
