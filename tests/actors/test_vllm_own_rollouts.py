"""Rollout functions of the user's on vLLM: every token's writer, log-prob, version and state, in one process and across.

What the states and log-probs must be is computed by transformers.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import plays
import pytest
import torch
from engines import (
    BLOCK,
    assert_exact,
    clear_slab,
    driver_of,
    logprob_error,
    num_free_blocks,
    perturbed,
    running,
    slab_of,
    state_error,
    ticket_of,
)
from engines import config_of as single_turn_config
from rings import record_groups
from test_vllm_ring import in_one_process, reference_run, run_to_the_end, trained_groups

from actors.vllm_drivers import Completed
from actors.vllm_turns import GroupOfTurns
from r2m_async.errors import FunctionFailed
from r2m_async.launch.ring import Ring
from r2m_async.models.loading import load_policy
from r2m_async.models.plays import rollout_function
from r2m_async.models.turns import TurnRequest
from r2m_async.models.weights import named_weights

pytestmark = pytest.mark.ring


def config_of(path, age=0, function="mixed", **rollouts):
    return single_turn_config(path, age, **{"function": f"plays:{function}", "max_new_tokens": 30} | rollouts)


@pytest.fixture(scope="module", params=[pytest.param(0, marks=pytest.mark.cross), 1], ids=["in this process", "across"])
def shared(request, checkpoint):
    """An engine with its model, which tests give their function and limits: `playing`.

    Without staleness it runs in the test's process, else in its own. Other tests of vLLM stand for the first.
    """
    config = config_of(
        checkpoint(endless=True),
        request.param,
        "nothing",
        concurrent_groups=2,
        group_size=6,
        max_prompt_tokens=80,
        max_new_tokens=3000,
    )
    model = load_policy(config.model.policy, config)
    with running(config, model=model, version=4) as engine:
        yield engine, model, config


@pytest.fixture
def playing(shared):
    """`playing("mixed", ...)`: the shared engine, its model, and its config, with this function from here on."""
    engine, model, whole = shared

    def play(function, **rollouts):
        engine._config = whole.rollouts(**{"function": f"plays:{function}", "max_new_tokens": 30} | rollouts)
        engine._function = rollout_function(engine._config)
        return engine, model, engine._config

    yield play
    assert num_free_blocks(engine) == 2 and not engine._playing and not engine._aborts
    assert not engine._config.asynchronous or not driver_of(engine)._running


def test_every_token_has_the_state_and_each_of_the_policys_the_log_prob_of_transformers(playing):
    engine, model, config = playing("mixed")
    clear_slab(engine)
    # A prompt of several blocks: each turn but the first finds the tokens before it in the prefix cache.
    whole, feedback = engine.generate(ticket_of(0, prompt_tokens=2 * BLOCK + 6))
    assert_exact(model, (whole, feedback), config)
    again, _ = engine.generate(ticket_of(0, prompt_tokens=2 * BLOCK + 6, attempt=1))
    assert feedback.policy_version == 4
    for one in (*whole.trajectories, whole.greedy):
        assert one.policy_versions[one.written].unique().tolist() in ([4], [])
        assert (one.policy_versions[~one.written] == -1).all() and not one.behaviour_logprobs[~one.written].any()
    assert [one.num_turns for one in whole.trajectories] == [3, 1, 0] * 2
    if not config.asynchronous:
        for one, other in zip(whole.trajectories, again.trajectories, strict=True):
            assert torch.equal(one.token_ids, other.token_ids)


def test_a_stop_string_ends_a_turn_at_its_token_whatever_vllm_has_sampled_after_it(playing, monkeypatch):
    async def play(rollout):
        for _ in range(4):
            turn = await rollout.generate(stop=["e", "o", "i", "s"])  # most words have one
            plays.SEEN.append((rollout.index, turn))
            rollout.append(" one two")

    plays.SEEN.clear()
    monkeypatch.setattr(plays, "nothing", play)
    engine, model, config = playing("nothing", max_new_tokens=60)
    result = engine.generate(ticket_of(0))
    assert_exact(model, result, config)
    tokenizer = engine._tokenizer
    assert any(turn.stop for _, turn in plays.SEEN)
    for index, one in enumerate((*result[0].trajectories, result[0].greedy)):
        turns = [turn for of, turn in plays.SEEN if of == index]
        assert one.of_policy(one.token_ids).tolist() == [number for turn in turns for number in turn.token_ids]
        for turn in turns:
            assert not set("eois") & set(tokenizer.decode(turn.token_ids[:-1])), turn
            assert (turn.stop is None) == (not set("eois") & set(turn.text))


def test_versions_change_between_turns_and_within_them_and_feedback_is_as_old_as_its_oldest_state(
    checkpoint, monkeypatch
):
    """Weights come after the first turn of every response, in flight."""
    first, loaded = threading.Barrier(4), threading.Event()

    async def play(rollout):
        import asyncio

        await rollout.generate(max_new_tokens=5)
        rollout.append(" river stone")
        await asyncio.to_thread(first.wait)
        await asyncio.to_thread(loaded.wait)
        await rollout.generate(max_new_tokens=5)

    monkeypatch.setattr(plays, "nothing", play)
    config = config_of(checkpoint(endless=True), 1, "nothing", in_flight_updates=True)
    model = load_policy(config.model.policy, config)
    other = perturbed(model)
    with running(config, twin=False, model=model, version=2) as engine, ThreadPoolExecutor(1) as pool:
        made = pool.submit(engine.generate, ticket_of(0))
        first.wait(60)
        engine.load(named_weights(other, 3, probe=True))
        loaded.set()
        whole, feedback = made.result(60)
    for one in whole.trajectories:
        assert one.policy_versions[one.written].tolist() == [2] * 5 + [3] * 5 and one.oldest_version == 2
    # The second turn computed all before it anew, with the new weights.
    assert feedback.policy_version == 3 and state_error(other, whole, feedback, config) < 1e-4
    first_five, last_five = slice(0, 5), slice(5, 10)
    assert logprob_error(model, whole.trajectories, config, first_five) < 1e-4
    assert logprob_error(other, whole.trajectories, config, last_five) < 1e-4


def test_an_abort_ends_turns_and_waits_and_gives_the_block_back(playing):
    """Some responses wait in the function, and a turn of another group goes on."""
    plays.STARTED.clear()
    engine, *_ = playing("hangs")
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(engine.generate, ticket_of(80))  # an attempt that no other test makes: see `Aborted`
        assert plays.STARTED.wait(60)
        engine.abort(80, 0)
        whole, feedback = made.result(60)
        assert feedback is None and {one.finish_reason for one in whole.trajectories} == {"abort"}
        assert num_free_blocks(engine) == 2
        # An abort may come before its attempt.
        engine.abort(82, 3)
        early, _ = engine.generate(ticket_of(82, attempt=3))
        assert [one.num_response_tokens for one in early.trajectories] == [0] * 6


def test_an_abort_ends_a_turn_that_is_being_sampled(playing, monkeypatch):
    engine, model, config = playing("once", max_new_tokens=3000)
    with ThreadPoolExecutor(1) as pool:
        begun, start = threading.Event(), driver_of(engine).start
        with monkeypatch.context() as patch:
            patch.setattr(driver_of(engine), "start", lambda request, done: (begun.set(), start(request, done)))
            made = pool.submit(engine.generate, ticket_of(81))
            assert begun.wait(60)
            engine.abort(81, 0)
            whole, _ = made.result(60)
    assert all(one.finish_reason == "abort" and one.num_response_tokens < 3000 for one in whole.trajectories)
    engine, model, config = playing("once", max_new_tokens=8)
    assert_exact(model, engine.generate(ticket_of(1)), config)


def test_a_function_that_fails_leaves_no_request_and_no_block_behind(playing, monkeypatch):
    async def play(rollout):
        if rollout.index == 1:
            await rollout.generate(max_new_tokens=1)
            raise KeyError("mine")
        await rollout.generate()

    monkeypatch.setattr(plays, "nothing", play)
    engine, model, config = playing("nothing", max_new_tokens=2000)
    if config.asynchronous:
        with pytest.raises(FunctionFailed, match="response 1: rollouts.function 'plays:nothing' raised KeyError"):
            engine.generate(ticket_of(0))
        assert num_free_blocks(engine) == 2 and not engine._playing
        assert not driver_of(engine)._running
    engine, model, config = playing("once", max_new_tokens=8)
    assert_exact(model, engine.generate(ticket_of(1)), config)


@pytest.mark.parametrize("function", ["hangs", "blocks"])
def test_a_function_that_hangs_is_told_by_its_name_at_its_deadline_and_the_engine_goes_on(playing, function):
    for event in (plays.STARTED, plays.GO_ON):
        event.clear()
    engine, model, config = playing(function, function_timeout=0.5)
    standing = "it waits" if function == "hangs" else r"step \S+, group 0.*, response 0 holds the event loop"
    told = (
        rf"response \d: rollouts.function 'plays:{function}' took longer than rollouts.function_timeout 0.5 s, .*; {standing} at "
        rf"\S+plays.py:\d+; raise it, or see whether"
    )
    began = time.monotonic()
    with pytest.raises(FunctionFailed, match=told):
        engine.generate(ticket_of(0))
    assert plays.STARTED.is_set() and time.monotonic() - began < 20, "a turn of vLLM's and a second of last words"
    assert not engine._playing and not driver_of(engine)._running
    plays.GO_ON.set()
    engine, model, config = playing("once", function_timeout=60)
    assert_exact(model, engine.generate(ticket_of(1)), config)


def test_responses_that_an_environment_begins_alike_have_their_own_states(checkpoint):
    """Blocks of the same tokens, beyond the prompt: what one response found of another's would have no state here."""
    config = config_of(checkpoint(endless=True), function="reads_first", max_new_tokens=60)
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        assert_exact(model, engine.generate(ticket_of(0)), config)


def test_what_vllm_samples_after_a_stop_string_is_left_out_with_its_log_probs_and_versions(checkpoint):
    """vLLM may bring several tokens at once."""

    class Driver:
        def start(self, request, done):
            output = SimpleNamespace(
                token_ids=[5, 6, 7, 8],
                logprobs=[{number: SimpleNamespace(logprob=-float(number))} for number in (5, 6, 7, 8)],
                weight_versions=[
                    SimpleNamespace(start=0, end=1, version="2"),
                    SimpleNamespace(start=1, end=4, version="3"),
                ],
                finish_reason="length",
            )
            done(Completed(outputs={0: output}))

    turns = GroupOfTurns(
        driver=Driver(), name="0.0", first_sequence=None, eos_ids=[1], config=config_of(checkpoint()), version=lambda: 9
    )
    request = TurnRequest(
        response=0,
        turn=0,
        token_ids=(4, 4),
        num_before=0,
        max_new_tokens=4,
        seed=1,
        stop_in=lambda ids: "stop" if 6 in ids else None,
    )
    sampled = []
    turns.sample(request, sampled.append)
    (turn,) = sampled
    assert (turn.token_ids, turn.logprobs, turn.versions) == ([5, 6], [-5.0, -6.0], [2, 3])
    assert (turn.finish_reason, turn.stop) == ("stop", "stop")


def test_without_states_nothing_is_computed_but_the_turns(checkpoint):
    config = config_of(checkpoint(), function="writes_alone").feedback(source="learner")
    with running(config, model=load_policy(config.model.policy, config)) as engine:
        asked, generate = [], driver_of(engine).generate
        driver_of(engine).generate = lambda requests: asked.append(requests) or generate(requests)
        whole, feedback = engine.generate(ticket_of(0))
        assert feedback is None and slab_of(engine) is None and asked == []
        assert all(one.num_policy_tokens == 0 for one in whole.trajectories)


def test_a_synchronous_ring_on_vllm_is_the_references_bit_for_bit(vllm_config):
    config = vllm_config.run(num_steps=3).rollouts(function="plays:mixed", max_new_tokens=12)
    with in_one_process(config) as ring:
        seen = record_groups(ring)
        metrics = run_to_the_end(ring)
        ours = ring.policy_weights(), ring.learner_state("head")["weights"]
    expected = reference_run(config)
    assert list(seen["tokens"].values()) == expected.tokens and list(seen["rewards"].values()) == expected.rewards
    for one, other in zip(ours, (expected.policy, expected.head), strict=True):
        assert all(torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items())
    assert all(1 < step["length/turns"] < 3 for step in metrics)


@pytest.mark.usefixtures("ray_session")
def test_an_asynchronous_ring_on_ray_keeps_its_bounds_token_for_token(vllm_config):
    config = vllm_config.run(num_steps=5).scheduling(max_policy_age=1)
    config = config.rollouts(function="plays:in_turns", max_new_tokens=24, concurrent_groups=2, in_flight_updates=True)
    with Ring.of(config) as ring:
        groups = trained_groups(ring)
        metrics = run_to_the_end(ring)
    assert [step["length/turns"] for step in metrics] == pytest.approx([3.0] * 5, abs=1.5)
    for step, of_step in groups.items():
        for one in (one for group in of_step for one in group.trajectories):
            versions = one.of_policy(one.policy_versions)
            assert one.num_policy_tokens > 0 and ((step - versions) <= 1).all() and (versions <= step).all()
            assert (one.behaviour_logprobs[one.written] < 0).all()
