"""How the stages of a ring are made, in processes of their own under Ray or in this one. Alone knows actors and learners."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

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
from r2m_async.ring.stages import LocalBatches, LocalStage, Stage, Stages, local_bytes

Launch: TypeAlias = Callable[[str, type, Make], Stage]


def _stages(config: R2MConfig, launch: Launch, others: dict[str, Callable]) -> Stages:
    """`others`: what else `Stages` has."""
    rollouts, replicas = range(config.rollouts.num_actors), range(config.reward.replicas)
    return Stages(
        rollouts=tuple(launch(f"rollout-{index}", RolloutActor, _rollout_actor) for index in rollouts),
        queue=launch("queue", ReplayQueue, lambda config, workload: ReplayQueue()),
        annotators=tuple(launch(f"annotator-{index}", RewardAnnotator, _reward_annotator) for index in replicas),
        policy=launch("policy-learner", PolicyLearner, _policy_learner),
        head=launch("head-learner", HeadLearner, _head_learner),
        **others,
    )


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
    def launch(name: str, stage_class: type, make: Make) -> Stage:
        batches = stage_class is RolloutActor and config.rollouts.concurrent_groups > 1
        return (LocalBatches if batches else LocalStage)(name, make(config, workload))

    return _stages(config, launch, local_bytes())


def stages_on_ray(processes: RayProcesses, workload: Workload) -> Stages:
    config, gpus = processes.config, processes.gpus

    def launch(name: str, stage_class: type, make: Make) -> Stage:
        if stage_class is PolicyLearner and config.learner.backend == "deepspeed":
            return processes.gang(name, PolicyLearner, _policy_rank, workload, gpus)
        if stage_class is RolloutActor:
            num_gpus, deadline = gpus * config.rollouts.tensor_parallel, config.rollouts.hang_after
            return processes.stage(name, stage_class, make, workload, num_gpus, deadline)
        on_cpu = stage_class in (ReplayQueue, HeadLearner)
        return processes.stage(name, stage_class, make, workload, 0.0 if on_cpu else gpus)

    return _stages(config, launch, {**ray_bytes(), "carrier": processes.ray.watch})


def check_packages() -> None:
    """`actors` and `learners` are generic names: raises ConfigError naming an intruder of the same name."""
    home = Path(r2m_async.__file__).parents[1]
    for package in (actors, learners):
        found = Path(package.__file__ or "").parent
        if found.parent != home:
            raise ConfigError(
                f"import {package.__name__} found {found}, not the one beside {home / 'r2m_async'}: remove it"
            )
