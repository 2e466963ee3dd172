"""Starts or joins Ray, watches it while a run goes on, and ends it in time.

If a cluster does not answer, Ray's own calls wait for minutes or for ever. Here each of them has a deadline.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from pathlib import Path
from typing import Any

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, StageLost
from r2m_async.launch import forked_workers

START_TIMEOUT = 180.0
"""Seconds in which Ray must be started or joined."""
CLOSE_TIMEOUT = 5.0
"""Seconds that each part of `close` may take: the stages, then Ray, then Ray again after its processes were killed."""
ANSWER_TIMEOUT = 5.0
"""Seconds in which the head of a cluster must accept a connection."""
WATCH_EVERY = 5.0
"""Seconds between two looks at the head of the cluster."""
OWN_GRACE, JOINED_GRACE = 15.0, 40.0
"""Seconds for which the head of a cluster may be silent: one that was started here, and one that was joined.

A joined head may be restarted by its owner, so it gets longer. Ray itself ends the driver after 60 seconds.
"""

abandoned = threading.Event()
"""It is set if Ray did not end. At its own end Python would wait for Ray, so the process must leave by `os._exit`."""


class RayConnection:
    """The connection of this process to Ray. `watch` notices if Ray is gone, and `close` ends what was begun here."""

    def __init__(self, config: R2MConfig) -> None:
        """Joins the cluster at RAY_ADDRESS, or starts a Ray of its own if there is no address.

        If this process has connected to Ray before, that connection is used, and `close` leaves it open.

        Args:
            config: the config of the run. `logging.actors` decides whether what the stages print is shown.

        Raises ConfigError if nobody answers at RAY_ADDRESS, and StageLost if Ray does not start in time.
        """
        import ray

        self._started_here = not ray.is_initialized()
        self._closing = threading.Event()
        self._ended: Future[None] = Future()
        self._template: forked_workers.WorkerTemplate | None = None
        there: Future[tuple[str, float]] = Future()
        if self._started_here:
            _check_address(os.environ.get("RAY_ADDRESS", ""))
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        # One thread starts Ray, stays alive, and ends Ray. It must stay, because the kernel kills Ray's processes when
        # the thread that started them ends. And it is not the main thread, which must be free to take signals and to
        # report a call of Ray that hangs. It is a daemon, so that such a call cannot keep Python from ending.
        threading.Thread(target=self._live, args=(there, config), name="ray", daemon=True).start()
        try:
            self._head, self.num_gpus = there.result(START_TIMEOUT)
        except NotInTime:
            # Nothing of a Ray that is half started may stay behind. Its thread may hang for ever and is given up.
            if self._started_here:
                self._closing.set()
                kill_processes()
                _abandon()
            raise StageLost(None, f"Ray did not answer within {START_TIMEOUT:g} s: {_remedy()}") from None
        self._processes = _ray_processes() if self._started_here else []
        self._owns_head = any("gcs_server" in _name(process) for process in self._processes)
        if self._started_here and threading.current_thread() is threading.main_thread():
            # Ray's C++ code has put its own handler for SIGTERM in place: it prints a stack, and aborts three seconds
            # later. This puts Python's handler back.
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)

    def _live(self, there: Future[tuple[str, float]], config: R2MConfig) -> None:
        """Starts Ray, waits until it is to be closed, and ends it. This runs in a thread of its own.

        Args:
            there: gets the address of the cluster's head and the number of its GPUs, or StageLost.
            config: the config of the run.
        """
        import ray

        try:
            if self._started_here:
                # Without an address Ray would join whatever cluster was started last on this machine, somebody else's or
                # one that is dead: it looks into /tmp/ray/ray_current_cluster.
                own = None if os.environ.get("RAY_ADDRESS") else "local"
                self._template = forked_workers.take(config.rollouts.engine) if own else None
                how = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": config.logging.actors}
                with self._template.forks_workers() if self._template else contextlib.nullcontext():
                    ray.init(own, **how)
            head = ray.get_runtime_context().gcs_address
            there.set_result((head, ray.cluster_resources().get("GPU", 0.0)))
        # Ray raises errors of many classes here, plain Exception among them.
        except Exception as error:
            lost = StageLost(None, f"Ray did not start: {error}\n{_remedy()}")
            lost.__cause__ = error
            there.set_exception(lost)
            return
        if self._started_here:
            self._closing.wait()
            ray.shutdown()
            self._ended.set_result(None)

    @property
    def owns_cluster(self) -> bool:
        """Whether the cluster was started here, so that nobody else runs anything in it."""
        return self._owns_head

    async def watch(self) -> None:
        """Watches the head of the cluster, and raises StageLost when it is gone. Otherwise it never ends.

        Ray itself would end the whole driver process about a minute after the head is gone.

        Over Ray Client it returns at once, because the head's address may not be reachable from here.
        """
        from ray.util.client import ray as client

        if client.is_connected():
            return
        host, _, port = self._head.rpartition(":")
        loop, gone_since = asyncio.get_running_loop(), None
        while True:
            await asyncio.sleep(WATCH_EVERY)
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT):
                    _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
                writer.close()
                gone_since = None
            # TimeoutError is an OSError, too.
            except OSError as error:
                gone_since = loop.time() if gone_since is None else gone_since
                grace = OWN_GRACE if self._owns_head else JOINED_GRACE
                # A refused connection means that the process has ended. Nobody restarts a head that was started here.
                if self._owns_head and isinstance(error, ConnectionRefusedError):
                    grace = 0.0
                if loop.time() - gone_since >= grace:
                    reason = str(error) or f"no answer in {ANSWER_TIMEOUT:g} s"
                    raise StageLost(None, f"the head of the Ray cluster at {self._head} is gone: {reason}") from None

    def end(self, stages: Callable[[], Any]) -> None:
        """Ends the stages and leaves the connection open. Returns in time, whatever hangs.

        stages: kills the processes of all stages by calls of Ray.
        """
        ended: Future[None] = Future()

        def end() -> None:
            # Ray may be half gone, and then anything may fail here. What is left is killed by `close`.
            with contextlib.suppress(Exception):
                stages()
            ended.set_result(None)

        # In a daemon thread, because a call of Ray may hang.
        threading.Thread(target=end, name="ray-end-stages", daemon=True).start()
        with contextlib.suppress(NotInTime):
            ended.result(CLOSE_TIMEOUT)

    def close(self, stages: Callable[[], Any] = lambda: None) -> None:
        """Ends the stages as `end` does, and also the connection if it was made here. Returns in time, whatever hangs.

        If Ray itself was started here, it ends with the connection. Whatever is left of it after `CLOSE_TIMEOUT`
        seconds is killed. If even that does not end the thread of the connection, `abandoned` is set.
        """
        # Both lists are needed. The stages were not there at the start. And a process whose parent has died since then
        # is no longer found among our children.
        processes = [*self._processes, *(_ray_processes() if self._started_here else [])]
        self.end(stages)
        if not self._started_here:
            return
        self._closing.set()
        with contextlib.suppress(NotInTime):
            self._ended.result(CLOSE_TIMEOUT)
        _kill(processes)
        if self._template:
            self._template.close()
        try:
            self._ended.result(CLOSE_TIMEOUT)
        except NotInTime:
            _abandon()


def _abandon() -> None:
    """Gives Ray up: sets `abandoned`, and takes back what Ray would do at Python's end, which may hang as well."""
    import ray

    atexit.unregister(ray.shutdown)
    abandoned.set()


def _check_address(address: str) -> None:
    """Raises ConfigError if RAY_ADDRESS has the form host:port and nobody answers there. Ray would wait very long."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_TIMEOUT).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS is {address!r} and no Ray cluster answers there ({error}): correct it, start the cluster, or "
            f"unset RAY_ADDRESS, so that the run starts a Ray of its own"
        ) from None


def _remedy() -> str:
    """The advice that ends the message about a Ray that did not start."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return f"RAY_ADDRESS is {address!r}; is that cluster up? Unset RAY_ADDRESS for a Ray of this run's own"
    return (
        "its logs are in /tmp/ray/session_latest/logs; a machine short of memory or processors may be too slow for it"
    )


def kill_processes() -> None:
    """Kills all processes of the Ray that this process started, if it started one, without asking Ray first."""
    if "ray" in sys.modules:
        _kill(_ray_processes())


def _kill(processes: list[Any]) -> None:
    """Kills those processes that are still there."""
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _name(process: Any) -> str:
    """The name of a process. It is empty if the process has ended since it was listed, as short-lived helpers do."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return str(process.name())
    return ""


def _ray_processes() -> list[Any]:
    """The processes that Ray has started for this process, as psutil's objects. The stages' are among them."""
    import psutil
    import ray

    ours, found = (str(Path(ray.__file__).parent), forked_workers.__file__), list[Any]()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(path in part for path in ours for part in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found
