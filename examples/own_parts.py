"""Every part that a user may bring: prompts, a reward, a rollout function, an estimator, a loss, a callback and a logger.

    PYTHONPATH=examples python examples/own_parts.py configs/quickstart.yaml own_parts

All stages run in this process. `r2m train` takes the same config, which names the functions as `module:attr`, and runs them on
Ray; callbacks of RLlib are in docs/rllib.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from r2m_async import R2MConfig
from r2m_async.advantages import AdvantageInputs
from r2m_async.launch.ring import Ring
from r2m_async.policy_losses import LossInputs
from r2m_async.rollouts import Rollout


def write_prompts(path: Path, texts: list[str]) -> None:
    """A data set: a record per line. A reward function is given every other field by its name, here `longest`."""
    path.write_text("".join(json.dumps({"prompt": text, "longest": 20}) + "\n" for text in texts), encoding="utf-8")


def brevity(response: str, longest: int) -> float:
    """A reward: 1 for an empty response, and less for every letter. Its parameters name what it is given."""
    return 1 - len(response) / longest


async def two_turns(rollout: Rollout) -> None:
    """A rollout function: the policy writes, reads a word that it did not write, and goes on. docs/rollouts.md has the rest."""
    await rollout.generate(max_new_tokens=2)
    rollout.append(" and")
    await rollout.generate()


def median_baseline(inputs: AdvantageInputs) -> Tensor:
    """An advantage estimator: rewards [n, K] minus the median of their group."""
    return inputs.rewards - inputs.rewards.median(dim=1, keepdim=True).values


def unclipped(inputs: LossInputs) -> Tensor:
    """A policy loss: the ratio times the advantage, without a clip."""
    return -inputs.ratio * inputs.advantages


def stops_at(kl: float) -> Callable[[dict[str, float]], bool]:
    """A callback: it is given the metrics of a step, and says whether the run should end."""
    return lambda metrics: metrics["kl/sequence"] > kl


class Journal:
    """A logger: it writes the metrics of each step as a line of JSON."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write(self, metrics: dict[str, float]) -> None:
        """Writes a line at once, so that it is there if the run fails."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def run(config: R2MConfig, out: Path) -> list[dict[str, Any]]:
    """Trains with all of these parts, and returns the metrics of the steps. out: a folder, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    write_prompts(out / "prompts.jsonl", ["the river", "old stone", "cold wind", "a warm wind"])
    config = (
        config.data(prompts=str(out / "prompts.jsonl"))
        .reward(functions={"brevity": {"function": "own_parts:brevity", "weight": 0.5}})
        .rollouts(function="own_parts:two_turns")
        .advantage(name="own_parts:median_baseline")
        .objective(loss="own_parts:unclipped")
        .evaluation(every=None, gold=None)
    )
    journal, should_stop, steps = Journal(out / "journal.jsonl"), stops_at(kl=5.0), []
    try:
        with Ring.of(config, in_process=True) as ring:
            while not ring.finished:
                steps.append(ring.step())
                journal.write(steps[-1])
                if should_stop(steps[-1]):
                    break
    finally:
        journal.close()
    return steps


if __name__ == "__main__":
    for metrics in run(R2MConfig.from_yaml(sys.argv[1], ["run.num_steps=3"]), Path(sys.argv[2])):
        print(
            f"step {metrics['step']:.0f}  reward {metrics['reward/mean']:.3f}  brevity {metrics['reward/brevity']:.3f}"
        )
