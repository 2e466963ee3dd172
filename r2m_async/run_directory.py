"""What a run leaves on disk: one directory of files that are whole after every step.

    config.yaml        the resolved config
    metrics.jsonl      one line per policy step
    evaluation.jsonl   one line per evaluation
    trace.jsonl        one line per stage call (`step_metrics.Interval`)
    events.out.*       the step metrics for TensorBoard, where `logging.tensorboard` is on
    checkpoints/       step-000040 and so on, each a directory that `Ring.save` wrote (docs/checkpoints.md)

NaN and infinity are no JSON: they are written as null and read back as NaN.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from r2m_async.config import ConfigTree, R2MConfig
from r2m_async.errors import DataError, DiskError
from r2m_async.whole import append, disk_errors, listed, whole_directory, write_file

if TYPE_CHECKING:
    from r2m_async.step_metrics import Interval


class RunDirectory:
    """Appends to the files of one run. `create` makes a new directory; the constructor goes on in an existing one."""

    def __init__(self, path: Path, config: R2MConfig) -> None:
        self.path = path
        for name in ("metrics.jsonl", "evaluation.jsonl", "trace.jsonl"):
            cut_partial_line(path / name)
        self._num_evaluations = 0
        self._tensorboard = None
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with disk_errors(path):
                self._tensorboard = SummaryWriter(str(path))

    @classmethod
    def create(cls, config: R2MConfig) -> Self:
        """Makes `<run.output_dir>/<run.name>-<UTC time>`, with a number appended if that is taken."""
        return cls(new_directory(config.run.output_dir, config.run.name, config), config)

    def write_step(self, metrics: dict[str, float]) -> None:
        """Appends one step's metrics; `metrics["step"]` is the step TensorBoard shows them at."""
        append_records(self.path / "metrics.jsonl", [metrics])
        if self._tensorboard is not None:
            with disk_errors(self.path):  # what its own thread could not write is raised here too
                for tag, value in metrics.items():
                    self._tensorboard.add_scalar(tag, value, global_step=int(metrics["step"]))
                self._tensorboard.flush()

    def write_evaluations(self, evaluations: Sequence[dict[str, float]]) -> None:
        """Takes all evaluations of this process so far and appends those that are new."""
        append_records(self.path / "evaluation.jsonl", evaluations[self._num_evaluations :])
        self._num_evaluations = len(evaluations)

    def write_trace(self, intervals: Sequence[Interval]) -> None:
        """Appends intervals, as `Controller.take_trace` hands them out."""
        append_records(self.path / "trace.jsonl", map(asdict, intervals))

    def close(self) -> None:
        if self._tensorboard is not None:
            with disk_errors(self.path):
                self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What ended the run is the error to see: of a full disk, TensorBoard's writer tells once more as it is closed.
        with contextlib.suppress(*() if kind is None else (DiskError,)):
            self.close()


def new_directory(parent: str, name: str, config: ConfigTree) -> Path:
    """`<parent>/<name>-<UTC time>` with the config in it, a number appended if that is taken."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    wanted = Path(parent) / f"{name}-{stamp}"
    for number in count(1):
        path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            with whole_directory(path) as new:
                (new / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            return path
        except FileExistsError:
            continue
    raise AssertionError("numbers have no end")


def append_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Raises DiskError, and has then appended none."""
    append(path, jsonl(records))


def jsonl(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(_finite(record), allow_nan=False) + "\n" for record in records)


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def checkpoints(run: Path) -> list[Path]:
    """A run's whole checkpoints, oldest first; one that was interrupted has another name, and so have copies."""
    steps = {_step(name): path for name, path in listed(run / "checkpoints").items()}
    return [steps[step] for step in sorted(step for step in steps if step is not None)]


def _step(name: str) -> int | None:
    """Of the name that `checkpoint_path` gives to a step's checkpoint, and of no other."""
    number = re.fullmatch(r"step-(\d{6,})", name)
    return int(number[1]) if number and checkpoint_path(Path(), int(number[1])).name == name else None


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


def write_results(out: Path, results: Mapping[str, Any], table: str) -> None:
    """OUT/results.json and OUT/table.md. results.json comes last: where it is, all is. Raises DiskError."""
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_file(out / "table.md", table)
    write_file(out / "results.json", json.dumps(_finite(results), indent=1, allow_nan=False) + "\n")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_partial_line(path: Path) -> None:
    """What a killed run left half written would spoil the next line. Makes the file if it is not there."""
    with disk_errors(path):
        path.touch()
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
