"""Who waits for what in a ring, and since when; and the clock that ends a run in which nothing moves.

Every wait of the controller goes through `Waits`, so that each has a name while it lasts. `nothing_for` is the deadline
of all of them together.

A wait for a condition asks it again whenever something changed. The few loops of which a ring has one each do so at every
`notify`. Of the many rollout actors that would all ask for the same ticket, one does: they stand in a line (`in_line`), a
change wakes its first, and who got something wakes the next. So an event costs the same however many actors there are.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
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


class _Named:
    """A context manager; a class, because `contextlib` makes one of five times the cost, and every call has one."""

    __slots__ = ("_all", "_wait")

    def __init__(self, all_waits: set[_Wait], wait: _Wait) -> None:
        self._all, self._wait = all_waits, wait

    def __enter__(self) -> None:
        self._all.add(self._wait)

    def __exit__(self, *_: object) -> None:
        self._all.discard(self._wait)


class Waits:
    """The waits of one event loop. Times are the loop's, in seconds."""

    def __init__(self) -> None:
        self._waits: set[_Wait] = set()
        self._changed = asyncio.Event()
        self._line: OrderedDict[str, asyncio.Event] = OrderedDict()
        self._aside: dict[str, asyncio.Event] = {}
        self._num_ended = 0

    def notify(self) -> None:
        """Something changed: the few ask again, and the first in the line."""
        event, self._changed = self._changed, asyncio.Event()
        event.set()
        self.next_in_line()

    def notify_all(self) -> None:
        """Something changed for each actor by itself: all ask again."""
        self.notify()
        for who in (*self._line, *self._aside):
            self.wake(who)

    def wake(self, who: str) -> None:
        """Something changed for `who` alone, if that waits in the line or aside."""
        for waiting in (self._line, self._aside):
            if who in waiting:
                waiting[who].set()

    def next_in_line(self) -> None:
        """There may be more of what the last one in the line got."""
        if self._line:
            next(iter(self._line.values())).set()

    def named(self, who: str, what: str) -> _Named:
        """`with` it, `who` waits for `what` until the block ends. Several waits may have the same names at once."""
        return _Named(self._waits, _Wait(who, what, asyncio.get_running_loop().time()))

    async def until(self, condition: Callable[[], T | None], who: str, what: str) -> T:
        """The condition's first value that is not empty."""
        with self.named(who, what):
            while not (value := condition()):
                await self._changed.wait()
            return value

    async def change(self, who: str, what: str) -> None:
        """Returns at the next `notify`."""
        with self.named(who, what):
            await self._changed.wait()

    async def in_line(self, condition: Callable[[], T | None], who: str, what: str) -> T:
        """`until` for one of many that wait for the same: is asked in turn, and at `notify_all` and `wake`."""
        return await self._asked_in(self._line, condition, who, what)

    async def aside(self, condition: Callable[[], T | None], who: str, what: str) -> T:
        """`until` for one of many that wait for what is theirs alone: is asked at `notify_all` and `wake`."""
        return await self._asked_in(self._aside, condition, who, what)

    async def _asked_in(
        self, waiting: dict[str, asyncio.Event], condition: Callable[[], T | None], who: str, what: str
    ) -> T:
        assert who not in self._line and who not in self._aside, f"{who} waits twice"
        with self.named(who, what):
            waiting[who] = event = asyncio.Event()
            try:
                while not (value := condition()):
                    event.clear()
                    await event.wait()
                return value
            finally:
                # Whoever leaves takes its turn along: cancelled after it was woken, or served, the next must ask.
                del waiting[who]
                if waiting is self._line:
                    self.next_in_line()

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
