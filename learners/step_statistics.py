"""The metrics of a policy step. They are over the whole batch, and do not depend on which rank computed which part.

A unit is a response token, or a whole response if nothing of the loss is formed for tokens (`objectives.units_of`).

Shapes: E epochs, B trajectories of a step, b trajectories of a micro-batch, T response tokens (padded), U = T if a
token is a unit and 1 if a response is, V quantities per unit, N units or tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from r2m_async.config import R2MConfig
from r2m_async.objectives import PolicyLoss, sequence_kl, units_of
from r2m_async.trajectories import Trajectory

_BY_UNIT = ("ratio", "weight", "clipped", "left_out")
"""The V quantities of a `PolicyLoss` that each unit has."""
_QUANTILES = (0.05, 0.5, 0.95)


class StepStatistics:
    """Gathers what the micro-batches of a step measure, on this rank and on the others."""

    def __init__(self, mask: Tensor, config: R2MConfig) -> None:
        """Begins with nothing measured.

        Args:
            mask: [B, T] bool, True on the response tokens of the step.
            config: the run's config.
        """
        self.grad_norms: list[float] = []
        """Gradient norms, before clipping, of the updates that were applied. The policy learner fills it."""
        self.skipped = 0
        """How many updates were left out because their gradient was not finite. The policy learner counts them."""
        self._mask_BT = mask
        self._leans_on_ratio = config.objective.off_policy == "none"
        self._units_BU = units_of(mask, *config.objective.levels)
        self._num_epochs = config.objective.epochs
        self._added: list[tuple[int, list[int], Tensor, Tensor]] = []

    def add(self, epoch: int, rows: list[int], loss: Tensor, surrogate: PolicyLoss) -> None:
        """Notes what one micro-batch measured.

        Args:
            epoch: the epoch, from 0.
            rows: the rows of its trajectories in the step.
            loss: scalar, its part of the update's loss.
            surrogate: what it measured of each unit, [b, U].
        """
        # The numbers stay on the device until `metrics`. To read one now would wait for the GPU in every pass.
        values_VbU = torch.stack([getattr(surrogate, name).float() for name in _BY_UNIT])
        self._added.append((epoch, rows, loss.detach(), values_VbU))

    def metrics(self, total: Callable[[Tensor], Tensor], mismatch: Tensor, ages: Tensor) -> dict[str, float]:
        """Returns the metrics of the step: over all units, and again over the units of each policy age.

        Args:
            total: adds a tensor up over the ranks. All ranks must call `metrics`, because it does.
            mismatch: [B, T], log pi_old - log mu: by how much the learner's log-probabilities exceed those that the
                responses were sampled with.
            ages: [B], the policy age of each trajectory in steps.

        Those over all units are named `policy/...`, and those of age 1 `policy_age_1/...`.
        """
        # Every rank fills in its own rows and leaves the others 0, so the sum over ranks puts all rows together.
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
    """Statistics of the probability ratios of N units. All are 0 if there are no units.

    Args:
        ratio: [N], rho of each unit. See `PolicyLoss` for this and the next three.
        weight: [N], w.
        clipped: [N] bool, whether the clip took the unit's gradient.
        left_out: [N] bool, whether the off-policy mask left the unit out.
        leans_on_ratio: whether importance sampling rests on rho, as it does under `off_policy: none`. If not, it rests
            on w.

    Returns the statistics by name. `effective_sample_size` is (sum v)^2 / (N sum v^2), in [0, 1], where v is the one of
    rho and w that importance sampling rests on.
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
    """How far the learner's log-probabilities of tokens are from those that the tokens were sampled with, in nats."""
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
    """Metrics of a step that need no gradient: the KL to the reference policy, and the lengths of responses.

    Args:
        mask: [B, T] bool, True on response tokens.
        behaviour: [B, T], log-probabilities under mu, the policies that sampled the responses.
        old: [B, T], log-probabilities under pi_old, the learner at the start of the step.
        reference: [B, T], log-probabilities under the reference policy pi_ref.
        advantages: [B] or [B, T].
        trajectories: the B trajectories of the step.

    Returns the metrics by name. All KLs are in nats:

    - `kl/sequence`: the mean over responses of log pi_old - log pi_ref, which R2M's Fig. 5 plots. `kl/token` is the
      mean over tokens.
    - `kl/k3`: the mean over tokens of the estimator k3 (http://joschu.net/blog/kl-approx.html).
    - `kl/behaviour`: as `kl/sequence`, but of mu instead of pi_old. It belongs to the step's rewards if the responses
      are older than pi_old, because samples of one policy do not measure the KL of another.

    Lengths are numbers of tokens that the policy wrote. If responses come from the user's `rollouts.function`,
    `length/environment` is the mean number of tokens that an environment wrote, and `length/turns` the mean number of the
    policy's turns.
    """
    difference = (old - reference).masked_fill(~mask, 0)
    k3 = ((-difference).expm1() + difference).masked_fill(~mask, 0)
    lengths = mask.sum(1).float()
    finished = [trajectory.finish_reason == "stop" for trajectory in trajectories]
    played = [trajectory for trajectory in trajectories if trajectory.written is not None]
    others = [trajectory.num_response_tokens - trajectory.num_policy_tokens for trajectory in played]
    of_play = {
        "length/environment": sum(others) / max(1, len(played)),
        "length/turns": sum(trajectory.num_turns for trajectory in played) / max(1, len(played)),
    }
    # A step in which the policy wrote nothing at all has means of 0.
    num_tokens = mask.sum().clamp(min=1)
    return {
        "kl/sequence": sequence_kl(old, reference, mask),
        "kl/behaviour": sequence_kl(behaviour, reference, mask),
        "kl/token": (difference.sum() / num_tokens).item(),
        "kl/k3": (k3.sum() / num_tokens).item(),
        "policy/entropy_estimate": (-old.sum() / num_tokens).item(),
        "advantage/std": advantages.std(correction=0).item(),
        "length/mean": lengths.mean().item(),
        "length/finished": sum(finished) / len(finished),
        "length/trained_tokens": lengths.sum().item(),
        **(of_play if played else {}),
    }
