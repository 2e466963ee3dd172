"""The policy objective against Eq. 2 and method.md section 5 written as loops, micro-batched, and at its edges."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.objectives import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    OFF_POLICY,
    RATIOS,
    kl_k1,
    kl_k3,
    kl_loss,
    loss_denominator,
    policy_loss,
    value_loss,
)

F64 = torch.float64
SUMS = ("token_sum", "sequence_sum")
EVERY_WAY = [
    *itertools.product(RATIOS, OFF_POLICY, ("sequence", "token")),
    *itertools.product(RATIOS, ["clamp"], SUMS),
]


def make_batch(seed=0, b=6, t=5, spread=0.25):
    """logprobs, mu, old, advantages, mask: ragged, with a hole and a response without tokens; NaN wherever masked."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=g)
    mask[0], mask[1] = True, False
    mask[0, 2] = False
    mu = -torch.rand(b, t, generator=g, dtype=F64) * 3
    old = mu + torch.randn(b, t, generator=g, dtype=F64) * spread
    logprobs = old + torch.randn(b, t, generator=g, dtype=F64) * spread
    advantages = torch.randn(b, generator=g, dtype=F64)
    advantages[1] = math.nan
    mu, old, logprobs = (x.masked_fill(~mask, math.nan) for x in (mu, old, logprobs))
    return logprobs.requires_grad_(), mu, old, advantages, mask


def slow_policy_loss(logprobs, mu, advantages, mask, *, old, ratio, low, high, off_policy, cap, aggregation):
    def form(log_differences):
        if ratio == "sequence_mean":
            return (sum(log_differences) / len(log_differences)).exp()
        return sum(log_differences).exp()

    total, num_tokens, num_sequences = 0.0, 0, 0
    for i in range(len(mask)):
        tokens = [s for s in range(mask.shape[1]) if mask[i, s]]
        if not tokens:
            continue
        num_tokens, num_sequences = num_tokens + len(tokens), num_sequences + 1
        for s in tokens:
            span = [s] if ratio == "token" else tokens
            anchor = mu if off_policy == "none" else old
            rho = form([logprobs[i, u] - anchor[i, u] for u in span])
            w = 1.0 if off_policy in ("none", "ignore") else form([old[i, u] - mu[i, u] for u in span]).item()
            if off_policy == "clamp":
                w = min(w, cap)
            if off_policy == "mask" and not 1 / cap <= w <= cap:
                w = 0.0
            a = advantages[i, s] if advantages.ndim == 2 else advantages[i]
            kept = torch.minimum(rho * a, torch.clamp(rho, 1 - low, 1 + high) * a)
            total = total - w * kept * (1 / len(tokens) if aggregation == "sequence" else 1)
    return total / counts_of(num_tokens, num_sequences)[aggregation]


def counts_of(num_tokens, num_sequences):
    return {"token": num_tokens, "token_sum": 1, "sequence": num_sequences, "sequence_sum": num_sequences}


@pytest.mark.parametrize(("ratio", "off_policy", "aggregation"), EVERY_WAY)
def test_loss_and_gradient_agree_with_a_literal_loop(ratio, off_policy, aggregation):
    for seed in range(4):
        logprobs, mu, old, advantages, mask = make_batch(seed)
        got = policy_loss(
            logprobs, mu, advantages, mask, old_logprobs=old, ratio=ratio, clip_low=0.1, clip_high=0.3,
            off_policy=off_policy, off_policy_cap=1.2, aggregation=aggregation,
        ).loss  # fmt: skip
        expected = slow_policy_loss(
            logprobs, mu, advantages, mask, old=old, ratio=ratio, low=0.1, high=0.3,
            off_policy=off_policy, cap=1.2, aggregation=aggregation,
        )  # fmt: skip
        assert torch.allclose(got, expected, rtol=1e-10)
        assert torch.allclose(
            *(torch.autograd.grad(loss, logprobs)[0] for loss in (got, expected)), rtol=1e-9, atol=1e-13
        )


@pytest.mark.parametrize("aggregation", AGGREGATIONS[:-1])
def test_advantages_per_token_agree_with_a_literal_loop(aggregation):
    logprobs, mu, old, _, mask = make_batch()
    advantages = torch.randn(mask.shape, generator=torch.Generator().manual_seed(9), dtype=F64).masked_fill(
        ~mask, math.nan
    )
    options = dict(ratio="token", off_policy="full", aggregation=aggregation)
    got = policy_loss(logprobs, mu, advantages, mask, old_logprobs=old, **options).loss
    expected = slow_policy_loss(logprobs, mu, advantages, mask, old=old, low=0.2, high=0.2, cap=2, **options)
    assert torch.allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("ratio", RATIOS)
def test_gradients_pass_a_finite_difference_check(ratio):
    _, mu, old, advantages, mask = make_batch()
    mu, old, advantages = mu.nan_to_num(), old.nan_to_num(), advantages.nan_to_num()
    wide = dict(ratio=ratio, clip_low=0.999, clip_high=50.0, off_policy="full", old_logprobs=old)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, mu, advantages, mask, **wide).loss, (old + 0.1).requires_grad_()
    )


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(EVERY_WAY), st.integers(0, 1000), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_micro_batch_losses_and_gradients_add_up_to_the_full_batchs(way, seed, cuts):
    ratio, off_policy, aggregation = way
    logprobs, mu, old, advantages, mask = make_batch(seed)
    options = dict(ratio=ratio, off_policy=off_policy, off_policy_cap=1.2, aggregation=aggregation)
    full = policy_loss(logprobs, mu, advantages, mask, old_logprobs=old, **options).loss
    full_kl = kl_loss(logprobs, mu, mask, aggregation=aggregation)
    denominator = loss_denominator(mask, aggregation)
    bounds = [0, *sorted(set(cuts)), 6]
    losses, kls = [], []
    for part in (slice(a, b) for a, b in itertools.pairwise(bounds)):
        rows = (logprobs[part], mu[part], advantages[part], mask[part])
        losses.append(policy_loss(*rows, old_logprobs=old[part], denominator=denominator, **options).loss)
        kls.append(kl_loss(logprobs[part], mu[part], mask[part], aggregation=aggregation, denominator=denominator))
    for whole, parts in ((full, losses), (full_kl, kls)):
        assert torch.allclose(sum(parts), whole, rtol=1e-10)
        assert torch.allclose(
            *(torch.autograd.grad(x, logprobs)[0] for x in (sum(parts), whole)), rtol=1e-10, atol=1e-14
        )


@pytest.mark.parametrize(("ratio", "aggregation"), list(itertools.product(RATIOS, AGGREGATIONS[:-1])))
def test_all_corrections_coincide_when_the_sampling_policy_is_the_proximal_one(ratio, aggregation):
    logprobs, mu, _, advantages, mask = make_batch()
    options = dict(old_logprobs=mu, ratio=ratio, aggregation=aggregation)
    results = [policy_loss(logprobs, mu, advantages, mask, off_policy=name, **options).loss for name in OFF_POLICY]
    gradients = [torch.autograd.grad(loss, logprobs)[0] for loss in results]
    for loss, gradient in zip(results[1:], gradients[1:], strict=True):
        assert torch.equal(loss, results[0])
        assert torch.equal(gradient, gradients[0])


def one_token(ratio_to_old, w, advantage, **options):
    """Loss and gradient of a single token with rho = `ratio_to_old` and pi_old / mu = `w`."""
    log = lambda x: torch.tensor([[math.log(x)]], dtype=F64)  # noqa: E731
    logprobs = log(ratio_to_old).requires_grad_()
    batch = (logprobs, -log(w), torch.tensor([advantage], dtype=F64), torch.ones(1, 1, dtype=torch.bool))
    result = policy_loss(*batch, old_logprobs=log(1.0), **options)
    return result, torch.autograd.grad(result.loss, logprobs)[0].item()


def test_clip_by_hand():
    for ratio, advantage, loss, gradient in [
        (1.1, 2.0, -2.2, -2.2),  # inside: -rho A, and d/dlogp of it
        (1.5, 2.0, -2.6, 0.0),  # above 1 + 0.3 with A > 0: clipped
        (0.5, 2.0, -1.0, -1.0),  # below with A > 0: the pessimistic bound keeps the gradient
        (0.5, -2.0, 1.6, 0.0),  # below 1 - 0.2 with A < 0: clipped
        (1.5, -2.0, 3.0, 3.0),
    ]:
        result, got = one_token(ratio, 1.0, advantage, clip_low=0.2, clip_high=0.3, ratio="token", off_policy="full")
        assert (result.loss.item(), got) == (pytest.approx(loss), pytest.approx(gradient))
        assert result.clipped.item() == (gradient == 0.0)


def test_corrections_by_hand():
    for off_policy, w, loss in [("full", 5.0, -5.5), ("clamp", 5.0, -2.2), ("mask", 5.0, 0.0), ("mask", 0.4, 0.0),
                                ("mask", 1.9, -2.09), ("clamp", 0.4, -0.44), ("none", 5.0, -1.2)]:  # fmt: skip
        result, _ = one_token(1.1, w, 1.0, off_policy=off_policy, ratio="token")
        assert result.loss.item() == pytest.approx(loss), (off_policy, w)
        assert result.left_out.item() == (loss == 0.0)
        assert result.weight.item() == pytest.approx(1.0 if off_policy == "none" else w)


def test_sequence_ratios_by_hand_on_two_tokens():
    logprobs = torch.tensor([[math.log(1.2), math.log(1.5)]], dtype=F64)
    batch = (
        logprobs,
        torch.zeros(1, 2, dtype=F64),
        torch.tensor([-1.0], dtype=F64),
        torch.ones(1, 2, dtype=torch.bool),
    )
    assert policy_loss(*batch, ratio="sequence").loss.item() == pytest.approx(1.8)
    assert policy_loss(*batch, ratio="sequence_mean").loss.item() == pytest.approx(math.sqrt(1.8))
    assert policy_loss(*batch, ratio="token").loss.item() == pytest.approx(1.35)


def test_a_token_aggregate_weighs_tokens_alike_and_a_sequence_aggregate_responses():
    zeros = torch.zeros(2, 3, dtype=F64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages = torch.tensor([1.0, 5.0], dtype=F64)
    for ratio in RATIOS:
        assert policy_loss(
            zeros, zeros, advantages, mask, ratio=ratio, aggregation="token"
        ).loss.item() == pytest.approx(-2.0)
        assert policy_loss(
            zeros, zeros, advantages, mask, ratio=ratio, aggregation="sequence"
        ).loss.item() == pytest.approx(-3.0)
    assert policy_loss(zeros, zeros, advantages, mask, ratio="sequence").loss.item() == pytest.approx(-3.0)
    assert policy_loss(zeros, zeros, advantages, mask, ratio="token").loss.item() == pytest.approx(-2.0)


@pytest.mark.parametrize(("ratio", "off_policy", "aggregation"), EVERY_WAY)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_extreme_log_ratios_never_give_a_gradient_that_is_not_finite(ratio, off_policy, aggregation, dtype):
    jumps = torch.tensor([0.0, 1e3, -1e3], dtype=dtype)
    rows = torch.cartesian_prod(jumps, jumps)
    mu = torch.full((9, 2), -1.0, dtype=dtype)
    old, logprobs = mu + rows[:, :1], (mu + rows).requires_grad_()
    mask = torch.ones(9, 2, dtype=torch.bool)
    for sign in (1, -1):
        advantages = torch.full((9,), float(sign), dtype=dtype)
        result = policy_loss(
            logprobs,
            mu,
            advantages,
            mask,
            old_logprobs=old,
            ratio=ratio,
            off_policy=off_policy,
            aggregation=aggregation,
        )
        gradient = torch.autograd.grad(result.loss, logprobs)[0]
        assert result.loss.isfinite() and gradient.isfinite().all()
        assert result.ratio.isfinite().all() and result.weight.isfinite().all()


def test_a_log_ratio_beyond_the_bound_has_no_gradient_and_one_inside_it_has():
    mask, zeros = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=F64)
    for log_ratio, lives in ((19.9, True), (20.1, False), (1e3, False)):
        logprobs = torch.tensor([[log_ratio]], dtype=F64, requires_grad=True)
        loss = policy_loss(logprobs, zeros, torch.tensor([-1.0], dtype=F64), mask, ratio="token").loss
        assert loss.item() == pytest.approx(math.exp(min(log_ratio, 20.0)))
        assert bool(torch.autograd.grad(loss, logprobs)[0].item()) == lives
        assert bool(torch.autograd.grad(kl_k3(logprobs, zeros), logprobs)[0].item()) == lives


@pytest.mark.parametrize(("ratio", "off_policy", "aggregation"), EVERY_WAY)
def test_a_batch_without_response_tokens_contributes_exactly_zero(ratio, off_policy, aggregation):
    logprobs, mu, old, advantages, mask = make_batch()
    nothing = torch.zeros_like(mask)
    result = policy_loss(
        logprobs, mu, advantages, nothing, old_logprobs=old, ratio=ratio, off_policy=off_policy, aggregation=aggregation
    )
    assert result.loss.item() == 0 and not torch.autograd.grad(result.loss, logprobs)[0].any()
    assert not result.units.any()
    kl = kl_loss(logprobs, mu, nothing, aggregation=aggregation)
    assert kl.item() == 0 and not torch.autograd.grad(kl, logprobs)[0].any()


@pytest.mark.parametrize("ratio", RATIOS)
def test_what_is_told_of_each_unit_agrees_with_literal_loops_and_carries_no_gradient(ratio):
    logprobs, mu, old, advantages, mask = make_batch()
    got = policy_loss(
        logprobs, mu, advantages, mask, old_logprobs=old, ratio=ratio, off_policy="mask", off_policy_cap=1.2
    )
    rhos, weights, clipped = [], [], []
    for i in range(6):
        tokens = [s for s in range(5) if mask[i, s]]
        spans = [[s] for s in tokens] if ratio == "token" else [tokens] * bool(tokens)
        for span in spans:
            over = len(span) if ratio == "sequence_mean" else 1
            rhos.append(math.exp(sum((logprobs[i, s] - old[i, s]).item() for s in span) / over))
            weights.append(math.exp(sum((old[i, s] - mu[i, s]).item() for s in span) / over))
            clipped.append(rhos[-1] > 1.2 if advantages[i] > 0 else rhos[-1] < 0.8)
    expected = {
        "ratio": rhos,
        "weight": weights,
        "clipped": clipped,
        "left_out": [not 1 / 1.2 <= w <= 1.2 for w in weights],
    }
    assert any(expected["left_out"])
    for name, values in expected.items():
        assert getattr(got, name)[got.units].tolist() == pytest.approx(values), name
        assert not getattr(got, name).requires_grad, name


def test_only_the_learners_logprobs_get_a_gradient():
    logprobs, mu, old, advantages, mask = make_batch()
    others = [mu.requires_grad_(), old.requires_grad_(), advantages.requires_grad_()]
    loss = policy_loss(logprobs, mu, advantages, mask, old_logprobs=old, off_policy="full").loss + kl_loss(
        logprobs, mu, mask
    )
    assert all(g is None for g in torch.autograd.grad(loss, others, allow_unused=True))


def test_kl_estimators_by_hand():
    half, quarter = torch.tensor(math.log(0.5), dtype=F64), torch.tensor(math.log(0.25), dtype=F64)
    assert kl_k1(half, quarter).item() == pytest.approx(math.log(2))
    assert kl_k3(half, quarter).item() == pytest.approx(0.5 - math.log(0.5) - 1)
    assert kl_k3(quarter, half).item() == pytest.approx(2 - math.log(2) - 1)
    assert kl_k3(half, half).item() == 0


def test_k3_and_k1_are_unbiased_for_the_kl_divergence():
    p, q = (torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=F64)).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum()
    assert torch.allclose((p.exp() * kl_k3(p, q)).sum(), kl)
    assert torch.allclose((p.exp() * kl_k1(p, q)).sum(), kl)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS[:-1])
def test_kl_loss_agrees_with_a_literal_loop(estimator, aggregation):
    logprobs, ref, _, _, mask = make_batch()
    rows = []
    for i in range(6):
        d = [(ref[i, s] - logprobs[i, s]).item() for s in range(5) if mask[i, s]]
        rows.append([{"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - x - 1}[estimator] for x in d])
    rows = [row for row in rows if row]
    for cap in (None, 0.02):
        kept = [[x if cap is None else max(-cap, min(x, cap)) for x in row] for row in rows]
        summed = sum(sum(row) / (len(row) if aggregation == "sequence" else 1) for row in kept)
        got = kl_loss(logprobs, ref, mask, estimator=estimator, aggregation=aggregation, cap=cap)
        expected = summed / counts_of(sum(map(len, rows)), len(rows))[aggregation]
        assert got.item() == pytest.approx(expected, rel=1e-10)


def test_only_the_gradient_of_k2_is_the_divergences_on_average():
    """The expectation over tokens of p, by hand over a vocabulary of 7. k1's is 0: it would hold nothing."""
    logits, other = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    logits.requires_grad_()
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    (wanted,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    means = {}
    for name, estimator in KL_ESTIMATORS.items():
        (means[name],) = torch.autograd.grad((p.exp().detach() * estimator(p, q)).sum(), logits, retain_graph=True)
    assert torch.allclose(means["k2"], wanted) and torch.allclose(means["k1"], torch.zeros(7, dtype=F64))
    assert not torch.allclose(means["k3"], wanted)


@pytest.mark.parametrize("gap", [1e3, -1e3])
def test_kl_loss_of_an_extreme_gap_has_finite_gradient(gap):
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss = kl_loss(logprobs, logprobs.detach() + gap, torch.ones(1, 2, dtype=torch.bool))
    assert loss.isfinite() and torch.autograd.grad(loss, logprobs)[0].isfinite().all()


def test_what_does_not_fit_is_refused_with_a_remedy():
    logprobs, mu, _, advantages, mask = make_batch()
    per_token = torch.zeros(6, 5, dtype=F64)
    for ratio in ("sequence", "sequence_mean"):
        with pytest.raises(ConfigError, match="choose ratio: token"):
            policy_loss(logprobs, mu, per_token, mask, ratio=ratio)
    with pytest.raises(ConfigError, match=r"advantages must be \[B\] = \[6\]"):
        policy_loss(logprobs, mu, advantages[:1], mask)
    with pytest.raises(ConfigError, match="'clamp' needs old_logprobs"):
        policy_loss(logprobs, mu, advantages, mask, off_policy="clamp")
    with pytest.raises(ConfigError, match="off_policy_cap = 0.5"):
        policy_loss(logprobs, mu, advantages, mask, off_policy_cap=0.5)
    with pytest.raises(ConfigError, match="'tokens' is unknown; choose one of sequence, token, sequence_mean"):
        policy_loss(logprobs, mu, advantages, mask, ratio="tokens")


# The critic's


def test_the_clipped_value_loss_is_what_the_hand_computes():
    """clip 0.2, V_old 1: (V, R) = (1.1, 2) within; (1.5, 2) beyond it towards R; (0.5, 2) away from R, past it; (2.5, 2)."""
    values = torch.tensor([[1.1, 1.5], [0.5, 2.5]], dtype=F64, requires_grad=True)
    old, returns, mask = torch.ones(2, 2, dtype=F64), torch.full((2, 2), 2.0, dtype=F64), torch.ones(2, 2).bool()
    fit = value_loss(values, old, returns, mask, clip=0.2)
    errors = [0.9**2, 0.8**2, 1.5**2, 0.8**2]  # (1.2 - 2)^2 is larger than both (1.5 - 2)^2 and (2.5 - 2)^2
    assert fit.loss.item() == pytest.approx(0.5 * sum(errors) / 4)
    assert fit.clipped.tolist() == [[False, True], [False, True]]
    (gradient,) = torch.autograd.grad(fit.loss, values)
    assert gradient.flatten().tolist() == pytest.approx([-0.9 / 4, 0, -1.5 / 4, 0])
    free = value_loss(values, old, returns, mask, clip=None)
    assert free.loss.item() == pytest.approx(0.5 * (0.9**2 + 0.5**2 + 1.5**2 + 0.5**2) / 4) and not free.clipped.any()


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_value_loss_agrees_with_a_literal_loop_and_its_microbatches_add_up(clip):
    values, old, returns, _, mask = make_batch(spread=0.2)
    expected, num_tokens = 0.0, int(mask.sum())
    for i, s in mask.nonzero().tolist():
        error = (values[i, s] - returns[i, s]) ** 2
        if clip is not None:
            moved = torch.clamp(values[i, s], old[i, s] - clip, old[i, s] + clip)
            error = torch.maximum(error, (moved - returns[i, s]) ** 2)
        expected = expected + error / (2 * num_tokens)
    whole = value_loss(values, old, returns, mask, clip=clip).loss
    parts = sum(
        value_loss(values[r], old[r], returns[r], mask[r], clip=clip, denominator=num_tokens).loss
        for r in (slice(0, 2), slice(2, 6))
    )
    gradients = [torch.autograd.grad(loss, values)[0] for loss in (whole, parts, expected)]
    for loss, gradient in zip((whole, parts), gradients, strict=False):
        assert torch.allclose(loss, expected) and torch.allclose(gradient, gradients[2])
    assert not gradients[0][~mask].any()


def test_a_value_within_the_clip_does_not_count_as_clipped_by_a_rounding():
    old, moves, returns = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    values, old = 0.1 * moves.tanh(), 0.01 * old.tanh()
    assert not value_loss(values, old, returns, torch.ones(20, 50).bool(), clip=0.2).clipped.any()


def test_a_value_loss_over_no_token_is_zero():
    values = torch.ones(2, 3, requires_grad=True)
    fit = value_loss(values, torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert fit.loss.item() == 0 and not torch.autograd.grad(fit.loss, values)[0].any()


def test_gspo_averages_over_responses_unless_told_otherwise():
    """Eq. 5 of arXiv 2507.18071, literally: a long response counts no more than a short one."""
    torch.manual_seed(0)
    mask = torch.tensor([[True] * 2 + [False] * 6, [True] * 8])
    old, new = -torch.rand(2, 8), -torch.rand(2, 8)
    advantages = torch.tensor([1.0, -0.5])
    lengths = mask.sum(1)
    ratios = [math.exp((new - old)[row, : int(lengths[row])].sum() / lengths[row]) for row in range(2)]
    terms = [
        min(ratio * float(advantage), min(max(ratio, 0.8), 1.2) * float(advantage))
        for ratio, advantage in zip(ratios, advantages, strict=True)
    ]
    loss = policy_loss(new, old, advantages, mask, ratio="sequence_mean").loss
    assert loss.item() == pytest.approx(-sum(terms) / 2, rel=1e-5)
    assert R2MConfig(objective={"ratio": "sequence_mean"}).aggregation == "sequence"
