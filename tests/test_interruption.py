"""Ctrl-C, SIGTERM and SIGHUP: the status, the message, and that nothing keeps a process from leaving."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import psutil
import pytest

from r2m_async.interruption import Interrupted, interruptible

COMMAND = """
    import ctypes, os, signal, sys, time
    from r2m_async import R2MConfig, cli, interruption

    signal.signal(signal.SIGHUP, signal.{hang_up})

    mutex, libc = bytes(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)

    def command(file, overrides):
        try:
            print("running", flush=True)  # from here on the signal may come, and the clean-up follows wherever it does
            {waits}
        finally:
            {cleans_up}

    R2MConfig.from_yaml = command  # what every command that has a config does first
    interruption.LEAVE_TIMEOUT = {patience}
    cli.entry()
"""
SLEEP = "time.sleep(300)"
# A mutex that is locked already: signals do not interrupt this wait, as they do not interrupt a collective.
LOCK = "libc.pthread_mutex_lock(mutex)"
BODIES = {"waits": (SLEEP, "pass"), "cleans up for ever": (SLEEP, SLEEP), "is inside of a library": (LOCK, LOCK)}


def start(tmp_path, body, patience=60.0, hang_up="SIG_DFL"):
    (tmp_path / "empty.yaml").touch()
    waits, cleans_up = BODIES[body]
    code = textwrap.dedent(COMMAND).format(waits=waits, cleans_up=cleans_up, patience=patience, hang_up=hang_up)
    process = subprocess.Popen(
        [sys.executable, "-c", code, "check", str(tmp_path / "empty.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "running\n", process.stderr.read()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_told_and_is_the_status(tmp_path, number):
    process = start(tmp_path, "waits")
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (128 + number, f"r2m: interrupted by {number.name}\n")


@pytest.mark.parametrize("body", ["cleans up for ever", "is inside of a library"])
def test_whatever_hangs_the_process_leaves_in_time_with_the_signals_status(tmp_path, body):
    process = start(tmp_path, body, patience=0.5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (143, "r2m: interrupted by SIGTERM; its clean-up did not end\n")


def test_a_second_signal_ends_the_clean_up(tmp_path):
    process = start(tmp_path, "cleans up for ever", patience=600.0)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode in (143, 130)


def test_a_signal_that_is_ignored_from_the_start_stays_ignored(tmp_path):
    process = start(tmp_path, "waits", hang_up="SIG_IGN")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143


def test_handlers_are_put_back_and_other_threads_left_alone():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(Interrupted) as raised, interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert raised.value.status == 143 and isinstance(raised.value, KeyboardInterrupt)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    for thread in threading.enumerate():
        if thread.name == "r2m-signals":
            thread.join(30)
            assert not thread.is_alive()

    def elsewhere():
        with interruptible():
            pass

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()


@pytest.mark.ring
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.cross)])
def test_a_training_run_leaves_with_the_status_names_what_is_left_and_leaves_no_process(tiny_config, tmp_path, number):
    """Ray's C++ side takes SIGTERM for itself: it printed a stack and aborted the driver three seconds later."""
    config = tiny_config.run(num_steps=10_000, output_dir=str(tmp_path / "runs")).checkpoint(every=1)
    (tmp_path / "config.yaml").write_text(config.logging(tensorboard=False).to_yaml())
    command = [sys.executable, "-m", "r2m_async.cli", "train", str(tmp_path / "config.yaml")]
    with open(tmp_path / "stderr", "wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.communicate(timeout=120)
    said = (tmp_path / "stderr").read_text()
    assert process.returncode == 128 + number, said
    assert "SIGTERM received at time" not in said, "Ray's C++ stack"
    (run,) = (tmp_path / "runs").iterdir()
    told = f"r2m: interrupted by {number.name}\nWhat was measured is in {run}.\nThe last whole checkpoint is {run}"
    assert told + f"{os.sep}checkpoints{os.sep}step-" in said
    _, alive = psutil.wait_procs(children, 30)
    assert not alive, "orphans"


def test_a_loop_whose_thread_has_ended_is_told_at_once():
    from r2m_async.errors import StalledRun
    from r2m_async.launch.loop_thread import LoopThread

    async def ends():
        raise SystemExit("in a task")

    loop = LoopThread("ends")
    with pytest.raises(BaseException) as first:
        loop.run(ends(), patience=600.0)
    assert isinstance(first.value, SystemExit | StalledRun)
    loop._thread.join(30)

    async def later():
        return 1

    with pytest.raises(StalledRun, match=r"the controller's thread was ended by SystemExit\('in a task'"):
        loop.run(later(), patience=600.0)
    assert loop._stack() == "", "the stack of another thread is not its own"
    loop.stop()
