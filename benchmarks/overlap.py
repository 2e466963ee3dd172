"""How near the ring comes to the busiest stage: `python benchmarks/overlap.py [--ray]`.

The real controller and the real schedule, on a real clock, over stages that take fixed times and do nothing. What is left
of a step beyond the work of its busiest stage is what the schedule could not overlap, and the controller's own work. The
limit is `physical_bound` of `r2m_async/ring/simulator.py`, and for the synchronous schedule `synchronous_bound` below. `--ray`
runs every stage in a Ray process, with the real replay queue, as a run does. The last row is the controller's processor
time for a group with 1,000 rollout actors (`herd.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from herd import milliseconds_per_group
from rows import Row, emit

from r2m_async.config import R2MConfig
from r2m_async.ring.controller import Controller
from r2m_async.ring.simulator import (
    SimulatedStage,
    StageTimes,
    physical_bound,
    plan_without_models,
    simulated_ticket,
)
from r2m_async.ring.stages import Stages, local_bytes

TIMES = StageTimes(
    generate=0.12, load_weights=0.01, embed=0.01, proximal=0.08, score=0.03, train=0.4, weights=0.02, update=0.15
)
"""Seconds. 8 groups of two actors take 0.48 s, and so does a step of the policy learner: nobody has time to spare."""
MODES = {
    "bounded, age 2": {"max_policy_age": 2, "max_head_age": 2},
    "exact, age 2": {"max_policy_age": 2, "max_head_age": 2, "lag": "exact"},
    "synchronous": {},
}
WARM_UP = 4
"""Steps that are not counted: the ring fills, and processes start."""


class StandIn:
    """A stage that sleeps for as long as each of its methods takes, and returns what the simulator's stage does."""

    def __init__(self) -> None:
        self._stage = SimulatedStage("", lambda method: 0.0)

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if name.startswith("_") or name == "opaque":
            raise AttributeError(name)

        def method(*args: Any) -> tuple[Any, ...]:
            time.sleep(getattr(TIMES, name, 0.0))
            return self._stage.result(name, args)

        return method


def config_of(mode: str, steps: int) -> R2MConfig:
    return R2MConfig.from_dict(
        {
            "run": {"num_steps": steps},
            "rollouts": {"num_actors": 2, "prompts_per_step": 8},
            "scheduling": {"stall_after": 300.0, **MODES[mode]},
        }
    )


def synchronous_bound(config: R2MConfig, times: StageTimes) -> float:
    """Seconds per step that no schedule without staleness can undercut.

    One after the other come: an actor's share of the groups, with the version loaded first; the proximal pass, beside which
    the last group is embedded and all are scored; the training; and the copy of the new version. Embedding the other groups,
    and the head's update on the step before, take place beside the generation, unless they take longer.
    """
    groups, actors = config.rollouts.prompts_per_step, config.rollouts.num_actors
    generation = times.load_weights + -(-groups // actors) * times.generate
    passes = max(times.proximal, times.embed / config.reward.replicas + times.score)
    chain = generation + passes + times.train + times.weights
    return max(chain, times.train + times.update + times.score)


def in_this_process(config: R2MConfig) -> tuple[Stages, Callable[[], None]]:
    def stage(name: str) -> SimulatedStage:
        return SimulatedStage(name, lambda method: getattr(TIMES, method, 0.0))

    stages = Stages.carried_by(
        rollouts=tuple(stage(f"rollout-{index}") for index in range(config.rollouts.num_actors)),
        queue=stage("queue"),
        annotators=(stage("annotator-0"),),
        policy=stage("policy-learner"),
        head=stage("head-learner"),
        **local_bytes(),
    )
    return stages, lambda: None


def on_ray(config: R2MConfig) -> tuple[Stages, Callable[[], None]]:
    from actors.replay_queue import ReplayQueue
    from r2m_async.launch.ray_stages import RayProcesses, ray_bytes

    processes = RayProcesses(config)

    def stage(name: str, make: Callable[[Any, Any], Any] = lambda config, workload: StandIn()) -> Any:
        return processes.stage(name, make, None, 0.0)

    stages = Stages.carried_by(
        rollouts=tuple(stage(f"rollout-{index}") for index in range(config.rollouts.num_actors)),
        queue=stage("queue", lambda config, workload: ReplayQueue(buffers=True)),
        annotators=(stage("annotator-0"),),
        policy=stage("policy-learner"),
        head=stage("head-learner"),
        **ray_bytes(),
    )
    return stages, processes.close


def seconds_per_step(config: R2MConfig, make: Callable[[R2MConfig], tuple[Stages, Callable[[], None]]]) -> float:
    stages, close = make(config)

    async def run() -> list[float]:
        controller = Controller(config, plan_without_models(config), stages, simulated_ticket)
        await controller.start()
        ends = []
        try:
            while not controller.finished:
                await controller.step()
                ends.append(time.perf_counter())
            await controller.drain()
        finally:
            await controller.stop()
        return ends

    try:
        ends = asyncio.run(run())[WARM_UP - 1 :]
    finally:
        close()
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--actors", type=int, default=1000, help="of the scheduler's row")
    options = parser.parse_args()
    make, where = (on_ray, "Ray processes") if options.ray else (in_this_process, "one process")
    took: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(options.rounds):
        for mode in MODES:
            took[mode].append(seconds_per_step(config_of(mode, options.steps), make))
    for mode, seconds in took.items():
        config, mine = config_of(mode, options.steps), statistics.median(seconds)
        limit = (synchronous_bound if mode == "synchronous" else physical_bound)(config, TIMES)
        emit(
            Row(
                name=f"overlap, {where}, {mode}",
                unit="s per step",
                ours=mine,
                limit=limit,
                ratio=limit / mine,
                means="limit / ours",
                goal=">= 0.9" if "exact" in mode else ">= 0.95",
            )
        )
    if not options.ray:
        milliseconds = min(milliseconds_per_group(options.actors, 4 * options.actors) for _ in range(3))
        emit(
            Row(
                name=f"controller and schedule, {options.actors} rollout actors",
                unit="ms per group",
                ours=milliseconds,
                ratio=milliseconds,
                means="milliseconds of the processor",
                goal="<= 0.3",
            )
        )


if __name__ == "__main__":
    main()
