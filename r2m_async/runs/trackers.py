"""Sends what a run measures to experiment trackers: W&B, MLflow, trackio. Each is one key of the section `logging`.

Addresses, accounts and offline modes are the trackers' own environment variables (docs/observing.md). A resumed run goes on with
its run in a tracker. What metrics.jsonl and evaluation.jsonl have is sent once: a resumed run first sends what its tracker
lacks, and leaves out what the tracker has.
"""

from __future__ import annotations

import importlib.util
import math
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Protocol, Self

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.runs.records import Records
from r2m_async.runs.resuming import keys_of
from r2m_async.whole import write_file

BEGINS_WITHIN = 180.0
"""Seconds in which a tracker must begin. A library may ask a server that does not answer again and again, for much longer."""
FINISHES_WITHIN = 120.0
"""Seconds that the end of a run waits for its trackers."""
INTERRUPTED_WITHIN = 5.0
"""The same, if a signal has asked the run to leave (`interruption.LEAVE_TIMEOUT`)."""
_MLFLOW_BATCH = 100
"""The most parameters that MLflow takes at once. It takes a thousand metrics."""
EVALUATION = "evaluation/"
"""What the names of an evaluation's metrics begin with."""
TRACKED_AS = "tracked_as"
"""The file of a run directory that has what the run is called in its trackers."""


abandoned = threading.Event()
"""It is set if a tracker was left behind. At its own end Python may wait for it, so the process must leave by `os._exit`."""


class Tracker(Protocol):
    """One run in one tracker. All methods may raise whatever the tracker's library raises."""

    def last(self) -> tuple[int, int] | None:
        """Returns the last policy step and the last evaluated policy version that the run has, -1 for none of them.

        None: it shows what is now, and keeps no history.
        """

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records finite numbers by name. They have `step` of a policy step, or `evaluation/step` of an evaluation."""

    def finish(self, done: bool) -> None:
        """Closes the run. done: whether it came to its end."""


class Wandb:
    """A run in W&B. Offline, where nobody knows what was sent before, each start of a run makes a run of its own."""

    def __init__(self, project: str, path: Path, name: str, config: R2MConfig) -> None:
        """Begins a run of the project, or goes on with the one of this name."""
        import wandb

        num_offline = len(list(path.glob("wandb/offline-run-*")))
        name = f"{name}-{num_offline}" if num_offline else name
        # Its capture of the terminal would take the live table's output.
        settings = wandb.Settings(console="off")
        self._run = wandb.init(
            project=project,
            name=path.name,
            id=name,
            dir=str(path),
            resume="allow",
            config=config.to_dict(),
            settings=settings,
        )
        self._defined: set[str] = set()

    def last(self) -> tuple[int, int]:
        """See `Tracker`."""
        summary = self._run.summary
        if self._run.starting_step and "step" not in summary:
            raise RuntimeError("it does not say which steps the run has")
        return int(summary.get("step", -1)), int(summary.get(f"{EVALUATION}step", -1))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        # W&B's own step may only rise, and evaluations come late: each point is drawn at the step that it has itself.
        axis = f"{EVALUATION}step" if f"{EVALUATION}step" in metrics else "step"
        for key in metrics.keys() - self._defined - {axis}:
            self._run.define_metric(key, step_metric=axis)
        self._defined |= metrics.keys()
        self._run.log(dict(metrics))

    def finish(self, done: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if done else 1)


class Mlflow:
    """A run in MLflow. It is found again by the tag `r2m_async.run`."""

    def __init__(self, experiment: str, path: Path, name: str, config: R2MConfig) -> None:
        """Begins a run of the experiment, or goes on with the one that has the name as its tag."""
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        found = self._client.get_experiment_by_name(experiment)
        where = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        tag = "r2m_async.run"
        runs = self._client.search_runs([where], filter_string=f"tags.`{tag}` = '{name}'", max_results=1)
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(where, tags={tag: name}, run_name=path.name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in keys_of(config).items()]
        for first in range(0, len(params), _MLFLOW_BATCH):
            self._client.log_batch(self._id, params=params[first : first + _MLFLOW_BATCH])

    def last(self) -> tuple[int, int]:
        """See `Tracker`."""
        metrics = self._client.get_run(self._id).data.metrics
        return int(metrics.get("step", -1)), int(metrics.get(f"{EVALUATION}step", -1))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(key, one, now, step) for key, one in metrics.items()])

    def finish(self, done: bool) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, status="FINISHED" if done else "FAILED")


class Trackio:
    """A run in trackio, which keeps it on this machine."""

    def __init__(self, project: str, path: Path, name: str, config: R2MConfig) -> None:
        """Begins a run of the project, or goes on with the one of this name."""
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            if os.environ.get(variable):
                raise ValueError(
                    f"the environment has {variable}, and what was sent to a server cannot be looked up when a run is resumed: "
                    "unset it, and send the project with `trackio sync` afterwards"
                )
        self._logs = SQLiteStorage.get_logs
        self._run = trackio.init(project=project, name=name, resume="allow", config=keys_of(config), embed=False)
        self._sent = self.last()

    def last(self) -> tuple[int, int]:
        """See `Tracker`."""
        last = [-1, -1]
        for row in self._logs(self._run.project, self._run.name, run_id=self._run.id):
            series = f"{EVALUATION}step" in row
            last[series] = max(last[series], row["step"])
        return last[0], last[1]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        # trackio has a column for `step`, and allows no metric of that name.
        self._run.log({key: value for key, value in metrics.items() if key != "step"}, step=step)
        self._sent = (self._sent[0], step) if f"{EVALUATION}step" in metrics else (step, self._sent[1])

    def finish(self, done: bool) -> None:
        """See `Tracker`. Raises RuntimeError if something is missing: trackio itself warns of errors and goes on."""
        self._run.finish()
        if (last := self.last()) != self._sent:
            raise RuntimeError(f"it has steps to {last[0]} and evaluations to {last[1]}, and was sent {self._sent}")


TRACKERS: dict[str, tuple[str, Callable[[str, Path, str, R2MConfig], Tracker]]] = {
    "wandb": ("wandb", Wandb),
    "mlflow": ("mlflow", Mlflow),
    "trackio": ("trackio", Trackio),
}
"""For each key of the section `logging`, the package that it takes and the tracker."""


def check_trackers(config: R2MConfig) -> None:
    """Raises ConfigError if the config names a tracker whose package is not installed."""
    for key, (package, _) in TRACKERS.items():
        if getattr(config.logging, key) is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"logging.{key} is {getattr(config.logging, key)!r} and the package {package} is not installed: "
                f"pip install 'r2m-async[{key}]', or set logging.{key} to null"
            )


class Trackers:
    """All trackers of a run. Use it as a context manager.

    Each is fed by a thread of its own, so that no step waits for a server. A tracker that fails while the run goes on is
    told and left: what it has ends there, and the files on the disk are whole.
    """

    def __init__(
        self, path: Path, config: R2MConfig, tell: Callable[[str], None], further: Mapping[str, Tracker] | None = None
    ) -> None:
        """Begins the run in each tracker that the config names.

        Args:
            path: the run directory.
            config: the config of the run.
            tell: is told what fails.
            further: trackers that were made already, by the key of the section `logging`.

        Raises ConfigError if a tracker cannot begin, and DiskError.
        """
        self._feeds: list[_Feed] = []
        for key, tracker in (further or {}).items():
            self._feeds.append(_Feed(key, tracker, tracker.last(), tell))
        for key, (_, kind) in TRACKERS.items():
            if (project := getattr(config.logging, key)) is not None:
                name = _name_of(path)
                try:
                    tracker, last = _begun(kind, project, path, name, config)
                    self._feeds.append(_Feed(key, tracker, last, tell))
                except Exception as error:
                    self.finish(done=False)
                    raise ConfigError(
                        f"logging.{key} is {project!r} and the tracker does not begin: {type(error).__name__}: {error}; "
                        f"mend that, or set logging.{key} to null"
                    ) from error

    def catch_up(self, steps: Records, evaluations: Records) -> None:
        """Sends what the run has measured before this start, as far as a tracker does not have it.

        steps, evaluations: records of metrics.jsonl and evaluation.jsonl, up to where the run goes on.
        """
        for feed in self._feeds:
            feed.catch_up(steps, evaluations)

    def step(self, metrics: Mapping[str, float]) -> None:
        """Sends the metrics of one policy step."""
        for feed in self._feeds:
            feed.log(metrics, is_evaluation=False)

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Sends the metrics of one evaluation."""
        for feed in self._feeds:
            feed.log(metrics, is_evaluation=True)

    def finish(self, done: bool, within: float | None = None) -> None:
        """Closes the run in each tracker, and waits for them.

        Args:
            done: whether the run came to its end.
            within: the most seconds to wait. None: `FINISHES_WITHIN`.
        """
        within = FINISHES_WITHIN if within is None else within
        for feed in self._feeds:
            feed.end(done)
        until = time.monotonic() + within
        for feed in self._feeds:
            feed.join(until, within)
        self._feeds = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.finish(done=kind is None, within=INTERRUPTED_WITHIN if interrupted else None)


def _begun(
    kind: Callable[[str, Path, str, R2MConfig], Tracker], project: str, path: Path, name: str, config: R2MConfig
) -> tuple[Tracker, tuple[int, int] | None]:
    """Begins the run in one tracker, and returns the tracker and what it has already. Raises what its library raises.

    Raises TimeoutError if that does not answer within `BEGINS_WITHIN` seconds.
    """
    begun: Future[tuple[Tracker, tuple[int, int] | None]] = Future()

    def begin() -> None:
        try:
            tracker = kind(project, path, name, config)
            begun.set_result((tracker, tracker.last()))
        except BaseException as error:
            begun.set_exception(error)

    # It must not keep Python from ending, like that of `_Feed`.
    threading.Thread(target=begin, name="r2m-tracker", daemon=True).start()
    if not wait([begun], BEGINS_WITHIN).done:
        abandoned.set()
        raise TimeoutError(f"it gave no answer in {BEGINS_WITHIN:g} s")
    return begun.result()


def _name_of(path: Path) -> str:
    """Returns what the run of a directory is called in its trackers. Raises DiskError.

    It has a random end: directories of the same name, made in one second in two places, are two runs. A copy of a directory under
    another name is another run.
    """
    file = path / TRACKED_AS
    if not file.exists() or not file.read_text(encoding="utf-8", errors="replace").startswith(f"{path.name}-"):
        write_file(file, f"{path.name}-{secrets.token_hex(4)}")
    return file.read_text(encoding="utf-8")


class _Feed:
    """A thread that hands over to one tracker what the run puts into its queue."""

    def __init__(self, key: str, tracker: Tracker, last: tuple[int, int] | None, tell: Callable[[str], None]) -> None:
        """key: of the section `logging`. last: what the tracker has already, as `Tracker.last` says it."""
        self._key, self._tracker, self._tell = key, tracker, tell
        self._last = None if last is None else list(last)
        self._queue: queue.SimpleQueue[tuple[dict[str, float], int] | bool] = queue.SimpleQueue()
        # It must not keep Python from ending: the library may stand in a call that never returns.
        self._thread = threading.Thread(target=self._work, name=f"r2m-{key}", daemon=True)
        self._thread.start()

    def catch_up(self, steps: Records, evaluations: Records) -> None:
        """See `Trackers.catch_up`. Tells what will stay in the tracker of steps that the run now takes again."""
        if self._last is None:
            return
        goes_on_after = int(steps[-1]["step"]) if steps else 0
        if self._last[0] > goes_on_after:
            self._tell(
                f"logging.{self._key}: has steps to {self._last[0]}, and the run goes on after {goes_on_after}: it keeps what "
                "it has of the steps that are now taken again; metrics.jsonl has the new ones"
            )
        for records, is_evaluation in ((steps, False), (evaluations, True)):
            for record in records:
                self.log(record, is_evaluation)

    def log(self, metrics: Mapping[str, float], is_evaluation: bool) -> None:
        """Sends metrics, but for those that are not finite, and those of single prompts, of which there may be thousands.

        Does nothing if the tracker has this step already.
        """
        step = int(metrics["step"])
        if self._last is not None:
            if step <= self._last[is_evaluation]:
                return
            self._last[is_evaluation] = step
        prefix = EVALUATION if is_evaluation else ""
        sent = [key for key, one in metrics.items() if math.isfinite(one) and not re.search(r"/\d+$", key)]
        if self._thread.is_alive():
            self._queue.put(({f"{prefix}{key}": float(metrics[key]) for key in sent}, step))

    def end(self, done: bool) -> None:
        """Has the tracker closed after all that was put before."""
        self._queue.put(done)

    def join(self, until: float, within: float) -> None:
        """Waits for the tracker to be closed, until a time of time.monotonic. Tells if it is not. within: for the message."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            abandoned.set()
            self._tell(
                f"logging.{self._key}: was not done {within:g} s after the end of the run, and is left; what it lacks "
                "is in metrics.jsonl and evaluation.jsonl"
            )

    def _work(self) -> None:
        try:
            while not isinstance(item := self._queue.get(), bool):
                self._tracker.log(*item)
            self._tracker.finish(item)
        except BaseException as error:  # a library may raise SystemExit, too, which would end the thread without a word
            self._tell(
                f"logging.{self._key}: {type(error).__name__}: {error}; the run goes on without this tracker. metrics.jsonl and "
                "evaluation.jsonl have everything; when the run is resumed, what the tracker lacks is sent"
            )
