"""The critic. It trains beside the policy, in the same process, on the same minibatches and micro-batches.

The critic's values never leave the process. `Critic.values` computes them in a step's proximal pass, and `CriticStep`
learns the returns of the step. PPO, arXiv 1707.06347.

Shapes: B trajectories of a step, T response tokens (padded).
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
    """A value model in training. It gives the value of the state in which each response token is chosen."""

    def __init__(self, backend: Backend, config: R2MConfig) -> None:
        """Keeps the backend, which holds a `ValueModel` and has as many ranks as the policy's backend."""
        self.backend = backend
        self.config = config

    @torch.no_grad()
    def values(self, trajectories: Sequence[Trajectory], passes: Sequence[MicroBatch], mask: Tensor) -> Tensor:
        """Computes the values of a step's response tokens.

        Args:
            trajectories: all B trajectories of the step, on every rank.
            passes: this rank's micro-batches of them.
            mask: [B, T] bool, True on response tokens.

        Returns the values of all ranks' trajectories, [B, T] float32 on the CPU, 0 on padding.
        """
        values_BT = torch.zeros(mask.shape)
        for one in passes:
            part_BT = self.pass_over(one, trajectories)
            if one.counts:
                values_BT[list(one.rows), : part_BT.shape[1]] = part_BT.cpu()
        # Every row is 0 but on the rank that computed it, so the sum over ranks puts all rows together.
        return self.backend.total(values_BT)

    def pass_over(self, one: MicroBatch, trajectories: Sequence[Trajectory]) -> Tensor:
        """One forward pass over a micro-batch of the step's `trajectories`.

        Returns the values [b, t] float32 of its b trajectories, where t is the longest response among them.
        """
        chosen = [trajectories[row] for row in one.rows]
        return response_values(self.backend.policy, chosen, self.config.learner.packing)

    def state(self, version: int, directory: Path | None) -> dict[str, Any]:
        """Returns what `restore` needs (`Backend.state`). Files go into a folder of their own in `directory`."""
        return self.backend.state(version, _beside(directory))

    def restore(self, state: dict[str, Any], directory: Path | None) -> None:
        """Goes on from what `state` returned and wrote into `directory` (`Backend.restore`)."""
        self.backend.restore(state, _beside(directory))


class CriticStep:
    """The critic's updates of one policy step. They fit the step's returns, which stay the same for all updates."""

    def __init__(
        self,
        critic: Critic,
        trajectories: Sequence[Trajectory],
        mask: Tensor,
        values: Tensor,
        returns: Tensor,
        lr: float,
    ) -> None:
        """Keeps what the updates of the step have in common.

        Args:
            critic: the critic to train.
            trajectories: all B trajectories of the step.
            mask: [B, T] bool, True on response tokens.
            values: [B, T], the critic's values at the start of the step.
            returns: [B, T], what the critic is to learn.
            lr: the learning rate of the step.
        """
        self.grad_norms: list[float] = []
        """Gradient norms, before clipping, of the updates that were applied. The policy learner fills it."""
        self.skipped = 0
        """How many updates were left out because their gradient was not finite. The policy learner counts them."""
        self.backend, self.lr = critic.backend, lr
        self._critic = critic
        self._trajectories = trajectories
        self._mask_BT, self._values_BT, self._returns_BT = mask, values, returns
        self._losses: list[Tensor] = []
        self._clipped: list[Tensor] = []
        self._num_tokens = 0

    def update(self, passes: Sequence[MicroBatch], rows: slice) -> float:
        """Makes one update on a minibatch.

        Args:
            passes: this rank's micro-batches of the minibatch.
            rows: the minibatch's rows among the step's trajectories. It consists of whole groups.

        Returns the norm of the gradient before clipping. If it is not finite, no weight has moved.
        """
        backend, num_tokens = self._critic.backend, int(self._mask_BT[rows].sum())
        device = backend.policy.device
        for index, one in enumerate(passes):
            values_BT = self._critic.pass_over(one, self._trajectories)
            last = index == len(passes) - 1
            if not one.counts:
                # Other ranks have more passes. A gradient of 0 takes part in their collectives and changes nothing.
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
        """Returns the metrics of the step. All ranks must call it.

        `critic/loss` is a mean over all updates, and `critic/grad_norm` over those that were applied.
        `critic/clip_share` is the share of token losses that the clip took the gradient from. `critic/value_mean` and
        `critic/explained_variance` are about the values at the start of the step. The latter is
        1 - Var(returns - values) / Var(returns) over response tokens, or 0 if all returns are equal.
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
    """The critic's own folder in a checkpoint, so that its files and the policy's do not overwrite each other."""
    return None if directory is None else directory / "critic"
