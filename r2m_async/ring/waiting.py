"""Who waits for what in a ring, and since when; and the clock that ends a run in which nothing moves.

Every wait of the controller goes through `Waits`, so that each has a name while it lasts. A wait for a condition is
asked again whenever something changed (`notify`). `nothing_for` is the deadline of all of them together.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

_SLICES = 20
"""Parts of the deadline after which the clock looks. It counts parts, not hours: while the driver itself is stopped (a
suspended machine), no part passes, so its own sleep is not taken for the ring's."""


@dataclass(frozen=True, slots=True, eq=False)
class _Wait:
    who: str
    what: str
    since: float


class Waits:
    """The waits of one event loop. Times are the loop's, in seconds."""

    def __init__(self) -> None:
        self._waits: set[_Wait] = set()
        self._changed = asyncio.Event()
        self._num_ended = 0

    @property
    def changed(self) -> asyncio.Event:
        """Is set by the next `notify`, which then puts another event in its place."""
        return self._changed

    def notify(self) -> None:
        """Something changed: every condition is asked again."""
        event, self._changed = self._changed, asyncio.Event()
        event.set()

    @contextlib.contextmanager
    def named(self, who: str, what: str) -> Iterator[None]:
        """`who` waits for `what` until the block ends. Several waits may have the same names at once."""
        wait = _Wait(who, what, asyncio.get_running_loop().time())
        self._waits.add(wait)
        try:
            yield
        finally:
            self._waits.discard(wait)

    async def until(self, condition: Callable[[], T], who: str, what: str) -> T:
        """The condition's first value that is not empty."""
        with self.named(who, what):
            while not (value := condition()):
                await self._changed.wait()
            return value

    async def work(self, awaitable: Awaitable[T], who: str, what: str) -> T:
        """What the awaitable returns or raises. Its end, either way, counts as something that moved."""
        with self.named(who, what):
            try:
                return await awaitable
            finally:
                self._num_ended += 1

    async def nothing_for(self, seconds: float, who: str) -> None:
        """Returns once `who` has waited, and no work has ended, for this long: at most a twentieth longer."""
        quiet, ended = 0, self._num_ended
        while quiet < _SLICES:
            await asyncio.sleep(seconds / _SLICES)
            waits = any(wait.who == who for wait in self._waits)
            quiet = quiet + 1 if waits and ended == self._num_ended else 0
            ended = self._num_ended

    def lines(self) -> list[str]:
        """One line for each wait, the longest first."""
        now = asyncio.get_running_loop().time()
        return [
            f"{wait.who} waits for {wait.what} (since {now - wait.since:.0f} s)"
            for wait in sorted(self._waits, key=lambda wait: (wait.since, wait.who, wait.what))
        ]
