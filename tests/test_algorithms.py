"""What docs/algorithms.md lists, against slow loops that say in our own words what the paper or the named peer computes.

Everything here is float64, so that equal to rounding means 1e-10.
"""

import math
import statistics

import pytest
import torch

from r2m_async.advantages import (
    AdvantageInputs,
    advantages_and_returns,
    compute_advantages,
    get_advantage,
    whitened,
)
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.workload import check_estimator

F64 = torch.float64
close = dict(rtol=1e-10, atol=1e-12)


def make_groups(seed=0, n=3, k=4, t=5):
    """Ragged responses, one with a hole and one without tokens; NaN wherever nothing may be read."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(t) < torch.randint(1, t + 1, (n, k), generator=g)[..., None]
    mask[0, 0] = True
    mask[0, 0, -2] = False
    mask[-1, -1] = False
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=F64)  # noqa: E731
    logprobs, ref = (draw(n, k, t).masked_fill(~mask, math.nan) for _ in range(2))
    return AdvantageInputs(rewards=draw(n, k), response_mask=mask, logprobs=logprobs, ref_logprobs=ref)


# Estimators: each takes the rewards, lengths and KLs of one group (and all rewards of the batch)


def slow_rloo_kl(rewards, lengths, kls, batch, beta):
    """TRL's RLOO and BSR's: the whole response's KL is taken off its reward, then each is held against the others."""
    charged = [r - beta * kl for r, kl in zip(rewards, kls, strict=True)]
    return [r - statistics.fmean(charged[:j] + charged[j + 1 :]) for j, r in enumerate(charged)]


def slow_dr_grpo(rewards, lengths, kls, batch):
    """TRL with scale_rewards none, verl with norm_adv_by_std_in_grpo false, OpenRLHF's dr_grpo."""
    return [r - statistics.fmean(rewards) for r in rewards]


def slow_grpo_batch(rewards, lengths, kls, batch, eps):
    """TRL with scale_rewards batch: a sample's standard deviation of all rewards, whatever their group."""
    return [(r - statistics.fmean(rewards)) / (statistics.stdev(batch) + eps) for r in rewards]


def slow_opo(rewards, lengths, kls, batch):
    """verl's opo: the baseline is the mean reward of a token."""
    baseline = sum(length * r for length, r in zip(lengths, rewards, strict=True)) / sum(lengths)
    return [r - baseline for r in rewards]


@pytest.mark.parametrize(
    ("name", "slow", "options"),
    [
        ("rloo_kl", slow_rloo_kl, {"beta": 0.3}),
        ("rloo_kl", slow_rloo_kl, {"beta": 0.0}),
        ("dr_grpo", slow_dr_grpo, {}),
        ("grpo_batch", slow_grpo_batch, {"eps": 1e-4}),
        ("opo", slow_opo, {}),
    ],
)
@pytest.mark.parametrize("k", [2, 4])
def test_an_estimator_is_its_literal_loop(name, slow, options, k):
    inputs = make_groups(k=k)
    got = compute_advantages(get_advantage(name), inputs, options)
    batch = inputs.rewards.flatten().tolist()
    for i in range(len(got)):
        tokens = [inputs.response_mask[i, j].nonzero().flatten().tolist() for j in range(k)]
        kls = [sum((inputs.logprobs - inputs.ref_logprobs)[i, j, s].item() for s in tokens[j]) for j in range(k)]
        expected = slow(inputs.rewards[i].tolist(), [len(one) for one in tokens], kls, batch, **options)
        for j in range(k):
            assert got[i, j].item() == pytest.approx(expected[j] if tokens[j] else 0.0, rel=1e-10, abs=1e-12)


def test_estimators_by_hand():
    mask = torch.tensor([[[True, False, False], [True, True, True]]])
    inputs = AdvantageInputs(rewards=torch.tensor([[4.0, 0.0]]), response_mask=mask)
    assert compute_advantages(get_advantage("dr_grpo"), inputs).tolist() == [[2.0, -2.0]]
    assert compute_advantages(get_advantage("opo"), inputs).tolist() == [[3.0, -1.0]]  # the mean token has reward 1
    zeros = torch.zeros(1, 2, 3)
    charged = AdvantageInputs(
        rewards=torch.tensor([[4.0, 0.0]]), response_mask=mask, logprobs=zeros + 1, ref_logprobs=zeros
    )
    # KLs 1 and 3 at beta 1: rewards 3 and -3
    assert compute_advantages(get_advantage("rloo_kl"), charged, {"beta": 1.0}).tolist() == [[6.0, -6.0]]


@pytest.mark.parametrize("name", ["rloo_kl", "dr_grpo", "grpo_batch", "opo"])
def test_equal_rewards_give_exactly_nothing_and_a_group_of_one_is_refused(name):
    options = {"beta": 0.0} if name == "rloo_kl" else {}
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, 0, 1:] = False
    inputs = AdvantageInputs(rewards=torch.full((2, 3), 0.1), response_mask=mask)
    assert not compute_advantages(get_advantage(name), inputs, options).any()
    with pytest.raises(ConfigError, match="group_size = 1"):
        compute_advantages(
            get_advantage(name), AdvantageInputs(rewards=torch.zeros(2, 1), response_mask=mask[:, :1]), options
        )
    with pytest.raises(ConfigError, match=rf"'{name}', which compares the responses of a group"):
        check_estimator(get_advantage(name), R2MConfig(rollouts={"group_size": 1}, head={"variant": "vanilla"}))


def test_a_batch_without_tokens_gets_zeros_from_opo():
    inputs = AdvantageInputs(rewards=torch.randn(2, 3), response_mask=torch.zeros(2, 3, 4, dtype=torch.bool))
    assert not advantages_and_returns(get_advantage("opo"), inputs)[0].any()


def test_the_spread_of_a_batch_needs_whole_groups():
    config = R2MConfig(scheduling={"overage": "mask", "max_policy_age": 1})
    with pytest.raises(ConfigError, match=r"overage is 'mask' and advantage.name is 'grpo_batch'"):
        check_estimator(get_advantage("grpo_batch"), config)


# Whitening


def slow_whitened(values, over):
    """`responses`: TRL's normalize_advantages. `tokens`: verl's masked_whiten. Both with a sample's variance."""
    mean, variance = statistics.fmean(values), statistics.variance(values)
    spread = math.sqrt(variance) + 1e-4 if over == "responses" else math.sqrt(variance + 1e-8)
    return [(value - mean) / spread for value in values]


def test_whitening_is_its_literal_loop_and_counts_responses_once_or_by_their_tokens():
    inputs = make_groups()
    mask = inputs.response_mask.flatten(0, 1)
    advantages, per_token = inputs.rewards.flatten(), inputs.logprobs.flatten(0, 1)
    alive = [row for row in range(len(mask)) if mask[row].any()]
    got = whitened(advantages, mask, "responses")
    assert got[alive].tolist() == pytest.approx(slow_whitened(advantages[alive].tolist(), "responses"), rel=1e-10)
    places = [(row, s) for row in alive for s in range(mask.shape[1]) if mask[row, s]]
    expected = slow_whitened([advantages[row].item() for row, _ in places], "tokens")
    got = whitened(advantages, mask, "tokens")
    assert [got[row].item() for row, _ in places] == pytest.approx(expected, rel=1e-10)
    expected = slow_whitened([per_token[place].item() for place in places], "tokens")
    got = whitened(per_token, mask, "tokens")
    assert [got[place].item() for place in places] == pytest.approx(expected, rel=1e-10)
    assert not got[~mask].any() and not whitened(advantages, mask, "tokens")[~mask.any(1)].any()


def test_whitening_of_equal_numbers_of_one_and_of_none_gives_zeros():
    mask = torch.ones(3, 2, dtype=torch.bool)
    for over in ("responses", "tokens"):
        assert not whitened(torch.full((3,), 0.1), mask, over).any()
        assert not whitened(torch.ones(3), torch.zeros_like(mask), over).any()
    assert not whitened(torch.ones(1), mask[:1], "responses").any()


def test_whitening_of_responses_is_refused_where_tokens_have_advantages():
    mask = torch.ones(3, 2, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"whiten is 'responses'.*use 'tokens'"):
        whitened(torch.ones(3, 2), mask, "responses")
    config = R2MConfig(objective={"ratio": "token"}, advantage={"whiten": "responses"})
    with pytest.raises(ConfigError, match=r"whiten is 'responses' and advantage.name is 'gae'"):
        check_estimator(get_advantage("gae"), config)
