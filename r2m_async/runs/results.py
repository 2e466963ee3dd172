"""Writes the results of a command, as results.json and as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r2m_async.runs.records import finite_or_null
from r2m_async.whole import disk_errors, write_file


def write_results(out: Path, results: Mapping[str, Any], table: str) -> None:
    """Writes `out`/table.md and `out`/results.json. The directory is made if it is not there. Raises DiskError.

    results: values by name; NaN and infinity are written as null. table: the text of table.md.
    """
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    # results.json comes last, so that a directory which has it is complete.
    write_file(out / "table.md", table)
    write_file(out / "results.json", json.dumps(finite_or_null(results), indent=1, allow_nan=False) + "\n")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a Markdown table. head: the column headings. rows: the cells of each row, one for each heading."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
