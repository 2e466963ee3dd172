"""What a policy step reports, over the whole batch: the same numbers whoever computed which part of it.

Shapes: E epochs, B trajectories of a step, T response tokens (padded), U = T where a ratio belongs to a token and 1 where
to a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from r2m_async.config import R2MConfig
from r2m_async.objectives import PolicyLoss
from r2m_async.trajectories import Trajectory

_BY_UNIT = ("ratio", "weight", "clipped", "left_out")
_QUANTILES = (0.05, 0.5, 0.95)


class StepStatistics:
    """Gathers what the micro-batches of a step measured, here and on the other ranks."""

    def __init__(self, mask: Tensor, config: R2MConfig) -> None:
        self.grad_norms: list[float] = []
        self.skipped = 0
        self._mask_BT = mask
        self._leans_on_ratio = config.objective.off_policy == "none"
        self._units_BU = mask if config.objective.ratio == "token" else mask.any(1, keepdim=True)
        self._num_epochs = config.objective.epochs
        self._added: list[tuple[int, list[int], Tensor, Tensor]] = []

    def add(self, epoch: int, rows: list[int], loss: Tensor, surrogate: PolicyLoss) -> None:
        """One micro-batch on these rows of the step. Nothing is waited for: it stays where it is until `metrics`."""
        values_VbU = torch.stack([getattr(surrogate, name).float() for name in _BY_UNIT])
        self._added.append((epoch, rows, loss.detach(), values_VbU))

    def metrics(self, total: Callable[[Tensor], Tensor], mismatch: Tensor, ages: Tensor) -> dict[str, float]:
        """Over all units, and once more over those of each policy age.

        `total` adds a tensor up over the ranks; `mismatch` [B, T] is log pi_old - log mu; `ages` [B].
        """
        values_VEBU = torch.zeros(len(_BY_UNIT), self._num_epochs, *self._units_BU.shape)
        loss = torch.zeros((), dtype=torch.float64)
        for epoch, rows, part, values_VbU in self._added:
            loss += part.cpu()
            values_VEBU[:, epoch, rows, : values_VbU.shape[2]] = values_VbU.cpu()
        values_VEBU, loss = total(values_VEBU), total(loss)
        updates = max(1, len(self.grad_norms) + self.skipped)
        metrics = {
            "policy/loss": loss.item() / updates,
            "policy/grad_norm": sum(self.grad_norms) / max(1, len(self.grad_norms)),
            "policy/skipped_updates": float(self.skipped),
        }
        by_age = [(f"policy_age_{age}", ages == age) for age in ages.unique().tolist()]
        for prefix, rows in [("policy", ages >= 0), *by_age]:
            values = values_VEBU[:, :, rows][:, :, self._units_BU[rows]].flatten(1)
            named = dict(zip(_BY_UNIT, values, strict=True))
            of_rows = unit_statistics(**named, leans_on_ratio=self._leans_on_ratio)
            of_rows |= _mismatch_metrics(mismatch[rows][self._mask_BT[rows]])
            metrics |= {f"{prefix}/{name}": value for name, value in of_rows.items()}
            metrics[f"{prefix}/responses"] = float(rows.sum())
        return metrics


def unit_statistics(
    ratio: Tensor, weight: Tensor, clipped: Tensor, left_out: Tensor, leans_on_ratio: bool
) -> dict[str, float]:
    """Over N units, each tensor [N] as `PolicyLoss` has them; zeros without any.

    effective_sample_size is (sum v)^2 / (N sum v^2) in [0, 1], where v is what importance sampling leans on: w, or rho
    under `off_policy: none`.
    """
    if not len(ratio):
        ratio = weight = clipped = left_out = torch.zeros(1)
    lean = (ratio if leans_on_ratio else weight).double()
    squares = lean.square().mean()
    low, middle, high = np.quantile(ratio.numpy(), _QUANTILES)
    return {
        "clip_share": clipped.double().mean().item(),
        "masked_share": left_out.double().mean().item(),
        "ratio_mean": ratio.double().mean().item(),
        "ratio_min": ratio.min().item(),
        "ratio_q05": float(low),
        "ratio_median": float(middle),
        "ratio_q95": float(high),
        "ratio_max": ratio.max().item(),
        "weight_mean": weight.double().mean().item(),
        "effective_sample_size": (lean.mean().square() / squares).item() if squares else 0.0,
    }


def _mismatch_metrics(mismatch_N: Tensor) -> dict[str, float]:
    """How far the learner's log-probabilities are from those that were sampled with, by token."""
    distances = mismatch_N.abs() if len(mismatch_N) else torch.zeros(1)
    return {"mismatch_mean": distances.mean().item(), "mismatch_max": distances.max().item()}


def batch_metrics(
    mask: Tensor,
    behaviour: Tensor,
    old: Tensor,
    reference: Tensor,
    advantages: Tensor,
    trajectories: Sequence[Trajectory],
) -> dict[str, float]:
    """KL of pi_old to the reference (k3 per token, and the mean difference that R2M's Fig. 5 plots) and lengths.

    `kl/behaviour` is that of the policies that sampled: what belongs to the step's rewards where they are older than pi_old,
    for the samples of one policy do not measure another's KL. `mask` and the log-probabilities are [B, T], `advantages`
    [B] or [B, T].
    """
    difference = (old - reference).masked_fill(~mask, 0)
    k3 = ((-difference).expm1() + difference).masked_fill(~mask, 0)
    lengths = mask.sum(1).float()
    finished = [trajectory.finish_reason == "stop" for trajectory in trajectories]
    return {
        "kl/sequence": difference.sum(1).mean().item(),
        "kl/behaviour": (behaviour - reference).masked_fill(~mask, 0).sum(1).mean().item(),
        "kl/token": (difference.sum() / mask.sum()).item(),
        "kl/k3": (k3.sum() / mask.sum()).item(),
        "policy/entropy_estimate": (-old.sum() / mask.sum()).item(),
        "advantage/std": advantages.std(correction=0).item(),
        "length/mean": lengths.mean().item(),
        "length/finished": sum(finished) / len(finished),
        "length/trained_tokens": lengths.sum().item(),
    }
