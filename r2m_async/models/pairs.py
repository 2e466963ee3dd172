"""Labelled pairs that the policy reads once more, so that the head learns from its present states on them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from r2m_async.trajectories import LabelBatch, PolicyFeedback, RereadPair, Trajectory


def pair_trajectories(labels: LabelBatch) -> list[Trajectory]:
    """Returns the trajectories of all pairs, two for each: the preferred response, then the other."""
    return [trajectory for pair in labels.pairs for trajectory in pair.trajectories or ()]


def reread_pairs(labels: LabelBatch, states: Mapping[int, Tensor], step: int) -> tuple[RereadPair, ...]:
    """Returns what the policy makes of those pairs whose states are there.

    states: by the place of a trajectory in `pair_trajectories`, its hidden states [S - 1, D].
    step: the policy step. The policy has the version after it.
    """
    return tuple(
        RereadPair(
            group_id=place,
            feedback=PolicyFeedback(
                group_id=pair.label.group_id,
                hidden_states=(states[2 * place], states[2 * place + 1]),
                greedy=None,
                policy_version=step + 1,
            ),
        )
        for place, pair in enumerate(labels.pairs)
        if 2 * place in states
    )
