"""Declares the methods of every stage as the controller sees them, and runs stages in this process.

A stage is a plain class in `actors/` or `learners/`. Its methods take and return the types of `trajectories`. Here
each kind of stage is declared once more, as the controller sees it. In a declaration, a method returns a `Call`, and
what one stage makes for another is a `Payload`. The controller passes a payload on without reading it, and need not
know where it lies. A declaration also says what must be known before a remote call starts: how many payloads it will
return, and what else the stage may do at the same time.

A `Carrier` brings the calls to the stage. `LocalCarrier` makes them in this process, and launch/ray_stages.py makes
them over Ray. The carriers of simulator.py have no stage, and only let time pass on a virtual clock. The tests compare
the declarations with the stages.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NewType, Protocol, TypeVar, cast

from r2m_async.codec import decode, encode
from r2m_async.trajectories import EvaluationReport, GroupReport, LabelReport, StepReport, Ticket

Payload = NewType("Payload", object)
"""What a stage made for another stage: an object of this process, or a reference to an object in another process."""

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
Beside = Literal["generate", "embed", "weights", "control"]
"""The name of a group of threads in a stage's process. A method runs there while the stage does other work, too."""
Ranks = Literal["all", "first", "whole"]
"""The ranks that get a call, if a stage has several ranks.

`all` is all ranks, and `first` is rank 0. `whole` is rank 0 if it holds whole weights, and otherwise all ranks.
"""


@dataclass(frozen=True, slots=True)
class Method:
    """What a carrier must know of a stage's method before it calls it."""

    name: str
    """The name of the method."""
    num_payloads: int | None
    """The number of payloads that the method returns after its report. None: one for each item of its first argument."""
    shares: tuple[int, ...]
    """The indices of those payloads of which each rank returns only a part.

    A part is None, or a tuple of objects that have a `group_id`.
    """
    beside: Beside | None
    """The group of threads in which the method runs. None: a group of one thread, where methods run one by one."""
    ranks: Ranks
    """The ranks that get a call, if the stage has several."""

    def payloads_of(self, args: Sequence[Any]) -> int:
        """The number of payloads that a call with these arguments returns."""
        return len(args[0]) if self.num_payloads is None else self.num_payloads


class Carrier(Protocol):
    """Brings calls to one stage, and restarts a stage that was lost."""

    name: str
    """The name of the stage, for example `rollout-0`."""

    async def call(self, method: Method, *args: Any) -> tuple[Any, ...]:
        """Calls a method of the stage, and returns (report, *payloads).

        Raises StageLost if the process of the stage is lost, and otherwise what the method raised.
        """

    async def restart(self) -> None:
        """Starts a lost stage anew, and returns once it is ready. The new stage knows nothing of the old one.

        Raises StageLost if it cannot be started.
        """

    async def pids(self) -> list[int]:
        """Returns the numbers of the processes that run the stage now, in the order of its ranks."""


class Call(Generic[R]):
    """A call of a stage's method. It begins when it is awaited.

    Its result is the report alone if the method makes no payloads, and otherwise the tuple (report, *payloads).
    """

    __slots__ = ("_args", "_carrier", "method")

    def __init__(self, carrier: Carrier, method: Method, args: tuple[Any, ...]) -> None:
        """Keeps what the call needs. `args` are the arguments of the method."""
        self._carrier, self._args = carrier, args
        self.method = method

    @property
    def stage(self) -> str:
        """The name of the stage that is called."""
        return self._carrier.name

    def __await__(self) -> Generator[Any, None, R]:
        answer = yield from self._carrier.call(self.method, *self._args).__await__()
        return cast(R, answer[0] if self.method.num_payloads == 0 else answer)


def method(
    num_payloads: int | None = 0, *, shares: tuple[int, ...] = (), beside: Beside | None = None, ranks: Ranks = "all"
) -> Callable[[F], F]:
    """Returns a decorator that declares a method of a stage.

    The declared method has only a signature and a docstring, and its body never runs. Calling it returns a `Call`,
    which the carrier of the stage makes. The arguments are the fields of `Method` with the same names.
    """

    def declared(function: F) -> F:
        known = Method(function.__name__, num_payloads, shares, beside, ranks)

        def call(self: Stage, *args: Any) -> Call[Any]:
            return Call(self.carrier, known, args)

        # So an editor shows the declared signature and docstring.
        functools.update_wrapper(call, function)
        call.method = known  # type: ignore[attr-defined]
        return cast(F, call)

    return declared


class Stage:
    """One stage as the controller sees it. Its subclasses declare the methods of each kind of stage."""

    def __init__(self, carrier: Carrier) -> None:
        """Keeps the carrier, which brings calls to the stage."""
        self.carrier = carrier

    @property
    def name(self) -> str:
        """The name of the stage, for example `rollout-0`."""
        return self.carrier.name

    async def restart(self) -> None:
        """Starts a lost stage anew, and returns once it is ready. Raises StageLost if it cannot be started."""
        await self.carrier.restart()

    @classmethod
    def methods(cls) -> dict[str, Method]:
        """Returns the declared methods of this kind of stage, by name."""
        return {name: found.method for name in dir(cls) if (found := getattr(cls, name)) and hasattr(found, "method")}


class RolloutStage(Stage):
    """A rollout actor, which samples responses with one policy version (`actors.rollout_actor.RolloutActor`)."""

    @method()
    def load_weights(self, weights: Payload, sent: dict[str, Any]) -> Call[StepReport]:
        """Loads a version of the policy.

        Args:
            weights: the version, as the policy learner's `weights` made it.
            sent: what the policy learner's `send` returned under `weights.transport: ipc`. Otherwise it is empty.
        """

    @method()
    def join(self, channel: dict[str, Any]) -> Call[None]:
        """Joins a channel over which the policy learner will send weights itself.

        Args:
            channel: what the policy learner's `open_channel` returned.
        """

    @method(2, beside="generate")
    def generate(self, ticket: Ticket) -> Call[tuple[GroupReport, Payload, Payload]]:
        """Generates the group of a ticket.

        The payloads are the group, and the hidden states of the policy that sampled it, or None if nobody reads them.
        """

    @method(beside="control")
    def abort(self, group_id: int, attempt: int) -> Call[None]:
        """Ends the unfinished responses of an attempt at a group where they are."""


class QueueStage(Stage):
    """The replay queue, which keeps the payloads of all groups under way (`actors.replay_queue.ReplayQueue`)."""

    @method()
    def put(self, group_id: int, names: tuple[str, ...], *payloads: Payload) -> Call[int]:
        """Adds parts to a group: one payload for each name. Returns the number of parts in the whole queue."""

    @method(None)
    def get(self, group_ids: tuple[int, ...], name: str) -> Call[tuple[None, *tuple[Payload, ...]]]:
        """Returns one part of each group, in their order. The parts stay in the queue."""

    @method()
    def free(self, group_ids: tuple[int, ...]) -> Call[int]:
        """Forgets all parts of some groups. Returns the number of parts that are left in the queue."""

    # These four do not run beside the others: a group is kept as it was when it arrived, and not as a later attempt at it.

    @method()
    def begin_journal(
        self, path: str, max_bytes: int, names: tuple[str, ...], entries: list[dict[str, Any]]
    ) -> Call[dict[str, int]]:
        """Begins a new journal of at most `max_bytes`, and then removes all others in its folder.

        names: the parts that are kept of each group. entries: what `recover` will return for each group that is in it from
        the start.

        Returns its `bytes`, and how many of these groups are `without_room`.
        """

    @method()
    def reopen_journal(self, path: str, max_bytes: int) -> Call[int]:
        """Goes on with the journal of a queue that was lost. Returns its bytes."""

    @method()
    def keep(self, group_id: int, names: tuple[str, ...], entry: dict[str, Any]) -> Call[int]:
        """Appends some parts of a group to the journal. Returns the journal's bytes, or 0 if it has no room for them.

        entry: what `recover` will return for the group.
        """

    @method()
    def recover(self, directory: str) -> Call[dict[str, Any]]:
        """Takes up the groups of all journals in a folder. Returns their `entries` by group, and `damages` as text."""

    @method(beside="control")
    def write(self, path: str, payload: Payload) -> Call[dict[str, Any] | None]:
        """Writes a payload to a file of a checkpoint.

        Returns the file's entry in the manifest, or None if the queue's machine does not have the folder. If the disk
        refuses, the result has the number of the system's error under `errno`.
        """


class AnnotatorStage(Stage):
    """A reward annotator: the frozen reward model, and a head (`actors.reward_annotator.RewardAnnotator`)."""

    @method(1)
    def initial_head(self) -> Call[tuple[StepReport, Payload]]:
        """Returns version 0 of the head, which is the head before any update."""

    @method(1, beside="embed")
    def embed(self, group: Payload) -> Call[tuple[StepReport, Payload]]:
        """Runs the frozen backbone on a group. The payload is the group's reward token embeddings.

        Several such calls may run at once, because reward functions may take their time. Raises RewardFailed if the
        group must be given up.
        """

    @method(1)
    def score(
        self, step: int, head: Payload, embeddings: list[Payload], feedback: Sequence[Payload | None] | Payload
    ) -> Call[tuple[StepReport, Payload]]:
        """Computes the rewards of all groups of a step with one version of the head.

        Args:
            step: the policy step.
            head: the weights of the head version.
            embeddings: the reward token embeddings of each group.
            feedback: the policy's hidden states on each group: one payload (or None) for each group, or one payload for
                all of them.
        """

    @method(1)
    def embed_pairs(self, step: int, labels: Payload) -> Call[tuple[StepReport, Payload]]:
        """Runs the frozen backbone on the pairs of a data set in a head update (`labels.offline`).

        Args:
            step: the policy step.
            labels: the labels of its head update, as the label stage's `labels` made them.

        The payload is the embeddings of each pair.
        """

    @method()
    def evaluate(
        self,
        step: int,
        head: Payload,
        groups: list[Payload],
        embeddings: list[Payload],
        feedback: list[Payload],
    ) -> Call[EvaluationReport]:
        """Scores the groups of an evaluation. Returns a report with the metrics, and with responses to read.

        Args:
            step: the policy version that generated the groups.
            head: the weights of the head version that scores them.
            groups: the groups, one for each held-out prompt.
            embeddings: the reward token embeddings of each group.
            feedback: the policy's hidden states on each group.
        """


class PolicyStage(Stage):
    """The policy learner, which takes the policy steps (`learners.policy_learner.PolicyLearner`)."""

    @method(1, shares=(0,))
    def proximal(self, step: int, groups: list[Payload]) -> Call[tuple[StepReport, Payload]]:
        """Runs the first pass of a step, with the policy as it is before the step.

        The payload is the policy's hidden states on the groups under `feedback.source: learner`. Otherwise it is None.
        """

    @method(1, shares=(0,))
    def train(self, step: int, rewards: Payload) -> Call[tuple[StepReport, Payload]]:
        """Makes all updates of a step, on the groups that `proximal` got.

        The payload is the refreshed feedback: the policy's hidden states on these groups, from the last epoch.
        """

    @method(1, shares=(0,))
    def reread(self, step: int, labels: Payload) -> Call[tuple[StepReport, Payload]]:
        """Reads pairs with the policy as it is after a step: labelled ones, or those of a data set.

        Args:
            step: the policy step.
            labels: the labels of its head update, as the label stage's `labels` made them.

        The payload is what the policy makes of each pair.
        """

    @method(1, beside="weights", ranks="whole")
    def weights(self, whole: bool = False) -> Call[tuple[StepReport, Payload]]:
        """Publishes the present version of the policy. The payload is its weights.

        Args:
            whole: True to get the tensors also if the learner sends them to the engines itself.
        """

    @method(beside="control", ranks="first")
    def open_channel(self, engine: int) -> Call[dict[str, Any]]:
        """Opens a channel to an engine, given by its number. Returns what the engine must know to join it."""

    @method(beside="control", ranks="first")
    def connect(self, engine: int) -> Call[dict[str, str]]:
        """Waits for an engine to join its channel. If it does not, the answer says why under `failed`."""

    @method(beside="control", ranks="first")
    def send(self, engine: int, version: int) -> Call[dict[str, Any]]:
        """Sends a version to an engine over its channel. If it cannot be sent, the answer says why under `failed`.

        The answer is otherwise what the engine must know besides to load the version. It may be empty.
        """

    @method(1)
    def state(self, directory: str | None = None) -> Call[tuple[StepReport, Payload]]:
        """Saves the learner. The payload is what `restore` needs.

        Args:
            directory: where a learner of several ranks writes its own files.
        """

    @method()
    def restore(self, state: Payload, directory: str | None = None) -> Call[int]:
        """Goes on from what `state` returned and wrote into the directory. Returns the policy version."""


class HeadStage(Stage):
    """The head learner, which trains the reward head (`learners.head_learner.HeadLearner`)."""

    @method()
    def start(self, weights: Payload) -> Call[int]:
        """Takes version 0 of the head, which is the head before any update. Returns the version."""

    @method(1)
    def update(
        self,
        step: int,
        embeddings: list[Payload],
        refreshed: Payload,
        annotated: Payload,
        labels: Payload | None = None,
        reread: Payload | None = None,
        embedded: Payload | None = None,
    ) -> Call[tuple[StepReport, Payload]]:
        """Makes one update of the head on the groups of a step. The payload is the weights of the new version.

        Args:
            step: the policy step.
            embeddings: the reward token embeddings of each group.
            refreshed: the refreshed feedback, as the policy learner's `train` made it.
            annotated: the rewards of the groups, as `score` made them.
            labels: the labels of this update, as the label stage's `labels` made them. None without a `labels.source`.
            reread: what the policy learner's `reread` made of them. None if it reads no pairs.
            embedded: what the annotator's `embed_pairs` made of them. None if the policy learner reads no pairs.
        """

    @method(1)
    def state(self) -> Call[tuple[StepReport, Payload]]:
        """Saves the learner. The payload is what `restore` needs."""

    @method()
    def restore(self, state: Payload) -> Call[int]:
        """Goes on from what `state` returned. Returns the head version."""


class LabelStage(Stage):
    """The labeller, which asks which of two responses is better, and keeps what was answered (`actors.labeller.Labeller`)."""

    @method()
    def ask(self, step: int, groups: list[Payload], embeddings: list[Payload], rewards: Payload) -> Call[LabelReport]:
        """Chooses pairs of a step, and begins to ask about them. It does not wait for answers.

        Args:
            step: the policy step.
            groups: the groups of the step.
            embeddings: the reward token embeddings of each group.
            rewards: the rewards of the groups, as `score` made them.

        The report has the pairs.
        """

    @method(1, beside="control")
    def labels(self, step: int, refreshed: Payload) -> Call[tuple[LabelReport, Payload]]:
        """Hands out the labels that the head update of a step may use. Under `labels.wait` it waits for them.

        Args:
            step: the policy step.
            refreshed: the refreshed feedback of the step, as the policy learner's `train` made it.

        The report has all labels whose fate is decided. The payload is what the head learns from.
        """

    @method(1)
    def state(self) -> Call[tuple[StepReport, Payload]]:
        """Saves the pairs that wait, and those that may be used once more. The payload is what `restore` needs."""

    @method()
    def restore(self, state: Payload) -> Call[int]:
        """Goes on from what `state` returned. Pairs without an answer are asked about again. Returns their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """All stages of one ring, and what can be done with their payloads."""

    rollouts: tuple[RolloutStage, ...]
    """The rollout actors. The last one also generates for evaluations."""
    queue: QueueStage
    annotators: tuple[AnnotatorStage, ...]
    """Replicas of the frozen reward model. All of them embed, and the first one also scores."""
    policy: PolicyStage
    head: HeadStage
    labels: LabelStage | None = None
    """The labeller. None without a `labels.source`."""
    to_bytes: Callable[[Payload], Awaitable[memoryview]]
    """Returns the bytes of a payload, as `codec.encode` wrote them."""
    from_bytes: Callable[[Any], Payload]
    """Makes a payload of such bytes."""
    stacks: Callable[[Sequence[str]], Awaitable[str]] | None = None
    """Says what the processes of these stages, given by name, are doing. None: they have no processes of their own."""
    watch: Callable[[], Coroutine[Any, Any, None]] = lambda: asyncio.sleep(0)
    """A loop that raises StageLost if the cluster on which the stages run is gone. By default it ends at once."""

    @classmethod
    def carried_by(
        cls,
        *,
        rollouts: tuple[Carrier, ...],
        queue: Carrier,
        annotators: tuple[Carrier, ...],
        policy: Carrier,
        head: Carrier,
        labels: Carrier | None = None,
        **others: Any,
    ) -> Stages:
        """Makes the stages of a ring from the carrier of each.

        `others` are the fields that are no stages: `to_bytes`, `from_bytes` and perhaps `watch`.
        """
        return cls(
            rollouts=tuple(map(RolloutStage, rollouts)),
            queue=QueueStage(queue),
            annotators=tuple(map(AnnotatorStage, annotators)),
            policy=PolicyStage(policy),
            head=HeadStage(head),
            labels=LabelStage(labels) if labels else None,
            **others,
        )


TURNS_TO_ARRIVE = 3
"""The number of turns of the event loop within which all calls that one event causes have been made."""


class LocalCarrier:
    """Carries a stage in this process. While a call runs, nothing else happens in the ring.

    A stage may have an async method `before_NAME` of the arguments of its method NAME. It is awaited before the call,
    for what takes its time elsewhere, and the ring goes on meanwhile.
    """

    def __init__(self, name: str, stage: Any) -> None:
        """Keeps the stage, which is an object with the stage's methods."""
        self.name = name
        self.stage = stage

    async def call(self, method: Method, *args: Any) -> tuple[Any, ...]:
        """Calls the method, and returns and raises what it does."""
        # The call blocks the event loop. This lets other tasks run first, or a row of calls would never let them.
        await asyncio.sleep(0)
        if before := getattr(self.stage, f"before_{method.name}", None):
            await before(*args)
        return cast(tuple[Any, ...], getattr(self.stage, method.name)(*args))

    async def restart(self) -> None:
        """Raises RuntimeError: a stage in this process cannot be lost."""
        raise RuntimeError(f"{self.name} runs in this process and cannot have died")

    async def pids(self) -> list[int]:
        """Returns the number of this process."""
        return [os.getpid()]


class LocalBatches(LocalCarrier):
    """Carries a rollout actor in this process. Calls of `generate` that wait at the same time become one batch."""

    def __init__(self, name: str, stage: Any) -> None:
        """Keeps the stage, which must have a `generate_batch`."""
        super().__init__(name, stage)
        self._waiting: list[tuple[Ticket, asyncio.Future[tuple[Any, ...]]]] = []
        self._batch: asyncio.Task[None] | None = None
        """The batch that is collected or computed now. The event loop itself holds its tasks only weakly."""

    async def call(self, method: Method, *args: Any) -> tuple[Any, ...]:
        """Calls the method. A call of `generate` is collected into a batch first."""
        if method.name != "generate":
            return await super().call(method, *args)
        outcome: asyncio.Future[tuple[Any, ...]] = asyncio.get_running_loop().create_future()
        self._waiting.append((args[0], outcome))
        # The first call of a batch starts the batch for all of them, in a task: cancelled, it takes no other along.
        if len(self._waiting) == 1:
            self._batch = asyncio.create_task(self._generate())
        return await outcome

    async def _generate(self) -> None:
        """Collects calls until no more come, and generates their groups as one batch."""
        known = 0
        while known < len(self._waiting):
            known = len(self._waiting)
            for _ in range(TURNS_TO_ARRIVE):
                await asyncio.sleep(0)
        # A new list: calls that come from now on belong to the next batch.
        waiting, self._waiting = self._waiting, []
        try:
            results = self.stage.generate_batch([ticket for ticket, _ in waiting])
        except Exception as error:
            # Every caller must get the error. A caller that got nothing would wait for ever.
            for _, outcome in waiting:
                if not outcome.done():  # else its caller was cancelled meanwhile
                    outcome.set_exception(error)
            return
        for (_, outcome), result in zip(waiting, results, strict=True):
            if not outcome.done():
                outcome.set_result(result)


def local_bytes() -> dict[str, Callable[..., Any]]:
    """Returns the `to_bytes` and `from_bytes` of stages in this process, where a payload is the object itself."""

    async def to_bytes(payload: Payload) -> memoryview:
        return encode(payload)

    return {"to_bytes": to_bytes, "from_bytes": decode}
