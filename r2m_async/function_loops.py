"""Event loops on which functions of the user run, each in a thread that runs as long as the process."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from r2m_async.cpu_threads import share_threads

T = TypeVar("T")


def turning_loop(name: str) -> asyncio.AbstractEventLoop:
    """Returns an event loop that runs in a new thread of this name. The thread does not keep the process from ending."""
    loop = asyncio.new_event_loop()

    def turn() -> None:
        share_threads()
        # A model that a function runs would else keep its graph, as if it were trained.
        torch.set_grad_enabled(False)
        loop.run_forever()

    threading.Thread(target=turn, name=name, daemon=True).start()
    return loop


class OncePerProcess(Generic[T]):
    """Calls a function once in each process that asks, and returns what it made.

    A process that was forked has no threads of its parent. So it must not take what its parent made.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        """make: makes the thing. It is called when a process first asks."""
        self._make = make
        self._made: tuple[int, T] | None = None
        """The process that made the thing, and the thing."""
        self._lock = threading.Lock()

    def __call__(self) -> T:
        """Returns the thing of this process."""
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = os.getpid(), self._make()
            return self._made[1]
