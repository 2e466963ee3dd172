"""Stages in real processes that fail, hang and die; and Ray itself, frozen, dead or not there. One small stage, no models."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from ray._private.runtime_env.context import RuntimeEnvContext

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, FunctionFailed, StageLost
from r2m_async.launch import forked_workers
from r2m_async.ring.stages import Stage, method

pytestmark = pytest.mark.ring


class Worker:
    """A stage that does as it is told."""

    def work(self, what):
        if what == "times out":
            raise TimeoutError("the sandbox of the user's function")
        if what == "fails":
            raise FunctionFailed("step 1, group 4, response 2: reward.functions 'mine:f' raised ZeroDivisionError")
        if what == "mistake":
            raise ConfigError("reward.clip is wrong")
        if what == "breaks":
            raise ZeroDivisionError("in a library")
        if what == "sleeps":
            time.sleep(600)
        if what == "lost":
            raise StageLost(None, "its engine died")
        if what == "speaks":
            print("what a user's function prints")
        return (what,)

    def work_beside(self, what):
        return self.work(what)

    def make(self, value):
        return None, value

    def read(self, values):
        return (values,)


class WorkerStage(Stage):
    @method()
    def work(self, what):
        """Does it."""

    @method(beside="generate")
    def work_beside(self, what):
        """Does it, while something else may be done."""

    @method(1)
    def make(self, value):
        """A payload."""

    @method()
    def read(self, values):
        """What came of payloads."""


def healthy(config, workload):
    return Worker()


def dies_as_it_starts(config, workload):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def stage(ray_session):
    """`stage(make, deadline)`, ended with the test."""
    from ray import cloudpickle

    from r2m_async.launch.ray_stages import RayStage

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    made = []

    def launch(make=healthy, deadline=None):
        options = {"num_cpus": 0, "max_restarts": 0}
        made.append(RayStage("worker-0", make, R2MConfig(), None, deadline, options))
        return WorkerStage(made[-1])

    yield launch
    for one in made:
        one.kill()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_a_timeout_of_the_users_own_is_told_as_his_and_the_process_lives(stage):
    async def run():
        worker = stage(deadline=300.0)
        before = await worker.carrier.pid()
        with pytest.raises(TimeoutError, match="the sandbox of the user's function"):
            await worker.work("times out")
        assert await worker.carrier.pid() == before
        with pytest.raises(FunctionFailed, match="group 4, response 2") as failed:
            await worker.work("fails")
        assert type(failed.value) is FunctionFailed and "ray::" not in str(failed.value)
        with pytest.raises(ConfigError, match=r"^reward\.clip is wrong$"):
            await worker.work("mistake")
        with pytest.raises(ZeroDivisionError, match="in a library"):
            await worker.work("breaks")

    asyncio.run(run())


def test_a_hung_process_is_killed_named_and_replaced(stage):
    async def run():
        worker = stage(deadline=5.0)
        hung = psutil.Process(await worker.carrier.pid())
        with pytest.raises(StageLost, match=r"worker-0 did not finish work within 5\.0 s \(rollouts\.hang_after\)"):
            await worker.work("sleeps")
        await worker.restart()
        assert await worker.carrier.pid() != hung.pid
        assert await worker.work("well") == "well"
        hung.wait(30)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("first", "deadline", "reason"),
    [
        ("lost", 300.0, "worker-0: its engine died"),
        ("sleeps", 5.0, r"worker-0 did not finish work(_beside)? within 5\.0 s \(rollouts\.hang_after\)"),
    ],
)
def test_all_calls_of_a_process_that_is_killed_are_told_why(stage, first, deadline, reason):
    async def run():
        worker = stage(deadline=deadline)
        await worker.work("well")
        calls = (asyncio.ensure_future(call) for call in (worker.work(first), worker.work_beside("sleeps")))
        told = {str(error) for error in await asyncio.gather(*calls, return_exceptions=True)}
        assert len(told) == 1 and re.fullmatch(reason, told.pop())

    asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_frozen_process_is_replaced(stage, number):
    async def run():
        worker = stage(deadline=15.0)
        assert await worker.work("well") == "well"
        old = psutil.Process(await worker.carrier.pid())
        old.send_signal(number)
        with pytest.raises(StageLost, match="worker-0"):
            await worker.work("well")
        await worker.restart()
        assert await worker.work("well") == "well"
        new = psutil.Process(await worker.carrier.pid())
        assert forked_workers.__file__ in new.parent().cmdline(), "its imports were made before"
        old.wait(30)

    asyncio.run(run())


NOT_RAYS = """
import os, sys
print("its own way", os.path.basename(sys.argv[0]), *sys.argv[1:])
"""


def serialized(**context):
    """A runtime environment as Ray hands it to its setup worker."""
    return f"--serialized-runtime-env-context={RuntimeEnvContext(**context).serialize()}"


OTHERS = {
    "another library's variable": serialized(env_vars={"OMP_NUM_THREADS": "4"}),
    "another Python": serialized(py_executable="/usr/bin/python"),
    "a container": serialized(override_worker_entrypoint="/worker.py"),
    "a prefix": serialized(command_prefix=["cd", "/"]),
}


@pytest.mark.parametrize("answer", ["nobody", "no", "silence", *OTHERS])
def test_a_worker_that_nobody_forks_is_started_in_rays_own_way(tmp_path, answer):
    (tmp_path / "setup_worker.py").write_text(NOT_RAYS)
    arguments = ["--language=PYTHON", str(tmp_path / "default_worker.py"), "--node-ip-address=10.0.0.1"]
    if answer in OTHERS:
        arguments.insert(0, OTHERS[answer])
    ask = f"import sys; from r2m_async.launch import forked_workers as f; f.PATIENCE = 0.5; f.ask({arguments})"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0r2m-test-{os.getpid()}")
        if answer != "nobody":
            listener.listen()
        environment = os.environ | {forked_workers.ADDRESS: f"r2m-test-{os.getpid()}"}
        with subprocess.Popen([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True, env=environment) as asks:
            if answer == "no":
                connection, _ = listener.accept()
                connection.recv(1 << 20)
                connection.send(b"no")
            said = asks.stdout.readline()  # no end comes: what was sent in silence keeps the output open
        if answer in OTHERS:
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
    assert said.split() == " ".join(["its own way setup_worker.py", *arguments]).split()


def test_a_trial_of_tune_has_its_workers_forked_with_its_variables():
    arguments = [serialized(env_vars={"PL_DISABLE_FORK": "1"}), "/ray/default_worker.py", "--node-ip-address=10.0.0.1"]
    ask = f"from r2m_async.launch import forked_workers as f; f.ask({arguments})"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0r2m-test-{os.getpid()}")
        listener.listen()
        environment = os.environ | {forked_workers.ADDRESS: f"r2m-test-{os.getpid()}"}
        with subprocess.Popen([sys.executable, "-c", ask], env=environment) as asks:
            connection, _ = listener.accept()
            worker = json.loads(connection.recv(1 << 20))
            connection.send(b"yes")
            assert asks.wait() == 0
    assert (worker["program"], worker["arguments"]) == ("/ray/default_worker.py", arguments[2:])
    assert worker["environment"] == environment | {"PL_DISABLE_FORK": "1"}


def test_a_process_that_dies_whenever_it_starts_is_told_at_once_with_the_reason(stage):
    """Ray's own restarts went on for RESTART_TIMEOUT, and the reason was empty."""

    async def run():
        worker = stage(dies_as_it_starts)
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(StageLost, match=r"worker-0 did not come back: \S"):
                await worker.restart()
        assert time.monotonic() - began < 200

    asyncio.run(run())


def test_payloads_are_found_wherever_they_stand_in_the_arguments(stage):
    """One in a tuple or a dict once ended as an object that the codec cannot write."""

    async def run():
        worker = stage()
        made = [(await worker.make(number))[1] for number in range(4)]
        given = [1, made[0], [made[1]], (made[2], "text"), {"key": made[3], "other": None}]
        assert await worker.read(given) == [1, 0, [1], (2, "text"), {"key": 3, "other": None}]

    asyncio.run(run())


# Ray itself, in a process of its own


SCRIPT = """
    import os, sys, time
    sys.path.insert(0, {tests!r})
    import test_ray_processes as stages
    from ray import cloudpickle
    from r2m_async.config import R2MConfig
    from r2m_async.launch.ray_stages import RayProcesses
    cloudpickle.register_pickle_by_value(stages)
    processes = RayProcesses(R2MConfig())
    worker = processes.stage("worker-0", stages.healthy, None, 0.0)
    import asyncio
    print("pid", asyncio.run(worker.pid()), flush=True)
"""


def script(text):
    return textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent)) + textwrap.dedent(text)


def run_script(text, **environment):
    command = [sys.executable, "-c", script(text)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


def descendants(pid):
    return psutil.Process(pid).children(recursive=True)


def gone(processes, seconds=30.0):
    _, alive = psutil.wait_procs(processes, seconds)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("frozen", ["raylet", "gcs_server", pytest.param("worker", marks=pytest.mark.cross)])
def test_closing_ends_every_process_whatever_is_frozen(frozen):
    text = """
        sys.stdin.readline()
        began = time.monotonic()
        processes.close()
        print("closed after", time.monotonic() - began, flush=True)
        sys.stdin.readline()
    """
    command = [sys.executable, "-c", script(text)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        _, pid = driver.stdout.readline().split()
        children = descendants(driver.pid)
        victim = int(pid) if frozen == "worker" else next(one.pid for one in children if frozen in one.name())
        os.kill(victim, signal.SIGSTOP)
        print("go", file=driver.stdin, flush=True)
        closed = driver.stdout.readline()
        assert closed.startswith("closed after"), closed
        assert float(closed.split()[-1]) < 60
        assert gone(children), "orphans"
        print("go", file=driver.stdin, flush=True)


def test_a_head_that_dies_ends_the_watch_with_a_message_long_before_ray_ends_the_driver():
    text = """
        from r2m_async.launch import ray_connection
        from r2m_async.errors import StageLost
        ray_connection.WATCH_EVERY = 0.2
        sys.stdin.readline()
        try:
            asyncio.run(processes.ray.watch())
        except StageLost as lost:
            print(lost, flush=True)
        processes.close()
        print("closed", flush=True)
        os._exit(0)
    """
    command = [sys.executable, "-c", script(text)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        driver.stdout.readline()
        children = descendants(driver.pid)
        next(one for one in children if "gcs_server" in one.name()).kill()
        print("go", file=driver.stdin, flush=True)
        assert "the head of the Ray cluster at" in driver.stdout.readline()
        assert driver.stdout.readline() == "closed\n"
        assert gone(children), "orphans"


@pytest.mark.parametrize("seen", [True, pytest.param(False, marks=pytest.mark.cross)])
def test_what_a_stage_prints_is_seen_under_its_name_unless_told_otherwise(seen):
    told = script("""
        async def speak():
            await stages.WorkerStage(worker).work("speaks")
        asyncio.run(speak())
        if not SEEN:
            time.sleep(3)  # Ray's monitor reads the files in which processes print
            print("the end", flush=True)
        sys.stdin.readline()
        processes.close()
    """)
    told = told.replace("RayProcesses(R2MConfig())", f"RayProcesses(R2MConfig().logging(actors={seen}))")
    command, pipe = [sys.executable, "-c", f"SEEN = {seen}\n{told}"], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True) as driver:
        for line in driver.stdout:
            if "what a user's function prints" in line or line == "the end\n":
                break
        print("go", file=driver.stdin, flush=True)
        rest = driver.stdout.read()
    assert ("worker-0" in line and "what a user's function prints" in line) == seen
    assert seen or "what a user's function prints" not in rest


def nobody():
    """An address at which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return "{}:{}".format(*listener.getsockname())


@pytest.mark.parametrize("form", ["{}", pytest.param("ray://{}", marks=pytest.mark.cross)])
def test_a_ray_address_that_nobody_answers_is_the_users_mistake_and_told_at_once(form):
    address = form.format(nobody())
    done = run_script("", RAY_ADDRESS=address)
    _, said = done.communicate(timeout=120)
    assert f"RAY_ADDRESS is '{address}' and no Ray cluster answers there" in said and "unset RAY_ADDRESS" in said


def test_a_cluster_that_was_started_last_on_this_machine_is_not_joined_without_being_asked(tmp_path):
    """Ray itself looks into this file, and would try for three minutes to reach a cluster that is dead."""
    folder = Path(tempfile.mkdtemp(prefix="r2m-", dir="/tmp"))  # Ray's sockets need a short path
    try:
        (folder / "ray").mkdir()
        (folder / "ray" / "ray_current_cluster").write_text(nobody())
        done = run_script("print('its own')", RAY_TMPDIR=str(folder), RAY_ADDRESS="")
        printed, said = done.communicate(timeout=120)
        assert "its own" in printed, said
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_something_else_that_listens_at_ray_address_is_given_up_in_time():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = "{}:{}".format(*listener.getsockname())
        text = script("").replace(
            "processes = ",
            "from r2m_async.launch import ray_connection; ray_connection.START_TIMEOUT = 3.0\nprocesses = ",
            1,
        )
        began = time.monotonic()
        driver = subprocess.run(
            [sys.executable, "-c", text + "\n"],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"RAY_ADDRESS": address},
        )
        assert f"RAY_ADDRESS is '{address}'; is that cluster up?" in driver.stderr
        assert time.monotonic() - began < 200
