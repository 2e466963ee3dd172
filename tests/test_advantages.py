"""Advantage estimators against literal loops, by hand, and through the plug-in interface."""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r2m_async.advantages import (
    AdvantageInputs,
    Estimator,
    advantages_and_returns,
    check_options,
    gae,
    get_advantage,
    grpo,
    register_advantage,
    reinforce_pp,
    reinforce_pp_baseline,
    remax,
    rloo,
)
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.workload import check_estimator

DOCS = Path(__file__).parents[1] / "docs" / "advantages.md"


def make_inputs(n=3, k=4, t=5, seed=0, dtype=torch.float64):
    """Ragged lengths, a hole before one response's end, one response without tokens; NaN wherever masked."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (n, k), generator=g)
    mask = torch.arange(t) < lengths[..., None]
    mask[0, 0] = True
    mask[0, 0, -2] = False
    mask[-1, -1] = False
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)  # noqa: E731
    logprobs, ref_logprobs, values = (draw(n, k, t).masked_fill(~mask, math.nan) for _ in range(3))
    return AdvantageInputs(
        rewards=draw(n, k),
        response_mask=mask,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        greedy_rewards=draw(n),
        values=values,
    )


def of_rewards(rows, dtype=torch.float64, t=2):
    rewards = torch.tensor(rows, dtype=dtype)
    return AdvantageInputs(rewards=rewards, response_mask=torch.ones(*rewards.shape, t, dtype=torch.bool))


def slow_rloo(row):
    return [r - sum(row[:j] + row[j + 1 :]) / (len(row) - 1) for j, r in enumerate(row)]


def slow_grpo(row, unbiased, eps):
    mean = sum(row) / len(row)
    std = math.sqrt(sum((r - mean) ** 2 for r in row) / (len(row) - unbiased))
    return [(r - mean) / (std + eps) for r in row]


def slow_reinforce_pp(inputs, beta, eps, baseline):
    n, k, t = inputs.response_mask.shape
    returns = {}
    for i in range(n):
        mean = sum(inputs.rewards[i].tolist()) / k if baseline else 0.0
        for j in range(k):
            tokens = [s for s in range(t) if inputs.response_mask[i, j, s]]
            for s in tokens:
                later = [u for u in tokens if u >= s]
                kl = sum((inputs.logprobs[i, j, u] - inputs.ref_logprobs[i, j, u]).item() for u in later)
                returns[i, j, s] = inputs.rewards[i, j].item() - mean - beta * kl
    mean = sum(returns.values()) / len(returns)
    std = math.sqrt(sum((v - mean) ** 2 for v in returns.values()) / len(returns))
    out = torch.zeros(n, k, t, dtype=torch.float64)
    for at, value in returns.items():
        out[at] = (value - mean) / (std + eps)
    return out


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=1, max_size=4))
def test_rloo_and_grpo_agree_with_literal_loops(rows):
    inputs = of_rewards(rows)
    assert torch.allclose(rloo(inputs), torch.tensor([slow_rloo(row) for row in rows], dtype=torch.float64))
    for unbiased in (True, False):
        expected = torch.tensor([slow_grpo(row, unbiased, 1e-3) for row in rows], dtype=torch.float64)
        assert torch.allclose(grpo(inputs, unbiased=unbiased, eps=1e-3), expected, atol=1e-8)


def test_rloo_of_one_two_six_is_what_the_hand_computes():
    assert rloo(of_rewards([[1.0, 2.0, 6.0]])).tolist() == [[-3.0, -1.5, 4.5]]
    assert rloo(of_rewards([[1.0, 4.0]])).tolist() == [[-3.0, 3.0]]


def test_grpo_of_two_responses_is_plus_and_minus_one_over_root_two():
    half = 1 / math.sqrt(2)
    assert grpo(of_rewards([[1.0, 4.0]]), eps=0.0).tolist()[0] == pytest.approx([-half, half])
    assert grpo(of_rewards([[1.0, 4.0]]), eps=0.0, unbiased=False).tolist()[0] == pytest.approx([-1, 1])


def test_remax_subtracts_each_prompts_greedy_reward():
    inputs = make_inputs()
    got = remax(inputs)
    for i in range(3):
        for j in range(4):
            assert got[i, j] == inputs.rewards[i, j] - inputs.greedy_rewards[i]


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(("estimator", "baseline"), [(reinforce_pp, False), (reinforce_pp_baseline, True)])
@pytest.mark.parametrize("k", [2, 4])
def test_reinforce_pp_agrees_with_a_literal_loop_over_ragged_holed_and_empty_responses(estimator, baseline, beta, k):
    inputs = make_inputs(k=k)
    assert torch.allclose(estimator(inputs, beta=beta, eps=1e-3), slow_reinforce_pp(inputs, beta, 1e-3, baseline))


def test_reinforce_pp_by_hand_on_two_tokens_each():
    # Returns 2, 2 and 0, 0 without a KL: mean 1, population std 1.
    inputs = of_rewards([[2.0, 0.0]])
    assert reinforce_pp(inputs, beta=0.0, eps=0.0).tolist() == [[[1.0, 1.0], [-1.0, -1.0]]]


def slow_gae(inputs, gamma, lam, beta, eps):
    """Eq. 16 of arXiv 1506.02438, a double sum per token: (advantages, returns)."""
    n, k, t = inputs.response_mask.shape
    raw = {}
    for i in range(n):
        for j in range(k):
            tokens = [s for s in range(t) if inputs.response_mask[i, j, s]]
            rewards = [-beta * (inputs.logprobs[i, j, s] - inputs.ref_logprobs[i, j, s]).item() for s in tokens]
            if tokens:
                rewards[-1] += inputs.rewards[i, j].item()
            values = [inputs.values[i, j, s].item() for s in tokens] + [0.0]
            deltas = [rewards[p] + gamma * values[p + 1] - values[p] for p in range(len(tokens))]
            for p, s in enumerate(tokens):
                raw[i, j, s] = sum((gamma * lam) ** m * delta for m, delta in enumerate(deltas[p:]))
    mean = sum(raw.values()) / len(raw)
    std = math.sqrt(sum((v - mean) ** 2 for v in raw.values()) / len(raw))
    advantages, returns = torch.zeros(2, n, k, t, dtype=torch.float64)
    for at, value in raw.items():
        advantages[at] = (value - mean) / (std + eps)
        returns[at] = value + inputs.values[at]
    return advantages, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.8, 1.0)])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gae_agrees_with_a_literal_double_sum_over_ragged_holed_and_empty_responses(gamma, lam, beta):
    inputs = make_inputs()
    for ours, theirs in zip(
        gae(inputs, gamma=gamma, lam=lam, beta=beta, eps=1e-3), slow_gae(inputs, gamma, lam, beta, 1e-3), strict=True
    ):
        assert torch.allclose(ours, theirs)


def test_gae_by_hand_on_three_tokens():
    """gamma 0.5, lambda 0.5, beta 0.1: rewards -0.1, 0.2, 0 + 4 and so deltas 0.4, -0.3, 3."""
    inputs = AdvantageInputs(
        rewards=torch.tensor([[4.0]], dtype=torch.float64),
        response_mask=torch.ones(1, 1, 3, dtype=torch.bool),
        logprobs=torch.tensor([[[1.0, -2.0, 0.0]]], dtype=torch.float64),
        ref_logprobs=torch.zeros(1, 1, 3, dtype=torch.float64),
        values=torch.tensor([[[0.0, 1.0, 1.0]]], dtype=torch.float64),
    )
    advantages, returns = gae(inputs, gamma=0.5, lam=0.5, beta=0.1, eps=0.0)
    a_2, a_1 = 4.0 - 1.0, (0.2 + 0.5 - 1.0) + 0.25 * 3.0
    a_0 = (-0.1 + 0.5 - 0.0) + 0.25 * a_1
    assert (a_0, a_1) == pytest.approx((0.5125, 0.45))
    assert returns[0, 0].tolist() == pytest.approx([0.5125, 1.45, 4.0])
    mean = (a_0 + a_1 + a_2) / 3
    std = math.sqrt(sum((a - mean) ** 2 for a in (a_0, a_1, a_2)) / 3)
    assert advantages[0, 0].tolist() == pytest.approx([(a - mean) / std for a in (a_0, a_1, a_2)])


def test_at_lambda_one_without_values_gae_is_reinforce_pp():
    inputs = replace(make_inputs(), values=torch.zeros(3, 4, 5, dtype=torch.float64))
    assert torch.allclose(gae(inputs, lam=1.0)[0], reinforce_pp(inputs))


def test_what_needs_values_returns_returns_that_are_checked_like_advantages():
    inputs = make_inputs()
    advantages, returns = advantages_and_returns(get_advantage("gae"), inputs)
    assert all(map(torch.equal, get_advantage("gae")(inputs), (advantages, returns)))
    assert torch.allclose(returns, slow_gae(inputs, 1.0, 0.95, 0.05, 1e-6)[1])
    assert advantages_and_returns(get_advantage("rloo"), inputs)[1] is None
    both = replace(bare(lambda i: (i.rewards, i.logprobs / 0)), needs_values=True)
    with pytest.raises(ConfigError, match=r"mine must be finite on response tokens as returns, got -?inf"):
        advantages_and_returns(both, inputs)


def test_a_response_without_tokens_does_not_count_in_the_normalisation_of_reinforce_pp():
    inputs = make_inputs()
    rewards = inputs.rewards.clone()
    rewards[-1, -1] = 1e6
    loud = AdvantageInputs(
        rewards=rewards, response_mask=inputs.response_mask, logprobs=inputs.logprobs, ref_logprobs=inputs.ref_logprobs
    )
    assert torch.equal(reinforce_pp(loud), reinforce_pp(inputs))
    assert reinforce_pp(loud)[-1, -1].abs().sum() == 0


def test_a_batch_without_any_token_gets_zeros_from_every_estimator():
    inputs = AdvantageInputs(
        rewards=torch.randn(2, 3), response_mask=torch.zeros(2, 3, 4, dtype=torch.bool), greedy_rewards=torch.zeros(2)
    )
    inputs = replace(inputs, values=torch.randn(2, 3, 4))
    for name in ("rloo", "grpo", "remax", "reinforce_pp", "reinforce_pp_baseline", "gae"):
        options = {"beta": 0.0} if name.startswith(("reinforce", "gae")) else {}
        assert not advantages_and_returns(get_advantage(name), inputs, options)[0].any()


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e4, 1e4, width=32), st.integers(2, 9))
def test_identical_rewards_give_exactly_zero_in_float32(reward, k):
    inputs = of_rewards([[reward] * k] * 2, dtype=torch.float32)
    for estimator in (rloo, grpo):
        assert not estimator(inputs).any()
    for estimator in (reinforce_pp, reinforce_pp_baseline):
        assert not estimator(inputs, beta=0.0).any()


@pytest.mark.parametrize("estimator", [rloo, grpo, reinforce_pp_baseline])
def test_a_group_of_one_is_refused_where_the_group_is_the_baseline(estimator):
    with pytest.raises(ConfigError, match="group_size = 1"):
        estimator(of_rewards([[1.0], [2.0]]))


def test_inputs_that_an_estimator_needs_and_lacks_are_named():
    with pytest.raises(ConfigError, match="greedy_rewards"):
        remax(of_rewards([[1.0, 2.0]]))
    with pytest.raises(ConfigError, match=r"beta = 0\.05 .* logprobs is None"):
        reinforce_pp(of_rewards([[1.0, 2.0]]))
    with pytest.raises(ConfigError, match="gae needs values, got None: a critic must give them"):
        gae(of_rewards([[1.0, 2.0]]))


def test_inputs_of_another_shape_or_dtype_are_refused():
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"float32 or float64.*bfloat16"):
        AdvantageInputs(rewards=torch.zeros(2, 3, dtype=torch.bfloat16), response_mask=mask)
    with pytest.raises(ValueError, match=r"ref_logprobs must be \[2, 3, 4\]"):
        AdvantageInputs(rewards=torch.zeros(2, 3), response_mask=mask, ref_logprobs=torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"values must be \[2, 3, 4\]"):
        AdvantageInputs(rewards=torch.zeros(2, 3), response_mask=mask, values=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"baselines must be \[2, 3\]"):
        AdvantageInputs(rewards=torch.zeros(2, 3), response_mask=mask, baselines=torch.zeros(2))
    with pytest.raises(ValueError, match="must be bool"):
        AdvantageInputs(rewards=torch.zeros(2, 3), response_mask=mask.int())


def test_builtins_carry_their_flags():
    flags = {
        name: (get_advantage(name).needs_greedy, get_advantage(name).kl_in_reward)
        for name in ("rloo", "grpo", "remax", "reinforce_pp", "reinforce_pp_baseline")
    }
    assert flags == {
        "rloo": (False, False), "grpo": (False, False), "remax": (True, False),
        "reinforce_pp": (False, True), "reinforce_pp_baseline": (False, True),
    }  # fmt: skip
    assert [name for name in (*flags, "gae", "probe") if get_advantage(name).needs_values] == ["gae"]
    assert [name for name in (*flags, "gae", "probe") if get_advantage(name).needs_states] == ["probe"]
    assert get_advantage("gae").kl_in_reward


def test_an_unknown_name_lists_the_known_ones_and_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"'remaxx' is unknown; did you mean 'remax'\?.*grpo.*rloo"):
        get_advantage("remaxx")


def test_a_failed_import_and_a_missing_attribute_name_both_module_and_attribute():
    with pytest.raises(ConfigError, match="cannot import module 'no_such_module' to find 'thing'"):
        get_advantage("no_such_module:thing")
    with pytest.raises(ConfigError, match=r"'r2m_async.advantages' has no callable 'rlo'; did you mean 'rloo'"):
        get_advantage("r2m_async.advantages:rlo")


def test_an_unknown_option_lists_the_accepted_ones_and_a_missing_one_is_named():
    with pytest.raises(ConfigError, match=r"options\.epsilon is unknown to grpo.*It accepts: unbiased, eps"):
        check_options(get_advantage("grpo"), {"epsilon": 1})
    with pytest.raises(ConfigError, match="It accepts: none"):
        check_options(get_advantage("rloo"), {"inputs": 1})
    with pytest.raises(ConfigError, match="lacks scale, which mine requires"):
        bare(lambda inputs, *, scale: inputs.rewards * scale)(of_rewards([[1.0, 2.0]]))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("grpo", {"eps": "1e-8"}, r"options\.eps is '1e-8', and grpo takes float there; write it without quotes"),
        ("grpo", {"eps": None}, r"options\.eps is None, and grpo takes float"),
        ("grpo", {"eps": True}, r"options\.eps is True, and grpo takes float"),
        ("grpo", {"unbiased": "no"}, r"options\.unbiased is 'no', and grpo takes bool there; write it without quotes"),
        ("grpo", {"unbiased": 0}, r"options\.unbiased is 0, and grpo takes bool"),
        ("grpo", {"eps": -1e-6}, r"options\.eps is -1e-06; it guards a division"),
        ("grpo_batch", {"eps": 0}, r"options\.eps is 0; "),
        ("rloo_kl", {"beta": -0.1}, r"options\.beta is -0.1; the KL would be sought"),
        ("gae", {"gamma": 1.5}, r"options\.gamma is 1.5; use a number from 0 to 1"),
        ("gae", {"lam": -1}, r"options\.lam is -1; use a number from 0 to 1"),
    ],
)
def test_an_option_of_another_type_or_out_of_range_is_refused_before_the_run(name, options, told):
    with pytest.raises(ConfigError, match=told):
        check_options(get_advantage(name), options)


def test_a_users_own_annotations_are_kept_as_far_as_they_are_plain():
    def mine(
        inputs,
        *,
        a: float = 0,
        b: "int | None" = None,
        c: Sequence[str] = (),
        d: Literal["x", 1] = "x",
        e=3,
        f: Fraction = 0,
        g: "OnlyForTypeCheckers" = 0,  # noqa: F821  # it hides nothing of the others
    ):
        return inputs.rewards

    estimator = bare(mine)
    fine = [
        {"a": 1},
        {"b": None},
        {"b": 2},
        {"c": ["u"]},
        {"d": 1},
        {"e": "any"},
        {"f": "any"},
        {"g": "any", "e": None},
    ]
    for options in fine:
        check_options(estimator, options)
    for options in ({"a": "1"}, {"b": 1.5}, {"b": True}, {"c": "u"}, {"c": [1]}, {"d": True}, {"d": "y"}):
        with pytest.raises(ConfigError, match=f"options.{next(iter(options))} is .*, and mine takes"):
            check_options(estimator, options)


def test_a_type_error_inside_an_estimator_is_its_own():
    def broken(inputs):
        return inputs.rewards + "one"

    with pytest.raises(TypeError, match="str"):
        bare(broken)(of_rewards([[1.0, 2.0]]))


def bare(function):
    return Estimator(name="mine", function=function, needs_greedy=False, kl_in_reward=False)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            lambda i: [1.0],
            r"advantage mine must return a tensor \[n, K\] = \[2, 2\] or \[n, K, T\] = \[2, 2, 3\], got list",
        ),
        (lambda i: i.rewards[0], r"got torch.float64 \[2\]"),
        (lambda i: i.response_mask, "floating-point"),
        (lambda i: i.rewards / 0, r"must be finite on response tokens, got inf at \[0, 0\] and 4 such values of 4"),
    ],
)
def test_a_result_of_the_wrong_kind_is_refused_in_the_estimators_name(returned, message):
    inputs = AdvantageInputs(
        rewards=torch.ones(2, 2, dtype=torch.float64), response_mask=torch.ones(2, 2, 3, dtype=torch.bool)
    )
    with pytest.raises(ConfigError, match=message):
        bare(returned)(inputs)


def test_what_stands_on_masked_tokens_is_zeroed_and_may_be_nan():
    inputs = make_inputs()
    tokens = bare(lambda i: i.logprobs)(inputs)
    assert torch.equal(tokens, inputs.logprobs.nan_to_num(0.0))
    lost = torch.zeros(3, 4, dtype=torch.float64)
    lost[-1, -1] = math.nan
    assert not bare(lambda i: lost)(inputs).any()


def test_a_result_comes_back_without_gradient():
    inputs = of_rewards([[1.0, 2.0]])
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert not bare(lambda i: i.rewards * weight)(inputs).requires_grad


def test_a_class_is_made_once_and_keeps_what_it_remembers():
    @register_advantage("test_running_mean")
    class RunningMean:
        def __init__(self, *, decay):
            self.decay, self.mean = decay, 0.0

        def __call__(self, inputs):
            self.mean = self.decay * self.mean + (1 - self.decay) * inputs.rewards.mean()
            return inputs.rewards - self.mean

    estimator = get_advantage("test_running_mean")
    inputs = of_rewards([[8.0, 8.0]])
    values = [estimator(inputs, decay=0.5)[0, 0].item() for _ in range(3)]
    assert values == [4.0, 2.0, 1.0]
    assert get_advantage("test_running_mean")(inputs, decay=0.5)[0, 0] == 4.0
    with pytest.raises(ConfigError, match="made with options"):
        estimator(inputs, decay=0.9)


def test_a_name_belongs_to_one_estimator():
    with pytest.raises(ConfigError, match="'rloo' is already registered by r2m_async.advantages.rloo"):
        register_advantage("rloo")(lambda inputs: inputs.rewards)


def test_one_function_may_have_two_names_with_flags_of_their_own():
    def twice(inputs):
        return inputs.rewards

    register_advantage("test_plain")(twice)
    register_advantage("test_greedy", needs_greedy=True)(twice)
    assert (get_advantage("test_plain").needs_greedy, get_advantage("test_greedy").needs_greedy) == (False, True)


def test_plain_attributes_carry_the_flags_of_a_module_attr(tmp_path, monkeypatch):
    (tmp_path / "flagged_advantage.py").write_text(
        "def f(inputs):\n    return inputs.rewards\n\nf.kl_in_reward = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    estimator = get_advantage("flagged_advantage:f")
    assert (estimator.needs_greedy, estimator.kl_in_reward) == (False, True)


def test_the_example_in_the_docs_runs_by_module_attr_and_by_its_registered_name(tmp_path, monkeypatch):
    (source,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "my_advantages.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_advantages", raising=False)
    mask = torch.ones(1, 3, 2, dtype=torch.bool)
    inputs = AdvantageInputs(
        rewards=torch.tensor([[0.0, 2.0, 9.0]]), response_mask=mask, greedy_rewards=torch.tensor([1.0])
    )
    for name in ("my_advantages:greedy_margin", "greedy_margin"):
        estimator = get_advantage(name)
        assert estimator.needs_greedy and not estimator.kl_in_reward
        assert estimator(inputs).tolist() == [[-1.0, 1.0, 2.0]]
        assert estimator(inputs, limit=1.5).tolist() == [[-1.0, 1.0, 1.5]]


FLAGGED = """
def per_token(inputs): return inputs.rewards[..., None].expand(inputs.response_mask.shape)
per_token.per_token = True
def compares(inputs): return inputs.rewards - inputs.rewards.mean(1, keepdim=True)
compares.group_relative = True
def normalises(inputs): return inputs.rewards - inputs.rewards.mean()
normalises.whole_batch = True
def takes_the_kl(inputs): return inputs.rewards
takes_the_kl.kl_in_reward = True
def takes_beta(inputs, *, beta): return inputs.rewards
takes_beta.kl_in_reward = True
"""


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("per_token", {}, "gives every token its own advantage, and objective.ratio is 'sequence'"),
        ("compares", {"rollouts": {"group_size": 1}, "head": {"variant": "vanilla"}}, "rollouts.group_size is 1"),
        ("normalises", {"scheduling": {"overage": "mask"}}, "scheduling.overage is 'mask' and advantage.name is"),
        ("takes_the_kl", {}, "has no option `beta`, and objective.kl_coef is 0.05: nothing would use it"),
    ],
)
def test_a_users_own_estimator_is_held_against_the_config_as_ours_are(tmp_path, monkeypatch, name, changes, message):
    (tmp_path / "flagged.py").write_text(FLAGGED)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = R2MConfig(advantage={"name": f"flagged:{name}"}, **changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_estimator(get_advantage(config.advantage.name), config)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("per_token", {"objective": {"ratio": "token"}}),
        ("compares", {}),
        ("normalises", {}),
        ("takes_the_kl", {"objective": {"kl_coef": 0}}),
        ("takes_beta", {}),
    ],
)
def test_what_an_estimators_flags_allow_is_allowed(tmp_path, monkeypatch, name, changes):
    (tmp_path / "flagged.py").write_text(FLAGGED)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = R2MConfig(advantage={"name": f"flagged:{name}"}, **changes)
    check_estimator(get_advantage(config.advantage.name), config)


def test_an_estimator_can_be_called_by_itself():
    inputs = AdvantageInputs(
        rewards=torch.tensor([[1.0, 2.0, 6.0]]), response_mask=torch.ones(1, 3, 2, dtype=torch.bool)
    )
    assert torch.equal(get_advantage("rloo")(inputs), torch.tensor([[-3.0, -1.5, 4.5]]))
    assert torch.allclose(get_advantage("grpo")(inputs, unbiased=False), get_advantage("grpo")(inputs) * 1.5**0.5)
