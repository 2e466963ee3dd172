"""AlpacaEval's own length-controlled win rate, from its file of gamed baselines.

Source: Dubois et al. 2024, arXiv 2404.04475, and `length_controlled_v1` of github.com/tatsu-lab/alpaca_eval,
src/alpaca_eval/metrics/glm_winrate.py. The file is `df_gamed.csv` of the data set tatsu-lab/alpaca_eval at Hugging
Face. It has the judge's preferences between the baseline and itself, asked to be verbose or concise, and the difficulty
of every instruction.

Here the fit is the minimum itself. AlpacaEval takes what scikit-learn's liblinear has after some steps, which is up to 0.05
points of win rate away.

The model is P(win) = sigmoid(a tanh(x) + b d + c m). x is the length of the baseline's answer minus that of the model's,
over its standard deviation; d is the difficulty; m is 1 for the model's rows and 0 for the gamed ones. The fit minimises
C sum_i s_i loss_i + |a| + |b| + |c|. The weight s is 1 for the model's rows and 0.1 for each of two gamed ones, so the
gamed rows hold a and b. C is the best of ten by five-fold cross-validation. The win rate is the mean over instructions of
sigmoid(b d + c).

Shapes: N rows, 3 features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r2m_async.data.records import Record, load_records
from r2m_async.errors import DataError
from r2m_async.evaluation.win_rate import sigmoid

Array = NDArray[np.float64]

GAMED_WEIGHT = 0.2
"""The weight of the gamed baselines together, half for each of the two."""
NUM_FOLDS = 5
CS = np.logspace(-4, 4, 10)
"""The weights of the loss among which cross-validation chooses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GamedBaselines:
    """The rows of `df_gamed.csv`."""

    preferences_N: Array
    """From 0 for the baseline to 1 for its gamed answer; NaN without a judgement."""
    features_N3: Array
    """tanh of the length difference, difficulty, and 0."""
    difficulties: Array
    """The difficulty of every instruction, in AlpacaEval's order."""
    models: frozenset[str]
    """The names of the gamed models, e.g. `gpt4_1106_preview_verbose`, which contain that of the baseline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlpacaLengthControlled:
    """The win rate and the fit that it comes from."""

    win_rate: float
    length_weight: float
    """a. Below 0 the judge likes long answers, because x is the baseline's length minus the model's."""
    difficulty_weight: float
    """b"""
    model_weight: float
    """c"""


def load_gamed_baselines(path: str | Path) -> GamedBaselines:
    """Reads `df_gamed.csv`. Raises DataError for another file.

    AlpacaEval looks the difficulty of an instruction up by the row of the file, so the first rows must be the
    instructions in their order.
    """

    models: set[str] = set()

    def parse(record: Record) -> tuple[float, ...]:
        record.field("not_gamed_baseline")  # which must be there
        if record.flag("not_gamed_baseline", True):
            why = "a row of a model, and the file has those of gamed baselines alone"
            raise record.refusal("wrong_type", "not_gamed_baseline", True, why, "give AlpacaEval's df_gamed.csv")
        models.add(record.response("model"))
        preference = float("nan") if record.field("preference") == "" else record.number("preference")
        return preference, *(record.number(key) for key in ("index", "std_delta_len", "instruction_difficulty"))

    table = np.array(load_records(str(path), "train", parse)[0])
    preferences_N, index_N, lengths_N, difficulty_N = table.T
    num = len(np.unique(index_N))
    if not np.array_equal(index_N[:num], np.arange(num)):
        raise DataError(
            f"{path}: its first {num} rows are not the instructions 0 to {num - 1} in order; give it as published"
        )
    if not np.array_equal(difficulty_N, difficulty_N[index_N.astype(int)]):
        raise DataError(f"{path}: one instruction has two difficulties; give the file as published")
    features_N3 = np.stack([np.tanh(lengths_N), difficulty_N, np.zeros_like(lengths_N)], axis=1)
    return GamedBaselines(
        preferences_N=preferences_N,
        features_N3=features_N3,
        difficulties=difficulty_N[:num],
        models=frozenset(models),
    )


def alpaca_length_controlled(
    preferences: Sequence[float | None], length_differences: Sequence[int], baseline: str, gamed: GamedBaselines
) -> AlpacaLengthControlled:
    """Returns AlpacaEval's length-controlled win rate of a model against the baseline.

    preferences: for each instruction, in AlpacaEval's order, from 0 for the baseline to 1 for the model; None without a
        judgement.
    length_differences: characters of the baseline's answer minus those of the model's.
    baseline: the name of the baseline.

    Raises DataError if there are not as many as the file has instructions, if the file is of another baseline, or if
    all differences are equal.
    """
    num = len(gamed.difficulties)
    if others := sorted(name for name in gamed.models if baseline not in name):
        raise DataError(
            f"generator_1 is {baseline!r}, and the file of gamed baselines has {others[0]!r}: it holds the fit for its own "
            f"baseline alone; compare with that one"
        )
    if len(preferences) != num:
        raise DataError(
            f"{len(preferences)} annotations, and the file of gamed baselines has {num} instructions: AlpacaEval's rate needs "
            f"all of its instructions, in its order"
        )
    differences_N = np.asarray(length_differences, dtype=np.float64)
    spread = differences_N.std(ddof=1)
    if not spread > 0:
        raise DataError("all answers differ in length by the same: there is no length to control for")
    own_N3 = np.stack([np.tanh(differences_N / spread), gamed.difficulties, np.ones(num)], axis=1)
    own_N = np.array([np.nan if one is None else one for one in preferences])
    features_M3 = np.concatenate([gamed.features_N3, own_N3])
    preferences_M = np.concatenate([gamed.preferences_N, own_N])
    weights_M = np.concatenate([np.full(len(gamed.preferences_N), GAMED_WEIGHT / 2), np.ones(num)])
    judged = ~np.isnan(preferences_M)
    fitted = _cross_validated(features_M3[judged], preferences_M[judged], weights_M[judged])
    return AlpacaLengthControlled(
        win_rate=float(sigmoid(gamed.difficulties * fitted[1] + fitted[2]).mean()),
        length_weight=float(fitted[0]),
        difficulty_weight=float(fitted[1]),
        model_weight=float(fitted[2]),
    )


def _cross_validated(features_N3: Array, preferences_N: Array, weights_N: Array) -> Array:
    """[3], the fit on all rows with the C of the lowest mean loss over the folds."""
    # The last row goes into the first fold, the one before into the second, and so on, as in scikit-learn's GroupKFold.
    fold_N = np.arange(len(preferences_N))[::-1] % NUM_FOLDS
    losses = np.zeros((NUM_FOLDS, len(CS)))
    for fold in range(NUM_FOLDS):
        here, rest = fold_N == fold, fold_N != fold
        for place, c in enumerate(CS):
            fitted = _fit(features_N3[rest], preferences_N[rest], weights_N[rest], c)
            losses[fold, place] = (weights_N[here] * _losses(features_N3[here] @ fitted, preferences_N[here])).mean()
    return _fit(features_N3, preferences_N, weights_N, CS[losses.mean(0).argmin()])


def _fit(features_N3: Array, preferences_N: Array, weights_N: Array, c: float) -> Array:
    """[3], the minimum of C sum_i s_i loss_i + |a| + |b| + |c|, by Newton's method on the loss beside the penalty."""

    def objective(theta_3: Array) -> float:
        return c * float(weights_N @ _losses(features_N3 @ theta_3, preferences_N)) + float(np.abs(theta_3).sum())

    theta_3 = np.zeros(3)
    for _ in range(100):
        p_N = sigmoid(features_N3 @ theta_3)
        slope_3 = c * (weights_N * (p_N - preferences_N)) @ features_N3
        curvature_33 = c * (features_N3 * (weights_N * p_N * (1 - p_N))[:, None]).T @ features_N3
        step_3 = _penalised_newton_step(theta_3, slope_3, curvature_33 + 1e-10 * np.eye(3))
        size, now = 1.0, objective(theta_3)
        # A whole step may overshoot where the loss is far from a parabola.
        while size > 1e-10 and objective(theta_3 + size * step_3) > now:
            size /= 2
        theta_3 = theta_3 + size * step_3
        if np.abs(size * step_3).max() < 1e-9:
            break
    return theta_3


def _penalised_newton_step(theta_3: Array, slope_3: Array, curvature_33: Array) -> Array:
    """[3], the step d that minimises slope d + d curvature d / 2 + sum |theta + d|, one coordinate after the other."""
    step_3 = np.zeros(3)
    for _ in range(1000):
        before = step_3.copy()
        for k in range(3):
            slope = slope_3[k] + curvature_33[k] @ step_3 - curvature_33[k, k] * step_3[k]
            at = theta_3[k] - slope / curvature_33[k, k]
            step_3[k] = np.sign(at) * max(0.0, abs(at) - 1 / curvature_33[k, k]) - theta_3[k]
        if np.abs(step_3 - before).max() < 1e-12:
            break
    return step_3


def _losses(z_N: Array, preferences_N: Array) -> Array:
    """[N], the log losses -y log p - (1 - y) log(1 - p) of p = sigmoid(z), in a form that does not overflow."""
    losses: Array = np.logaddexp(0, z_N) - preferences_N * z_N
    return losses
