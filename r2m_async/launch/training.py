"""One training run from config to run directory: what `r2m train` does."""

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
    """Runs the ring to its end; returns the run directory. What was measured is written even if the run fails.

    in_process: all stages run in this process, one call after the other, so that a debugger reaches every one of them.
    """
    with LiveTable(config) as live:
        workload = resolve(config, on_progress=live.message)
        for reason, count in workload.skipped.items():
            live.message(f"data: skipped {count} records: {reason}")
        with RunDirectory.create(config) as run:
            live.message(f"starting the ring; run directory {run.path}")
            with _naming_what_is_left(run.path), Ring(config, workload, in_process) as ring:
                while not ring.finished:
                    metrics = ring.step()
                    run.write_step(metrics)
                    run.write_trace(ring.controller.take_trace())
                    run.write_evaluations(ring.controller.evaluations)
                    live.update(metrics, ring.controller.evaluations)
                    if not ring.finished:
                        keep_checkpoint(ring, run.path)
                run.write_evaluations(ring.drain())
                run.write_trace(ring.controller.take_trace())
                live.update({}, ring.controller.evaluations)
                keep_checkpoint(ring, run.path)  # last, for it may fill the disk: by now all else is written
    plot_run(run.path)
    return run.path


@contextlib.contextmanager
def _naming_what_is_left(run: Path) -> Iterator[None]:
    """Adds to whatever ends a run early where its measurements are, and what it can go on from."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"What was measured is in {run}.")
        saved = []
        with contextlib.suppress(OSError):  # a disk that fails must not hide what failed
            saved = checkpoints(run)
        error.add_note(
            f"The last whole checkpoint is {saved[-1]}." if saved else "No checkpoint was saved (checkpoint.every)."
        )
        raise


def keep_checkpoint(ring: Ring, run: Path) -> None:
    """Every `checkpoint.every` steps, and at the end under `checkpoint.at_end`; the newest `checkpoint.keep` stay."""
    checkpoint, step = ring.config.checkpoint, ring.controller.schedule.policy_version
    regular = checkpoint.every is not None and step % checkpoint.every == 0
    if not (regular or (checkpoint.at_end and ring.finished)):
        return
    ring.save(checkpoint_path(run, step))
    for old in checkpoints(run)[: -checkpoint.keep]:
        remove_directory(old)
