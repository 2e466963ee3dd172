"""In the first step the learner compares its log-probabilities with those of the rollout engine that sampled."""

import dataclasses

import pytest
import torch
from groups import groups_of

from learners.policy_learner import PolicyLearner
from learners.torch_backend import TorchBackend
from r2m_async.advantages import get_advantage
from r2m_async.errors import WeightMismatch
from r2m_async.models.loading import load_policy
from r2m_async.models.policy import token_logprobs

pytestmark = pytest.mark.models

SIZES = [[(4, 3), (2, 7)], [(3, 2), (3, 5)]]


def learner_of(config) -> PolicyLearner:
    model, reference = (load_policy(config.model.policy, config) for _ in range(2))
    return PolicyLearner(TorchBackend(model, reference, config), get_advantage(config.advantage.name), config)


def sampled(config, shift: float, version: int = 0, tokens=slice(None)):
    """Groups as an engine would have sampled them whose log-probabilities are off by `shift` at some tokens."""
    model, groups = load_policy(config.model.policy, config), []
    for group in groups_of(SIZES)[0]:
        members = []
        for one in group.trajectories:
            logprobs = one.behaviour_logprobs.clone()
            logprobs[one.prompt_len :] = token_logprobs(model, [one], config)[0]
            logprobs[one.prompt_len :][tokens] += shift
            versions = torch.full_like(one.policy_versions, version)
            members.append(dataclasses.replace(one, behaviour_logprobs=logprobs, policy_versions=versions))
        groups.append(dataclasses.replace(group, trajectories=tuple(members)))
    return groups


@pytest.mark.parametrize("shift", [0.0, 0.005, -0.005])
def test_an_engine_that_computes_the_same_goes_on(tiny_config, shift):
    learner_of(tiny_config).proximal(0, sampled(tiny_config, shift))


@pytest.mark.parametrize(("shift", "tokens"), [(0.02, slice(None)), (-0.02, slice(None)), (6.0, slice(1))])
def test_an_engine_that_computes_another_policy_ends_the_run_and_is_named(tiny_config, shift, tokens):
    told = r"step 0 \(groups \[0, 1\]\): learner and rollout engine do not compute the same policy.*17 tokens that version 0"
    with pytest.raises(WeightMismatch, match=told) as error:
        learner_of(tiny_config).proximal(0, sampled(tiny_config, shift, tokens=tokens))
    assert "learner.max_mismatch is 0.01" in str(error.value) and "'transformers'" in str(error.value)


def test_the_limit_is_the_users_and_that_of_the_number_format(tiny_config):
    learner_of(tiny_config.learner(max_mismatch=0.05)).proximal(0, sampled(tiny_config, 0.02))
    assert tiny_config.model(dtype="bfloat16").max_mismatch == 0.1
    with pytest.raises(WeightMismatch, match="learner.max_mismatch is 0.002"):
        learner_of(tiny_config.learner(max_mismatch=0.002)).proximal(0, sampled(tiny_config, 0.005))


def test_tokens_of_another_version_are_not_compared_and_the_next_own_ones_are(tiny_config):
    learner = learner_of(tiny_config)
    learner.proximal(0, sampled(tiny_config, 6.0, version=-1))
    with pytest.raises(WeightMismatch):
        learner.proximal(0, sampled(tiny_config, 6.0))


def test_after_the_first_comparison_there_is_no_other(tiny_config):
    learner = learner_of(tiny_config)
    learner.proximal(0, sampled(tiny_config, 0.0))
    learner.proximal(0, sampled(tiny_config, 6.0))
