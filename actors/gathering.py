"""Joins calls that several threads make into calls for all of them at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from itertools import islice
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Gathered(Generic[Item, Result]):
    """A function of one item that threads call, over a function of many items.

    The items that arrive while a batch is computed become the next batch. One of the threads that wait computes it, so
    there is no further thread, and what fails is raised where it was asked for.
    """

    def __init__(
        self,
        together: Callable[[list[Item]], list[Result]],
        at_once: int,
        patience: float = 0.0,
        instead: Callable[[Item], Result | None] = lambda _: None,
    ) -> None:
        """Begins with nothing under way.

        Args:
            together: computes the results of several items, in their order. It runs in one thread at a time.
            at_once: the most items of a batch.
            patience: a batch that is not full begins when no item has come for this many seconds.
            instead: is asked about items that wait. What it returns is the result at once, unless it is None.
        """
        self._together, self._at_once, self._patience, self._instead = together, at_once, patience, instead
        self._changed = threading.Condition()
        """Guards the two fields below, and is notified when they change."""
        self._line: dict[Future[Result], Item] = {}
        """The items that no batch has taken, by what their callers wait for."""
        self._busy = False
        """Whether a thread has a batch to compute."""

    def __call__(self, item: Item) -> Result:
        """Returns the result of an item, or raises what the batch raised that it was in."""
        outcome: Future[Result] = Future()
        with self._changed:
            self._line[outcome] = item
            self._changed.notify_all()
        while batch := self._next(outcome):
            self._compute(batch)
        return outcome.result()

    def look(self) -> None:
        """Has `instead` asked again about all items that wait."""
        with self._changed:
            self._changed.notify_all()

    def _next(self, outcome: Future[Result]) -> dict[Future[Result], Item]:
        """Waits until the item of this outcome has left the line, and returns nothing, or until it is this thread that
        computes the next batch, and returns the batch."""
        with self._changed:
            while outcome in self._line:
                if (result := self._instead(self._line[outcome])) is not None:
                    del self._line[outcome]
                    outcome.set_result(result)
                elif self._busy:
                    self._changed.wait()
                else:
                    self._busy = True
                    while len(self._line) < self._at_once and self._changed.wait(self._patience):
                        pass
                    batch = dict(islice(self._line.items(), self._at_once))
                    for taken in batch:
                        del self._line[taken]
                    return batch
            return {}

    def _compute(self, batch: dict[Future[Result], Item]) -> None:
        """Computes a batch, and tells its callers."""
        try:
            results = self._together(list(batch.values()))
            for outcome, result in zip(batch, results, strict=True):
                outcome.set_result(result)
        except BaseException as error:
            # All callers must get it. A caller that got nothing would wait for ever.
            for outcome in batch:
                if not outcome.done():
                    outcome.set_exception(error)
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
