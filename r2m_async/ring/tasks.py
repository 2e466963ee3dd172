"""Runs the tasks of a ring, so that the first one that fails ends the run with its own error."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from r2m_async.errors import StageLost, StepFailed
from r2m_async.ring.waiting import Waits

T = TypeVar("T")

STOP_TIMEOUT = 5.0
"""Seconds that cancelled tasks have to end. A task that takes longer is left behind."""
DRIVER = "driver"
"""The name, in the list of waits, of whoever calls the controller: `start`, `step`, `drain` and `checkpoint`."""


class Tasks:
    """The tasks of one ring, and the driver, who waits for what they do. Call its methods on the event loop only."""

    def __init__(self, waits: Waits) -> None:
        """Begins without tasks. Every end of a task that the driver must hear of is a `notify` of `waits`."""
        self.error: BaseException | None = None
        """The error of the first task that failed."""
        self._waits = waits
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts a task whose failure ends the run: the driver raises the first error of all such tasks."""

        def ended(task: asyncio.Task[T]) -> None:
            self._running.discard(task)
            if not task.cancelled() and (error := task.exception()):
                self.error = self.error or error
                self._waits.notify()

        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(ended)
        return task

    async def finish(self, work: Coroutine[Any, Any, T], what: str) -> T:
        """Does work for the driver, and returns or raises what the work does.

        A stage that never answers would hide what goes wrong elsewhere. So if a task of `spawn` fails first, the work is
        cancelled, and the error of that task is raised.

        Args:
            work: the work.
            what: what the driver waits for meanwhile, in the list of waits.
        """
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._waits.notify())
        try:
            await self.until(task.done, what)
            if not task.done():
                self.raise_failure()
            return await task
        finally:
            task.cancel()

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        """Lets the driver wait until a condition holds or a task of `spawn` has failed, as in `Waits.until`."""
        await self._waits.until(lambda: condition() or self.error, DRIVER, what)

    def raise_failure(self) -> None:
        """Raises the error of the first task that failed, if one has failed."""
        if self.error:
            raise self.error

    async def stop(self) -> None:
        """Cancels all tasks of `spawn`, and with them the tasks within them.

        Returns within `STOP_TIMEOUT` seconds, even if a task does not end.
        """
        if self._running:
            for task in self._running:
                task.cancel()
            await asyncio.wait(self._running, timeout=STOP_TIMEOUT)


@contextlib.asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that raises the first error itself, and not an ExceptionGroup.

    The first error ends the block. Other errors are dropped: they come from what this end did to the other tasks.
    """
    first: Exception | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except ExceptionGroup as failed:
        first = errors_in(failed)[0]
    # Raised inside `except`, the error would get the ExceptionGroup as its context, in the place of its own.
    if first:
        raise first


def errors_in(group: ExceptionGroup) -> list[Exception]:
    """All errors in an ExceptionGroup and in the groups that it contains, in the order in which they arose."""
    return [
        leaf
        for error in group.exceptions
        for leaf in (errors_in(error) if isinstance(error, ExceptionGroup) else [error])
    ]


@contextlib.asynccontextmanager
async def in_step(step: int, group_ids: tuple[int, ...]) -> AsyncIterator[None]:
    """Adds step and groups to an error that is raised in the block, unless the error names its step already."""
    where = f"step {step} (groups {list(group_ids)})"
    try:
        yield
    except StageLost as lost:
        if str(lost).startswith("step "):
            raise
        raise StageLost(lost.stage, f"{where}: {lost}") from lost
    # The message of a StepFailed names the step already.
    except StepFailed:
        raise
    except Exception as error:
        if not any(note.startswith("In step ") for note in getattr(error, "__notes__", ())):
            error.add_note(f"In {where}.")
        raise
