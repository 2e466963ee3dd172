"""The results of commands, as one JSON document on standard output (`--json`)."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def only_to_stderr() -> Iterator[None]:
    """Sends what is written to standard output in the block to standard error, also what libraries and processes write."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def document(status: int, told: dict[str, Any] | str) -> str:
    """Returns the JSON document of a command: its exit status, and its result or the message that says why it failed.

    NaN and infinity are written as null.
    """
    from r2m_async.runs.records import finite_or_null

    what = {"error": told} if isinstance(told, str) else {"result": finite_or_null(told)}
    return json.dumps({"status": status, **what}, indent=1, allow_nan=False, default=str)


def results_in(out: Path) -> dict[str, Any]:
    """The result of a command that writes a folder with results.json: what is in it, and the folder under `directory`."""
    return {"directory": str(out), **json.loads((out / "results.json").read_text(encoding="utf-8"))}


def result_of_run(directory: Path) -> dict[str, Any]:
    """The result of a training run: its directory, the number of its steps, and the metrics of the last one."""
    from r2m_async.runs.records import read_metrics

    metrics = read_metrics(directory / "metrics.jsonl")
    return {"run_directory": str(directory), "steps": len(metrics), "metrics": metrics[-1] if metrics else {}}
