"""Does one training run, from a config to a run directory, and goes on with one. This is `r2m train` and `r2m resume`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, NoRoom, StageLost, StalledRun
from r2m_async.launch.prometheus import RayGauges
from r2m_async.launch.ray_connection import RayConnection, abandoned
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import Workload, conservation, resolve
from r2m_async.ring.progress import Progress
from r2m_async.runs.checkpoints import checkpoint_path, checkpoints, newest_whole, saved_config, saved_counts, step_of
from r2m_async.runs.directory import RunDirectory, as_only_writer, config_of_run, new_directory, newest_directory
from r2m_async.runs.live import LiveTable
from r2m_async.runs.records import append_records, read_trace
from r2m_async.runs.report import write_report
from r2m_async.runs.resuming import changes, check_resumable
from r2m_async.runs.trace import write_trace_events
from r2m_async.runs.trackers import Tracker, Trackers
from r2m_async.whole import remove_directory, write_file


def train(config: R2MConfig, in_process: bool = False, resume_if_exists: bool = False) -> Path:
    """Runs a ring to its end, and returns the run directory.

    What was measured is written after every step, so it is there even if the run fails. Checkpoints are kept as the
    section `checkpoint` of the config says.

    Args:
        config: the config of the run.
        in_process: True runs all stages in this process, one call after the other, so that a debugger reaches all of
            them. False runs them on Ray.
        resume_if_exists: goes on with the newest run of this name in `run.output_dir`, if it has a checkpoint. A job
            that is started again after a failure asks for that. A run that is finished is left as it is.

    Raises ConfigError or DataError if the run cannot start, DiskError if the disk refuses to write, and otherwise what
    `Ring` raises. To an error of the running ring it adds a note about what can be used afterwards.
    """
    newest = newest_directory(config.run.output_dir, config.run.name) if resume_if_exists else None
    with LiveTable(config) as live:
        if newest is not None:
            if checkpoints(newest):
                return _go_on(newest, config, in_process, live)
            live.tell(f"{newest} has no checkpoint: a new run begins")
        workload = _resolved(config, live)
        path = new_directory(config.run.output_dir, config.run.name, config)
        with as_only_writer(path):
            live.follow(path)
            _Run(path, config, workload, in_process, live).to_the_end(None)
    return path


def resume(path: Path, overrides: list[str] | tuple[str, ...] = (), in_process: bool = False) -> Path:
    """Goes on with a run from its newest whole checkpoint, to its end, and returns its directory.

    Its files go on without a gap and without a double: what was recorded after the checkpoint is cut off.

    Args:
        path: the run directory.
        overrides: `section.key=value`, set over the run's config. docs/checkpoints.md lists the keys that may change.
        in_process: as for `train`.

    Raises what `train` raises, and ConfigError if there is no whole checkpoint, if another process writes into the
    directory, or if a key was changed that may not.
    """
    config = config_of_run(path, overrides)
    with LiveTable(config) as live:
        return _go_on(path, config, in_process, live)


def _go_on(path: Path, config: R2MConfig, in_process: bool, live: LiveTable) -> Path:
    """Does what `resume` does, with the config that the run is to go on with."""
    with as_only_writer(path):
        checkpoint = _newest_whole(path, live)
        changed = changes(saved_config(checkpoint, R2MConfig), config)
        for key in ("run.name", "run.output_dir"):
            if key in changed:
                raise ConfigError(
                    f"{key} is {changed[key][1]!r} and was {changed[key][0]!r}: it says where a new run is made, and this one "
                    f"goes on in {path}; leave it as it was"
                )
        check_resumable(checkpoint, saved_config(checkpoint, R2MConfig), config)
        progress = Progress(**saved_counts(checkpoint)["progress"])
        live.follow(path)
        if progress.step >= config.run.num_steps or progress.is_stopped_by(config.objective.kl_stop):
            why = "" if progress.stopped_at_kl is None else " or objective.kl_stop"
            live.tell(f"{path} is finished after {progress.step} steps; to go on, raise run.num_steps{why}")
            _draw(path)
            return path
        workload = _resolved(config, live)
        _Run(path, config, workload, in_process, live).to_the_end(_Start(checkpoint, changed))
    return path


@dataclass(frozen=True, slots=True)
class _Start:
    """What a ring goes on from, and why."""

    checkpoint: Path
    changed: dict[str, list[Any]]
    """The keys of the config that are changed, with both values."""
    because: str = ""
    """What ended the ring before, if it was one of this job."""


@dataclass(frozen=True, slots=True)
class _Run:
    """A run on its way to its end, with one ring after the other if need be."""

    path: Path
    config: R2MConfig
    workload: Workload
    in_process: bool
    live: LiveTable

    def to_the_end(self, start: _Start | None) -> None:
        """Takes all steps that are left, and draws the figures.

        If a stage is lost, or nothing moves any more, the ring is built anew from the newest whole checkpoint: up to
        `run.max_restarts` times in a row without a new checkpoint between.

        Args:
            start: what the run goes on from. None: it is a new run.
        """
        with _naming_what_is_left(self.path):
            trackers = Trackers(self.path, self.config, self.live.tell, self._gauges())
            with trackers, contextlib.ExitStack() as ray_ends:
                self._rings(start, ray_ends, trackers)
            _draw(self.path)

    def _gauges(self) -> dict[str, Tracker]:
        """Prometheus as a tracker, by its key, if the config asks for it."""
        if not self.config.logging.prometheus:
            return {}
        if self.in_process:
            raise ConfigError(
                "logging.prometheus is true and all stages run in one process: it needs Ray; leave out --in-process, "
                "or set it to false"
            )
        return {"prometheus": RayGauges(self.path, self.live.tell)}

    def _rings(self, start: _Start | None, ray_ends: contextlib.ExitStack, trackers: Trackers) -> None:
        """Takes all steps that are left. `ray_ends` gets what ends the Ray that one ring leaves to the next."""
        restarts, num_in_a_row, begun_at = 0, 0, start.checkpoint if start else None
        ray: RayConnection | None = None
        num_gpus: float | None = None
        while True:
            try:
                if ray is None and not self.in_process:
                    ray = RayConnection(self.config)
                    ray_ends.callback(ray.close)
                    # A ring that is built anew waits for the GPUs that the first one had. It does not share what is left.
                    num_gpus = ray.num_gpus = ray.num_gpus if num_gpus is None else num_gpus
                return self._one_ring(start, restarts, ray, trackers)
            except (StageLost, StalledRun) as error:
                # If it is not known to be one stage, then Ray itself may be what is gone or does not answer.
                if not isinstance(error, StageLost) or error.stage is None:
                    ray_ends.close()
                    ray = None
                # A Ray that was given up still holds this process.
                if abandoned.is_set() or not checkpoints(self.path):
                    raise
                try:
                    checkpoint = _newest_whole(self.path, self.live)
                except ConfigError as damaged:
                    error.add_note(str(damaged))
                    raise error from None
                num_in_a_row = num_in_a_row + 1 if checkpoint == begun_at else 1
                if num_in_a_row > self.config.run.max_restarts:
                    error.add_note(f"run.max_restarts is {self.config.run.max_restarts}: the ring is not built anew.")
                    raise
                restarts, begun_at, start = restarts + 1, checkpoint, _Start(checkpoint, {}, str(error))
                self.live.tell(f"{error}\nthe ring is built anew from {checkpoint}")

    def _one_ring(self, start: _Start | None, restarts: int, ray: RayConnection | None, trackers: Trackers) -> None:
        """Starts a ring, and takes steps with it.

        Args:
            start: what it goes on from. None: it is the first ring of a new run.
            restarts: how many rings of this job came before.
            ray: the connection to Ray of this job. None: the ring is in this process.
            trackers: get what the run directory gets.
        """
        path, config, live = self.path, self.config, self.live
        if start is None:
            live.message(f"starting the ring; run directory {path}")
            where = path / "journal"
            ring = Ring(config, self.workload, self.in_process, None, where, ray, on_status=live.ring)
            with ring, RunDirectory(path, config, trackers=trackers) as run:
                live.message("the ring has started")
                _steps(ring, run, live, restarts)
            return
        progress = Progress(**saved_counts(start.checkpoint)["progress"])
        live.tell(f"resuming {path} after step {progress.step}")
        try:
            ring = Ring(
                config, self.workload, self.in_process, start.checkpoint, path / "journal", ray, on_status=live.ring
            )
        except NoRoom as error:
            if restarts:  # there was room for the ring before: what is missing now is a node, and another may come
                raise StageLost(None, str(error)) from None
            raise
        with ring:
            for line in (*conservation(config, self.workload, progress), *ring.controller.journal.told()):
                live.tell(line)
            known = len(ring.controller.evaluations)
            with RunDirectory.resume(path, config, progress.step, ring.records, known, trackers) as run:
                write_file(path / "config.yaml", config.to_yaml())
                at = datetime.now(UTC).isoformat(timespec="seconds")
                resumed = {"step": progress.step, "at": at, "changed": start.changed, "because": start.because}
                append_records(path / "resumes.jsonl", [resumed])
                _steps(ring, run, live, restarts)


def _draw(path: Path) -> None:
    """Draws the figures of a run, and writes its report and its trace for Perfetto."""
    from r2m_async.runs.plots import plot_run  # matplotlib takes its time, and no step should wait for it

    plot_run(path)
    write_report([path], path / "report.html")
    write_trace_events(read_trace(path / "trace.jsonl"), path / "trace.json")


def _newest_whole(path: Path, live: LiveTable) -> Path:
    """Returns a run's newest whole checkpoint, and names those that are passed over. Raises ConfigError if none is."""
    checkpoint, damaged = newest_whole(path)
    for damage in damaged:
        live.tell(f"a checkpoint is passed over: {damage}")
    return checkpoint


def _resolved(config: R2MConfig, live: LiveTable) -> Workload:
    """Resolves the workload of a config, and shows what the user should know of it."""
    live.message("loading models and data")
    workload = resolve(config, on_progress=lambda what, done, total: live.message(f"building: {what}", done, total))
    for note in workload.notes:
        live.tell(note)
    for reason, count in workload.skipped.items():
        live.tell(f"data: skipped {count} records: {reason}")
    return workload


def _steps(ring: Ring, run: RunDirectory, live: LiveTable, restarts: int) -> None:
    """Takes the steps that are left, and writes and shows what they measure."""
    while not ring.finished:
        metrics = ring.step() | {"restarts/ring": float(restarts)}
        run.write_step(metrics)
        _record(ring, run)
        live.update(metrics, ring.controller.evaluations)
        if not ring.finished:
            keep_checkpoint(ring, run)
    ring.drain()
    # The last checkpoint comes after everything else is written, because it may fill the disk.
    _record(ring, run)
    live.update({}, ring.controller.evaluations)
    keep_checkpoint(ring, run)
    remove_directory(run.path / "journal")  # no group of this run is still to be trained


def _record(ring: Ring, run: RunDirectory) -> None:
    """Writes the evaluations, the labels and the trace as far as the ring has come."""
    run.write_trace(ring.controller.take_trace())
    run.write_labels(ring.controller.take_labels())
    run.write_evaluations(ring.controller.evaluations, ring.controller.samples)


@contextlib.contextmanager
def _naming_what_is_left(run: Path) -> Iterator[None]:
    """Adds a note to an error in the block: where the measurements are, and from which checkpoint the run can go on.

    Args:
        run: the run directory.
    """
    try:
        yield
    except BaseException as error:
        error.add_note(f"What was measured is in {run}.")
        saved = []
        # If the disk fails here, too, that must not hide the error of the run.
        with contextlib.suppress(OSError):
            saved = checkpoints(run)
        error.add_note(
            f"The last whole checkpoint is {saved[-1]}: `r2m resume {run}` goes on from it."
            if saved
            else "No checkpoint was saved (checkpoint.every)."
        )
        raise


def keep_checkpoint(ring: Ring, run: RunDirectory) -> None:
    """Saves a checkpoint if one is due after the present step, and deletes old ones.

    One is due every `checkpoint.every` steps, and at the end of the run under `checkpoint.at_end`. The newest
    `checkpoint.keep` checkpoints stay.

    Args:
        ring: the running ring.
        run: the directory of its run. It is complete up to the checkpoint when the checkpoint is there.

    Raises DiskError if the disk refuses to write or to delete.
    """
    checkpoint, step = ring.config.checkpoint, ring.controller.schedule.policy_version
    regular = checkpoint.every is not None and step % checkpoint.every == 0
    if not (regular or (checkpoint.at_end and ring.finished)):
        return
    ring.drain()
    _record(ring, run)
    ring.save(checkpoint_path(run.path, step), run.lengths())
    # A checkpoint of a later step is a damaged one, behind which the run was resumed. It counts for nothing.
    saved = [path for path in checkpoints(run.path) if (step_of(path.name) or 0) <= step]
    for old in saved[: -checkpoint.keep]:
        remove_directory(old)
