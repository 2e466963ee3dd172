"""W&B, MLflow and trackio get what a run measures: each for real, on this machine, without an account and a network."""

import importlib.util
import json
import math
import re
import shutil
import socket
import sqlite3
import struct
import threading

import pytest
from run_records import EVALUATIONS, step_metrics

from r2m_async.errors import ConfigError
from r2m_async.interruption import LEAVE_TIMEOUT, Interrupted
from r2m_async.launch.training import train
from r2m_async.launch.workload import check_code
from r2m_async.runs import trackers as module
from r2m_async.runs.directory import RunDirectory, new_directory
from r2m_async.runs.records import read_metrics
from r2m_async.runs.trackers import Trackers

KEYS = ("wandb", "mlflow", "trackio")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Where the trackers keep their runs. Nothing that they ask of the network gets out, and whatever they ask is an error."""
    folder, asked = tmp_path_factory.mktemp("trackers"), []
    with socket.create_server(("127.0.0.1", 0)) as proxy, pytest.MonkeyPatch.context() as patch:

        def listen():
            while True:
                try:
                    connection, _ = proxy.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(200))

        threading.Thread(target=listen, daemon=True).start()
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
            patch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy", "HF_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("HF_HOME", str(folder / "huggingface"))
        yield folder
        proxy.shutdown(socket.SHUT_RDWR)
    assert asked == []


def needs(key):
    """Skips a test if the package of a tracker is not there. The extra `test` has those that CI must run."""
    if importlib.util.find_spec(key) is None:
        pytest.skip(f"pip install 'r2m-async[{key}]'")


def name_of(path):
    return (path / "tracked_as").read_text()


def kept(key, path, here):
    """What a tracker has of a run, read back without this package: (step, value) by metric."""
    found: dict[str, list[tuple[int, float]]] = {}
    if key == "mlflow":
        from mlflow.tracking import MlflowClient

        client = MlflowClient()
        (run,) = client.search_runs(
            [client.get_experiment_by_name("r2m").experiment_id], f"tags.`r2m_async.run` = '{name_of(path)}'"
        )
        assert run.info.run_name == path.name and run.data.params["scheduling.max_policy_age"] == "2"
        for name in run.data.metrics:
            found[name] = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
    elif key == "trackio":
        with sqlite3.connect(here / "trackio" / "r2m.db") as database:
            rows = database.execute("SELECT step, metrics FROM metrics WHERE run_name = ?", (name_of(path),)).fetchall()
            ((num_runs,),) = database.execute(
                "SELECT COUNT(DISTINCT run_id) FROM metrics WHERE run_name = ?", (name_of(path),)
            )
        assert num_runs == 1
        for step, metrics in rows:
            for name, value in json.loads(metrics).items():
                found.setdefault(name, []).append((step, value))
    else:
        import wandb

        wandb.teardown()  # W&B's own process closes the file, after `finish` has returned
        for row in offline_rows(sorted(path.glob("wandb/offline-run-*/*.wandb"))[-1]):
            step = int(row.get("step", row.get("evaluation/step")))
            for name, value in row.items():
                found.setdefault(name, []).append((step, value))
    return {name: sorted(values) for name, values in found.items()}


def offline_records(path):
    """The records in an offline file of W&B: a log in LevelDB's format, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record, records = path.read_bytes(), 7, b"", []  # the file begins with 7 bytes of its own
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no header fits into the rest of a block
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            records.append(Record.FromString(record))
            record = b""
    return records


def offline_rows(path):
    """The points in an offline file of W&B."""
    rows = [record.history.item for record in offline_records(path) if record.HasField("history")]
    return [{one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in row} for row in rows]


@pytest.mark.parametrize("key", KEYS)
def test_a_tracker_has_every_step_and_evaluation_once_though_the_run_was_killed_and_resumed(key, config, here):
    needs(key)
    config, told = config.logging(**{key: "r2m"}), []
    evaluations = [one | {"frozen/0": 0.5} for one in EVALUATIONS]
    path = new_directory(config.run.output_dir, config.run.name, config)
    trackers = Trackers(path, config, told.append)
    with pytest.raises(KeyboardInterrupt), trackers, RunDirectory(path, config, trackers=trackers) as run:
        run.write_step(step_metrics(1, **{"policy/loss": math.nan, "reward/inf": math.inf}))
        run.write_evaluations(evaluations[:1], [])
        run.write_step(step_metrics(2))
        lengths = run.lengths()
        run.write_step(step_metrics(3))
        raise KeyboardInterrupt
    assert told == []
    trackers = Trackers(path, config, told.append)
    with trackers, RunDirectory.resume(path, config, 2, lengths, 1, trackers) as run:
        run.write_step(step_metrics(3, **{"reward/gold": 7.0}))
        run.write_evaluations(evaluations, [])
        run.write_step(step_metrics(4))
    found = kept(key, path, here)
    again = 7.0 if key == "wandb" else 1.25
    assert found["reward/gold"] == [(1, 1.75), (2, 1.5), (3, again), (4, 1.0)]
    assert found["evaluation/gold"] == [(0, 1.5), (2, 1.25)]
    assert found["policy/loss"] == [(step, -0.5 * step) for step in (2, 3, 4)] and not found.keys() & {
        "reward/inf",
        "evaluation/frozen/0",
    }
    if key == "wandb":  # offline: the second start has its own file, with all of the run
        assert told == []
        first, second = sorted(path.glob("wandb/offline-run-*/*.wandb"))
        assert (first.stem, second.stem) == (f"run-{name_of(path)}", f"run-{name_of(path)}-1")
        assert [row["reward/gold"] for row in offline_rows(first) if "reward/gold" in row] == [1.75, 1.5, 1.25]
        axes = {record.metric.name: record.metric.step_metric for record in offline_records(second)}
        assert (axes["reward/gold"], axes["evaluation/gold"]) == ("step", "evaluation/step")
    else:
        (line,) = told
        assert line.startswith(f"logging.{key}: has steps to 3, and the run goes on after 2: it keeps what it has")


def test_a_tracker_that_is_named_only_when_a_run_is_resumed_gets_the_steps_before(config, here):
    needs("trackio")
    with RunDirectory.create(config) as run:
        run.write_step(step_metrics(1))
        run.write_evaluations(EVALUATIONS[:1], [])
        lengths = run.lengths()
    config = config.logging(trackio="r2m")
    with Trackers(run.path, config, print) as trackers:
        RunDirectory.resume(run.path, config, 1, lengths, 1, trackers).close()
    found = kept("trackio", run.path, here)
    assert found["reward/gold"] == [(1, 1.75)] and found["evaluation/gold"] == [(0, 1.5)]


def test_runs_of_one_name_in_two_places_are_two_and_so_is_a_copy(config, here, tmp_path):
    needs("trackio")
    paths = [tmp_path / "a" / "same", tmp_path / "b" / "same", tmp_path / "copy"]
    for step, path in enumerate(paths[:2], 1):
        path.mkdir(parents=True)
        with Trackers(path, config.logging(trackio="r2m"), print) as trackers:
            trackers.step(step_metrics(step))
    shutil.copytree(paths[0], paths[2])
    with Trackers(paths[2], config.logging(trackio="r2m"), print) as trackers:
        trackers.step(step_metrics(3))
    assert [kept("trackio", path, here)["reward/gold"] for path in paths] == [[(1, 1.75)], [(2, 1.5)], [(3, 1.25)]]


def test_a_tracker_that_keeps_nothing_says_so_at_the_end(config, here):
    needs("trackio")
    config, told = config.logging(trackio="broken"), []
    path = new_directory(config.run.output_dir, "demo", config)
    with Trackers(path, config, told.append) as trackers:
        (here / "trackio" / "broken.db").mkdir()  # root may write everywhere, but not into this
        trackers.step(step_metrics(1))
    (line,) = told
    assert line.startswith("logging.trackio: ")


class Fails:
    """A tracker whose server goes away after a step."""

    def __init__(self, project, path, name, config):
        self.logged, self.finished, self.hangs = [], [], threading.Event()
        self.hangs.set()
        Fails.made = self

    def last(self):
        return -1, -1

    def log(self, metrics, step):
        assert self.hangs.wait(60)
        if step > 1:
            raise ConnectionError("no route to host")
        self.logged.append((metrics, step))

    def finish(self, done):
        self.finished.append(done)


@pytest.fixture(autouse=True)
def nothing_abandoned():
    yield
    module.abandoned.clear()


@pytest.fixture
def failing(monkeypatch):
    monkeypatch.setattr(module, "TRACKERS", {"wandb": ("json", Fails)})


@pytest.mark.models
def test_a_tracker_that_fails_ends_no_run_and_is_told_once(tiny_config, failing, tmp_path, capsys):
    config = tiny_config.run(output_dir=str(tmp_path)).logging(wandb="r2m", live=False, tensorboard=False)
    path = train(config, in_process=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("logging.wandb")]
    assert line.startswith("logging.wandb: ConnectionError: no route to host; the run goes on without this tracker.")
    steps = read_metrics(path / "metrics.jsonl")
    assert [one["step"] for one in steps] == [1, 2, 3] and (path / "report.html").exists()
    ((metrics, step),) = [one for one in Fails.made.logged if "step" in one[0]]
    assert step == 1 and metrics == {name: value for name, value in steps[0].items() if math.isfinite(value)}


@pytest.mark.parametrize("done", [True, False])
def test_a_tracker_hears_how_the_run_ended(config, failing, tmp_path, done):
    trackers = Trackers(tmp_path, config.logging(wandb="r2m"), print)
    trackers.__exit__(None if done else ValueError)
    assert Fails.made.finished == [done]


def test_no_step_waits_for_a_tracker_and_the_end_waits_no_longer_than_it_may(config, failing, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FINISHES_WITHIN", 0.05)
    told = []
    with Trackers(tmp_path, config.logging(wandb="r2m"), told.append) as trackers:
        Fails.made.hangs.clear()
        trackers.step(step_metrics(1))
    Fails.made.hangs.set()
    (line,) = told
    assert line.startswith("logging.wandb: was not done 0.05 s after the end of the run, and is left;")
    assert module.abandoned.is_set()


def test_a_run_that_is_asked_to_leave_waits_less_for_its_trackers_than_the_process_has(config, failing, tmp_path):
    assert 2 * module.INTERRUPTED_WITHIN < LEAVE_TIMEOUT < module.FINISHES_WITHIN
    waited = []
    trackers = Trackers(tmp_path, config.logging(wandb="r2m"), print)
    (feed,) = trackers._feeds
    join = feed.join
    feed.join = lambda until, within: [waited.append(within), join(until, within)]
    trackers.__exit__(Interrupted)
    assert waited == [module.INTERRUPTED_WITHIN] and Fails.made.finished == [False]


def test_a_tracker_that_never_begins_is_given_up_with_its_key(config, tmp_path, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(module, "BEGINS_WITHIN", 0.05)
    monkeypatch.setattr(module, "TRACKERS", {"mlflow": ("json", lambda *_: go.wait(60))})
    complaint = r"logging\.mlflow is 'r2m' and the tracker does not begin: TimeoutError: it gave no answer in 0.05 s"
    with pytest.raises(ConfigError, match=complaint):
        Trackers(tmp_path, config.logging(mlflow="r2m"), print)
    go.set()
    assert module.abandoned.is_set()


def test_a_tracker_that_does_not_begin_ends_the_run_before_its_first_step(config, here, tmp_path, monkeypatch):
    def refuses(*_):
        raise ValueError("no API key")

    monkeypatch.setattr(module, "TRACKERS", {"wandb": ("json", refuses)})
    complaint = r"logging\.wandb is 'r2m' and the tracker does not begin: ValueError: no API key; mend that, or set"
    with pytest.raises(ConfigError, match=complaint):
        Trackers(tmp_path, config.logging(wandb="r2m"), print)


def test_trackio_with_a_server_is_refused(config, tmp_path, here, monkeypatch):
    needs("trackio")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    with pytest.raises(
        ConfigError, match=r"logging\.trackio is 'r2m' .* TRACKIO_SPACE_ID, .* `trackio sync` afterwards"
    ):
        Trackers(tmp_path, config.logging(trackio="r2m"), print)


@pytest.mark.parametrize("key", KEYS)
def test_a_package_that_is_not_installed_is_named_with_its_extra(key, tiny_config, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == key else find(name, *rest))
    complaint = f"logging.{key} is 'r2m' and the package {key} is not installed: pip install 'r2m-async[{key}]', or set"
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        check_code(tiny_config.logging(**{key: "r2m"}))
