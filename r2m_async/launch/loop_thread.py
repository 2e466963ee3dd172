"""An event loop in a thread of its own, and the caller's side of it, which notices when that thread stands still."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import traceback
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from r2m_async.errors import StalledRun

T = TypeVar("T")

_STOP_TIMEOUT = 5.0
_POLLS = 40
"""How often the caller looks, within its patience, whether the loop still turns; every second where that is more often."""


class LoopThread:
    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], patience: float) -> T:
        """What the coroutine returns or raises. The calling thread waits, and takes signals.

        Raises StalledRun, with what the thread is at, if the loop does not turn for `patience` seconds: some call blocks
        it, and no deadline inside of it can go off.
        """
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
                    quiet += 1  # polls, not seconds: none pass while this process itself is stopped
                if quiet * interval > patience:
                    raise StalledRun(f"the controller's thread has stood still for {patience:g} s:\n{self._stack()}")
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Ends the loop; a thread that stands still is left behind."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_TIMEOUT)
        if not self._thread.is_alive():
            self._loop.close()

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._thread.ident or 0)
        with contextlib.suppress(ValueError):  # it has gone on meanwhile
            return "".join(traceback.format_stack(frame)[-6:]).rstrip()
        return ""
