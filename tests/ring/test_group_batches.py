"""Groups generated as one batch (transformers' engine, `rollouts.concurrent_groups`)."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from actors import transformers_engine
from r2m_async import reference
from r2m_async.launch import makers
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import TicketOffice, resolve
from r2m_async.models import generation
from r2m_async.models.generation import sample_groups
from r2m_async.models.loading import load_policy
from r2m_async.models.policy import group_feedback

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def sample(tiny_config):
    """`sample(tickets, ...)` by the tiny policy, the policy, and tickets whose prompts differ in length."""
    policy = load_policy(tiny_config.model.policy, tiny_config)
    tokenizer = AutoTokenizer.from_pretrained(tiny_config.model.policy)
    office = TicketOffice(tiny_config, resolve(tiny_config))
    first, second = (office.group(group_id, 0) for group_id in range(2))
    short = replace(second, prompt=replace(second.prompt, token_ids=second.prompt.token_ids[:-2]))
    config = tiny_config.rollouts(group_size=3, temperature=0.8, max_new_tokens=12)

    def sample(chosen, aborted=lambda _: False):
        return sample_groups(policy, tokenizer, chosen, config, greedy_twin=True, version=4, aborted=aborted)

    return sample, (policy, config), [first, short]


def test_a_group_draws_in_a_batch_what_it_draws_alone_and_so_does_its_greedy_twin(sample):
    draw, _, tickets = sample
    together, alone = ([group for group, _ in draw(tickets)], [draw([ticket])[0][0] for ticket in tickets])
    assert [group.ticket for group in together] == tickets
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip((*ours.trajectories, ours.greedy), (*theirs.trajectories, theirs.greedy), strict=True):
            assert torch.equal(one.token_ids, other.token_ids) and one.prompt_len == other.prompt_len
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
            assert torch.equal(one.policy_versions, other.policy_versions)
            torch.testing.assert_close(one.behaviour_logprobs, other.behaviour_logprobs, atol=1e-5, rtol=0)
    assert len({tuple(t.token_ids.tolist()) for t in together[0].trajectories}) > 1


def test_one_group_is_aborted_and_the_other_goes_on(sample):
    draw, _, tickets = sample
    (cut, of_none), (whole, of_all) = draw(tickets, aborted=lambda ticket: ticket is tickets[0])
    assert of_none is None and len(of_all.hidden_states) == len(whole.trajectories)
    assert all(t.finish_reason in ("abort", "stop") and t.num_response_tokens == 1 for t in cut.trajectories)
    assert all(t.finish_reason in ("length", "stop") for t in whole.trajectories)
    assert max(t.num_response_tokens for t in whole.trajectories) > 1


@pytest.mark.parametrize("cut", [None, 0, 1])
def test_the_states_of_the_sampling_passes_are_those_of_one_pass_over_the_responses(sample, cut):
    """Also if the rows of a group leave the batch, because it is cut."""
    draw, (policy, config), tickets = sample
    groups = draw(tickets, aborted=lambda ticket: cut is not None and ticket is tickets[cut])
    for group, feedback in (one for index, one in enumerate(groups) if index != cut):
        expected = group_feedback(policy, group, config, 4)
        assert (feedback.group_id, feedback.policy_version) == (expected.group_id, 4)
        for own, their in zip(
            (*feedback.hidden_states, feedback.greedy), (*expected.hidden_states, expected.greedy), strict=True
        ):
            torch.testing.assert_close(own, their, atol=1e-4, rtol=1e-4)


@given(st.lists(st.floats(-40, 5, width=32), min_size=1, max_size=30), st.floats(0, 1, exclude_max=True))
def test_a_token_is_where_the_cumulative_distribution_passes_a_random_number(logits, number):
    logprobs = torch.tensor([logits]).log_softmax(-1)
    (token,) = generation._at(logprobs, torch.tensor([number], dtype=torch.float64)).tolist()
    probabilities = logprobs[0].exp().double()
    cumulative = (probabilities.cumsum(0) / probabilities.sum()).tolist()
    assert probabilities[token] > 0
    assert cumulative[token] >= number - 1e-9 and (token == 0 or cumulative[token - 1] <= number + 1e-9)


def test_the_largest_random_number_gives_no_token_without_probability():
    logprobs = torch.tensor([[0.1, 0.2, -torch.inf, -torch.inf]]).log_softmax(-1)
    largest = torch.tensor([1.0 - 2.0**-53], dtype=torch.float64)
    assert generation._at(logprobs, largest).tolist() == [1]
    assert generation._at(logprobs, torch.tensor([torch.nan], dtype=torch.float64)).tolist() == [1]


def test_a_ring_in_one_process_generates_a_steps_groups_at_once_and_ends_beside_the_reference(tiny_config, monkeypatch):
    sizes, real = [], transformers_engine.sample_groups
    monkeypatch.setattr(
        transformers_engine, "sample_groups", lambda *a, **how: sizes.append(len(a[2])) or real(*a, **how)
    )
    config = tiny_config.rollouts(concurrent_groups=2)
    with Ring.of(config, in_process=True) as ring:
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


@pytest.fixture
def actor(tiny_config, monkeypatch):
    """A rollout actor as on Ray, tickets, the sizes of its batches, and what lets a batch begin."""
    config = tiny_config.rollouts(concurrent_groups=2)
    workload = resolve(config)
    office = TicketOffice(config, workload)
    sizes, begin, real = [], threading.Semaphore(0), transformers_engine.sample_groups

    def held(model, tokenizer, tickets, *how, **further):
        sizes.append(len(tickets))
        begin.acquire()
        return real(model, tokenizer, tickets, *how, **further)

    monkeypatch.setattr(transformers_engine, "sample_groups", held)
    return makers._rollout_actor(config, workload), [office.group(number, 0) for number in range(4)], sizes, begin


def test_groups_that_are_asked_for_at_once_are_one_batch(actor, monkeypatch):
    actor, tickets, sizes, begin = actor
    monkeypatch.setattr(actor.engine._gathered, "_patience", 600.0)
    begin.release(2)
    with ThreadPoolExecutor(4) as pool:
        reports = [report for report, _, _ in pool.map(actor.generate, tickets)]
    assert sizes == [2, 2] and [report.group_id for report in reports] == [0, 1, 2, 3]
    assert [report.num_responses for report in reports] == [3] * 4


def test_a_group_that_is_given_up_while_it_waits_for_a_batch_comes_back_empty_at_once(actor):
    actor, tickets, sizes, begin = actor
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(actor.generate, tickets[0])
        while not sizes:
            time.sleep(0.001)
        second = pool.submit(actor.generate, tickets[1])
        third = pool.submit(actor.generate, tickets[2])
        while len(actor.engine._gathered._line) < 2:
            time.sleep(0.001)
        actor.abort(tickets[1].group_id, tickets[1].attempt)
        report, group, feedback = second.result()
        assert (report.num_responses, group.trajectories, feedback) == (0, (), None)
        assert not first.done()
        actor.abort(tickets[2].group_id, tickets[2].attempt + 1)  # of another attempt
        begin.release(2)
        assert first.result()[0].num_responses == third.result()[0].num_responses == 3
    assert sizes == [1, 1]
