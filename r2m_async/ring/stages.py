"""What the controller sees of a stage: its methods, each with its types, and a restart.

A stage is a plain class in `actors/` or `learners/`. Its methods take and return the types of `trajectories`. Here each
kind of stage is declared once more, as the controller sees it: a method returns a `Call`, and what one stage makes for
another is a `Payload`, which the controller hands on without reading it, wherever it lies. A declaration also says what a
remote call must know before it starts: how many payloads there will be, and what the method may run beside.

A `Carrier` brings calls to the stage: into this process (`LocalCarrier`), over Ray (launch/ray_stages.py), or nowhere, on
a clock that costs nothing (simulator.py). `tests/ring/test_stages.py` holds declarations and stages against each other.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NewType, Protocol, TypeVar, cast

from r2m_async.codec import decode, encode
from r2m_async.trajectories import GroupReport, StepReport, Ticket

Payload = NewType("Payload", object)
"""What a stage made for another stage: an object of this process, or a reference to one elsewhere."""

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
Beside = Literal["generate", "weights", "control"]
"""A group of threads of a stage's process, in which a method runs beside the stage's other work."""
Ranks = Literal["all", "first", "whole"]
"""Which ranks of a stage of several a call goes to: all, the first, or the first if it holds whole weights, else all."""


@dataclass(frozen=True, slots=True)
class Method:
    """What a carrier must know of a method before it calls it."""

    name: str
    num_payloads: int
    """How many payloads the method returns behind its report."""
    shares: tuple[int, ...]
    """Of these payloads each rank returns a part: None, or a tuple of objects that have a `group_id`."""
    beside: Beside | None
    """None: the stage does one thing at a time."""
    ranks: Ranks


class Carrier(Protocol):
    """Brings calls to one stage, and brings back a stage that was lost."""

    name: str

    async def call(self, method: Method, *args: Any) -> tuple[Any, ...]:
        """`(report, *payloads)`. Raises StageLost if the process died, else what the method raised."""

    async def restart(self) -> None:
        """Returns once a lost stage is there again, with fresh state. Raises StageLost if it never will be."""

    async def pids(self) -> list[int]:
        """The numbers of the processes that run the stage now, in the order of ranks."""


class Call(Generic[R]):
    """A call that begins when it is awaited. It yields the report alone, or `(report, *payloads)`."""

    __slots__ = ("_args", "_carrier", "method")

    def __init__(self, carrier: Carrier, method: Method, args: tuple[Any, ...]) -> None:
        self._carrier, self._args = carrier, args
        self.method = method

    @property
    def stage(self) -> str:
        """The name of the stage that is called."""
        return self._carrier.name

    def __await__(self) -> Generator[Any, None, R]:
        answer = yield from self._carrier.call(self.method, *self._args).__await__()
        return cast(R, answer if self.method.num_payloads else answer[0])


def method(
    num_payloads: int = 0, *, shares: tuple[int, ...] = (), beside: Beside | None = None, ranks: Ranks = "all"
) -> Callable[[F], F]:
    """Declares a method of a stage: its body is never run, a call of it is a `Call` of the stage's carrier."""

    def declared(function: F) -> F:
        known = Method(function.__name__, num_payloads, shares, beside, ranks)

        def call(self: Stage, *args: Any) -> Call[Any]:
            return Call(self.carrier, known, args)

        functools.update_wrapper(call, function)  # its name, its documentation, its signature
        call.method = known  # type: ignore[attr-defined]
        return cast(F, call)

    return declared


class Stage:
    """One stage as the controller sees it."""

    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier

    @property
    def name(self) -> str:
        return self.carrier.name

    async def restart(self) -> None:
        """Returns once a lost stage is there again, with fresh state. Raises StageLost if it never will be."""
        await self.carrier.restart()

    @classmethod
    def methods(cls) -> dict[str, Method]:
        """All methods that are declared, by name."""
        return {name: found.method for name in dir(cls) if (found := getattr(cls, name)) and hasattr(found, "method")}


class RolloutStage(Stage):
    """An engine that samples with one version of the policy (`actors.rollout_actor.RolloutActor`)."""

    @method()
    def load_weights(self, weights: Payload, sent: dict[str, Any]) -> Call[StepReport]:
        """Takes a version of the policy. `sent`: what the learner said of a transfer that it makes itself, else empty."""

    @method()
    def join(self, channel: dict[str, Any]) -> Call[None]:
        """Meets the learner at a channel that it has opened."""

    @method(2, beside="generate")
    def generate(self, ticket: Ticket) -> Call[tuple[GroupReport, Payload, Payload]]:
        """Samples a ticket's group. The payloads are the group and the states of the policy that sampled it."""

    @method(beside="control")
    def abort(self, group_id: int, attempt: int) -> Call[None]:
        """Ends a group's unfinished responses where they are."""


class QueueStage(Stage):
    """The payloads of all groups under way (`actors.replay_queue.ReplayQueue`)."""

    @method()
    def put(self, group_id: int, names: tuple[str, ...], *payloads: Payload) -> Call[int]:
        """Adds named parts to a group."""

    @method(1)
    def get(self, group_id: int, name: str) -> Call[tuple[None, Payload]]:
        """One part of a group."""

    @method()
    def free(self, group_ids: tuple[int, ...]) -> Call[int]:
        """Forgets groups."""


class AnnotatorStage(Stage):
    """The frozen reward model and a head (`actors.reward_annotator.RewardAnnotator`)."""

    @method(1)
    def initial_head(self) -> Call[tuple[StepReport, Payload]]:
        """The head as it is before any update."""

    @method(1)
    def embed(self, group: Payload) -> Call[tuple[StepReport, Payload]]:
        """The backbone's pass over a group: its reward token embeddings."""

    @method(1)
    def score(
        self, step: int, head: Payload, embeddings: list[Payload], feedback: Sequence[Payload | None] | Payload
    ) -> Call[tuple[StepReport, Payload]]:
        """The rewards of a step's groups by one version of the head."""

    @method()
    def judge(
        self,
        step: int,
        head: Payload,
        groups: list[Payload],
        embeddings: list[Payload],
        feedback: list[Payload],
    ) -> Call[StepReport]:
        """The metrics of an evaluation's groups."""


class PolicyStage(Stage):
    """The learner of the policy (`learners.policy_learner.PolicyLearner`)."""

    @method(1, shares=(0,))
    def proximal(self, step: int, groups: list[Payload]) -> Call[tuple[StepReport, Payload]]:
        """The pass with the policy as it is before the step; its states, where these are the feedback."""

    @method(1, shares=(0,))
    def train(self, step: int, rewards: Payload) -> Call[tuple[StepReport, Payload]]:
        """The step; the payload is the feedback of the policy after it."""

    @method(1, beside="weights", ranks="whole")
    def weights(self, whole: bool = False) -> Call[tuple[StepReport, Payload]]:
        """The present version. `whole`: with its tensors also where the learner sends those to engines itself."""

    @method(beside="control", ranks="first")
    def open_channel(self, engine: int) -> Call[dict[str, Any]]:
        """Opens a channel to an engine; what the engine must know to join it."""

    @method(beside="control", ranks="first")
    def connect(self, engine: int) -> Call[dict[str, str]]:
        """Meets the engine at its channel. `failed` in the answer says why it did not come to that."""

    @method(beside="control", ranks="first")
    def send(self, engine: int, version: int) -> Call[dict[str, Any]]:
        """Sends a version over an engine's channel. `failed` in the answer says why it did not come to that."""

    @method(1)
    def state(self, directory: str | None = None) -> Call[tuple[StepReport, Payload]]:
        """What `restore` goes on from; a learner of several ranks writes its part into `directory`."""

    @method()
    def restore(self, state: Payload, directory: str | None = None) -> Call[int]:
        """Goes on from a checkpoint."""


class HeadStage(Stage):
    """The learner of the head (`learners.head_learner.HeadLearner`)."""

    @method()
    def start(self, weights: Payload) -> Call[int]:
        """Takes the head as it is before any update."""

    @method(1)
    def update(
        self, step: int, embeddings: list[Payload], refreshed: Payload, annotated: Payload
    ) -> Call[tuple[StepReport, Payload]]:
        """One update on a step's groups; the payload is the new head."""

    @method(1)
    def state(self) -> Call[tuple[StepReport, Payload]]:
        """What `restore` goes on from."""

    @method()
    def restore(self, state: Payload) -> Call[int]:
        """Goes on from a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The stages of one ring."""

    rollouts: tuple[RolloutStage, ...]
    queue: QueueStage
    annotators: tuple[AnnotatorStage, ...]
    """Replicas of the frozen backbone; the first also scores."""
    policy: PolicyStage
    head: HeadStage
    to_bytes: Callable[[Payload], Awaitable[memoryview]]
    """A buffer of a payload."""
    from_bytes: Callable[[Any], Payload]
    """A payload of such a buffer."""
    watch: Callable[[], Coroutine[Any, Any, None]] = lambda: asyncio.sleep(0)
    """A loop that raises StageLost once what carries the stages' processes is gone."""

    @classmethod
    def carried_by(
        cls,
        *,
        rollouts: tuple[Carrier, ...],
        queue: Carrier,
        annotators: tuple[Carrier, ...],
        policy: Carrier,
        head: Carrier,
        **others: Any,
    ) -> Stages:
        """`others`: what else there is of a ring, `to_bytes`, `from_bytes` and `watch`."""
        return cls(
            rollouts=tuple(map(RolloutStage, rollouts)),
            queue=QueueStage(queue),
            annotators=tuple(map(AnnotatorStage, annotators)),
            policy=PolicyStage(policy),
            head=HeadStage(head),
            **others,
        )


TURNS_TO_ARRIVE = 3
"""Turns of the event loop in which calls that one event set off have all been made."""


class LocalCarrier:
    """A stage in this process: each call runs to its end before anything else happens."""

    def __init__(self, name: str, stage: Any) -> None:
        self.name = name
        self._stage = stage

    async def call(self, method: Method, *args: Any) -> tuple[Any, ...]:
        await asyncio.sleep(0)
        return cast(tuple[Any, ...], getattr(self._stage, method.name)(*args))

    async def restart(self) -> None:
        raise RuntimeError(f"{self.name} runs in this process and cannot have died")

    async def pids(self) -> list[int]:
        return [os.getpid()]


class LocalBatches(LocalCarrier):
    """A rollout actor in this process, whose calls of `generate` that wait at the same time are one batch."""

    def __init__(self, name: str, stage: Any) -> None:
        super().__init__(name, stage)
        self._waiting: list[tuple[Ticket, asyncio.Future[tuple[Any, ...]]]] = []

    async def call(self, method: Method, *args: Any) -> tuple[Any, ...]:
        if method.name != "generate":
            return await super().call(method, *args)
        outcome: asyncio.Future[tuple[Any, ...]] = asyncio.get_running_loop().create_future()
        self._waiting.append((args[0], outcome))
        if len(self._waiting) == 1:
            await self._generate()
        return await outcome

    async def _generate(self) -> None:
        known = 0
        while known < len(self._waiting):  # until a turn of the loop brings no more
            known = len(self._waiting)
            for _ in range(TURNS_TO_ARRIVE):
                await asyncio.sleep(0)
        waiting, self._waiting = self._waiting, []
        try:
            results = self._stage.generate_batch([ticket for ticket, _ in waiting])
        except Exception as error:
            for _, outcome in waiting:
                outcome.set_exception(error)
            return
        for (_, outcome), result in zip(waiting, results, strict=True):
            outcome.set_result(result)


def local_bytes() -> dict[str, Callable[..., Any]]:
    """The `to_bytes` and `from_bytes` of stages in this process."""

    async def to_bytes(payload: Payload) -> memoryview:
        return encode(payload)

    return {"to_bytes": to_bytes, "from_bytes": decode}
