"""`math_answer`: whether a response ends with the right mathematical answer, by the package `math-verify`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import weakref
from pathlib import Path

from r2m_async.errors import ConfigError
from r2m_async.rewards.packages import needs

_MOST_WORKERS = 4
"""The most processes that compare answers for one annotator."""


def _check(seconds: float = 10.0) -> None:
    """Raises ConfigError if the package is not installed, or the option is no time."""
    needs("math_verify", "math-verify")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0:
        raise ConfigError(f"seconds is {seconds!r}; give a number above 0")


async def math_answer(response: str, answer: str | int | float, seconds: float = 10.0) -> float:
    """Returns 1 if the answer that a response ends with equals `answer`, and else 0.

    Args:
        response: the response. Its answer may be in LaTeX, in `\\boxed{}`, or plain.
        answer: the column of the right answer: a number or LaTeX. Of `... #### 18`, as GSM8K has it, only 18 is read.
        seconds: how long the comparison may take. A response for which it takes longer is wrong: it has an expression
            that cannot be computed.

    Raises ValueError if `answer` itself cannot be read, which is a fault of the data.
    """
    verdict = await _workers().ask({"answer": str(answer), "response": response}, seconds)
    if verdict is None:
        raise ValueError(f"the column `answer` is {answer!r}, which is no mathematical expression")
    return float(verdict)


math_answer.check_options = _check  # type: ignore[attr-defined]


class _Workers:
    """The processes that compare answers, on one event loop. They are started when they are needed first."""

    def __init__(self) -> None:
        self._slots: asyncio.LifoQueue[asyncio.subprocess.Process | None] = asyncio.LifoQueue()
        for _ in range(max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) // 2))):
            self._slots.put_nowait(None)  # a place without a process yet

    async def ask(self, question: dict[str, str], seconds: float) -> bool | None:
        """Returns the verdict of a worker, or False if it takes longer than `seconds`."""
        worker = await self._slots.get()
        try:
            if worker is None or worker.returncode is not None:
                worker = await self._start()
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write(json.dumps(question).encode() + b"\n")
            try:
                async with asyncio.timeout(seconds):
                    line = await worker.stdout.readline()
            except TimeoutError:
                worker.kill()
                await worker.wait()
                return False
            if not line:
                raise RuntimeError(f"the process that compares answers has died (status {await worker.wait()})")
            verdict: bool | None = json.loads(line)
            answered, worker = worker, None
            self._slots.put_nowait(answered)
            return verdict
        finally:
            if worker is not None:  # it did not answer: it hangs, has died, or its caller was cancelled
                if worker.returncode is None:
                    worker.kill()
                worker = None
                self._slots.put_nowait(None)

    async def _start(self) -> asyncio.subprocess.Process:
        """Starts a process. It ends when this one does, because its input then ends."""
        worker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # else the modules beside the script would hide others of their names
            str(Path(__file__).with_name("math_worker.py")),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )
        return worker


_of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Workers] = weakref.WeakKeyDictionary()


def _workers() -> _Workers:
    """The workers of the running event loop."""
    return _of_loop.setdefault(asyncio.get_running_loop(), _Workers())
