"""Ray workers forked from a process that has imported torch, transformers and the rollout engine already.

A worker's own imports take four seconds of a processor, nine with vLLM, and a ring has five workers. That is most of what the
start of a ring costs, and most of what a lost stage costs. A `WorkerTemplate` makes these imports once. Ray starts this file
instead of its `setup_worker.py`. It hands over the worker's arguments, environment and outputs to the template, and the template
forks the worker. From there on everything is as ever: a stage has a process of its own, with its own memory, and dies alone.

If the template does not answer, this file becomes the worker that Ray wanted to start. So nothing depends on the template but time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path

ADDRESS = "R2M_FORKED_WORKERS"
"""Environment variable of Ray's processes: the name of an abstract Unix socket, at which workers are asked for."""
PATIENCE = 20.0
"""Seconds that a template may take to answer. Ray gives a worker 60 seconds to report itself."""
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Devices of machines with a GPU: NVIDIA's, AMD's, and that of a Windows around this Linux."""
_IMPORTED = {
    "transformers": (
        *(f"r2m_async.models.{name}" for name in ("critic", "heads", "loading", "pretrained", "reward")),
        *("actors.transformers_engine", "r2m_async.launch.ring"),
    ),
    "vllm": ("actors.vllm_engine",),
}
"""What the stages of a ring import. Names and no imports: these modules come to know of this one."""
_UNREAD = {"PL_DISABLE_FORK"}
"""Environment variables that a runtime environment may set in a forked worker, since none of the imports made before reads
them. Tune sets this one for its trials, and all actors of a trial inherit it."""
_prepared: WorkerTemplate | None = None


def prepare(engine: str) -> None:
    """Begins the imports of a template, which `take` then returns, so that they are done when Ray starts.

    engine: as for `WorkerTemplate`. On a machine with a GPU it does nothing: a process that has found the GPU must not be forked.
    """
    global _prepared
    if _prepared is None and not any(Path(device).exists() for device in _GPUS):
        _prepared = WorkerTemplate(engine)


def take(engine: str) -> WorkerTemplate | None:
    """Returns the template that was prepared, or a new one. None: workers cannot be forked here. The caller closes it."""
    global _prepared
    prepare(engine)
    taken, _prepared = _prepared, None
    return taken


class WorkerTemplate:
    """The process from which workers are forked. They are its children."""

    def __init__(self, engine: str) -> None:
        """Starts it, and does not wait for its imports.

        engine: the rollout engine that is imported too, as `rollouts.engine` names it.
        """
        self.engine = engine
        self._name = f"r2m-{secrets.token_hex(16)}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"\0{self._name}")
            listener.listen(128)
            # A session of its own: Ctrl-C reaches the driver alone, which then ends this process.
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--serve", str(listener.fileno()), engine],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                start_new_session=True,
                env={"OMP_NUM_THREADS": "1"} | os.environ,
            )
        # Nobody else holds the listener now. So once the process is gone, whoever asks is refused at once.

    @contextmanager
    def forks_workers(self) -> Iterator[None]:
        """A context manager. A Ray that is started in its block has its workers forked by this template."""
        from ray._private import parameter

        plain = parameter.RayParams
        parameter.RayParams = partial(plain, setup_worker_path=__file__)
        os.environ[ADDRESS] = self._name
        try:
            yield
        finally:
            parameter.RayParams = plain
            del os.environ[ADDRESS]

    def close(self) -> None:
        """Ends the process. The workers that it has forked live on."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # a process in a call of a broken disk cannot even be killed
            self._process.wait(PATIENCE)
        assert self._process.stdin
        self._process.stdin.close()


# In the template


def serve(listener: socket.socket, engine: str) -> None:
    """Forks a worker for everyone who asks, until standard input ends."""
    import gc
    import select

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the thread that has started it
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401

    for module in _IMPORTED["transformers"]:
        import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
    served: dict[str, str] = {}
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        with connection:
            _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if user != os.getuid():
                continue  # an abstract socket has no permissions: anybody on this machine may have found it
            message, outputs, _, _ = socket.recv_fds(connection, 1 << 20, 3)
            worker = json.loads(message)
            # Ray sets variables of its own for its workers, as the job, and whether they have to show a token.
            rays = {name: value for name, value in worker["environment"].items() if name.startswith("RAY_")}
            if not served and rays["RAY_JOB_ID"].strip("f"):  # Ray's first workers wait for any job
                for name in [name for name in os.environ if name.startswith("RAY_")]:
                    del os.environ[name]
                os.environ.update(rays)
                import ray  # noqa: F401  # at its import it takes these from the environment, for good

                for module in _IMPORTED[engine]:  # vLLM imports ray
                    import_module(module)
                gc.freeze()
                served = rays
            ours = not served or rays == served
            with suppress(BrokenPipeError):  # whoever asked did not wait so long
                connection.send(b"yes" if ours else b"no")
                if ours and os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    listener.close()
                    connection.close()
                    return become(outputs, **worker)
        for output in outputs:
            os.close(output)


def become(
    outputs: list[int], program: str, arguments: list[str], environment: dict[str, str], directory: str, niceness: int
) -> None:
    """This process is from here on the worker that Ray wanted to start."""
    import runpy

    import numpy as np

    for place, output in enumerate(outputs):
        os.dup2(output, place)
        os.close(output)
    os.setpgid(0, 0)  # Ray kills the whole group of a worker that is gone
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()  # the one generator whose state every fork would share
    sys.argv = [program, *arguments]
    sys.path[0] = os.path.dirname(program)
    runpy.run_path(program, run_name="__main__")


# In the process that Ray starts


def ask(arguments: list[str]) -> None:
    """Has a worker forked, or goes on as Ray's own `setup_worker.py` does. Two arguments are for that file alone.

    It goes on so, too, where a runtime environment wants another Python, or variables that an import may have read.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context", type=json.loads, default={})
    parser.add_argument("--language")
    setup, (program, *rest) = parser.parse_known_args(arguments)
    worker = {
        "program": program,
        "arguments": rest,
        "directory": os.getcwd(),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),  # which Ray has set
    }
    context = dict(setup.serialized_runtime_env_context)
    variables = context.pop("env_vars", {})
    same_python = context.pop("py_executable", sys.executable) == sys.executable
    if same_python and variables.keys() <= _UNREAD and not any(context.values()):
        worker["environment"] = {**os.environ, **variables}
        with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(f"\0{os.environ[ADDRESS]}")
            socket.send_fds(connection, [json.dumps(worker).encode()], [0, 1, 2])
            if connection.recv(3) == b"yes":
                return
    own = str(Path(program).with_name("setup_worker.py"))
    os.execv(sys.executable, [sys.executable, own, *arguments])


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        sys.path[0] = str(Path(__file__).parents[2])  # Python puts the folder of this file there, with names of our own
        serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3])
    else:
        ask(sys.argv[1:])
