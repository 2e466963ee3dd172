"""What the states that a reward model's head reads tell of it while it trains: BSR Sec. 4.1, Fig. 1-3.

Shapes: B pairs, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from r2m_async.reward_metrics import NormSpread, pairwise_accuracy
from r2m_async.reward_models.preferences import TokenizedPair, microbatches
from r2m_async.reward_models.process_group import num_ranks, rank, summed
from r2m_async.reward_models.trainee import RewardTrainee


@dataclass(frozen=True, slots=True, kw_only=True)
class PairStates:
    """Of B pairs by one model, float64 on the CPU; h is the state that the head reads."""

    rewards: Tensor
    """[2, B], the chosen responses' first."""
    norms: Tensor
    """[2, B], ||h|| (Fig. 3)."""
    differences: Tensor
    """[B], ||h_w - h_l|| (Fig. 2)."""

    def record(self, name: str) -> dict[str, float]:
        """Accuracy, and means and standard deviations over pairs or their 2 B texts, as `name/...`; NaN for no pairs."""
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
def pair_states(model: RewardTrainee, pairs: Sequence[TokenizedPair], max_tokens: int) -> PairStates:
    """Forward passes of at most `max_tokens` tokens; the ranks of a process group share them out."""
    found = torch.zeros(5, len(pairs), dtype=torch.float64)
    for part in microbatches(pairs, range(len(pairs)), max_tokens)[rank() :: num_ranks()]:
        some = [pairs[index] for index in part]
        rewards, states = model.rewards_and_states([pair.chosen for pair in some] + [pair.rejected for pair in some])
        states_2BD = states.double().view(2, len(some), -1)
        found[:2, part] = rewards.double().view(2, -1).cpu()
        found[2:4, part] = states_2BD.norm(dim=-1).cpu()
        found[4, part] = (states_2BD[0] - states_2BD[1]).norm(dim=-1).cpu()
    summed(found)
    return PairStates(rewards=found[:2], norms=found[2:4], differences=found[4])


@torch.no_grad()
def head_norm(head: nn.Module) -> float:
    """||W_p|| (Fig. 1). Of two layers both weight matrices are taken as one vector; biases are left out."""
    weights = [parameter.double().flatten() for parameter in head.parameters() if parameter.ndim > 1]
    return torch.cat(weights).norm().item()


def _spread(norms: Tensor) -> NormSpread:
    if not norms.numel():
        return NormSpread(mean=float("nan"), std=float("nan"))
    return NormSpread(mean=norms.mean().item(), std=norms.std(correction=0).item())
