"""Writes and reads records, one JSON object per line, and takes columns of numbers from them.

JSON has no NaN and no infinity. Both are written as null, and null is read back as NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from r2m_async.config import REWARD_METRICS
from r2m_async.errors import DataError
from r2m_async.whole import append_lines


def append_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Appends records to a file, which is made if it is not there. Raises DiskError, and has then appended none."""
    append_lines(path, jsonl(records))


def jsonl(records: Iterable[dict[str, Any]]) -> str:
    """Returns records as text, one JSON object per line."""
    return "".join(json.dumps(finite_or_null(record), allow_nan=False) + "\n" for record in records)


def read_records(
    path: Path, needed: Mapping[str, type] | None = None, only_numbers: bool = False
) -> list[dict[str, Any]]:
    """Returns the records of a JSONL file. A last line without a line end is left out if it is not JSON.

    Args:
        path: the file.
        needed: the type of each key that every record must have. A number must be finite if it is needed.
        only_numbers: whether all other values are numbers, too.

    Raises DataError, which names the line, for any other line that is not a JSON object with these keys, and for a file
    that is there and cannot be read.
    """
    return records_in(bytes_of(path), str(path), needed or {}, only_numbers)


def bytes_of(path: Path, start: int = 0) -> bytes:
    """Returns the content of a file from a byte on. Raises DataError if it is there and cannot be read, and else OSError."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; permit it, or look at its disk") from None


def records_in(data: bytes, name: str, needed: Mapping[str, type], only_numbers: bool = False) -> list[dict[str, Any]]:
    """Returns the records in the text of a JSONL file, as `read_records` does. name: of the file, for messages."""
    records = []
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            if not line.endswith(b"\n"):
                break  # the run is writing this line, or was killed while it did
            why = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"{name}:{number}: is not JSON ({why}): remove the line") from None
        if not isinstance(record, dict):
            shown = line.strip()[:60].decode(errors="replace")
            raise DataError(f"{name}:{number}: holds {shown!r}, not an object of metrics: remove the line")
        for key, kind in needed.items():
            value = record.get(key)
            if (
                not isinstance(value, kind)
                or isinstance(value, bool)
                or value in (math.inf, -math.inf)
                or value != value
            ):
                raise DataError(f"{name}:{number}: has {value!r} as {key!r}: it was changed after it was written")
        for key, value in record.items() if only_numbers else ():
            if not isinstance(value, Real) and value is not None:
                shown = str(value)[:60]
                raise DataError(f"{name}:{number}: has {shown!r} as {key!r}, which is no number: remove the line")
        records.append({key: math.nan if value is None else value for key, value in record.items()})
    return records


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Returns the records of trace.jsonl, which have the fields of `ring.step_metrics.Interval`. Raises DataError."""
    return read_records(path, {"stage": str, "method": str, **dict.fromkeys(("step", "start", "end"), Real)})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl or evaluation.jsonl, in the order of their steps. Each step occurs once.

    A run of an older version of r2m-async, which was resumed, repeats steps. Their new records replace the old ones and
    all that followed. Raises DataError.
    """
    metrics: list[dict[str, Any]] = []
    for record in read_records(path, {"step": Real}, only_numbers=True):
        while metrics and metrics[-1]["step"] >= record["step"]:
            metrics.pop()  # of the run before it was resumed
        metrics.append(record)
    return metrics


def finite_or_null(value: Any) -> Any:
    """Returns a value with None in place of every NaN and infinity, in mappings and lists inside it too."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite_or_null(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Records = Sequence[Mapping[str, Any]]
"""Records of one file, as `read_records` returns them."""


NUM_KL_BINS = 12
"""The number of bins in a curve of reward against KL."""


def column(records: Records, key: str) -> np.ndarray:
    """Returns one metric of all records, as an array [number of records]. It is NaN where a record lacks the metric.

    Raises DataError if a record has something else than a number.
    """
    try:
        return np.array([record.get(key, np.nan) for record in records], dtype=float)
    except (TypeError, ValueError) as error:
        raise DataError(f"the metric {key!r} is no number in every record ({error}): a file was changed") from None


def samples_kl(records: Records) -> np.ndarray:
    """Returns, for each step, the KL to the reference of the policies that sampled its responses.

    The result is an array [number of records], in nats per response. The rewards of a step belong to this KL, and not
    to that of the policy which the step trains.

    Old runs have no `kl/behaviour`. For them it is the KL of pi_old, which is the same if both staleness bounds are 0.
    """
    return np.array([record.get("kl/behaviour", record.get("kl/sequence", np.nan)) for record in records], dtype=float)


def kl_of_versions(versions: np.ndarray, steps: Records) -> np.ndarray:
    """Returns the KL to the reference of policy versions, interpolated between the steps that have one.

    versions: [n], the versions. steps: records of metrics.jsonl. The result is [n], in nats per response, and NaN if no
    step has a KL.
    """
    # Records count steps from 1. Step v + 1 starts from version v, so the KL in its record is that of version v.
    step, kl = column(steps, "step"), column(steps, "kl/sequence")
    known = np.isfinite(kl)
    return np.interp(versions + 1, step[known], kl[known]) if known.any() else np.full_like(versions, np.nan)


def reward_functions(steps: Records) -> list[str]:
    """Returns the metrics of the reward functions, in the order in which the records have them."""
    own = {f"reward/{name}" for name in REWARD_METRICS}
    return list(dict.fromkeys(key for one in steps for key in one if key.startswith("reward/") and key not in own))


def has(records: Records, key: str) -> bool:
    """Returns whether any record has a finite value of the metric."""
    return bool(np.isfinite(column(records, key)).any())


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the x values that all curves have, and the mean of the curves at each of them.

    curves: (x, y) arrays of one length each, x rising and without repetitions. The mean is NaN where one curve is.
    """
    shared = sorted(set.intersection(*(set(x.tolist()) for x, _ in curves)))
    return np.array(shared), np.mean([y[np.isin(x, shared)] for x, y in curves], axis=0)


def binned(x: np.ndarray, y: np.ndarray, num_bins: int = NUM_KL_BINS) -> tuple[np.ndarray, np.ndarray]:
    """Averages the points of a scattered curve. Returns the mean x and the mean y of each bin, in the order of x.

    x, y: arrays of one length. Points with NaN or infinity are left out.
    num_bins: bins hold equally many points, up to one. There are fewer bins if there are fewer points.
    """
    known = np.isfinite(x) & np.isfinite(y)
    order = np.argsort(x[known], kind="stable")
    bins = np.array_split(order, min(num_bins, max(1, len(order))))
    if not len(order):
        return np.array([]), np.array([])
    return np.array([x[known][one].mean() for one in bins]), np.array([y[known][one].mean() for one in bins])
