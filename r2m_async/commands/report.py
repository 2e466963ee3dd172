"""`r2m report`: one HTML file that shows a run, or compares several."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_report(commands: Any) -> None:
    """Adds the command."""
    text = (
        "Write one HTML file with the curves, the answers and the config of a run, or of several compared. No network."
    )
    report = commands.add_parser("report", help=text, description=text)
    report.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directories of `train`, finished or not")
    text = "the file to write (default: report.html, of one run in its directory)"
    report.add_argument("--out", metavar="FILE", type=Path, help=text)
    report.set_defaults(command=_report)


def _report(parsed: argparse.Namespace) -> dict[str, Any]:
    from r2m_async.runs.report import write_report

    out = parsed.out or (parsed.runs[0] / "report.html" if len(parsed.runs) == 1 else Path("report.html"))
    write_report(parsed.runs, out)
    print(f"report: {out}")
    return {"report": str(out)}
