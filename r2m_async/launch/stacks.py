"""Shows what the processes of stages are doing, for the message of a ring that stands still.

py-spy reads the stack of a process from outside, also of one that is stopped, where the system allows it. Otherwise the
process is asked to write its stacks itself, by a signal. A process that is stopped cannot do that.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import psutil

ASK = signal.SIGUSR2
"""The signal at which a process writes its stacks."""
PATIENCE = 10.0
"""Seconds that one process may take."""
MAX_LINES = 40
"""The most lines that are shown of one process."""
_kept: list[IO[str]] = []
"""Files that must stay open as long as the process lives."""


_ANSWERS = "r2m-stacks"
"""What the files are called into which processes write their stacks."""


def can_be_asked() -> None:
    """Lets this process write its stacks when it gets the signal `ASK`."""
    # In memory, not on a disk: that may be full, and others may have a file of the name. It is gone with the process.
    _kept.append(os.fdopen(os.memfd_create(_ANSWERS), "w"))
    faulthandler.register(ASK, file=_kept[-1], all_threads=True)


def stack_of(pid: int) -> str:
    """Returns the stacks of a process on this machine as text, or why there are none. It returns in time."""
    try:
        process = psutil.Process(pid)
        state = process.status()
    except psutil.NoSuchProcess:
        return "the process is gone"
    told = "the process is stopped (SIGSTOP)\n" if state == psutil.STATUS_STOPPED else ""
    return told + _cut(_by_py_spy(pid) or _by_signal(pid, state))


def _by_py_spy(pid: int) -> str:
    """What py-spy says of a process. Empty if it is not installed, or may not read the process."""
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if spy is None:
        return ""
    try:
        command = [spy, "dump", "--nonblocking", "--pid", str(pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _by_signal(pid: int, state: str) -> str:
    """What a process writes of itself."""
    if state == psutil.STATUS_STOPPED:
        return "a stopped process cannot write its stacks, and py-spy may not read it"
    written = next((Path(f"/proc/{pid}/fd") / name for name in _open_files(pid)), None)
    if written is None:
        return "the process was not told to write its stacks"
    before = written.stat().st_size
    psutil.Process(pid).send_signal(ASK)
    deadline = time.monotonic() + PATIENCE
    size = before
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if size == (size := written.stat().st_size) and size > before:
            break
    return written.read_bytes()[before:].decode(errors="replace") or f"the process did not answer within {PATIENCE:g} s"


def _open_files(pid: int) -> list[str]:
    """The descriptors of a process that lead to the file of `can_be_asked`."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(link.readlink()).removesuffix(" (deleted)") == f"/memfd:{_ANSWERS}":
                found.append(link.name)
        except OSError:
            continue
    return found


def _cut(text: str) -> str:
    lines = text.strip().splitlines()
    return "\n".join([*lines[:MAX_LINES], *([f"... {len(lines) - MAX_LINES} lines more"] if lines[MAX_LINES:] else [])])
