"""The ring on Ray: the claims of exactness, staleness, overlap and survival, on real processes."""

import asyncio
import gc
import os
import signal
import time

import pytest
import ray
from rings import assert_same_bits, record_groups

from actors.group_journal import read_journal
from r2m_async import reference
from r2m_async.errors import FunctionFailed, StageLost
from r2m_async.launch.ring import Ring
from r2m_async.ring.stages import QueueStage

pytestmark = [pytest.mark.ring, pytest.mark.usefixtures("ray_session")]


def kill_one_rollout_actor(ring):
    """SIGKILL, while it generates."""

    async def kill():
        rollouts, asked = ring.controller.stages.rollouts, asyncio.Event()
        for stage in rollouts:
            stage.carrier.call = telling(stage.carrier.call, asked)
        if not ring.controller.schedule.in_flight():
            await asked.wait()
        worker = next(iter(ring.controller.schedule.in_flight().values()))
        stage = next(stage for stage in rollouts if stage.name == worker)
        os.kill(await stage.carrier.pid(), signal.SIGKILL)

    ring._run(kill())


def telling(call, asked):
    """The call of a stage, that sets `asked` once the stage is to generate."""

    async def listen(method, *args):
        if method.name == "generate":
            asked.set()
        return await call(method, *args)

    return listen


@pytest.mark.parametrize("num_actors", [pytest.param(1, marks=pytest.mark.cross), 3])
def test_with_both_bounds_zero_twenty_steps_on_ray_are_the_references_bit_for_bit(tiny_config, num_actors):
    config = tiny_config.run(num_steps=20).rollouts(num_actors=num_actors)
    with Ring.of(config) as ring:
        seen = record_groups(ring)
        while not ring.finished:
            ring.step()
        ring.drain()
        assert_same_bits(ring, reference.train(config), seen)


def test_an_asynchronous_exact_run_survives_kill_minus_9_with_the_same_bits(tiny_config):
    config = tiny_config.run(num_steps=20).rollouts(num_actors=3)
    config = config.scheduling(max_policy_age=2, max_head_age=1, lag="exact")
    with Ring.of(config) as ring:
        seen = record_groups(ring)
        for step in range(20):
            if step in (5, 11):
                kill_one_rollout_actor(ring)
            metrics = ring.step()
            assert metrics["age/policy_max"] == min(step, 2) and metrics["age/head"] == min(step, 1)
        ring.drain()
        schedule = ring.controller.schedule
        assert schedule.reissued["actor_died"] >= 1
        assert schedule.policy_ledger.trained == schedule.head_ledger.trained == 40 == schedule.policy_ledger.admitted
        assert_same_bits(ring, reference.train(config), seen)


def kill_the_queue(ring):
    os.kill(ring.process_ids()["queue"][0], signal.SIGKILL)


def in_object_store():
    """The bytes that are in Ray's object store."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    reply = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address))
    return reply.store_stats.object_store_bytes_used


def balanced(ring, num_groups):
    """Whether each group was trained once, and nothing of it is left in the queue."""
    schedule = ring.controller.schedule
    schedule.audit()
    ledgers = schedule.policy_ledger, schedule.head_ledger
    all_trained = all(one.trained == one.admitted == num_groups and not one.voided for one in ledgers)
    return all_trained and not ring._run(ring.controller.stages.queue.carrier.call(QueueStage.methods()["free"], ()))[0]


def settled_object_store() -> int:
    """The bytes in Ray's object store once it has freed what tests before have left: they stay the same for two seconds."""
    gc.collect()
    since, held = time.monotonic(), in_object_store()
    while time.monotonic() - since < 2:
        time.sleep(0.1)
        if (now := in_object_store()) != held:
            since, held = time.monotonic(), now
    return held


@pytest.mark.parametrize("lag", ["exact", "bounded"])
def test_the_queue_is_killed_and_comes_back_with_all_that_it_held(tiny_config, tmp_path, lag):
    """In exact mode the same bits come out. Nothing is generated again, and nothing stays in Ray's object store."""
    config = tiny_config.run(num_steps=12).rollouts(num_actors=2)
    config = config.scheduling(max_policy_age=2, max_head_age=1, lag=lag)
    before = settled_object_store()
    with Ring.of(config, journals=tmp_path) as ring:
        seen = record_groups(ring)
        killed, most = [], 0
        while not ring.finished:
            metrics = ring.step()
            most = max(most, in_object_store())
            assert metrics["age/policy_max"] <= 2 and metrics["age/head"] <= 1
            if metrics["step"] == 3:
                ring.save(tmp_path / "checkpoint")
            if metrics["step"] in (1, 4, 8):
                killed += ring.process_ids()["queue"]
                kill_the_queue(ring)
        ring.drain()
        assert metrics["restarts/queue"] == 3 and metrics["ledger/reissued"] == 0
        assert len({*killed, *ring.process_ids()["queue"]}) == 4
        assert balanced(ring, 24)
        assert not ring.controller._queue._held
        if lag == "exact":
            assert_same_bits(ring, reference.train(config), seen)
        assert most > before
    del ring
    gc.collect()
    for _ in range(300):  # Ray frees what nobody refers to in its own time
        if (left := in_object_store()) <= before:
            break
        time.sleep(0.1)
    assert left <= before, f"{left - before} bytes stay in Ray's object store"
    [journal] = tmp_path.glob("*.groups")
    records = list(read_journal(journal))
    assert not [one for one in records if isinstance(one, str)], "no part of a record"
    kept = [one[0]["group_id"] for one in records]
    assert len(set(kept)) == len(kept) > 0


def test_a_checkpoint_resumes_an_exact_run_bit_for_bit(tiny_config, tmp_path):
    config = tiny_config.run(num_steps=6).scheduling(max_policy_age=2, max_head_age=1, lag="exact")
    with Ring.of(config) as ring:
        for _ in range(3):
            ring.step()
        ring.save(tmp_path / "checkpoint")
    with Ring.of(config, resume=tmp_path / "checkpoint") as ring:
        while not ring.finished:
            assert ring.step()["step"] > 3
        ring.drain()
        assert_same_bits(ring, reference.train(config))


def test_bounded_lag_overlaps_stages_survives_a_kill_and_never_exceeds_its_bounds(tiny_config):
    config = tiny_config.run(num_steps=12).rollouts(num_actors=2, max_new_tokens=24)
    config = config.scheduling(max_policy_age=2, max_head_age=1)
    with Ring.of(config) as ring:
        ages = []
        while not ring.finished:
            if len(ages) == 6:
                kill_one_rollout_actor(ring)
            metrics = ring.step()
            ages.append((metrics["age/policy_max"], metrics["age/head"]))
        ring.drain()
        trace, ledger = ring.controller.metrics.trace, ring.controller.schedule.policy_ledger
    assert ledger.admitted == ledger.trained == 24, "a killed actor's groups are generated again"
    assert max(policy for policy, _ in ages) <= 2 and max(head for _, head in ages) <= 1
    assert max(policy for policy, _ in ages) >= 1, "nothing was generated ahead"
    generating = [interval for interval in trace if interval.method == "generate"]
    training = [interval for interval in trace if interval.method == "train"]
    overlaps = [g for g in generating for t in training if g.start < t.end and t.start < g.end]
    assert any(g.step > t.step for g in generating for t in training if g.start < t.end and t.start < g.end), overlaps
    copying = {interval.step: interval for interval in trace if interval.method == "weights"}
    assert copying.keys() == set(range(13))
    assert all(copying[t.step].end <= t.start for t in training), "a version is whole before the next step changes it"


def test_late_groups_are_cut_in_their_process_and_the_ledger_balances(tiny_config):
    config = tiny_config.run(num_steps=4).rollouts(num_actors=1, max_new_tokens=230, prompts_per_step=2)
    config = config.scheduling(overage="mask", overage_after=0.05)
    with Ring.of(config) as ring:
        while not ring.finished:
            ring.step()
        ring.drain()
        ledger = ring.controller.schedule.policy_ledger
        assert ledger.admitted == 8 == ledger.trained + ledger.voided.total()
        assert ledger.voided["overage"] >= 1, (
            "one actor writes the second group after the first, 230 tokens in more than 0.05 s"
        )


def test_a_dead_learner_ends_the_run_by_its_name_instead_of_hanging(tiny_config):
    with Ring.of(tiny_config.run(num_steps=50)) as ring:
        ring.step()
        os.kill(ring.process_ids()["policy-learner"][0], signal.SIGKILL)
        with pytest.raises(StageLost, match="policy-learner was lost"):
            while True:
                ring.step()


def test_a_ring_with_a_rollout_function_survives_kill_minus_9_with_the_same_bits(tiny_config):
    config = tiny_config.run(num_steps=6).rollouts(num_actors=2, function="plays:mixed", max_new_tokens=12)
    with Ring.of(config) as ring:
        seen = record_groups(ring)
        for step in range(6):
            if step in (2, 4):
                kill_one_rollout_actor(ring)
            assert ring.step()["length/turns"] > 0
        ring.drain()
        assert ring.controller.schedule.reissued["actor_died"] >= 1
        assert_same_bits(ring, reference.train(config), seen)


def test_a_rollout_function_that_fails_on_ray_is_told_of_with_the_users_traceback(tiny_config):
    config = tiny_config.rollouts(function="plays:raises")
    with (
        pytest.raises(
            FunctionFailed,
            match=r"(?s)^step 0, group \d .*response 0: rollouts.function 'plays:raises' raised KeyError.*, in raises",
        ) as failed,
        Ring.of(config) as ring,
    ):
        ring.step()
    assert "ray" not in str(failed.value).lower().replace("array", "")
