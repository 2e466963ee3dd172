"""status.json: what a run is doing now, for whoever looks at its directory. It is written anew every other second."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from r2m_async.errors import DataError
from r2m_async.ring.status import RingStatus
from r2m_async.runs.records import bytes_of
from r2m_async.whole import write_file

FILE = "status.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What a run is doing at one moment."""

    busy_with: str = ""
    """What the run does outside of its steps, such as building a model. Empty if there is nothing of the kind."""
    done: int = 0
    total: int = 0
    """The parts of that work. A total of 0: nobody knows."""
    seconds: float = 0.0
    """For how long this start of the run has gone on."""
    ring: RingStatus | None = None
    """What the ring does. None before it starts."""
    ended: str = ""
    """Empty while the run goes on. Then `finished`, or why it ended."""
    at: str = field(default_factory=_now)
    """When that was, in UTC."""
    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)
    """The machine and the process that drive the run."""


_STATUS = TypeAdapter(Status)


def write_status(run: Path, status: Status) -> None:
    """Writes the status of a run into its directory. Raises DiskError."""
    write_file(run / FILE, _STATUS.dump_json(status, ensure_ascii=True))


def read_status(run: Path) -> Status | None:
    """Returns the status in the directory of a run, or None if it has none. Raises DataError if it cannot be read."""
    try:
        return _STATUS.validate_json(bytes_of(run / FILE))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        why = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
        raise DataError(f"{run / FILE}: is no status of a run ({why}): remove it") from None
