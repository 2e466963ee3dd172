"""Does one training run, from a config to a run directory. This is what `r2m train` does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from r2m_async.config import R2MConfig
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import resolve
from r2m_async.runs.checkpoints import checkpoint_path, checkpoints
from r2m_async.runs.directory import RunDirectory
from r2m_async.runs.live import LiveTable
from r2m_async.runs.plots import plot_run
from r2m_async.whole import remove_directory


def train(config: R2MConfig, in_process: bool = False) -> Path:
    """Runs a ring to its end, and returns the run directory.

    What was measured is written after every step, so it is there even if the run fails. Checkpoints are kept as the
    section `checkpoint` of the config says.

    Args:
        config: the config of the run.
        in_process: True runs all stages in this process, one call after the other, so that a debugger reaches all of
            them. False runs them on Ray.

    Raises ConfigError or DataError if the run cannot start, DiskError if the disk refuses to write, and otherwise what
    `Ring` raises. To an error of the running ring it adds a note about what can be used afterwards.
    """
    with LiveTable(config) as live:
        workload = resolve(config, on_progress=live.message)
        for note in workload.notes:
            live.message(note)
        for reason, count in workload.skipped.items():
            live.message(f"data: skipped {count} records: {reason}")
        run = RunDirectory.create(config)
        with _naming_what_is_left(run.path), run:
            live.message(f"starting the ring; run directory {run.path}")
            with Ring(config, workload, in_process) as ring:
                while not ring.finished:
                    metrics = ring.step()
                    run.write_step(metrics)
                    run.write_trace(ring.controller.take_trace())
                    run.write_evaluations(ring.controller.evaluations, ring.controller.samples)
                    live.update(metrics, ring.controller.evaluations)
                    if not ring.finished:
                        keep_checkpoint(ring, run.path)
                # The last checkpoint comes after everything else is written, because it may fill the disk.
                run.write_evaluations(ring.drain(), ring.controller.samples)
                run.write_trace(ring.controller.take_trace())
                live.update({}, ring.controller.evaluations)
                keep_checkpoint(ring, run.path)
    with _naming_what_is_left(run.path):
        plot_run(run.path)
    return run.path


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
            f"The last whole checkpoint is {saved[-1]}." if saved else "No checkpoint was saved (checkpoint.every)."
        )
        raise


def keep_checkpoint(ring: Ring, run: Path) -> None:
    """Saves a checkpoint if one is due after the present step, and deletes old ones.

    One is due every `checkpoint.every` steps, and at the end of the run under `checkpoint.at_end`. The newest
    `checkpoint.keep` checkpoints stay.

    Args:
        ring: the running ring.
        run: the run directory.

    Raises DiskError if the disk refuses to write or to delete.
    """
    checkpoint, step = ring.config.checkpoint, ring.controller.schedule.policy_version
    regular = checkpoint.every is not None and step % checkpoint.every == 0
    if not (regular or (checkpoint.at_end and ring.finished)):
        return
    ring.save(checkpoint_path(run, step))
    for old in checkpoints(run)[: -checkpoint.keep]:
        remove_directory(old)
