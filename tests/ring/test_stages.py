"""Stages as the controller sees them, and as they are: the same methods, with the same arguments."""

import asyncio
import dataclasses
import inspect

import pytest

from actors.labeller import Labeller
from actors.replay_queue import ReplayQueue
from actors.reward_annotator import RewardAnnotator
from actors.rollout_actor import RolloutActor
from learners.head_learner import HeadLearner
from learners.policy_learner import PolicyLearner
from r2m_async.ring.simulator import SimulatedStage, StageTimes
from r2m_async.ring.stages import (
    AnnotatorStage,
    Call,
    HeadStage,
    LabelStage,
    LocalBatches,
    LocalCarrier,
    PolicyStage,
    QueueStage,
    RolloutStage,
    Stage,
)

STAGES = {
    RolloutStage: RolloutActor,
    QueueStage: ReplayQueue,
    AnnotatorStage: RewardAnnotator,
    PolicyStage: PolicyLearner,
    HeadStage: HeadLearner,
    LabelStage: Labeller,
}


def parameters(function):
    """(name, kind, default) of all but self."""
    return [(p.name, p.kind, p.default) for p in list(inspect.signature(function).parameters.values())[1:]]


def test_every_kind_of_stage_is_compared():
    assert set(STAGES) == set(Stage.__subclasses__()) - {
        cls for cls in Stage.__subclasses__() if cls.__module__ != Stage.__module__
    }


@pytest.mark.parametrize("declared", STAGES, ids=lambda declared: declared.__name__)
def test_what_is_declared_is_what_the_stage_has(declared):
    methods = declared.methods()
    assert methods
    for name, method in methods.items():
        source = inspect.getattr_static(declared, name).__wrapped__
        implemented = getattr(STAGES[declared], name)
        assert parameters(source) == parameters(implemented), name
        # `-> tuple[Report, Payload, ...]`: the report, and as many payloads as are declared.
        returned = inspect.signature(implemented).return_annotation
        inside = returned.removeprefix("tuple[").removesuffix("]")
        depth, parts = 0, 1
        for character in inside:
            depth += (character == "[") - (character == "]")
            parts += character == "," and depth == 0
        if method.num_payloads is None:
            assert inside == "None, *tuple[Any, ...]"
            continue
        assert returned.startswith("tuple[") and parts == 1 + method.num_payloads, (name, returned)
        assert all(0 <= place < method.num_payloads for place in method.shares)


def test_the_simulator_knows_a_time_only_for_what_a_stage_does():
    known = {name for declared in STAGES for name in declared.methods()}
    assert {field.name for field in dataclasses.fields(StageTimes)} - {"generate_spread", "queue"} <= known


class Doubler:
    def double(self, number):
        return (2 * number,)


def test_a_call_begins_when_it_is_awaited_and_yields_the_report_alone_where_there_is_no_payload():
    class DoublerStage(Stage):
        from r2m_async.ring.stages import method

        @method()
        def double(self, number: int) -> Call[int]:
            """Twice the number."""

    stage = DoublerStage(LocalCarrier("doubler", Doubler()))
    call = stage.double(4)
    assert (call.stage, call.method.name, stage.double.__doc__) == ("doubler", "double", "Twice the number.")

    async def main():
        return await call

    assert asyncio.run(main()) == 8


def test_a_simulated_stage_answers_every_method_with_as_many_payloads():
    async def main(declared, name):
        stage = declared(SimulatedStage("stage", lambda method: 0.0))
        arguments = [inspect.Parameter.empty] * len(parameters(inspect.getattr_static(declared, name).__wrapped__))
        return await stage.carrier.call(declared.methods()[name], *arguments)

    for declared in (AnnotatorStage, PolicyStage, HeadStage, LabelStage):
        for name, method in declared.methods().items():
            if name in ("state", "restore", "start", "open_channel", "connect", "send"):
                continue  # a simulated run keeps nothing and has no channels
            assert len(asyncio.run(main(declared, name))) == 1 + method.num_payloads, name


class Batches:
    """A rollout actor that remembers which tickets it was given at once."""

    def __init__(self):
        self.batches = []

    def generate_batch(self, tickets):
        self.batches.append(tickets)
        return [(ticket, None, None) for ticket in tickets]


@pytest.mark.parametrize("cancelled", [0, 1, 2])
def test_a_cancelled_call_takes_no_other_of_its_batch_along(cancelled):
    """The first call once ran the batch for all: cancelled, it left them waiting, and every later one with them."""
    stage = RolloutStage(LocalBatches("rollout-0", batches := Batches()))

    async def main():
        calls = [asyncio.ensure_future(ask(number)) for number in range(3)]
        await asyncio.sleep(0)
        calls[cancelled].cancel()
        done = await asyncio.gather(*calls, return_exceptions=True)
        return done, await ask(7)

    async def ask(number):
        return await stage.generate(number)

    done, later = asyncio.run(asyncio.wait_for(main(), 10))
    assert isinstance(done.pop(cancelled), asyncio.CancelledError)
    assert [report for report, *_ in done] == [number for number in range(3) if number != cancelled]
    assert later[0] == 7 and len(batches.batches) == 2
