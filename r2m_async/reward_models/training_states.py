"""Measurements of the hidden states that a reward model's head reads, taken during training: BSR Sec. 4.1, Fig. 1-3.

Shapes: B pairs, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from r2m_async.reward_metrics import NormSpread, pairwise_accuracy
from r2m_async.reward_models.preferences import TokenizedPair, microbatches
from r2m_async.reward_models.process_group import num_ranks, rank, summed
from r2m_async.reward_models.trainee import RewardTrainee


@dataclass(frozen=True, slots=True, kw_only=True)
class PairStates:
    """Rewards of B pairs by one model, and norms of the hidden states h that its head reads; float64 on the CPU.

    h_w is the hidden state of the chosen response of a pair, and h_l that of the rejected one.
    """

    rewards: Tensor
    """[2, B]. Row 0 is the chosen responses."""
    norms: Tensor
    """[2, B], ||h|| with the same rows (BSR Fig. 3)."""
    differences: Tensor
    """[B], ||h_w - h_l|| (BSR Fig. 2)."""

    def record(self, name: str) -> dict[str, float]:
        """The accuracy, and means and standard deviations of the norms, under keys that begin with `name/`.

        The statistics of ||h_w - h_l|| are over the B pairs, those of ||h|| over their 2 B texts. All are NaN if there
        are no pairs.
        """
        spread = _spread(self.norms)
        apart = _spread(self.differences)
        return {
            f"{name}/accuracy": pairwise_accuracy(*self.rewards),
            f"{name}/difference_norm": apart.mean,
            f"{name}/difference_norm_std": apart.std,
            f"{name}/norm_mean": spread.mean,
            f"{name}/norm_std": spread.std,
            f"{name}/norm_dispersion": spread.dispersion,
        }


@torch.no_grad()
def pair_states(
    model: RewardTrainee,
    pairs: Sequence[TokenizedPair],
    max_tokens: int,
    on_passes: Callable[[int, int], None] = lambda done, total: None,
) -> PairStates:
    """Measures the pairs, in forward passes of at most `max_tokens` tokens.

    on_passes: is called with (passes done, passes in all) after each pass of this process.

    Within a process group each rank measures a part of the pairs, and all ranks return the whole.
    """
    found = torch.zeros(5, len(pairs), dtype=torch.float64)
    parts = microbatches(pairs, range(len(pairs)), max_tokens)[rank() :: num_ranks()]
    for number, part in enumerate(parts, 1):
        some = [pairs[index] for index in part]
        rewards, states = model.rewards_and_states([pair.chosen for pair in some] + [pair.rejected for pair in some])
        states_2BD = states.double().view(2, len(some), -1)
        found[:2, part] = rewards.double().view(2, -1).cpu()
        found[2:4, part] = states_2BD.norm(dim=-1).cpu()
        found[4, part] = (states_2BD[0] - states_2BD[1]).norm(dim=-1).cpu()
        on_passes(number, len(parts))
    # Each rank fills its own columns and leaves 0 in the others, so the sum is the whole.
    summed(found)
    return PairStates(rewards=found[:2], norms=found[2:4], differences=found[4])


@torch.no_grad()
def head_norm(head: nn.Module) -> float:
    """||W_p||, the norm of the head's weights (BSR Fig. 1).

    The two weight matrices of a head with two layers count as one vector. Biases are left out.
    """
    weights = [parameter.double().flatten() for parameter in head.parameters() if parameter.ndim > 1]
    return torch.cat(weights).norm().item()


def _spread(norms: Tensor) -> NormSpread:
    """Mean and standard deviation of the norms; NaN if there are none."""
    if not norms.numel():
        return NormSpread(mean=float("nan"), std=float("nan"))
    return NormSpread(mean=norms.mean().item(), std=norms.std(correction=0).item())
