"""A vLLM engine in a process of its own: new weights and aborts while requests are running."""

import asyncio
import multiprocessing
import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from engines import (
    assert_exact,
    clear_slab,
    config_of,
    driver_of,
    generate_at_once,
    logprob_error,
    num_free_blocks,
    perturbed,
    running,
    slab_of,
    state_error,
    ticket_of,
    vllm_of,
    with_flipped_bit,
)

from actors.state_slab import UNWRITTEN
from r2m_async.errors import GenerationFailed, WeightMismatch
from r2m_async.models.loading import load_policy
from r2m_async.models.policy import group_feedback
from r2m_async.models.weights import named_weights


def step_until(condition, engine, *groups):
    """Returns between two steps of the engine, after the first that makes the condition true of the running groups."""
    while True:
        ended = any(group.done() for group in groups)
        if condition():
            return
        assert not ended, "a group ended first"
        driver_of(engine).rpc("r2m_settle")


def written(engine):
    """[blocks, sequences]: states that the engine has written so far."""
    return (slab_of(engine).versions != UNWRITTEN).sum(-1)


def all_have(engine, num_rows):
    return lambda: bool((written(engine).min(1).values >= num_rows).any())


def one_has_ended(engine):
    """Some sequence of a group stands still while another goes on."""

    def condition():
        rows = written(engine)
        busy = rows[rows.max(1).values.argmax()]
        return bool(busy.min() > 0 and busy.max() - busy.min() >= 20)

    return condition


def token_that_ends_one(whole):
    """A token that stands in the middle of one response and in no other before its end; the last such response's."""
    responses = [one.token_ids[one.prompt_len :].tolist() for one in whole.trajectories]
    for response in reversed(responses):
        for token in response[50:300]:
            holders = [other for other in responses if token in other[:600]]
            if len(holders) == 1 and holders[0].index(token) >= 50:
                return token
    raise AssertionError("all responses draw the same tokens")


# New weights


@pytest.fixture(scope="module")
def flying(checkpoint):
    """(engine, its first model, config): one engine in its own process, for all tests that need one."""
    config = config_of(
        checkpoint("llama", endless=True, spread=6.0),
        1,
        max_prompt_tokens=80,
        max_new_tokens=900,
        concurrent_groups=3,
        in_flight_updates=True,
    )
    with running(config, twin=False) as engine:
        yield engine, load_policy(config.model.policy, config), config


def generate_across_an_update(engine, old, new):
    """A group of version 1 that version 2 overtakes; its prompt is long enough for siblings to share."""
    engine.load(named_weights(old, 1, probe=True))
    clear_slab(engine)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(engine.generate, ticket_of(0, prompt_tokens=70))
        step_until(all_have(engine, 270), engine, future)
        engine.load(named_weights(new, 2, probe=True))
        assert not future.done(), "the update was too late to be in flight"
        return future.result()


def assert_updated_in_flight(whole, feedback, old, new, config):
    for one in whole.trajectories:
        versions = one.policy_versions[one.prompt_len :]
        boundary = int((versions == 1).sum())
        assert 0 < boundary < len(versions)
        assert versions.tolist() == [1] * boundary + [2] * (len(versions) - boundary)
        assert logprob_error(old, [one], config, slice(0, boundary)) < 1e-4
        assert logprob_error(new, [one], config, slice(boundary, None)) < 1e-4
        assert logprob_error(old, [one], config, slice(boundary, None)) > 0.1
    assert whole.oldest_version == 1
    assert state_error(new, whole, feedback, config) < 1e-4
    assert feedback.policy_version == 2


@pytest.mark.ring
def test_in_flight_weights_recompute_the_caches_and_every_token_knows_who_sampled_it(flying):
    engine, old, config = flying
    new = perturbed(old)
    assert_updated_in_flight(*generate_across_an_update(engine, old, new), old, new, config)


@pytest.mark.ring
def test_a_stale_cache_is_kept_where_asked_for_and_the_states_are_labelled_old(flying, monkeypatch):
    engine, old, config = flying
    new = perturbed(old)
    monkeypatch.setattr(engine, "_config", config.rollouts(keep_stale_cache=True))
    whole, feedback = generate_across_an_update(engine, old, new)
    theirs = group_feedback(old, whole, config, 1)
    for one, states, olds in zip(whole.trajectories, feedback.hidden_states, theirs.hidden_states, strict=True):
        boundary = int((one.policy_versions == 1).sum())
        assert 0 < boundary < one.num_response_tokens
        assert logprob_error(old, [one], config, slice(0, boundary)) < 1e-4
        assert logprob_error(new, [one], config, slice(boundary, None)) > 0.01
        last = one.prompt_len + boundary - 1  # its state chose the first token of the new policy
        assert (states[:last] - olds[:last]).abs().max() < 1e-4
        assert (states[last:] - olds[last:]).abs().max() > 0.1
    assert feedback.policy_version == 1


@pytest.mark.ring
def test_an_engine_in_its_own_process_refuses_corrupted_weights_and_takes_good_ones_after(flying):
    engine, model, config = flying
    weights = with_flipped_bit(named_weights(model, 5, probe=True), "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(WeightMismatch, match=r"version 5\b.*model.layers.1.mlp.down_proj.weight did not arrive"):
        engine.load(weights)
    engine.load(named_weights(model, 6, probe=True))
    assert_exact(model, engine.generate(ticket_of(10)), config)


@pytest.mark.ring
def test_concurrent_groups_of_an_engine_in_its_own_process_do_not_mix(flying):
    engine, model, config = flying
    engine.load(named_weights(model, 3, probe=True))
    tickets = [ticket_of(group_id, 3 + group_id % 9) for group_id in range(20, 27)]
    results = generate_at_once(engine, tickets, num_threads=4)
    for ticket, result in zip(tickets, results, strict=True):
        assert result[0].ticket == ticket
        assert_exact(model, result, config)
        assert result[1].policy_version == 3
    assert num_free_blocks(engine) == 3


# Aborts


@pytest.fixture(params=["in this process", pytest.param("in its own", marks=pytest.mark.cross)])
def either(request, checkpoint):
    """(engine, model, config) of both kinds of driver, endless responses."""
    if request.param == "in its own":
        engine, model, config = request.getfixturevalue("flying")
        engine.load(named_weights(model, 4, probe=True))
        yield engine, model, config
        return
    config = config_of(checkpoint("llama", endless=True, spread=6.0), max_new_tokens=900, concurrent_groups=3)
    model = load_policy(config.model.policy, config)
    with running(config, twin=False, model=model, version=4) as engine:
        yield engine, model, config


@pytest.mark.ring
def test_an_abort_ends_the_group_and_keeps_what_had_ended_by_itself(either, monkeypatch):
    engine, model, config = either
    end = token_that_ends_one(engine.generate(ticket_of(40, attempt=9))[0])
    monkeypatch.setattr(engine, "_eos_ids", [end])
    clear_slab(engine)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(engine.generate, ticket_of(40))
        step_until(one_has_ended(engine), engine, future)
        engine.abort(40, 0)
        whole, feedback = future.result()
    reasons = Counter(one.finish_reason for one in whole.trajectories)
    assert set(reasons) == {"stop", "abort"}
    for one in whole.trajectories:
        assert (one.token_ids[-1] == end) == (one.finish_reason == "stop")
        assert one.policy_versions[one.prompt_len :].eq(4).all()
        assert 0 < one.num_response_tokens < 900
    assert logprob_error(model, whole.trajectories, config) < 1e-4
    assert len(feedback.hidden_states) == reasons["stop"]
    assert state_error(model, whole, feedback, config) < 1e-4
    monkeypatch.undo()
    assert_exact(model, engine.generate(ticket_of(40, attempt=1)), config)
    assert num_free_blocks(engine) == 3


@pytest.mark.ring
def test_a_request_that_vllm_ends_by_itself_fails_its_group_and_the_next_attempt_is_whole(flying):
    engine, model, config = flying
    engine.load(named_weights(model, 4, probe=True))
    clear_slab(engine)
    driver = driver_of(engine)
    with ThreadPoolExecutor(1) as pool:
        group = pool.submit(engine.generate, ticket_of(45))
        step_until(all_have(engine, 30), engine, group)
        driver._run(vllm_of(engine).abort(["45.0"]))
        with pytest.raises(GenerationFailed, match=r"vLLM ended request 45\.0 by itself.*'abort'"):
            group.result()
    assert_exact(model, engine.generate(ticket_of(45, attempt=1)), config)
    assert num_free_blocks(engine) == 3


@pytest.mark.ring
def test_an_abort_of_one_group_leaves_the_others_running(either):
    engine, model, config = either
    clear_slab(engine)
    with ThreadPoolExecutor(2) as pool:
        doomed, other = (pool.submit(engine.generate, ticket_of(group_id)) for group_id in (50, 51))
        step_until(lambda: bool((written(engine).min(1).values > 30).sum() == 2), engine, doomed, other)
        engine.abort(50, 0)
        whole, feedback = doomed.result()
        assert not other.done()
        assert {one.finish_reason for one in whole.trajectories} == {"abort"}
        assert feedback is None
        assert_exact(model, other.result(), config)


@pytest.mark.ring
def test_an_abort_that_comes_before_generate_is_honoured_for_that_attempt_only(either):
    engine, model, config = either
    engine.abort(60, 0)
    whole, feedback = engine.generate(ticket_of(60))
    assert {one.finish_reason for one in whole.trajectories} == {"abort"}
    assert whole.finished().trajectories == () and feedback is None
    assert_exact(model, engine.generate(ticket_of(60, attempt=1)), config)


@pytest.mark.ring
def test_aborts_are_forgotten_with_their_requests_and_of_those_that_never_come_the_newest_are_kept(either, monkeypatch):
    engine, model, config = either
    driver = driver_of(engine)
    driver._aborted.forget([f"{group_id}.0" for group_id in range(1000)])
    before = len(driver._aborted)
    for group_id in range(200, 206):
        engine.abort(group_id, 0)
    for group_id in range(200, 206):
        engine.generate(ticket_of(group_id))
    with ThreadPoolExecutor(1) as pool:
        clear_slab(engine)
        running = pool.submit(engine.generate, ticket_of(206))
        step_until(all_have(engine, 6), engine, running)
        engine.abort(206, 0)
        running.result()
    left = [name for name in (f"{group_id}.0" for group_id in range(200, 207)) if name in driver._aborted]
    assert left == []
    monkeypatch.setattr(driver._aborted, "LIMIT", before + 20)
    for attempt in range(50):  # of groups that are over, or whose attempt was lost on its way
        engine.abort(206, attempt)
    assert len(driver._aborted) == before + 20
    whole, _ = engine.generate(ticket_of(206, attempt=49))
    assert {one.finish_reason for one in whole.trajectories} == {"abort"}
    driver._aborted.forget([f"206.{attempt}{twin}" for attempt in range(50) for twin in ("", ".greedy")])
    assert_exact(model, engine.generate(ticket_of(206)), config)


@pytest.mark.ring
def test_an_abort_that_comes_while_generate_is_starting_is_honoured(either, monkeypatch):
    engine, _, _ = either
    generate = driver_of(engine).generate

    def overtaken(*args, **kwargs):
        engine.abort(70, 0)
        return generate(*args, **kwargs)

    monkeypatch.setattr(driver_of(engine), "generate", overtaken)
    whole, feedback = engine.generate(ticket_of(70))
    assert {one.finish_reason for one in whole.trajectories} == {"abort"}
    assert feedback is None


@pytest.mark.ring
def test_an_abort_that_comes_while_vllm_takes_the_request_in_is_honoured(flying, monkeypatch):
    engine, _, _ = flying
    processor = vllm_of(engine).input_processor
    take_in = processor.process_inputs_async

    async def overtaken(*args, **kwargs):
        abort = asyncio.ensure_future(asyncio.to_thread(engine.abort, 71, 0))
        await asyncio.wait([abort], timeout=1)  # it may wait for the request to end
        return await take_in(*args, **kwargs)

    monkeypatch.setattr(processor, "process_inputs_async", overtaken)
    whole, feedback = engine.generate(ticket_of(71))
    assert {one.finish_reason for one in whole.trajectories} == {"abort"}
    assert feedback is None


@pytest.mark.ring
def test_nothing_is_written_into_a_block_once_its_aborted_group_is_back(flying):
    """Else the next group of the block could find its prompt's states written, by another group."""
    engine, model, _ = flying
    engine.load(named_weights(model, 4, probe=True))
    (core,) = (child for child in multiprocessing.active_children() if child.name.startswith("EngineCore"))
    for group_id in range(80, 88):
        clear_slab(engine)
        with ThreadPoolExecutor(2) as pool:
            future = pool.submit(engine.generate, ticket_of(group_id))
            step_until(all_have(engine, 20), engine, future)
            os.kill(core.pid, signal.SIGSTOP)  # most likely in the middle of a step
            try:
                pool.submit(engine.abort, group_id, 0)
                wait([future], timeout=0.2)  # must not be back, or must have left no step unfinished
                before = written(engine)
            finally:
                os.kill(core.pid, signal.SIGCONT)
            came_back = future.done()
            future.result()
        if not came_back:
            before = written(engine)
        driver_of(engine).set_weight_version("4")  # comes between two steps
        assert torch.equal(before, written(engine)), f"in round {group_id - 80}"


@pytest.mark.ring
def test_a_group_whose_twin_was_aborted_has_no_feedback(checkpoint):
    config = config_of(checkpoint("llama", endless=True, spread=6.0), max_new_tokens=900)
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        engine._eos_ids = [token_that_ends_one(engine.generate(ticket_of(40, attempt=9))[0])]
        clear_slab(engine)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(engine.generate, ticket_of(40))
            step_until(one_has_ended(engine), engine, future)
            engine.abort(40, 0)
            whole, feedback = future.result()
    assert "stop" in {one.finish_reason for one in whole.trajectories}
    assert whole.greedy.finish_reason == "abort"
    assert whole.finished().trajectories == () and feedback is None
