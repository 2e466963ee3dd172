"""What a step reports of its ratios, by hand, over ranks, epochs and policy ages."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from learners.step_statistics import StepStatistics, batch_metrics, unit_statistics
from r2m_async.config import R2MConfig
from r2m_async.objectives import PolicyLoss

CONFIG = R2MConfig().objective(epochs=2, ratio="token")
MASK = torch.tensor([[True, True], [True, False], [True, True]])
MISMATCH = torch.tensor([[0.1, -0.3], [0.5, 9.0], [-0.2, 0.2]])
AGES = torch.tensor([0, 2, 0])


def loss_of(ratio, weight, rows, clipped=None, left_out=None) -> PolicyLoss:
    ratio, weight = torch.tensor(ratio), torch.tensor(weight)
    nothing = torch.zeros_like(ratio, dtype=torch.bool)
    return PolicyLoss(
        loss=torch.tensor(0.0),
        units=MASK[rows, : ratio.shape[1]],
        ratio=ratio,
        weight=weight,
        clipped=nothing if clipped is None else torch.tensor(clipped),
        left_out=nothing if left_out is None else torch.tensor(left_out),
    )


def two_ranks() -> list[StepStatistics]:
    """Rank 0 has rows 0 and 2, rank 1 row 1, whose pass is narrower."""
    ranks = [StepStatistics(MASK, CONFIG) for _ in range(2)]
    for epoch, scale in enumerate((1.0, 2.0)):
        both = loss_of(
            [[1.0 * scale, 1.5], [0.5, 0.9 * scale]],
            [[1.0, 1.2], [0.8, 1.0]],
            [0, 2],
            clipped=[[False, True], [True, False]],
        )
        ranks[0].add(epoch, [0, 2], torch.tensor(0.25), both)
        ranks[1].add(epoch, [1], torch.tensor(0.5), loss_of([[3.0]], [[2.0]], [1], left_out=[[True]]))
    for rank in ranks:
        rank.grad_norms += [1.0, 2.0]
    return ranks


def metrics_of(ranks: list[StepStatistics]) -> dict[str, float]:
    """Of rank 0, whose sums over ranks are asked for in the same order as the others'."""
    asked = []
    ranks[1].metrics(lambda values: asked.append(values.clone()) or values, MISMATCH, AGES)
    others = iter(asked)
    return ranks[0].metrics(lambda values: values + next(others), MISMATCH, AGES)


def test_a_step_is_told_over_all_units_of_all_ranks_and_epochs():
    metrics = metrics_of(two_ranks())
    ratios = [1.0, 1.5, 3.0, 0.5, 0.9, 2.0, 1.5, 3.0, 0.5, 1.8]
    weights = np.array([1.0, 1.2, 2.0, 0.8, 1.0] * 2)
    expected = {
        "loss": 2 * 0.75 / 2,
        "grad_norm": 1.5,
        "skipped_updates": 0.0,
        "responses": 3.0,
        "clip_share": 4 / 10,
        "masked_share": 2 / 10,
        "ratio_mean": np.mean(ratios),
        "ratio_min": 0.5,
        "ratio_q05": np.quantile(ratios, 0.05),
        "ratio_median": 1.5,
        "ratio_q95": np.quantile(ratios, 0.95),
        "ratio_max": 3.0,
        "weight_mean": weights.mean(),
        "effective_sample_size": weights.sum() ** 2 / 10 / (weights**2).sum(),
        "mismatch_mean": (0.1 + 0.3 + 0.5 + 0.2 + 0.2) / 5,
        "mismatch_max": 0.5,
    }
    assert {name: metrics[f"policy/{name}"] for name in expected} == pytest.approx(expected)


def test_each_policy_age_is_told_apart():
    metrics = metrics_of(two_ranks())
    old = {name.removeprefix("policy_age_2/"): value for name, value in metrics.items() if "age_2" in name}
    assert old["ratio_mean"] == old["ratio_median"] == 3.0 and old["weight_mean"] == 2.0
    assert (old["responses"], old["clip_share"], old["masked_share"], old["mismatch_max"]) == (1.0, 0.0, 1.0, 0.5)
    assert old["effective_sample_size"] == 1.0
    assert metrics["policy_age_0/responses"] == 2.0 and metrics["policy_age_0/clip_share"] == 0.5
    assert metrics["policy_age_0/mismatch_max"] == pytest.approx(0.3)
    assert not any("policy_age_1" in name for name in metrics)


@pytest.mark.parametrize(("leans_on_ratio", "size"), [(True, 0.5), (False, 1.0)])
def test_the_effective_sample_size_is_of_what_importance_sampling_leans_on(leans_on_ratio, size):
    no = torch.zeros(2)
    told = unit_statistics(torch.tensor([0.0, 4.0]), torch.ones(2), no, no, leans_on_ratio)
    assert told["effective_sample_size"] == size


def test_without_units_all_is_zero():
    nothing = torch.zeros(0)
    assert set(unit_statistics(nothing, nothing, nothing, nothing, False).values()) == {0.0}


def test_the_kl_of_what_was_sampled_is_that_of_the_policies_that_sampled_it():
    mask = torch.tensor([[True, True], [True, False]])
    behaviour, old, reference = (
        torch.tensor(rows)
        for rows in (
            [[-1.0, -2.0], [-3.0, 9.0]],
            [[-1.5, -2.5], [-2.0, 8.0]],
            [[-2.0, -2.0], [-5.0, 7.0]],
        )
    )
    told = batch_metrics(
        mask, behaviour, old, reference, torch.zeros(2), [SimpleNamespace(finish_reason="stop", written=None)] * 2
    )
    assert told["kl/behaviour"] == pytest.approx((1.0 + 0.0 + 2.0) / 2)
    assert told["kl/sequence"] == pytest.approx((0.5 - 0.5 + 3.0) / 2)
