"""The GREBT loss against Eq. 5-7 written as loops, and at the edges where the formulas have no value."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r2m_async.head_objectives import (
    bradley_terry,
    grebt,
    grebt_terms,
    group_reward_entropy,
    importance_weights,
    pessimistic,
    preference_doubt,
    steering_penalty,
)

F64 = torch.float64


def rewards_of(rows, dtype=F64):
    return torch.tensor(rows, dtype=dtype, requires_grad=True)


def slow_entropy(row):
    mean = sum(row) / len(row)
    std = (sum((r - mean) ** 2 for r in row) / len(row)) ** 0.5
    z = [(r - mean) / std for r in row]
    total = sum(v.exp() for v in z)
    return -sum((v.exp() / total) * (v.exp() / total).log() for v in z)


def slow_grebt(rewards, alpha, pairs):
    total = 0.0
    for row, pair in zip(rewards, pairs, strict=True):
        values = pair.tolist()
        w, l = values.index(max(values)), values.index(min(values))  # noqa: E741
        total = (
            total + (1 - alpha) * -torch.log(1 / (1 + torch.exp(-(row[w] - row[l])))) + alpha * slow_entropy(list(row))
        )
    return total / len(rewards)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.floats(0, 1), st.booleans())
def test_grebt_and_its_gradient_agree_with_a_literal_loop(seed, k, alpha, annotated):
    g = torch.Generator().manual_seed(seed)
    rewards = (torch.randn(3, k, generator=g, dtype=F64) * 2).requires_grad_()
    pairs = torch.randn(3, k, generator=g, dtype=F64) if annotated else None
    got, expected = grebt(rewards, alpha, pairs), slow_grebt(rewards, alpha, rewards if pairs is None else pairs)
    assert torch.allclose(got, expected, rtol=1e-10)
    assert torch.allclose(*(torch.autograd.grad(loss, rewards)[0] for loss in (got, expected)), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_gradient_passes_a_finite_difference_check(alpha):
    rewards = rewards_of([[0.3, -1.0, 2.0, 0.7], [5.0, 1.0, 1.5, -2.0]])
    assert torch.autograd.gradcheck(lambda r: grebt(r, alpha), rewards)


def test_bradley_terry_by_hand():
    assert bradley_terry(torch.tensor([2.0]), torch.tensor([2.0])).item() == pytest.approx(math.log(2))
    gap_of_log_three = bradley_terry(torch.tensor([math.log(3), 0.0]), torch.tensor([0.0, math.log(3)]))
    assert gap_of_log_three.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


def test_grebt_by_hand_for_a_pair():
    # K = 2 standardises to +-1 whatever the rewards: p = (e, 1/e) / (e + 1/e).
    p = math.e / (math.e + 1 / math.e)
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert grebt(rewards_of([[3.0, 1.0]]), 0.3).item() == pytest.approx(0.7 * math.log1p(math.exp(-2)) + 0.3 * entropy)


def test_entropy_of_a_pair_is_constant_and_for_eight_its_minimum_is_one_outlier():
    pair = rewards_of([[3.0, 1.0]])
    assert torch.autograd.grad(group_reward_entropy(pair), pair)[0].abs().max() < 1e-12
    assert group_reward_entropy(rewards_of([[9.0] + [0.0] * 7])).item() == pytest.approx(1.06, abs=0.005)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(-3, 30), st.floats(-100, 100))
def test_entropy_ignores_scale_and_offset(seed, exponent, offset):
    row = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed), dtype=F64)
    assert group_reward_entropy(row * 10.0**exponent + offset).item() == pytest.approx(
        group_reward_entropy(row).item(), abs=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("value", [0.0, 0.1, -37.3])
@pytest.mark.parametrize("k", [2, 3, 8])
def test_identical_rewards_give_log_k_entropy_and_exactly_no_gradient(value, k, dtype):
    rewards = rewards_of([[value] * k], dtype)
    terms = grebt_terms(rewards, 0.3)
    assert terms.group_reward_entropy.item() == pytest.approx(math.log(k))
    assert terms.bradley_terry.item() == pytest.approx(math.log(2))
    assert not torch.autograd.grad(terms.loss, rewards)[0].any()


def test_rewards_that_differ_by_rounding_give_entropy_no_gradient_and_the_other_groups_theirs():
    rewards = rewards_of([[30.0, 30.000002, 30.0], [0.0, 1.0, 3.0]], torch.float32)
    gradient = torch.autograd.grad(group_reward_entropy(rewards), rewards)[0]
    alone = rewards_of([[0.0, 1.0, 3.0]], torch.float32)
    assert not gradient[0].any()
    assert torch.allclose(gradient[1], torch.autograd.grad(group_reward_entropy(alone), alone)[0][0] / 2)


@pytest.mark.parametrize("gap", [1e3, 1e30, 1e38])
def test_extreme_gaps_stay_finite_in_float32_and_pull_with_at_most_the_bradley_terry_slope(gap):
    won = rewards_of([[gap, 0.0, gap / 2]], torch.float32)
    loss = grebt(won, 0.3)
    assert loss.item() == pytest.approx(0.3 * group_reward_entropy(rewards_of([[1.0, 0.0, 0.5]])).item())
    assert torch.autograd.grad(loss, won)[0].isfinite().all()
    lost = rewards_of([[gap, 0.0, gap / 2]], torch.float32)
    backwards = grebt(lost, 0.0, pair_rewards=-lost.detach())
    assert backwards.item() == pytest.approx(gap)
    assert torch.autograd.grad(backwards, lost)[0].tolist() == [[1.0, -1.0, 0.0]]


def test_pair_rewards_choose_the_pair_and_get_no_gradient():
    rewards, pairs = rewards_of([[1.0, 2.0, 4.0]]), rewards_of([[0.0, 9.0, -9.0]])
    loss = grebt(rewards, 0.0, pairs)
    assert loss.item() == pytest.approx(math.log1p(math.exp(2.0)))
    assert torch.autograd.grad(loss, pairs, allow_unused=True)[0] is None


def test_the_logged_terms_make_up_the_loss_and_carry_no_gradient():
    terms = grebt_terms(rewards_of([[1.0, 2.0, 4.0], [0.0, 5.0, 1.0]]), 0.3)
    assert terms.loss.item() == pytest.approx(
        0.7 * terms.bradley_terry.item() + 0.3 * terms.group_reward_entropy.item()
    )
    assert terms.gap.item() == 4.0
    assert not (
        terms.bradley_terry.requires_grad or terms.group_reward_entropy.requires_grad or terms.gap.requires_grad
    )


def test_malformed_arguments_are_refused():
    with pytest.raises(ValueError, match="K >= 2"):
        grebt(torch.zeros(3, 1), 0.3)
    with pytest.raises(ValueError, match="alpha"):
        grebt(torch.zeros(3, 2), 1.3)
    with pytest.raises(ValueError, match=r"pair_rewards must be \[3, 2\]"):
        grebt(torch.zeros(3, 2), 0.3, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="one shape"):
        bradley_terry(torch.zeros(3), torch.zeros(3, 1))


# Several heads


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 5), st.floats(0, 3))
def test_pessimism_and_doubt_agree_with_literal_loops(seed, heads, k, kappa):
    rewards = torch.randn(heads, k, generator=torch.Generator().manual_seed(seed), dtype=F64)

    def mean_and_std(values):
        mean = sum(values) / len(values)
        return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))

    for j, reward in enumerate(pessimistic(rewards, kappa).tolist()):
        mean, std = mean_and_std(rewards[:, j].tolist())
        assert reward == pytest.approx(mean - kappa * std)
    for i, row in enumerate(preference_doubt(rewards).tolist()):
        for j, doubt in enumerate(row):
            sigmoids = [1 / (1 + math.exp(-(head[i] - head[j]))) for head in rewards.tolist()]
            assert doubt == pytest.approx(mean_and_std(sigmoids)[1], abs=1e-9)


def test_doubt_by_hand():
    doubt = preference_doubt(torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]]))
    assert doubt.tolist() == [[0, pytest.approx(0.25)], [pytest.approx(0.25), 0]]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5))
def test_the_steering_penalty_agrees_with_a_literal_loop(seed, k, size):
    gradients = torch.randn(k, size, dtype=F64, generator=torch.Generator().manual_seed(seed)).tolist()
    mean = [sum(one[at] for one in gradients) / k for at in range(size)]
    expected = [sum(g * (g - m) for g, m in zip(one, mean, strict=True)) for one in gradients]
    assert steering_penalty(torch.tensor(gradients, dtype=F64)).tolist() == pytest.approx(expected)


def test_a_response_whose_gradient_is_the_groups_has_no_steering_penalty():
    assert steering_penalty(torch.tensor([[1.0, 2.0]] * 3)).tolist() == [0, 0, 0]
    assert steering_penalty(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])).tolist() == [1, 1, 0]


# Pairs of a data set


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-200, 200), min_size=1, max_size=6), st.sampled_from([0.0, 0.001, 0.5, 1.0]))
def test_importance_weights_agree_with_a_literal_loop(log_ratios, temper):
    ratios = [math.exp(temper * (one - max(log_ratios))) for one in log_ratios]
    mean = sum(ratios) / len(ratios)
    expected = [ratio / mean for ratio in ratios]
    assert importance_weights(torch.tensor(log_ratios, dtype=F64), temper).tolist() == pytest.approx(expected)


def test_importance_weights_by_hand():
    weights = importance_weights(torch.tensor([math.log(3), 0.0]), 1.0)
    assert weights.tolist() == pytest.approx([1.5, 0.5])
    assert importance_weights(torch.tensor([50.0, -50.0]), 0.0).tolist() == [1.0, 1.0]
