"""The policy learner takes the policy steps. A backend holds the policy and moves its weights.

A step is two calls. `proximal` computes the log-probabilities of pi_old, which is the policy at the start of the step.
It keeps them here. `train` follows with the step's rewards: it computes the advantages and makes all updates. So
log-probabilities and advantages never leave the learner.

A backend may be one of several ranks. Then each rank has a policy learner, and all of them get the same calls with all
groups of the step. Each computes on its share of the groups, and they add up whatever is about the whole batch.

Shapes: B trajectories of a step in group order, T response tokens (padded). Policies: mu sampled the responses, pi_old
is the policy at the start of the step, pi_ref is the reference policy.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learners.backend import Backend, PolicyBackend
from learners.critic import Critic, CriticStep
from learners.kept_states import KeptStates
from learners.memory import memory_enough_for
from learners.shares import MicroBatch, group_shares, rank_microbatches
from learners.step_statistics import StepStatistics, batch_metrics
from learners.weight_sender import WeightSender
from r2m_async.advantages import Estimator
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, NonFiniteStep, WeightMismatch
from r2m_async.finite import all_finite
from r2m_async.models.policy import behaviour_logprobs, policy_pass, proximal_feedback, response_mask
from r2m_async.models.policy_objective import (
    check_passes,
    denominators,
    loss_mask,
    microbatch_loss,
    minibatch_bounds,
    row_place,
    step_advantages,
    step_place,
)
from r2m_async.models.reward_scale import RewardScale
from r2m_async.models.weights import MovingReference, named_weights, weight_probe
from r2m_async.objectives import next_kl_coef
from r2m_async.trajectories import (
    GroupRewards,
    PolicyFeedback,
    ScoredGroup,
    StepReport,
    Trajectory,
    TrajectoryGroup,
    Weights,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerBatch:
    """The groups of exactly one step, with all that the proximal pass computed of them."""

    step: int
    """The policy step, from 0."""
    groups: tuple[TrajectoryGroup, ...]
    """All groups of the step, on every rank."""
    trajectories: tuple[Trajectory, ...]
    """The B trajectories of all groups, in group order."""
    rows: tuple[range, ...]
    """For each group, the rows of its trajectories among them."""
    mask: Tensor
    """[B, T] bool, True on response tokens."""
    behaviour: Tensor
    """[B, T] float32: log-probabilities under mu, 0 on padding."""
    old: Tensor
    """[B, T] float32: log-probabilities under pi_old, 0 on padding."""
    reference: Tensor
    """[B, T] float32: log-probabilities under pi_ref, 0 on padding."""
    values: Tensor | None
    """[B, T] float32: the critic's values at the start of the step, 0 on padding. None without a critic."""

    @property
    def ages(self) -> Tensor:
        """[B] int64: the age of each trajectory, which is the step minus the oldest policy version that sampled it."""
        return torch.tensor([max(0, self.step - trajectory.oldest_version) for trajectory in self.trajectories])


class PolicyLearner:
    """Trains the policy, and publishes its versions. Each step raises the policy version by one."""

    def __init__(
        self, backend: PolicyBackend, estimator: Estimator, config: R2MConfig, critic: Critic | None = None
    ) -> None:
        """Keeps the backend, whose weights are policy version 0.

        Args:
            backend: what holds the policy.
            estimator: the advantage estimator.
            config: the run's config.
            critic: the critic, if the estimator needs values. It has as many ranks as the policy.
        """
        self.backend = backend
        self.critic = critic
        self._config = config
        self._version = 0
        self._estimator = estimator
        self._compared = False
        """Whether the learner's log-probabilities have been compared with the rollout engine's."""
        self._batch: LearnerBatch | None = None
        """What `proximal` left for `train`. None if the step has no trajectories."""
        self._kl_coef = config.objective.kl_coef
        """The KL coefficient of the present step. It changes under `objective.kl_target` alone."""
        self._scale = RewardScale(config)
        self._moving: MovingReference | None = None
        if config.model.reference_every is not None:
            with backend.as_reference() as reference:
                self._moving = MovingReference(reference, config.model.reference_mix)
        self._sender = WeightSender(config) if config.weights.direct and backend.rank == 0 else None

    def weights(self, whole: bool = False) -> tuple[StepReport, Weights | None]:
        """Publishes the present policy version.

        It may run in another thread beside `proximal` if `config.publishes_beside_passes`.

        Args:
            whole: whether to return the tensors even if the learner sends them to engines itself.

        Returns a report and, on rank 0, the weights; other ranks return None. The weights are a copy on the CPU. If the
        learner sends weights itself, it keeps the copy, and the weights have names, dtypes and shapes only.

        Raises NonFiniteStep if a probe (`weights.probe`) shows that the policy gives log-probabilities that are not
        finite. Raises LearnerOutOfMemory.
        """
        with memory_enough_for(f"policy version {self._version}, being copied out"):
            return StepReport(version=self._version, metrics={}), self._weights(whole)

    def _weights(self, whole: bool) -> Weights | None:
        """The present version as `weights` returns it. All ranks take part if they share the parameters out."""
        backend = self.backend
        weights = Weights(version=self._version, tensors={})
        tensors: dict[str, Tensor] = {}
        if backend.rank > 0:
            # Rank 0 cannot gather the parameters alone. This rank helps and keeps nothing.
            for _ in backend.named_parameters():
                pass
        elif whole or self._sender is None:
            weights = named_weights(backend, self._version)
            tensors = weights.tensors
        else:
            layout = self._sender.stage(backend, self._version)
            weights = dataclasses.replace(weights, layout=layout)
            tensors = self._sender.staged(self._version)
        if self._config.probes_weights and not whole:
            probe = weight_probe(backend.probed, tensors)
            # Without this check, an engine would be blamed for not computing the same numbers.
            if not all_finite([probe.logprobs]):
                raise NonFiniteStep(
                    f"policy version {self._version}: its log-probabilities of the probe text are not finite, although its "
                    f"weights are: they have grown too large for its arithmetic; lower learner.lr"
                )
            weights = dataclasses.replace(weights, probe=probe)
        return weights if backend.rank == 0 else None

    # Direct transports: the learner sends weights itself. These calls run while another thread trains. A failure is
    # returned and not raised, because it is the engine that is lost and not the learner.

    def open_channel(self, engine: int) -> tuple[dict[str, Any]]:
        """Opens a new channel to an engine, given by its number, in the place of an old one.

        Returns what the engine needs to join the channel.
        """
        assert self._sender is not None
        return (self._sender.open(engine),)

    def connect(self, engine: int) -> tuple[dict[str, str]]:
        """Waits for an engine to join its channel.

        Returns an empty dict, or the reason under `failed` if the engine did not join.
        """
        assert self._sender is not None
        try:
            self._sender.connect(engine)
        except RuntimeError as error:  # torch and NCCL raise it
            return ({"failed": str(error)},)
        return ({},)

    def send(self, engine: int, version: int) -> tuple[dict[str, str]]:
        """Sends a staged version to an engine, over its channel.

        Args:
            engine: the engine's number.
            version: the policy version.

        Returns what the engine must know besides to load it, or the reason under `failed` if the version was not sent.
        """
        assert self._sender is not None
        try:
            return (self._sender.send(engine, version),)
        except RuntimeError as error:
            return ({"failed": str(error)},)

    def proximal(
        self, step: int, groups: list[TrajectoryGroup]
    ) -> tuple[StepReport, tuple[PolicyFeedback, ...] | None]:
        """Computes log-probabilities under pi_old and pi_ref, and the critic's values. It keeps them for `train`.

        Args:
            step: the policy step.
            groups: all groups of the step.

        Returns a report and the feedback: pi_old's hidden states on this rank's groups. The feedback is None unless
        the reward head reads it and `feedback.source` is `learner`.

        Raises NonFiniteStep, naming the response and the model, if a number is not finite, unless
        `learner.on_nonfinite` is `skip`. Raises LearnerOutOfMemory.
        """
        with memory_enough_for(step_place(step, groups)):
            return StepReport(version=self._version, metrics={}), self._proximal(step, groups)

    def _proximal(self, step: int, groups: list[TrajectoryGroup]) -> tuple[PolicyFeedback, ...] | None:
        """Fills `_batch`, and returns this rank's feedback if the reward head reads it."""
        trajectories = tuple(trajectory for group in groups for trajectory in group.trajectories)
        if not trajectories:
            self._batch = None
            return ()
        rows, start = [], 0
        for group in groups:
            rows.append(range(start, start + len(group.trajectories)))
            start += len(group.trajectories)
        mask, passes = response_mask(trajectories), self._passes(trajectories, rows)
        reads_own = self._config.reads_feedback and self._config.feedback.source == "learner"
        states = KeptStates(self.backend.policy.device, self._config) if reads_own else None
        old = self._logprobs(self.backend.policy, trajectories, passes, mask, states)
        with self.backend.as_reference() as model:
            reference = self._logprobs(model, trajectories, passes, mask)
        batch = LearnerBatch(
            step=step,
            groups=tuple(groups),
            trajectories=trajectories,
            rows=tuple(rows),
            mask=mask,
            behaviour=behaviour_logprobs(trajectories),
            old=old,
            reference=reference,
            values=self.critic.values(trajectories, passes, mask) if self.critic else None,
        )
        self._compare_with_sampler(batch)
        # Under `skip`, `train` finds such numbers again and leaves the step out.
        if self._config.learner.on_nonfinite == "stop":
            check_passes(batch.groups, batch.old, batch.reference, batch.values, self._config)
        self._batch = batch
        return self._own_feedback(batch, states.taken()) if states else None

    def _compare_with_sampler(self, batch: LearnerBatch) -> None:
        """Compares the log-probabilities of learner and rollout engine, once, on tokens of the learner's own version.

        Raises WeightMismatch if they differ by more than `learner.max_mismatch`.
        """
        if self._compared:
            return
        fresh = torch.zeros_like(batch.mask)
        for row, one in enumerate(batch.trajectories):
            fresh[row, : one.num_response_tokens] = one.policy_versions[one.prompt_len :] == self._version
        if not fresh.any():
            return
        self._compared = True
        distances = (batch.old - batch.behaviour).abs().masked_fill(~fresh, 0)
        mean, limit = (distances.sum() / fresh.sum()).item(), self._config.max_mismatch
        # Numbers that are not finite are told by `check_passes`, with their source.
        if not math.isfinite(mean) or mean <= limit:
            return
        row, token = divmod(int(distances.argmax()), distances.shape[1])
        raise WeightMismatch(
            f"{step_place(batch.step, batch.groups)}: learner and rollout engine do not compute the same policy. Their "
            f"log-probabilities of the {int(fresh.sum())} tokens that version {self._version} sampled differ by {mean:.3g} "
            f"nats in the mean, and learner.max_mismatch is {limit:g}. Most at {row_place(batch.groups, row)}, token "
            f"{token}: {batch.old[row, token].item():.4g} by the learner, {batch.behaviour[row, token].item():.4g} by "
            f"rollouts.engine {self._config.rollouts.engine!r}. Use rollouts.engine 'transformers' to see which of them is "
            f"wrong, or raise learner.max_mismatch if the engine rounds more coarsely on purpose"
        )

    def train(self, step: int, rewards: Sequence[GroupRewards]) -> tuple[StepReport, tuple[PolicyFeedback, ...] | None]:
        """Makes all updates of a step, on the groups that `proximal` got.

        Args:
            step: the policy step, as `proximal` got it.
            rewards: the rewards of the groups, in the same order.

        Returns a report and the refreshed feedback: the policy's hidden states in the last epoch, on this rank's
        groups. The feedback is empty if nothing was learnt, and None if the reward head reads none.

        Raises NonFiniteStep for a reward, an advantage or a gradient that is not finite, before it moves any weight.
        Under `learner.on_nonfinite: skip` it raises nothing then: such a reward or advantage leaves the whole step out,
        and such a gradient leaves its own update out. In both modes it raises NonFiniteStep if an update of finite
        gradient made weights that are not finite, because that cannot be undone.

        Raises FunctionFailed if the advantage estimator fails, LearnerOutOfMemory, and RuntimeError if `proximal` got
        another step.
        """
        batch, self._batch = self._batch, None  # taken out: no step is ever trained on twice
        if batch is None:
            self._end_step()
            return StepReport(version=self._version, metrics={}), ()
        if batch.step != step:
            raise RuntimeError(f"train got step {step} after proximal got step {batch.step}")
        with memory_enough_for(step_place(step, batch.groups)):
            metrics, refreshed = self._train(batch, rewards)
        self._end_step()
        return StepReport(version=self._version, metrics=metrics), refreshed

    def _end_step(self) -> None:
        """Makes the weights the next version, and moves the reference if it is due, whatever the step has trained."""
        self._version += 1
        every = self._config.model.reference_every
        if self._moving and every and self._version % every == 0:
            self._moving.move(self.backend.named_parameters())

    def _train(
        self, batch: LearnerBatch, rewards: Sequence[GroupRewards]
    ) -> tuple[dict[str, float], tuple[PolicyFeedback, ...] | None]:
        """Makes all updates of a step. Returns the metrics and the refreshed feedback."""
        scored = [ScoredGroup(group=g, rewards=r) for g, r in zip(batch.groups, rewards, strict=True)]
        # All advantages come before the first update. So a step that fails here leaves the policy as it was.
        try:
            advantages, returns = step_advantages(
                self._estimator, scored, batch.old, batch.reference, self._config_now, batch.values, self._scale
            )
        except NonFiniteStep as error:
            if self._config.learner.on_nonfinite == "stop":
                raise
            log.warning("%s: the step is left out (learner.on_nonfinite is skip)", error)
            return self._left_out(scored), ()
        critic = self._critic_step(batch, returns)
        backend, lr, objective = self.backend, self._config.learning_rate(batch.step), self._config.objective
        statistics = StepStatistics(loss_mask(batch.trajectories, self._config), self._config)
        states = KeptStates(backend.policy.device, self._config)
        for epoch in range(objective.epochs):
            for first, last in minibatch_bounds(scored, objective.num_minibatches):
                rows = slice(first, last)
                passes = self._minibatch_passes(batch, rows)
                self._minibatch(batch, advantages, rows, passes, epoch, states, statistics)
                self._count(backend.step(lr), statistics, batch, "the gradient norm", lr)
                self._check_weights(backend, batch, "policy", "learner.lr", lr)
                if critic:
                    self._count(
                        critic.update(passes, rows), critic, batch, "the norm of the critic's gradient", critic.lr
                    )
                    self._check_weights(critic.backend, batch, "critic", "critic.lr", critic.lr)
        metrics = statistics.metrics(backend.total, batch.old - batch.behaviour, batch.ages) | {"policy/lr": lr}
        metrics |= batch_metrics(
            batch.mask, batch.behaviour, batch.old, batch.reference, advantages, batch.trajectories
        )
        metrics |= critic.metrics() if critic else {}
        if objective.kl_target is not None:
            metrics["kl/coefficient"] = self._kl_coef
            self._kl_coef = next_kl_coef(self._kl_coef, metrics["kl/sequence"], objective.kl_target, objective.kl_gain)
        if not self._config.reads_feedback:
            return metrics, None
        refreshed = _refreshed(batch, states.taken())
        # In float64, because float32 does not count bytes exactly.
        kept_bytes = backend.total(torch.tensor(float(states.num_bytes), dtype=torch.float64))
        return metrics | {"memory/refreshed_states_bytes": kept_bytes.item()}, refreshed

    @property
    def _config_now(self) -> R2MConfig:
        """The run's config, with the KL coefficient of the present step."""
        if self._config.objective.kl_target is None:
            return self._config
        return self._config.objective(kl_coef=self._kl_coef)

    def _critic_step(self, batch: LearnerBatch, returns: Tensor | None) -> CriticStep | None:
        """The critic's side of the step, or None without a critic."""
        if self.critic is None:
            return None
        assert batch.values is not None and returns is not None
        lr = self._config.learning_rate(batch.step, self._config.critic.lr)
        return CriticStep(self.critic, batch.trajectories, batch.mask, batch.values, returns, lr)

    def _count(
        self, norm: float, counts: StepStatistics | CriticStep, batch: LearnerBatch, what: str, lr: float
    ) -> None:
        """Counts an update by the norm of its gradient. If the norm is not finite, the update was not applied.

        Then it counts as skipped under `learner.on_nonfinite: skip`, and otherwise NonFiniteStep is raised.
        """
        if math.isfinite(norm):
            counts.grad_norms.append(norm)
        elif self._config.learner.on_nonfinite == "skip":
            counts.skipped += 1
        else:
            done = len(counts.grad_norms)
            after = f" after {done} updates of this step with learning rate {lr:g}: lower it" if done else ""
            raise NonFiniteStep(f"{step_place(batch.step, batch.groups)}: {what} is {norm}{after}")

    def _check_weights(self, backend: Backend, batch: LearnerBatch, model: str, key: str, lr: float) -> None:
        """Raises NonFiniteStep if a weight is not finite.

        It is called after every update, so such weights never become a version that is published.
        """
        if backend.finite():
            return
        raise NonFiniteStep(
            f"{step_place(batch.step, batch.groups)}: the {model}'s weights are not finite after an update whose gradient was "
            f"finite, with learning rate {lr:g} ({key}) and learner.weight_decay {self._config.learner.weight_decay:g}; lower them. "
            f"This update has changed the weights already, so learner.on_nonfinite 'skip' cannot leave it out"
        )

    def _left_out(self, scored: Sequence[ScoredGroup]) -> dict[str, float]:
        """The metrics of a step that is left out. All its updates count as skipped."""
        objective = self._config.objective
        updates = float(objective.epochs * len(minibatch_bounds(scored, objective.num_minibatches)))
        metrics = {"policy/skipped_updates": updates}
        return metrics | ({"critic/skipped_updates": updates} if self.critic else {})

    def state(self, directory: str | None = None) -> tuple[StepReport, dict[str, Any]]:
        """Saves the learner.

        Args:
            directory: where ranks may write large parts as files. All ranks must be able to reach it.

        Returns a report, and what `restore` needs to go on bit for bit.
        """
        path = None if directory is None else Path(directory)
        state = {"version": self._version, "kl_coef": self._kl_coef} | self.backend.state(self._version, path)
        if self._config.reward.normalize == "running":
            state["reward_scale"] = self._scale.state()
        if self.critic:
            state["critic"] = self.critic.state(self._version, path)
        if self._moving:
            state["reference"] = self._moving.state()
        return StepReport(version=self._version, metrics={}), state

    def restore(self, state: dict[str, Any], directory: str | None = None) -> tuple[int]:
        """Goes on from what `state` returned and wrote into `directory`. Returns the policy version.

        Raises ConfigError if the weights of the policy or the critic are not finite.
        """
        path = None if directory is None else Path(directory)
        self.backend.restore(state, path)
        if self.critic:
            self.critic.restore(state["critic"], path)
        if self._config.reward.normalize == "running":
            self._scale.restore(state["reward_scale"])
        if self._moving:
            self._moving.restore(state["reference"])
        if not (self.backend.finite() and (self.critic is None or self.critic.backend.finite())):
            raise ConfigError(
                f"the checkpoint's policy (version {state['version']}) or its critic has weights that are NaN or infinite: "
                f"their training had diverged; resume from an older checkpoint"
            )
        # A checkpoint of an earlier version has none, and its config has no `kl_target` either.
        self._version, self._kl_coef = state["version"], state.get("kl_coef", self._kl_coef)
        return (self._version,)

    def _passes(self, trajectories: Sequence[Trajectory], groups: Sequence[range]) -> list[MicroBatch]:
        """This rank's micro-batches of some groups, given by the rows of their trajectories."""
        backend = self.backend
        max_tokens, packed = self._config.learner.tokens_per_microbatch, self._config.learner.packing
        return rank_microbatches(trajectories, groups, backend.rank, backend.num_ranks, max_tokens, packed)

    def _minibatch_passes(self, batch: LearnerBatch, rows: slice) -> list[MicroBatch]:
        """This rank's micro-batches of a minibatch, which is the groups whose rows lie within `rows`."""
        groups = [group for group in batch.rows if rows.start <= group.start and group.stop <= rows.stop]
        return self._passes(batch.trajectories, groups)

    @torch.no_grad()
    def _logprobs(
        self,
        model: Any,
        trajectories: Sequence[Trajectory],
        passes: Sequence[MicroBatch],
        mask: Tensor,
        kept: KeptStates | None = None,
    ) -> Tensor:
        """Log-probabilities of all ranks' trajectories under `model`, [B, T] float32 on the CPU, 0 on padding.

        If `kept` is given, the hidden states of this rank's trajectories go there.
        """
        logprobs_BT = torch.zeros(mask.shape)
        for one in passes:
            chosen = [trajectories[row] for row in one.rows]
            part_BT, states, _ = self._pass(model, chosen)
            if one.counts and kept:
                kept.keep(one.rows, states)
            if one.counts:
                logprobs_BT[list(one.rows), : part_BT.shape[1]] = part_BT.cpu()
        # Every row is 0 but on the rank that computed it, so the sum over ranks puts all rows together.
        return self.backend.total(logprobs_BT)

    def _pass(
        self, model: Any, trajectories: Sequence[Trajectory], entropy: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """One forward pass: the log-probabilities, the hidden states and, if asked for, the entropies (`policy_pass`)."""
        config = self._config
        return policy_pass(model, trajectories, config.rollouts.temperature, config.learner.packing, entropy)

    def _own_feedback(self, batch: LearnerBatch, states: dict[int, Tensor]) -> tuple[PolicyFeedback, ...]:
        """pi_old's feedback on this rank's groups, from the states of the proximal pass by row.

        Greedy twins are not trained and have no such states, so each twin takes a forward pass of its own.
        """
        owned = group_shares(batch.trajectories, batch.rows, self.backend.num_ranks)
        mine = owned[self.backend.rank]
        # Every rank must make equally many passes. A rank with fewer groups repeats group 0 and drops the results.
        pace = mine + [0] * (max(map(len, owned)) - len(mine))
        policy, groups, rows = self.backend.policy, batch.groups, batch.rows
        return tuple(
            proximal_feedback(
                policy, groups[g], [states[row] for row in rows[g] if row in states], self._config, batch.step
            )
            for g in pace
        )[: len(mine)]

    def _minibatch(
        self,
        batch: LearnerBatch,
        advantages: Tensor,
        rows: slice,
        passes: Sequence[MicroBatch],
        epoch: int,
        kept: KeptStates,
        statistics: StepStatistics,
    ) -> None:
        """Adds up the gradient of this rank's part of a minibatch, and measures it for the statistics.

        In the last epoch the hidden states go into `kept`. `rows` are the minibatch's rows in the step.
        """
        device = self.backend.policy.device
        keeps = self._config.reads_feedback and epoch == self._config.objective.epochs - 1
        # Counts of the whole minibatch divide the loss. So the losses of all passes and ranks add up to its loss.
        denominator, responses = denominators(loss_mask(batch.trajectories[rows], self._config), self._config)
        config, place = self._config_now, step_place(batch.step, batch.groups)
        for index, one in enumerate(passes):
            chosen, trajectories = list(one.rows), [batch.trajectories[row] for row in one.rows]
            logprobs_BT, states, entropies_BT = self._pass(
                self.backend.policy, trajectories, config.objective.entropy_coef > 0
            )
            last = index == len(passes) - 1
            if not one.counts:
                # Other ranks have more passes. A gradient of 0 takes part in their collectives and changes nothing. It must
                # come from all results that theirs comes from. Else the ranks of ZeRO stage 3 wait for each other.
                results = [logprobs_BT] if entropies_BT is None else [logprobs_BT, entropies_BT]
                self.backend.backward(0.0 * torch.stack([result.sum() for result in results]).sum(), last)
                continue
            if keeps:
                kept.keep(chosen, states)
            loss, surrogate, _ = microbatch_loss(
                logprobs_BT,
                entropies_BT,
                batch.behaviour[chosen].to(device),
                batch.old[chosen].to(device),
                batch.reference[chosen].to(device),
                advantages[chosen].to(device),
                loss_mask(trajectories, config).to(device),
                denominator,
                responses,
                self._estimator,
                config,
                place,
            )
            self.backend.backward(loss, last)
            statistics.add(epoch, chosen, loss, surrogate)


def _refreshed(batch: LearnerBatch, states: dict[int, Tensor]) -> tuple[PolicyFeedback, ...]:
    """The refreshed feedback on those groups whose states are on this rank."""
    return tuple(
        PolicyFeedback(
            group_id=group.ticket.group_id,
            hidden_states=tuple(states[row] for row in rows),
            greedy=None,  # the twin is not trained on, and the head learner does not read it
            policy_version=batch.step,
        )
        for group, rows in zip(batch.groups, batch.rows, strict=True)
        if all(row in states for row in rows)
    )
