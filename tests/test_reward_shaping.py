"""Penalties for long responses, the scale of rewards, GDPO, and the mask of cut responses."""

import statistics
import sys

import pytest
import torch
from groups import groups_of, trajectories

from r2m_async import reference
from r2m_async.advantages import AdvantageInputs, get_advantage
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import check_estimator
from r2m_async.models.policy_objective import loss_mask
from r2m_async.models.reward import overlong_penalty
from r2m_async.models.reward_scale import RewardScale
from r2m_async.runs.checkpoints import checkpoint_path
from r2m_async.trajectories import ScoredGroup

# Penalties


@pytest.mark.parametrize(
    ("overlong", "expected"),
    [
        ({"start": 6}, [0, 0, 0.25, 0.5, 1.0, 1.0]),
        ({"start": 6, "penalty": 2.0}, [0, 0, 0.5, 1.0, 2.0, 2.0]),
        ({"start": 6, "end": 8}, [0, 0, 0.5, 1.0, 1.0, 1.0]),
        (None, [0] * 6),
    ],
)
def test_an_overlong_response_loses_reward_along_a_line(overlong, expected):
    """DAPO's Eq. 13 with L_max = 10 and L_cache = 4."""
    config = R2MConfig().rollouts(max_new_tokens=10).reward(overlong=overlong)
    assert [overlong_penalty(length, config) for length in (0, 6, 7, 8, 10, 11)] == expected


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        ({"overlong": {"start": 512}}, r"reward\.overlong\.start is 512 and rollouts\.max_new_tokens is 512"),
        ({"overlong": {"start": 9, "end": 9}}, r"reward\.overlong\.start is 9 and reward\.overlong\.end is 9"),
        ({"overlong": {"strat": 9}}, r"reward\.overlong\.strat: no such key; did you mean reward\.overlong\.start"),
        ({"normalize_clip": 5.0}, r"reward\.normalize_clip is 5 and reward\.normalize is 'none'"),
    ],
)
def test_what_would_do_nothing_is_refused(reward, told):
    with pytest.raises(ConfigError, match=told):
        R2MConfig.from_dict({"reward": reward})


def test_cut_responses_are_left_out_of_the_loss_and_of_nothing_else():
    import dataclasses

    some = trajectories([(2, 3), (1, 2)])
    some[1] = dataclasses.replace(some[1], finish_reason="length")
    config = R2MConfig()
    assert loss_mask(some, config).tolist() == [[True] * 3, [True, True, False]]
    assert loss_mask(some, config.objective(mask_cut=True)).tolist() == [[True] * 3, [False] * 3]


# Scale


def scored(values: list[list[float]]) -> list[ScoredGroup]:
    import dataclasses

    groups, rewards = groups_of([[(1, 2)] * len(one) for one in values])
    return [
        ScoredGroup(
            group=group,
            rewards=dataclasses.replace(one, rewards=torch.tensor(own), greedy_reward=torch.tensor(7.0)),
        )
        for group, one, own in zip(groups, rewards, values, strict=True)
    ]


def scale(**reward) -> RewardScale:
    return RewardScale(R2MConfig().reward(**reward))


def flat(scaled) -> list[float]:
    return [value for own, _ in scaled for value in own.tolist()]


def test_rewards_are_centred_or_whitened_over_the_step_and_the_greedy_one_with_them():
    step = scored([[1.0, 2.0], [4.0, 5.0, 8.0]])
    assert flat(scale().scaled(step)) == [1, 2, 4, 5, 8]
    centred = scale(normalize="center").scaled(step)
    assert flat(centred) == [-3, -2, 0, 1, 4] and centred[0][1].item() == 3
    whitened = scale(normalize="whiten").scaled(step)
    spread = statistics.pstdev([1, 2, 4, 5, 8])
    assert flat(whitened) == pytest.approx([one / spread for one in (-3, -2, 0, 1, 4)], rel=1e-6)
    assert whitened[1][1].item() == pytest.approx(3 / spread, rel=1e-6)
    clipped = scale(normalize="center", normalize_clip=2.5).scaled(step)
    assert flat(clipped) == [-2.5, -2, 0, 1, 2.5] and clipped[0][1].item() == 2.5
    assert flat(scale(normalize="whiten").scaled(scored([[3.0, 3.0]]))) == [0, 0]


def test_running_rewards_are_scaled_by_all_that_were_seen_and_go_on_from_a_checkpoint():
    steps = [[[1.0, 2.0], [4.0, 5.0]], [[1e4, 1e4 + 3.0]], [[-7.0], [0.5, 0.25]]]
    running, seen = scale(normalize="running"), []
    for step in steps:
        seen += [value for own in step for value in own]
        fresh = scale(normalize="running")
        fresh.restore(running.state())
        mean, spread = statistics.fmean(seen), statistics.pstdev(seen)
        expected = [(value - mean) / spread for own in step for value in own]
        for one in (running, fresh):
            assert flat(one.scaled(scored(step))) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert fresh.state() == running.state()


# GDPO


def slow_gdpo(parts, weights, eps):
    """Eq. 4, 5 and 7 of arXiv 2601.05242 and its batch normalisation, one number after the other. parts: [n][K][R]."""
    sums = []
    for group in parts:
        advantages = []
        for response in group:
            total = 0.0
            for k, weight in enumerate(weights):
                column = [one[k] for one in group]
                total += weight * (response[k] - statistics.fmean(column)) / (statistics.stdev(column) + eps)
            advantages.append(total)
        sums.append(advantages)
    batch = [value for own in sums for value in own]
    return [[(value - statistics.fmean(batch)) / (statistics.stdev(batch) + eps) for value in own] for own in sums]


def inputs_of(parts, weights) -> AdvantageInputs:
    parts, weights = torch.tensor(parts, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    mask = torch.ones(*parts.shape[:2], 2, dtype=torch.bool)
    return AdvantageInputs(rewards=parts @ weights, response_mask=mask, reward_parts=parts, part_weights=weights)


def test_gdpo_is_its_literal_loop():
    parts = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts[..., 1] *= 1000  # which drowns nothing
    weights = [1.0, 0.5, -2.0]
    got = get_advantage("gdpo")(inputs_of(parts.tolist(), weights), eps=1e-4)
    torch.testing.assert_close(got, torch.tensor(slow_gdpo(parts.tolist(), weights, 1e-4), dtype=torch.float64))


def test_gdpo_tells_rewards_apart_that_their_sum_does_not_by_hand():
    """The paper's example: sums 1 and 2 give the same to GRPO as sums 0 and 1, and more to GDPO."""
    parts = [[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]]
    got = get_advantage("gdpo")(inputs_of(parts, [1.0, 1.0]), eps=0.0 + 1e-12)
    assert got[1, 1].item() == pytest.approx(2 * got[0, 1].item())
    assert got[0, 1].item() == pytest.approx(-got[0, 0].item())
    same = get_advantage("gdpo")(inputs_of([[[0.1, 0.3]] * 2] * 2, [1.0, 1.0]))
    assert not same.any(), "equal rewards give exactly nothing"


def test_gdpo_refuses_what_would_have_no_effect_or_fall_out_of_its_batch():
    config, estimator = R2MConfig(), get_advantage("gdpo")
    check_estimator(estimator, config)
    with pytest.raises(ConfigError, match=r"'gdpo', which normalises each part .* reward\.normalize is 'whiten'"):
        check_estimator(estimator, config.reward(normalize="whiten"))
    with pytest.raises(ConfigError, match="overage is 'mask'"):
        check_estimator(estimator, config.scheduling(overage="mask"))
    with pytest.raises(ValueError, match="part_weights must be"):
        AdvantageInputs(
            rewards=torch.zeros(1, 2),
            response_mask=torch.ones(1, 2, 1, dtype=torch.bool),
            reward_parts=torch.zeros(1, 2, 3),
            part_weights=torch.ones(2),
        )


# In the ring


@pytest.fixture
def shaped(tiny_config, monkeypatch):
    mine = type(sys)("mine")
    mine.words = lambda prompt, response: len(response.split())
    monkeypatch.setitem(sys.modules, "mine", mine)
    functions = {"words": {"function": "mine:words", "weight": 0.5}}
    return tiny_config.reward(functions=functions, overlong={"start": 2}).objective(mask_cut=True).run(num_steps=2)


def in_process(config):
    with Ring.of(config, in_process=True) as ring:
        while not ring.finished:
            ring.step()
        ring.drain()
        return ring.policy_weights()


@pytest.mark.models
@pytest.mark.parametrize(
    "changes", [{"reward": {"normalize": "running"}}, {"advantage": {"name": "gdpo"}}, {"advantage": {"name": "remax"}}]
)
def test_shaped_rewards_are_the_references_bit_for_bit_and_matter(shaped, changes):
    tree = shaped.to_dict()
    config = R2MConfig.from_dict(tree | {name: tree[name] | section for name, section in changes.items()})
    ours, theirs = in_process(config), reference.train(config).policy
    for name, tensor in theirs.tensors.items():
        assert torch.equal(ours.tensors[name], tensor), name
    unmasked = reference.train(config.objective(mask_cut=False)).policy
    assert any(not torch.equal(unmasked.tensors[name], tensor) for name, tensor in theirs.tensors.items())


@pytest.mark.models
def test_a_resumed_run_goes_on_with_the_rewards_that_it_has_seen(tiny_config, tmp_path):
    config = tiny_config.reward(normalize="running").advantage(name="reinforce_pp").objective(ratio="token")
    expected = reference.train(config.run(num_steps=2)).policy
    config = config.head(omega_horizon=2).run(num_steps=2)
    with reference.one_thread():
        with Ring.of(config, in_process=True) as ring:
            ring.step()
            ring.save(checkpoint_path(tmp_path, 1))
        with Ring.of(config, in_process=True, resume=checkpoint_path(tmp_path, 1)) as ring:
            ring.step()
            ours = ring.policy_weights()
    for name, tensor in expected.tensors.items():
        assert torch.equal(ours.tensors[name], tensor), name
