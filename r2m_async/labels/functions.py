"""A user's function as a source of labels.

    def better(prompt, first, second): ...        returns "first", "second", "tie" or None
    async def better(messages, first, second): ...

A `def` is called for one pair after the other, in order, in a thread. All calls of an `async def` run at once.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from r2m_async.config import LabelsSection
from r2m_async.cpu_threads import share_threads
from r2m_async.errors import ConfigError, FunctionFailed
from r2m_async.function_loops import OncePerProcess, turning_loop
from r2m_async.labels.questions import REASONS, Answer, Question
from r2m_async.plugins import called, named_function, nearest, own_failure, shown, wrong_types

KNOWN = ("prompt", "messages", "first", "second", "first_finished", "second_finished")
"""The names of the arguments that every function can ask for, whatever the data has."""
_PREFERRED = {"first": 0, "second": 1}


class FunctionSource:
    """Asks a function about each pair."""

    def __init__(
        self, labels: LabelsSection, function: Callable[..., Any] | None = None, who: str | None = None
    ) -> None:
        """Finds the function. It is not called yet.

        Args:
            labels: the section, whose `options` are keyword arguments of the function.
            function: the function, if `labels.source` does not name it itself.
            who: who gives its labels. None is `labels.source`.

        Raises ConfigError if there is no such function, or if its options do not fit.
        """
        assert labels.source is not None
        self._source, self._options = labels.source, labels.options
        self._call = function or named_function(labels.source, "labels.source")
        self._who = who or labels.source
        self._names, self._takes_all, self.columns = self._signature()
        if check := getattr(self._call, "check_options", None):
            try:
                check(**self._options)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"labels.source {self._source!r}: {error}") from None
        if wrong := wrong_types(self._call, self._options, "labels.options", self._source):
            raise ConfigError("\n".join(wrong))
        self._turns: queue.SimpleQueue[tuple[Question, Future[Answer]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def _signature(self) -> tuple[list[str], bool, list[str]]:
        """Returns the parameters that are given, whether all that is known is given, and the columns that must be there.

        Raises ConfigError for an option that the function does not take.
        """
        try:
            parameters = list(inspect.signature(self._call).parameters.values())
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"labels.source {self._source!r} does not say what it takes ({error}); name a function of Python's"
            ) from None
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        for name in self._options:
            if name in KNOWN:
                raise ConfigError(f"labels.options has {name!r}, which the source is given for each pair: take it out")
            if name not in [p.name for p in named] and not takes_all:
                raise ConfigError(
                    f"labels.options has {name!r} and {self._source} has no such parameter"
                    f"{nearest(name, [p.name for p in named])}"
                )
        if by_position := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]:
            raise ConfigError(
                f"labels.source {self._source!r} takes {by_position[0]!r} by position alone; it is called by names"
            )
        asked = [p for p in named if p.name not in self._options]
        columns = [p.name for p in asked if p.default is p.empty and p.name not in KNOWN]
        return [p.name for p in asked], takes_all, columns

    def ask(self, question: Question) -> Future[Answer]:
        """Begins to ask, and returns at once. The result raises FunctionFailed if the function fails."""
        if inspect.iscoroutinefunction(self._call):
            return asyncio.run_coroutine_threadsafe(self._awaited(question), _loop())
        if self._thread is None:
            # A daemon: a function that hangs must not keep the process from ending.
            self._thread = threading.Thread(target=self._one_by_one, name=self._source, daemon=True)
            self._thread.start()
        answer: Future[Answer] = Future()
        self._turns.put((question, answer))
        return answer

    def close(self) -> None:
        """Ends the thread once it has answered what it was asked."""
        self._turns.put(None)

    def _one_by_one(self) -> None:
        """Calls the function for one question after the other."""
        share_threads()
        # A model that the function runs would else keep its graph, as if it were trained.
        torch.set_grad_enabled(False)
        while (turn := self._turns.get()) is not None:
            question, answer = turn
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                result = self._answer(self._called(question), question)
            except BaseException as error:  # the next pairs need this thread
                answer.set_exception(self._failure(error, question))
            else:
                answer.set_result(result)

    def _called(self, question: Question) -> Any:
        """What the function returns. Raises FunctionFailed for whatever it raises."""
        call = functools.partial(self._call, **self._arguments(question))
        return called(call, (), "labels.source", self._source, question.place)

    async def _awaited(self, question: Question) -> Answer:
        """Does the same for an `async def`."""
        # In a task of its own: if that is cancelled and this one is not, it was by the function itself.
        call = asyncio.create_task(self._outcome(question))
        try:
            await asyncio.wait([call])
        finally:
            call.cancel()
        if call.cancelled():
            raise FunctionFailed(f"{question.place}: labels.source {self._source!r} was cancelled by itself")
        if isinstance(outcome := call.result(), FunctionFailed):
            raise outcome
        return outcome

    async def _outcome(self, question: Question) -> Answer | FunctionFailed:
        try:
            return self._answer(await self._call(**self._arguments(question)), question)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # raised, SystemExit would end the loop without a word
            return self._failure(error, question)

    def _failure(self, error: BaseException, question: Question) -> FunctionFailed:
        """What is told of an error that a call of the function ended with."""
        if isinstance(error, FunctionFailed):
            return error
        what, frames = own_failure(error)
        return FunctionFailed(f"{question.place}: labels.source {self._source!r} raised {what}{frames}")

    def _arguments(self, question: Question) -> dict[str, Any]:
        """The keyword arguments of a call."""
        first, second = question.responses
        known = {
            **copy.deepcopy(dict(question.prompt.columns)),  # the function may change what it is given
            "prompt": question.prompt.text,
            "messages": question.messages,
            "first": first.text,
            "second": second.text,
            "first_finished": first.finish_reason == "stop",
            "second_finished": second.finish_reason == "stop",
        }
        names = known if self._takes_all else self._names
        return {name: known[name] for name in names if name in known} | copy.deepcopy(self._options)

    def _answer(self, value: Any, question: Question) -> Answer:
        """What a returned value means. Raises FunctionFailed for anything that has no meaning."""
        if value is None:
            return Answer(preferred=None, reason="refused", who=self._who)
        if isinstance(value, str) and value in _PREFERRED:
            return Answer(preferred=_PREFERRED[value], who=self._who)
        if isinstance(value, str) and value in REASONS:
            return Answer(preferred=None, reason=value, who=self._who)
        raise FunctionFailed(
            f"{question.place}: labels.source {self._source!r} returned {shown(value)}; it must return 'first', 'second', "
            f"{', '.join(map(repr, REASONS))} or None"
        )


_loop = OncePerProcess(functools.partial(turning_loop, "labels"))
