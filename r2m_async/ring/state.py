"""What all loops of a ring share: its stages, its schedule, its clock, and the accounts of what is under way."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from r2m_async.config import R2MConfig
from r2m_async.ring.calls import Calls
from r2m_async.ring.progress import Progress
from r2m_async.ring.queue import Queue
from r2m_async.ring.stages import RolloutStage, Stages
from r2m_async.ring.step_metrics import StepMetrics
from r2m_async.ring.tasks import Tasks
from r2m_async.ring.versions import Versions
from r2m_async.ring.waiting import Waits
from r2m_async.schedule import Plan, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class RingState:
    """The state of one ring. Only its members change, and all of them on one event loop."""

    config: R2MConfig
    stages: Stages
    schedule: Schedule
    metrics: StepMetrics
    waits: Waits
    calls: Calls
    queue: Queue
    tasks: Tasks
    versions: Versions
    present: dict[str, RolloutStage] = field(default_factory=dict)
    """The rollout actors whose processes are there, by name."""

    @classmethod
    def of(cls, config: R2MConfig, plan: Plan, stages: Stages, progress: Progress) -> RingState:
        """The state of a ring that has come as far as `progress` says, and in which nothing runs yet.

        It must be made on the event loop of the ring. Raises ValueError if the counts of `progress` do not add up.
        """
        schedule, waits = Schedule(plan, progress.step), Waits()
        schedule.count_on(progress.trained, progress.voided, progress.reissued, progress.fenced)
        metrics = StepMetrics(stages, now(), progress)
        calls = Calls(waits, metrics, config.run.max_restarts)
        for annotator in stages.annotators:
            calls.restartable(annotator, "annotators")
        return cls(
            config=config,
            stages=stages,
            schedule=schedule,
            metrics=metrics,
            waits=waits,
            calls=calls,
            queue=Queue(stages.queue, calls, waits),
            tasks=Tasks(waits),
            versions=Versions(schedule),
        )


def now() -> float:
    """The time of the event loop's clock, in seconds."""
    return asyncio.get_running_loop().time()
