"""How the stages of a ring are made, in processes of their own under Ray or in this one. Alone knows actors and learners."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import actors
import learners
import r2m_async
from actors.replay_queue import ReplayQueue
from actors.reward_annotator import RewardAnnotator
from actors.rollout_actor import RolloutActor, RolloutEngine
from learners.critic import Critic
from learners.head_learner import HeadLearner
from learners.policy_learner import PolicyLearner
from learners.torch_backend import TorchBackend
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.ray_stages import Make, RayProcesses, ray_bytes
from r2m_async.launch.workload import Workload
from r2m_async.ring.stages import Carrier, LocalBatches, LocalCarrier, Stages, local_bytes

Launch: TypeAlias = Callable[[str, Make], Carrier]
"""Starts a stage, by its name and how it is made."""


def _stages(config: R2MConfig, launch: Launch, others: dict[str, Callable[..., Any]]) -> Stages:
    """`others`: what else `Stages` has."""
    rollouts, replicas = range(config.rollouts.num_actors), range(config.reward.replicas)
    return Stages.carried_by(
        rollouts=tuple(launch(f"rollout-{index}", _rollout_actor) for index in rollouts),
        queue=launch("queue", _replay_queue),
        annotators=tuple(launch(f"annotator-{index}", _reward_annotator) for index in replicas),
        policy=launch("policy-learner", _policy_learner),
        head=launch("head-learner", _head_learner),
        **others,
    )


def _replay_queue(config: R2MConfig, workload: Workload) -> ReplayQueue:
    return ReplayQueue()


def _rollout_actor(config: R2MConfig, workload: Workload) -> RolloutActor:
    import torch
    from transformers import AutoTokenizer

    tokenizer, twin = AutoTokenizer.from_pretrained(workload.policy), workload.estimator.needs_greedy
    if config.rollouts.engine == "vllm":
        from actors.vllm_engine import VLLMEngine

        engine: RolloutEngine = VLLMEngine(workload.policy, tokenizer, workload.policy_hidden_size, config, twin)
    else:
        from actors.transformers_engine import TransformersEngine
        from r2m_async.models.loading import load_policy

        engine = TransformersEngine(load_policy(workload.policy, config), tokenizer, config, twin)
    itemsize = getattr(torch, config.feedback_dtype).itemsize
    return RolloutActor(engine, workload.policy_hidden_size * itemsize * config.reads_feedback)


def _reward_annotator(config: R2MConfig, workload: Workload) -> RewardAnnotator:
    from transformers import AutoTokenizer

    from r2m_async.models.heads import build_head
    from r2m_async.models.reward import load_reward_model, scoring_head

    model = load_reward_model(workload.reward_model, config)
    head = build_head(scoring_head(model), workload.reward_hidden_size, workload.policy_hidden_size, config)
    return RewardAnnotator(model, AutoTokenizer.from_pretrained(workload.reward_model), head, config)


def _policy_learner(config: R2MConfig, workload: Workload) -> PolicyLearner:
    from r2m_async.models.critic import load_critic
    from r2m_async.models.loading import load_policy

    model = load_policy(workload.policy, config)
    reference = None if config.model.lora else load_policy(workload.reference, config)
    critic = (
        Critic(TorchBackend(load_critic(workload.critic, config), None, config), config) if workload.critic else None
    )
    return PolicyLearner(TorchBackend(model, reference, config), workload.estimator, config, critic)


def _policy_rank(rank: int, host: str, port: int) -> Make:
    """Of a policy learner on DeepSpeed whose ranks meet at a store at host and port."""

    def make(config: R2MConfig, workload: Workload) -> PolicyLearner:
        from learners.deepspeed_backend import DeepSpeedBackend, join_ranks
        from r2m_async.models.critic import load_critic
        from r2m_async.models.loading import load_policy

        model = load_policy(workload.policy, config)
        reference = None if config.model.lora else load_policy(workload.reference, config)
        valued = load_critic(workload.critic, config) if workload.critic else None
        join_ranks(rank, host, port, config)
        critic = Critic(DeepSpeedBackend(valued, None, config), config) if valued else None
        return PolicyLearner(DeepSpeedBackend(model, reference, config), workload.estimator, config, critic)

    return make


def _head_learner(config: R2MConfig, workload: Workload) -> HeadLearner:
    from r2m_async.models.heads import build_head
    from r2m_async.models.reward import classifier_skeleton, scoring_head

    phi = scoring_head(classifier_skeleton(workload.reward_model)).to_empty(
        device="cpu"
    )  # its weights come with `start`
    head = build_head(phi, workload.reward_hidden_size, workload.policy_hidden_size, config)
    return HeadLearner(head, config)  # on the CPU: one small update per step, and no GPU memory beside a learner's


def stages_in_process(config: R2MConfig, workload: Workload) -> Stages:
    """All stages in this process, one call after the other."""

    def launch(name: str, make: Make) -> Carrier:
        batches = make is _rollout_actor and config.rollouts.concurrent_groups > 1
        return (LocalBatches if batches else LocalCarrier)(name, make(config, workload))

    return _stages(config, launch, local_bytes())


def stages_on_ray(processes: RayProcesses, workload: Workload) -> Stages:
    """Each stage in a Ray process of its own, a DeepSpeed learner in one for each rank."""
    config, gpus = processes.config, processes.gpus

    def launch(name: str, make: Make) -> Carrier:
        if make is _policy_learner and config.learner.backend == "deepspeed":
            return processes.gang(name, _policy_rank, workload, gpus)
        if make is _rollout_actor:
            num_gpus, deadline = gpus * config.rollouts.tensor_parallel, config.rollouts.hang_after
            return processes.stage(name, make, workload, num_gpus, deadline)
        on_cpu = make in (_replay_queue, _head_learner)
        return processes.stage(name, make, workload, 0.0 if on_cpu else gpus)

    return _stages(config, launch, {**ray_bytes(), "watch": processes.ray.watch})


def check_packages() -> None:
    """`actors` and `learners` are generic names: raises ConfigError naming an intruder of the same name."""
    home = Path(r2m_async.__file__).parents[1]
    for package in (actors, learners):
        found = Path(package.__file__ or "").parent
        if found.parent != home:
            raise ConfigError(
                f"import {package.__name__} found {found}, not the one beside {home / 'r2m_async'}: remove it"
            )
