"""The policy learner: a step's proximal pass, advantages and epochs, whichever backend moves the weights.

`proximal` fixes pi_old and keeps what it computed here; `train` follows with the step's rewards. So log-probabilities
and advantages never travel. A backend may be one of several ranks, each with a learner of its own around it: all get
the same calls with all groups, compute on their share of them, and agree on everything that is about the whole batch.
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
from r2m_async.errors import ConfigError, NonFiniteStep
from r2m_async.finite import all_finite
from r2m_async.models.policy import behaviour_logprobs, logprobs_and_states, proximal_feedback, response_mask
from r2m_async.models.policy_objective import (
    check_passes,
    denominators,
    microbatch_loss,
    minibatch_bounds,
    step_advantages,
    step_place,
)
from r2m_async.models.weights import named_weights, weight_probe
from r2m_async.ring.stages import produces
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
    """The groups of exactly one due step with pi_old's and the reference's log-probabilities, and the critic's values."""

    step: int
    groups: tuple[TrajectoryGroup, ...]
    trajectories: tuple[Trajectory, ...]
    """All groups' trajectories, in group order."""
    rows: tuple[range, ...]
    """Where each group's stand among them."""
    mask: Tensor
    """[B, T] bool; all that follow are [B, T] too."""
    behaviour: Tensor
    old: Tensor
    reference: Tensor
    values: Tensor | None
    """None without a critic."""

    @property
    def ages(self) -> Tensor:
        """[B] int64: the step minus the oldest policy version in a trajectory."""
        return torch.tensor([max(0, self.step - trajectory.oldest_version) for trajectory in self.trajectories])


class PolicyLearner:
    def __init__(
        self, backend: PolicyBackend, estimator: Estimator, config: R2MConfig, critic: Critic | None = None
    ) -> None:
        """`critic` is there if the estimator needs values, and has as many ranks as the policy."""
        self._backend = backend
        self._critic = critic
        self._config = config
        self._version = 0
        self._estimator = estimator
        self._batch: LearnerBatch | None = None
        self._sender = WeightSender(config) if config.weights.direct and backend.rank == 0 else None

    @produces(1)
    def weights(self, whole: bool = False) -> tuple[StepReport, Weights | None]:
        """The present version, on rank 0: a copy, or with a direct transport what is staged of it, unless `whole`.

        May run beside `proximal` where `config.publishes_beside_passes`. Raises NonFiniteStep where a probe (`weights.probe`)
        shows that the policy computes no finite log-probabilities.
        """
        with memory_enough_for(f"policy version {self._version}, being copied out"):
            return StepReport(version=self._version, metrics={}), self._weights(whole)

    def _weights(self, whole: bool) -> Weights | None:
        backend = self._backend
        weights = Weights(version=self._version, tensors={})
        tensors: dict[str, Tensor] = {}
        if backend.rank > 0:
            for _ in backend.named_parameters():  # which the others help to gather
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
            if not all_finite([probe.logprobs]):  # an engine would be blamed for not computing the same
                raise NonFiniteStep(
                    f"policy version {self._version}: its log-probabilities of the probe text are not finite, of finite "
                    f"weights: they have grown too large for its arithmetic; lower learner.lr"
                )
            weights = dataclasses.replace(weights, probe=probe)
        return weights if backend.rank == 0 else None

    # Direct transports, called while another thread trains. What fails is told, not raised: the engine is lost, not we.

    @produces(0)
    def open_channel(self, engine: int) -> tuple[dict[str, Any]]:
        assert self._sender is not None
        return (self._sender.open(engine),)

    @produces(0)
    def connect(self, engine: int) -> tuple[dict[str, str]]:
        """Waits for the engine to join its channel; `failed` with the reason if it did not."""
        assert self._sender is not None
        try:
            self._sender.connect(engine)
        except RuntimeError as error:  # torch's and NCCL's
            return ({"failed": str(error)},)
        return ({},)

    @produces(0)
    def send(self, engine: int, version: int) -> tuple[dict[str, str]]:
        """Sends a version to an engine that is loading it; what it must be told besides, or `failed` with the reason."""
        assert self._sender is not None
        try:
            return (self._sender.send(engine, version),)
        except RuntimeError as error:
            return ({"failed": str(error)},)

    @produces(1, shares=(0,))
    def proximal(
        self, step: int, groups: list[TrajectoryGroup]
    ) -> tuple[StepReport, tuple[PolicyFeedback, ...] | None]:
        """pi_old's and the reference's log-probabilities on the step's groups, kept for `train`.

        Returns pi_old's feedback on this rank's groups where `feedback.source` is `learner`. Raises NonFiniteStep naming
        the response and the model whose numbers are not finite, unless `learner.on_nonfinite` is `skip`.
        """
        with memory_enough_for(step_place(step, groups)):
            return StepReport(version=self._version, metrics={}), self._proximal(step, groups)

    def _proximal(self, step: int, groups: list[TrajectoryGroup]) -> tuple[PolicyFeedback, ...] | None:
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
        states = KeptStates(self._backend.policy.device, self._config) if reads_own else None
        old = self._logprobs(self._backend.policy, trajectories, passes, mask, states)
        with self._backend.as_reference() as model:
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
            values=self._critic.values(trajectories, passes, mask) if self._critic else None,
        )
        if self._config.learner.on_nonfinite == "stop":
            check_passes(batch.groups, batch.old, batch.reference, batch.values, self._config)
        self._batch = batch
        return self._own_feedback(batch, states.taken()) if states else None

    @produces(1, shares=(0,))
    def train(self, step: int, rewards: Sequence[GroupRewards]) -> tuple[StepReport, tuple[PolicyFeedback, ...] | None]:
        """All epochs on the batch of `proximal`; returns the feedback that the last one refreshed here.

        Raises NonFiniteStep, before the policy moves, for a reward, an advantage or a gradient that is not finite. Under
        `learner.on_nonfinite: skip` a step with such rewards or advantages is left out whole, and then the feedback is
        empty; an update with such a gradient is left out alone. In either mode an update that makes weights which are not
        finite raises, for it cannot be undone. Raises FunctionFailed for the estimator, and LearnerOutOfMemory.
        """
        batch, self._batch = self._batch, None
        if batch is None:
            self._version += 1
            return StepReport(version=self._version, metrics={}), ()
        if batch.step != step:
            raise RuntimeError(f"train got step {step} after proximal got step {batch.step}")
        with memory_enough_for(step_place(step, batch.groups)):
            metrics, refreshed = self._train(batch, rewards)
        self._version += 1
        return StepReport(version=self._version, metrics=metrics), refreshed

    def _train(
        self, batch: LearnerBatch, rewards: Sequence[GroupRewards]
    ) -> tuple[dict[str, float], tuple[PolicyFeedback, ...] | None]:
        scored = [ScoredGroup(group=g, rewards=r) for g, r in zip(batch.groups, rewards, strict=True)]
        try:
            advantages, returns = step_advantages(
                self._estimator, scored, batch.old, batch.reference, self._config, batch.values
            )
        except NonFiniteStep as error:
            if self._config.learner.on_nonfinite == "stop":
                raise
            log.warning("%s: the step is left out (learner.on_nonfinite is skip)", error)
            return self._left_out(scored), ()
        critic = self._critic_step(batch, returns)
        backend, lr, objective = self._backend, self._config.learning_rate(batch.step), self._config.objective
        statistics = StepStatistics(batch.mask, self._config)
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
        if not self._config.reads_feedback:
            return metrics, None
        refreshed = _refreshed(batch, states.taken())
        kept_bytes = backend.total(torch.tensor(float(states.num_bytes), dtype=torch.float64))
        return metrics | {"memory/refreshed_states_bytes": kept_bytes.item()}, refreshed

    def _critic_step(self, batch: LearnerBatch, returns: Tensor | None) -> CriticStep | None:
        if self._critic is None:
            return None
        assert batch.values is not None and returns is not None
        lr = self._config.learning_rate(batch.step, self._config.critic.lr)
        return CriticStep(self._critic, batch.trajectories, batch.mask, batch.values, returns, lr)

    def _count(
        self, norm: float, counts: StepStatistics | CriticStep, batch: LearnerBatch, what: str, lr: float
    ) -> None:
        """Raises NonFiniteStep unless the update of this norm was applied, or left out as the config says."""
        if math.isfinite(norm):
            counts.grad_norms.append(norm)
        elif self._config.learner.on_nonfinite == "skip":
            counts.skipped += 1
        else:
            done = len(counts.grad_norms)
            after = f" after {done} updates of this step with learning rate {lr:g}: lower it" if done else ""
            raise NonFiniteStep(f"{step_place(batch.step, batch.groups)}: {what} is {norm}{after}")

    def _check_weights(self, backend: Backend, batch: LearnerBatch, model: str, key: str, lr: float) -> None:
        """After every update and before the version is published: raises NonFiniteStep where a weight is not finite."""
        if backend.finite():
            return
        raise NonFiniteStep(
            f"{step_place(batch.step, batch.groups)}: the {model}'s weights are not finite after an update of finite gradient "
            f"with learning rate {lr:g} ({key}) and learner.weight_decay {self._config.learner.weight_decay:g}; lower them. "
            f"What moved the weights cannot be left out any more, not under learner.on_nonfinite skip either"
        )

    def _left_out(self, scored: Sequence[ScoredGroup]) -> dict[str, float]:
        """The metrics of a step of which nothing was learnt."""
        objective = self._config.objective
        updates = float(objective.epochs * len(minibatch_bounds(scored, objective.num_minibatches)))
        metrics = {"policy/skipped_updates": updates}
        return metrics | ({"critic/skipped_updates": updates} if self._critic else {})

    @produces(1)
    def state(self, directory: str | None = None) -> tuple[StepReport, dict[str, Any]]:
        """What `restore` continues from, bit for bit. `directory`, which every rank can reach, may hold part of it."""
        path = None if directory is None else Path(directory)
        state = {"version": self._version} | self._backend.state(self._version, path)
        if self._critic:
            state["critic"] = self._critic.state(self._version, path)
        return StepReport(version=self._version, metrics={}), state

    @produces(0)
    def restore(self, state: dict[str, Any], directory: str | None = None) -> tuple[int]:
        """Raises ConfigError for weights that are not finite."""
        path = None if directory is None else Path(directory)
        self._backend.restore(state, path)
        if self._critic:
            self._critic.restore(state["critic"], path)
        if not (self._backend.finite() and (self._critic is None or self._critic.backend.finite())):
            raise ConfigError(
                f"the checkpoint's policy (version {state['version']}) or its critic has weights that are NaN or infinite: "
                f"their training had diverged; resume from an older checkpoint"
            )
        self._version = state["version"]
        return (self._version,)

    def _passes(self, trajectories: Sequence[Trajectory], groups: Sequence[range]) -> list[MicroBatch]:
        backend = self._backend
        max_tokens, packed = self._config.learner.tokens_per_microbatch, self._config.learner.packing
        return rank_microbatches(trajectories, groups, backend.rank, backend.num_ranks, max_tokens, packed)

    def _minibatch_passes(self, batch: LearnerBatch, rows: slice) -> list[MicroBatch]:
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
        """[B, T] float32 on the CPU, of all ranks' trajectories; keeps the states of this rank's."""
        logprobs_BT = torch.zeros(mask.shape)
        for one in passes:
            chosen = [trajectories[row] for row in one.rows]
            part_BT, states = self._pass(model, chosen)
            if one.counts and kept:
                kept.keep(one.rows, states)
            if one.counts:
                logprobs_BT[list(one.rows), : part_BT.shape[1]] = part_BT.cpu()
        return self._backend.total(logprobs_BT)

    def _pass(self, model: Any, trajectories: Sequence[Trajectory]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return logprobs_and_states(model, trajectories, self._config.rollouts.temperature, self._config.learner.packing)

    def _own_feedback(self, batch: LearnerBatch, states: dict[int, Tensor]) -> tuple[PolicyFeedback, ...]:
        """Of this rank's groups. The twins' passes are as many on every rank."""
        owned = group_shares(batch.trajectories, batch.rows, self._backend.num_ranks)
        mine = owned[self._backend.rank]
        pace = mine + [0] * (max(map(len, owned)) - len(mine))
        policy, groups, rows = self._backend.policy, batch.groups, batch.rows
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
        """Accumulates the gradients of this rank's part of the rows; keeps the last epoch's states."""
        device = self._backend.policy.device
        keeps = self._config.reads_feedback and epoch == self._config.objective.epochs - 1
        denominator, responses = denominators(batch.mask[rows], self._config)
        for index, one in enumerate(passes):
            chosen, trajectories = list(one.rows), [batch.trajectories[row] for row in one.rows]
            logprobs_BT, states = self._pass(self._backend.policy, trajectories)
            last = index == len(passes) - 1
            if not one.counts:
                self._backend.backward(0.0 * logprobs_BT.sum(), last)
                continue
            if keeps:
                kept.keep(chosen, states)
            loss, surrogate, _ = microbatch_loss(
                logprobs_BT,
                batch.behaviour[chosen].to(device),
                batch.old[chosen].to(device),
                batch.reference[chosen].to(device),
                advantages[chosen].to(device),
                response_mask(trajectories).to(device),
                denominator,
                responses,
                self._estimator,
                self._config,
            )
            self._backend.backward(loss, last)
            statistics.add(epoch, chosen, loss, surrogate)


def _refreshed(batch: LearnerBatch, states: dict[int, Tensor]) -> tuple[PolicyFeedback, ...]:
    """Of the groups whose states are here."""
    return tuple(
        PolicyFeedback(
            group_id=group.ticket.group_id,
            hidden_states=tuple(states[row] for row in rows),
            greedy=None,
            policy_version=batch.step,
        )
        for group, rows in zip(batch.groups, batch.rows, strict=True)
        if all(row in states for row in rows)
    )
