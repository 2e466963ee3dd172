"""Makes the stages of a ring, either in Ray processes or in this process.

No other file of `r2m_async` makes stages. Engines, backends and models are imported inside the functions, so that each
process loads only what its own stage needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import actors
import learners
import r2m_async
from actors.labeller import Labeller
from actors.replay_queue import ReplayQueue
from actors.reward_annotator import RewardAnnotator
from actors.rollout_actor import RolloutActor, RolloutEngine
from learners.critic import Critic
from learners.head_learner import HeadLearner
from learners.policy_learner import PolicyLearner
from learners.torch_backend import TorchBackend
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.ray_stages import QUEUE_RESTART_TIMEOUT, Make, RayProcesses, ray_bytes
from r2m_async.launch.workload import Workload
from r2m_async.ring.stages import Carrier, LocalBatches, LocalCarrier, Stages, local_bytes

Launch: TypeAlias = Callable[[str, Make], Carrier]
"""Starts a stage. It takes the name of the stage and the function that makes it, and returns the stage's carrier."""


def _stages(config: R2MConfig, launch: Launch, others: dict[str, Callable[..., Any]]) -> Stages:
    """Starts all stages of a ring with `launch`. `others` are the fields of `Stages` that are no stages."""
    rollouts, replicas = range(config.rollouts.num_actors), range(config.reward.replicas)
    return Stages.carried_by(
        rollouts=tuple(launch(f"rollout-{index}", _rollout_actor) for index in rollouts),
        queue=launch("queue", _replay_queue),
        annotators=tuple(launch(f"annotator-{index}", _reward_annotator) for index in replicas),
        policy=launch("policy-learner", _policy_learner),
        head=launch("head-learner", _head_learner),
        labels=launch("labeller", _labeller) if config.labels.active else None,
        **others,
    )


def _replay_queue(config: R2MConfig, workload: Workload) -> ReplayQueue:
    """Makes the replay queue of a ring in this process."""
    return ReplayQueue()


def _queue_of_buffers(config: R2MConfig, workload: Workload) -> ReplayQueue:
    """Makes the replay queue of a ring on Ray."""
    return ReplayQueue(buffers=True)


def _rollout_actor(config: R2MConfig, workload: Workload) -> RolloutActor:
    """Makes a rollout actor with the engine that `rollouts.engine` names."""
    import torch

    from r2m_async.models.pretrained import pretrained_tokenizer

    tokenizer, twin = (
        pretrained_tokenizer("model.policy", workload.policy, config.model.trust_remote_code),
        workload.estimator.needs_greedy,
    )
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
    """Makes a reward annotator with the frozen reward model and a new head, or with neither if there is no model."""
    from r2m_async.models.heads import build_head
    from r2m_async.models.pretrained import pretrained_tokenizer
    from r2m_async.models.reward import load_reward_model, scoring_head

    if workload.reward_model is None:
        return RewardAnnotator(None, None, build_head(None, 0, workload.policy_hidden_size, config), config)
    model = load_reward_model(workload.reward_model, config)
    head = build_head(scoring_head(model), workload.reward_hidden_size, workload.policy_hidden_size, config, model)
    tokenizer = pretrained_tokenizer("reward.model", workload.reward_model, config.reward.trust_remote_code)
    return RewardAnnotator(model, tokenizer, head, config)


def _policy_learner(config: R2MConfig, workload: Workload) -> PolicyLearner:
    """Makes a policy learner on the torch backend, with a critic if the advantage estimator needs one."""
    from r2m_async.models.critic import load_critic
    from r2m_async.models.loading import load_policy

    model = load_policy(workload.policy, config)
    # With adapters, the reference is the policy with its adapters switched off.
    reference = None if config.model.lora else load_policy(workload.reference, config)
    critic = (
        Critic(TorchBackend(load_critic(workload.critic, config), None, config), config) if workload.critic else None
    )
    return PolicyLearner(TorchBackend(model, reference, config), workload.estimator, config, critic)


def _policy_rank(rank: int, host: str, port: int) -> Make:
    """Returns the function that makes one rank of a policy learner on DeepSpeed.

    Args:
        rank: the number of the rank, from 0.
        host: the machine with the TCP store at which the ranks meet.
        port: the port of that store.
    """

    def make(config: R2MConfig, workload: Workload) -> PolicyLearner:
        """Makes the rank. It waits for the other ranks."""
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
    """Makes the head learner. Its head has no meaningful weights before `start` or `restore` brings them."""
    from r2m_async.models.heads import build_head
    from r2m_async.models.reward import classifier_skeleton, load_reward_model, scoring_head

    reward_model, model = workload.reward_model, None
    phi = None
    if reward_model and config.head.reads_tokens:
        # No skeleton: a model has buffers, too, which come with no weights.
        model = load_reward_model(reward_model, config.run(device="cpu"))
        phi = scoring_head(model)
    elif reward_model:
        skeleton = classifier_skeleton(reward_model, config.reward.trust_remote_code)
        phi = scoring_head(skeleton).to_empty(device="cpu")
    head = build_head(phi, workload.reward_hidden_size, workload.policy_hidden_size, config, model)
    # It stays on the CPU: it makes one small update per step, and must take no GPU memory from other stages.
    return HeadLearner(head, config)


def _labeller(config: R2MConfig, workload: Workload) -> Labeller:
    """Makes the labeller with the source that `labels.source` names, and with the pairs of `labels.offline`."""
    from r2m_async.labels.sources import source_of

    return Labeller(source_of(config) if config.labels.source else None, config, workload.offline)


def stages_in_process(config: R2MConfig, workload: Workload) -> Stages:
    """Makes all stages in this process, where one call runs after the other.

    Args:
        config: the config of the run.
        workload: the resolved workload of the config.
    """

    def launch(name: str, make: Make) -> Carrier:
        # One group at a time is never batched, because the size of a batch changes how numbers are rounded.
        batches = make is _rollout_actor and config.concurrent_groups > 1
        return (LocalBatches if batches else LocalCarrier)(name, make(config, workload))

    return _stages(config, launch, local_bytes())


def stages_on_ray(processes: RayProcesses, workload: Workload) -> Stages:
    """Starts every stage in a Ray process of its own. A policy learner on DeepSpeed gets one process for each rank.

    It does not wait until the processes are ready.

    Args:
        processes: starts the processes. Its config and its shares of GPUs are used.
        workload: the resolved workload of the config.
    """
    config, gpus, with_pairs = processes.config, processes.gpus, workload
    workload = replace(workload, offline=())

    def launch(name: str, make: Make) -> Carrier:
        if make is _labeller:
            return processes.stage(name, make, with_pairs, 0.0)
        if make is _policy_learner and config.learner.backend == "deepspeed":
            return processes.gang(name, _policy_rank, workload, gpus)
        if make is _rollout_actor:
            num_gpus, deadline = gpus * config.rollouts.tensor_parallel, config.rollouts.hang_after
            return processes.stage(name, make, workload, num_gpus, deadline)
        if make is _replay_queue:
            return processes.stage(name, _queue_of_buffers, workload, 0.0, restart_timeout=QUEUE_RESTART_TIMEOUT)
        on_cpu = make is _head_learner or (make is _reward_annotator and not workload.reward_model)
        return processes.stage(name, make, workload, 0.0 if on_cpu else gpus)

    return _stages(config, launch, {**ray_bytes(), "watch": processes.ray.watch, "stacks": processes.stacks})


def check_rollout_engine(config: R2MConfig, policy: str) -> str | None:
    """Checks, without loading anything, that the engine of the rollouts can run the policy.

    policy: Hugging Face name or directory.

    Returns why that could not be checked, or None. Raises ConfigError if the engine cannot run it.
    """
    if config.rollouts.engine != "vllm":
        return None
    from actors.vllm_engine import check_policy

    return check_policy(policy, config)


def check_packages() -> None:
    """Checks that `actors` and `learners` are the packages of this project, and not others of the same generic names.

    Raises ConfigError, which names the wrong package.
    """
    home = Path(r2m_async.__file__).parents[1]
    for package in (actors, learners):
        found = Path(package.__file__ or "").parent
        if found.parent != home:
            raise ConfigError(
                f"import {package.__name__} found {found}, a package of another project, and not the one beside "
                f"{home / 'r2m_async'}; remove that package"
            )
