"""Calls of stages as the controller makes them: each is a wait with a name, and most are an interval of the trace."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from r2m_async.ring.stages import Call
from r2m_async.ring.step_metrics import StepMetrics
from r2m_async.ring.waiting import Waits

R = TypeVar("R")


class Calls:
    """Makes calls. Their answers are what the stage's method is declared to return; what it raises passes through."""

    def __init__(self, waits: Waits, metrics: StepMetrics) -> None:
        self._waits, self._metrics = waits, metrics

    async def ask(self, call: Call[R], about: str = "") -> R:
        """`about` names the group or engine that the call is for, in the list of who waits for what."""
        what = f"its end{about and ': '}{about}"
        return await self._waits.work(call, f"{call.stage} {call.method.name}", what)

    async def traced(self, call: Call[R], *, step: int, about: str = "", beside: bool = False) -> R:
        """`ask`, and an interval of the trace; `beside` as in `StepMetrics.worked`."""
        loop = asyncio.get_running_loop()
        asked = loop.time()
        try:
            return await self.ask(call, about or f"step {step}")
        finally:
            self._metrics.worked(call.stage, call.method.name, step, asked, loop.time(), beside)
