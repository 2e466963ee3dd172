"""The labeller: labels that come late, out of order or not at all, each used once or counted under its reason."""

import asyncio
import time
from concurrent.futures import Future

import pytest
import torch
from labelled import embeddings_of, groups_of_texts, rewards_of, states_of

from actors.labeller import Labeller
from r2m_async.codec import decode, encode
from r2m_async.config import R2MConfig
from r2m_async.errors import FunctionFailed
from r2m_async.labels.questions import Answer


class Asked:
    """A source that a test answers by hand, in any order."""

    def __init__(self):
        self.open = {}

    def ask(self, question):
        self.open[question.label.group_id] = question, Future()
        return self.open[question.label.group_id][1]

    def answer(self, group_id, preferred, reason=None):
        self.open[group_id][1].set_result(Answer(preferred=preferred, reason=reason, who="anna"))

    def close(self):
        pass


def config_with(**labels):
    config = R2MConfig().head(variant="r2m").rollouts(group_size=3, prompts_per_step=2)
    return config.labels(**{"source": "any:function", "budget": 2, "max_age": 2} | labels)


class Ring:
    """Takes a labeller through steps of two groups, each of three responses."""

    def __init__(self, **labels):
        self.source, self.config = Asked(), config_with(**labels)
        self.labeller = Labeller(self.source, self.config)

    def ask(self, step):
        groups = groups_of_texts(step, [f"group {2 * step + index}" for index in range(2)], 3)
        ids = [group.ticket.group_id for group in groups]
        (report,) = self.labeller.ask(step, groups, embeddings_of(ids, 3), rewards_of(ids, 3))
        return report.labels

    def labels(self, step, refreshed="all"):
        refreshed = states_of([2 * step, 2 * step + 1], 3) if refreshed == "all" else refreshed
        return self.labeller.labels(step, refreshed)


def fates(report):
    return {label.group_id: label.reason or "used" for label in report.labels}


def test_a_label_comes_with_the_embeddings_and_the_refreshed_states_of_its_two_responses():
    ring = Ring()
    assert [label.group_id for label in ring.ask(0)] == [0, 1]
    ring.source.answer(1, 1)
    report, batch = ring.labels(0)
    assert fates(report) == {1: "used"} and batch.asked == (0, 1)
    (pair,) = batch.new
    rejected, chosen = pair.label.pair
    assert pair.label.chosen == chosen
    wanted = embeddings_of([1], 3)[0].rte[[chosen, rejected]], states_of([1], 3)[0].hidden_states
    assert torch.equal(pair.group.embeddings.rte, wanted[0])
    assert all(
        torch.equal(ours, wanted[1][index])
        for ours, index in zip(pair.group.feedback.hidden_states, (chosen, rejected), strict=True)
    )
    rewards = rewards_of([1], 3)[0].model_rewards[[chosen, rejected]]
    assert pair.group.annotated.model_rewards.tolist() == rewards.tolist()


def test_labels_are_used_by_the_first_update_after_they_came_in_any_order_and_late_pairs_are_given_up():
    ring = Ring()
    ring.ask(0)
    assert fates(ring.labels(0)[0]) == {}
    ring.ask(1)
    ring.source.answer(2, 0)
    assert fates(ring.labels(1)[0]) == {2: "used"}, "a younger pair before the older ones"
    ring.ask(2)
    ring.source.answer(0, 1)
    report, batch = ring.labels(2)
    assert fates(report) == {0: "used", 1: "late"} and batch.asked == (4, 5)
    assert ring.source.open[1][1].cancelled(), "nobody need answer it any more"
    assert [record["age"] for record in report.records] == [2, 2]


def test_while_the_policy_is_ahead_of_the_head_its_pairs_wait_for_their_states():
    ring = Ring()
    ring.ask(0)
    ring.ask(1)
    for group_id in range(4):
        ring.source.answer(group_id, 0)
    assert fates(ring.labels(0)[0]) == {0: "used", 1: "used"}
    assert fates(ring.labels(1)[0]) == {2: "used", 3: "used"}


@pytest.mark.parametrize("reason", ["tie", "refused", "disagreed"])
def test_an_answer_without_a_preference_teaches_nothing_and_is_kept_under_its_reason(reason):
    ring = Ring()
    ring.ask(0)
    ring.source.answer(0, None, reason)
    report, batch = ring.labels(0)
    assert fates(report) == {0: reason} and batch.new == () and batch.asked == (0, 1)
    (record,) = report.records
    assert (record["reason"], record["who"], record["prompt"]) == (reason, "anna", "group 0")
    assert {record["first"], record["second"]} < {"group 0 answer 0", "group 0 answer 1", "group 0 answer 2"}
    assert "chosen" not in record


def test_a_preference_is_written_as_a_pair_of_a_data_set():
    ring = Ring()
    pair = ring.ask(0)[0].pair
    ring.source.answer(0, 1)
    (record,) = ring.labels(0)[0].records
    assert (record["chosen"], record["rejected"]) == (f"group 0 answer {pair[1]}", f"group 0 answer {pair[0]}")
    assert record["chosen_finished"] is (pair[1] != 0) and record["rejected_finished"] is (pair[0] != 0)
    assert (record["step"], record["age"], record["group_id"], record["turned"]) == (0, 0, 0, False)


def test_a_source_that_fails_is_counted_and_ends_the_run_when_it_fails_too_often_in_a_row():
    ring = Ring(max_failed=2)
    for step in range(2):
        ring.ask(step)
        ring.source.open[2 * step][1].set_exception(FunctionFailed("the server is down"))
        if step == 0:
            ring.source.answer(1, 0)
        else:
            ring.source.open[3][1].set_exception(FunctionFailed("the server is down"))
        assert "failed" in fates(ring.labels(step)[0]).values()
    ring.ask(2)
    ring.source.open[4][1].set_exception(FunctionFailed("the server is down"))
    with pytest.raises(FunctionFailed, match="the server is down\n3 labels in a row .*, and labels.max_failed is 2"):
        ring.labels(2)


def test_pairs_of_a_step_that_the_policy_left_out_have_no_states_and_are_given_up():
    ring = Ring()
    ring.ask(0)
    ring.source.answer(0, 0)
    report, batch = ring.labels(0, refreshed=())
    assert fates(report) == {0: "left_out", 1: "left_out"} and batch.new == ()


def test_a_head_that_reads_no_states_gets_none():
    ring = Ring()
    ring.ask(0)
    ring.source.answer(0, 0)
    (pair,) = ring.labels(0, refreshed=None)[1].new
    assert pair.group.feedback is None


def test_what_takes_longer_than_its_time_is_given_up_and_nobody_waits_longer_than_that():
    ring = Ring(timeout=0.2, max_age=5)
    ring.ask(0)
    assert fates(ring.labels(0)[0]) == {}
    ring.ask(1)
    time.sleep(0.25)
    assert fates(ring.labels(1)[0]) == dict.fromkeys(range(4), "timeout")
    ring = Ring(timeout=0.2, max_age=0, wait=True)
    ring.ask(0)
    assert fates(ring.labels(0)[0]) == {0: "timeout", 1: "timeout"}


def test_under_wait_an_update_waits_for_the_labels_of_its_age_and_leaves_younger_ones():
    ring = Ring(wait=True, max_age=1)
    ring.ask(0)
    ring.source.answer(1, 0)
    assert fates(ring.labels(0)[0]) == {}, "held back until its age"
    ring.ask(1)
    ring.source.answer(2, 0)

    async def main():
        waiting = asyncio.create_task(ring.labeller.before_labels(1, None))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        ring.source.answer(0, 1)
        await asyncio.wait_for(waiting, 10)

    asyncio.run(main())
    assert fates(ring.labels(1)[0]) == {0: "used", 1: "used"}


def test_noise_turns_labels_round_and_the_record_says_so():
    ring, turned = Ring(noise=0.5), []
    for step in range(20):
        pairs = ring.ask(step)
        for label in pairs:
            ring.source.answer(label.group_id, 0)
        report, batch = ring.labels(step)
        for record, label, pair in zip(report.records, pairs, batch.new, strict=True):
            turned.append(record["turned"])
            assert pair.label.chosen == label.pair[record["turned"]]
            assert record["chosen"].endswith(f"answer {pair.label.chosen}")
    assert 10 < sum(turned) < 30


def test_a_replay_is_of_earlier_updates_and_of_the_newest_that_are_kept():
    ring, used = Ring(replay=2, replay_from=3), []
    for step in range(6):
        for label in ring.ask(step):
            ring.source.answer(label.group_id, 0)
        _, batch = ring.labels(step)
        assert len(batch.replayed) == min(2, len(used)) and batch.pairs == (*batch.new, *batch.replayed)
        assert {pair.label.key for pair in batch.replayed} <= {pair.label.key for pair in used[-3:]}
        used += batch.new


def test_a_restored_labeller_goes_on_with_what_was_answered_and_asks_again_for_the_rest():
    ring = Ring(wait=True, max_age=1, replay=1)
    for step in range(2):
        ring.ask(step)
        for group_id in (2 * step, 2 * step + 1):
            ring.source.answer(group_id, 0) if group_id != 3 else None
        ring.labels(step)
    state = decode(encode(ring.labeller.state()[1]))
    other = Ring(wait=True, max_age=1, replay=1)
    assert other.labeller.restore(state) == (2,)
    assert set(other.source.open) == {3}, "2 has its answer"
    batches = []
    for one in (ring, other):
        one.source.answer(3, 1)
        one.ask(2)
        report, batch = one.labels(2)
        assert fates(report) == {2: "used", 3: "used"} and len(batch.replayed) == 1
        batches.append(bytes(encode(batch)))
    assert batches[0] == batches[1]
