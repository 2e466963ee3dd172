"""The ring on a virtual clock: the real controller and schedule over stages that only take time.

    prediction = simulate(config, StageTimes(generate=2.0, train=3.0))

An hour of a cluster takes seconds, and a ring that would wait for ever raises at once.
"""

from __future__ import annotations

import asyncio
import math
import random
import selectors
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, StageLost, StalledRun
from r2m_async.ring.controller import Controller
from r2m_async.ring.stages import Method, Stages, local_bytes
from r2m_async.schedule import Admission, Plan, Schedule
from r2m_async.trajectories import GroupReport, Prompt, StepReport, Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Mean seconds per call."""

    generate: float = 1.0
    """One group on one rollout actor."""
    load_weights: float = 0.0
    """Publishing a version to one rollout actor."""
    embed: float = 0.0
    """The backbone pass of one group."""
    proximal: float = 0.0
    """pi_old's and the reference's log-probabilities of one step."""
    score: float = 0.0
    train: float = 1.0
    """All epochs of one step."""
    weights: float = 0.0
    """Copying a version out of the policy learner, beside the next step's proximal pass where that is possible."""
    update: float = 0.0
    """One head update."""
    generate_spread: float = 0.0
    """Standard deviation of the logarithm of `generate`: 0.5 is a moderate, 1 a heavy tail of long responses."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"stage time {field.name} is {value}; expected seconds, 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    seconds_per_step: float
    bound_seconds_per_step: float
    """No schedule can be faster: the busiest stage's work per step."""
    serial_seconds_per_step: float
    """The same work with nothing overlapping but the rollout actors: the synchronous schedule."""
    idle: dict[str, float]
    """Mean idle share by kind of stage, from the second half of the run."""
    policy_age_mean: float
    policy_age_max: float
    head_age_max: float


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose waits take no time: the clock jumps to whatever is due next."""

    def __init__(self) -> None:
        self._virtual_now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._virtual_now


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise StalledRun("every coroutine waits for another: nothing will ever happen")
        if timeout > 0:  # by one representable step at least, or a tiny wait at a late hour would never end
            now = self._loop._virtual_now
            self._loop._virtual_now = max(now + timeout, math.nextafter(now, math.inf))
        return super().select(0)


class SimulatedStage:
    """The carrier of a stage whose calls take `duration(method)`, one at a time, and hand out versions for payloads.

    `crashes(method)` says whether the process dies at the end of a call.
    """

    def __init__(
        self,
        name: str,
        duration: Callable[[str], float],
        crashes: Callable[[str], bool] = lambda method: False,
        group_bytes: int = 0,
    ) -> None:
        self.name = name
        self._lock = asyncio.Lock()
        self._duration = duration
        self._crashes = crashes
        self._group_bytes = group_bytes
        self._version = 0
        self._aborted: set[int] = set()
        self._abort_of: dict[int, asyncio.Event] = {}

    async def call(self, method: Method, *args: Any) -> tuple[Any, ...]:
        if method.name == "abort":
            await asyncio.sleep(self._duration("abort"))
            if self._crashes("abort"):
                raise StageLost(self.name, f"{self.name} is not there to abort")
            self._aborted.add(args[0])
            if generating := self._abort_of.get(args[0]):
                generating.set()
            return (None,)
        if method.beside == "weights":  # beside whatever else it does
            await asyncio.sleep(self._duration(method.name))
            return self._result(method.name, args)
        async with self._lock:
            seconds = self._duration(method.name)
            if method.name == "generate":
                await self._generate(args[0].group_id, seconds)
            else:
                await asyncio.sleep(seconds)
            if self._crashes(method.name):
                raise StageLost(self.name, f"{self.name} crashed in {method.name}")
            return self._result(method.name, args)

    async def _generate(self, group_id: int, seconds: float) -> None:
        """Until it is done or aborted, or at once if that was asked before."""
        if group_id in self._aborted:
            return
        self._abort_of[group_id] = asyncio.Event()
        try:
            async with asyncio.timeout(seconds):
                await self._abort_of[group_id].wait()
        except TimeoutError:
            pass
        finally:
            del self._abort_of[group_id]

    async def restart(self) -> None:
        self._version = -1
        await asyncio.sleep(self._duration("restart"))

    async def pids(self) -> list[int]:
        return []

    def _result(self, method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if method == "load_weights":
            self._version = args[0]
        if method == "generate":
            ticket = args[0]
            aborted = ticket.group_id in self._aborted
            group_report = GroupReport(
                group_id=ticket.group_id,
                attempt=ticket.attempt,
                oldest_version=self._version,
                num_responses=0 if aborted else 2,
                num_tokens=1,
                num_bytes=self._group_bytes,
            )
            return group_report, ticket.group_id, None
        step = args[0] if args and isinstance(args[0], int) else 0
        if method == "train":
            self._version = step + 1
        report = StepReport(version=step, metrics={})
        return {
            "weights": (report, self._version),
            "initial_head": (report, 0),
            "proximal": (report, None),
            "train": (report, None),
            "update": (report, step + 1),
            "score": (report, None),
            "embed": (report, None),
            "get": (None, None),
            "load_weights": (report,),
        }.get(method, (None,))


def simulate(config: R2MConfig, times: StageTimes, seed: int = 0) -> Prediction:
    """Runs the config's schedule with the given stage times on a virtual clock.

    Raises StalledRun if the ring would stop moving, ConfigError for a queue that holds less than one step.
    """
    config = config.evaluation(every=None)
    plan = plan_without_models(config)
    random_source = random.Random(seed)

    def duration(method: str) -> float:
        mean = getattr(times, method, 0.0)
        spread = times.generate_spread
        if method == "generate" and spread:
            return mean * random_source.lognormvariate(-spread * spread / 2, spread)
        return mean

    names = [f"rollout-{index}" for index in range(config.rollouts.num_actors)]
    stages = Stages.carried_by(
        rollouts=tuple(SimulatedStage(name, duration) for name in names),
        queue=SimulatedStage("queue", duration),
        annotators=tuple(SimulatedStage(f"annotator-{index}", duration) for index in range(config.reward.replicas)),
        policy=SimulatedStage("policy-learner", duration),
        head=SimulatedStage("head-learner", duration),
        **local_bytes(),
    )
    results, _ = run_virtually(config, plan, stages)
    steady = results[len(results) // 2 :]
    per_step = (results[-1]["time/since_start"] - results[0]["time/since_start"]) / max(1, len(results) - 1)
    idle = {key: _mean(steady, key) for key in steady[-1] if key.startswith("idle/")}
    return Prediction(
        seconds_per_step=per_step if len(results) > 1 else results[0]["time/since_start"],
        bound_seconds_per_step=physical_bound(config, times),
        serial_seconds_per_step=serial_time(config, times),
        idle={key.removeprefix("idle/"): share for key, share in idle.items()},
        policy_age_mean=_mean(steady, "age/policy_mean"),
        policy_age_max=max(result["age/policy_max"] for result in results),
        head_age_max=max(result["age/head"] for result in results),
    )


def run_virtually(config: R2MConfig, plan: Plan, stages: Stages) -> tuple[list[dict[str, float]], Schedule]:
    """A whole run's metrics by step, and its schedule, whose ledgers balance and which holds nothing any more."""

    async def run() -> tuple[list[dict[str, float]], Schedule]:
        controller = Controller(config, plan, stages, simulated_ticket)
        await controller.start()
        results = []
        try:
            while not controller.finished:
                results.append(await controller.step())
            await controller.drain()
        finally:
            await controller.stop()
        return results, controller.schedule

    loop = VirtualClockLoop()
    try:
        return loop.run_until_complete(run())
    finally:
        loop.close()


def simulated_ticket(admission: Admission) -> Ticket:
    prompt = Prompt(prompt_id="simulated", content="", text="", token_ids=(0,))
    return Ticket(
        group_id=admission.group_id, due_step=admission.due_step, seed=0, attempt=admission.attempt, prompt=prompt
    )


def plan_without_models(config: R2MConfig) -> Plan:
    """The config's plan with a queue that never fills: sizes need the models, which a simulation does without."""
    return Plan(
        num_steps=config.run.num_steps,
        groups_per_step=config.rollouts.prompts_per_step,
        max_policy_age=config.scheduling.max_policy_age,
        max_head_age=config.scheduling.max_head_age,
        lag=config.scheduling.lag,
        overage=config.scheduling.overage,
        overage_after=config.scheduling.overage_after,
        max_bytes=1,
        group_bytes=0,
    )


def physical_bound(config: R2MConfig, times: StageTimes) -> float:
    """Seconds per step of the busiest stage: max(B generate / actors, B embed / replicas + score, proximal + train, update).

    Copying weights out counts to the learner's time where it cannot overlap; loading them is left out: how often an actor
    does it is the schedule's doing.
    """
    copying = 0.0 if config.publishes_beside_passes else times.weights
    groups = config.rollouts.prompts_per_step
    return max(
        groups * times.generate / config.rollouts.num_actors,
        groups * times.embed / config.reward.replicas + times.score,
        times.proximal + times.train + copying,
        times.update,
    )


def serial_time(config: R2MConfig, times: StageTimes) -> float:
    """Seconds per step with one stage at work at a time: the sum of what `physical_bound` takes the largest of."""
    groups = config.rollouts.prompts_per_step
    rollouts = -(-groups // config.rollouts.num_actors) * times.generate + times.load_weights
    annotation = groups * times.embed / config.reward.replicas + times.score
    return rollouts + annotation + times.proximal + times.train + times.weights + times.update


def times_of_run(intervals: list[dict[str, Any]]) -> StageTimes:
    """Mean seconds per call in a run's trace, evaluations left out."""
    known = {field.name for field in fields(StageTimes)}
    seconds: dict[str, list[float]] = {}
    for interval in intervals:
        if interval["method"] in known and interval["step"] >= 0:
            seconds.setdefault(interval["method"], []).append(interval["end"] - interval["start"])
    return replace(StageTimes(), **{method: sum(values) / len(values) for method, values in seconds.items()})


def _mean(results: list[dict[str, float]], key: str) -> float:
    return sum(result[key] for result in results) / len(results)
