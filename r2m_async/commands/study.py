"""`r2m study`: make the runs of a study, and compare them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from r2m_async.commands.arguments import directory
from r2m_async.commands.results import results_in
from r2m_async.standard_output import say


def add_study(commands: Any) -> None:
    """Adds the command."""
    text = "Run a grid of configs over seeds, as many at once as there are cores; tables and plots at matched KL."
    study = commands.add_parser("study", help=text, description=text)
    study.add_argument("study", metavar="STUDY", type=Path, help="a YAML file, see r2m_async/studies/study.py")
    study.add_argument(
        "out", metavar="OUT", type=directory, help="where runs and results go; what is there already is kept"
    )
    study.add_argument("--workers", type=int, metavar="N", help="runs at once (default: the number of cores)")
    study.set_defaults(command=_study)


def _study(parsed: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from r2m_async.studies.study import run_study

    failed = run_study(parsed.study, parsed.out, parsed.workers, say)
    for table in (parsed.out / "table.md", parsed.out / "reward_models" / "table.md"):
        if table.exists():
            print(table.read_text(encoding="utf-8"), end="")
    compared = results_in(parsed.out) if (parsed.out / "results.json").exists() else {"directory": str(parsed.out)}
    return (1 if failed else 0), compared | {"failed": failed}
