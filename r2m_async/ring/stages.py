"""What the controller sees of a stage: a name, calls that return `(report, *payloads)`, and a restart.

A stage is a plain class. Its methods take and return the types of `trajectories`; the report is small and reaches the
controller, the payloads are opaque to it: it hands them from one stage to the next, wherever they lie. `produces`
says how many payloads a method returns, because a remote call must know before it starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from r2m_async.codec import decode, encode

NODE_ADDRESS = "R2M_NODE_ADDRESS"
"""Environment variable of a stage's process: the address of its machine as the other stages' machines know it."""


def produces(num_payloads: int, shares: tuple[int, ...] = ()) -> Callable[[Callable], Callable]:
    """Marks a stage method: it returns `(report, *payloads)` with this many payloads.

    Of the payloads in `shares` each rank of a stage returns a part: None, or a tuple of what has a `group_id`.
    """

    def mark(method: Callable) -> Callable:
        method.num_payloads = num_payloads  # type: ignore[attr-defined]
        method.shares = shares  # type: ignore[attr-defined]
        return method

    return mark


class Stage(Protocol):
    name: str

    async def call(self, method: str, *args: Any) -> tuple[Any, ...]:
        """`(report, *payloads)`. Raises `StageLost` if the process died, else what the method raised."""

    async def restart(self) -> None:
        """Waits until a lost stage is there again, with fresh state. Raises `StageLost` if it never will be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The stages of one ring. Payloads are moved to and from bytes only for checkpoints."""

    rollouts: tuple[Stage, ...]
    queue: Stage
    annotators: tuple[Stage, ...]
    """Replicas of the frozen backbone; the first also scores."""
    policy: Stage
    head: Stage
    to_bytes: Callable[[Any], Awaitable[Any]]
    """A buffer of a payload."""
    from_bytes: Callable[[Any], Any]
    carrier: Callable[[], Coroutine[Any, Any, None]] = lambda: asyncio.sleep(0)
    """A loop that raises `StageLost` once what carries the stages' processes is gone."""


TURNS_TO_ARRIVE = 3
"""Turns of the event loop in which calls that one event set off have all been made."""


class LocalStage:
    """A stage in this process: each call runs to its end before anything else happens."""

    def __init__(self, name: str, stage: Any) -> None:
        self.name = name
        self._stage = stage

    async def call(self, method: str, *args: Any) -> tuple[Any, ...]:
        await asyncio.sleep(0)
        return getattr(self._stage, method)(*args)

    async def restart(self) -> None:
        raise RuntimeError(f"{self.name} runs in this process and cannot have died")


class LocalBatches(LocalStage):
    """A rollout actor in this process, whose calls of `generate` that wait at the same time are one batch."""

    def __init__(self, name: str, stage: Any) -> None:
        super().__init__(name, stage)
        self._waiting: list[tuple[Any, asyncio.Future]] = []

    async def call(self, method: str, *args: Any) -> tuple[Any, ...]:
        if method != "generate":
            return await super().call(method, *args)
        outcome: asyncio.Future = asyncio.get_running_loop().create_future()
        self._waiting.append((args[0], outcome))
        if len(self._waiting) == 1:
            await self._generate()
        return await outcome

    async def _generate(self) -> None:
        known = 0
        while known < len(self._waiting):  # until a turn of the loop brings no more
            known = len(self._waiting)
            for _ in range(TURNS_TO_ARRIVE):
                await asyncio.sleep(0)
        waiting, self._waiting = self._waiting, []
        try:
            results = self._stage.generate_batch([ticket for ticket, _ in waiting])
        except Exception as error:
            for _, outcome in waiting:
                outcome.set_exception(error)
            return
        for (_, outcome), result in zip(waiting, results, strict=True):
            outcome.set_result(result)


def local_bytes() -> dict[str, Callable]:
    """The `to_bytes` and `from_bytes` of stages in this process."""

    async def to_bytes(payload: Any) -> memoryview:
        return encode(payload)

    return {"to_bytes": to_bytes, "from_bytes": decode}
