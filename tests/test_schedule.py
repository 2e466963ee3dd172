"""The schedule by itself, and the real controller over simulated stages: random durations, actors, crashes, bytes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2m_async.config import R2MConfig
from r2m_async.errors import StageLost, StalledRun
from r2m_async.ring.simulator import SimulatedStage, run_virtually
from r2m_async.ring.stages import Stages, local_bytes
from r2m_async.schedule import Ledger, Plan, Schedule


def plan(**changes) -> Plan:
    defaults = dict(num_steps=3, groups_per_step=2, max_policy_age=1, max_head_age=0, max_bytes=400, group_bytes=100)
    return Plan(**(defaults | changes))


def finish(schedule: Schedule, admission, version=None, num_bytes=10) -> bool:
    oldest = admission.policy_version if version is None else version
    return schedule.arrived(admission.group_id, admission.attempt, oldest, num_bytes, now=0.0)


def test_groups_are_admitted_in_order_and_only_within_the_policy_age():
    schedule = Schedule(plan())
    admitted = [schedule.admit("a", 0, 0.0) for _ in range(5)]
    assert [one.group_id for one in admitted[:4]] == [0, 1, 2, 3] and admitted[4] is None
    assert [one.due_step for one in admitted[:4]] == [0, 0, 1, 1]


def test_exact_lag_admits_with_the_oldest_allowed_version_and_bounded_with_the_newest():
    for lag, version in (("exact", 0), ("bounded", 1)):
        schedule = Schedule(plan(lag=lag, num_steps=3))
        groups = [schedule.admit("a", 0, 0.0) for _ in range(2)]
        assert all(finish(schedule, one) for one in groups)
        schedule.assemble()
        schedule.policy_trained(0, 0.0)
        assert schedule.admit("a", 1, 0.0).policy_version == version


def test_a_step_is_assembled_only_when_whole_and_with_a_head_young_enough():
    schedule = Schedule(plan(max_policy_age=2))
    first, second, third, fourth = [schedule.admit("a", 0, 0.0) for _ in range(4)]
    finish(schedule, first)
    assert schedule.assemble() is None
    finish(schedule, second)
    assert schedule.assemble().group_ids == (0, 1)
    schedule.policy_trained(0, 0.0)
    finish(schedule, third)
    finish(schedule, fourth)
    assert schedule.assemble() is None, "head version 0 is too old for step 1 at max_head_age 0"
    assert schedule.head_trained(0) == (0, 1)
    assert schedule.assemble().head_version == 1


@pytest.mark.parametrize("lag", ["exact", "bounded"])
def test_a_group_whose_data_is_lost_is_issued_again_with_room_for_what_it_may_write(lag):
    schedule = Schedule(plan(lag=lag))
    first, second = (schedule.admit("a", 0, 0.0) for _ in range(2))
    assert schedule.take_back(0, "payload_lost") and schedule.in_flight() == {0: "a", 1: "a"}, "it has not arrived"
    assert finish(schedule, first) and finish(schedule, second) and schedule.reserved_bytes == 20
    assert schedule.take_back(0, "payload_lost") and not schedule.reissued["none"]
    assert schedule.reserved_bytes == (20 if lag == "exact" else 110), "in exact mode it writes the same again"
    schedule.audit()
    assert schedule.assemble() is None and schedule.reissued == {"payload_lost": 1}
    again = schedule.admit("b", 0, 0.0)
    assert (again.group_id, again.attempt, again.refill) == (0, 1, 0)
    assert not finish(schedule, first), "the former attempt"
    assert finish(schedule, again) and schedule.assemble().group_ids == (0, 1)
    assert not schedule.take_back(1, "payload_lost"), "its step is leased"
    schedule.policy_trained(0, 0.0)
    assert schedule.take_back(1, "payload_lost") and schedule.head_trained(0) == (0, 1)
    assert schedule.take_back(1, "payload_lost") and schedule.reissued == {"payload_lost": 1}
    schedule.audit()


def test_a_group_whose_data_is_lost_is_voided_if_there_is_no_room_for_what_it_may_write():
    schedule = Schedule(plan(max_bytes=200))
    first, second = (schedule.admit("a", 0, 0.0) for _ in range(2))
    assert finish(schedule, first) and finish(schedule, second)
    assert schedule.admit("a", 0, 0.0).group_id == 2, "120 of 200 bytes are reserved"
    assert schedule.take_back(0, "payload_lost") and not schedule.holds(0)
    assert schedule.policy_ledger.voided == {"payload_lost": 1} and not schedule.reissued
    assert schedule.assemble().group_ids == (1,)
    schedule.audit()


def test_a_lost_workers_ticket_is_issued_again_and_its_late_duplicate_fenced():
    schedule = Schedule(plan())
    first = schedule.admit("a", 0, 0.0)
    assert schedule.lost("a", "died") == (0,)
    again = schedule.admit("b", 0, 0.0)
    assert (again.group_id, again.attempt) == (first.group_id, first.attempt + 1)
    assert not finish(schedule, first) and finish(schedule, again)
    assert schedule.fenced == 1 and schedule.reissued == {"died": 1}
    schedule.audit()


def test_a_reservation_survives_the_loss_and_is_trimmed_on_arrival():
    schedule = Schedule(plan(max_bytes=200))
    first, second = schedule.admit("a", 0, 0.0), schedule.admit("b", 0, 0.0)
    assert schedule.admit("c", 0, 0.0) is None, "two worst cases fill the queue"
    schedule.lost("a", "died")
    assert schedule.reserved_bytes == 200
    again = schedule.admit("a", 0, 0.0)
    assert again.group_id == first.group_id
    finish(schedule, again, num_bytes=30)
    finish(schedule, second, num_bytes=30)
    assert schedule.reserved_bytes == 60 and schedule.admit("a", 0, 0.0).group_id == 2


def test_more_bytes_than_reserved_are_refused_with_both_numbers():
    schedule = Schedule(plan())
    with pytest.raises(RuntimeError, match="takes 101 bytes and reserved 100"):
        finish(schedule, schedule.admit("a", 0, 0.0), num_bytes=101)


def test_a_queue_below_one_step_is_refused():
    with pytest.raises(ValueError, match="max_bytes 199 does not hold one step of 2 x 100"):
        plan(max_bytes=199)


def test_the_policy_bound_is_asserted_at_consumption():
    schedule = Schedule(plan(max_policy_age=0), first_step=1)
    for _ in range(2):
        finish(schedule, schedule.admit("a", 1, 0.0), version=0)
    with pytest.raises(RuntimeError, match=r"policy ages \(1, 1\) against max_policy_age 0"):
        schedule.assemble()


def test_a_group_cannot_be_voided_once_its_step_is_assembled():
    schedule = Schedule(plan())
    for _ in range(2):
        finish(schedule, schedule.admit("a", 0, 0.0))
    schedule.assemble()
    with pytest.raises(RuntimeError, match="after its step 0 was assembled"):
        schedule.void(0, "overage")


def test_a_group_that_the_run_ended_meanwhile_is_neither_voided_again_nor_taken():
    """The driver waits for the queue between asking whether a group is expected and voiding it; kl_stop may come between."""
    schedule = Schedule(plan(overage="mask", max_policy_age=2))
    ahead = [schedule.admit("a", 0, 0.0) for _ in range(4)]
    for admission in ahead[:2]:
        assert finish(schedule, admission)
    schedule.assemble()
    schedule.policy_trained(0, 0.0)
    cut = ahead[2]
    assert schedule.expects(cut.group_id, cut.attempt) and schedule.holds(cut.group_id)
    assert schedule.end() == (2, 3)
    assert schedule.void(cut.group_id, "overage") is False and not schedule.holds(cut.group_id)
    assert not finish(schedule, cut) and schedule.fenced == 1
    assert schedule.policy_ledger.voided == {"run_ended": 2} == schedule.head_ledger.voided
    assert schedule.holds(0) and schedule.head_trained(0) == (0, 1) and not schedule.holds(0)
    assert schedule.void(0, "overage") is False and schedule.void(99, "overage") is False
    schedule.audit()


def test_a_lost_attempt_does_not_void_the_group_that_was_issued_again_meanwhile():
    schedule = Schedule(plan(overage="mask"))
    first = schedule.admit("a", 0, 0.0)
    assert schedule.expects(first.group_id, first.attempt)
    schedule.lost("a", "died")
    again = schedule.admit("b", 0, 0.0)
    assert schedule.void(first.group_id, "overage", first.attempt) is False
    assert finish(schedule, again)
    assert schedule.void(first.group_id, "overage", first.attempt) is False
    assert schedule.void(again.group_id, "overage", again.attempt) is True
    assert schedule.policy_ledger.voided == {"overage": 1}
    schedule.audit()


def test_an_unbalanced_ledger_is_noticed():
    ledger = Ledger(admitted=2, in_flight=1)
    with pytest.raises(RuntimeError, match="does not balance"):
        ledger.check()
    schedule = Schedule(plan())
    schedule.admit("a", 0, 0.0)
    schedule.policy_ledger.queued += 1
    schedule.policy_ledger.admitted += 1
    with pytest.raises(RuntimeError, match="the ledgers say"):
        schedule.audit()


def test_a_group_is_late_only_after_the_rest_of_its_step_is_there():
    schedule = Schedule(plan(overage="drop", overage_after=5.0))
    first, second = schedule.admit("a", 0, 0.0), schedule.admit("b", 0, 1.0)
    assert schedule.next_deadline() is None, "there is no rest to compare with"
    schedule.arrived(first.group_id, 0, 0, 1, now=10.0)
    assert schedule.late(14.9) == () and schedule.late(15.0) == ((second.group_id, 0, "b"),)
    schedule.void(second.group_id, "overage")
    assert schedule.assemble().group_ids == (0,)


def test_ending_a_run_voids_what_was_admitted_ahead():
    schedule = Schedule(plan(max_policy_age=2))
    for _ in range(4):
        finish(schedule, schedule.admit("a", 0, 0.0))
    schedule.assemble()
    schedule.policy_trained(0, 0.0)
    assert schedule.end() == (2, 3) and schedule.admit("a", 1, 0.0) is None
    schedule.audit()
    assert schedule.head_trained(0) == (0, 1) and schedule.finished and schedule.reserved_bytes == 0


def test_a_group_is_refilled_as_often_as_allowed_within_its_step_its_bytes_and_the_ledger():
    schedule = Schedule(plan(max_refills=2, max_bytes=200, lag="exact"))
    first, second = schedule.admit("a", 0, 0.0), schedule.admit("b", 0, 0.0)
    assert finish(schedule, second) and schedule.reserved_bytes == 200, "it may be refilled, and keeps its room"
    for refill in (1, 2):
        assert finish(schedule, first)
        assert schedule.refill(0, first.attempt, "no_spread")
        schedule.audit()
        assert schedule.assemble() is None and schedule.in_flight() == {0: "nobody"}
        attempt = first.attempt
        first = schedule.admit("b", 0, 0.0)
        assert (first.group_id, first.due_step, first.attempt, first.refill) == (0, 0, attempt + 1, refill)
        assert first.policy_version == 0 and schedule.admit("a", 0, 0.0) is None
    assert finish(schedule, first) and schedule.reserved_bytes == 110, "it is there to stay"
    assert not schedule.may_refill(0) and not schedule.refill(0, first.attempt, "no_spread")
    assert schedule.reissued == {"no_spread": 2} and schedule.policy_ledger.admitted == 2
    assert schedule.assemble().group_ids == (0, 1)
    with pytest.raises(RuntimeError, match="group 1 was refilled"):
        schedule.refill(1, second.attempt, "no_spread")


def test_a_group_that_is_not_there_is_not_refilled_and_never_issued_twice():
    schedule = Schedule(plan(max_refills=3))
    first = schedule.admit("a", 0, 0.0)
    with pytest.raises(RuntimeError, match="group 0 was refilled .* before its arrival"):
        schedule.refill(0, 0, "no_spread")
    schedule.lost("a", "died")
    assert finish(schedule, first), "its result was on the way when its worker died"
    assert not schedule.refill(0, 1, "no_spread") and schedule.refill(0, 0, "no_spread")
    assert [schedule.admit("b", 0, 0.0).group_id for _ in range(3)] == [0, 1, 2]
    schedule.void(0, "run_ended")
    assert not schedule.refill(0, 1, "no_spread") and not schedule.may_refill(7)
    schedule.audit()


# The whole ring on a virtual clock


class Ring:
    """The real controller over simulated stages, with everything it did kept for inspection."""

    def __init__(self, draw, **changes):
        self.config, self.plan = draw_run(draw, **changes)
        source = random.Random(draw(st.integers(0, 2**32)))
        crash_share = draw(st.sampled_from([0.0, 0.0, 0.1, 0.4]))
        slow = draw(st.sampled_from([1.0, 5.0]))

        def duration(method):
            return source.choice([0.0, source.random(), slow * source.random() ** 4])

        def crashes(method):
            return method in ("generate", "load_weights", "abort") and source.random() < crash_share

        def stage(name, crashing=False):
            return SimulatedStage(
                name, duration, crashes if crashing else lambda method: False, self.plan.group_bytes // 2
            )

        def annotator(name):
            one, share = stage(name), draw(st.sampled_from([0.0, 0.3, 1.0]))
            result = one.result

            def with_spread(method, args):
                report, *payloads = result(method, args)
                if method == "embed":
                    report.metrics["spread"] = float(source.random() >= share)
                return report, *payloads

            one.result = with_spread
            return one

        num_actors = self.config.rollouts.num_actors
        self.stages = Stages.carried_by(
            rollouts=tuple(stage(f"rollout-{index}", crashing=True) for index in range(num_actors)),
            queue=stage("queue"),
            annotators=(annotator("annotator-0"), annotator("annotator-1")),
            policy=stage("policy-learner"),
            head=stage("head-learner"),
            **local_bytes(),
        )

    def run(self):
        """The metrics of every step; the schedule of the run stays in `schedule`."""
        results, self.schedule = run_virtually(self.config, self.plan, self.stages)
        return results


def draw_run(draw, **changes):
    lag = draw(st.sampled_from(["bounded", "exact"]))
    groups, bytes_each = draw(st.integers(1, 5)), draw(st.integers(2, 50))
    num_steps = draw(st.integers(1, 8))
    plan = Plan(
        **dict(
            num_steps=num_steps,
            groups_per_step=groups,
            max_policy_age=draw(st.integers(0, 4)),
            max_head_age=draw(st.integers(0, 3)),
            lag=lag,
            overage="wait" if lag == "exact" else draw(st.sampled_from(["wait", "mask", "drop"])),
            overage_after=draw(st.floats(0.01, 3.0)),
            max_refills=draw(st.sampled_from([0, 0, 1, 3])),
            group_bytes=bytes_each,
            max_bytes=groups * bytes_each + draw(st.integers(0, 3 * bytes_each)),
        )
        | changes
    )
    config = (
        R2MConfig()
        .run(num_steps=num_steps)
        .rollouts(num_actors=draw(st.integers(1, 6)), max_restarts=1000, prompts_per_step=groups)
        .head(variant="vanilla" if plan.max_refills else draw(st.sampled_from(["r2m", "vanilla"])))
        .rollouts(max_refills=plan.max_refills)
    )
    return config, plan


@given(st.data())
@settings(max_examples=250, deadline=None)
def test_whatever_the_durations_and_crashes_no_bound_breaks_nothing_is_lost_and_the_run_ends(data):
    ring = Ring(data.draw)
    results = ring.run()
    plan, schedule = ring.plan, ring.schedule
    assert len(results) == plan.num_steps and schedule.finished
    for step, metrics in enumerate(results):
        assert metrics["age/policy_max"] <= plan.max_policy_age
        assert 0 <= metrics["age/head"] <= plan.max_head_age
        if plan.lag == "exact":
            assert metrics["age/policy_max"] == metrics["age/policy_mean"] == min(step, plan.max_policy_age)
            assert metrics["age/head"] == min(step, plan.max_head_age)
    total = plan.num_steps * plan.groups_per_step
    for ledger in (schedule.policy_ledger, schedule.head_ledger):
        assert ledger.admitted == total == ledger.trained + ledger.voided.total()
        assert plan.overage != "wait" or ledger.trained == total
    assert schedule.reissued["no_spread"] <= plan.max_refills * total
    schedule.audit()
    assert schedule.reserved_bytes == 0 and not schedule.in_flight()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_max_policy_age_zero_makes_progress_with_the_smallest_queue(data):
    smallest = dict(max_policy_age=0, max_head_age=0, group_bytes=10)
    ring = Ring(data.draw)
    ring.plan = Plan(
        num_steps=ring.plan.num_steps,
        groups_per_step=ring.plan.groups_per_step,
        max_bytes=10 * ring.plan.groups_per_step,
        **smallest,
    )
    for stage in ring.stages.rollouts:
        stage.carrier.group_bytes = 10
    assert all(result["age/policy_max"] == 0 for result in ring.run())


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_run_that_ends_early_balances_too(data):
    ring = Ring(data.draw)
    ring.config = ring.config.objective(kl_stop=1.0)
    last = data.draw(st.integers(0, ring.plan.num_steps - 1))
    result = ring.stages.policy.carrier.result

    def with_kl(method, args):
        report, *payloads = result(method, args)
        if method == "train" and args[0] == last:
            report.metrics["kl/sequence"] = 2.0
        return report, *payloads

    ring.stages.policy.carrier.result = with_kl
    results = ring.run()
    assert len(results) == last + 1 and results[-1]["kl/stopped"] == 1.0
    assert ring.schedule.reserved_bytes == 0


def still(name="stage", seconds=1.0, **options):
    return SimulatedStage(name, lambda method: seconds, **options)


def stages_of(rollouts, **others):
    defaults = {name: still(name, 0.0) for name in ("queue", "policy", "head")}
    return Stages.carried_by(
        rollouts=rollouts,
        annotators=(still("annotator", 0.0),),
        **(local_bytes() | defaults | others),
    )


def test_a_drop_voids_the_straggler_and_the_step_trains_the_rest():
    slow = SimulatedStage("slow", lambda method: 100.0 if method == "generate" else 0.0)
    fast = still("fast", 1.0)
    wanted = plan(num_steps=2, overage="drop", overage_after=3.0, max_policy_age=0)
    results, _ = run_virtually(R2MConfig().run(num_steps=2), wanted, stages_of((slow, fast)))
    assert results[-1]["ledger/voided"] > 0 and results[-1]["time/since_start"] < 50


@pytest.mark.timeout(30)
def test_a_timer_that_goes_off_before_its_deadline_does_not_stop_the_clock():
    """asyncio rounds deadlines to its clock's resolution: the loop once asked, at one and the same moment, for ever."""
    for hundredths in range(1, 100):
        slow = SimulatedStage("slow", lambda method: 100.0 if method == "generate" else 0.0)
        wanted = plan(num_steps=2, overage="drop", overage_after=1.1)
        stages = stages_of((slow, still("fast", hundredths / 100)))
        results, _ = run_virtually(R2MConfig().run(num_steps=2), wanted, stages)
        assert results[0]["ledger/voided"] == 1


def test_an_actor_that_keeps_dying_ends_the_run_by_name():
    dying = still("dying", 0.1, crashes=lambda method: method == "generate")
    with pytest.raises(StageLost, match="dying died 3 times in a row; rollouts.max_restarts is 2"):
        run_virtually(R2MConfig().rollouts(max_restarts=2), plan(), stages_of((dying,)))


def test_an_error_in_a_stage_ends_the_run_with_its_own_traceback():
    class Broken(SimulatedStage):
        def result(self, method, args):
            raise ZeroDivisionError("in the learner")

    broken = Broken("policy", lambda method: 0.0)
    broken_stages = stages_of((still("a", 0.1),), policy=broken)
    with pytest.raises(ZeroDivisionError, match="in the learner"):
        run_virtually(R2MConfig(), plan(), broken_stages)


def test_a_stuck_stage_is_named_by_the_watchdog_instead_of_hanging():
    stuck = SimulatedStage("stuck-actor", lambda method: 1e9 if method == "generate" else 0.0)
    config = R2MConfig().scheduling(stall_after=60.0)
    with pytest.raises(StalledRun, match="stuck-actor generate waits for its end"):
        run_virtually(config, plan(), stages_of((stuck,)))
