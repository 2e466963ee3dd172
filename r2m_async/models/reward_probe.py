"""A linear probe on the policy's own states predicts the reward of a prompt, as a baseline that costs no critic.

It is for estimators with the flag `needs_states`, such as `probe`. The features of a prompt are the policy's hidden state
in which the first token of a response is chosen. They do not depend on the response, and the probe has learnt from earlier
steps alone. So the baseline leaves the policy gradient unbiased. No gradient flows into the policy.

The idea of such a baseline is that of arXiv 2605.07579. How it is fitted here is this project's choice: ridge regression
on all rewards so far, of which older ones count less.

Shapes: B responses of a step, D hidden size of the policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from r2m_async.advantages import Estimator
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.models.policy import feedback_states
from r2m_async.trajectories import Trajectory

PROBE_OPTIONS = {"strength", "decay"}
"""The keys of `advantage.options` that are settings of the probe."""


def prompt_state(states: Tensor, trajectory: Trajectory) -> Tensor:
    """Returns the state [D] in which the first token of a response is chosen.

    states: [S - 1, D], the hidden states of the trajectory. Of an empty response it is the last state that there is.
    """
    return states[min(trajectory.prompt_len, len(states)) - 1]


class PromptStates:
    """Collects the prompt's state of each trajectory of a step from forward passes."""

    def __init__(self, trajectories: Sequence[Trajectory], config: R2MConfig) -> None:
        """Begins with no states. They are rounded to `feedback.dtype`."""
        self._trajectories, self._config = trajectories, config
        self._rows: dict[int, Tensor] = {}

    def keep(self, rows: Sequence[int], states: Sequence[Tensor]) -> None:
        """Keeps what a pass has computed for some rows: the hidden states [S - 1, D] of each trajectory."""
        for row, one in zip(rows, states, strict=True):
            (rounded,) = feedback_states([prompt_state(one, self._trajectories[row])], self._config)
            self._rows[row] = rounded.float()

    def taken(self, width: int) -> Tensor:
        """Returns [B, D = `width`] float32 on the CPU. Rows that were not kept, because other ranks have them, are 0."""
        states_BD = torch.zeros(len(self._trajectories), width)
        for row, one in self._rows.items():
            states_BD[row] = one
        return states_BD


def ridge(
    weight: Tensor, states: Tensor, rewards: Tensor, outer: Tensor, products: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    """Returns the coefficients [D] and the intercept of a weighted ridge regression of rewards on states, from sums.

    Args:
        weight: the sum of all weights w.
        states: [D], the sum of w x.
        rewards: the sum of w r.
        outer: [D, D], the sum of w x x^T.
        products: [D], the sum of w r x.
        strength: the penalty on the square of the coefficients, as a share of the mean variance of a state's entry. The
            intercept has no penalty.

    They minimise sum of w (r - c - b x)^2 / sum of w + strength v |b|^2, with v that mean variance. States without any
    variance give coefficients of 0.
    """
    mean_D, mean = states / weight, rewards / weight
    covariance_DD = outer / weight - mean_D[:, None] * mean_D
    scale = covariance_DD.diagonal().mean()
    if not scale > 0:
        return torch.zeros_like(mean_D), mean
    penalty_DD = strength * scale * torch.eye(len(mean_D), dtype=mean_D.dtype)
    coefficients_D = torch.linalg.solve(covariance_DD + penalty_DD, products / weight - mean * mean_D)
    return coefficients_D, mean - coefficients_D @ mean_D


def probe_of(estimator: Estimator, config: R2MConfig) -> RewardProbe | None:
    """Returns the probe of a run, or None if its estimator needs none."""
    if not estimator.needs_states:
        return None
    options: dict[str, Any] = {
        key: config.advantage.options[key] for key in PROBE_OPTIONS & config.advantage.options.keys()
    }
    return RewardProbe(**options)


class RewardProbe:
    """Predicts rewards from states, and learns from the rewards of each step once it has predicted them.

    Every process that computes advantages gets all rewards and states of a step, so all have the same probe. It keeps a
    matrix [D, D] in float64.
    """

    def __init__(self, strength: float = 0.1, decay: float = 0.9) -> None:
        """Begins without any reward seen.

        Args:
            strength: the penalty of the ridge regression, see `ridge`.
            decay: how much the rewards of a step count one step later. 1: as much.

        Raises ConfigError for settings out of range.
        """
        for key, value, most in (("strength", strength, math.inf), ("decay", decay, 1.0)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise ConfigError(
                    f"advantage.options.{key} is {value!r}; give a number above 0{' and at most 1' if most == 1 else ''}"
                )
        self._strength, self._decay = strength, decay
        self._sums: dict[str, Tensor] | None = None
        """The arguments of `ridge`. None before the first step."""

    def baselines(self, states: Tensor, rewards: Tensor) -> Tensor:
        """Returns the baseline of each response of a step, and learns from the step.

        Args:
            states: [B, D] float32, the state of each response's prompt.
            rewards: [B], the rewards of the responses.

        Returns [B] in the dtype of `rewards`. In the first step it is the mean reward of the other responses, or 0 if
        there is no other.
        """
        states_BD, rewards_B = states.double(), rewards.double()
        if self._sums is None:
            others = max(1, len(rewards_B) - 1)
            predicted_B = (rewards_B.sum() - rewards_B) / others
        else:
            coefficients_D, intercept = ridge(**self._sums, strength=self._strength)
            predicted_B = states_BD @ coefficients_D + intercept
        new = {
            "weight": torch.tensor(float(len(rewards_B)), dtype=torch.float64),
            "states": states_BD.sum(0),
            "rewards": rewards_B.sum(),
            "outer": states_BD.T @ states_BD,
            "products": states_BD.T @ rewards_B,
        }
        old = self._sums or {name: torch.zeros_like(value) for name, value in new.items()}
        self._sums = {name: self._decay * old[name] + value for name, value in new.items()}
        return predicted_B.to(rewards.dtype)

    def state(self) -> dict[str, Tensor]:
        """Returns what `restore` needs. It is empty before the first step."""
        return dict(self._sums or {})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self._sums = {name: value.clone() for name, value in state.items()} or None
