"""The groups of one policy step, with what the proximal pass computed of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r2m_async.config import R2MConfig
from r2m_async.errors import WeightMismatch
from r2m_async.models.policy_objective import row_place, step_place
from r2m_async.trajectories import PolicyFeedback, Trajectory, TrajectoryGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """The groups of exactly one step, with all that the proximal pass computed of them.

    Shapes: B trajectories in group order, T response tokens that the policy wrote (padded).
    """

    step: int
    """The policy step, from 0."""
    groups: tuple[TrajectoryGroup, ...]
    """All groups of the step, on every rank."""
    trajectories: tuple[Trajectory, ...]
    """The B trajectories of all groups, in group order."""
    rows: tuple[range, ...]
    """For each group, the rows of its trajectories among them."""
    mask: Tensor
    """[B, T] bool, True on response tokens."""
    behaviour: Tensor
    """[B, T] float32: log-probabilities under mu, 0 on padding."""
    old: Tensor
    """[B, T] float32: log-probabilities under pi_old, 0 on padding."""
    reference: Tensor
    """[B, T] float32: log-probabilities under pi_ref, 0 on padding."""
    values: Tensor | None
    """[B, T] float32: the critic's values at the start of the step, 0 on padding. None without a critic."""
    prompts: Tensor | None
    """[B, D_p] float32: pi_old's state at the end of each prompt. None unless the estimator needs states."""

    @property
    def place(self) -> str:
        """The name of the step for messages."""
        return step_place(self.step, self.groups)

    @property
    def ages(self) -> Tensor:
        """[B] int64: the age of each trajectory, which is the step minus the oldest policy version that sampled it."""
        return torch.tensor([max(0, self.step - trajectory.oldest_version) for trajectory in self.trajectories])

    def refreshed(self, states: dict[int, Tensor]) -> tuple[PolicyFeedback, ...]:
        """The refreshed feedback on those groups whose states are there.

        Args:
            states: for a row, the hidden states of its trajectory, [S - 1, D_p].
        """
        return tuple(
            PolicyFeedback(
                group_id=group.ticket.group_id,
                hidden_states=tuple(states[row] for row in rows),
                greedy=None,  # the twin is not trained on, and the head learner does not read it
                policy_version=self.step,
            )
            for group, rows in zip(self.groups, self.rows, strict=True)
            if all(row in states for row in rows)
        )

    def compared_with_sampler(self, version: int, config: R2MConfig) -> bool:
        """Compares the log-probabilities of learner and rollout engine, on the tokens that a policy version sampled.

        Args:
            version: the learner's policy version.
            config: the run's config.

        Returns whether there was such a token. Raises WeightMismatch if the distance is above `learner.max_mismatch` in
        the mean over these tokens.
        """
        fresh = torch.zeros_like(self.mask)
        for row, one in enumerate(self.trajectories):
            fresh[row, : one.num_policy_tokens] = one.of_policy(one.policy_versions) == version
        if not fresh.any():
            return False
        distances = (self.old - self.behaviour).abs().masked_fill(~fresh, 0)
        mean, limit = (distances.sum() / fresh.sum()).item(), config.max_mismatch
        # Numbers that are not finite are told by `check_passes`, with their source.
        if not math.isfinite(mean) or mean <= limit:
            return True
        row, token = divmod(int(distances.argmax()), distances.shape[1])
        raise WeightMismatch(
            f"{self.place}: learner and rollout engine do not compute the same policy. Their log-probabilities of the "
            f"{int(fresh.sum())} tokens that version {version} sampled differ by {mean:.3g} nats in the mean, and "
            f"learner.max_mismatch is {limit:g}. Most at {row_place(self.groups, row)}, token {token}: "
            f"{self.old[row, token].item():.4g} by the learner, {self.behaviour[row, token].item():.4g} by "
            f"rollouts.engine {config.rollouts.engine!r}. Use rollouts.engine 'transformers' to see which of them is "
            f"wrong, or raise learner.max_mismatch if the engine rounds more coarsely on purpose"
        )


def group_rows(groups: Sequence[TrajectoryGroup]) -> tuple[range, ...]:
    """Returns for each group the rows of its trajectories among those of all groups."""
    rows, start = [], 0
    for group in groups:
        rows.append(range(start, start + len(group.trajectories)))
        start += len(group.trajectories)
    return tuple(rows)
