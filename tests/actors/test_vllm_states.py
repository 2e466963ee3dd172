"""The hidden states that a vLLM engine reports are transformers', however the engine came by them."""

import dataclasses

import pytest
import torch
from engines import (
    BLOCK,
    CACHE_BLOCK_BYTES,
    assert_exact,
    clear_slab,
    config_of,
    logprob_error,
    running,
    scheduled,
    slab_of,
    ticket_of,
)

import actors.state_slab
from actors.state_slab import UNWRITTEN
from r2m_async.errors import WeightMismatch
from r2m_async.models.loading import load_policy
from r2m_async.models.policy import group_feedback
from r2m_async.models.weights import named_weights


@pytest.mark.ring
def test_a_running_engine_leaves_no_file_in_shared_memory(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(actors.state_slab, "DIRECTORY", str(tmp_path))
    config = config_of(checkpoint())
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        assert list(tmp_path.iterdir()) == []
        assert_exact(model, engine.generate(ticket_of(0)), config)
        with pytest.raises(WeightMismatch):
            engine.load(_with_wrong_digest(named_weights(model, 1, probe=True)))
    assert list(tmp_path.iterdir()) == []


def _with_wrong_digest(weights):
    digests = dict.fromkeys(weights.probe.digests, "0" * 32)
    return dataclasses.replace(weights, probe=dataclasses.replace(weights.probe, digests=digests))


@pytest.mark.ring
def test_states_are_exact_when_long_prompts_are_prefilled_in_chunks(checkpoint):
    options = {"enable_chunked_prefill": True, "max_num_batched_tokens": 16, "enable_prefix_caching": False}
    config = config_of(checkpoint(), max_prompt_tokens=80, engine_options=options)
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        plans = scheduled(engine)
        result = engine.generate(ticket_of(0, prompt_tokens=75))
    assert max(plan.total_num_scheduled_tokens for plan in plans) == 16, "no prompt was cut in chunks"
    assert_exact(model, result, config)
    with running(config.rollouts(engine_options={}), model=model) as engine:
        whole, _ = engine.generate(ticket_of(0, prompt_tokens=75))
    for one, other in zip(result[0].trajectories, whole.trajectories, strict=True):
        assert torch.equal(one.token_ids, other.token_ids), "chunks took random numbers from the responses"


@pytest.mark.ring
def test_states_are_exact_when_requests_are_preempted_for_want_of_cache(checkpoint):
    config = config_of(
        checkpoint(endless=True, spread=6.0),
        group_size=4,
        max_new_tokens=150,
        engine_options={"kv_cache_memory_bytes": 10 * CACHE_BLOCK_BYTES},
    )
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        plans = scheduled(engine)
        result = engine.generate(ticket_of(0))
    preempted = sum(len(plan.preempted_req_ids or ()) for plan in plans)
    assert preempted > 0, "the cache was large enough"
    assert_exact(model, result, config)
    with running(config.rollouts(engine_options={}), model=model) as engine:
        whole, _ = engine.generate(ticket_of(0))
    for one, other in zip(result[0].trajectories, whole.trajectories, strict=True):
        assert torch.equal(one.token_ids, other.token_ids), "preemption took random numbers from the responses"


@pytest.mark.ring
@pytest.mark.parametrize("prompt_tokens", [pytest.param(BLOCK, marks=pytest.mark.cross), 2 * BLOCK + 6])
def test_states_are_exact_where_the_prefix_cache_spared_siblings_the_prompt(checkpoint, prompt_tokens):
    config = config_of(checkpoint(), max_prompt_tokens=80)
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        clear_slab(engine)
        result = engine.generate(ticket_of(0, prompt_tokens=prompt_tokens))
        spared = (slab_of(engine).versions[0, :, :prompt_tokens] == UNWRITTEN).sum(-1)
    cached = (prompt_tokens - 1) // BLOCK * BLOCK  # the last prompt token is always computed
    assert sorted(spared.tolist()) == [0, cached, cached, cached]
    assert_exact(model, result, config)


@pytest.mark.ring
def test_states_travel_in_the_dtype_that_the_feedback_asks_for(checkpoint):
    config = config_of(checkpoint()).feedback(dtype="bfloat16")
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        whole, feedback = engine.generate(ticket_of(0))
    exact = group_feedback(model, whole, config.feedback(dtype="float32"), 0)
    for ours, theirs in zip(feedback.hidden_states, exact.hidden_states, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-8, atol=1e-4)


@pytest.mark.ring
def test_an_engine_whose_states_nobody_reads_keeps_none(checkpoint):
    config = config_of(checkpoint()).feedback(source="learner")
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        whole, feedback = engine.generate(ticket_of(0))
        assert feedback is None and slab_of(engine) is None
    assert logprob_error(model, whole.trajectories, config) < 1e-5
