"""The end of the process that has a vLLM engine, and what is left then."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from engines import config_of
from processes import left_of, word_of

ROOT = Path(__file__).resolve().parents[2]
OWNERS = """
# The imports take most of the time and are made once. Each owner is then a process of its own, forked, that runs to the
# end of this file as a program does. This process tells their numbers, waits for them, and tells how they ended.
import json, os, sys

import psutil
from transformers import AutoTokenizer

import actors.state_slab
from actors.vllm_engine import VLLMEngine
from r2m_async.config import R2MConfig

root, config, owners = sys.argv[1], R2MConfig.from_dict(json.loads(sys.argv[2])), json.loads(sys.argv[3])


def own(how):
    actors.state_slab.DIRECTORY = os.path.join(root, how)
    engine = VLLMEngine(config.model.policy, AutoTokenizer.from_pretrained(config.model.policy), 64, config, False)
    children = {child.pid: child.cmdline() for child in psutil.Process().children(recursive=True)}
    told, go = owners[how]
    os.write(told, json.dumps(children).encode())
    os.read(go, 1)
    if how == "exit":
        os._exit(0)
    raise RuntimeError("a bug")


if __name__ == "__main__":
    pids = {}
    for how in owners:
        pid = os.fork()
        if not pid:
            os.dup2(2, 1)  # the pipe to the test is the first process's alone
            own(how)
        pids[pid] = how
    print(json.dumps({how: pid for pid, how in pids.items()}), flush=True)
    ends = {}
    for _ in owners:
        pid, status = os.wait()
        ends[pids[pid]] = os.waitstatus_to_exitcode(status)
    print(json.dumps(ends), flush=True)
"""
ENDS = {"kill": -signal.SIGKILL, "terminate": -signal.SIGTERM, "exit": 0, "exception": 1}


@pytest.mark.ring
def test_an_engines_processes_and_memory_go_with_whoever_started_it_however_it_ends(checkpoint, tmp_path):
    import psutil

    root, config = tmp_path / "shared", config_of(checkpoint(), 1).to_dict()
    (tmp_path / "owners.py").write_text(OWNERS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    told, go, theirs, engines, owners = {}, {}, {}, {}, {}
    for how in ENDS:
        (root / how).mkdir(parents=True)
        (told[how], telling), (going, go[how]) = os.pipe(), os.pipe()
        theirs[how] = telling, going
    inherited = [end for ends in theirs.values() for end in ends]
    command = [sys.executable, str(tmp_path / "owners.py"), str(root), json.dumps(config), json.dumps(theirs)]
    with open(tmp_path / "log", "w") as log:  # a pipe would be held open by what is left
        first = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, pass_fds=inherited
        )
    for end in inherited:
        os.close(end)
    try:
        owners = {how: psutil.Process(pid) for how, pid in json.loads(first.stdout.readline() or "{}").items()}
        assert owners.keys() == ENDS.keys(), (tmp_path / "log").read_text()[-3000:]
        for how, pipe in told.items():
            word = word_of(pipe, seconds=150)
            assert word, f"{how}: no engine: {(tmp_path / 'log').read_text()[-3000:]}"
            children = json.loads(word)
            assert any("spawn_main" in part or "EngineCore" in part for line in children.values() for part in line)
            engines[how] = [psutil.Process(int(pid)) for pid in children]
        for how, owner in owners.items():
            if how in ("kill", "terminate"):
                owner.send_signal(-ENDS[how])
            else:
                os.write(go[how], b"1")
        assert json.loads(first.communicate(timeout=60)[0]) == ENDS
        assert {how: left for how, one in engines.items() if (left := left_of(one))} == {}
        assert [str(file) for how in ENDS for file in (root / how).iterdir()] == []
    finally:
        for pipe in (*told.values(), *go.values()):
            os.close(pipe)
        for process in (*owners.values(), *(one for of_owner in engines.values() for one in of_owner)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        first.kill()
        first.wait()
