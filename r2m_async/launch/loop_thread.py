"""Runs an event loop in a thread of its own. Whoever waits for it notices when that thread stands still."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import traceback
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from r2m_async.cpu_threads import share_threads
from r2m_async.errors import StalledRun

T = TypeVar("T")

_STOP_TIMEOUT = 5.0
"""Seconds that the thread has to end."""
_POLLS = 40
"""How often `run` looks, within its `patience`, whether the loop still turns. It looks at least once a second."""


class LoopThread:
    """An event loop that runs in a thread of its own."""

    def __init__(self, name: str) -> None:
        """Starts the thread. `name` is the name of the thread."""
        self._loop = asyncio.new_event_loop()
        # A daemon: a thread that stands still must not keep Python from ending.
        self._thread = threading.Thread(target=self._turn, name=name, daemon=True)
        self._ended_by: BaseException | None = None
        self._thread.start()

    def _turn(self) -> None:
        share_threads()
        try:
            self._loop.run_forever()
        except BaseException as error:  # of a task, SystemExit and KeyboardInterrupt pass through the loop and end it
            self._ended_by = error

    def run(self, coroutine: Coroutine[Any, Any, T], patience: float) -> T:
        """Runs a coroutine on the loop, and returns or raises what it does.

        The calling thread waits meanwhile, and can take signals.

        Args:
            coroutine: the coroutine. It is cancelled if the caller is interrupted.
            patience: how many seconds the loop may stand still.

        Raises StalledRun, with the stack of the thread, if the loop stands still for longer. Then some call blocks the
        thread, and no deadline on the loop can end it. Raises StalledRun at once if the thread has ended.
        """
        if not self._thread.is_alive():
            coroutine.close()  # nobody will ever await it
            raise self._ended()
        future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        interval = min(1.0, patience / _POLLS)
        turned, quiet = threading.Event(), 0
        self._loop.call_soon_threadsafe(turned.set)
        try:
            while not wait([future], interval).done:
                if turned.is_set():
                    turned, quiet = threading.Event(), 0
                    self._loop.call_soon_threadsafe(turned.set)
                else:
                    # Looks are counted, and not seconds: while this process itself is stopped, no look passes.
                    quiet += 1
                if not self._thread.is_alive():
                    raise self._ended()
                if quiet * interval > patience:
                    raise StalledRun(f"the controller's thread has stood still for {patience:g} s:\n{self._stack()}")
            return future.result()
        except BaseException:
            # Without this, the coroutine would go on although nobody waits for it, for example after Ctrl-C.
            future.cancel()
            raise

    def stop(self) -> None:
        """Ends the loop and its thread. A thread that does not end within 5 seconds is left behind."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_TIMEOUT)
        if not self._thread.is_alive():
            self._loop.close()

    def _ended(self) -> StalledRun:
        error = StalledRun(f"the controller's thread was ended by {self._ended_by!r}")
        error.__cause__ = self._ended_by
        return error

    def _stack(self) -> str:
        """The last six calls in the stack of the thread, as text. It is empty if the thread went on meanwhile."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        if frame is None:  # of no thread: `format_stack` would take the caller's
            return ""
        with contextlib.suppress(ValueError):
            return "".join(traceback.format_stack(frame)[-6:]).rstrip()
        return ""
