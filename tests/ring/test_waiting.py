"""Who waits in a ring, and whom an event wakes: the same few, however many actors there are."""

import asyncio

import pytest

from r2m_async.config import R2MConfig
from r2m_async.ring.simulator import SimulatedStage, StageTimes, plan_without_models, run_virtually, simulate
from r2m_async.ring.stages import Stages, local_bytes
from r2m_async.ring.waiting import Waits
from r2m_async.schedule import Schedule


def run(coroutine):
    return asyncio.run(coroutine)


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


class Line:
    """`number` waiters for things; each takes one and leaves."""

    def __init__(self, number):
        self.waits, self.things, self.asked, self.served = Waits(), 0, 0, []
        self.tasks = [asyncio.create_task(self._wait(f"actor-{index}")) for index in range(number)]

    async def _wait(self, who):
        await self.waits.in_line(self._take, who, "a thing")
        self.served.append(who)

    def _take(self):
        self.asked += 1
        taken = self.things > 0
        self.things -= taken
        return taken

    async def offer(self, number):
        self.things, self.asked = number, 0
        self.waits.notify()
        await settle()


def test_those_in_the_line_are_served_in_turn_and_only_one_more_is_asked():
    async def main():
        line = Line(100)
        await settle()
        await line.offer(3)
        assert line.served == ["actor-0", "actor-1", "actor-2"]
        assert line.asked == 4  # the fourth found nothing
        await line.offer(1)
        assert (line.served[3:], line.asked) == (["actor-3"], 2)
        for task in line.tasks:
            task.cancel()

    run(main())


@pytest.mark.parametrize("settled", [True, False])
def test_one_that_is_cancelled_when_it_was_woken_leaves_its_turn_to_the_next(settled):
    async def main():
        line = Line(3)
        await settle()
        line.things = 1
        line.waits.notify()
        line.tasks[0].cancel()  # before it runs: what woke it must not be lost with it
        if settled:
            await settle()
        line.tasks[1].cancel()
        await settle()
        assert line.served == (["actor-1"] if settled else ["actor-2"])
        for task in line.tasks:
            task.cancel()

    run(main())


def test_aside_nobody_is_asked_but_by_name_or_with_all():
    async def main():
        waits, asked = Waits(), []

        def condition(who):
            asked.append(who)
            return len(asked) > 6

        waiting = [
            asyncio.create_task(waits.aside(lambda who=who: condition(who), who, "its own")) for who in ("a", "b")
        ]
        await settle()
        asked.clear()
        waits.notify()
        await settle()
        assert asked == []
        waits.wake("b")
        await settle()
        assert asked == ["b"]
        waits.notify_all()
        await settle()
        assert asked == ["b", "a", "b"]
        assert sorted(line.split(" (")[0] for line in waits.lines()) == ["a waits for its own", "b waits for its own"]
        for task in waiting:
            task.cancel()

    run(main())


@pytest.mark.parametrize(
    "rollouts", [{}, {"concurrent_groups": 4, "engine": "vllm"}, {"in_flight_updates": True, "engine": "vllm"}]
)
def test_tickets_are_asked_for_as_often_per_group_however_many_actors_wait(monkeypatch, rollouts):
    admit, asked = Schedule.admit, [0]

    def counted(self, *arguments):
        asked[0] += 1
        return admit(self, *arguments)

    monkeypatch.setattr(Schedule, "admit", counted)
    times = StageTimes(generate=10.0, generate_spread=0.3, embed=0.001, score=0.1, proximal=1.0, train=1.0, update=0.5)
    for num_actors in (8, 256):
        config = R2MConfig.from_dict(
            {
                "run": {"num_steps": 4},
                "rollouts": {"num_actors": num_actors, "prompts_per_step": 64, **rollouts},
                "scheduling": {"max_policy_age": 1, "max_head_age": 1, "stall_after": 1e6},
            }
        )
        asked[0] = 0
        simulate(config, times)
        at_the_start, per_version = num_actors, num_actors if config.rollouts.in_flight_updates else 0
        assert 4 * 64 <= asked[0] <= 4 * 4 * 64 + at_the_start + 4 * per_version, num_actors


@pytest.mark.parametrize("overage", ["mask", "drop"])
def test_a_group_that_its_actor_begins_last_is_late_on_time(overage):
    """One actor, one group after the other: nothing arrives, and nothing ends, between admission and deadline."""
    config = R2MConfig.from_dict(
        {
            "run": {"num_steps": 3},
            "rollouts": {"num_actors": 1, "prompts_per_step": 2},
            "scheduling": {"overage": overage, "overage_after": 2.0, "stall_after": 1e6},
        }
    )
    names = ("rollout-0", "queue", "annotator-0", "policy-learner", "head-learner")
    rollout, queue, annotator, policy, head = (
        SimulatedStage(name, lambda method: 10.0 if method == "generate" else 0.0) for name in names
    )
    stages = Stages.carried_by(
        rollouts=(rollout,), queue=queue, annotators=(annotator,), policy=policy, head=head, **local_bytes()
    )
    results, schedule = run_virtually(config, plan_without_models(config), stages)
    assert schedule.policy_ledger.voided["overage"] == 3
    assert [result["time/step"] for result in results] == pytest.approx([12.0, 12.0, 12.0])
