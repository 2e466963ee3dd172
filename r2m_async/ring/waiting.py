"""Keeps account of who waits for what in a ring, wakes those who wait, and notices when nothing moves any more.

Every wait of the controller goes through `Waits`, so every wait has a name while it lasts. `nothing_for` is one
deadline for all of them together.

Whoever waits for a condition asks for it again after a change. A ring has few loops but may have many rollout actors.
So there are two ways to wait. Loops wait in `until`, and every `notify` wakes all of them. Rollout actors all want the
next ticket, and stand in a line (`in_line`). A change wakes only the first in the line, and whoever leaves the line
wakes the next. So a change costs the same, however many actors there are.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

WORKING = "its end"
"""For what a call of a stage waits, in the words of the list of waits. What the call is about may follow a colon."""
_SLICES = 20
"""The number of parts into which `nothing_for` divides its time. It looks once after each part.

Parts are counted, and not the time of a clock. While this process itself is stopped, as on a suspended machine, no part
passes. So that pause is not taken for a ring that stands still.
"""


@dataclass(frozen=True, slots=True, eq=False)
class _Wait:
    """One wait: `who` waits for `what` since a time of the event loop's clock, in seconds.

    Two waits are never equal, even with the same names, so that a set can hold both.
    """

    who: str
    what: str
    since: float


class _Named:
    """A context manager that keeps a wait in the set of all waits during its block.

    It is a class and no generator under `contextlib`, because every call of a stage uses it and a class costs less.
    """

    __slots__ = ("_all", "_wait")

    def __init__(self, all_waits: set[_Wait], wait: _Wait) -> None:
        self._all, self._wait = all_waits, wait

    def __enter__(self) -> None:
        self._all.add(self._wait)

    def __exit__(self, *_: object) -> None:
        self._all.discard(self._wait)


class Waits:
    """The waits of one event loop. Call its methods on that loop only.

    In all methods `who` is the name of whoever waits, and `what` says for what, in the words of the list of waits.
    """

    def __init__(self) -> None:
        """Begins with nobody waiting."""
        self._waits: set[_Wait] = set()
        self._changed = asyncio.Event()
        """The event that the next `notify` sets."""
        self._line: OrderedDict[str, asyncio.Event] = OrderedDict()
        """For each who stands in the line, the event that wakes it. The first in the line comes first."""
        self._aside: dict[str, asyncio.Event] = {}
        """For each who waits aside, the event that wakes it."""
        self._num_ended = 0
        """How many pieces of work have ended so far."""

    def notify(self) -> None:
        """Says that something changed. It wakes all who wait in `until` or `change`, and the first in the line."""
        # A new event for those who wait from now on. They are not woken by a change that lies before their wait.
        event, self._changed = self._changed, asyncio.Event()
        event.set()
        self.next_in_line()

    def notify_all(self) -> None:
        """Says that something changed for everybody. It wakes all who wait, in the line and aside, too."""
        self.notify()
        for who in (*self._line, *self._aside):
            self.wake(who)

    def wake(self, who: str) -> None:
        """Says that something changed for `who`. It wakes nobody if `who` waits neither in the line nor aside."""
        for waiting in (self._line, self._aside):
            if who in waiting:
                waiting[who].set()

    def next_in_line(self) -> None:
        """Wakes the first in the line, who may find what the line waits for."""
        if self._line:
            next(iter(self._line.values())).set()

    def named(self, who: str, what: str) -> _Named:
        """Returns a context manager. During its block, the list of waits says that `who` waits for `what`.

        Several waits may have the same names at the same time.
        """
        return _Named(self._waits, _Wait(who, what, asyncio.get_running_loop().time()))

    async def until(self, condition: Callable[[], T | None], who: str, what: str) -> T:
        """Waits until a condition holds, and returns its value.

        Args:
            condition: is asked at once, and again after every `notify`. Its first true value ends the wait.
        """
        with self.named(who, what):
            # Nothing else runs between the question and the wait, so no change can be missed.
            while not (value := condition()):
                await self._changed.wait()
            return value

    async def change(self, who: str, what: str) -> None:
        """Waits for the next `notify`."""
        with self.named(who, what):
            await self._changed.wait()

    async def in_line(self, condition: Callable[[], T | None], who: str, what: str) -> T:
        """Waits as `until` does, for one of many who all wait for the same thing.

        Args:
            condition: is asked at once. It is asked again at a `notify` while `who` is the first in the line, when
                somebody leaves the line and `who` is then the first, at every `notify_all`, and at `wake`. It may take
                what it returns, for example a ticket.
        """
        return await self._asked_in(self._line, condition, who, what)

    async def aside(self, condition: Callable[[], T | None], who: str, what: str) -> T:
        """Waits as `until` does, for one of many who each wait for something of their own.

        Args:
            condition: is asked at once, and again at every `notify_all` and at `wake`.
        """
        return await self._asked_in(self._aside, condition, who, what)

    async def _asked_in(
        self, waiting: dict[str, asyncio.Event], condition: Callable[[], T | None], who: str, what: str
    ) -> T:
        """Waits in the line or aside, whichever `waiting` is."""
        assert who not in self._line and who not in self._aside, f"{who} waits twice"
        if value := condition():  # most of the time, and then nothing need be written down
            if waiting is self._line:
                self.next_in_line()
            return value
        with self.named(who, what):
            waiting[who] = event = asyncio.Event()
            try:
                while True:
                    await event.wait()
                    event.clear()
                    if value := condition():
                        return value
            finally:
                # Whoever leaves may have used up a wake-up: it was served, or it was cancelled after it was woken. So
                # the next in the line must ask. Else a ticket could lie there with nobody awake to take it.
                del waiting[who]
                if waiting is self._line:
                    self.next_in_line()

    async def work(self, awaitable: Awaitable[T], who: str, what: str) -> T:
        """Awaits something, and returns or raises what that does.

        Its end counts as work that has ended, also if it fails. So it puts off the end of `nothing_for`.
        """
        with self.named(who, what):
            try:
                return await awaitable
            finally:
                self._num_ended += 1

    async def nothing_for(self, seconds: float, who: str) -> None:
        """Returns when, for `seconds`, `who` was waiting and no work has ended. The time is exact to a twentieth."""
        quiet, ended = 0, self._num_ended
        while quiet < _SLICES:
            await asyncio.sleep(seconds / _SLICES)
            # A quiet ring is no error while `who` does not wait for it, for example while the driver is between steps.
            waits = any(wait.who == who for wait in self._waits)
            quiet = quiet + 1 if waits and ended == self._num_ended else 0
            ended = self._num_ended

    def entries(self) -> list[tuple[str, str, float]]:
        """Returns (who, what, seconds so far) of each wait. The one that has lasted longest comes first."""
        now = asyncio.get_running_loop().time()
        in_order = sorted(self._waits, key=lambda wait: (wait.since, wait.who, wait.what))
        return [(wait.who, wait.what, now - wait.since) for wait in in_order]

    def lines(self) -> list[str]:
        """Returns one line of text for each wait. The one that has lasted longest comes first."""
        return [f"{who} waits for {what} (since {seconds:.0f} s)" for who, what, seconds in self.entries()]
