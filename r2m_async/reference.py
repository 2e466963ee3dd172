"""R2M's Algorithm 1 in one process, without Ray and without a queue: the reference for the ring.

`train(config)` follows the paper (R2M, arXiv 2601.22664) line by line. The numbers in its comments are the line numbers
of Algorithm 1. With staleness bounds above 0 it is the same algorithm with fixed delays: step t samples with policy
version max(0, t - max_policy_age) and scores with head version max(0, t - max_head_age). The ring does the same under
`scheduling.lag: exact`.

Tests compare the ring with this file, bit for bit. Both call the same functions for the mathematics: sampling, scoring,
advantages, losses, and the update of the head. So equality proves the ring's schedule: which versions meet which data,
in which order. It does not prove the mathematics. Those functions have tests of their own, against literal
transcriptions of the papers' formulas.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, NonFiniteStep
from r2m_async.finite import all_finite
from r2m_async.launch.workload import TicketOffice, Workload, resolve
from r2m_async.models.critic import load_critic, proximal_values, response_values
from r2m_async.models.generation import sample_groups
from r2m_async.models.heads import HeldHead, build_head, improve_head, score_group
from r2m_async.models.loading import load_policy, one_thread
from r2m_async.models.policy import (
    behaviour_logprobs,
    feedback_states,
    group_feedback,
    logprobs_and_states,
    microbatches,
    proximal_feedback,
    proximal_pass,
    response_mask,
    token_logprobs,
)
from r2m_async.models.policy_objective import (
    denominators,
    microbatch_loss,
    minibatch_bounds,
    step_advantages,
    step_place,
)
from r2m_async.models.reward import embed_group, load_reward_model, scoring_head
from r2m_async.models.weights import MasterWeights, named_weights
from r2m_async.objectives import value_loss
from r2m_async.trajectories import HeadGroup, PolicyFeedback, ScoredGroup, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRun:
    """The results of a run: the final weights, and the tokens and rewards of every step."""

    policy: Weights
    head: Weights
    """The head that would score the next step."""
    critic: Weights | None
    """None if the advantage estimator needs no values."""
    tokens: list[list[list[int]]] = field(default_factory=list)
    """Per step and trajectory, in group order: the tokens of prompt and response."""
    rewards: list[list[float]] = field(default_factory=list)
    """Per step and trajectory, in group order: the reward that the policy was trained on."""


def train(config: R2MConfig, workload: Workload | None = None, engine: Any = None) -> ReferenceRun:
    """Runs Algorithm 1 for `run.num_steps` steps. On a CPU in float32 the ring gives the same bits.

    Args:
        workload: models and prompts, if they are resolved already. None: they are resolved from the config.
        engine: an `actors.rollout_actor.RolloutEngine` that samples the responses. None: transformers samples them.
            An engine is given to compare with a ring that uses the same engine.

    Raises ConfigError if `model.lora` is set, and NonFiniteStep for a number that is NaN or infinite. Under
    `learner.on_nonfinite: skip` most such numbers only cause an update to be left out, as in the ring.
    """
    if config.model.lora:
        raise ConfigError("model.lora is set: Algorithm 1 trains the policy's weights; leave it out")
    with one_thread():
        return _train(config, workload or resolve(config), engine)


def _train(config: R2MConfig, workload: Workload, engine: Any) -> ReferenceRun:
    """The body of `train`. `policies[v]` and `heads[v]` are version v: the models after v steps."""
    policy = load_policy(workload.policy, config)
    reference = load_policy(workload.reference, config)
    reward_model = load_reward_model(workload.reward_model, config)
    head = build_head(scoring_head(reward_model), workload.reward_hidden_size, workload.policy_hidden_size, config).to(
        policy.device
    )
    policy_tokenizer = AutoTokenizer.from_pretrained(workload.policy)
    reward_tokenizer = AutoTokenizer.from_pretrained(workload.reward_model)
    tickets, estimator = TicketOffice(config, workload), workload.estimator
    policy_optimizer = _Optimizer(policy, config)
    critic = load_critic(workload.critic, config) if workload.critic else None
    critic_optimizer = _Optimizer(critic, config) if critic else None
    head_optimizer = torch.optim.AdamW(head.parameters(), lr=config.head.lr, weight_decay=0.0)
    rollouts, objective, scheduling = config.rollouts, config.objective, config.scheduling
    packed = config.learner.packing
    held = HeldHead(head, config)
    held.start()
    policies, heads = [copy.deepcopy(policy)], [copy.deepcopy(head)]
    all_tokens, all_rewards = [], []

    for step in range(config.run.num_steps):  # 1
        sampler = policies[max(0, step - scheduling.max_policy_age)]  # 3
        scorer = heads[max(0, step - scheduling.max_head_age)]
        version = max(0, step - scheduling.max_policy_age)
        first = step * rollouts.prompts_per_step
        due = [tickets.group(group_id, step) for group_id in range(first, first + rollouts.prompts_per_step)]
        feedback: list[PolicyFeedback | None] = [None] * len(due)
        if engine is None:
            # One group at a time, as in an exact ring: the number of groups in a batch changes the rounding.
            groups = [  # 2, 5
                sample_groups(
                    sampler,
                    policy_tokenizer,
                    [ticket],
                    num_responses=rollouts.group_size,
                    temperature=rollouts.temperature,
                    max_new_tokens=rollouts.max_new_tokens,
                    greedy_twin=estimator.needs_greedy,
                    version=version,
                )[0]
                for ticket in due
            ]
            if config.wants_rollout_states:  # 6
                feedback = [group_feedback(sampler, group, config, version) for group in groups]
        else:
            engine.load(named_weights(sampler, version, probe=config.probes_weights))
            sampled = [engine.generate(ticket) for ticket in due]
            groups, feedback = [group for group, _ in sampled], [states for _, states in sampled]
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        # pi_old is the present policy. The sampler may be older, with a staleness bound above 0.
        old, states = proximal_pass(policy, trajectories, config)
        if config.reads_feedback and config.feedback.source == "learner":
            size = rollouts.group_size
            feedback = [
                proximal_feedback(policy, group, states[index * size : (index + 1) * size], config, step)
                for index, group in enumerate(groups)
            ]

        embeddings = [embed_group(reward_model, reward_tokenizer, group, config) for group in groups]
        rewards = [  # 8
            score_group(scorer, embedding, one, step, max(0, step - scheduling.max_head_age), config)
            for embedding, one in zip(embeddings, feedback, strict=True)
        ]
        scored = [ScoredGroup(group=g, rewards=r) for g, r in zip(groups, rewards, strict=True)]
        mask, behaviour = response_mask(trajectories), behaviour_logprobs(trajectories)
        ref = token_logprobs(reference, trajectories, config)
        values = proximal_values(critic, trajectories, config) if critic else None
        left_out = False
        try:
            advantages, returns = step_advantages(estimator, scored, old, ref, config, values)  # 9
        except NonFiniteStep:
            if config.learner.on_nonfinite == "stop":
                raise
            # The step trains nothing, but it still counts as a version of policy and head.
            left_out = True

        refreshed: list[Tensor] = []
        for epoch in range(0 if left_out else objective.epochs):  # 11
            for start, stop in minibatch_bounds(scored, objective.num_minibatches):
                denominator, responses = denominators(mask[start:stop], config)
                parts = microbatches(trajectories[start:stop], config.learner.tokens_per_microbatch, packed)
                minibatch = [slice(start + part.start, start + part.stop) for part in parts]
                for rows in minibatch:
                    logprobs, states = logprobs_and_states(policy, trajectories[rows], rollouts.temperature, packed)
                    loss, _, _ = microbatch_loss(
                        logprobs,
                        behaviour[rows],
                        old[rows],
                        ref[rows],
                        advantages[rows],
                        response_mask(trajectories[rows]),
                        denominator,
                        responses,
                        estimator,
                        config,
                    )
                    loss.backward()
                    # The states of the last epoch's forward passes are the refreshed feedback.
                    if epoch == objective.epochs - 1:  # 13
                        refreshed += feedback_states(states, config)
                policy_optimizer.step(config.learning_rate(step), step_place(step, groups))  # 12
                if critic:  # not in Algorithm 1: PPO trains a critic beside the policy
                    assert critic_optimizer is not None and values is not None and returns is not None
                    for rows in minibatch:
                        part = trajectories[rows]
                        now, width = response_values(critic, part, packed), response_mask(part).shape[1]
                        before, target = values[rows, :width], returns[rows, :width]
                        num_tokens = int(mask[start:stop].sum())
                        value_loss(
                            now, before, target, response_mask(part), clip=config.critic.clip, denominator=num_tokens
                        ).loss.backward()
                    critic_optimizer.step(config.learning_rate(step, config.critic.lr), step_place(step, groups))

        if config.trains_head and not left_out:
            head_groups = []
            for index, embedding in enumerate(embeddings):
                own = tuple(refreshed[index * rollouts.group_size : (index + 1) * rollouts.group_size])
                states_now = PolicyFeedback(
                    group_id=embedding.group_id, hidden_states=own, greedy=None, policy_version=step
                )
                group = HeadGroup(  # 16
                    embeddings=embedding,
                    feedback=states_now if config.reads_feedback else None,
                    annotated=rewards[index],
                )
                head_groups.append(group)
            improve_head(head, head_optimizer, held, head_groups, step, config)  # 17-20

        policies.append(copy.deepcopy(policy))
        heads.append(copy.deepcopy(held.scoring))
        all_tokens.append([trajectory.token_ids.tolist() for trajectory in trajectories])
        all_rewards.append([reward for one in rewards for reward in one.rewards.tolist()])

    return ReferenceRun(
        policy=named_weights(policy, config.run.num_steps),
        head=named_weights(held.scoring, config.run.num_steps),
        critic=named_weights(critic, config.run.num_steps) if critic else None,
        tokens=all_tokens,
        rewards=all_rewards,
    )


class _Optimizer:
    """AdamW with clipped gradients, for the policy and the critic.

    It moves float32 copies of the weights (`MasterWeights`): a step of 1e-6 would vanish in bfloat16.
    """

    def __init__(self, model: Any, config: R2MConfig) -> None:
        self._model, self._masters = model, MasterWeights(model)
        self._max_grad_norm, self._on_nonfinite = config.learner.max_grad_norm, config.learner.on_nonfinite
        self._optimizer = torch.optim.AdamW(self._masters.tensors, weight_decay=config.learner.weight_decay)

    def step(self, lr: float, place: str) -> None:
        """Takes one step with the learning rate `lr`, and clears the gradients.

        If the gradient is not finite, the step is left out under `learner.on_nonfinite: skip`, and raises NonFiniteStep
        otherwise. Weights that are not finite after the step raise NonFiniteStep in any case. `place` names the step
        in messages.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._masters.take_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(self._masters.tensors, self._max_grad_norm))
        if math.isfinite(norm):
            self._optimizer.step()
            self._masters.write_back()
        elif self._on_nonfinite == "stop":
            raise NonFiniteStep(f"{place}: the gradient norm is {norm}")
        self._optimizer.zero_grad(set_to_none=True)
        if not all_finite([*self._masters.copies, *self._model.parameters()]):
            raise NonFiniteStep(f"{place}: the weights are not finite after an update with learning rate {lr:g}")
