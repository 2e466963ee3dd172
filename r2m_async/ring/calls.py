"""Makes the calls of stages. Every call is a wait with a name, and most calls are recorded in the trace."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from r2m_async.ring.stages import Call
from r2m_async.ring.step_metrics import StepMetrics
from r2m_async.ring.waiting import Waits

R = TypeVar("R")


class Calls:
    """Makes the calls of stages for the controller.

    A call returns what the stage's method is declared to return. What it raises passes through unchanged.
    """

    def __init__(self, waits: Waits, metrics: StepMetrics) -> None:
        """Notes every call in `waits` while it lasts, and every traced call in `metrics` when it has ended."""
        self._waits, self._metrics = waits, metrics

    async def ask(self, call: Call[R], about: str = "") -> R:
        """Makes a call and returns its answer.

        Args:
            call: the call, not yet begun.
            about: what the call is for, such as `group 12` or an engine's name, for the list of waits.
        """
        what = f"its end{about and ': '}{about}"
        return await self._waits.work(call, f"{call.stage} {call.method.name}", what)

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
