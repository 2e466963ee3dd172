"""Makes the calls of stages. Every call is a wait with a name, and most calls are recorded in the trace."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from r2m_async.errors import StageLost
from r2m_async.ring.stages import Call, Stage
from r2m_async.ring.step_metrics import StepMetrics
from r2m_async.ring.waiting import WORKING, Waits

R = TypeVar("R")


class Calls:
    """Makes the calls of stages for the controller.

    A call returns what the stage's method is declared to return. What it raises passes through unchanged. But a stage
    that keeps nothing between its calls is restarted if it is lost, and the call is made again.
    """

    def __init__(self, waits: Waits, metrics: StepMetrics, stateless: Sequence[Stage], max_restarts: int) -> None:
        """Begins with nothing under way.

        Args:
            waits: notes every call while it lasts.
            metrics: notes every traced call when it has ended.
            stateless: the stages that keep nothing between their calls.
            max_restarts: how many times in a row such a stage is restarted, without a call of it that ends in between.
        """
        self._waits, self._metrics = waits, metrics
        self._stateless = {stage.name: stage for stage in stateless}
        self._max_restarts = max_restarts
        self._deaths: Counter[str] = Counter()
        """For each of these stages, its deaths since a call of it ended."""
        self._restarts: Counter[str] = Counter()
        """For each of these stages, how often it was restarted in all."""
        self._restarting = asyncio.Lock()
        self.open: Counter[str] = Counter()
        """For each stage, how many of its calls have not ended."""

    async def ask(self, call: Call[R], about: str = "") -> R:
        """Makes a call and returns its answer.

        Args:
            call: the call, not yet begun.
            about: what the call is for, such as `group 12` or an engine's name, for the list of waits.
        """
        what = f"{WORKING}{about and ': '}{about}"
        while True:
            before = self._restarts[call.stage]
            self.open[call.stage] += 1
            try:
                answer = await self._waits.work(call, f"{call.stage} {call.method.name}", what)
            except StageLost as lost:
                if lost.stage != call.stage or call.stage not in self._stateless:
                    raise
                await self._bring_back(self._stateless[call.stage], before, lost)
            else:
                self._deaths[call.stage] = 0
                return answer
            finally:
                self.open[call.stage] -= 1

    async def _bring_back(self, stage: Stage, before: int, lost: StageLost) -> None:
        """Restarts a stage that was lost, once for all calls that its death has ended.

        Args:
            stage: the stage.
            before: how often it had been restarted when the call began that has failed.
            lost: why that call failed.

        Raises StageLost if the stage died more than `max_restarts` times in a row.
        """
        async with self._restarting:
            # The death of one process ends several calls. Only the first of them finds that nobody has restarted it.
            while self._restarts[stage.name] == before:
                self._deaths[stage.name] += 1
                if self._deaths[stage.name] > self._max_restarts:
                    raise lost
                try:
                    await self._waits.work(stage.restart(), stage.name, "its restart")
                except StageLost as again:
                    lost = again
                    continue
                self._restarts[stage.name] += 1
                self._metrics.standing["annotators"] = {"restarts/annotators": float(self._restarts.total())}

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
