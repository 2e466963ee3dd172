"""Runs the ring on a virtual clock: the real controller and schedule, over stages that only let time pass.

    prediction = simulate(config, StageTimes(generate=2.0, train=3.0), cores=2)

With `cores`, stages that work at the same time share as many cores. Without, each has cores of its own, or a GPU. An hour on a cluster is simulated in seconds. A ring that would wait for ever raises StalledRun at once.
"""

from __future__ import annotations

import asyncio
import math
import random
import selectors
import statistics
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, StageLost, StalledRun
from r2m_async.ring.controller import Controller
from r2m_async.ring.stages import Method, Stages, local_bytes
from r2m_async.schedule import Admission, Plan, Schedule
from r2m_async.trajectories import GroupReport, LabelReport, Prompt, StepReport, Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """The mean time of a call, in seconds, for each method of a stage that takes time.

    Construction raises ConfigError if a number is negative, NaN or infinite.
    """

    generate: float = 1.0
    """Seconds in which one rollout actor generates one group."""
    load_weights: float = 0.0
    """Seconds in which one rollout actor loads a policy version."""
    embed: float = 0.0
    """Seconds in which the frozen reward model embeds one group."""
    proximal: float = 0.0
    """Seconds of the proximal pass of one step: the log-probabilities under pi_old and the reference policy."""
    score: float = 0.0
    """Seconds in which the rewards of one step are computed from the embeddings."""
    train: float = 1.0
    """Seconds of all epochs of one step."""
    weights: float = 0.0
    """Seconds in which one version is copied out of the policy learner.

    If possible, this happens while the proximal pass of the next step runs.
    """
    update: float = 0.0
    """Seconds of one head update."""
    labels: float = 0.0
    """Seconds for which one head update waits for its labels, under `labels.wait`. They count if there is a
    `labels.source`."""
    queue: float = 0.0
    """Seconds of one call of the replay queue, with what the driver and Ray do besides in a step, per such call."""
    generate_spread: float = 0.0
    """The standard deviation of the logarithm of the time of `generate`.

    0 means that all groups take the same time. 0.5 stands for a moderate tail of long responses, and 1 for a heavy one.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"stage time {field.name} is {value}; expected seconds, 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What `simulate` predicts of a run."""

    seconds_per_step: float
    """Mean seconds from the end of one step to the end of the next."""
    bound_seconds_per_step: float
    """Seconds per step that no schedule can undercut: the work of the busiest stage, or of all cores (`physical_bound`)."""
    serial_seconds_per_step: float
    """Seconds per step of the synchronous schedule, where only rollout actors work at the same time (`serial_time`)."""
    idle: dict[str, float]
    """For each kind of stage, the mean share of time in which it has no work, over the second half of the run."""
    policy_age_mean: float
    """Mean policy age of the trained groups, in steps, over the second half of the run."""
    policy_age_max: float
    """The largest policy age of the run, in steps."""
    head_age_max: float
    """The largest head age of the run, in steps."""
    discarded: float
    """Share of the run's groups that are given up as late (`scheduling.overage: drop`)."""


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose waits take no real time: its clock jumps to the next time at which something is due."""

    def __init__(self) -> None:
        """Begins at time 0."""
        self._virtual_now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        """Returns the virtual time in seconds. asyncio reads its clock by this method."""
        return self._virtual_now


class _JumpingSelector(selectors.DefaultSelector):
    """What the loop sleeps in. Instead of sleeping, it sets the clock forward."""

    def __init__(self, loop: VirtualClockLoop) -> None:
        """Keeps the loop whose clock it sets."""
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        """Sets the clock forward by `timeout` seconds. Raises StalledRun if the loop would sleep for ever."""
        # asyncio passes None if no timer is set and nothing can run.
        if timeout is None:
            raise StalledRun("every coroutine waits for another: nothing will ever happen")
        if timeout > 0:
            # By at least the next representable number. At a late hour a tiny timeout would be rounded away, and the
            # clock would stand still for ever.
            now = self._loop._virtual_now
            self._loop._virtual_now = max(now + timeout, math.nextafter(now, math.inf))
        return super().select(0)


class Cores:
    """Cores that stages share. If n calls run at once on c cores, each has a core to itself, or c / n of one."""

    def __init__(self, number: float) -> None:
        """Begins without any call. number: how many cores there are, above 0."""
        self._number = number
        self._work = 0.0
        """The work that a call would have done by now that has run from the beginning on, in seconds of one core."""
        self._at = 0.0
        self._speed = 1.0
        self._calls: dict[Callable[[], None], float] = {}
        """What to call at the end of each call that runs, and the work at which it ends."""
        self._timer: asyncio.TimerHandle | None = None

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls `callback` after this many seconds of work of one core. Returns a function that ends the work early.

        callback: must be no other's at the same time.
        """
        self._go_on()
        self._calls[callback] = self._work + seconds
        self._go_on()
        return lambda: self._end(callback)

    def _end(self, callback: Callable[[], None]) -> None:
        if callback in self._calls:
            self._go_on()
            self._calls.pop(callback, None)
            self._go_on()

    def _go_on(self) -> None:
        """Brings the work up to the present time, ends the calls that have done theirs, and sets the timer for the next."""
        loop = asyncio.get_running_loop()
        self._work += (loop.time() - self._at) * self._speed
        self._at = loop.time()
        # Work is a sum of many numbers, so the last of a call's may be off by rounding.
        for callback in [one for one, end in self._calls.items() if end <= self._work + 1e-9]:
            del self._calls[callback]
            callback()
        self._speed = min(1.0, self._number / max(1, len(self._calls)))
        if self._timer:
            self._timer.cancel()
        if self._calls:
            self._timer = loop.call_later((min(self._calls.values()) - self._work) / self._speed, self._go_on)


class SimulatedStage:
    """A carrier that lets time pass instead of calling a stage. Its calls run one at a time, with two exceptions.

    `abort` and the publication of weights run beside other calls. In place of weights, the payload of a version is its
    number.
    """

    def __init__(
        self,
        name: str,
        duration: Callable[[str], float],
        crashes: Callable[[str], bool] = lambda method: False,
        group_bytes: int = 0,
        cores: Cores | None = None,
    ) -> None:
        """Begins with version 0.

        Args:
            name: the name of the stage.
            duration: returns for the name of a method the seconds that the next call of it takes. The name `restart`
                stands for the time of a restart.
            crashes: returns for the name of a method whether the process dies at the end of the next call of it.
            group_bytes: the size in bytes that the stage reports for each group that it generates.
            cores: the cores that the calls share with those of other stages. None: the stage has cores of its own.
        """
        self.name = name
        self._lock = asyncio.Lock()
        self._duration = duration
        self._crashes = crashes
        self.group_bytes = group_bytes
        self._cores = cores
        self._version = 0
        self.aborted: set[int] = set()
        self._abort_of: dict[int, asyncio.Event] = {}

    async def call(self, method: Method, *args: Any) -> tuple[Any, ...]:
        """Lets the time of the call pass, and returns a result of the right form.

        Raises StageLost if the process dies.
        """
        if method.name == "abort":
            await asyncio.sleep(self._duration("abort"))
            if self._crashes("abort"):
                raise StageLost(self.name, f"{self.name} is not there to abort")
            self.aborted.add(args[0])
            if generating := self._abort_of.get(args[0]):
                generating.set()
            return (None,)
        if method.beside == "weights":
            await self._work(self._duration(method.name), asyncio.Event())
            return self.result(method.name, args)
        async with self._lock:
            seconds = self._duration(method.name)
            if method.name == "generate":
                await self._generate(args[0].group_id, seconds)
            else:
                await self._work(seconds, asyncio.Event())
            if self._crashes(method.name):
                raise StageLost(self.name, f"{self.name} crashed in {method.name}")
            return self.result(method.name, args)

    async def _generate(self, group_id: int, seconds: float) -> None:
        """Returns after `seconds`, or as soon as the group is aborted. If it was aborted before, it returns at once."""
        if group_id in self.aborted:
            return
        self._abort_of[group_id] = asyncio.Event()
        try:
            await self._work(seconds, self._abort_of[group_id])
        finally:
            del self._abort_of[group_id]

    async def _work(self, seconds: float, ended: asyncio.Event) -> None:
        """Returns after as many seconds of work, or as soon as somebody sets the event."""
        if self._cores is None:
            timer = asyncio.get_running_loop().call_later(seconds, ended.set)
            end = timer.cancel
        else:
            end = self._cores.call_later(seconds, ended.set)
        try:
            await ended.wait()
        finally:
            end()

    async def restart(self) -> None:
        """Lets the time of a restart pass."""
        # No version: a restarted process must load weights before it generates.
        self._version = -1
        await asyncio.sleep(self._duration("restart"))

    async def pids(self) -> list[int]:
        """Returns an empty list, because there is no process."""
        return []

    def result(self, method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a call returns: a report and payloads without content. An aborted group has no responses."""
        if method == "load_weights":
            self._version = args[0]
        if method == "generate":
            ticket = args[0]
            aborted = ticket.group_id in self.aborted
            group_report = GroupReport(
                group_id=ticket.group_id,
                attempt=ticket.attempt,
                oldest_version=self._version,
                newest_version=self._version,
                num_responses=0 if aborted else 2,
                num_tokens=1,
                num_bytes=self.group_bytes,
            )
            return group_report, ticket.group_id, None
        if method == "get":
            return None, *args[0]
        step = args[0] if args and isinstance(args[0], int) else 0
        if method == "train":
            self._version = step + 1
        report = StepReport(version=step, metrics={})
        return {
            "weights": (report, self._version),
            "initial_head": (report, 0),
            "proximal": (report, None),
            "train": (report, None),
            "reread": (report, None),
            "embed_pairs": (report, None),
            "update": (report, step + 1),
            "score": (report, None),
            "embed": (report, None),
            "ask": (LabelReport(version=step, labels=(), records=[]),),
            "labels": (LabelReport(version=step, labels=(), records=[]), None),
            "load_weights": (report,),
        }.get(method, (None,))


def simulate(config: R2MConfig, times: StageTimes, seed: int = 0, cores: float | None = None) -> Prediction:
    """Simulates a whole run of a config on a virtual clock. Its evaluations are left out.

    Args:
        config: the config. Its queue never fills here (`plan_without_models`).
        times: how long the calls of the stages take.
        seed: the seed of the random times of `generate`, if these have a spread.
        cores: the number of cores that all stages share. None: each has cores of its own, or a GPU.

    Returns speed, idle shares and ages. Raises StalledRun if the ring would stand still.
    """
    config = config.evaluation(every=None)
    plan = plan_without_models(config)
    random_source = random.Random(seed)

    def duration(method: str) -> float:
        mean = getattr(times, "queue" if method in QUEUE_CALLS else method, 0.0)
        spread = times.generate_spread
        if method == "generate" and spread:
            # The first argument makes the mean of this distribution 1, whatever the spread.
            return mean * random_source.lognormvariate(-spread * spread / 2, spread)
        return mean

    names = [f"rollout-{index}" for index in range(config.rollouts.num_actors)]
    shared = None if cores is None else Cores(cores)

    def stage(name: str) -> SimulatedStage:
        return SimulatedStage(name, duration, cores=shared)

    stages = Stages.carried_by(
        rollouts=tuple(map(stage, names)),
        queue=stage("queue"),
        annotators=tuple(stage(f"annotator-{index}") for index in range(config.reward.replicas)),
        policy=stage("policy-learner"),
        head=stage("head-learner"),
        labels=stage("labeller") if config.labels.active else None,
        **local_bytes(),
    )
    results, schedule = run_virtually(config, plan, stages)
    steady = results[len(results) // 2 :]
    per_step = (results[-1]["time/since_start"] - results[0]["time/since_start"]) / max(1, len(results) - 1)
    idle = {key: _mean(steady, key) for key in steady[-1] if key.startswith("idle/")}
    return Prediction(
        seconds_per_step=per_step if len(results) > 1 else results[0]["time/since_start"],
        bound_seconds_per_step=physical_bound(config, times, cores),
        serial_seconds_per_step=serial_time(config, times),
        idle={key.removeprefix("idle/"): share for key, share in idle.items()},
        policy_age_mean=_mean(steady, "age/policy_mean"),
        policy_age_max=max(result["age/policy_max"] for result in results),
        head_age_max=max(result["age/head"] for result in results),
        discarded=schedule.voided_so_far().total() / (config.run.num_steps * config.rollouts.prompts_per_step),
    )


def run_virtually(config: R2MConfig, plan: Plan, stages: Stages) -> tuple[list[dict[str, float]], Schedule]:
    """Runs a whole run on a virtual clock.

    Args:
        config: the config of the run.
        plan: the settings of the schedule.
        stages: the stages, which must let time pass only by asyncio's timers.

    Returns the metrics of each step, and the schedule as it is at the end. Raises what the controller raises.
    """

    async def run() -> tuple[list[dict[str, float]], Schedule]:
        controller = Controller(config, plan, stages, simulated_ticket)
        await controller.start()
        results = []
        try:
            while not controller.finished:
                results.append(await controller.step())
                controller.take_trace()  # as a run does, or it would only grow
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
    """Returns a ticket for an admission, with the seed 0 and a prompt of one token."""
    prompt = Prompt(prompt_id="simulated", content="", text="", token_ids=(0,))
    return Ticket(
        group_id=admission.group_id, due_step=admission.due_step, seed=0, attempt=admission.attempt, prompt=prompt
    )


def plan_without_models(config: R2MConfig) -> Plan:
    """Returns the settings of the schedule for a config, with a queue that never fills.

    The size of a group follows from the hidden sizes of the models, and a simulation loads no models.
    """
    return Plan(
        num_steps=config.run.num_steps,
        groups_per_step=config.rollouts.prompts_per_step,
        max_policy_age=config.scheduling.max_policy_age,
        max_head_age=config.scheduling.max_head_age,
        lag=config.scheduling.lag,
        overage=config.scheduling.overage,
        overage_after=config.scheduling.overage_after,
        max_refills=config.rollouts.max_refills,
        max_bytes=1,
        group_bytes=0,
    )


QUEUE_CALLS = ("put", "get", "free")
"""The methods of the replay queue that take `StageTimes.queue`."""


def queue_time(config: R2MConfig, times: StageTimes) -> float:
    """The seconds per step of all calls of the replay queue."""
    groups = config.rollouts.prompts_per_step
    # Each group is put twice, for itself and for its embeddings. All of a step are got together, and freed.
    return times.queue * (2 * groups + 3 + config.wants_rollout_states)


def physical_bound(config: R2MConfig, times: StageTimes, cores: float | None = None) -> float:
    """The seconds per step that no schedule can undercut, because the busiest stage has so much work in each step.

    With B groups per step, they are the largest of five numbers:

    - B `generate` / rollout actors,
    - B `embed` / replicas + `score`,
    - `proximal` + `train`, and `weights` if the copy cannot overlap with the proximal pass,
    - `update`, and `labels` if there is a `labels.source`,
    - with `cores`, all of this and the calls of the queue, divided by their number.

    The time of `load_weights` is left out of the first, because the schedule decides how often an actor loads weights.
    """
    copying = 0.0 if config.publishes_beside_passes else times.weights
    groups = config.rollouts.prompts_per_step
    work = (
        groups * (times.generate + times.embed)
        + times.score
        + times.proximal
        + times.train
        + times.weights
        + times.update
        + queue_time(config, times)
    )
    return max(
        groups * times.generate / config.rollouts.num_actors,
        groups * times.embed / config.reward.replicas + times.score,
        times.proximal + times.train + copying,
        times.update + times.labels * config.labels.active,
        work / cores if cores else 0.0,
    )


def serial_time(config: R2MConfig, times: StageTimes) -> float:
    """The seconds per step if only one kind of stage works at a time, as in a synchronous schedule.

    They are the sum of all the work of a step. Rollout actors share the groups, and so do the replicas that embed.
    """
    groups = config.rollouts.prompts_per_step
    rollouts = -(-groups // config.rollouts.num_actors) * times.generate + times.load_weights
    annotation = groups * times.embed / config.reward.replicas + times.score
    labels = times.labels * config.labels.active
    learners = times.proximal + times.train + times.weights + times.update + labels
    return rollouts + annotation + learners + queue_time(config, times)


def times_of_run(intervals: list[dict[str, Any]]) -> StageTimes:
    """Returns the time of each method in the trace of a run: of a step the mean, and of all steps the median.

    So the first calls do not count, which waited for their processes to start. Calls of evaluations are left out.

    Args:
        intervals: the records of the run's trace.jsonl, which have the fields of `step_metrics.Interval`.

    A method that the trace does not have keeps the default of `StageTimes`.
    """
    known = {field.name for field in fields(StageTimes)}
    seconds: dict[str, dict[int, list[float]]] = {}
    for interval in intervals:
        if interval["method"] in known and interval["step"] >= 0:
            of_step = seconds.setdefault(interval["method"], {}).setdefault(interval["step"], [])
            of_step.append(interval["end"] - interval["start"])
    return replace(
        StageTimes(),
        **{method: statistics.median(map(statistics.fmean, steps.values())) for method, steps in seconds.items()},
    )


def _mean(results: list[dict[str, float]], key: str) -> float:
    """The mean of one metric over steps."""
    return sum(result[key] for result in results) / len(results)
