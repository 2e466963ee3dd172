"""What docs/algorithms.md lists, against slow loops that say in our own words what the paper or the named peer computes.

Everything here is float64, so that equal to rounding means 1e-10.
"""

import math
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch

from r2m_async.advantages import (
    AdvantageInputs,
    advantages_and_returns,
    get_advantage,
    whitened,
)
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.workload import check_estimator, check_loss
from r2m_async.models.policy_objective import denominators, microbatch_loss
from r2m_async.models.weights import MovingReference
from r2m_async.objectives import (
    AGGREGATIONS,
    WeightBounds,
    default_aggregation,
    kl_loss,
    loss_denominator,
    next_kl_coef,
    policy_loss,
)
from r2m_async.policy_losses import LOSSES, Loss, LossInputs, get_loss, unit_losses

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
    got = get_advantage(name)(inputs, **options)
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
    assert get_advantage("dr_grpo")(inputs).tolist() == [[2.0, -2.0]]
    assert get_advantage("opo")(inputs).tolist() == [[3.0, -1.0]]  # the mean token has reward 1
    zeros = torch.zeros(1, 2, 3)
    charged = AdvantageInputs(
        rewards=torch.tensor([[4.0, 0.0]]), response_mask=mask, logprobs=zeros + 1, ref_logprobs=zeros
    )
    # KLs 1 and 3 at beta 1: rewards 3 and -3
    assert get_advantage("rloo_kl")(charged, beta=1.0).tolist() == [[6.0, -6.0]]


@pytest.mark.parametrize("name", ["rloo_kl", "dr_grpo", "grpo_batch", "opo"])
def test_equal_rewards_give_exactly_nothing_and_a_group_of_one_is_refused(name):
    options = {"beta": 0.0} if name == "rloo_kl" else {}
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, 0, 1:] = False
    inputs = AdvantageInputs(rewards=torch.full((2, 3), 0.1), response_mask=mask)
    assert not get_advantage(name)(inputs, **options).any()
    with pytest.raises(ConfigError, match="group_size = 1"):
        get_advantage(name)(AdvantageInputs(rewards=torch.zeros(2, 1), response_mask=mask[:, :1]), **options)
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


# Losses: the peers' per-token losses of one response, averaged as they average


def make_batch(seed=0, b=6, t=5, spread=0.4):
    """Ragged, with a hole, and one response without tokens. NaN wherever nothing may be read."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=g)
    mask[0], mask[1] = True, False
    mask[0, 2] = False
    mu = -torch.rand(b, t, generator=g, dtype=F64) * 3
    old = mu + torch.randn(b, t, generator=g, dtype=F64) * spread
    new = old + torch.randn(b, t, generator=g, dtype=F64) * spread
    advantages = torch.randn(b, generator=g, dtype=F64)
    mu, old, new = (x.masked_fill(~mask, math.nan) for x in (mu, old, new))
    return new.requires_grad_(), mu, old, advantages, mask


def responses_of(mask):
    """(row, its trained tokens) of the responses that have any."""
    rows = [(row, mask[row].nonzero().flatten().tolist()) for row in range(len(mask))]
    return [(row, tokens) for row, tokens in rows if tokens]


def averaged(terms, aggregation, max_tokens=7):
    """`terms`: for each response the losses of its tokens. verl's names: token-mean, seq-mean-token-mean,
    seq-mean-token-sum; TRL's dr_grpo is the last one over a constant; token_sum is the plain sum."""
    tokens = sum(len(row) for row in terms)
    sums = [sum(row) for row in terms]
    return {
        "token": lambda: sum(sums) / tokens,
        "token_sum": lambda: sum(sums),
        "sequence": lambda: sum(total / len(row) for total, row in zip(sums, terms, strict=True)) / len(terms),
        "sequence_sum": lambda: sum(sums) / len(terms),
        "sequence_sum_norm": lambda: sum(sums) / (len(terms) * max_tokens),
    }[aggregation]()


def slow_dual_clip(new, old, a, low, high, c):
    """verl's vanilla and OpenRLHF's dual_clip: with A < 0 the loss of a token is never more than -c A."""
    losses = []
    for x, y in zip(new, old, strict=True):
        loss = torch.maximum(-(x - y).exp() * a, -torch.clamp((x - y).exp(), 1 - low, 1 + high) * a)
        losses.append(torch.minimum(loss, -c * a) if a < 0 else loss)
    return losses


def slow_cispo_of_trl(new, old, a, low, high):
    """TRL's cispo: the weight has only an upper bound, and no gradient. Its epsilon_high is our 1 + clip_high."""
    return [-min((x - y).exp().item(), 1 + high) * a * x for x, y in zip(new, old, strict=True)]


def slow_cispo_of_verl(new, old, a, low, high, lower):
    return [-min(max((x - y).exp().item(), 1 - low), 1 + high) * a * x for x, y in zip(new, old, strict=True)]


def slow_gmpo(new, old, a, low, high):
    """verl's geo_mean: each log-ratio is clipped where the advantage pushes it, then the geometric mean is taken."""
    total = 0.0
    for x, y in zip(new, old, strict=True):
        held = torch.clamp(x - y, -low, high)
        total = total + (torch.minimum(x - y, held) if a > 0 else torch.maximum(x - y, held))
    return [-a * (total / len(new)).exp()] * len(new)


def slow_sapo(new, old, a, low, high, tau_positive, tau_negative):
    """verl's and TRL's sapo: a sigmoid around a ratio of 1, whose slope there is 1."""
    tau = tau_positive if a > 0 else tau_negative
    return [-a * 4 / tau / (1 + (-tau * ((x - y).exp() - 1)).exp()) for x, y in zip(new, old, strict=True)]


LOSS_CASES = [
    ("dual_clip", "token", slow_dual_clip, {"c": 1.5}),
    ("cispo", "token", slow_cispo_of_trl, {}),
    ("cispo", "token", slow_cispo_of_verl, {"lower": 0.9}),
    ("gmpo", "sequence_mean", slow_gmpo, {}),
    ("sapo", "token", slow_sapo, {"tau_positive": 1.0, "tau_negative": 1.05}),
]


@pytest.mark.parametrize(("name", "ratio", "slow", "options"), LOSS_CASES)
@pytest.mark.parametrize("aggregation", [None, *AGGREGATIONS])
def test_a_loss_and_its_gradient_are_their_literal_loop(name, ratio, slow, options, aggregation):
    for seed in range(3):
        new, mu, old, advantages, mask = make_batch(seed)
        default = "token" if ratio == "token" and name != "sapo" else "sequence"
        got = policy_loss(
            new, mu, advantages, mask, old_logprobs=old, off_policy="ignore", ratio=ratio, loss=get_loss(name),
            loss_options=options, clip_low=0.1, clip_high=0.3, aggregation=aggregation,
            denominator=loss_denominator(mask, aggregation or default, max_tokens=7),
        )  # fmt: skip
        terms = [
            slow(new[row][tokens], old[row][tokens], advantages[row], 0.1, 0.3, **options)
            for row, tokens in responses_of(mask)
        ]
        expected = averaged(terms, aggregation or default)
        assert torch.allclose(got.loss, expected, **close)
        assert torch.allclose(*(torch.autograd.grad(loss, new)[0] for loss in (got.loss, expected)), **close)
        assert got.loss.isfinite() and not got.ratio.requires_grad


def test_losses_by_hand():
    """One token with rho 2, A 1 or -1, clip 0.2, log pi -1."""
    inputs = {
        sign: LossInputs(
            logprobs=torch.tensor([[-1.0]]), anchor_logprobs=torch.tensor([[-1.0 - math.log(2)]]),
            ratio=torch.tensor([[2.0]]), advantages=torch.tensor([[sign]]), mask=torch.ones(1, 1).bool(),
            clip_low=0.2, clip_high=0.2,
        )
        for sign in (1.0, -1.0)
    }  # fmt: skip
    told = {
        (name, sign): tuple(part.item() for part in unit_losses(get_loss(name), inputs[sign], options))
        for name, options in (("clip", {}), ("dual_clip", {"c": 1.5}), ("cispo", {}), ("gmpo", {}), ("sapo", {}))
        for sign in (1.0, -1.0)
    }
    sigmoid = {tau: 4 / tau / (1 + math.exp(-tau)) for tau in (1.0, 1.05)}
    expected = {
        ("clip", 1.0): (-1.2, True), ("clip", -1.0): (2.0, False),
        ("dual_clip", 1.0): (-1.2, True), ("dual_clip", -1.0): (1.5, True),
        ("cispo", 1.0): (1.2, False), ("cispo", -1.0): (-1.2, False),
        ("gmpo", 1.0): (-math.exp(0.2), True), ("gmpo", -1.0): (2.0, False),
        ("sapo", 1.0): (-sigmoid[1.0], False), ("sapo", -1.0): (sigmoid[1.05], False),
    }  # fmt: skip
    for key, (loss, clipped) in expected.items():
        assert told[key] == (pytest.approx(loss, rel=1e-5), clipped), key


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_has_a_gradient_that_is_not_finite_at_extreme_ratios(name):
    rows = torch.cartesian_prod(torch.tensor([0.0, 1e3, -1e3]), torch.tensor([0.0, 1e3, -1e3]))
    mu, mask = torch.full((9, 2), -1.0), torch.ones(9, 2, dtype=torch.bool)
    new = (mu + rows).requires_grad_()
    for sign in (1.0, -1.0, 0.0):
        loss = policy_loss(new, mu, torch.full((9,), sign), mask, loss=LOSSES[name], ratio=LOSSES[name].ratios[-1]).loss
        assert loss.isfinite() and torch.autograd.grad(loss, new)[0].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_of_microbatches_add_up_for_every_loss(name):
    new, mu, old, advantages, mask = make_batch()
    loss = LOSSES[name]
    for aggregation in AGGREGATIONS:
        options = dict(loss=loss, ratio=loss.ratios[-1], off_policy="clamp", aggregation=aggregation)
        options["denominator"] = loss_denominator(mask, aggregation, max_tokens=7)
        whole, *parts = (
            policy_loss(new[r], mu[r], advantages[r], mask[r], old_logprobs=old[r], **options).loss
            for r in (slice(None), slice(0, 2), slice(2, 6))
        )
        assert torch.allclose(sum(parts), whole, **close)


def test_gspo_by_name_is_the_token_form_of_verl():
    """verl lets the gradient pass a token at a time, through the mean ratio times pi / sg(pi). It is the same gradient."""
    config = R2MConfig(objective={"ratio": "gspo"})
    assert (config.objective.ratio, config.aggregation) == ("sequence_mean", "sequence")
    new, mu, old, advantages, mask = make_batch()
    terms = []
    for row, tokens in responses_of(mask):
        mean = (new[row][tokens] - old[row][tokens]).mean().exp().item()
        a = advantages[row]
        ratios = [mean * (new[row, s] - new[row, s].detach()).exp() for s in tokens]
        terms.append([torch.maximum(-rho * a, -torch.clamp(rho, 0.8, 1.2) * a) for rho in ratios])
    expected = averaged(terms, "sequence")
    got = policy_loss(new, mu, advantages, mask, old_logprobs=old, off_policy="ignore", ratio=config.objective.ratio)
    assert torch.allclose(got.loss, expected, **close)
    assert torch.allclose(*(torch.autograd.grad(loss, new)[0] for loss in (got.loss, expected)), **close)


def test_luspo_is_gspos_ratio_with_summed_tokens():
    """TRL's luspo: the response's clipped term times its length."""
    new, mu, old, advantages, mask = make_batch()
    terms = []
    for row, tokens in responses_of(mask):
        rho, a = (new[row][tokens] - old[row][tokens]).mean().exp(), advantages[row]
        terms.append(-torch.minimum(rho * a, torch.clamp(rho, 0.8, 1.2) * a) * len(tokens))
    got = policy_loss(
        new, mu, advantages, mask, old_logprobs=old, off_policy="ignore", ratio="sequence_mean",
        aggregation="sequence_sum",
    )  # fmt: skip
    assert torch.allclose(got.loss, sum(terms) / len(terms), **close)


# What corrects for old data


def slow_weight(level, old, mu, s, tokens):
    """pi_old / mu of token s: its own, the product over its response, or their geometric mean."""
    logs = [(old[u] - mu[u]).item() for u in ([s] if level == "token" else tokens)]
    return math.exp(sum(logs) / (len(logs) if level == "sequence_mean" else 1))


def tis(w, m):  # OpenRLHF's tis: clamped from both sides
    return min(max(w, 0.7), 1.3)


def icepop(w, m):  # OpenRLHF's icepop, TRL's token_mask: nothing outside of the bounds
    return w if 0.7 <= w <= 1.3 else 0.0


def seq_mask(w, m):  # OpenRLHF's seq-mask-tis: the mask looks at the response, and the weight is the token's
    return w if 0.8 <= m <= 1.1 else 0.0


def truncated_and_masked(w, m):  # verl's rollout_is token with rollout_rs seq_mean_k1
    return min(w, 1.3) if 0.8 <= m <= 1.1 else 0.0


def mask_alone(w, m):  # verl's rollout_rs without rollout_is
    return 1.0 if 0.8 <= m <= 1.1 else 0.0


def nothing(w, m):  # verl's, OpenRLHF's and TRL's default: pi / pi_old and no weight
    return 1.0


BOUNDS = WeightBounds(level="sequence_mean", low=0.8, high=1.1)
WEIGHT_CASES = [
    (tis, dict(off_policy="clamp", off_policy_low=0.7, off_policy_cap=1.3), "token"),
    (icepop, dict(off_policy="mask", off_policy_low=0.7, off_policy_cap=1.3), "token"),
    (icepop, dict(off_policy="mask", off_policy_low=0.7, off_policy_cap=1.3, off_policy_level="sequence"), "sequence"),
    (seq_mask, dict(off_policy="full", off_policy_level="token", off_policy_mask=BOUNDS), "token"),
    (
        truncated_and_masked,
        dict(off_policy="clamp", off_policy_cap=1.3, off_policy_level="token", off_policy_mask=BOUNDS),
        "token",
    ),
    (mask_alone, dict(off_policy="ignore", off_policy_mask=BOUNDS), "token"),
    (nothing, dict(off_policy="ignore"), "token"),
]


@pytest.mark.parametrize(("slow", "options", "level"), WEIGHT_CASES)
@pytest.mark.parametrize("ratio", ["token", "sequence_mean"])
def test_weights_and_masks_at_levels_of_their_own_are_their_literal_loop(slow, options, level, ratio):
    for seed in range(3):
        new, mu, old, advantages, mask = make_batch(seed)
        if ratio != "token" and options.get("off_policy_level") is None and options["off_policy"] != "ignore":
            options = options | {"off_policy_level": "token"}
        got = policy_loss(new, mu, advantages, mask, old_logprobs=old, ratio=ratio, aggregation="sequence", **options)
        terms, kept = [], []
        for row, tokens in responses_of(mask):
            terms.append([])
            for s in tokens:
                span = [s] if ratio == "token" else tokens
                rho = (new[row][span] - old[row][span]).mean().exp()
                used = slow(
                    slow_weight(level, old[row], mu[row], s, tokens),
                    slow_weight("sequence_mean", old[row], mu[row], s, tokens),
                )
                a = advantages[row]
                terms[-1].append(-used * torch.minimum(rho * a, torch.clamp(rho, 0.8, 1.2) * a))
                kept.append(used > 0)
        expected = averaged(terms, "sequence")
        assert torch.allclose(got.loss, expected, **close)
        assert torch.allclose(*(torch.autograd.grad(loss, new)[0] for loss in (got.loss, expected)), **close)
        if "token" in (ratio, options.get("off_policy_level")):
            assert (~got.left_out[got.units]).tolist() == kept
            assert got.ratio.shape == got.weight.shape == got.clipped.shape == mask.shape


def test_bounds_that_leave_out_data_of_the_policys_own_are_refused():
    new, mu, old, advantages, mask = make_batch()
    for options, key in (
        (dict(off_policy_low=1.5), "off_policy_low = 1.5"),
        (dict(off_policy_mask=WeightBounds(level="token", low=0.5, high=0.9)), r"off_policy_mask\.high = 0\.9"),
    ):
        with pytest.raises(ConfigError, match=f"{key} would cut into on-policy data"):
            policy_loss(new, mu, advantages, mask, old_logprobs=old, off_policy="clamp", **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"off_policy_low": 0.5, "off_policy": "full"}, "off_policy_low is 0.5 and objective.off_policy is 'full'"),
        ({"off_policy_level": "token", "off_policy": "ignore"}, "off_policy_level is token"),
        ({"off_policy_mask": {}, "off_policy": "none"}, "off_policy_mask is .* and objective.off_policy is 'none'"),
        ({"kl_estimator": "k2", "kl_coef": 0}, "kl_estimator is 'k2' and objective.kl_coef is 0"),
        ({"kl_cap": 10, "kl_coef": 0}, "kl_cap is 10.0 and objective.kl_coef is 0"),
        ({"kl_target": 6, "kl_coef": 0}, "kl_target is 6.0 and objective.kl_coef is 0"),
        ({"kl_gain": 0.5}, "kl_gain is 0.5 and objective.kl_target is None"),
        ({"kl_estimator": "k1"}, "kl_estimator: input should be 'k2' or 'k3'"),
    ],
)
def test_a_key_that_nothing_would_read_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        R2MConfig(objective=changes)


# The KL


def test_the_capped_k3_is_verls_and_the_capped_k2_openrlhfs():
    """Both clamp the estimate of a token to +-10 nats."""
    new = torch.tensor([[-1.0, -9.0, -30.0]], dtype=F64, requires_grad=True)
    ref = torch.tensor([[-2.0, -1.0, -1.0]], dtype=F64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    for estimator in ("k2", "k3"):
        terms = []
        for x, y in zip(new[0], ref[0], strict=True):
            d = y - x
            terms.append(torch.clamp(d * d / 2 if estimator == "k2" else d.exp() - d - 1, -10, 10))
        got = kl_loss(new, ref, mask, estimator=estimator, cap=10.0)
        assert torch.allclose(got, sum(terms) / 3, **close)
        (gradient,) = torch.autograd.grad(got, new)
        assert torch.allclose(gradient, torch.autograd.grad(sum(terms) / 3, new)[0], **close)
        assert gradient[0, 0] != 0 and gradient[0, 2] == 0


def test_the_adapted_coefficient_is_the_peers_controllers():
    """verl's and OpenRLHF's: the error is clipped to +-0.2, and counts for trajectories over a horizon of 10000."""
    coefficient = expected = 0.05
    for kl in (0.0, 5.9, 6.1, 7.0, 100.0, -3.0):
        error = max(-0.2, min(0.2, (kl - 6.0) / 6.0))
        expected *= 1 + error * 256 / 10_000
        coefficient = next_kl_coef(coefficient, kl, 6.0, 256 / 10_000)
        assert coefficient == pytest.approx(expected, rel=1e-12)
    assert next_kl_coef(1.0, 60.0, 6.0, 0.1) == pytest.approx(1.02)


# The entropy bonus


@pytest.mark.parametrize("aggregation", [None, "sequence", "sequence_sum_norm"])
def test_the_entropy_bonus_is_averaged_as_the_loss_and_taken_from_it(aggregation):
    """OpenRLHF's and verl's: loss - coefficient times the entropy, both aggregated in one way."""
    new, mu, old, advantages, mask = make_batch()
    entropies = torch.rand(mask.shape, dtype=F64).masked_fill(~mask, 0).requires_grad_()
    plain = R2MConfig(
        objective={"ratio": "token", "aggregation": aggregation, "kl_coef": 0}, rollouts={"max_new_tokens": 7}
    )
    bonus = plain.objective(entropy_coef=0.3)
    losses = [
        microbatch_loss(
            new, entropies, mu, old, old, advantages, mask, *denominators(mask, config), get_advantage("rloo"), config,
            "step 0",
        )[0]
        for config in (plain, bonus)
    ]  # fmt: skip
    terms = [[entropies[row, s] for s in tokens] for row, tokens in responses_of(mask)]
    expected = 0.3 * averaged(terms, aggregation or "token")
    assert torch.allclose(losses[0] - losses[1], expected, **close)
    assert torch.allclose(
        torch.autograd.grad(losses[1], entropies)[0], -torch.autograd.grad(expected, entropies)[0], **close
    )


# The reference that moves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reference_moves_by_its_share_and_small_shares_add_up_in_bfloat16(dtype):
    """TRL's SyncRefModelCallback: (1 - alpha) reference + alpha policy. By hand: 1 towards 2, three times by 0.001."""
    reference, policy = (torch.nn.Linear(2, 1).to(dtype) for _ in range(2))
    for model, value in ((reference, 1.0), (policy, 2.0)):
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, value)
    moving = MovingReference(reference, 0.001)
    for _ in range(3):
        moving.move(policy.named_parameters())
    share = 1 - 0.999**3
    assert [tensor.flatten()[0].item() for tensor in moving.state()] == [pytest.approx(1 + share, rel=1e-6)] * 2
    for _ in range(7):
        moving.move(policy.named_parameters())
    assert reference.weight[0, 0].item() == pytest.approx(1 + 1 - 0.999**10, abs=2**-8)
    assert reference.weight[0, 0].item() > 1
    hard = MovingReference(reference, 1.0)
    hard.move(policy.named_parameters())
    assert all(torch.equal(*pair) for pair in zip(reference.parameters(), policy.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"weight \[1, 3\] of the policy is no parameter of the reference"):
        hard.move(torch.nn.Linear(3, 1).named_parameters())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"reference_mix": 0.5}}, "reference_mix is 0.5 and model.reference_every is None"),
        ({"model": {"reference_every": 2, "lora": {}}}, "reference_every is 2 and model.lora is set"),
        ({"model": {"reference_every": 2, "reference": "gpt2"}}, "reference_every is 2 and model.reference is 'gpt2'"),
        (
            {"model": {"reference_every": 2}, "learner": {"backend": "deepspeed", "zero_stage": 3}},
            "reference_every is 2 and learner.zero_stage is 3",
        ),
    ],
)
def test_a_reference_that_cannot_move_is_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        R2MConfig(**sections)


# A loss of the user's own, and what is checked before a run


def checked(loss, **objective):
    config = R2MConfig(objective={"loss": loss, **objective})
    check_loss(config)
    return config


def half(inputs, *, factor=0.5):
    return -factor * inputs.ratio * inputs.advantages


def of_tokens_alone(inputs):
    return -inputs.ratio * inputs.advantages, inputs.ratio > 2


def says_no_tuple(inputs):
    return inputs.ratio


says_no_tuple.ratios = "token"
of_tokens_alone.ratios = ("token",)
of_tokens_alone.reads = ()


def test_a_users_own_loss_is_checked_and_used_as_a_built_in_one():
    new, mu, _, advantages, mask = make_batch()
    loss = get_loss(f"{__name__}:half")
    got = policy_loss(new, mu, advantages, mask, ratio="token", loss=loss, loss_options={"factor": 3.0}).loss
    terms = [
        [-3 * (new[row, s] - mu[row, s]).exp() * advantages[row] for s in tokens] for row, tokens in responses_of(mask)
    ]
    assert torch.allclose(got, averaged(terms, "token"), **close)
    checked(f"{__name__}:half", loss_options={"factor": 2})
    with pytest.raises(ConfigError, match=r"loss_options\.fctor is unknown to .*did you mean 'factor'"):
        checked(f"{__name__}:half", loss_options={"fctor": 2})
    with pytest.raises(ConfigError, match=r"of_tokens_alone.* and objective.ratio is 'sequence'.*needs .* 'token'"):
        checked(f"{__name__}:of_tokens_alone")
    with pytest.raises(ConfigError, match=r"clip_high is 0.3 and objective.loss is '.*of_tokens_alone'"):
        checked(f"{__name__}:of_tokens_alone", ratio="token", clip_high=0.3)


@pytest.mark.parametrize(
    ("loss", "objective", "message"),
    [
        ("clib", {}, "'clib' is unknown; did you mean 'clip'"),
        ("r2m_async.errors:ConfigError", {}, "is a class"),
        ("no_such_module:loss", {}, "objective.loss = 'no_such_module:loss': cannot import"),
        ("clip", {"loss_options": {"c": 3}}, r"loss_options\.c is unknown to clip.*accepts: none"),
        ("dual_clip", {"loss_options": {"c": 0.5}}, r"loss_options\.c = 0.5"),
        ("dual_clip", {"loss_options": {"c": "three"}}, r"loss_options\.c is 'three', and dual_clip takes float"),
        ("cispo", {"ratio": "token", "loss_options": {"lower": 1.5}}, r"loss_options\.lower = 1.5"),
        ("sapo", {"ratio": "token", "clip_high": 0.3}, "clip_high is 0.3 and objective.loss is 'sapo'"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused_before_the_run(loss, objective, message):
    with pytest.raises(ConfigError, match=message):
        checked(loss, **objective)


def test_the_example_in_the_documents_works_and_is_checked(tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_losses.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    config = checked("my_losses:asymmetric", ratio="token", loss_options={"limit": 1.5}, clip_high=0.3)
    new, mu, _, advantages, mask = make_batch()
    got = policy_loss(
        new, mu, advantages, mask, ratio="token", loss=get_loss(config.objective.loss), loss_options={"limit": 1.5}
    ).loss
    terms = [
        [-torch.clamp((new[row, s] - mu[row, s]).exp(), max=1.5) * advantages[row] for s in tokens]
        for row, tokens in responses_of(mask)
    ]
    assert torch.allclose(got, averaged(terms, "token"), **close)
    with pytest.raises(ConfigError, match="clip_low is 0.3"):
        checked("my_losses:asymmetric", ratio="token", clip_low=0.3)


@pytest.mark.parametrize("returned", [None, torch.zeros(3), torch.zeros(6, 1).long(), (torch.zeros(6, 1), None, 1)])
def test_a_loss_that_returns_something_else_is_told_by_its_name(returned):
    new, mu, _, advantages, mask = make_batch()
    with pytest.raises(ConfigError, match=r"objective.loss mine must return losses in the shape of the ratio \[6, 1\]"):
        policy_loss(new, mu, advantages, mask, loss=Loss(name="mine", function=lambda inputs: returned))
    with pytest.raises(ConfigError, match=r"mine returned a second result that is not bool in the shape \[6, 1\]"):
        policy_loss(
            new, mu, advantages, mask, loss=Loss(name="mine", function=lambda inputs: (inputs.ratio, inputs.mask))
        )


def test_the_kl_of_the_reward_and_of_the_loss_do_not_mix():
    for changes, message in (
        ({"kl_estimator": "k2"}, "kl_estimator is 'k2' and advantage.name is 'rloo_kl'"),
        ({"kl_cap": 5}, "kl_cap is 5.0 and advantage.name is 'rloo_kl'"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_estimator(get_advantage("rloo_kl"), R2MConfig(objective=changes))
    config = R2MConfig(objective={"kl_target": 6}, advantage={"options": {"beta": 0.1}})
    with pytest.raises(ConfigError, match=r"kl_target is 6.0 and advantage.options.beta is 0.1"):
        check_estimator(get_advantage("rloo_kl"), config)


def test_the_config_and_the_maths_agree_on_the_default_aggregation():
    for loss in LOSSES.values():
        for ratio in loss.ratios:
            config = R2MConfig(objective={"ratio": ratio, "loss": loss.name})
            assert config.aggregation == default_aggregation(ratio, loss.name)
