"""What a process is doing, read from outside or written by itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r2m_async.errors import StalledRun
from r2m_async.launch import stacks
from r2m_async.launch.ring import Ring
from r2m_async.launch.stacks import stack_of

SLEEPER = """
import time
from r2m_async.launch.stacks import can_be_asked
can_be_asked()
def in_a_deep_sleep():
    print("asleep", flush=True)
    time.sleep(600)
in_a_deep_sleep()
"""


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "asleep\n"
    yield process
    process.kill()
    process.wait()


def test_py_spy_shows_the_function_of_a_process_also_if_it_is_stopped(sleeper):
    if not stacks._by_py_spy(sleeper.pid):
        pytest.skip("this system lets nobody read another process")
    assert "in_a_deep_sleep" in stack_of(sleeper.pid)
    sleeper.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    told = stack_of(sleeper.pid)
    assert told.startswith("the process is stopped (SIGSTOP)\n") and "in_a_deep_sleep" in told


def test_without_py_spy_a_process_writes_its_stacks_itself_each_time_it_is_asked(sleeper, monkeypatch):
    monkeypatch.setattr(stacks, "_by_py_spy", lambda pid: "")
    for _ in range(2):
        told = stack_of(sleeper.pid)
        assert told.count("in_a_deep_sleep") == 1 and "most recent call first" in told
    sleeper.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    assert "a stopped process cannot write its stacks" in stack_of(sleeper.pid)


def test_a_process_needs_no_disk_to_write_its_stacks(sleeper):
    """It may be full, and a file of the name may be there already: process numbers come again."""
    opened = [os.readlink(link) for link in Path(f"/proc/{sleeper.pid}/fd").iterdir()]
    assert [link for link in opened if "r2m-stacks" in link] == ["/memfd:r2m-stacks (deleted)"]


def test_a_process_that_is_gone_or_was_not_told_says_so(monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert stack_of(gone.pid) == "the process is gone"
    monkeypatch.setattr(stacks, "_by_py_spy", lambda pid: "")
    silent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert stack_of(silent.pid) == "the process was not told to write its stacks"
    finally:
        silent.kill()
        silent.wait()


@pytest.mark.ring
@pytest.mark.usefixtures("ray_session")
def test_a_ring_that_stands_still_shows_what_the_frozen_stage_was_doing(tiny_config):
    config = tiny_config.scheduling(stall_after=12.0)
    with Ring.of(config) as ring:
        ring.step()
        os.kill(ring.process_ids()["policy-learner"][0], signal.SIGSTOP)
        with pytest.raises(StalledRun) as raised:
            while True:
                ring.step()
    said = str(raised.value)
    assert "policy-learner" in said and "the process is stopped (SIGSTOP)" in said
    assert said.count("--- ") == said.count("--- policy-learner, process "), "of the stages that are waited for alone"
