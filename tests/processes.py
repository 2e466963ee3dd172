"""Waiting for processes: for their end, and for what they write into a pipe."""

import os
import select
import time


def left_of(processes, seconds: float = 30.0) -> list:
    """Those of psutil's processes that have not ended within so many seconds. Returns as soon as all have."""
    deadline, left = time.monotonic() + seconds, []
    for process in processes:
        try:
            descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            continue
        try:  # asked once the descriptor is there: another process may have had its number since
            if process.is_running() and not select.select([descriptor], [], [], max(0, deadline - time.monotonic()))[0]:
                left.append(process)
        finally:
            os.close(descriptor)
    return left


def word_of(pipe: int, seconds: float) -> str:
    """What processes write next into a pipe; nothing once all have closed it, or if that takes longer."""
    return os.read(pipe, 1 << 16).decode() if select.select([pipe], [], [], seconds)[0] else ""
