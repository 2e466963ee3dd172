"""The loss of the R2M head: Group Reward Entropy Bradley-Terry (GREBT).

Source: R2M, arXiv 2601.22664, Sec. 4.2, Eq. 5-7. Rewards are standardised as in Definitions A.9 and A.10, with the
population std. The gradient flows through mean and std; the paper does not say whether it should.

Group reward entropy ignores the scale of the rewards, so it cannot widen the spread of a group. For K = 2 it is
constant. For K = 8 its minimum is about 1.06, reached with one outlier, and not 0 as Definition A.11 says. This file
keeps the paper's loss as it is.

Shapes: n groups, K responses in a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DEGENERATE_SPREAD = 1e-6
"""A group is degenerate if all its rewards lie within this number times (1 + largest |reward|) of their mean.

Such differences are float32 rounding. The entropy of a degenerate group is log K, without gradient.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrebtTerms:
    """The GREBT loss and its parts: scalars, each a mean over groups. Only `loss` carries a gradient."""

    loss: Tensor
    """(1 - alpha) times the Bradley-Terry term plus alpha times the group reward entropy (Eq. 7).

    The Bradley-Terry term has a further weight where some groups learn from labels (`pair_weights`)."""
    bradley_terry: Tensor
    """The Bradley-Terry term (Eq. 5), before its weight."""
    group_reward_entropy: Tensor
    """The group reward entropy (Eq. 6), before its weight, in nats."""
    gap: Tensor
    """Reward of the chosen response minus reward of the rejected response."""


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The Bradley-Terry loss: the scalar mean of -log sigmoid(chosen - rejected) (Eq. 5).

    Args:
        chosen, rejected: rewards of any shape, the same for both.

    Raises ValueError when the shapes differ.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"chosen and rejected must have one shape, got {list(chosen.shape)} and {list(rejected.shape)}"
        )
    return -F.logsigmoid(chosen - rejected).mean()


def group_reward_entropy(rewards: Tensor) -> Tensor:
    """Group reward entropy: the entropy of softmax(z), with z the standardised rewards of a group (Eq. 6).

    Args:
        rewards: [n, K].

    Returns the scalar mean over groups, in nats. A degenerate group (`DEGENERATE_SPREAD`) counts as log K.

    Raises ValueError for K < 2.
    """
    _check_groups(rewards)
    deviation_nK = rewards - rewards.mean(1, keepdim=True)
    spread_n1 = deviation_nK.detach().abs().amax(1, keepdim=True)
    degenerate_n1 = spread_n1 <= DEGENERATE_SPREAD * (1 + rewards.detach().abs().amax(1, keepdim=True))
    # `where` comes before the division and the root. After them it would leave 0 * inf = NaN in the gradient.
    # The division by the spread changes no result, because z has no scale. It keeps the squares from overflowing.
    unit_nK = torch.where(degenerate_n1, 0, deviation_nK) / torch.where(degenerate_n1, 1, spread_n1)
    variance_n1 = unit_nK.square().mean(1, keepdim=True)
    z_nK = unit_nK / torch.where(degenerate_n1, 1, variance_n1).sqrt()
    log_p_nK = z_nK.log_softmax(1)
    return -(log_p_nK.exp() * log_p_nK).sum(1).mean()


def grebt(rewards: Tensor, alpha: float, pair_rewards: Tensor | None = None) -> Tensor:
    """The GREBT loss (1 - alpha) L_BT + alpha L_GRE (Eq. 7), a scalar mean over groups.

    Arguments and errors are those of `grebt_terms`, which also returns the parts.
    """
    return grebt_terms(rewards, alpha, pair_rewards).loss


def grebt_terms(
    rewards: Tensor, alpha: float, pair_rewards: Tensor | None = None, pair_weight: float = 1.0
) -> GrebtTerms:
    """The GREBT loss of a batch of groups, with its parts (Eq. 5-7).

    Args:
        rewards: [n, K] rewards by the head that is trained.
        alpha: weight of the group reward entropy, in [0, 1]. The Bradley-Terry term has 1 - alpha.
        pair_rewards: [n, K] rewards that choose the best and the worst response of each group, without gradient. None:
            `rewards` choose. The Bradley-Terry term compares the `rewards` of these two responses.
        pair_weight: a further weight of the Bradley-Terry term. It is 1 in the paper (`pair_weights`).

    If all pair rewards of a group are equal, the first response is both best and worst. The term is then log 2, without
    gradient.

    Raises ValueError for K < 2, for alpha outside [0, 1], and for shapes that differ.
    """
    _check_groups(rewards)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    pairs_nK = rewards if pair_rewards is None else pair_rewards
    if pairs_nK.shape != rewards.shape:
        raise ValueError(f"pair_rewards must be {list(rewards.shape)} as rewards are, got {list(pairs_nK.shape)}")
    chosen_n1 = rewards.gather(1, pairs_nK.argmax(1, keepdim=True))
    rejected_n1 = rewards.gather(1, pairs_nK.argmin(1, keepdim=True))
    pair_loss, entropy = bradley_terry(chosen_n1, rejected_n1), group_reward_entropy(rewards)
    return GrebtTerms(
        loss=(1 - alpha) * pair_weight * pair_loss + alpha * entropy,
        bradley_terry=pair_loss.detach(),
        group_reward_entropy=entropy.detach(),
        gap=(chosen_n1 - rejected_n1).detach().mean(),
    )


def importance_weights(log_ratios: Tensor, temper: float) -> Tensor:
    """[P]: the importance weights of P preference pairs of a data set, with mean 1 (OCRM, arXiv 2507.15507).

    The two responses of a pair were drawn from another policy than the one whose responses are scored. With x_i the
    log-ratio of pair i, its weight is exp(`temper` x_i), divided by the mean of all P of them.

    Args:
        log_ratios: [P], log pi(y_w|x) + log pi(y_l|x) less the same under the policy that the data are taken to be from.
        temper: 1 is the ratio itself, whose variance grows with the length of responses. Less flattens the weights.
            0 weighs all pairs alike. The authors' script for TL;DR has 0.001.
    """
    return (temper * log_ratios).softmax(0) * len(log_ratios)


def pair_weights(labelled: float, num_own: int, own_weight: float) -> tuple[float, float]:
    """The weights of one labelled pair and of one pair that the head ranks itself, in the mean of the Bradley-Terry terms.

    The loss of an update with labels is (1 - alpha) times a weighted mean of -log sigmoid(r_w - r_l) over all pairs, plus
    alpha times the mean of the group reward entropy (Eq. 6). A labelled pair counts once, and one of a data set as often as
    its importance weight says. A pair of Eq. 5, which the head has ranked itself, counts `own_weight` times. The paper has no
    labels: without any, this is its Eq. 7.

    Args:
        labelled: the sum of the weights of all labelled pairs, each of which has 1 but for those of a data set.
        num_own: the number of groups that were not asked about, each of which has one pair of Eq. 5.
        own_weight: 0 or more.

    Returns (weight of a labelled pair that counts once, weight of an own pair). Over all pairs they add up to 1, or to 0 if
    nothing counts.
    """
    total = labelled + own_weight * num_own
    return (1 / total, own_weight / total) if total else (0.0, 0.0)


def pessimistic(rewards: Tensor, kappa: float) -> Tensor:
    """The rewards [K] of an ensemble: the mean of its heads minus `kappa` times their population std.

    rewards: [M, K], by the M heads. The rewards of a head that is alone are returned as they are.
    """
    if len(rewards) == 1:
        return rewards[0]
    mean_K = rewards.mean(0)
    return mean_K - kappa * rewards.std(0, correction=0) if kappa else mean_K


def steering_penalty(gradients: Tensor) -> Tensor:
    """[K]: how far an update of the head on each response of a group would move the head in that response's own favour.

    It is <g_k, g_k - g>, with g_k the gradient of the reward of response k with respect to the head's parameters, and g the
    mean of the group's. Source: the first-order ("practical") foresighted policy optimisation of arXiv 2605.04266, by its
    published code. There g is the gradient at one response of the reference policy to the same prompt. A group has none.

    gradients: [K, P], of a head of P parameters.
    """
    return (gradients * (gradients - gradients.mean(0))).sum(1)


def preference_doubt(rewards: Tensor) -> Tensor:
    """[K, K]: how far M reward models are apart on which of two responses is better, from 0 to 1/2.

    rewards: [M, K]. The doubt is the population std, over the models, of sigmoid(r_i - r_j): of the probability that
    Bradley-Terry gives to response i against response j. For two models it is half the difference of their probabilities.
    """
    return torch.sigmoid(rewards[:, :, None] - rewards[:, None]).std(0, correction=0)


def preference_divergence(rewards: Tensor, frozen_rewards: Tensor) -> Tensor:
    """How far the head's preferences within a group are from those of the frozen reward model.

    This is the scalar mean over groups of KL(softmax(`frozen_rewards`) || softmax(`rewards`)), in nats. Both arguments
    are [n, K]. Unlike group reward entropy it depends on the scale of the rewards. `frozen_rewards` get no gradient.
    It is not part of the R2M paper.
    """
    log_p_nK = frozen_rewards.detach().log_softmax(1)
    return (log_p_nK.exp() * (log_p_nK - rewards.log_softmax(1))).sum(1).mean()


def _check_groups(rewards: Tensor) -> None:
    """Raises ValueError unless `rewards` are [n, K] with K >= 2."""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [n, K] with K >= 2, for a pair to compare, got {list(rewards.shape)}")
