"""AlpacaEval's own length-controlled rate, against a literal fit, scikit-learn's, and judges whose taste is known."""

import csv
import json

import numpy as np
import pytest
from scipy.optimize import minimize

from r2m_async.cli import main
from r2m_async.errors import DataError
from r2m_async.evaluation import alpaca_length_control as alpaca
from r2m_async.evaluation.alpaca_length_control import alpaca_length_controlled, load_gamed_baselines

NUM = 120
BASELINE = "gpt4_1106_preview"


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


@pytest.fixture(scope="module")
def rows():
    """Two gamed baselines of 120 instructions: the judge likes length, and easy instructions."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=NUM)
    rows = []
    for name, shift in (("verbose", -0.8), ("concise", 0.8)):
        lengths = rng.normal(shift, 0.6, NUM)
        chance = sigmoid(-2 * np.tanh(lengths) + 0.3 * difficulty + rng.normal(size=NUM))
        rows += [
            {
                "model": f"{BASELINE}_{name}",
                "index": index,
                "preference": chance[index],
                "std_delta_len": lengths[index],
                "instruction_difficulty": difficulty[index],
                "not_gamed_baseline": False,
            }
            for index in range(NUM)
        ]
    return rows


def written(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def gamed(rows, tmp_path):
    return load_gamed_baselines(written(tmp_path / "df_gamed.csv", rows))


def judged(gamed, quality, seed=1):
    """(preferences, length differences) of a model of a known log-odds at equal length."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(-300, 400, NUM).round()
    odds = quality - 2 * np.tanh(differences / differences.std(ddof=1)) + 0.3 * gamed.difficulties
    return list(sigmoid(odds)), [int(one) for one in differences]


@pytest.mark.parametrize("c", [1e-3, 0.05, 2.8, 1e4])
def test_the_fit_is_the_minimum_of_the_penalised_loss(gamed, c):
    features, preferences = gamed.features_N3 + np.array([0, 0, 1]), gamed.preferences_N
    weights = np.linspace(0.1, 1, len(preferences))

    def objective(theta):
        p = sigmoid(features @ theta)
        losses = -preferences * np.log(p) - (1 - preferences) * np.log(1 - p)
        return c * (weights * losses).sum() + np.abs(theta).sum()

    fitted = alpaca._fit(features, preferences, weights, c)
    found = minimize(objective, fitted + 0.1, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12})
    assert objective(fitted) <= found.fun + 1e-9 * abs(found.fun)
    assert (c > 1e-3) == bool(fitted.any())  # a loss that weighs little leaves everything at 0


@pytest.mark.parametrize("quality", [-1.0, 0.0, 1.5])
def test_a_models_quality_at_equal_length_comes_back(gamed, quality):
    preferences, differences = judged(gamed, quality)
    controlled = alpaca_length_controlled(preferences, differences, BASELINE, gamed)
    expected = sigmoid(quality + 0.3 * gamed.difficulties).mean()
    assert controlled.win_rate == pytest.approx(expected, abs=0.02) and controlled.length_weight < -1.5
    assert abs(np.mean(preferences) - expected) > 0.05  # what length did to the plain rate


def literal_rate(rows, preferences, differences):
    """AlpacaEval's rate as its script has it, term by term, with a general optimizer."""
    spread = np.std(differences, ddof=1)
    difficulty = [row["instruction_difficulty"] for row in rows[:NUM]]
    table = [
        (row["preference"], np.tanh(row["std_delta_len"]), row["instruction_difficulty"], 0, 0.2 / 2) for row in rows
    ]
    table += [(p, np.tanh(d / spread), h, 1, 1.0) for p, d, h in zip(preferences, differences, difficulty, strict=True)]
    table = np.array([row for row in table if row[0] is not None], dtype=float)

    def losses(theta, rows):
        p = sigmoid(rows[:, 1:4] @ theta)
        return rows[:, 4] * (-rows[:, 0] * np.log(p) - (1 - rows[:, 0]) * np.log(1 - p))

    def fit(rows, c):
        parts = minimize(
            lambda x: c * losses(x[:3] - x[3:], rows).sum() + x.sum(), np.full(6, 0.1), bounds=[(0, None)] * 6
        ).x
        return parts[:3] - parts[3:]

    folds = np.array([(len(table) - 1 - number) % 5 for number in range(len(table))])
    cs = [10 ** (-4 + 8 * k / 9) for k in range(10)]
    scores = [
        np.mean([losses(fit(table[folds != one], c), table[folds == one]).mean() for one in range(5)]) for c in cs
    ]
    _, b, c = fit(table, cs[int(np.argmin(scores))])
    return np.mean([sigmoid(b * h + c) for h in difficulty])


@pytest.mark.parametrize("missing", [0, 7])
def test_it_is_that_of_a_literal_transcription(rows, gamed, missing):
    preferences, differences = judged(gamed, 0.7)
    preferences[:missing] = [None] * missing
    controlled = alpaca_length_controlled(preferences, differences, BASELINE, gamed)
    assert controlled.win_rate == pytest.approx(literal_rate(rows, preferences, differences), abs=5e-4)


SCIKIT_LEARN = {0: 0.67522, 7: 0.67542}
"""By missing annotations: what scikit-learn 1.9.1 gave on these rows, once, as AlpacaEval calls it.

LogisticRegressionCV(cv=GroupKFold(5), penalty="l1", solver="liblinear", fit_intercept=False, random_state=123), fitted on
each row twice, as won and as lost, with the preferences as weights. scikit-learn is no dependency of the tests.
"""


@pytest.mark.parametrize("missing", SCIKIT_LEARN)
def test_it_is_what_scikit_learn_gave_as_alpacaeval_calls_it(gamed, missing):
    preferences, differences = judged(gamed, 0.7)
    preferences[:missing] = [None] * missing
    controlled = alpaca_length_controlled(preferences, differences, BASELINE, gamed)
    assert controlled.win_rate == pytest.approx(SCIKIT_LEARN[missing], abs=5e-4)


def test_the_command_tells_it_beside_the_other_rate(rows, gamed, tmp_path, capsys):
    preferences, differences = judged(gamed, 0.7)
    annotations = [
        {"instruction": str(i), "output_1": "x" * (3000 + d), "output_2": "y" * 3000, "preference": 1 + p, "generator_1": BASELINE, "generator_2": "mine"}
        for i, (p, d) in enumerate(zip(preferences, differences, strict=True))
    ]  # fmt: skip
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    path = written(tmp_path / "df_gamed.csv", rows)
    assert main(["eval", "win-rate", str(tmp_path / "annotations.json"), "--gamed", str(path)]) == 0
    rate = alpaca_length_controlled(preferences, differences, BASELINE, gamed).win_rate
    assert f"| AlpacaEval's length-controlled win rate | {rate:.1%} |" in capsys.readouterr().out
    results = json.loads((tmp_path / "annotations-win-rate" / "results.json").read_text())
    assert results["alpaca_eval"]["win_rate"] == pytest.approx(rate)
    assert main(["eval", "win-rate", str(tmp_path / "annotations.json")]) == 0
    assert "AlpacaEval" not in capsys.readouterr().out


def test_what_is_not_alpacaevals_is_refused(rows, gamed, tmp_path):
    preferences, differences = judged(gamed, 0.0)
    for changed, told in (
        ([*rows[1:], rows[0]], "not the instructions 0 to 119 in order"),
        ([*rows[:-1], rows[-1] | {"instruction_difficulty": 9}], "one instruction has two difficulties"),
        (
            [*rows[:-1], rows[-1] | {"not_gamed_baseline": True}],
            "line 241: not_gamed_baseline = True: a row of a model",
        ),
        ([rows[0] | {"std_delta_len": "long"}], "line 2: std_delta_len = 'long': not a finite number"),
        ([{"index": 0}], "missing, the record has 'index'"),
    ):
        with pytest.raises(DataError, match=told):
            load_gamed_baselines(written(tmp_path / "changed.csv", changed))
    with pytest.raises(DataError, match="119 annotations, and the file of gamed baselines has 120 instructions"):
        alpaca_length_controlled(preferences[1:], differences[1:], BASELINE, gamed)
    with pytest.raises(DataError, match="generator_1 is 'text_davinci_003', and the file of gamed baselines has"):
        alpaca_length_controlled(preferences, differences, "text_davinci_003", gamed)
    with pytest.raises(DataError, match="no length to control for"):
        alpaca_length_controlled(preferences, [5] * NUM, BASELINE, gamed)
