"""Handles the signals that ask the command line to leave (Ctrl-C, termination, hang-up).

After the first signal the command cleans up. If that takes longer than `LEAVE_TIMEOUT`, or if a second signal comes,
the process ends without it. So the process ends in time even if the clean-up hangs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

LEAVE_TIMEOUT = 20.0
"""Seconds for the clean-up after the first signal. A second signal ends the process at once."""
KILL_TIMEOUT = 3.0
"""Seconds for killing the processes of Ray, if the clean-up did not end in time."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_active = False


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to leave.

    `status` is the exit status with which it should leave: 128 plus the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.status = 128 + number

    def __reduce__(self) -> tuple[type, tuple[int]]:
        """Lets another process have the error, as in `errors.StageLost`."""
        return type(self), (self.status - 128,)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A context manager. In its block, the first signal raises `Interrupted` in the main thread.

    The clean-up is what then runs until the block is left. A signal that this process was started to ignore, as by
    nohup, stays ignored. Outside the main thread the context manager does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine, others = socket.socketpair()
    others.setblocking(False)
    # Python runs a signal handler only between two steps of the main thread, and the main thread may be in a call that
    # never returns. The number of the signal, however, is written to this socket at once. So the thread that reads the
    # socket can enforce the deadline.
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
        others.close()  # the thread then reads the end of the stream, and ends


def _forget_in_a_forked_child() -> None:
    """Gives a forked child its default signal handling back.

    The child has inherited the parent's socket. A signal to the child would be written to it, and the parent would take
    it for its own.
    """
    if _active:
        with contextlib.suppress(ValueError):  # raised outside the main thread, where there is nothing to reset
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_a_forked_child)


def _raise(number: int, _: object) -> None:
    """The signal handler."""
    raise Interrupted(number)


def _leave_in_time(signals: socket.socket) -> None:
    """Ends the process if the block is not left in time after the first signal. Runs in a thread of its own.

    Signal numbers arrive through the socket. Its end means that the block was left.
    """
    with signals:
        if not (first := _asked_to_leave(signals)):
            return
        signals.settimeout(LEAVE_TIMEOUT)
        try:
            if not _asked_to_leave(signals):
                return  # the block was left in time
        except TimeoutError:
            pass
        try:
            # `os.write` and no print: the main thread may hold the lock of stderr.
            os.write(2, f"r2m: interrupted by {signal.Signals(first).name}; its clean-up did not end\n".encode())
            if connection := sys.modules.get("r2m_async.launch.ray_connection"):
                ending = threading.Thread(target=connection.kill_processes, daemon=True)  # this may hang, too
                ending.start()
                ending.join(KILL_TIMEOUT)
        finally:
            os._exit(128 + first)


def _asked_to_leave(signals: socket.socket) -> int:
    """Waits for the next signal that asks to leave. Returns its number, or 0 if the other end was closed."""
    while received := signals.recv(1):
        if received[0] in _SIGNALS:
            return received[0]
    return 0
