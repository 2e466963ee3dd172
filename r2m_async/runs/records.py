"""Records on disk, a JSON object a line, and the columns of numbers in them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r2m_async.errors import DataError
from r2m_async.whole import append, disk_errors


def append_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Raises DiskError, and has then appended none."""
    append(path, jsonl(records))


def jsonl(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(finite_or_null(record), allow_nan=False) + "\n" for record in records)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, a partial last line left out. Raises `DataError` for any other bad line."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if not line.endswith("\n"):
                break
            raise DataError(f"{path}:{number}: is not JSON ({error.msg}): remove the line") from None
        records.append({key: math.nan if value is None else value for key, value in record.items()})
    return records


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl or evaluation.jsonl, by rising step.

    A resumed run repeats the steps after its checkpoint: the repetition replaces them and all that followed them.
    """
    metrics: list[dict[str, Any]] = []
    for record in read_records(path):
        while metrics and metrics[-1]["step"] >= record["step"]:
            metrics.pop()
        metrics.append(record)
    return metrics


def finite_or_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: finite_or_null(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite_or_null(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_partial_line(path: Path) -> None:
    """What a killed run left half written would spoil the next line. Makes the file if it is not there."""
    with disk_errors(path):
        path.touch()
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


Records = Sequence[Mapping[str, Any]]


NUM_KL_BINS = 12


def column(records: Records, key: str) -> np.ndarray:
    """One metric of all records, NaN where a record lacks it."""
    return np.array([record.get(key, np.nan) for record in records], dtype=float)


def samples_kl(records: Records) -> np.ndarray:
    """KL to the reference of the policies that sampled each step, to which its rewards belong.

    Of runs from before `kl/behaviour` was written it is pi_old's, the same where both staleness bounds are 0.
    """
    return np.array([record.get("kl/behaviour", record.get("kl/sequence", np.nan)) for record in records], dtype=float)


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of (x, y) curves at each x that all of them have; NaN where one of them is."""
    shared = sorted(set.intersection(*(set(x.tolist()) for x, _ in curves)))
    return np.array(shared), np.mean([y[np.isin(x, shared)] for x, y in curves], axis=0)


def binned(x: np.ndarray, y: np.ndarray, num_bins: int = NUM_KL_BINS) -> tuple[np.ndarray, np.ndarray]:
    """Means of x and of y over bins of equally many points by rising x; points with a NaN are left out."""
    known = np.isfinite(x) & np.isfinite(y)
    order = np.argsort(x[known], kind="stable")
    bins = np.array_split(order, min(num_bins, max(1, len(order))))
    if not len(order):
        return np.array([]), np.array([])
    return np.array([x[known][one].mean() for one in bins]), np.array([y[known][one].mean() for one in bins])
