"""Signals that ask the command line to leave: it cleans up, and leaves in any case within `LEAVE_TIMEOUT`."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

LEAVE_TIMEOUT = 20.0
"""Seconds for the clean-up after the first signal. A second signal ends it at once."""
KILL_TIMEOUT = 3.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_active = False


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to leave. `status` is what it leaves with: 128 plus the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.status = 128 + number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the block the first signal raises `Interrupted` in the main thread.

    A signal that this process was started to ignore (nohup) stays ignored. In another thread the block does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine, others = socket.socketpair()
    others.setblocking(False)
    # Python runs a handler between two steps of the main thread, which may be inside of a call that never returns. The
    # number is written to this socket at once, and so the thread that reads it can enforce the deadline.
    global _active
    before_fd, _active = signal.set_wakeup_fd(others.fileno(), warn_on_full_buffer=False), True
    threading.Thread(target=_leave_in_time, args=(mine,), name="r2m-signals", daemon=True).start()
    before = {}
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_fd)
        _active = False
        others.close()  # which ends the thread


def _forget_in_a_forked_child() -> None:
    """It would write its own signals to this process's socket, whose reader takes them for this process's."""
    if _active:
        with contextlib.suppress(ValueError):  # not in the main thread: there is nothing to put back
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_a_forked_child)


def _raise(number: int, _: object) -> None:
    raise Interrupted(number)


def _leave_in_time(signals: socket.socket) -> None:
    with signals:
        if not (first := _asked_to_leave(signals)):
            return
        signals.settimeout(LEAVE_TIMEOUT)
        try:
            if not _asked_to_leave(signals):
                return  # the block was left
        except TimeoutError:
            pass
        try:
            os.write(2, f"r2m: interrupted by {signal.Signals(first).name}; its clean-up did not end\n".encode())
            if connection := sys.modules.get("r2m_async.launch.ray_connection"):
                ending = threading.Thread(target=connection.kill_processes, daemon=True)  # which may hang, too
                ending.start()
                ending.join(KILL_TIMEOUT)
        finally:
            os._exit(128 + first)


def _asked_to_leave(signals: socket.socket) -> int:
    """The number of the next signal that asks for it; 0 if the other end was closed."""
    while received := signals.recv(1):
        if received[0] in _SIGNALS:
            return received[0]
    return 0
