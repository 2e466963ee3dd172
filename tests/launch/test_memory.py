"""What `r2m check` says of memory, ages and disk, against what is measured."""

import dataclasses
import re
import shutil
from collections import namedtuple

import pytest

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.memory import (
    REMEDIES,
    Process,
    Shape,
    activation_bytes,
    checkpoint_bytes,
    classifier_shape,
    critic_shape,
    lacking,
    language_model_shape,
    microbatch_tokens,
    processes,
    state_bytes,
    training_parts,
)
from r2m_async.launch.preflight import disk, effective_policy_age, hardware, told_memory, versions
from r2m_async.launch.workload import worst_group_bytes
from r2m_async.ring.simulator import SimulatedStage, StageTimes, plan_without_models, run_virtually, simulate
from r2m_async.ring.stages import Stages, local_bytes

SIZES = {"layers": 1, "width": 8, "inner": 16, "queries": 8, "keys": 8, "vocabulary": 50}
SHAPE = Shape(parameters=1000, adapters=0, trained=1000, head=0, **SIZES)
FACTOR = 2.0
"""How far `activation_bytes` may be from what a pass keeps, as docs/check.md says."""


def stages_of(config, times: StageTimes, group_bytes: int) -> Stages:
    """Stages that let time pass, whose groups have a size."""

    def stage(name: str) -> SimulatedStage:
        return SimulatedStage(name, lambda method: getattr(times, method, 0.0), group_bytes=group_bytes)

    return Stages.carried_by(
        rollouts=tuple(stage(f"rollout-{index}") for index in range(config.rollouts.num_actors)),
        queue=stage("queue"),
        annotators=(stage("annotator-0"),),
        policy=stage("policy-learner"),
        head=stage("head-learner"),
        **local_bytes(),
    )


def full_length(config):
    """A trajectory that is as long as the config allows."""
    import torch

    from r2m_async.trajectories import Trajectory

    prompt, new = config.rollouts.max_prompt_tokens, config.rollouts.max_new_tokens
    return Trajectory(
        token_ids=torch.arange(prompt + new) % 50,
        prompt_len=prompt,
        behaviour_logprobs=torch.zeros(prompt + new),
        policy_versions=torch.zeros(prompt + new, dtype=torch.int32),
        finish_reason="length",
        text="",
    )


def kept_by(backend, config, rows: int) -> int:
    """Bytes that autograd keeps of a pass over `rows` trajectories of full length, weights left out; leaves gradients."""
    import torch

    from r2m_async.models.policy import logprobs_and_states

    weights = {p.untyped_storage().data_ptr() for p in backend.policy.parameters()}
    kept: dict[int, int] = {}
    alive = []  # or the allocator would give one address to two tensors

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs_BT, _ = logprobs_and_states(backend.policy, [full_length(config)] * rows, temperature=1.0)
    backend.backward(logprobs_BT.sum(), last=True)
    return sum(kept.values())


def measured(backend, backward) -> dict[str, int]:
    """Bytes of the tensors of a backend, when it has gradients and after a step with them. backward: makes the gradients."""
    backward()
    backend._masters.take_gradients()
    found = {
        "weights": sum(one.nbytes for one in backend.policy.parameters()),
        "gradients": sum(one.grad.nbytes for one in backend._masters.tensors if one.grad is not None),
    }
    backward()  # the step takes the gradients itself
    assert backend.step(1e-3) > 0
    moments = [value for one in backend._optimizer.state.values() for name, value in one.items() if name != "step"]
    return found | {"optimizer": sum(one.nbytes for one in (*moments, *backend._masters.copies))}


CHANGES = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "lora": {"lora": {"rank": 4}},
    "lora_bfloat16": {"lora": {"rank": 4}, "dtype": "bfloat16"},
}


@pytest.mark.models
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_weights_gradients_and_optimizer_are_exactly_what_the_torch_backend_takes(tiny_config, changes):
    from learners.torch_backend import TorchBackend
    from r2m_async.models.critic import load_critic, response_values
    from r2m_async.models.loading import load_policy

    config = tiny_config.model(**changes)
    backend = TorchBackend(load_policy(config.model.policy, config), None, config)
    shape = language_model_shape("model.policy", config.model.policy, config)
    assert (measured(backend, lambda: kept_by(backend, config, rows=1)), {}) == training_parts(shape, config)
    critic = TorchBackend(load_critic(config.model.policy, config), None, config)

    def backward():
        critic.backward(response_values(critic.policy, [full_length(config)]).sum(), last=True)

    assert (measured(critic, backward), {}) == training_parts(critic_shape(config.model.policy, config), config)


@pytest.mark.models
def test_activations_are_within_the_factor_that_is_stated(tiny_config):
    from learners.torch_backend import TorchBackend
    from r2m_async.models.loading import load_policy

    for config in (tiny_config, tiny_config.model(dtype="bfloat16")):
        backend = TorchBackend(load_policy(config.model.policy, config), None, config)
        shape = language_model_shape("model.policy", config.model.policy, config)
        tokens = 6 * (config.rollouts.max_prompt_tokens + config.rollouts.max_new_tokens)
        assert microbatch_tokens(config) == tokens
        itemsize = 4 if config.model.dtype == "float32" else 2
        ratio = activation_bytes(shape, tokens, itemsize, False) / kept_by(backend, config, rows=6)
        assert 1 / FACTOR <= ratio <= FACTOR


@pytest.mark.models
def test_states_and_the_cache_of_keys_and_values_are_exactly_what_full_responses_take(tiny_config):
    import torch

    from r2m_async.models.loading import load_policy
    from r2m_async.models.policy import feedback_states, logprobs_and_states

    config = tiny_config.model(dtype="bfloat16")
    shape = language_model_shape("model.policy", config.model.policy, config)
    policy = load_policy(config.model.policy, config)
    with torch.no_grad():
        _, states = logprobs_and_states(policy, [full_length(config)] * 3, temperature=1.0)
        rows = torch.stack([full_length(config).token_ids] * 3)
        cache = policy(rows, use_cache=True).past_key_values
    assert sum(one.nbytes for one in feedback_states(states, config)) == state_bytes(config, shape, 3)
    found = {one.name: one for one in processes(config, shape, None, None, 1)}
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found["rollout"].parts["KV cache"] == kept
    assert found["rollout"].in_main["states"] == state_bytes(config, shape, 3)
    assert found["policy-learner"].in_main["states"] == state_bytes(config, shape, 6)
    assert state_bytes(config.head(variant="vanilla"), shape, 3) == 0


HEADS = {
    "r2m": {},
    "average": {"hold": "average"},
    "ensemble": {"ensemble": 3},
    "iterative_head": {"variant": "iterative_head"},
    "iterative_model": {"variant": "iterative_model", "ensemble": 2},
    "r2m_no_train": {"variant": "r2m_no_train"},
}


@pytest.mark.models
@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS)
def test_the_head_is_exactly_what_the_head_learner_keeps(tiny_config, changes):
    from learners.head_learner import HeadLearner
    from r2m_async.models.heads import build_head
    from r2m_async.models.reward import load_reward_model, scoring_head

    config = tiny_config.head(**changes)
    policy = language_model_shape("model.policy", config.model.policy, config)
    reward_model = classifier_shape(config.reward.model, config)
    loaded = load_reward_model(config.reward.model, config)
    head = build_head(scoring_head(loaded), reward_model.width, policy.width, config, loaded)
    learner = HeadLearner(head, config)
    own = {id(one): one.nbytes for one in head.parameters()}
    for one in head.parameters() if config.trains_head else ():
        one.grad = one.detach().clone()
    kept = {
        "head": sum(own.values()),
        "gradients": sum(one.grad.nbytes for one in head.parameters() if one.grad is not None),
    }
    if config.trains_head:
        learner._optimizer.step()
    moments = [value for one in learner._optimizer.state.values() for name, value in one.items() if name != "step"]
    kept["optimizer"] = sum(one.nbytes for one in moments)
    kept["moving average"] = sum(one.nbytes for one in learner._held.scoring.parameters() if id(one) not in own)
    [parts] = [one.parts for one in processes(config, policy, reward_model, None, 1) if one.name == "head-learner"]
    assert kept == {name: parts[name] for name in kept}


def test_a_group_of_full_length_takes_what_is_reserved_for_it_and_most_of_it():
    """All parts that a group ever has in the queue, encoded as they are there. Its states are wide, as real ones are."""
    import torch

    from r2m_async.codec import encode
    from r2m_async.trajectories import GroupRewards, PolicyFeedback, Prompt, RewardEmbeddings, Ticket, TrajectoryGroup

    config = R2MConfig().rollouts(max_prompt_tokens=40, max_new_tokens=30, group_size=4).model(dtype="bfloat16")
    width, reward_width = 2048, 1024
    prompt = Prompt(prompt_id="p" * 40, content="w" * 160, text="w" * 160, token_ids=tuple(range(40)))
    one = dataclasses.replace(full_length(config), text="w" * 120)
    states = torch.zeros(69, width, dtype=torch.bfloat16)
    ticket = Ticket(group_id=1, due_step=1, seed=1, attempt=0, prompt=prompt)
    feedback = PolicyFeedback(group_id=1, hidden_states=(states,) * 4, greedy=None, policy_version=1)
    four = torch.zeros(4)
    embedded = {"rte": torch.zeros(4, reward_width), "greedy_rte": None, "bonus": four, "greedy_bonus": None}
    rewards = GroupRewards(group_id=1, rewards=four, model_rewards=four, greedy_reward=None, head_version=1, omega=1.0)
    parts = (
        TrajectoryGroup(ticket=ticket, trajectories=(one,) * 4, greedy=None),
        feedback,
        feedback,  # as it is refreshed
        RewardEmbeddings(group_id=1, frozen_rewards=four, **embedded),
        rewards,
    )
    taken = sum(len(encode(part)) for part in parts)
    assert 0.9 < taken / worst_group_bytes(config, width, reward_width, greedy_twin=False) <= 1


@pytest.mark.ring
@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": "bfloat16", "reference_every": 1, "reference_mix": 0.5}],
    ids=["float32", "bfloat16_moving_reference"],
)
def test_a_checkpoint_takes_what_is_told_of_it(tiny_config, tmp_path, changes):
    from r2m_async.launch.ring import Ring

    config = tiny_config.model(**changes).run(num_steps=2).head(hold="average")
    policy = language_model_shape("model.policy", config.model.policy, config)
    told = checkpoint_bytes(config, policy, classifier_shape(config.reward.model, config), None)
    with Ring.of(config, in_process=True) as ring:
        ring.step()
        ring.step()
        ring.save(tmp_path / "saved")
    taken = sum(path.stat().st_size for path in (tmp_path / "saved").iterdir())
    names = 40_000  # those of the tensors, the config, and the counts
    assert told < taken < told + names


def test_what_deepspeed_shares_out_is_divided_by_its_ranks_and_what_is_offloaded_lies_in_main_memory():
    config = R2MConfig().learner(backend="deepspeed", num_ranks=4, zero_stage=2)
    assert training_parts(SHAPE, config) == ({"weights": 4000, "optimizer": 3000, "gradients": 1000}, {})
    assert training_parts(SHAPE, config.learner(zero_stage=3))[0]["weights"] == 1000
    assert training_parts(SHAPE, config.learner(zero_stage=0))[0]["optimizer"] == 8000
    offloaded = config.learner(zero_stage=3, offload="params")
    assert training_parts(SHAPE, offloaded) == (
        {"weights": 0, "optimizer": 0, "gradients": 1000},
        {"weights": 1000, "optimizer": 3000},
    )
    [learner] = [one for one in processes(offloaded, SHAPE, None, None, 1) if one.name == "policy-learner"]
    gpu, main = learner.split(on_gpu=True)
    assert "optimizer" not in gpu and main["reference"] == 1000
    assert learner.split(on_gpu=False)[1]["weights"] == 1000


def test_what_does_not_fit_is_told_with_what_to_change():
    parts = {"weights": 10 * 2**30, "activations": 30 * 2**30}
    big = Process(name="policy-learner", count=1, computes=True, parts=parts)
    small = Process(name="queue", count=1, computes=False, parts={"groups": 2**30})
    [told] = lacking([big, small], {"GPU": 24 * 2**30, "machine": 2 * 2**30}, gpus=1, share=1.0)
    assert told.startswith(
        "policy-learner needs 40.00 GiB and a GPU has 24.00 GiB: the most is activations of policy-learner; "
    )
    assert told.endswith(REMEDIES["activations"])
    assert lacking([big, small], {"GPU": 80 * 2**30, "machine": 2 * 2**30}, gpus=1, share=1.0) == []
    [told] = lacking([big, dataclasses.replace(big, name="rollout")], {"GPU": 60 * 2**30}, gpus=1, share=0.5)
    assert told.startswith("the processes on one GPU need 80.00 GiB and it has 60.00 GiB")
    [told] = lacking([big, small], {"machine": 2**30}, gpus=0, share=0.0)
    assert told.startswith("all processes need 41.00 GiB of main memory and the machine has 1.00 GiB")
    offloading = dataclasses.replace(big, in_main={"optimizer": 50 * 2**30})
    [told] = lacking([offloading, small], {"GPU": 80 * 2**30, "machine": 2**35}, gpus=1, share=1.0)
    assert told.startswith("all processes need 51.00 GiB of main memory") and told.endswith(REMEDIES["optimizer"])


def test_every_part_has_a_remedy_and_parts_of_the_same_process_are_told_on_a_gpu_and_in_main_memory():
    config = R2MConfig().labels(source="file", options={"path": "x"}, replay=1).learner(on_nonfinite="skip")
    config = config.head(hold="average", steering=0.1).scheduling(max_policy_age=1)
    models = SHAPE, dataclasses.replace(SHAPE, head=8), SHAPE
    found = processes(config, *models, 1000) + processes(
        config.rollouts(engine="vllm").weights(transport="gloo"), *models, 1000
    )
    assert {part for one in found for part in (*one.parts, *one.in_main)} == REMEDIES.keys()
    lines = list(told_memory(found, {}, 3, 1.0))
    assert lines[0].startswith("memory of 13 processes, without")
    assert any(line.startswith("  policy-learner, on a GPU: ") for line in lines)
    assert any(line.startswith("  policy-learner, in main memory: ") and "states" in line for line in lines)
    assert "--gpu-memory GIB" in lines[-1]


def test_versions_that_gloo_sends_are_staged_in_main_memory_and_others_on_the_gpu():
    direct = R2MConfig().rollouts(engine="vllm").scheduling(max_policy_age=1)
    for transport, on_gpu in (("gloo", False), ("nccl", True)):
        found = processes(direct.weights(transport=transport), SHAPE, dataclasses.replace(SHAPE, head=8), None, 1000)
        [learner] = [one for one in found if one.name == "policy-learner"]
        assert ("staged versions" in learner.parts) == on_gpu != ("staged versions" in learner.in_main)


@pytest.mark.parametrize("groups", [2, 3, 4, 5, 6, 20])
def test_no_group_gets_older_than_the_effective_policy_age_and_some_group_gets_that_old(groups):
    """The real schedule over stages that report groups of the largest size, under a learner that is slow."""
    config = R2MConfig().run(num_steps=12).scheduling(max_policy_age=3).rollouts(prompts_per_step=2, num_actors=2)
    config = config.queue(max_bytes=100 * groups)
    plan = dataclasses.replace(plan_without_models(config), max_bytes=100 * groups, group_bytes=100)
    results, _ = run_virtually(config, plan, stages_of(config, StageTimes(generate=0.01, train=5.0), 100))
    age, why = effective_policy_age(config, 100)
    assert max(result["age/policy_max"] for result in results) == age
    assert ("queue.max_bytes" in why) == (age < 3)


def test_a_short_run_limits_the_age_too():
    assert effective_policy_age(R2MConfig().run(num_steps=2).scheduling(max_policy_age=3), None) == (1, "run.num_steps")
    config = R2MConfig().scheduling(max_policy_age=3)
    assert effective_policy_age(config, None) == (3, "scheduling.max_policy_age")


def test_the_share_of_groups_that_are_discarded_is_predicted():
    config = R2MConfig().run(num_steps=20).rollouts(prompts_per_step=4, num_actors=4)
    config = config.scheduling(max_policy_age=1, overage="drop", overage_after=1.0)
    slow = StageTimes(generate=2.0, generate_spread=1.5, train=0.1)
    assert 0 < simulate(config, slow).discarded < 1
    assert simulate(config.scheduling(overage="wait"), slow).discarded == 0


def test_a_disk_without_room_for_the_checkpoints_is_told(monkeypatch, tmp_path):
    config = R2MConfig().run(output_dir=str(tmp_path / "not" / "there")).queue(journal=50).checkpoint(keep=2)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 0, 350))
    assert disk(config, 100) == (350, 350, None)
    free, needed, remedy = disk(config, 101)
    assert (free, needed) == (350, 353) and "lower checkpoint.keep or queue.journal" in remedy
    assert disk(config, None) == (350, None, None)
    (tmp_path / "file").touch()
    free, needed, remedy = disk(config.run(output_dir=str(tmp_path / "file" / "below")), 1)
    assert (free, needed) == (350, None) and f"nothing can be written below {tmp_path}/file: name another" in remedy


def test_the_gpus_are_those_that_are_named_those_that_are_here_or_one_for_each_process(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = R2MConfig()
    assert hardware(config, None, None)[0::2] == (0.0, 0)
    assert hardware(config, 2, 80.0)[0] == 0.5  # three processes
    assert hardware(config, 3, 80.0)[1]["GPU"] == 80 * 2**30
    assert hardware(config.run(device="cpu"), 3, 80.0)[0] == 0.0
    assert hardware(config.run(device="cuda"), None, None)[0] == 1.0
    with pytest.raises(ConfigError, match="--gpus is 0"):
        hardware(config.run(device="cuda"), 0, None)


def test_a_library_of_another_version_is_told(monkeypatch):
    import importlib.metadata

    assert versions()[0]["ray"] == importlib.metadata.version("ray")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["ray==1.0.*", "torch>=2"])
    [told] = versions()[1]
    assert re.match(r"ray \S+ is installed, and r2m-async takes ==1\.0\.\*: pip install 'ray==1\.0\.\*'", told)


def test_every_process_of_a_run_is_there_and_the_head_follows_from_eq_3():
    config = R2MConfig().head(width=16).rollouts(num_actors=2).reward(replicas=3)
    found = {one.name: one for one in processes(config, SHAPE, dataclasses.replace(SHAPE, head=8), None, 1000)}
    assert {name: one.count for name, one in found.items()} == {
        **{"policy-learner": 1, "rollout": 2, "annotator": 3},
        **{"head-learner": 1, "queue": 1, "object store": 1},
    }
    parameters = 8 + 4 * 16 * 8  # phi, and four matrices of 8 x 16
    states = 64 * 1023 * 8 * 4  # 64 responses of 1024 tokens, all of which but the last have 8 numbers in float32
    assert found["head-learner"].split(False)[1] == {
        **{"head": 4 * parameters, "gradients": 4 * parameters, "optimizer": 8 * parameters, "states": states}
    }
    steered = processes(config.head(steering=0.1), SHAPE, dataclasses.replace(SHAPE, head=8), None, 1000)
    assert steered[2].parts["steering"] == 4 * 8 * 4 * parameters
    labelled = config.labels(source="file", options={"path": "x"}, offline="embedded", offline_pairs=5, replay=3)
    held = {one.name: one.split(False)[1] for one in processes(labelled, SHAPE, SHAPE, None, 1000)}
    assert held["head-learner"]["states"] == states + 2 * (8 * 5 + 3 + 5) * 1023 * 8 * 4
    assert held["labeller"] == {"labelled pairs": (8 * 5 + 256) * 250}
    assert found["object store"].parts == {"published versions": 2 * 4000}
    exact = config.scheduling(lag="exact", max_policy_age=2)
    assert processes(exact, SHAPE, None, None, 1)[-1].parts == {"published versions": 4 * 4000}
    assert processes(config.model(lora={"rank": 2}), SHAPE, None, None, 1)[0].parts["reference"] == 0


@pytest.mark.models
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT-2", "Phi", "BLOOM", "OPT"])
def test_parameters_keys_and_values_are_those_of_other_families_too(name, tmp_path):
    import torch
    from families import benchmark
    from transformers import AutoModelForCausalLM

    path = str(benchmark.save_model(tmp_path, name, tied=True))
    model = AutoModelForCausalLM.from_pretrained(path)
    shape = language_model_shape("model.policy", path, R2MConfig())
    assert shape.parameters == sum(one.numel() for one in model.parameters())
    with torch.no_grad():
        cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kept == 3 * shape.layers * 2 * shape.keys * model.dtype.itemsize


@pytest.mark.models
def test_a_model_without_attention_has_no_keys(tmp_path):
    from transformers import MambaConfig

    MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=40).save_pretrained(tmp_path)
    shape = language_model_shape("model.policy", str(tmp_path), R2MConfig())
    assert (shape.keys, shape.queries, shape.inner) == (0, 0, 64)
