"""Jobs in processes, several at once. If the process of a job is killed, that job alone fails.

No process outlives the command. A job stands for a directory. A job that fails leaves the reason in DIRECTORY.failed,
which stays until the job succeeds.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Self

from r2m_async.child_process import end_with_parent
from r2m_async.whole import write_file


class WorkerProcesses:
    """A number of threads, each with a process of its own that does one job after the other.

    If a process is killed, its job raises ChildProcessError, and the thread starts another process for the next job. It
    is a context manager. The context should end normally only when all jobs are done, as after `wait_for`. If it ends
    by an exception, Ctrl-C included, waiting jobs are cancelled and the processes are killed.
    """

    def __init__(self, number: int) -> None:
        """number: how many jobs are done at once."""
        self._threads = ThreadPoolExecutor(number)
        self._own = threading.local()
        self._pids: dict[ProcessPoolExecutor, int] = {}
        self._ending = False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Hands in a job, and returns the future of its result.

        `function` is defined at the top of a module, so that the process finds it. `arguments` can be pickled.
        """
        return self._threads.submit(self._do, function, *arguments)

    def _do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Does a job in this thread's process, and returns its result.

        Raises ChildProcessError if the process ended.
        """
        try:
            process = self._process()
            # Asked after the pid is written down. Either `__exit__` then finds the pid and kills the process, or
            # `_ending` was set before, and no job begins.
            if self._ending:
                raise ChildProcessError("it was ended, because the other jobs were")
            return process.submit(_told, function, *arguments).result()
        except BrokenProcessPool:
            # The broken process is forgotten, so the next job of this thread starts a new one.
            self._pids.pop(self._own.process, None)
            self._own.process = None
            raise ChildProcessError("its process was killed; was the machine out of memory?") from None

    def _process(self) -> ProcessPoolExecutor:
        """This thread's process, started if there is none."""
        if getattr(self._own, "process", None) is None:
            # A forked child would inherit locks that other threads hold at that moment; a spawned one does not.
            self._own.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)
            self._pids[self._own.process] = self._own.process.submit(os.getpid).result()
        return self._own.process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._ending = True
            self._threads.shutdown(wait=False, cancel_futures=True)
            # A running job cannot be cancelled. Only processes of this object are killed, not other children of the
            # command.
            for child in multiprocessing.active_children():
                if child.pid in self._pids.values():
                    child.kill()
            self._threads.shutdown()
        # Before the threads end: the kernel kills a process of `end_with_parent` with the thread that started it.
        for process in list(self._pids):
            process.shutdown()
        self._threads.shutdown()


def _begin() -> None:
    """A worker process begins with this: it will end with its parent, and ignores Ctrl-C."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to children, too; the parent ends them


def _told(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the function, in a worker process.

    An error that could not be read in the other process would look there as if this one had been killed. Its text is raised
    instead.
    """
    try:
        return function(*arguments)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            text = "".join(traceback.format_exception(error)).rstrip()
        else:
            raise
    raise RuntimeError(text)


def wait_for(work: Mapping[Future[float], Path], tell: Callable[[str], None]) -> list[str]:
    """Waits for all jobs, and returns the names of those that failed.

    work: the directory of each job. The result of a job is its seconds.
    tell: gets a line for each job as it ends.
    """
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
    """The reasons, by name, of the jobs that failed when they were last tried."""
    return {
        one.name: _failure(one).read_text(encoding="utf-8").strip() for one in directories if _failure(one).is_file()
    }


def _failure(directory: Path) -> Path:
    """The file that has the reason of a job's failure."""
    return directory.with_name(f"{directory.name}.failed")
