"""The results of a command: results.json, and a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r2m_async.runs.records import finite_or_null
from r2m_async.whole import disk_errors, write_file


def write_results(out: Path, results: Mapping[str, Any], table: str) -> None:
    """OUT/results.json and OUT/table.md. results.json comes last: where it is, all is. Raises DiskError."""
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_file(out / "table.md", table)
    write_file(out / "results.json", json.dumps(finite_or_null(results), indent=1, allow_nan=False) + "\n")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
