"""Win rates: hand-computed ones, and length control on judges whose taste is known."""

import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize

from r2m_async.cli import main
from r2m_async.errors import DataError
from r2m_async.evaluation.judging import read_annotations, win_rates
from r2m_async.evaluation.win_rate import C, length_controlled_win_rate, mean


def test_a_mean_has_the_plain_standard_error_and_students_interval():
    estimate = mean([1.0, 2.0, 3.0, 6.0])
    # Squared deviations 4 + 1 + 0 + 9 = 14.
    assert estimate.value == 3 and estimate.standard_error == pytest.approx(math.sqrt(14 / 3 / 4))
    assert estimate.half_width == pytest.approx(3.18245 * estimate.standard_error, rel=1e-5)
    assert math.isnan(mean([1.0]).standard_error) and math.isnan(mean([1.0]).half_width)


def test_two_turns_that_say_the_same_are_one_draw():
    once = mean([0.0, 1.0, 1.0, 0.5])
    twice = mean([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5], ["a", "a", "b", "b", "c", "c", "d", "d"])
    assert (twice.value, twice.num_groups) == (once.value, 4)
    assert twice.standard_error == pytest.approx(once.standard_error)


def test_without_a_length_difference_control_changes_nothing():
    preferences = [1.0, 1.0, 0.0, 1.0, 0.25, 0.5] * 40
    plain, equal = mean(preferences), length_controlled_win_rate(preferences, [7.0] * 240)
    assert equal.length_effect == 0 and equal.win_rate.value == pytest.approx(plain.value, abs=1e-4)
    assert equal.win_rate.standard_error == pytest.approx(plain.standard_error, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_a_judge_that_only_likes_length_finds_a_longer_model_better_and_no_better_at_equal_length(seed):
    rng = np.random.default_rng(seed)
    differences = rng.normal(200, 250, 800)
    chance = 1 / (1 + np.exp(-3 * np.tanh(differences / differences.std(ddof=1))))
    preferences = (rng.random(800) < chance).astype(float)
    controlled = length_controlled_win_rate(preferences, differences)
    assert mean(preferences).value > 0.65
    assert abs(controlled.win_rate.value - 0.5) < 3 * controlled.win_rate.standard_error < 0.15
    assert controlled.length_effect == pytest.approx(3, abs=0.7)


def test_a_better_model_that_is_shorter_gets_its_quality_back():
    """True log-odds at equal length 1: a win rate of 0.731."""
    rng = np.random.default_rng(0)
    differences = rng.normal(-300, 250, 4000)
    odds = 1 + 2 * np.tanh(differences / differences.std(ddof=1))
    preferences = (rng.random(4000) < 1 / (1 + np.exp(-odds))).astype(float)
    controlled = length_controlled_win_rate(preferences, differences)
    assert mean(preferences).value < 0.5
    assert abs(controlled.win_rate.value - 1 / (1 + math.exp(-1))) < 3 * controlled.win_rate.standard_error < 0.08


def test_the_fit_is_that_of_a_literal_transcription():
    rng = np.random.default_rng(1)
    y, d = rng.random(50), rng.normal(0, 100, 50)

    def loss(weights):
        total = 0.0
        for one, difference in zip(y, d, strict=True):
            p = 1 / (1 + math.exp(-(weights[0] + weights[1] * math.tanh(difference / np.std(d, ddof=1)))))
            total -= one * math.log(p) + (1 - one) * math.log(1 - p)
        return total + (weights[0] ** 2 + weights[1] ** 2) / (2 * C)

    slow = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x
    controlled = length_controlled_win_rate(y, d)
    assert controlled.win_rate.value == pytest.approx(1 / (1 + math.exp(-slow[0])), abs=1e-6)
    assert controlled.length_effect == pytest.approx(slow[1], abs=1e-5)


def test_the_standard_error_is_what_samples_scatter_by():
    rates, errors = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        differences = rng.normal(100, 250, 300)
        odds = 0.5 + 1.5 * np.tanh(differences / 250)
        preferences = (rng.random(300) < 1 / (1 + np.exp(-odds))).astype(float)
        fitted = length_controlled_win_rate(preferences, differences).win_rate
        rates.append(fitted.value)
        errors.append(fitted.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(rates), rel=0.15)


def test_a_judge_that_never_errs_is_still_fitted():
    always = length_controlled_win_rate([1.0] * 50, np.arange(50.0))
    rate = always.win_rate.value
    p = 1 / (
        1
        + np.exp(
            -math.log(rate / (1 - rate))
            - always.length_effect * np.tanh(np.arange(50.0) / np.std(np.arange(50), ddof=1))
        )
    )
    assert (1 - p).sum() == pytest.approx(math.log(rate / (1 - rate)) / C, rel=1e-4)  # where the penalty holds it
    longer = length_controlled_win_rate([0.0] * 25 + [1.0] * 25, np.linspace(-10, 10, 50))
    assert longer.win_rate.value == pytest.approx(0.5, abs=1e-6)


# A judge's file


def annotations_file(tmp_path, records, lines=False):
    path = tmp_path / "annotations.json"
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return path


RECORDS = [
    {"instruction": "a", "output_1": "xx", "output_2": "xxxx", "preference": 2},
    {"instruction": "b", "output_1": "xx", "output_2": "xx", "preference": 1.0},
    {"instruction": "c", "output_1": "x", "output_2": "xxx", "preference": 1.9},
    {"instruction": "d", "output_1": "xx", "output_2": "x", "preference": 0},
    {"instruction": "e", "output_1": "xx", "output_2": "x", "preference": None},
]
RECORDS = [one | {"generator_1": "base", "generator_2": "ours"} for one in RECORDS]


@pytest.mark.parametrize("lines", [False, True])
def test_a_judges_file_counted_by_hand(tmp_path, lines, capsys):
    path = annotations_file(tmp_path, RECORDS, lines)
    assert main(["eval", "win-rate", str(path), "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    # Preferences 1, 0, 0.9, 0.5; deviations from 0.6: 0.4, -0.6, 0.3, -0.1.
    assert results["win_rate"]["value"] == pytest.approx(0.6)
    assert results["win_rate"]["standard_error"] == pytest.approx(math.sqrt((0.16 + 0.36 + 0.09 + 0.01) / 3 / 4))
    assert (results["num_wins"], results["num_ties"], results["num_losses"]) == (2, 1, 1)
    assert results["discrete_win_rate"] == pytest.approx(2.5 / 4) and results["num_without_preference"] == 1
    assert (results["length"], results["length_against"]) == (2.5, 1.75)
    controlled = length_controlled_win_rate([1.0, 0.0, 0.9, 0.5], [2, 0, 2, -1])
    assert results["length_controlled_win_rate"]["value"] == pytest.approx(controlled.win_rate.value)
    assert results["length_effect"] == pytest.approx(controlled.length_effect) and controlled.length_effect > 1
    told = capsys.readouterr().out
    assert (tmp_path / "out" / "table.md").read_text() in told
    assert "| win rate, ties half, ± SE | 60.0% ± 22.7% |" in told and "ours against base" in told


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"preference": 3}, r"record 2: preference = 3: neither 0 .*; write null for no judgement$"),
        ({"preference": True}, r"record 2: preference = True"),
        ({"preference": 0.5}, r"record 2: preference = 0.5"),
        ({"output_2": ["x"]}, r"record 2: output_2 = .*not text"),
        ({"generator_2": "another"}, "generator_2 is 'another' and 'ours': a win rate is of one model"),
    ],
)
def test_annotations_that_are_none_are_refused_by_record(tmp_path, wrong, message):
    path = annotations_file(tmp_path, [RECORDS[0], RECORDS[1] | wrong])
    with pytest.raises(DataError, match=message):
        read_annotations(path)


def test_files_without_a_judgement_are_refused(tmp_path):
    with pytest.raises(DataError, match="no preference at all"):
        win_rates(read_annotations(annotations_file(tmp_path, RECORDS[4:])))
    with pytest.raises(DataError, match="no record"):
        read_annotations(annotations_file(tmp_path, []))
    (tmp_path / "broken.json").write_text('[{"preference": 1},\n{"preference"')
    with pytest.raises(DataError, match=r"broken.json: not JSON \(.*line 2"):
        read_annotations(tmp_path / "broken.json")
    with pytest.raises(DataError, match=r"absent.json: cannot be read \(No such file"):
        read_annotations(tmp_path / "absent.json")
    missing = dict(RECORDS[0])
    del missing["preference"]
    with pytest.raises(DataError, match=r"line 1: preference: missing, .*; add it$"):
        read_annotations(annotations_file(tmp_path, [missing], lines=True))
