"""Labels on the simulator's clock: whenever they come, no age breaks its bound, none is lost, and the policy does not wait."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2m_async.config import R2MConfig
from r2m_async.ring.labels import LabelBook
from r2m_async.ring.simulator import SimulatedStage, StageTimes, run_virtually, simulate
from r2m_async.ring.stages import Stages, local_bytes
from r2m_async.schedule import Plan
from r2m_async.trajectories import Label, LabelReport


def label(group_id=0, step=0, **changes):
    return Label(group_id=group_id, step=step, pair=(0, 1), **changes)


def preferred(group_id=0, step=0):
    return label(group_id, step, chosen=1)


def test_a_label_is_used_within_its_age_and_counted_once():
    book = LabelBook(max_age=2, exact=False)
    book.ask([label(0), label(1), label(2)])
    assert book.settle(0, [preferred(0)]) == [0]
    assert book.settle(1, [label(1, reason="tie", who="anna")]) == []
    assert book.settle(2, [preferred(2)]) == [2]
    assert (book.asked, book.used, book.voided) == (3, 2, {"tie": 1})
    told = book.metrics([0, 2])
    assert (told["labels/waiting"], told["labels/voided/tie"]) == (0.0, 1.0)
    assert (told["age/label_max"], told["age/label_mean"]) == (2.0, 1.0)


def test_what_breaks_the_bound_or_was_never_asked_is_refused():
    book = LabelBook(max_age=1, exact=False)
    book.ask([label(0)])
    with pytest.raises(RuntimeError, match="asked about twice"):
        book.ask([label(0)])
    with pytest.raises(RuntimeError, match=r"\(7, 0, 1\) of step 0, which waits for none"):
        book.settle(0, [preferred(7)])
    with pytest.raises(RuntimeError, match="update of step 2 would use a label of age 2, and labels.max_age is 1"):
        book.settle(2, [preferred(0)])


def test_a_pair_that_no_update_could_use_any_more_must_not_be_left_waiting():
    book = LabelBook(max_age=1, exact=False)
    book.ask([label(0)])
    book.settle(0, [])
    with pytest.raises(RuntimeError, match=r"no other can use the labels of the pairs \[\(0, 0, 1\)\]"):
        book.settle(1, [])


def test_under_wait_a_label_has_exactly_the_age_that_is_asked_for():
    book = LabelBook(max_age=2, exact=True)
    book.ask([label(0)])
    with pytest.raises(RuntimeError, match=r"age 1, and labels.max_age is 2 \(labels.wait\)"):
        book.settle(1, [preferred(0)])


def test_a_saved_book_goes_on_where_it_was():
    book = LabelBook(max_age=3, exact=False)
    book.ask([label(0), label(1)])
    book.settle(0, [label(0, reason="refused")])
    again = LabelBook(3, False, book.saved())
    assert again.saved() == book.saved()
    assert again.settle(2, [preferred(1)]) == [2]
    assert again.asked == again.used + again.voided.total() == 2


class Labelling(SimulatedStage):
    """Asks about the first group of each step; the answer comes when it comes, or never."""

    def __init__(self, duration, source, max_age, wait, groups):
        super().__init__("labeller", duration)
        self.source, self.max_age, self.wait, self.groups, self.waiting = source, max_age, wait, groups, []

    def result(self, method, args):
        step = args[0]
        if method == "ask":
            asked = label(step * self.groups, step)
            self.waiting.append(asked)
            return (LabelReport(version=step, labels=(asked,), records=[]),)
        settled = []
        for one in [one for one in self.waiting if one.step <= step]:
            age = step - one.step
            if age == self.max_age or (not self.wait and self.source.random() < 0.4):
                self.waiting.remove(one)
                late = age == self.max_age and self.source.random() < 0.5
                settled.append(
                    label(one.group_id, one.step, reason="late") if late else preferred(one.group_id, one.step)
                )
        return LabelReport(version=step, labels=tuple(settled), records=[{"step": step}] * len(settled)), None


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_whenever_labels_come_the_book_balances_and_the_run_ends(data):
    source = random.Random(data.draw(st.integers(0, 10**6)))
    wait, groups = data.draw(st.booleans()), data.draw(st.integers(1, 3))
    max_age = data.draw(st.integers(0 if wait else 1, 3))
    num_steps = data.draw(st.integers(1, 7))
    config = R2MConfig().run(num_steps=num_steps).rollouts(prompts_per_step=groups, num_actors=2)
    config = config.labels(source="any:function", max_age=max_age, wait=wait, budget=1)
    plan = Plan(
        num_steps=num_steps,
        groups_per_step=groups,
        max_policy_age=data.draw(st.integers(0, 3)),
        max_head_age=data.draw(st.integers(0, 3)),
        max_bytes=1,
        group_bytes=0,
    )
    stages = simulated(lambda method: source.random(), source, max_age, wait, groups)
    results, _ = run_virtually(config, plan, stages)
    for metrics in results:
        counted = [metrics.get(f"labels/{name}", 0.0) for name in ("asked", "used", "waiting", "voided")]
        assert counted[0] == sum(counted[1:])
        assert metrics.get("age/label_max", 0.0) <= max_age


def simulated(duration, source, max_age, wait, groups):
    return Stages.carried_by(
        rollouts=tuple(SimulatedStage(f"rollout-{index}", duration) for index in range(2)),
        queue=SimulatedStage("queue", duration),
        annotators=(SimulatedStage("annotator-0", duration),),
        policy=SimulatedStage("policy-learner", duration),
        head=SimulatedStage("head-learner", duration),
        labels=Labelling(duration, source, max_age, wait, groups),
        **local_bytes(),
    )


def test_a_stage_that_breaks_the_bound_ends_the_run():
    config = R2MConfig().run(num_steps=5).rollouts(prompts_per_step=1)
    config = config.labels(source="any:function", max_age=1, budget=1)
    plan = Plan(num_steps=5, groups_per_step=1, max_policy_age=0, max_head_age=0, max_bytes=1, group_bytes=0)
    stages = simulated(lambda method: 0.1, random.Random(0), 3, True, 1)
    with pytest.raises(RuntimeError, match="no other can use the labels"):
        run_virtually(config, plan, stages)


def test_a_wait_for_labels_is_a_part_of_the_heads_update_in_a_prediction():
    config = R2MConfig().run(num_steps=20).scheduling(max_policy_age=1, max_head_age=1).rollouts(num_actors=8)
    times = StageTimes(generate=1.0, train=1.0, labels=3.0)
    alone, labelled = (
        simulate(one, times) for one in (config, config.labels(source="any:function", budget=1, wait=True))
    )
    assert (alone.bound_seconds_per_step, labelled.bound_seconds_per_step) == (1.0, 3.0)
    assert labelled.serial_seconds_per_step - alone.serial_seconds_per_step == 3.0
    assert alone.seconds_per_step < 2.5 < labelled.seconds_per_step
