"""The scale of rewards: what `reward.normalize` makes of the rewards of a step before advantages are computed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from r2m_async.config import R2MConfig
from r2m_async.trajectories import ScoredGroup

_EPS = 1e-8
"""Added to the spread, so that equal rewards become 0 and not 0 / 0."""


class RewardScale:
    """Moves and divides the rewards of each step as `reward.normalize` says. With `running` it remembers all steps.

    Every process that computes advantages gets all rewards of a step, so all have the same scale.
    """

    def __init__(self, config: R2MConfig) -> None:
        """Begins without any reward seen."""
        self._how, self._clip = config.reward.normalize, config.reward.normalize_clip
        self._count, self._mean, self._squares = 0.0, 0.0, 0.0
        """The number of rewards seen, their mean, and the sum of their squared distances from it."""

    def state(self) -> list[float]:
        """Returns what `restore` needs."""
        return [self._count, self._mean, self._squares]

    def restore(self, state: Sequence[float]) -> None:
        """Goes on from what `state` returned."""
        self._count, self._mean, self._squares = state

    def scaled(self, scored: Sequence[ScoredGroup]) -> list[tuple[Tensor, Tensor | None]]:
        """Returns for each group of a step its rewards [K] and the reward of its greedy twin, or None without one.

        The mean and the spread are those of all sampled responses: of this step, or with `running` of all steps so far,
        this one included. The spread is the root of the mean squared distance from the mean.
        """
        rewards = [(one.rewards.rewards, one.rewards.greedy_reward) for one in scored]
        if self._how == "none":
            return rewards
        mean, spread = self._moments(torch.cat([own for own, _ in rewards]).double())

        def moved(reward: Tensor) -> Tensor:
            # In float64, because a mean far from 0 takes digits away.
            value = (reward.double() - mean) / (1.0 if self._how == "center" else spread + _EPS)
            return (value if self._clip is None else value.clamp(-self._clip, self._clip)).to(reward.dtype)

        return [(moved(own), None if greedy is None else moved(greedy)) for own, greedy in rewards]

    def _moments(self, values: Tensor) -> tuple[float, float]:
        """The mean and the spread by which `values` [N] are scaled. With `running` the values are remembered."""
        count, mean = float(len(values)), values.mean().item()
        squares = (values - mean).square().sum().item()
        if self._how == "running":
            # Two samples become one: Chan, Golub and LeVeque, "Updating formulae" (1979), Eq. 2.1.
            total, distance = self._count + count, mean - self._mean
            squares = self._squares + squares + distance * distance * self._count * count / total
            count, mean = total, self._mean + distance * count / total
            self._count, self._mean, self._squares = count, mean, squares
        return mean, math.sqrt(squares / count)
