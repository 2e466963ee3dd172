"""Who computes what: whole groups go to ranks, and every rank makes the same number of forward passes.

A rank without enough work of its own repeats a short response that counts for nothing: the ranks meet in collectives
inside every pass, and one that stayed away would hang or kill the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from r2m_async.models.policy import microbatches
from r2m_async.trajectories import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    rows: tuple[int, ...]
    """Of the step's trajectories."""
    counts: bool
    """False if it only keeps pace with other ranks."""


def shares(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices of `sizes` by rank, each ascending: the largest first, always to the rank that has the least so far."""
    loads, owned = [0] * num_ranks, [[] for _ in range(num_ranks)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rank = loads.index(min(loads))
        loads[rank] += sizes[index]
        owned[rank].append(index)
    return [sorted(indices) for indices in owned]


def group_shares(trajectories: Sequence[Trajectory], groups: Sequence[range], num_ranks: int) -> list[list[int]]:
    """`shares` of groups, given by the rows of their trajectories, by their number of tokens."""
    return shares([sum(len(trajectories[row].token_ids) for row in group) for group in groups], num_ranks)


def rank_microbatches(
    trajectories: Sequence[Trajectory],
    groups: Sequence[range],
    rank: int,
    num_ranks: int,
    max_tokens: int,
    packed: bool = False,
) -> list[MicroBatch]:
    """The passes of one rank over some groups of a step, in group order; every rank has equally many."""
    passes = []
    for owned in group_shares(trajectories, groups, num_ranks):
        rows = [row for index in owned for row in groups[index]]
        parts = microbatches([trajectories[row] for row in rows], max_tokens, packed)
        passes.append([MicroBatch(rows=tuple(rows[part]), counts=True) for part in parts])
    shortest = min((row for group in groups for row in group), key=lambda row: len(trajectories[row].token_ids))
    missing = max(map(len, passes)) - len(passes[rank])
    return passes[rank] + [MicroBatch(rows=(shortest,), counts=False)] * missing
