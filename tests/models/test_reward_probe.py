"""The probe that predicts rewards from the policy's states: against least squares on the raw data, and without looking ahead."""

import numpy as np
import pytest
import torch
from groups import trajectory

from r2m_async.advantages import AdvantageInputs, get_advantage
from r2m_async.config import R2MConfig
from r2m_async.cpu_threads import one_thread
from r2m_async.errors import ConfigError
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import check_code
from r2m_async.models.reward_probe import RewardProbe, prompt_state


def steps_of(number, responses=6, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(width, generator=generator)
    for _ in range(number):
        states = torch.randn(responses, width, generator=generator) * torch.tensor([1.0, 3.0, 0.2, 1.0]) + 2.0
        yield states, states @ truth + 0.1 * torch.randn(responses, generator=generator) - 5.0


def least_squares(history, strength, decay):
    """(coefficients, intercept) of the weighted ridge regression, by numpy on rows that stand for data and penalty."""
    rows = [
        (decay ** (len(history) - 1 - age), x, r)
        for age, (xs, rs) in enumerate(history)
        for x, r in zip(xs, rs, strict=True)
    ]
    weights = np.array([weight for weight, _, _ in rows]) / sum(weight for weight, _, _ in rows)
    x, r = np.array([x.tolist() for _, x, _ in rows]), np.array([float(r) for _, _, r in rows])
    variance = (weights[:, None] * (x - weights @ x) ** 2).sum(0).mean()
    design = np.vstack(
        [
            np.sqrt(weights)[:, None] * np.hstack([x, np.ones((len(x), 1))]),
            np.hstack([np.sqrt(strength * variance) * np.eye(x.shape[1]), np.zeros((x.shape[1], 1))]),
        ]
    )
    target = np.concatenate([np.sqrt(weights) * r, np.zeros(x.shape[1])])
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    return solution[:-1], solution[-1]


@pytest.mark.parametrize(("strength", "decay"), [(0.1, 0.9), (1.0, 1.0), (1e-6, 0.5)])
def test_a_prediction_is_the_weighted_ridge_regression_of_all_earlier_steps(strength, decay):
    probe, history = RewardProbe(strength, decay), []
    for states, rewards in steps_of(5):
        predicted = probe.baselines(states, rewards)
        if history:
            coefficients, intercept = least_squares(history, strength, decay)
            assert predicted.numpy() == pytest.approx(states.numpy() @ coefficients + intercept, abs=1e-4)
        history.append((states, rewards))


def test_the_first_step_has_the_mean_of_the_other_responses_or_nothing():
    assert RewardProbe().baselines(torch.ones(3, 2), torch.tensor([1.0, 2.0, 6.0])).tolist() == [4.0, 3.5, 1.5]
    assert RewardProbe().baselines(torch.ones(1, 2), torch.tensor([5.0])).tolist() == [0.0]


def test_a_baseline_does_not_depend_on_the_response_that_it_is_for():
    (first, rewards), (second, _) = steps_of(2)
    found = []
    for other in (0.0, 100.0):
        probe = RewardProbe()
        probe.baselines(first, rewards)
        found.append(probe.baselines(second, torch.full((6,), other)))
    assert torch.equal(*found)


def test_a_good_probe_takes_most_of_the_variance_away():
    probe = RewardProbe(strength=0.01)
    *earlier, (states, rewards) = steps_of(20, responses=16)
    for one in earlier:
        probe.baselines(*one)
    assert (rewards - probe.baselines(states, rewards)).var() < 0.05 * rewards.var()


def test_states_that_are_all_alike_predict_the_mean():
    probe = RewardProbe(decay=1.0)
    probe.baselines(torch.ones(4, 3), torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert probe.baselines(torch.ones(2, 3), torch.zeros(2)).tolist() == pytest.approx([3.0, 3.0])


def test_a_restored_probe_goes_on_bit_for_bit():
    *earlier, last = steps_of(4)
    probe, other = RewardProbe(), RewardProbe()
    assert probe.state() == {}
    for one in earlier:
        probe.baselines(*one)
    other.restore(probe.state())
    assert torch.equal(probe.baselines(*last), other.baselines(*last))


def test_the_state_of_a_prompt_is_that_in_which_the_first_token_is_chosen():
    states = torch.arange(6.0)[:, None]
    assert prompt_state(states, trajectory(4, 3, 0)).item() == 3.0
    assert prompt_state(states[:3], trajectory(4, 0, 0)).item() == 2.0, "an empty response has no such state"


def test_the_advantage_is_the_reward_less_the_baseline():
    inputs = AdvantageInputs(
        rewards=torch.tensor([[1.0], [4.0]]),
        response_mask=torch.ones(2, 1, 3, dtype=torch.bool),
        baselines=torch.tensor([[0.5], [6.0]]),
    )
    assert get_advantage("probe")(inputs).tolist() == [[0.5], [-2.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0}, "advantage.options.strength is 0; give a number above 0"),
        ({"decay": 1.5}, "advantage.options.decay is 1.5; give a number above 0 and at most 1"),
        ({"decay": "slow"}, "advantage.options.decay is 'slow'"),
        ({"lam": 1}, "options.lam is unknown to probe"),
    ],
)
def test_settings_out_of_range_are_refused_before_the_run(options, message):
    with pytest.raises(ConfigError, match=message):
        check_code(R2MConfig().advantage(name="probe", options=options))


@pytest.mark.models
def test_a_run_resumed_from_a_checkpoint_has_the_probe_of_one_that_nothing_disturbed(tiny_config, tmp_path):
    config = tiny_config.run(num_steps=4).advantage(name="probe").head(variant="vanilla")
    config = config.rollouts(group_size=1, prompts_per_step=4)
    ends = []
    with one_thread():
        with Ring.of(config, in_process=True) as ring:
            for _ in range(2):
                ring.step()
            ring.save(tmp_path / "checkpoint")
            while not ring.finished:
                ring.step()
            ends.append(ring.policy_weights())
        with Ring.of(config, in_process=True, resume=tmp_path / "checkpoint") as ring:
            while not ring.finished:
                ring.step()
            ends.append(ring.policy_weights())
    assert all(torch.equal(ends[0].tensors[name], tensor) for name, tensor in ends[1].tensors.items())
