"""Several groups in one vLLM engine at once, and a group that fails."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from engines import (
    CACHE_BLOCK_BYTES,
    assert_exact,
    config_of,
    generate_at_once,
    num_free_blocks,
    running,
    scheduled,
    ticket_of,
    vllm_of,
)

from r2m_async.models.loading import load_policy
from r2m_async.models.weights import named_weights


def groups_of(plan):
    """Group ids whose requests take part in a step; vLLM names them `[child_]group.attempt[.greedy]-random`."""
    return {name.partition("-")[0].split("_")[-1].split(".")[0] for name in plan.num_scheduled_tokens}


@pytest.mark.ring
def test_concurrent_groups_share_steps_and_each_gets_its_own_states(checkpoint):
    """Chunks, cached prefixes, preemption and prompts of different length, all at once; more groups than blocks."""
    options = {
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 24,
        "kv_cache_memory_bytes": 20 * CACHE_BLOCK_BYTES,
    }
    config = config_of(
        checkpoint(), max_prompt_tokens=80, max_new_tokens=60, concurrent_groups=3, engine_options=options
    )
    model = load_policy(config.model.policy, config)
    tickets = [ticket_of(group_id, (5, 70, 33, 64)[group_id % 4]) for group_id in range(12)]
    with running(config, model=model) as engine:
        plans = scheduled(engine)
        results = generate_at_once(engine, tickets, num_threads=4)
        assert num_free_blocks(engine) == 3, "blocks were not returned"
        engine.generate(ticket_of(99))
        worker = vllm_of(engine).model_executor.driver_worker.worker
        assert len(worker._sequences) <= 4, "requests that ended long ago are not forgotten"
    for ticket, result in zip(tickets, results, strict=True):
        assert result[0].ticket == ticket
        assert result[1].group_id == ticket.group_id
        assert_exact(model, result, config)
    mixed = [len(groups_of(plan)) for plan in plans]
    assert max(mixed) == 3, "groups were generated one after the other"
    assert sum(count >= 2 for count in mixed) > len(mixed) / 4


class Barging:
    """A lock as unfair as Python's may be: whoever waits looks again only now and then."""

    def __init__(self, lock):
        self._lock = lock

    def acquire(self):
        while not self._lock.acquire(blocking=False):
            time.sleep(0.02)

    def release(self):
        self._lock.release()

    def __enter__(self):
        self.acquire()

    def __exit__(self, *_):
        self.release()


@pytest.mark.ring
def test_an_engine_in_this_process_serves_others_between_the_steps_of_a_group(checkpoint, monkeypatch):
    """Aborts and weights get their turn within some steps, not when the group that steps has ended."""
    import actors.vllm_drivers

    config = config_of(
        checkpoint(endless=True, spread=6.0), max_new_tokens=600, concurrent_groups=2, in_flight_updates=True
    )
    weights, reached = named_weights(load_policy(config.model.policy, config), 1), threading.Event()
    unfair = {"Lock": lambda: Barging(threading.Lock()), "RLock": lambda: Barging(threading.RLock())}
    monkeypatch.setattr(actors.vllm_drivers, "threading", SimpleNamespace(**(vars(threading) | unfair)))
    with running(config) as engine, ThreadPoolExecutor(1) as pool:
        plans = scheduled(engine, 30, reached)
        for group_id in range(4):
            plans.clear()
            reached.clear()
            group = pool.submit(engine.generate, ticket_of(group_id))
            assert reached.wait(60)
            before = len(plans)
            engine.abort(group_id, 0) if group_id % 2 else engine.load(weights)
            assert len(plans) - before < 100
            engine.abort(group_id, 0)
            group.result()


@pytest.mark.ring
def test_a_failed_group_gives_its_block_back_and_the_engine_goes_on(checkpoint):
    config = config_of(checkpoint())
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        with pytest.raises(Exception, match="maximum context length is 32 tokens"):
            engine.generate(ticket_of(0, prompt_tokens=200))
        assert num_free_blocks(engine) == 1
        assert_exact(model, engine.generate(ticket_of(1)), config)
