"""The directory of one run. Its files are complete after every step.

    config.yaml        the resolved config
    metrics.jsonl      one line per policy step
    evaluation.jsonl   one line per evaluation
    samples.jsonl      one line per evaluation and held-out prompt: a response to read, as `r2m samples` shows it
    trace.jsonl        one line per call of a stage (`step_metrics.Interval`)
    labels.jsonl       one line per preference that somebody gave, as `r2m reward-model train` reads pairs; if there is a
                       `labels.source`
    labels_void.jsonl  one line per pair that was asked about and has no preference, with the reason
    labels_cut.jsonl   the preferences that a resumed run has cut off: it asks for those steps again
    events.out.*       the step metrics for TensorBoard, if `logging.tensorboard` is on
    checkpoints/       step-000040 and so on, each a directory that `Ring.save` wrote (docs/checkpoints.md)
    journal/           finished groups since the newest checkpoint, if `queue.journal` is set
    resumes.jsonl      one line per `r2m resume`: where it went on, and which keys of the config it changed
    status.json        what the run is doing, or how it ended (`runs.status`)
    trace.json         the end of the trace for https://ui.perfetto.dev (`runs.trace`)
    report.html        the whole run in one file, for a browser (`runs.report`)
    tracked_as         what the run is called in its trackers, if it has any (`runs.trackers`)
    wandb/             what W&B keeps, if `logging.wandb` is set

JSON has no NaN and no infinity. Both are written as null, and null is read back as NaN.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from r2m_async.config import ConfigTree, R2MConfig
from r2m_async.errors import ConfigError, DataError, DiskError
from r2m_async.runs.records import append_records, read_metrics
from r2m_async.whole import append_lines, cut_partial_line, disk_errors, only_writer, whole_directory

if TYPE_CHECKING:
    from r2m_async.ring.step_metrics import Interval
    from r2m_async.runs.trackers import Trackers


RECORDS = ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl", "trace.jsonl")
"""The files to which every run appends."""
LABELS = ("labels.jsonl", "labels_void.jsonl")
"""Those to which a run with labels appends, too."""


def _files(config: R2MConfig) -> tuple[str, ...]:
    """The files to which a run with this config appends."""
    return (*RECORDS, *LABELS) if config.labels.source else RECORDS


class RunDirectory:
    """Appends to the files of one run.

    `create` makes a new directory. The constructor begins in one that has only its config. `resume` goes on in one from a
    checkpoint. All methods raise DiskError if the disk refuses what they write.
    """

    def __init__(
        self,
        path: Path,
        config: R2MConfig,
        first_step: int = 0,
        num_evaluations: int = 0,
        trackers: Trackers | None = None,
    ) -> None:
        """Makes the files that are missing.

        Args:
            path: an existing directory. A half-written last line, which a killed run left, is removed.
            config: the config of the run.
            first_step: the policy steps that the run has taken. TensorBoard shows no older value of a later step.
            num_evaluations: how many of the evaluations that `write_evaluations` will be given are in the file already.
            trackers: get all steps and evaluations, too; at once those of the files that they do not have.
        """
        self.path, self._files, self._trackers = path, _files(config), trackers
        for name in self._files:
            cut_partial_line(path / name)
        self._num_evaluations, self._num_samples = num_evaluations, 0
        if trackers is not None:
            trackers.catch_up(read_metrics(path / "metrics.jsonl"), read_metrics(path / "evaluation.jsonl"))
        self._tensorboard = None
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with disk_errors(path):
                self._tensorboard = SummaryWriter(str(path), purge_step=first_step + 1 if first_step else None)

    @classmethod
    def create(cls, config: R2MConfig) -> Self:
        """Makes the directory `<run.output_dir>/<run.name>-<UTC time>`. A number is appended if the name is taken."""
        return cls(new_directory(config.run.output_dir, config.run.name, config), config)

    @classmethod
    def resume(
        cls,
        path: Path,
        config: R2MConfig,
        first_step: int,
        lengths: Mapping[str, int],
        num_evaluations: int,
        trackers: Trackers | None = None,
    ) -> Self:
        """Goes on after a checkpoint. What was recorded after it is cut off, because the run does these steps again.

        Args:
            lengths: what `lengths` was when the checkpoint was saved.

        The others are those of the constructor. If none of the files is there, as in a copy of a checkpoint, they begin
        with this start. Raises DataError, and cuts nothing, if a file has lost records from before the checkpoint.
        """
        there = {name for name in lengths if (path / name).exists()}
        for name in lengths if there else ():
            has = (path / name).stat().st_size if name in there else 0
            if has < lengths[name]:
                raise DataError(
                    f"{path / name}: has {has} bytes, and had {lengths[name]} when the checkpoint of step {first_step} was "
                    f"saved: records are lost. Bring the file back, or remove {', '.join(lengths)}: they then begin anew"
                )
        if LABELS[0] in there:  # labels cost somebody's time or money
            append_lines(path / "labels_cut.jsonl", (path / LABELS[0]).read_bytes()[lengths[LABELS[0]] :])
        with disk_errors(path):
            for name in there:
                os.truncate(path / name, lengths[name])
        return cls(path, config, first_step, num_evaluations, trackers)

    def lengths(self) -> dict[str, int]:
        """How long each file of records is now, in bytes by name. A checkpoint keeps it for `resume`."""
        return {name: (self.path / name).stat().st_size for name in self._files}

    def write_step(self, metrics: dict[str, float]) -> None:
        """Appends the metrics of one policy step.

        metrics: values by name. `metrics["step"]` is the step at which TensorBoard shows them.
        """
        append_records(self.path / "metrics.jsonl", [metrics])
        if self._tensorboard is not None:
            with disk_errors(self.path):  # TensorBoard writes in a thread, whose errors are raised here too
                for tag, value in metrics.items():
                    self._tensorboard.add_scalar(tag, value, global_step=int(metrics["step"]))
                self._tensorboard.flush()
        if self._trackers is not None:
            self._trackers.step(metrics)

    def write_evaluations(self, evaluations: Sequence[dict[str, float]], samples: Sequence[dict[str, Any]]) -> None:
        """Appends the evaluations that are new.

        evaluations, samples: all evaluations of the ring so far, and the responses to read of those that it has made.
        """
        append_records(self.path / "samples.jsonl", samples[self._num_samples :])
        new = evaluations[self._num_evaluations :]
        append_records(self.path / "evaluation.jsonl", new)
        if self._trackers is not None:
            for evaluation in new:
                self._trackers.evaluation(evaluation)
        self._num_evaluations, self._num_samples = len(evaluations), len(samples)

    def write_labels(self, records: Sequence[dict[str, Any]]) -> None:
        """Appends what has become of pairs that were asked about. `Controller.take_labels` returns each record once."""
        for name, void in zip(LABELS, (False, True), strict=True):
            if chosen := [record for record in records if (record["reason"] is not None) == void]:
                append_records(self.path / name, chosen)

    def write_trace(self, intervals: Sequence[Interval]) -> None:
        """Appends intervals. `Controller.take_trace` returns each interval once."""
        append_records(self.path / "trace.jsonl", map(asdict, intervals))

    def close(self) -> None:
        """Closes TensorBoard's writer. The other files are closed after every write."""
        if self._tensorboard is not None:
            with disk_errors(self.path):
                self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The error that ended the run must be the one that is seen. After a full disk, TensorBoard's writer raises once
        # more when it is closed.
        with contextlib.suppress(*() if kind is None else (DiskError,)):
            self.close()


def config_of_run(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> R2MConfig:
    """Returns the config of a run. overrides: `section.key=value`, set over it.

    Raises ConfigError if there is no run in this directory, or if its config is none of this version.
    """
    if not path.exists():
        raise ConfigError(f"{path}: is not there; name the directory of a run of `r2m train`")
    written, absolute = path / "config.yaml", path.absolute()
    if (path / "manifest.json").is_file() and absolute.parent.name == "checkpoints":
        raise ConfigError(f"{path}: is a checkpoint; name its run: {absolute.parent.parent}")
    if not written.is_file():
        run = f"; its run is {absolute.parent.parent}" if absolute.parent.name == "checkpoints" else ""
        raise ConfigError(f"{path}: is no run directory: it has no config.yaml{run}; name one that `r2m train` made")
    try:
        R2MConfig.from_yaml(written)
    except ConfigError as error:
        why = "if another version of r2m-async made this run, use that version"
        raise ConfigError(f"{error}\n{why}, or mend {written}") from None
    return R2MConfig.from_yaml(written, overrides)


def newest_directory(parent: str, name: str) -> Path | None:
    """Returns the newest directory that `new_directory` made with these arguments, or None if there is none."""
    return max(found := _directories(parent, name), key=lambda path: found[path], default=None)


def _directories(parent: str, name: str) -> dict[Path, tuple[str, int]]:
    """The directories that `new_directory` made with these arguments, each with the time and the number in its name."""
    stamped = re.compile(re.escape(Path(name).name) + r"-(\d{8}-\d{6})(?:-(\d+))?")
    folder = (Path(parent) / name).parent
    found = {path: match for path in folder.glob("*") if (match := stamped.fullmatch(path.name)) and path.is_dir()}
    return {path: (match[1], int(match[2] or 1)) for path, match in found.items()}


def new_directory(parent: str, name: str, config: ConfigTree) -> Path:
    """Makes the directory `<parent>/<name>-<UTC time>` with config.yaml in it, and returns its path.

    A number is appended if the name is taken. If the clock was set back since the newest directory was made, the new one
    has that one's time, and the next number: it is the newest by its name, whatever the clock says. Raises DiskError.
    """
    taken = max(_directories(parent, name).values(), default=("", 0))
    stamp, first = max((datetime.now(UTC).strftime("%Y%m%d-%H%M%S"), 1), (taken[0], taken[1] + 1))
    wanted = Path(parent) / f"{name}-{stamp}"
    for number in count(first):
        path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            # Whoever takes the name first has it: a check beforehand would let two processes take the same one.
            with whole_directory(path) as new:
                (new / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            return path
        except FileExistsError:
            continue
    raise AssertionError("numbers have no end")


@contextlib.contextmanager
def as_only_writer(path: Path, what: str = "run") -> Iterator[None]:
    """Locks a directory or a file for the block. Raises ConfigError if another process writes into it.

    what: what it is, for the message.
    """
    with only_writer(path) as alone:
        if not alone:
            raise ConfigError(f"{path}: another process writes into this {what}; end it first, or wait for its end")
        yield
