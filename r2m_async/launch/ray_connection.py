"""Ray itself, as a run needs it: started or joined in time, watched while the run goes on, ended in time.

Ray's own calls wait for ever, or for minutes, where a cluster does not answer. Here each has a deadline.
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

START_TIMEOUT = 180.0
"""Seconds in which Ray must be there, started here or joined."""
CLOSE_TIMEOUT = 5.0
"""Seconds for stages to be killed, and again for Ray to end, before its processes are killed."""
ANSWER_TIMEOUT = 5.0
"""Seconds in which the head of a cluster must accept a connection."""
WATCH_EVERY = 5.0
OWN_GRACE, JOINED_GRACE = 15.0, 40.0
"""Seconds that the head of a cluster may not answer: a joined one may be restarted. Ray ends the driver after 60."""

abandoned = threading.Event()
"""Set if Ray did not end. Python's own end would then wait for it: leave by `os._exit`."""


class RayConnection:
    """Ray is started, or the cluster of RAY_ADDRESS joined, unless this process has done so before.

    Raises ConfigError if nobody answers at RAY_ADDRESS, StageLost if Ray does not start.
    """

    def __init__(self, config: R2MConfig) -> None:
        import ray

        self._started_here = not ray.is_initialized()
        self._closing = threading.Event()
        self._ended: Future[None] = Future()
        there: Future[tuple[str, float]] = Future()
        if self._started_here:
            _check_address(os.environ.get("RAY_ADDRESS", ""))
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        # One thread starts Ray, stays, and ends it: the kernel kills Ray's processes when the thread that started them
        # ends. Where a call of Ray hangs, the main thread is free to say so and to take signals.
        threading.Thread(target=self._live, args=(there, config.logging.actors), name="ray", daemon=True).start()
        try:
            self._head, self.num_gpus = there.result(START_TIMEOUT)
        except NotInTime:
            if self._started_here:
                self._closing.set()
                kill_processes()
                _abandon()
            raise StageLost(None, f"Ray did not answer within {START_TIMEOUT:g} s: {_remedy()}") from None
        self._processes = _ray_processes() if self._started_here else []
        self._owns_head = any("gcs_server" in _name(process) for process in self._processes)
        if self._started_here and threading.current_thread() is threading.main_thread():
            # Ray's C++ side takes SIGTERM for itself: a stack, and an abort three seconds later. Python's goes back.
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)

    def _live(self, there: Future[tuple[str, float]], log_to_driver: bool) -> None:
        import ray

        try:
            if self._started_here:
                ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=log_to_driver)
            head = ray.get_runtime_context().gcs_address
            there.set_result((head, ray.cluster_resources().get("GPU", 0.0)))
        except Exception as error:  # of many classes, plain Exception among them
            lost = StageLost(None, f"Ray did not start: {error}\n{_remedy()}")
            lost.__cause__ = error
            there.set_exception(lost)
            return
        if self._started_here:
            self._closing.wait()
            ray.shutdown()
            self._ended.set_result(None)

    async def watch(self) -> None:
        """Raises StageLost once the head of the cluster is gone: without it Ray ends the whole driver after a minute."""
        from ray.util.client import ray as client

        if client.is_connected():
            return  # the head's address is then one of the cluster's own network
        host, _, port = self._head.rpartition(":")
        loop, gone_since = asyncio.get_running_loop(), None
        while True:
            await asyncio.sleep(WATCH_EVERY)
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT):
                    _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
                writer.close()
                gone_since = None
            except OSError as error:  # TimeoutError is one
                gone_since = loop.time() if gone_since is None else gone_since
                grace = OWN_GRACE if self._owns_head else JOINED_GRACE
                if self._owns_head and isinstance(error, ConnectionRefusedError):
                    grace = 0.0  # its process has ended, and nobody starts another
                if loop.time() - gone_since >= grace:
                    reason = str(error) or f"no answer in {ANSWER_TIMEOUT:g} s"
                    raise StageLost(None, f"the head of the Ray cluster at {self._head} is gone: {reason}") from None

    def close(self, end_stages: Callable[[], Any]) -> None:
        """Ends the stages, and Ray if it was started here: politely, and after `CLOSE_TIMEOUT` by killing its processes."""
        processes = [*self._processes, *(_ray_processes() if self._started_here else [])]
        stages: Future[None] = Future()

        def end() -> None:
            with contextlib.suppress(Exception):  # Ray may be half gone: what is left is killed below
                end_stages()
            stages.set_result(None)

        threading.Thread(target=end, name="ray-end-stages", daemon=True).start()
        with contextlib.suppress(NotInTime):
            stages.result(CLOSE_TIMEOUT)
        if not self._started_here:
            return
        self._closing.set()
        with contextlib.suppress(NotInTime):
            self._ended.result(CLOSE_TIMEOUT)
        _kill(processes)  # those that are there still
        try:
            self._ended.result(CLOSE_TIMEOUT)
        except NotInTime:
            _abandon()


def _abandon() -> None:
    import ray

    atexit.unregister(ray.shutdown)
    abandoned.set()


def _check_address(address: str) -> None:
    """Raises ConfigError if nobody answers at a RAY_ADDRESS of the form host:port, for which Ray would wait on and on."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_TIMEOUT).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS is {address!r} and no Ray cluster answers there ({error}): correct it, start the cluster, or "
            f"unset RAY_ADDRESS for a Ray of this run's own"
        ) from None


def _remedy() -> str:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return f"RAY_ADDRESS is {address!r}; is that cluster up? Unset RAY_ADDRESS for a Ray of this run's own"
    return (
        "its logs are in /tmp/ray/session_latest/logs; a machine short of memory or processors may be too slow for it"
    )


def kill_processes() -> None:
    """Ends Ray, if this process started one, without a word to it."""
    if "ray" in sys.modules:
        _kill(_ray_processes())


def _kill(processes: list[Any]) -> None:
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.Error):  # it is gone already, as it should be
            process.kill()


def _name(process: Any) -> str:
    """Empty for one that has ended since it was listed, as Ray's short-lived helpers do."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return str(process.name())
    return ""


def _ray_processes() -> list[Any]:
    """Those that Ray started for this process, the stages' among them."""
    import psutil
    import ray

    package, found = str(Path(ray.__file__).parent), []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(package in part for part in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found
