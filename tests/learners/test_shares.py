"""How a step's groups are shared out to the ranks of a learner, and how their answers become one."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learners.shares import rank_microbatches, shares
from r2m_async.errors import NonFiniteStep, StageLost
from r2m_async.launch import ray_stages
from r2m_async.launch.arguments import PLACE, with_payloads
from r2m_async.models.policy import microbatches
from r2m_async.trajectories import Trajectory


def trajectory(length: int) -> Trajectory:
    return Trajectory(
        token_ids=torch.zeros(length, dtype=torch.int64),
        prompt_len=1,
        behaviour_logprobs=torch.zeros(length),
        policy_versions=torch.zeros(length, dtype=torch.int32),
        finish_reason="stop",
        text="",
    )


def rows_of(sizes: list[int]) -> list[range]:
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def test_the_longest_come_first_and_go_to_whoever_has_least():
    assert shares([5, 9, 4, 4, 2], 2) == [[1, 3], [0, 2, 4]]
    assert shares([7], 3) == [[0], [], []]
    assert shares([3, 3, 3, 3], 2) == [[0, 2], [1, 3]]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 4))
def test_every_group_has_one_rank_and_no_rank_has_more_than_the_others_by_a_group(sizes, num_ranks):
    owned = shares(sizes, num_ranks)
    assert sorted(index for indices in owned for index in indices) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in indices) for indices in owned]
    assert max(loads) - min(loads) <= max(sizes)


@given(
    st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=4), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 60),
)
def test_every_trajectory_counts_once_and_all_ranks_make_equally_many_passes(groups, num_ranks, max_tokens):
    trajectories = [trajectory(length) for lengths in groups for length in lengths]
    rows = rows_of([len(lengths) for lengths in groups])
    by_rank = [rank_microbatches(trajectories, rows, rank, num_ranks, max_tokens) for rank in range(num_ranks)]
    assert len({len(passes) for passes in by_rank}) == 1
    counted = [row for passes in by_rank for one in passes if one.counts for row in one.rows]
    assert sorted(counted) == list(range(len(trajectories)))
    assert all(one.rows for passes in by_rank for one in passes)


def test_one_rank_makes_the_passes_of_all_trajectories():
    trajectories = [trajectory(length) for length in (5, 3, 9, 2, 2)]
    passes = rank_microbatches(trajectories, rows_of([2, 3]), 0, 1, 10)
    assert [one.rows for one in passes] == [(3, 4, 1), (0,), (2,)]
    assert [list(one.rows) for one in passes] == microbatches(trajectories, 10)


def test_what_the_ranks_return_of_a_payload_is_put_together_in_the_order_of_groups():
    one, two, three = (SimpleNamespace(group_id=group_id) for group_id in (1, 2, 3))
    packed = with_payloads([7, {PLACE: [0, 1, 2]}, {PLACE: 3}], [(one, three), None, (two,), "x"])
    assert packed == [7, (one, two, three), "x"]
    assert with_payloads({PLACE: [0, 1]}, [None, None]) is None


async def failing(error: Exception, after: asyncio.Event | None = None, then: asyncio.Event | None = None) -> None:
    if after is not None:
        await after.wait()
    if then is not None:
        then.set()
    raise error


def outcome_of(*ranks) -> None:
    async def call() -> None:
        await ray_stages._ended([asyncio.create_task(rank) for rank in ranks])

    asyncio.run(call())


def test_a_lost_rank_is_what_failed_even_if_the_ranks_it_left_alone_speak_first():
    first = asyncio.Event()
    with pytest.raises(StageLost, match="policy-learner-1 was lost"):
        outcome_of(
            failing(RuntimeError("connection reset by peer"), then=first),
            failing(StageLost("policy-learner-1", "policy-learner-1 was lost"), after=first),
        )
    never = asyncio.Event()
    with pytest.raises(StageLost, match="policy-learner-0 was lost"):  # at once, whatever the other still waits for
        outcome_of(failing(StageLost("policy-learner-0", "policy-learner-0 was lost")), never.wait())


def test_a_rank_that_fails_alone_is_not_waited_for_by_the_others_for_ever(monkeypatch):
    monkeypatch.setattr(ray_stages, "_LAST_WORDS", 0.01)
    with pytest.raises(NonFiniteStep, match="step 3"):
        outcome_of(failing(NonFiniteStep("step 3")), asyncio.Event().wait())
