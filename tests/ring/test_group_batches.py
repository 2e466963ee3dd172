"""Groups generated as one batch (transformers' engine, `rollouts.concurrent_groups` in one process)."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from actors import transformers_engine
from r2m_async import reference
from r2m_async.errors import ConfigError
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import TicketOffice, resolve
from r2m_async.models.generation import sample_groups
from r2m_async.models.loading import load_policy

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def sample(tiny_config):
    """`sample(tickets, **changes)` by the tiny policy, and tickets whose prompts differ in length."""
    policy = load_policy(tiny_config.model.policy, tiny_config)
    tokenizer = AutoTokenizer.from_pretrained(tiny_config.model.policy)
    office = TicketOffice(tiny_config, resolve(tiny_config))
    first, second = (office.group(group_id, 0) for group_id in range(2))
    short = replace(second, prompt=replace(second.prompt, token_ids=second.prompt.token_ids[:-2]))
    how = {"num_responses": 3, "temperature": 0.8, "max_new_tokens": 12, "greedy_twin": True, "version": 4}
    return lambda chosen, **changes: sample_groups(policy, tokenizer, chosen, **how | changes), [first, short]


def test_a_group_draws_in_a_batch_what_it_draws_alone_and_so_does_its_greedy_twin(sample):
    draw, tickets = sample
    together, alone = draw(tickets), [draw([ticket])[0] for ticket in tickets]
    assert [group.ticket for group in together] == tickets
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip((*ours.trajectories, ours.greedy), (*theirs.trajectories, theirs.greedy), strict=True):
            assert torch.equal(one.token_ids, other.token_ids) and one.prompt_len == other.prompt_len
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
            assert torch.equal(one.policy_versions, other.policy_versions)
            torch.testing.assert_close(one.behaviour_logprobs, other.behaviour_logprobs, atol=1e-5, rtol=0)
    assert len({tuple(t.token_ids.tolist()) for t in together[0].trajectories}) > 1


def test_one_group_is_aborted_and_the_other_goes_on(sample):
    draw, tickets = sample
    cut, whole = draw(tickets, aborted=lambda ticket: ticket is tickets[0])
    assert all(t.finish_reason in ("abort", "stop") and t.num_response_tokens == 1 for t in cut.trajectories)
    assert all(t.finish_reason in ("length", "stop") for t in whole.trajectories)
    assert max(t.num_response_tokens for t in whole.trajectories) > 1


def test_a_ring_in_one_process_generates_a_steps_groups_at_once_and_ends_beside_the_reference(tiny_config, monkeypatch):
    sizes, real = [], transformers_engine.sample_groups
    monkeypatch.setattr(
        transformers_engine, "sample_groups", lambda *a, **how: sizes.append(len(a[2])) or real(*a, **how)
    )
    config = tiny_config.rollouts(concurrent_groups=2)
    with reference.one_thread(), Ring.of(config, in_process=True) as ring:
        means = []
        while not ring.finished:
            means.append(ring.step()["reward/mean"])
    assert sizes == [2] * config.run.num_steps
    expected = reference.train(tiny_config).rewards
    assert means == pytest.approx([sum(rewards) / len(rewards) for rewards in expected], abs=1e-4)


def test_what_fails_in_a_batch_ends_the_run_with_its_message(tiny_config, monkeypatch):
    def fail(*_, **__):
        raise ValueError("out of ink")

    monkeypatch.setattr(transformers_engine, "sample_groups", fail)
    ring = Ring.of(tiny_config.rollouts(concurrent_groups=2), in_process=True)
    with ring, pytest.raises(ValueError, match="out of ink"):
        ring.step()


def test_on_ray_the_transformers_engine_takes_one_group_at_a_time(tiny_config):
    with pytest.raises(ConfigError, match="concurrent_groups is 2 and rollouts.engine is 'transformers': on Ray"):
        Ring.of(tiny_config.rollouts(concurrent_groups=2))
