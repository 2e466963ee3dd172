"""Which rank computes which part of a step. Whole groups go to ranks, and all ranks make equally many forward passes.

A rank with less work repeats a short trajectory, and the result counts for nothing. The ranks meet in collectives
inside every pass, so a rank that stayed away would make the others hang or fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from r2m_async.models.policy import microbatches
from r2m_async.trajectories import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The trajectories of one forward pass."""

    rows: tuple[int, ...]
    """Their indices among the step's trajectories."""
    counts: bool
    """False if the pass is only there to keep pace with other ranks. Its result is then ignored."""


def shares(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Shares items out to ranks so that the ranks get about the same total size.

    The largest item goes first, and each goes to the rank that has the least so far.

    Args:
        sizes: the size of each item.
        num_ranks: how many ranks there are.

    Returns for each rank the indices of its items, ascending.
    """
    loads = [0] * num_ranks
    owned: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rank = loads.index(min(loads))
        loads[rank] += sizes[index]
        owned[rank].append(index)
    return [sorted(indices) for indices in owned]


def group_shares(trajectories: Sequence[Trajectory], groups: Sequence[range], num_ranks: int) -> list[list[int]]:
    """Shares groups out to ranks by their number of tokens.

    Args:
        trajectories: all trajectories of the step.
        groups: for each group, the rows of its trajectories among them.
        num_ranks: how many ranks there are.

    Returns for each rank the indices of its groups, ascending.
    """
    return shares([sum(len(trajectories[row].token_ids) for row in group) for group in groups], num_ranks)


def rank_microbatches(
    trajectories: Sequence[Trajectory],
    groups: Sequence[range],
    rank: int,
    num_ranks: int,
    max_tokens: int,
    packed: bool = False,
) -> list[MicroBatch]:
    """The forward passes of one rank over some groups of a step. Every rank gets equally many.

    Args:
        trajectories: all trajectories of the step.
        groups: for each of these groups, the rows of its trajectories among them.
        rank: the rank whose passes are wanted.
        num_ranks: how many ranks there are.
        max_tokens: the most tokens in one pass. A single trajectory may be longer.
        packed: whether a pass has no padding. If it has, padding counts as tokens.

    Returns the passes in the order of `microbatches`. Those that count for nothing come last.
    """
    # Every rank works out the passes of all ranks by itself, so they agree without a message.
    passes = []
    for owned in group_shares(trajectories, groups, num_ranks):
        rows = [row for index in owned for row in groups[index]]
        parts = microbatches([trajectories[row] for row in rows], max_tokens, packed)
        passes.append([MicroBatch(rows=tuple(rows[index] for index in part), counts=True) for part in parts])
    # The cheapest pass that still goes through the whole model.
    shortest = min((row for group in groups for row in group), key=lambda row: len(trajectories[row].token_ids))
    missing = max(map(len, passes)) - len(passes[rank])
    return passes[rank] + [MicroBatch(rows=(shortest,), counts=False)] * missing
