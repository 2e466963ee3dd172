"""Win rates from pairwise preferences, plain and with the length difference controlled for.

Shapes: N comparisons in G groups. A group's comparisons (the turns of one question) are not independent: standard errors
take each group's sum as one draw. Preferences are in [0, 1]: 1 for the model, 0 for its opponent, 1/2 for a tie, and
in between where a judge gives a probability.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

C = 100.0
"""Inverse strength of the L2 penalty |theta|^2 / (2 C), on the sum of the log losses: it only keeps separable data finite."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    value: float
    standard_error: float
    """NaN of a single group."""
    num_groups: int

    @property
    def half_width(self) -> float:
        """Of the 95 % interval, by Student's t with G - 1 degrees of freedom."""
        from scipy.stats import t

        return float(t.ppf(0.975, self.num_groups - 1)) * self.standard_error if self.num_groups > 1 else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthControlled:
    win_rate: Estimate
    length_effect: float
    """The fitted weight of tanh(length difference / its standard deviation), in log-odds: above 0 the judge likes long."""


def mean(values_N: ArrayLike, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of N values. groups: N names; None means N groups, and the standard error is the plain one."""
    values = np.asarray(values_N, dtype=np.float64)
    if not len(values):
        raise ValueError("the mean of no value: give at least one")
    residuals_G = _sums(values - values.mean(), groups)
    return Estimate(
        value=float(values.mean()),
        standard_error=math.sqrt(_correction(len(residuals_G)) * float(residuals_G @ residuals_G)) / len(values),
        num_groups=len(residuals_G),
    )


def length_controlled_win_rate(
    preferences_N: ArrayLike, length_differences_N: ArrayLike, groups: Sequence[Hashable] | None = None
) -> LengthControlled:
    """The win rate at equal lengths, by AlpacaEval 2's regression (Dubois et al. 2024, arXiv 2404.04475, Eq. 2) without one term.

    length_differences_N: the model's length less its opponent's, in characters.
    Fits P(win) = sigmoid(theta + phi x), x = tanh(difference / its standard deviation), by penalised maximum likelihood,
    and returns sigmoid(theta). The paper's third term, the instruction's difficulty, is fitted on many models and is not
    in one file; nor are the answers of the baseline told to be brief or long, towards which AlpacaEval regularises: the
    numbers are not the leaderboard's. The standard error is the sandwich estimator's, by the delta method.
    """
    from scipy.optimize import minimize

    y_N = np.asarray(preferences_N, dtype=np.float64)
    differences_N = np.asarray(length_differences_N, dtype=np.float64)
    if y_N.shape != differences_N.shape or y_N.ndim != 1 or not len(y_N):
        raise ValueError(f"preferences and differences must have one shape [N], got {y_N.shape}, {differences_N.shape}")
    spread = differences_N.std(ddof=1) if len(y_N) > 1 else 0.0
    x_N = np.tanh(differences_N / spread) if spread > 0 else np.zeros_like(y_N)
    x_N2 = np.stack([np.ones_like(x_N), x_N], axis=1)

    def loss(weights: Array) -> float:
        z_N = x_N2 @ weights
        return float((np.logaddexp(0, z_N) - y_N * z_N).sum() + weights @ weights / (2 * C))

    def gradient(weights: Array) -> Array:
        return x_N2.T @ (_sigmoid(x_N2 @ weights) - y_N) + weights / C

    def hessian(weights: Array) -> Array:
        p_N = _sigmoid(x_N2 @ weights)
        return (x_N2 * (p_N * (1 - p_N))[:, None]).T @ x_N2 + np.eye(2) / C

    fit = minimize(loss, np.zeros(2), jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-8})
    p_N = _sigmoid(x_N2 @ fit.x)
    scores_G2 = np.stack([_sums(x_N2[:, k] * (y_N - p_N), groups) for k in range(2)], axis=1)
    bread = np.linalg.inv(hessian(fit.x))
    covariance = bread @ (scores_G2.T @ scores_G2) @ bread * _correction(len(scores_G2))
    rate = float(_sigmoid(fit.x[0]))
    return LengthControlled(
        win_rate=Estimate(
            value=rate,
            standard_error=rate * (1 - rate) * math.sqrt(covariance[0, 0]),
            num_groups=len(scores_G2),
        ),
        length_effect=float(fit.x[1]),
    )


def _sums(values_N: Array, groups: Sequence[Hashable] | None) -> Array:
    """[G]"""
    if groups is None:
        return values_N
    places = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    sums_G: Array = np.bincount([places[name] for name in groups], weights=values_N).astype(np.float64)
    return sums_G


def _correction(num_groups: int) -> float:
    return num_groups / (num_groups - 1) if num_groups > 1 else math.nan


def _sigmoid(z: ArrayLike) -> Array:
    return np.exp(-np.logaddexp(0, -np.asarray(z, dtype=np.float64)))
