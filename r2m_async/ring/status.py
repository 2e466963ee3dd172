"""Says what a ring is doing at one moment: which stage is at work on what and for how long, and what is full."""

from __future__ import annotations

from dataclasses import dataclass

from r2m_async.ring.state import RingState
from r2m_async.ring.tasks import DRIVER
from r2m_async.ring.waiting import WORKING


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """What one stage does."""

    name: str
    does: str
    """The call that it has been at for longest, or what it waits for."""
    working: bool
    """Whether it is at work. If not, it waits."""
    seconds: float
    """For how long it has done that. 0 if nothing is known of it."""
    others: int = 0
    """How many further calls it has open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingStatus:
    """What a ring does at one moment."""

    step: int
    """The policy steps taken."""
    stages: tuple[StageStatus, ...]
    """All stages: rollout actors, annotators, policy learner, head learner, queue."""
    driver: str
    """What whoever runs the ring waits for, such as a step or a checkpoint. Empty if it does not wait."""
    driver_seconds: float
    """For how long it has waited."""
    actors: int
    """The rollout actors whose processes are there."""
    groups_in_flight: int
    """Groups that were admitted and have not arrived."""
    queue_bytes: int
    """Bytes that are reserved in the queue."""
    evaluating: int | None = None
    """The policy version whose evaluation is under way."""
    answered: int = 0
    """The held-out prompts that are answered in it."""
    to_answer: int = 0
    """The held-out prompts of an evaluation."""


def status_of(state: RingState) -> RingStatus:
    """Returns what a ring does now. It must be called on the ring's event loop."""
    stages = state.stages
    each = (*stages.rollouts, *stages.annotators, stages.policy, stages.head, stages.queue)
    names = [stage.name for stage in each]
    working: dict[str, list[tuple[str, float]]] = {}
    waiting: dict[str, tuple[str, float]] = {}
    for who, what, seconds in state.waits.entries():  # the longest first
        stage, _, method = who.partition(" ")
        if method and stage in names:
            about = what.removeprefix(WORKING).removeprefix(": ")
            working.setdefault(stage, []).append((f"{method}: {about}" if about else method, seconds))
        else:
            waiting.setdefault(who.replace(" ", "-"), (f"waits for {what}", seconds))

    def status(name: str) -> StageStatus:
        if name in working:
            (does, seconds), *others = working[name]
            return StageStatus(name=name, does=does, working=True, seconds=seconds, others=len(others))
        does, seconds = waiting.get(name, ("has no work", 0.0))
        return StageStatus(name=name, does=does, working=False, seconds=seconds)

    driver, since = waiting.get(DRIVER, ("", 0.0))
    return RingStatus(
        step=state.schedule.policy_version,
        stages=tuple(map(status, names)),
        driver=driver.removeprefix("waits for "),
        driver_seconds=since,
        actors=len(state.present),
        groups_in_flight=len(state.schedule.in_flight()),
        queue_bytes=state.schedule.reserved_bytes,
    )
