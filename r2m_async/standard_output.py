"""Standard output that cannot be written: whoever reads it has left, its disk is full, or it was closed from the start.

A run of days does not end because nobody reads its lines any more: `say`. A command whose lines are its result does:
`lost_output`.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO

_OF_WRITING = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def say(line: str) -> None:
    """Prints a line of progress. If it cannot be written, this and all further lines are dropped, and that is told once."""
    try:
        print(line, flush=True)
    except OSError as error:
        _lead_nowhere()
        _tell(f"r2m: standard output cannot be written ({error.strerror}): the command goes on without it")


def can_be_redrawn(file: TextIO) -> bool:
    """Whether a file is a terminal on which lines can be drawn anew.

    rich takes whatever it is told to colour (FORCE_COLOR) for a terminal, as in the log of a CI. On a terminal that cannot
    move its cursor (TERM=dumb) it would show nothing until the end.
    """
    return file.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def lost_output(raised: OSError | None = None) -> OSError | None:
    """Writes out what was printed so far, and returns the error if it cannot be written. From then on nothing is.

    raised: an error that may be one of standard output: it is, if one more line end cannot be written, either.
    """
    try:
        sys.stdout.flush()
        # Without a buffer (PYTHONUNBUFFERED) what was printed is lost, and there is nothing to flush.
        if raised is not None and raised.filename is None and raised.errno in _OF_WRITING:
            os.write(sys.stdout.fileno(), b"\n")
    except OSError as error:
        _lead_nowhere()
        return error
    return None


def open_what_is_closed() -> None:
    """Opens standard input, output and error where this process was started without them, and makes every text printable.

    Else the next file that is opened would get the number of one of them, and what libraries print would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it takes the lowest number that is free
    # Python has nothing in the place of a file that was closed.
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
    # What a model wrote may have letters that the terminal's encoding lacks, and halves of characters.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _lead_nowhere() -> None:
    """Lets standard output lead nowhere. Else Python would fail once more at its end, and leave with a status of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _tell(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass  # both led to the same place
