"""`r2m watch`: what a run is doing, from another terminal or another machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_watch(commands: Any) -> None:
    """Adds the command."""
    text = (
        "Show a run while another process drives it, from its directory: also on another machine that shares the disk."
    )
    watch = commands.add_parser("watch", help=text, description=text)
    watch.add_argument("run", metavar="RUN", type=Path, help="a run directory of `train`")
    watch.add_argument("--once", action="store_true", help="show it as it is now, and leave")
    watch.set_defaults(command=_watch)


def _watch(parsed: argparse.Namespace) -> dict[str, Any]:
    from r2m_async.runs.watching import watch

    last = watch(parsed.run, parsed.once)
    # Not `result_of_run`: the metrics of a long run take longer to read than anybody wants to wait for a look.
    return {"run_directory": str(parsed.run), "steps": int(last.get("step", 0)), "metrics": last}
