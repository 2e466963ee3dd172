"""R2M's Algorithm 1 in one process, without Ray and without a queue: the reference for the ring.

`train(config)` follows the paper (R2M, arXiv 2601.22664) line by line. The numbers in its comments are the line numbers
of Algorithm 1. With staleness bounds above 0 it is the same algorithm with fixed delays: step t samples with policy
version max(0, t - max_policy_age) and scores with head version max(0, t - max_head_age). The ring does the same under
`scheduling.lag: exact`. With a `labels.source` the head's update of step t uses the labels of step t - labels.max_age,
as the ring does under `labels.wait`.

Tests compare the ring with this file, bit for bit. Both call the same functions for the mathematics: sampling, scoring,
advantages, losses, and the update of the head. So equality proves the ring's schedule: which versions meet which data,
in which order. It does not prove the mathematics. Those functions have tests of their own, against literal
transcriptions of the papers' formulas.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from r2m_async.config import R2MConfig
from r2m_async.cpu_threads import one_thread
from r2m_async.errors import ConfigError, FunctionFailed, NonFiniteStep, RewardFailed
from r2m_async.finite import all_finite
from r2m_async.labels.pairs import chosen_pairs, offline_indices, pair_of, replayed_indices, with_noise
from r2m_async.labels.questions import Question
from r2m_async.labels.sources import source_of
from r2m_async.launch.workload import TicketOffice, Workload, resolve
from r2m_async.models.critic import load_critic, proximal_values, response_values
from r2m_async.models.generation import play_with_model, sample_groups
from r2m_async.models.heads import HeldHead, build_head, head_groups, improve_head, reward_spread, score_group
from r2m_async.models.loading import load_policy
from r2m_async.models.pairs import completed, reread_pairs
from r2m_async.models.plays import rollout_function
from r2m_async.models.policy import (
    behaviour_logprobs,
    feedback_states,
    group_feedback,
    microbatches,
    policy_pass,
    proximal_feedback,
    proximal_pass,
    response_mask,
    token_logprobs,
)
from r2m_async.models.policy_objective import (
    denominators,
    loss_mask,
    microbatch_loss,
    minibatch_bounds,
    step_advantages,
    step_place,
)
from r2m_async.models.pretrained import pretrained_tokenizer
from r2m_async.models.reward import embed_group, embed_offline, load_reward_model, scoring_head
from r2m_async.models.reward_probe import PromptStates, probe_of
from r2m_async.models.reward_scale import RewardScale
from r2m_async.models.weights import MasterWeights, MovingReference, adamw, named_weights
from r2m_async.objectives import next_kl_coef, sequence_kl, value_loss
from r2m_async.trajectories import (
    GroupRewards,
    HeadGroup,
    Label,
    LabelBatch,
    LabelledPair,
    PolicyFeedback,
    RewardEmbeddings,
    ScoredGroup,
    Ticket,
    Trajectory,
    TrajectoryGroup,
    Weights,
)


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

    Raises ConfigError if `model.lora` is set, or labels come without `labels.wait`, and NonFiniteStep for a number that is NaN or infinite. Under
    `learner.on_nonfinite: skip` most such numbers only cause an update to be left out, as in the ring.
    """
    if config.model.lora:
        raise ConfigError(
            "model.lora is set: Algorithm 1 (r2m_async/reference.py) trains all weights of the policy; leave model.lora out"
        )
    if config.labels.source is not None and not config.labels.wait:
        raise ConfigError(
            "labels.wait is False: Algorithm 1 (r2m_async/reference.py) has no clock that labels could come by; set labels.wait true"
        )
    with one_thread():
        algorithm = _Algorithm1(config, workload or resolve(config), engine)
        for step in range(config.run.num_steps):  # 1
            algorithm.step(step)
        return algorithm.result()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What sampling and scoring found out for one step, for the learners."""

    number: int
    groups: list[TrajectoryGroup]
    trajectories: list[Trajectory]
    """Those of all groups, in their order."""
    old: Tensor
    """[B, T] log-probabilities under pi_old, the policy at the start of the step."""
    prompts: Tensor
    """[B, D] pi_old's state at the end of each prompt."""
    embeddings: list[RewardEmbeddings]
    rewards: list[GroupRewards]

    @property
    def scored(self) -> list[ScoredGroup]:
        return [ScoredGroup(group=g, rewards=r) for g, r in zip(self.groups, self.rewards, strict=True)]

    @property
    def place(self) -> str:
        return step_place(self.number, self.groups)


class _Algorithm1:
    """The state of a run. `policies[v]` and `heads[v]` are version v: the models after v steps."""

    def __init__(self, config: R2MConfig, workload: Workload, engine: Any) -> None:
        self._config, self._engine, self._estimator = config, engine, workload.estimator
        self._function = rollout_function(config)
        self._policy = load_policy(workload.policy, config)
        self._reference = load_policy(workload.reference, config)
        self._reward_model = load_reward_model(workload.reward_model, config) if workload.reward_model else None
        self._head = build_head(
            scoring_head(self._reward_model) if self._reward_model else None,
            workload.reward_hidden_size,
            workload.policy_hidden_size,
            config,
            self._reward_model,
        ).to(self._policy.device)
        self._policy_tokenizer = pretrained_tokenizer("model.policy", workload.policy, config.model.trust_remote_code)
        reward_model = workload.reward_model
        self._reward_tokenizer = (
            pretrained_tokenizer("reward.model", reward_model, config.reward.trust_remote_code)
            if reward_model
            else None
        )
        self._tickets = TicketOffice(config, workload)
        self._policy_optimizer = _Optimizer(self._policy, config)
        self._critic = load_critic(workload.critic, config) if workload.critic else None
        self._critic_optimizer = _Optimizer(self._critic, config) if self._critic else None
        self._head_optimizer = adamw(self._head.parameters(), config.head.lr)
        self._kl_coef = config.objective.kl_coef
        self._moving = MovingReference(self._reference, config.model.reference_mix)
        self._held = HeldHead(self._head, config)
        self._held.start()
        self._policies, self._heads = [copy.deepcopy(self._policy)], [copy.deepcopy(self._head)]
        self._tokens: list[list[list[int]]] = []
        self._rewards: list[list[float]] = []
        self._voided_in_a_row = 0
        self._scale = RewardScale(config)
        self._probe = probe_of(workload.estimator, config)
        self._source = source_of(config) if config.labels.source else None
        self._offline = workload.offline
        self._labelled: list[list[LabelledPair]] = []
        """Per step, the pairs of its groups that were labelled."""

    def step(self, number: int) -> None:
        """One pass through the loop of Algorithm 1."""
        groups, feedback, embeddings = self._sample(number)
        step = self._score(number, groups, feedback, embeddings)
        # A step all of whose groups were given up trains nothing, but it still counts as a version of policy and head.
        refreshed = self._improve_policy(step) if groups else None
        if self._config.trains_head:
            self._improve_head(step, refreshed)
        every = self._config.model.reference_every
        if every is not None and (number + 1) % every == 0:
            self._moving.move(self._policy.named_parameters())
        self._policies.append(copy.deepcopy(self._policy))
        self._heads.append(copy.deepcopy(self._held.scoring))
        self._tokens.append([trajectory.token_ids.tolist() for trajectory in step.trajectories])
        self._rewards.append([reward for one in step.rewards for reward in one.rewards.tolist()])

    def result(self) -> ReferenceRun:
        """The weights as they are now, and all tokens and rewards."""
        version, critic = len(self._rewards), self._critic
        return ReferenceRun(
            policy=named_weights(self._policy, version),
            head=named_weights(self._held.scoring, version),
            critic=named_weights(critic, version) if critic else None,
            tokens=self._tokens,
            rewards=self._rewards,
        )

    def _sample(self, number: int) -> tuple[list[TrajectoryGroup], list[PolicyFeedback | None], list[RewardEmbeddings]]:
        """Lines 2 to 6: the groups that are due, the hidden states of the policy that sampled them, and their embeddings.

        Groups are left out that are given up because a reward function failed.
        """
        config, rollouts = self._config, self._config.rollouts
        version = max(0, number - config.scheduling.max_policy_age)  # 3
        if self._engine is not None:
            self._engine.load(named_weights(self._policies[version], version, probe=config.probes_weights))
        kept: list[tuple[TrajectoryGroup, PolicyFeedback | None, RewardEmbeddings]] = []
        first = number * rollouts.prompts_per_step
        for group_id in range(first, first + rollouts.prompts_per_step):
            # A group without any spread of rewards is sampled anew, with another prompt (DAPO, arXiv 2503.14476).
            for refill in range(rollouts.max_refills + 1):
                group, states = self._generate(self._tickets.group(group_id, number, refill), version)
                embeddings = self._embed(group)
                if embeddings is None or refill == rollouts.max_refills or reward_spread(embeddings, config) != 0:
                    break
            if embeddings is not None:
                kept.append((group, states, embeddings))
        return [one[0] for one in kept], [one[1] for one in kept], [one[2] for one in kept]

    def _generate(self, ticket: Ticket, version: int) -> tuple[TrajectoryGroup, PolicyFeedback | None]:
        """Lines 5 and 6 for one group: its responses and, if the head reads them, the sampling policy's hidden states."""
        config, sampler = self._config, self._policies[version]
        if self._engine is not None:
            return self._engine.generate(ticket)
        how: dict[str, Any] = {"greedy_twin": self._estimator.needs_greedy, "version": version}
        if self._function is not None:  # 2, 5, in several turns
            group = play_with_model(self._function, sampler, self._policy_tokenizer, ticket, config, **how)
            return group, group_feedback(sampler, group, config, version) if config.wants_rollout_states else None  # 6
        # One group at a time, as in an exact ring: the number of groups in a batch changes the rounding.
        (sampled,) = sample_groups(sampler, self._policy_tokenizer, [ticket], config, **how)  # 2, 5, 6
        return sampled

    def _embed(self, group: TrajectoryGroup) -> RewardEmbeddings | None:
        """The embeddings of a group, or None if it is given up because a reward function failed."""
        try:
            embeddings = embed_group(self._reward_model, self._reward_tokenizer, group, self._config)
        except RewardFailed as failed:
            self._voided_in_a_row += 1
            if self._voided_in_a_row > self._config.reward.max_voided:
                raise FunctionFailed(str(failed)) from None
            return None
        self._voided_in_a_row = 0
        return embeddings

    def _score(
        self,
        number: int,
        groups: list[TrajectoryGroup],
        feedback: list[PolicyFeedback | None],
        embeddings: list[RewardEmbeddings],
    ) -> _Step:
        """Line 8: the rewards, by the head of this step. pi_old is the present policy; the sampler may be older."""
        config, size = self._config, self._config.rollouts.group_size
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        old, states = proximal_pass(self._policy, trajectories, config) if groups else (torch.empty(0, 0), [])
        if config.reads_feedback and config.feedback.source == "learner":
            feedback = [
                proximal_feedback(self._policy, group, states[index * size : (index + 1) * size], config, number)
                for index, group in enumerate(groups)
            ]
        version = max(0, number - config.scheduling.max_head_age)
        rewards = [
            score_group(self._heads[version], embedding, one, number, version, config)
            for embedding, one in zip(embeddings, feedback, strict=True)
        ]
        prompts = PromptStates(trajectories, config)
        prompts.keep(range(len(trajectories)), states)
        return _Step(
            number=number,
            groups=groups,
            trajectories=trajectories,
            old=old,
            prompts=prompts.taken(states[0].shape[1] if states else 0),
            embeddings=embeddings,
            rewards=rewards,
        )

    def _improve_policy(self, step: _Step) -> list[Tensor] | None:
        """Lines 9 to 13: the policy's updates. Returns the refreshed states, or None for a step that is left out."""
        objective, packed = self._config.objective, self._config.learner.packing
        config = self._config if objective.kl_target is None else self._config.objective(kl_coef=self._kl_coef)
        trajectories, scored = step.trajectories, step.scored
        ref = token_logprobs(self._reference, trajectories, config)
        values = proximal_values(self._critic, trajectories, config) if self._critic else None
        try:
            advantages, returns = step_advantages(  # 9
                self._estimator, scored, step.old, ref, config, values, self._scale, self._probe, step.prompts
            )
        except NonFiniteStep:
            if config.learner.on_nonfinite == "stop":
                raise
            # The step trains nothing, but it still counts as a version of policy and head.
            return None
        mask, behaviour = response_mask(trajectories), behaviour_logprobs(trajectories)
        refreshed: dict[int, Tensor] = {}
        for epoch in range(objective.epochs):  # 11
            for start, stop in minibatch_bounds(scored, objective.num_minibatches):
                denominator, responses = denominators(loss_mask(trajectories[start:stop], config), config)
                parts = microbatches(trajectories[start:stop], config.learner.tokens_per_microbatch, packed)
                minibatch = [[start + row for row in part] for part in parts]
                for rows in minibatch:
                    chosen = [trajectories[row] for row in rows]
                    logprobs, states, entropies = policy_pass(
                        self._policy,
                        chosen,
                        config.rollouts.temperature,
                        packed,
                        entropy=objective.entropy_coef > 0,
                    )
                    loss, _, _ = microbatch_loss(
                        logprobs,
                        entropies,
                        behaviour[rows],
                        step.old[rows],
                        ref[rows],
                        advantages[rows],
                        loss_mask(chosen, config),
                        denominator,
                        responses,
                        self._estimator,
                        config,
                        step.place,
                    )
                    loss.backward()
                    # The states of the last epoch's forward passes are the refreshed feedback.
                    if epoch == objective.epochs - 1:  # 13
                        refreshed |= zip(rows, feedback_states(states, config), strict=True)
                self._policy_optimizer.step(config.learning_rate(step.number), step.place)  # 12
                if self._critic:
                    assert values is not None and returns is not None
                    self._improve_critic(step, minibatch, values, returns, int(mask[start:stop].sum()))
        if objective.kl_target is not None:
            kl = sequence_kl(step.old, ref, mask)
            self._kl_coef = next_kl_coef(self._kl_coef, kl, objective.kl_target, objective.kl_gain)
        return [refreshed[row] for row in range(len(trajectories))]

    def _improve_critic(
        self, step: _Step, minibatch: list[list[int]], values: Tensor, returns: Tensor, num_tokens: int
    ) -> None:
        """Not in Algorithm 1: PPO trains a critic beside the policy, on the same minibatch."""
        config = self._config
        assert self._critic_optimizer is not None
        for rows in minibatch:
            part = [step.trajectories[row] for row in rows]
            now = response_values(self._critic, part, config.learner.packing)
            width = response_mask(part).shape[1]
            before, target = values[rows, :width], returns[rows, :width]
            value_loss(
                now, before, target, response_mask(part), clip=config.critic.clip, denominator=num_tokens
            ).loss.backward()
        self._critic_optimizer.step(config.learning_rate(step.number, config.critic.lr), step.place)

    def _improve_head(self, step: _Step, refreshed: list[Tensor] | None) -> None:
        """Lines 16 to 20: the head's update on the refreshed states. They are None for a step that is left out."""
        config, size = self._config, self._config.rollouts.group_size
        feedback: list[PolicyFeedback] | None = []
        if refreshed is not None:
            feedback = None
            if config.reads_feedback:
                feedback = [
                    PolicyFeedback(
                        group_id=embedding.group_id,
                        hidden_states=tuple(refreshed[index * size : (index + 1) * size]),
                        greedy=None,
                        policy_version=step.number,
                    )
                    for index, embedding in enumerate(step.embeddings)
                ]
        groups = head_groups(step.embeddings, feedback, step.rewards)  # 16
        labels = self._labels_of(step, groups) if config.labels.active else None
        if labels and config.labels.rereads:
            labels = self._reread(labels, step.number)
        if groups or (labels and labels.pairs):
            improve_head(self._head, self._head_optimizer, self._held, groups, step.number, config, labels)  # 17-20

    def _labels_of(self, step: _Step, groups: list[HeadGroup]) -> LabelBatch:
        """Asks about pairs of a step at once, and returns the labels that its head update uses: those of an earlier step."""
        config = self._config
        asked: tuple[Label, ...] = ()
        if self._source:
            asked = chosen_pairs(step.number, step.groups, step.embeddings, step.rewards, config)
        learns = {group.embeddings.group_id: group for group in groups}
        answered = [with_noise(self._answered(label, step), config) for label in asked]
        self._labelled.append(
            [
                self._labelled_pair(label, learns[label.group_id], step)
                for label in answered
                if label.chosen is not None and label.group_id in learns
            ]
        )
        due = step.number - config.labels.max_age
        earlier = [pair for pairs in self._labelled[: max(0, due)] for pair in pairs][-config.labels.replay_from :]
        return LabelBatch(
            step=step.number,
            asked=tuple(sorted({label.group_id for label in asked})),
            new=tuple(self._labelled[due]) if due >= 0 else (),
            replayed=tuple(earlier[index] for index in replayed_indices(step.number, len(earlier), config)),
            offline=tuple(self._offline[index] for index in offline_indices(step.number, len(self._offline), config)),
        )

    def _labelled_pair(self, label: Label, group: HeadGroup, step: _Step) -> LabelledPair:
        """Two responses of a group, the preferred one first."""
        first, second = _best_first(label)
        pair = pair_of(group, (first, second))
        if self._config.labels.states == "kept":
            return LabelledPair(label=label, group=pair)
        (sampled,) = (one for one in step.groups if one.ticket.group_id == label.group_id)
        both = sampled.trajectories[first], sampled.trajectories[second]
        return LabelledPair(label=label, group=pair, trajectories=both)

    def _reread(self, labels: LabelBatch, number: int) -> LabelBatch:
        """The labels with what the policy, as it is after the step, makes of pairs among them."""
        config, unread = self._config, labels.unread
        if not unread:
            return labels
        logprobs, states = proximal_pass(self._policy, _flat(unread), config)
        first = len(unread) - len(labels.offline)
        ratios = logprobs.sum(1)[2 * first :]
        if labels.offline:
            ratios = ratios - token_logprobs(self._reference, _flat(unread[first:]), config).sum(1)
        read = reread_pairs(labels, dict(enumerate(states)), ratios, number, config)
        embedded = embed_offline(self._reward_model, self._reward_tokenizer, labels.offline, config)
        return completed(labels, read, embedded, config)

    def _answered(self, label: Label, step: _Step) -> Label:
        """A label with the answer of `labels.source`."""
        (group,) = (group for group in step.groups if group.ticket.group_id == label.group_id)
        first, second = (group.trajectories[index] for index in label.pair)
        assert self._source is not None
        question = Question(label=label, prompt=group.ticket.prompt, responses=(first, second))
        return self._source.ask(question).result().of(label)


def _flat(pairs: Sequence[tuple[Trajectory, ...]]) -> list[Trajectory]:
    """The trajectories of all pairs, one after the other."""
    return [trajectory for pair in pairs for trajectory in pair]


def _best_first(label: Label) -> tuple[int, int]:
    """The two responses of a label, the preferred one first."""
    first, second = label.pair
    return (first, second) if label.chosen == first else (second, first)


class _Optimizer:
    """AdamW with clipped gradients, for the policy and the critic.

    It moves float32 copies of the weights (`MasterWeights`): a step of 1e-6 would vanish in bfloat16.
    """

    def __init__(self, model: Any, config: R2MConfig) -> None:
        self._model, self._masters = model, MasterWeights(model)
        self._max_grad_norm, self._on_nonfinite = config.learner.max_grad_norm, config.learner.on_nonfinite
        self._optimizer = adamw(self._masters.tensors, config.learner.lr, config.learner.weight_decay)

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
