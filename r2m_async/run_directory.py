"""What a run leaves on disk: one directory of files that are whole after every step.

    config.yaml        the resolved config
    metrics.jsonl      one line per policy step
    evaluation.jsonl   one line per evaluation
    trace.jsonl        one line per stage call (`step_metrics.Interval`)
    events.out.*       the step metrics for TensorBoard, where `logging.tensorboard` is on
    checkpoints/       step-000040 and so on, each a directory that `Ring.save` wrote

NaN and infinity are no JSON: they are written as null and read back as NaN.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from r2m_async.config import ConfigTree, R2MConfig
from r2m_async.errors import DataError

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

            self._tensorboard = SummaryWriter(str(path))

    @classmethod
    def create(cls, config: R2MConfig) -> Self:
        """Makes `<run.output_dir>/<run.name>-<UTC time>`, with a number appended if that is taken."""
        return cls(new_directory(config.run.output_dir, config.run.name, config), config)

    def write_step(self, metrics: dict[str, float]) -> None:
        """Appends one step's metrics; `metrics["step"]` is the step TensorBoard shows them at."""
        append_records(self.path / "metrics.jsonl", [metrics])
        if self._tensorboard is not None:
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
            self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def new_directory(parent: str, name: str, config: ConfigTree) -> Path:
    """`<parent>/<name>-<UTC time>` with the config in it, a number appended if that is taken."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    wanted = Path(parent) / f"{name}-{stamp}"
    for number in count(1):
        path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            continue
    (path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return path


def append_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(_finite(record), allow_nan=False) + "\n" for record in records)


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def checkpoints(run: Path) -> list[Path]:
    """A run's whole checkpoints, oldest first; one that was interrupted has another name."""
    return sorted((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


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


def write_whole(path: Path, text: str) -> None:
    """The file is there whole or not at all, however this ends."""
    building = path.with_name(f".{path.name}.partial")
    building.write_text(text, encoding="utf-8")
    building.rename(path)


def write_results(out: Path, results: Mapping[str, Any], table: str) -> None:
    """OUT/results.json and OUT/table.md."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(_finite(results), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table, encoding="utf-8")


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
    path.touch()
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
