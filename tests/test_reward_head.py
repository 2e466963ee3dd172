"""The R2M head's absorbed form, in both layouts, against Eq. 3-4 as printed."""

import math

import pytest
import torch
from torch import nn

from r2m_async.reward_head import R2MHead, mixing_weight, noise_like

B, S, D_M, D_P, D = 4, 6, 5, 7, 3


def make_head(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    phi = nn.Sequential(nn.Linear(D_M, 4), nn.Tanh(), nn.Linear(4, 1))
    return R2MHead(D_M, D_P, D, phi, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_inputs(dtype=torch.float64):
    """Random rte and states; row 0 padded on the right, row 1 on the left, row 2 with a hole."""
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, 4:], mask[1, :3], mask[2, 2] = False, False, False
    rte = torch.randn(B, D_M, generator=g, dtype=dtype) * 3
    return rte, torch.randn(B, S, D_P, generator=g, dtype=dtype) * 3, mask


def packed(states, mask):
    return states[mask], torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])


def naive(head, rte, states, mask, omega):
    rewards = []
    for H, h, m in zip(rte, states, mask, strict=True):
        q, k, v = H[None] @ head.query, h[m] @ head.key, h[m] @ head.value
        H_hat = torch.softmax(q @ k.T / math.sqrt(D), dim=-1) @ v @ head.output
        rewards.append(head.scoring_head((1 - omega) * H_hat + omega * H[None])[0, 0])
    return torch.stack(rewards)


def gradients(head, rewards, *inputs):
    weights = torch.linspace(-1, 2, len(rewards), dtype=rewards.dtype)
    return torch.autograd.grad((rewards * weights).sum(), [*head.parameters(), *inputs])


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("omega", [0.0, 0.6])
def test_rewards_and_all_gradients_equal_those_of_the_naive_cross_attention(layout, omega):
    head = make_head()
    rte, states, mask = (x.requires_grad_() if x.is_floating_point() else x for x in make_inputs())
    expected = naive(head, rte, states, mask, omega)
    if layout == "padded":
        got = head(rte, states, mask, omega)
    else:
        rows, offsets = packed(states, mask)
        got = head(rte, rows, None, omega, offsets=offsets)
    assert torch.allclose(got, expected, rtol=1e-12)
    for ours, theirs in zip(gradients(head, got, rte, states), gradients(head, expected, rte, states), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-13)


def test_gradients_pass_a_finite_difference_check():
    head = make_head()
    rte, states, mask = make_inputs()

    def forward(query, key, value, output, rte, states):
        weights = {"query": query, "key": key, "value": value, "output": output}
        return torch.func.functional_call(head, weights, (rte, states, mask, 0.6))

    inputs = [head.query, head.key, head.value, head.output, rte.requires_grad_(), states.requires_grad_()]
    assert torch.autograd.gradcheck(forward, [x.detach().requires_grad_() for x in inputs])


def test_one_state_is_attended_to_fully_whatever_the_query():
    head = make_head()
    rte, states, _ = make_inputs()
    got = head(rte, states[:, :1], torch.ones(B, 1), 0.0)
    assert torch.allclose(got, head.scoring_head(states[:, 0] @ head.value @ head.output).squeeze(-1))


def test_at_omega_one_the_reward_is_the_scoring_heads_and_attention_gets_no_gradient():
    head = make_head()
    rte, states, mask = make_inputs()
    rewards = head(rte, states, mask, 1.0)
    assert torch.equal(rewards, head.scoring_head(rte).squeeze(-1))
    assert not any(g.any() for g in gradients(head, rewards)[:4])


def test_padding_may_hold_nan_and_infinity_without_any_effect():
    head = make_head()
    rte, states, mask = make_inputs()
    dirty = states.clone()
    dirty[~mask] = math.nan
    dirty[0, 5] = math.inf
    clean, got = head(rte, states, mask, 0.5), head(rte, dirty, mask, 0.5)
    assert torch.equal(got, clean)
    for ours, theirs in zip(gradients(head, got), gradients(head, clean), strict=True):
        assert torch.equal(ours, theirs)


def test_a_fully_masked_response_gets_no_feedback_and_leaves_the_others_gradients_finite():
    head = make_head()
    rte, states, mask = make_inputs()
    mask[3] = False
    rewards = head(rte, states, mask, 0.25)
    assert torch.allclose(rewards[3], head.scoring_head(0.25 * rte[3:]).squeeze())
    without = head(rte[:3], states[:3], mask[:3], 0.25)
    assert torch.allclose(rewards[:3], without)
    assert all(g.isfinite().all() for g in gradients(head, rewards))
    assert not any(
        g.any() for g in torch.autograd.grad(head(rte, states, mask, 0.25)[3], [head.query, head.key, head.value])
    )


def test_scores_far_beyond_the_exponentials_range_stay_finite():
    head = make_head(dtype=torch.float32)
    rte, states, mask = (x.float() if x.is_floating_point() else x for x in make_inputs())
    for rewards in (
        head(rte * 1e4, states * 1e4, mask, 0.5),
        head(rte * 1e4, packed(states * 1e4, mask)[0], None, 0.5, offsets=packed(states, mask)[1]),
    ):
        assert rewards.isfinite().all()
        assert all(g.isfinite().all() for g in gradients(head, rewards))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_bfloat16_feedback_is_summed_in_the_weights_precision(layout):
    head = make_head(dtype=torch.float32)
    rte, states, mask = make_inputs(dtype=torch.float32)
    short = states.bfloat16()
    expected = naive(head, rte, short.float(), mask, 0.3)
    if layout == "padded":
        got = head(rte, short, mask, 0.3)
    else:
        rows, offsets = packed(short, mask)
        got = head(rte, rows, None, 0.3, offsets=offsets)
    assert got.dtype == torch.float32
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_bfloat16_scoring_head_trains_in_float32():
    head = R2MHead(D_M, D_P, D, nn.Linear(D_M, 1).bfloat16())
    assert {p.dtype for p in head.parameters()} == {torch.float32}


def test_the_four_matrices_are_xavier_uniform_and_a_function_of_the_generator():
    make = lambda seed: R2MHead(300, 200, 100, nn.Linear(300, 1), generator=torch.Generator().manual_seed(seed))  # noqa: E731
    head, twin, other = make(3), make(3), make(4)
    assert {name: tuple(p.shape) for name, p in head.named_parameters(recurse=False)} == {
        "query": (300, 100), "key": (200, 100), "value": (200, 100), "output": (100, 300),
    }  # fmt: skip
    for name, weight in head.named_parameters(recurse=False):
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert torch.equal(weight, getattr(twin, name)) and not torch.equal(weight, getattr(other, name))


def test_malformed_feedback_is_refused_with_the_shapes():
    head = make_head()
    rte, states, mask = make_inputs()
    rows, offsets = packed(states, mask)
    with pytest.raises(ValueError, match="either mask .* or offsets"):
        head(rte, states, None, 0.5)
    with pytest.raises(ValueError, match="either mask .* or offsets"):
        head(rte, rows, mask, 0.5, offsets=offsets)
    with pytest.raises(ValueError, match=r"got \[4, 6, 7\] and \[4, 5\]"):
        head(rte, states, mask[:, 1:], 0.5)
    with pytest.raises(ValueError, match="5 offsets from 0 to"):
        head(rte, rows[1:], None, 0.5, offsets=offsets)
    with pytest.raises(ValueError, match="response 1 has no hidden states"):
        head(rte, rows, None, 0.5, offsets=torch.tensor([0, 5, 5, 9, len(rows)]))
    with pytest.raises(ValueError, match=r"\[B, 1\]"):
        R2MHead(D_M, D_P, D, nn.Linear(D_M, 2), dtype=torch.float64)(rte, states, mask, 0.5)


def test_mixing_weight_falls_from_one_along_a_half_cosine_to_its_floor_and_stays():
    assert mixing_weight(0, 100, 0.6) == 1.0
    assert mixing_weight(25, 100, 0.0) == pytest.approx(0.5 + math.sqrt(2) / 4)
    assert mixing_weight(50, 100, 0.0) == pytest.approx(0.5)
    assert mixing_weight(100, 100, 0.0) == pytest.approx(0.0)
    weights = [mixing_weight(t, 100, 0.6) for t in range(1, 251)]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] < 1 and weights[-1] == 0.6
    for bad in ((-1, 10, 0.5), (1, 0, 0.5), (1, 10, 1.5)):
        with pytest.raises(ValueError, match="mixing_weight needs"):
            mixing_weight(*bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_has_the_states_scalar_moments_and_is_a_function_of_the_seed(dtype):
    states = (torch.randn(400, 100, generator=torch.Generator().manual_seed(0)) * 3 + torch.arange(100) / 10).to(dtype)
    noise = noise_like(states, 7)
    assert noise.dtype == dtype
    assert noise.float().mean().item() == pytest.approx(states.float().mean().item(), abs=0.1)
    assert noise.float().std().item() == pytest.approx(states.float().std().item(), rel=0.02)
    assert noise.float().mean(0).std() < 0.5, "per-dimension means would show the states' own structure"
    assert torch.equal(noise, noise_like(states, 7)) and not torch.equal(noise, noise_like(states, 8))
    assert noise_like(states[:0], 7).shape == (0, 100)


@pytest.mark.models
@pytest.mark.parametrize("reads_states", [True, False])
def test_a_groups_rewards_do_not_depend_on_where_in_memory_its_embeddings_lie(reads_states):
    """MKL rounds the product of a linear layer without a bias by where its rows begin: the score layer of a classifier."""
    from r2m_async.models.heads import head_rewards

    torch.manual_seed(0)
    head = R2MHead(50, 32, 16, nn.Linear(50, 1, bias=False), generator=torch.Generator().manual_seed(0))
    rte, states = torch.randn(8, 50), [torch.randn(6, 32) for _ in range(8)] if reads_states else None
    seen = []
    for shift in range(17):
        moved = torch.empty(rte.numel() + 32)[shift : shift + rte.numel()].view_as(rte).copy_(rte)
        seen.append(head_rewards(head, moved, states, 0.5))
    assert all(torch.equal(one, seen[0]) for one in seen)
