"""The R2M head: cross-attention from a response's reward token embedding to the policy's hidden states.

The reward token embedding (RTE) is the reward model's last hidden state at the token that it scores. Source: R2M,
arXiv 2601.22664, Sec. 4.1, Eq. 3-4.

Each response has one query, and there is one attention head. The projections can therefore be moved off the sequence:
h W_k q^T = h (W_k q^T), and a (h W_v) = (a h) W_v. So the code reads the policy's states h, but never projects them.
This is much cheaper than Eq. 3 as it is printed, and equal to it up to rounding.

Shapes: B responses, S policy positions (padded), N policy positions of all responses end to end, D hidden size of the
reward model (D_m), P hidden size of the policy (D_p), d width of the attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from r2m_async.state_attention import attended


class R2MHead(nn.Module):
    """The R2M head: it maps a reward token embedding H and the policy's hidden states h to a reward.

        r = phi((1 - omega) H_hat + omega H),   H_hat = softmax(H W_q (h W_k)^T / sqrt(d)) h W_v W_o     (Eq. 3-4)

    All parameters train. At omega = 1 the reward is phi(H), that of the reward model without feedback.

    Args:
        rm_hidden_size: D_m.
        policy_hidden_size: D_p.
        width: d.
        scoring_head: phi, any module D_m -> 1. It is used itself and converted to `dtype`, not copied.
        generator: the source of the random numbers for the four matrices, which start Xavier uniform. The paper does
            not state the initialisation.
        dtype: of all parameters, whatever the dtype of the backbone. The default is float32, because an update of 1e-6
            vanishes in bfloat16.
    """

    def __init__(
        self,
        rm_hidden_size: int,
        policy_hidden_size: int,
        width: int,
        scoring_head: nn.Module,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(rm_hidden_size, width))
        self.key = nn.Parameter(torch.empty(policy_hidden_size, width))
        self.value = nn.Parameter(torch.empty(policy_hidden_size, width))
        self.output = nn.Parameter(torch.empty(width, rm_hidden_size))
        for weight in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(weight, generator=generator)
        self.scoring_head = scoring_head
        self.to(dtype)

    def forward(
        self,
        rte: Tensor,
        hidden_states: Tensor | Sequence[Tensor],
        mask: Tensor | None,
        omega: float,
        *,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """Computes the reward of each response: [B].

        Args:
            rte: [B, D_m] reward token embeddings.
            hidden_states: the policy's states, [B, S, D_p] if padded or [N, D_p] if packed; or a list of one tensor
                [S, D_p] for each response, which need not be copied together.
            mask: [B, S] for padded states, nonzero on the states that count. Masked states may hold anything. A
                response without any state that counts gets H_hat = 0.
            omega: weight of the reward token embedding, in [0, 1] (Eq. 4).
            offsets: [B + 1] for packed states. Rows offsets[b] to offsets[b + 1] - 1 belong to response b.

        Either `mask` or `offsets` is given, and the other is None; for a list, both are None. States in a shorter dtype are
        converted to the dtype of the weights before anything is summed, but no copy of them is made.

        Raises ValueError when shapes disagree, when both or neither of `mask` and `offsets` are given, and when a
        response that is not padded has no row.
        """
        rte_BD = rte.to(self.query.dtype)
        # The probe is W_k q^T / sqrt(d): its product with a state is the attention score of that state.
        # `linear` multiplies by the transpose of its weight, and gives the weight a gradient that lies as the weight does.
        probe_BP = nn.functional.linear(rte_BD @ self.query, self.key) / math.sqrt(self.query.shape[1])
        if mask is not None and offsets is None and isinstance(hidden_states, Tensor):
            context_BP = _attend_padded(probe_BP, hidden_states, mask)
        elif mask is None and isinstance(hidden_states, Tensor) == (offsets is not None):
            context_BP = attended(probe_BP, hidden_states, offsets)
        else:
            raise ValueError(
                "R2MHead needs either mask (padded hidden_states) or offsets (packed), not both or neither; and neither for "
                "a list of hidden_states"
            )
        aggregated_BD = context_BP @ self.value @ self.output
        rewards = self.scoring_head((1 - omega) * aggregated_BD + omega * rte_BD)
        if rewards.shape != (len(rte), 1):
            raise ValueError(f"scoring_head must map [B, D_m] to [B, 1] = [{len(rte)}, 1], got {list(rewards.shape)}")
        return rewards.squeeze(-1)


def mixing_weight(t: int, T: int, floor: float) -> float:
    """The weight of the reward token embedding in the mix: omega(t) = max(cos(pi t / T) / 2 + 1 / 2, floor) (Eq. 4).

    Args:
        t: the step, counted from 1 as in the paper's Algorithm 1.
        T: the step at which the cosine reaches 0. Beyond it the weight stays at `floor`.
        floor: the smallest weight, Omega in the paper.

    Raises ValueError unless t >= 0, T >= 1 and 0 <= floor <= 1.
    """
    if t < 0 or T < 1 or not 0 <= floor <= 1:
        raise ValueError(
            f"mixing_weight needs t >= 0, T >= 1 and 0 <= floor <= 1, got t = {t}, T = {T}, floor = {floor}"
        )
    return max(math.cos(math.pi * min(t, T) / T) / 2 + 0.5, floor)


def noise_like(hidden_states: Tensor, seed: int) -> Tensor:
    """Gaussian noise with the mean and the variance of one trajectory's states, for the variant `r2m_noise`.

    Mean and variance are scalars, taken over all entries of `hidden_states` [S, D_p]; the paper does not say over what.
    The noise has their shape, dtype and device. It is drawn on the CPU, so the same `seed` and moments give the same
    noise whatever the device. Empty states give empty noise.
    """
    if hidden_states.numel() == 0:
        return torch.empty_like(hidden_states)
    std, mean = torch.std_mean(hidden_states.float(), correction=0)
    noise = torch.randn(hidden_states.shape, generator=torch.Generator().manual_seed(seed)).to(hidden_states.device)
    return (noise * std + mean).to(hidden_states.dtype)


def _attend_padded(probe_BP: Tensor, states_BSP: Tensor, mask_BS: Tensor) -> Tensor:
    """[B, D_p] attention-weighted means of padded states; zeros for a response whose states are all masked."""
    if states_BSP.ndim != 3 or mask_BS.shape != states_BSP.shape[:2] or len(probe_BP) != len(mask_BS):
        raise ValueError(
            f"padded hidden_states must be [B, S, D_p] with mask [B, S], B = {len(probe_BP)} as in rte, "
            f"got {list(states_BSP.shape)} and {list(mask_BS.shape)}"
        )
    mask_BS = mask_BS.bool()
    # Masked states become 0 for two reasons. Padding may hold NaN or infinity, and a weight of 0 times NaN is NaN. And
    # a fully masked row gets uniform weights below, so its states must sum to 0.
    states_BSP = states_BSP.to(probe_BP.dtype).masked_fill(~mask_BS[..., None], 0)
    scores_BS = (states_BSP @ probe_BP[..., None]).squeeze(-1)
    # The fill is the smallest finite number and not -inf: the softmax of a row of -inf is NaN, and so is its gradient.
    weights_BS = scores_BS.masked_fill(~mask_BS, torch.finfo(scores_BS.dtype).min).softmax(-1)
    return (weights_BS[:, None] @ states_BSP).squeeze(1)
