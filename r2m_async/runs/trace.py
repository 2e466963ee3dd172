"""Arranges a trace for people: in which row a call is drawn, which calls belong to the last steps, and trace.json.

trace.json has the same calls in the Trace Event Format, which https://ui.perfetto.dev and chrome://tracing open:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2m_async.runs.records import Records
from r2m_async.whole import write_file

MAX_EVENTS = 100_000
"""The most calls in trace.json, the last ones of a run: some 15 MB."""

METHODS = ("generate", "embed", "proximal", "score", "train", "weights", "update", "evaluate")
"""The methods of the stages, in the order in which a step passes through them."""


def row_of(interval: Mapping[str, Any]) -> tuple[int, tuple[int, ...], str]:
    """Returns the row of an interval, as a key by which rows are sorted: place of the method, numbers, name.

    A rollout actor has one row for all that it does. Every other stage has one row for each of its methods.
    """
    stage, method = interval["stage"], interval["method"]
    if stage.startswith("rollout"):
        method, name = METHODS[0], stage
    else:
        name = f"{stage}: {method}"
    place = METHODS.index(method) if method in METHODS else len(METHODS)
    return place, tuple(map(int, re.findall(r"\d+", stage))), name


def belongs_to_a_step(interval: Mapping[str, Any]) -> bool:
    """Returns whether the work of an interval belongs to one policy step."""
    return interval["method"] != "load_weights" and interval["step"] >= 0


def last_steps(trace: Records, num_steps: int) -> tuple[float, float, list[Mapping[str, Any]]]:
    """Returns (start, end, intervals) of the last policy steps: in seconds, and all intervals that lie between.

    trace: records of trace.jsonl, at least one of which is a `train`. num_steps: at most so many steps.
    """
    trained = sorted(interval["end"] for interval in trace if interval["method"] == "train")
    first = min(interval["start"] for interval in trace)
    # The time ends with the last `train`, and begins with the end of the one before the first of these steps.
    start, end = (trained[-num_steps - 1] if len(trained) > num_steps else first), trained[-1]
    return start, end, [interval for interval in trace if interval["end"] > start and interval["start"] < end]


def _in_lanes(intervals: Records) -> list[tuple[Mapping[str, Any], int, int, tuple[Any, ...]]]:
    """Returns (interval, start, end, row with its lane) of each interval: whole microseconds, and `row_of` with a number.

    The format lets the calls of a row nest and not overlap, and Perfetto leaves out one that does. A stage that works at
    several calls at a time has so many lanes.
    """
    placed = []
    ends: dict[tuple[Any, ...], list[int]] = {}
    for interval in sorted(intervals, key=lambda one: one["start"]):
        # Whole numbers: rounded apart, a start and a duration could end after the next start.
        start, end = round(interval["start"] * 1e6), round(interval["end"] * 1e6)
        row = row_of(interval)
        lanes = ends.setdefault(row, [])
        lane = next((number for number, until in enumerate(lanes) if until <= start), len(lanes))
        lanes[lane : lane + 1] = [end]
        placed.append((interval, start, end, (*row, lane)))
    return placed


def write_trace_events(trace: Records, path: Path) -> None:
    """Writes the last `MAX_EVENTS` calls of a trace for Perfetto. trace: records of trace.jsonl. Raises DiskError."""
    shown = trace[-MAX_EVENTS:]
    placed = _in_lanes(shown)
    rows = {row: number for number, row in enumerate(sorted({row for *_, row in placed}), 1)}
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "ring"}}]
    for (*_, name, lane), number in rows.items():
        named = {"ph": "M", "pid": 1, "tid": number}
        events.append(named | {"name": "thread_name", "args": {"name": f"{name} ({lane + 1})" if lane else name}})
        events.append(named | {"name": "thread_sort_index", "args": {"sort_index": number}})
    for interval, start, end, row in placed:
        step = interval["step"]
        events.append(
            {
                "ph": "X",  # a whole call: its start and its duration, both in microseconds
                "name": f"{interval['method']} {step}" if step >= 0 else f"{interval['method']} (evaluation)",
                "cat": interval["method"],
                "ts": start,
                "dur": end - start,
                "pid": 1,
                "tid": rows[row],
                "args": {"step": step, "stage": interval["stage"]},
            }
        )
    content = {"displayTimeUnit": "ms", "otherData": {"calls left out": len(trace) - len(shown)}, "traceEvents": events}
    write_file(path, json.dumps(content, allow_nan=False))
