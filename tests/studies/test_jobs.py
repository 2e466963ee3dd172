"""Jobs in processes: one that is killed fails alone, and Ctrl-C ends them all."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from processes import left_of, word_of

from r2m_async.data.records import BadRecord
from r2m_async.studies.jobs import WorkerProcesses, failures, wait_for

# Jobs: imported by the processes that do them.


def seconds(number: float) -> float:
    time.sleep(number)
    return number


def end(how: str) -> float:
    if how == "exits":
        os._exit(1)
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(reason: str) -> float:
    raise ValueError(reason)


def begin(name: str) -> float:
    """A long job that first tells its process's number."""
    with open("begun", "w") as pipe:
        pipe.write(f"{os.getpid()}\n")
    return seconds(600)


def test_a_job_whose_process_is_killed_fails_alone_and_leaves_its_reason(tmp_path):
    told: list[str] = []
    with WorkerProcesses(2) as processes:
        jobs = {
            "good": (seconds, 0.5),
            "exits": (end, "exits"),
            "killed": (end, "killed"),
            "wrong": (refuse, "too bad"),
        }
        jobs |= {f"late-{number}": (seconds, 0.1) for number in range(4)}
        work = {processes.submit(*job): tmp_path / name for name, job in jobs.items()}
        assert sorted(wait_for(work, told.append)) == ["exits", "killed", "wrong"]
        reasons = failures(work.values())
        lost = "ChildProcessError: its process was killed; was the machine out of memory?"
        assert reasons == {"exits": lost, "killed": lost, "wrong": "ValueError: too bad"}
        assert len(told) == 8 and f"exits failed: {lost}" in told
        again = {processes.submit(seconds, 0.0): tmp_path / name for name in reasons}
        assert wait_for(again, told.append) == [] and failures(work.values()) == {}


class OfTwo(Exception):
    """As the errors of many libraries are: it cannot be made from its message alone."""

    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")


def fails_strangely(reason: str) -> float:
    if reason == "a bad record":
        raise BadRecord("too_long", "data.jsonl, line 3: is too long")
    raise OfTwo(7, "the server is down") if reason == "of two" else OfTwo(8, threading.Lock())


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("a bad record", "^data.jsonl, line 3: is too long$"),
        ("of two", r"(?s)^Traceback .*fails_strangely.*OfTwo: 7: the server is down$"),
        ("a lock", r"(?s)^Traceback .*OfTwo: 8: <unlocked"),
    ],
)
def test_an_error_that_another_process_cannot_read_is_told_and_is_no_killed_process(reason, told):
    with WorkerProcesses(1) as processes, pytest.raises(Exception, match=told) as raised:
        processes.submit(fails_strangely, reason).result()
    assert not isinstance(raised.value, ChildProcessError)


def test_a_worker_keeps_its_process_from_job_to_job():
    with WorkerProcesses(1) as processes:
        first, *others = [processes.submit(os.getpid).result() for _ in range(3)]
        assert others == [first] * 2 and first != os.getpid()


@pytest.mark.parametrize("to_all", [True, False], ids=["as_a_terminal_does", "to_the_command_alone"])
def test_ctrl_c_cancels_what_waits_and_ends_what_runs(tmp_path, to_all):
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\n"
        "from r2m_async.studies.jobs import WorkerProcesses, wait_for\n"
        "from test_jobs import begin\n"
        "with WorkerProcesses(2) as processes:\n"
        "    wait_for({processes.submit(begin, str(number)): Path(str(number)) for number in range(6)}, print)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    os.mkfifo(tmp_path / "begun")
    begun = os.open(tmp_path / "begun", os.O_RDWR)
    running: list[psutil.Process] = []
    command = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, start_new_session=True, stderr=subprocess.PIPE
    )
    try:
        while len(running) < 2:
            word = word_of(begun, seconds=120)
            assert word
            running += [psutil.Process(int(pid)) for pid in word.split()]
        (os.killpg if to_all else os.kill)(command.pid, signal.SIGINT)
        errors = command.communicate(timeout=30)[1]
    finally:
        command.kill()
    assert command.returncode == -signal.SIGINT and errors.count(b"Traceback") == 1
    assert left_of(running) == []
    assert word_of(begun, seconds=0) == "", "a job that waited has begun"
    os.close(begun)
