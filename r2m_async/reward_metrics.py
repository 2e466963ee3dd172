"""Metrics of reward models: pure functions of rewards, gold rewards and hidden states.

A gold reward is what counts as the true reward of a response, for example the score of a program or of a stronger
model. Inputs are numpy arrays, lists, or tensors on the CPU. All arithmetic is in float64.

Sources: BSR, "On the Robustness of Reward Models for Language Model Alignment", Sec. 2.2, 4.1 and 5.3. R2M,
arXiv 2601.22664, Fig. 1, 2, 9b and App. G.1. RM-Bench, arXiv 2410.16184.

Shapes: B pairs, K responses to one prompt, N texts, L layers, D hidden size, P prompts, Q singular values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpread:
    """Mean and standard deviation of the Euclidean norms of N hidden states."""

    mean: float
    std: float
    """The population standard deviation: the variance is divided by N, not N - 1."""

    @property
    def dispersion(self) -> float:
        """std / mean. Its value does not depend on the scale of the states, so models can be compared by it.

        It is NaN if all states are 0.
        """
        return self.std / self.mean if self.mean else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class StyleAverages:
    """The three accuracies of RM-Bench. Each is a mean over cells of `style_grid`."""

    easy: float
    """Mean of the cells below the diagonal, where the chosen response has the richer style."""
    normal: float
    """Mean of the diagonal, where both responses have the same style."""
    hard: float
    """Mean of the cells above the diagonal, where the rejected response has the richer style."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDrift:
    """How far N hidden states h have moved to h', state by state."""

    cosines: Array
    """[N] cosine of h and h', in [-1, 1] up to rounding. It is 0 if either state is 0."""
    distances: Array
    """[N] relative distance ||h' - h|| / ||h||. It is NaN if h is 0."""


# Metrics of rewards


def pairwise_accuracy(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """The share of pairs in which the chosen response has the higher reward. A tie counts as half.

    `chosen` and `rejected` are rewards of one shape, [B]. Without pairs the result is NaN. Raises ValueError for shapes
    that differ.
    """
    chosen_B, rejected_B = _same_shape(chosen, rejected)
    return float(((np.sign(chosen_B - rejected_B) + 1) / 2).mean()) if chosen_B.size else float("nan")


def ranking_accuracy(rewards: Iterable[ArrayLike], golds: Iterable[ArrayLike]) -> float:
    """The accuracy over all pairs of responses to the same prompt whose gold rewards differ.

    Args:
        rewards, golds: for each prompt, the rewards and the gold rewards of its K responses, [K]. K may differ between
            prompts.

    Every pair has the same weight, whatever its prompt. A tie of rewards counts as half. Without pairs the result is
    NaN. Raises ValueError if the lengths of `rewards` and `golds` differ.
    """
    chosen, rejected = [], []
    for rewards_K, golds_K in _of_prompts(rewards, golds):
        better, worse = np.nonzero(golds_K[:, None] > golds_K)
        chosen.append(rewards_K[better])
        rejected.append(rewards_K[worse])
    return pairwise_accuracy(np.concatenate(chosen), np.concatenate(rejected)) if chosen else float("nan")


def kendall_taus(rewards: Iterable[ArrayLike], golds: Iterable[ArrayLike]) -> Array:
    """Kendall's tau-b between the rewards and the gold rewards of each prompt (BSR Sec. 3.1).

    Args:
        rewards, golds: for each prompt, the rewards and the gold rewards of its K responses, [K]. K may differ between
            prompts.

    Returns one tau per prompt, in [-1, 1]. A prompt whose gold rewards are all equal has no order to find, and is left
    out. A prompt whose rewards are all equal, while its gold rewards differ, counts as 0. The paper reports the mean
    over prompts. Raises ValueError if the lengths of `rewards` and `golds` differ.
    """
    from scipy.stats import kendalltau

    taus = [
        kendalltau(rewards_K, golds_K).statistic if np.ptp(rewards_K) else 0.0
        for rewards_K, golds_K in _of_prompts(rewards, golds)
        if len(golds_K) and np.ptp(golds_K)
    ]
    return np.array(taus, dtype=float)


def style_grid(chosen: ArrayLike, rejected: ArrayLike) -> Array:
    """Accuracies over P prompts for every combination of styles (RM-Bench, arXiv 2410.16184).

    Args:
        chosen, rejected: [P, 3] rewards of the chosen and of the rejected response to each prompt, written in three
            styles. The columns go from plain to rich: concise, detailed, detailed with markdown.

    Returns [3, 3]. The row is the style of the chosen response, the column that of the rejected one. A tie counts as
    half, so a model that cannot tell responses apart gets 0.5. RM-Bench counts a tie as wrong.

    Raises ValueError for other shapes, or shapes that differ.
    """
    chosen_P3, rejected_P3 = _same_shape(chosen, rejected)
    if chosen_P3.ndim != 2 or chosen_P3.shape[1] != 3:
        raise ValueError(f"rewards must have shape [P, 3], a column per style, got {list(chosen_P3.shape)}")
    return ((np.sign(chosen_P3[:, :, None] - rejected_P3[:, None, :]) + 1) / 2).mean(0)


def style_averages(grid: ArrayLike) -> StyleAverages:
    """Averages a `style_grid` [3, 3] into RM-Bench's accuracies easy, normal and hard."""
    grid_33 = _floats(grid)
    return StyleAverages(
        easy=float(grid_33[np.tril_indices(3, -1)].mean()),
        normal=float(np.diag(grid_33).mean()),
        hard=float(grid_33[np.triu_indices(3, 1)].mean()),
    )


# Metrics of hidden states


def effective_rank(states: ArrayLike) -> float:
    """The effective rank of `states` [N, D]: how many directions they spread over (BSR Eq. 32).

    It is exp of the entropy of the singular values, each divided by their sum. It is at most min(N, D), so only values
    with the same N can be compared. It is 0 if all states are 0.
    """
    values_Q = np.linalg.svd(_floats(states), compute_uv=False)
    if not values_Q.sum():
        return 0.0
    shares_Q = values_Q / values_Q.sum()
    shares_Q = shares_Q[shares_Q > 0]  # p log p goes to 0 with p, but numpy gives NaN for 0 log 0
    return float(np.exp(-(shares_Q * np.log(shares_Q)).sum()))


def norm_spread(states: ArrayLike) -> NormSpread:
    """Mean and standard deviation of the norms of `states` [N, D].

    BSR draws this spread in Fig. 3 and gives no formula.
    """
    norms_N = np.linalg.norm(_floats(states), axis=-1)
    return NormSpread(mean=float(norms_N.mean()), std=float(norms_N.std()))


def pair_similarities(states: ArrayLike) -> Array:
    """The similarity (1 + cosine) / 2 of every pair of `states` [N, D] (R2M Eq. 42).

    Returns [N (N - 1) / 2], in the order of `np.triu_indices(N, 1)`. A state of norm 0 has cosine 0 with all others.
    R2M's App. G.1 brings cosines "to the range [0, 1]" and does not say how. The map used here treats every pair alone.
    """
    states_ND = _floats(states)
    norms_N1 = np.linalg.norm(states_ND, axis=-1, keepdims=True)
    units_ND = states_ND / np.where(norms_N1 == 0, 1, norms_N1)
    cosines_NN = np.clip(units_ND @ units_ND.T, -1, 1)
    return (1 + cosines_NN[np.triu_indices(len(states_ND), 1)]) / 2


def preference_similarities(states: ArrayLike, is_chosen: ArrayLike) -> tuple[Array, Array]:
    """Compares the states of chosen and rejected responses, layer by layer (R2M Eq. 44-46).

    Args:
        states: [L, N, D], for each layer and text the mean state over the tokens of the text.
        is_chosen: [N] booleans, True for a chosen response.

    Returns two arrays [L]. The first is the mean similarity of pairs with the same preference: both chosen or both
    rejected. The second is the mean over pairs of a chosen and a rejected response.
    """
    is_chosen_N = np.asarray(is_chosen, dtype=bool)
    first, second = np.triu_indices(len(is_chosen_N), 1)
    same = is_chosen_N[first] == is_chosen_N[second]
    by_layer = [pair_similarities(states_ND) for states_ND in _floats(states)]
    alike, unlike = (np.array([values[which].mean() for values in by_layer]) for which in (same, ~same))
    return alike, unlike


def state_drift(states: ArrayLike, later: ArrayLike) -> StateDrift:
    """How far the states of the same N texts moved while a model was trained (R2M Fig. 9b).

    `states` and `later` are [N, D]: the states before and after. Raises ValueError for shapes that differ.
    """
    one, other = _same_shape(states, later)
    norms, lengths = np.linalg.norm(one, axis=-1), np.linalg.norm(other, axis=-1)
    products = norms * lengths
    return StateDrift(
        cosines=(one * other).sum(-1) / np.where(products == 0, 1, products),
        distances=np.linalg.norm(other - one, axis=-1) / np.where(norms == 0, np.nan, norms),
    )


def similarity_reward_correlation(states: ArrayLike, rewards: ArrayLike) -> float:
    """Whether responses with similar states have similar rewards (R2M Fig. 2).

    Returns Pearson's correlation, over all pairs of N responses, between the similarity of their `states` [N, D] and
    the absolute difference of their `rewards` [N]. The paper draws 300 of the pairs. The result is NaN if there are
    fewer than two pairs, or if similarities or differences are all equal.
    """
    similarities, differences = pair_similarities(states), reward_differences(rewards)
    if not (len(similarities) > 1 and np.ptp(similarities) and np.ptp(differences)):
        return float("nan")
    return float(np.corrcoef(similarities, differences)[0, 1])


def reward_differences(rewards: ArrayLike) -> Array:
    """The absolute difference of every pair of `rewards` [N]: [N (N - 1) / 2], in the order of `pair_similarities`."""
    rewards_N = _floats(rewards)
    first, second = np.triu_indices(len(rewards_N), 1)
    return np.abs(rewards_N[first] - rewards_N[second])


def _floats(values: ArrayLike) -> Array:
    """The values as a float64 array."""
    return np.asarray(values, dtype=np.float64)


def _same_shape(chosen: ArrayLike, rejected: ArrayLike) -> tuple[Array, Array]:
    """Both as float64 arrays. Raises ValueError if their shapes differ.

    Without this check, numpy could broadcast a mismatch and average it, and nobody would notice.
    """
    one, other = _floats(chosen), _floats(rejected)
    if one.shape != other.shape:
        raise ValueError(f"what is compared must have one shape, got {list(one.shape)} and {list(other.shape)}")
    return one, other


def _of_prompts(rewards: Iterable[ArrayLike], golds: Iterable[ArrayLike]) -> list[tuple[Array, Array]]:
    """For each prompt its rewards and gold rewards, [K] each. Raises ValueError if the lengths differ."""
    return [_same_shape(*both) for both in zip(rewards, golds, strict=True)]
