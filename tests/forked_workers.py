"""Ray workers forked from a process that has imported torch, transformers and vLLM already.

A worker's own imports take four seconds of a processor, nine with vLLM, and a ring has five workers: that is most of what a ring on Ray
costs a test. Where `forked_workers` holds, Ray starts this file instead of its `setup_worker.py`. It hands over the
worker's arguments, environment and outputs to a process that has made the imports, and that process forks the worker.
From there on everything is as ever: a stage has a process of its own, with its own memory, and dies alone. Rings that
start Ray themselves, from a command line or a script, have workers that Ray starts in its own way.
"""

import argparse
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESS = "R2M_FORKED_WORKERS"
"""Environment variable: the name of an abstract Unix socket, at which workers are asked for."""


@contextmanager
def forked_workers() -> Iterator[None]:
    """A Ray that is started in this context forks its workers; they end with it."""
    import subprocess
    from functools import partial

    import pytest
    import ray

    name = f"r2m-forked-workers-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener, pytest.MonkeyPatch.context() as patch:
        listener.bind("\0" + name)
        listener.listen(128)
        parameters = ray._private.parameter.RayParams
        patch.setattr(ray._private.parameter, "RayParams", partial(parameters, setup_worker_path=__file__))
        patch.setenv(ADDRESS, name)
        command = [sys.executable, __file__, "--serve", str(listener.fileno())]
        with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()]):
            yield  # the end of its input ends it


def serve(listener: socket.socket) -> None:
    """Forks a worker for everyone who asks, until standard input ends."""
    import gc
    import select
    import signal

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401

    import r2m_async.launch.ring  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
    served: dict[str, str] = {}
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        with connection:
            message, outputs, _, _ = socket.recv_fds(connection, 1 << 20, 3)
            worker = json.loads(message)
            job = {name: worker["environment"][name] for name in ("RAY_JOB_ID", "RAY_RAYLET_PID")}
            if not served and job["RAY_JOB_ID"].strip("f"):  # Ray's first workers wait for any job
                os.environ.update(job)
                import ray  # noqa: F401  # at its import it takes these from the environment, for good

                import actors.vllm_engine  # noqa: F401  # which imports ray

                gc.freeze()
                served = job
            if served and job != served:
                connection.send(b"no")
            elif os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                connection.close()
                return become(outputs, **worker)
        for output in outputs:
            os.close(output)


def become(outputs: list[int], program: str, arguments: list[str], environment: dict[str, str], directory: str) -> None:
    """This process is from here on the worker that Ray wanted to start."""
    import runpy

    import numpy as np

    for place, output in enumerate(outputs):
        os.dup2(output, place)
        os.close(output)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()  # the one generator whose state every fork would share
    sys.argv = [program, *arguments]
    sys.path[0] = os.path.dirname(program)
    runpy.run_path(program, run_name="__main__")


def ask(arguments: list[str]) -> None:
    """Has a worker forked, or becomes it: of another job. Two of Ray's arguments are for its `setup_worker.py`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context", type=json.loads, default={})
    parser.add_argument("--language")
    setup, (program, *arguments) = parser.parse_known_args(arguments)
    environment = os.environ | setup.serialized_runtime_env_context.get("env_vars", {})
    worker = {"program": program, "arguments": arguments, "environment": environment, "directory": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect("\0" + os.environ[ADDRESS])
        socket.send_fds(connection, [json.dumps(worker).encode()], [0, 1, 2])
        if connection.recv(1):
            os.execve(sys.executable, [sys.executable, program, *arguments], environment)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        ask(sys.argv[1:])
