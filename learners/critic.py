"""The critic in training beside the policy, in the same process, on the same minibatches and micro-batches.

Its values never travel: `values` computes them in the proximal pass of a step, `CriticStep` learns the step's returns.
PPO, arXiv 1707.06347; shapes: B trajectories of a step, T response tokens (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learners.backend import Backend
from learners.shares import MicroBatch
from r2m_async.config import R2MConfig
from r2m_async.models.critic import response_values
from r2m_async.models.policy import response_mask
from r2m_async.objectives import value_loss
from r2m_async.trajectories import Trajectory


class Critic:
    def __init__(self, backend: Backend, config: R2MConfig) -> None:
        self.backend = backend
        self.config = config

    @torch.no_grad()
    def values(self, trajectories: Sequence[Trajectory], passes: Sequence[MicroBatch], mask: Tensor) -> Tensor:
        """[B, T] float32 on the CPU, of all ranks' trajectories; `passes` are this rank's."""
        values_BT = torch.zeros(mask.shape)
        for one in passes:
            part_BT = self.pass_over(one, trajectories)
            if one.counts:
                values_BT[list(one.rows), : part_BT.shape[1]] = part_BT.cpu()
        return self.backend.total(values_BT)

    def pass_over(self, one: MicroBatch, trajectories: Sequence[Trajectory]) -> Tensor:
        chosen = [trajectories[row] for row in one.rows]
        return response_values(self.backend.policy, chosen, self.config.learner.packing)

    def state(self, version: int, directory: Path | None) -> dict[str, Any]:
        return self.backend.state(version, _beside(directory))

    def restore(self, state: dict[str, Any], directory: Path | None) -> None:
        self.backend.restore(state, _beside(directory))


class CriticStep:
    """The updates of one step, on the returns that its rewards and the critic's values at its start make."""

    def __init__(
        self,
        critic: Critic,
        trajectories: Sequence[Trajectory],
        mask: Tensor,
        values: Tensor,
        returns: Tensor,
        lr: float,
    ) -> None:
        """`mask`, `values` and `returns` are [B, T] of the whole step."""
        self.grad_norms: list[float] = []
        self.skipped = 0
        self.backend, self.lr = critic.backend, lr
        self._critic = critic
        self._trajectories = trajectories
        self._mask_BT, self._values_BT, self._returns_BT = mask, values, returns
        self._losses: list[Tensor] = []
        self._clipped: list[Tensor] = []
        self._num_tokens = 0

    def update(self, passes: Sequence[MicroBatch], rows: slice) -> float:
        """One on a minibatch of whole groups, the step's `rows`; `passes` are this rank's over it. Returns the norm."""
        backend, num_tokens = self._critic.backend, int(self._mask_BT[rows].sum())
        device = backend.policy.device
        for index, one in enumerate(passes):
            values_BT = self._critic.pass_over(one, self._trajectories)
            last = index == len(passes) - 1
            if not one.counts:
                backend.backward(0.0 * values_BT.sum(), last)
                continue
            chosen, width = list(one.rows), values_BT.shape[1]
            fit = value_loss(
                values_BT,
                self._values_BT[chosen, :width].to(device),
                self._returns_BT[chosen, :width].to(device),
                response_mask([self._trajectories[row] for row in chosen]).to(device),
                clip=self._critic.config.critic.clip,
                denominator=num_tokens,
            )
            backend.backward(fit.loss, last)
            self._losses.append(fit.loss.detach())
            self._clipped.append(fit.clipped.sum())
        self._num_tokens += num_tokens
        return backend.step(self.lr)

    def metrics(self) -> dict[str, float]:
        """Loss and norm are means over updates; explained_variance and value_mean are of the values before any.

        explained_variance is 1 - Var(returns - values) / Var(returns) over response tokens, 0 if returns do not vary.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        for index, parts in enumerate((self._losses, self._clipped)):
            sums[index] += sum(part.double().cpu() for part in parts)
        loss, clipped = self._critic.backend.total(sums).tolist()
        values, returns = (one[self._mask_BT].double() for one in (self._values_BT, self._returns_BT))
        left, variance = (of.var(correction=0).item() for of in (returns - values, returns))
        return {
            "critic/loss": loss / max(1, len(self.grad_norms) + self.skipped),
            "critic/grad_norm": sum(self.grad_norms) / max(1, len(self.grad_norms)),
            "critic/skipped_updates": float(self.skipped),
            "critic/clip_share": clipped / max(1, self._num_tokens),
            "critic/value_mean": values.mean().item(),
            "critic/explained_variance": 1 - left / variance if variance else 0.0,
            "critic/lr": self.lr,
        }


def _beside(directory: Path | None) -> Path | None:
    """Where the critic's files lie, so that they do not meet the policy's."""
    return None if directory is None else directory / "critic"
