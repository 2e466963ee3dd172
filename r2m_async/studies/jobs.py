"""Jobs in processes, several at once: one whose process is killed fails alone, and none outlives the command.

A job stands for a directory. What failed has left DIRECTORY.failed with the reason, until it succeeds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Self

from r2m_async.child_process import end_with_parent
from r2m_async.whole import write_file


class WorkerProcesses:
    """So many threads, each with a process of its own that does one job after the other.

    A thread replaces a process that was killed; the job in it raises ChildProcessError. Left by an exception, Ctrl-C
    too, jobs that wait are cancelled and processes are killed; else it is left when all jobs are done.
    """

    def __init__(self, number: int) -> None:
        self._threads = ThreadPoolExecutor(number)
        self._own = threading.local()
        self._pids: dict[ProcessPoolExecutor, int] = {}
        self._ending = False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """A module's function and what can be pickled."""
        return self._threads.submit(self._do, function, *arguments)

    def _do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            process = self._process()
            if self._ending:  # asked once the pid is known: from here on __exit__ kills it
                raise ChildProcessError("ended with the others")
            return process.submit(function, *arguments).result()
        except BrokenProcessPool:
            self._pids.pop(self._own.process, None)
            self._own.process = None
            raise ChildProcessError("its process ended: out of memory?") from None

    def _process(self) -> ProcessPoolExecutor:
        """This thread's."""
        if getattr(self._own, "process", None) is None:
            self._own.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)
            self._pids[self._own.process] = self._own.process.submit(os.getpid).result()
        return self._own.process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._ending = True
            self._threads.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                if child.pid in self._pids.values():
                    child.kill()
            self._threads.shutdown()
        for process in list(self._pids):  # before their threads, with which they would be killed
            process.shutdown()
        self._threads.shutdown()


def _begin() -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches children too: the parent ends them


def wait_for(work: Mapping[Future[float], Path], tell: Callable[[str], None]) -> list[str]:
    """Tells what ends and in how many seconds, by the name of its directory; the names of what failed."""
    failed = []
    for number, done in enumerate(as_completed(work), 1):
        directory = work[done]
        if error := done.exception():
            failed.append(directory.name)
            reason = f"{type(error).__name__}: {error}"
            write_file(_failure(directory), reason + "\n")
            tell(f"{directory.name} failed: {reason}")
        else:
            _failure(directory).unlink(missing_ok=True)
            tell(f"{number}/{len(work)} {directory.name}: {done.result():.0f} s")
    return failed


def failures(directories: Iterable[Path]) -> dict[str, str]:
    """Reasons by name, of those that failed when they were last tried."""
    return {
        one.name: _failure(one).read_text(encoding="utf-8").strip() for one in directories if _failure(one).is_file()
    }


def _failure(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.failed")
