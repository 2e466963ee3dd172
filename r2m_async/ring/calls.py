"""Makes the calls of stages. Every call is a wait with a name, and most calls are recorded in the trace."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from r2m_async.errors import StageLost
from r2m_async.ring.stages import Call, Stage
from r2m_async.ring.step_metrics import StepMetrics
from r2m_async.ring.waiting import WORKING, Waits

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _Restartable:
    """A stage that comes back by itself if its process is lost."""

    stage: Stage
    kind: str
    """Under which name its restarts are counted (`restarts/...`)."""
    restore: Callable[[], Awaitable[None]]
    """Gives the new process what the old one held."""
    lock: asyncio.Lock
    """Held by whoever brings the stage back."""


async def _nothing() -> None:
    """The `restore` of a stage that keeps nothing between its calls."""


class Calls:
    """Makes the calls of stages for the controller.

    A call returns what the stage's method is declared to return. What it raises passes through unchanged. But if a stage
    of `restartable` is lost, it is restarted, and the call is made again.
    """

    def __init__(self, waits: Waits, metrics: StepMetrics, max_restarts: int) -> None:
        """Begins with nothing under way, and with no stage that is restarted.

        Args:
            waits: notes every call while it lasts.
            metrics: notes every traced call when it has ended.
            max_restarts: how many times in a row a stage is restarted, without a call of it that ends in between, and how
                many times it is restarted for one and the same call.
        """
        self._waits, self._metrics = waits, metrics
        self._restartable: dict[str, _Restartable] = {}
        self._max_restarts = max_restarts
        self._lost: dict[str, StageLost] = {}
        """Those of these stages that are lost and not back yet, with the reason."""
        self._deaths: Counter[str] = Counter()
        """For each of these stages, its deaths since a call of it ended."""
        self._restarts: Counter[str] = Counter()
        """For each of these stages, how often it was restarted in all."""
        self.open: Counter[str] = Counter()
        """For each stage, how many of its calls have not ended."""

    def restartable(self, stage: Stage, kind: str, restore: Callable[[], Awaitable[None]] = _nothing) -> None:
        """Says that a stage is to be restarted if it is lost. Until it is restored, no other call reaches it.

        Args:
            stage: the stage.
            kind: under which name its restarts are counted (`restarts/...`).
            restore: gives the new process what the old one held. It may call the stage, but not with `ask`. It raises
                StageLost if the new process dies as well. It may be cancelled, and is then called for another new process.
        """
        self._restartable[stage.name] = _Restartable(stage, kind, restore, asyncio.Lock())

    async def ask(self, call: Call[R], about: str = "") -> R:
        """Makes a call and returns its answer.

        Args:
            call: the call, not yet begun.
            about: what the call is for, such as `group 12` or an engine's name, for the list of waits.
        """
        what, name, deaths = f"{WORKING}{about and ': '}{about}", call.stage, 0
        while True:
            # Asked again after every wait: it may have been lost once more, and a new process may not be restored yet.
            while name in self._lost:
                await self._bring_back(self._restartable[name])
            before = self._restarts[name]
            self.open[name] += 1
            try:
                answer = await self._waits.work(call, f"{name} {call.method.name}", what)
            except StageLost as lost:
                deaths += 1
                # Other calls may end well in between. So a call that kills its stage each time is counted by itself.
                if lost.stage != name or name not in self._restartable or deaths > self._max_restarts:
                    raise
                # The death of one process ends several calls, and the last may hear of it when the stage is back.
                if self._restarts[name] == before:
                    self._lost.setdefault(name, lost)
            else:
                self._deaths[name] = 0
                return answer
            finally:
                self.open[name] -= 1

    async def _bring_back(self, back: _Restartable) -> None:
        """Restarts and restores a stage that is lost, once for all calls that its death has ended.

        If this is cancelled on the way, the stage stays lost, and whoever calls it next begins again.

        Raises StageLost if the stage died more than `max_restarts` times in a row.
        """
        name = back.stage.name
        async with back.lock:
            while lost := self._lost.get(name):
                self._deaths[name] += 1
                if self._deaths[name] > self._max_restarts:
                    raise lost
                try:
                    await self._waits.work(back.stage.restart(), name, "its restart")
                    await back.restore()
                except StageLost as again:
                    self._lost[name] = again
                    continue
                del self._lost[name]
                self._restarts[name] += 1
                kinds = Counter[str]()
                for one in self._restartable.values():
                    kinds[one.kind] += self._restarts[one.stage.name]
                self._metrics.standing["restarts"] = {
                    f"restarts/{kind}": float(num) for kind, num in kinds.items() if num
                }

    async def traced(self, call: Call[R], *, step: int, about: str = "", beside: bool = False) -> R:
        """Makes a call as `ask` does, and records it in the trace, also if it fails.

        Args:
            call: the call, not yet begun.
            step: the policy step or the policy version that the call is for, or -1 for an evaluation.
            about: what the call is for, in the list of waits. Without it the step is named.
            beside: True if the stage may do other work at the same time (`StepMetrics.worked`).
        """
        loop = asyncio.get_running_loop()
        asked = loop.time()
        try:
            return await self.ask(call, about or f"step {step}")
        finally:
            self._metrics.worked(call.stage, call.method.name, step, asked, loop.time(), beside)
