"""Arranges a trace for people: in which row a call is drawn, and which calls belong to the last steps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from r2m_async.runs.records import Records

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
