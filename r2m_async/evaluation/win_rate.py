"""Win rates from comparisons of two models' answers, plain and with control for length.

Shapes: N comparisons in G groups. The comparisons of a group, such as the turns of one question, are not independent.
So standard errors take the sum of a group as one draw. A preference is a number from 0 to 1: 1 if the model won, 0 if
its opponent won, 1/2 for a tie, and in between if the judge gives a probability.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

C = 100.0
"""Inverse strength of the L2 penalty |theta|^2 / (2 C) on the sum of the log losses. The penalty is weak: it only keeps
the fit finite where it would not be, for example if one model always wins."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its standard error."""

    value: float
    standard_error: float
    """NaN if there is a single group."""
    num_groups: int
    """G, the number of independent draws."""

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % confidence interval, by Student's t with G - 1 degrees of freedom.

        NaN if there is a single group.
        """
        from scipy.stats import t

        return float(t.ppf(0.975, self.num_groups - 1)) * self.standard_error if self.num_groups > 1 else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthControlled:
    """A win rate with control for length."""

    win_rate: Estimate
    """The win rate that the fit predicts for answers of equal length."""
    length_effect: float
    """The fitted weight of tanh(length difference / its standard deviation), in log-odds. Above 0 the judge likes long
    answers."""


def mean(values_N: ArrayLike, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of N values with its standard error.

    groups: N names, the same for values of one group. None takes every value as a group, which gives the plain standard
        error.

    Raises ValueError if there is no value.
    """
    values = np.asarray(values_N, dtype=np.float64)
    if not len(values):
        raise ValueError("the mean of no value: give at least one")
    # Residuals are added up within a group before they are squared, because they may be correlated there.
    residuals_G = _sums(values - values.mean(), groups)
    return Estimate(
        value=float(values.mean()),
        standard_error=math.sqrt(_correction(len(residuals_G)) * float(residuals_G @ residuals_G)) / len(values),
        num_groups=len(residuals_G),
    )


def length_controlled_win_rate(
    preferences_N: ArrayLike, length_differences_N: ArrayLike, groups: Sequence[Hashable] | None = None
) -> LengthControlled:
    """The win rate at equal lengths, by the regression of AlpacaEval 2 without one of its terms.

    The source is Dubois et al. 2024, arXiv 2404.04475, Eq. 2. The fit is P(win) = sigmoid(theta + phi x) with
    x = tanh(difference / its standard deviation), by penalised maximum likelihood. The win rate is sigmoid(theta).

    preferences_N: [N], 0 to 1.
    length_differences_N: [N], length of the model's answer minus that of the opponent's answer, in characters.
    groups: as in `mean`.

    Two things of AlpacaEval's are missing, so these numbers are not the leaderboard's. The paper's third term, the
    difficulty of the instruction, is fitted on many models and is not in one file. AlpacaEval also regularises the fit
    towards the baseline's answers when it is asked to be brief or long; those are not in one file either. The standard
    error is that of the sandwich estimator, by the delta method. Raises ValueError for arrays of other shapes or
    without values.
    """
    from scipy.optimize import minimize

    y_N = np.asarray(preferences_N, dtype=np.float64)
    differences_N = np.asarray(length_differences_N, dtype=np.float64)
    if y_N.shape != differences_N.shape or y_N.ndim != 1 or not len(y_N):
        raise ValueError(f"preferences and differences must have one shape [N], got {y_N.shape}, {differences_N.shape}")
    # If all length differences are equal, length explains nothing, and x is 0.
    spread = differences_N.std(ddof=1) if len(y_N) > 1 else 0.0
    x_N = np.tanh(differences_N / spread) if spread > 0 else np.zeros_like(y_N)
    x_N2 = np.stack([np.ones_like(x_N), x_N], axis=1)

    def loss(weights: Array) -> float:
        z_N = x_N2 @ weights
        # The log loss -y log p - (1 - y) log(1 - p) of p = sigmoid(z), in a form that does not overflow.
        return float((np.logaddexp(0, z_N) - y_N * z_N).sum() + weights @ weights / (2 * C))

    def gradient(weights: Array) -> Array:
        return x_N2.T @ (sigmoid(x_N2 @ weights) - y_N) + weights / C

    def hessian(weights: Array) -> Array:
        p_N = sigmoid(x_N2 @ weights)
        return (x_N2 * (p_N * (1 - p_N))[:, None]).T @ x_N2 + np.eye(2) / C

    fit = minimize(loss, np.zeros(2), jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-8})
    p_N = sigmoid(x_N2 @ fit.x)
    # The sandwich estimator: the inverse Hessian on either side of the squared gradients of the groups. It stays valid
    # for groups whose comparisons are correlated, and for preferences between 0 and 1.
    scores_G2 = np.stack([_sums(x_N2[:, k] * (y_N - p_N), groups) for k in range(2)], axis=1)
    bread = np.linalg.inv(hessian(fit.x))
    covariance = bread @ (scores_G2.T @ scores_G2) @ bread * _correction(len(scores_G2))
    rate = float(sigmoid(fit.x[0]))
    return LengthControlled(
        win_rate=Estimate(
            value=rate,
            # Delta method: the error of theta times the slope of the sigmoid there, rate (1 - rate).
            standard_error=rate * (1 - rate) * math.sqrt(covariance[0, 0]),
            num_groups=len(scores_G2),
        ),
        length_effect=float(fit.x[1]),
    )


def _sums(values_N: Array, groups: Sequence[Hashable] | None) -> Array:
    """[G], the sum of the values of each group."""
    if groups is None:
        return values_N
    places = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    sums_G: Array = np.bincount([places[name] for name in groups], weights=values_N).astype(np.float64)
    return sums_G


def _correction(num_groups: int) -> float:
    """G / (G - 1), by which a variance over few groups is raised; NaN for a single group."""
    return num_groups / (num_groups - 1) if num_groups > 1 else math.nan


def sigmoid(z: ArrayLike) -> Array:
    """1 / (1 + exp(-z)) of each number of `z`, float64, in a form that does not overflow."""
    return np.exp(-np.logaddexp(0, -np.asarray(z, dtype=np.float64)))
