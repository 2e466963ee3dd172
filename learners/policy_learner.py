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

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learners.backend import Backend, PolicyBackend
from learners.critic import Critic, CriticStep
from learners.kept_states import KeptStates
from learners.memory import memory_enough_for
from learners.passes import Passes
from learners.publication import Publication
from learners.shares import MicroBatch
from learners.step_batch import StepBatch, group_rows
from learners.step_statistics import StepStatistics, batch_metrics
from r2m_async.advantages import Estimator
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, NonFiniteStep
from r2m_async.finite import first_bad, stop_or_log
from r2m_async.models.pairs import reread_pairs
from r2m_async.models.policy import behaviour_logprobs, response_mask
from r2m_async.models.policy_objective import (
    check_passes,
    denominators,
    loss_mask,
    microbatch_loss,
    minibatch_bounds,
    step_advantages,
    step_place,
)
from r2m_async.models.reward_probe import PromptStates, probe_of
from r2m_async.models.reward_scale import RewardScale
from r2m_async.models.weights import MovingReference
from r2m_async.objectives import next_kl_coef
from r2m_async.trajectories import (
    GroupRewards,
    LabelBatch,
    PolicyFeedback,
    RereadPair,
    ScoredGroup,
    StepReport,
    Trajectory,
    TrajectoryGroup,
    Weights,
)

log = logging.getLogger(__name__)


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
        self._batch: StepBatch | None = None
        """What `proximal` left for `train`. None if the step has no trajectories."""
        self._kl_coef = config.objective.kl_coef
        """The KL coefficient of the present step. It changes under `objective.kl_target` alone."""
        self._scale = RewardScale(config)
        self._probe = probe_of(estimator, config)
        self._moving: MovingReference | None = None
        if config.model.reference_every is not None:
            with backend.as_reference() as reference:
                self._moving = MovingReference(reference, config.model.reference_mix)
        self._publication = Publication(backend, config)
        self._passes = Passes(backend, config)

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
            return StepReport(version=self._version, metrics={}), self._publication.weights(self._version, whole)

    # Direct transports: the learner sends weights itself. These calls run while another thread trains.

    def open_channel(self, engine: int) -> tuple[dict[str, Any]]:
        """Opens a new channel to an engine, given by its number, in the place of an old one.

        Returns what the engine needs to join the channel.
        """
        return (self._publication.open_channel(engine),)

    def connect(self, engine: int) -> tuple[dict[str, str]]:
        """Waits for an engine to join its channel.

        Returns an empty dict, or the reason under `failed` if the engine did not join.
        """
        return (self._publication.connect(engine),)

    def send(self, engine: int, version: int) -> tuple[dict[str, str]]:
        """Sends a staged version to an engine, over its channel.

        Args:
            engine: the engine's number.
            version: the policy version.

        Returns what the engine must know besides to load it, or the reason under `failed` if the version was not sent.
        """
        return (self._publication.send(engine, version),)

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
        rows = group_rows(groups)
        mask, passes = response_mask(trajectories), self._passes.of_groups(trajectories, rows)
        reads_own = self._config.reads_feedback and self._config.feedback.source == "learner"
        states = KeptStates(self.backend.policy.device, self._config) if reads_own else None
        prompts = PromptStates(trajectories, self._config) if self._probe else None
        old = self._passes.logprobs(self.backend.policy, trajectories, passes, mask, states, prompts)
        with self.backend.as_reference() as model:
            reference = self._passes.logprobs(model, trajectories, passes, mask)
        batch = StepBatch(
            step=step,
            groups=tuple(groups),
            trajectories=trajectories,
            rows=rows,
            mask=mask,
            behaviour=behaviour_logprobs(trajectories),
            old=old,
            reference=reference,
            values=self.critic.values(trajectories, passes, mask) if self.critic else None,
            prompts=self.backend.total(prompts.taken(self._width)) if prompts else None,
        )
        self._compared = self._compared or batch.compared_with_sampler(self._version, self._config)
        # Under `skip`, `train` finds such numbers again and leaves the step out.
        if self._config.learner.on_nonfinite == "stop":
            check_passes(batch.groups, batch.old, batch.reference, batch.values, self._config)
        self._batch = batch
        return self._passes.own_feedback(batch, states.taken()) if states else None

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

    @property
    def _width(self) -> int:
        """The number of values in one hidden state of the policy."""
        return int(self.backend.policy.config.get_text_config().hidden_size)

    def reread(self, step: int, labels: LabelBatch) -> tuple[StepReport, tuple[RereadPair, ...]]:
        """Reads pairs of a head update with the policy as it is now, after the step (`LabelBatch.unread`).

        Args:
            step: the policy step.
            labels: the labels of the update.

        Returns a report, and what the policy makes of each pair of this rank. Raises LearnerOutOfMemory.
        """
        report, unread, policy = StepReport(version=self._version, metrics={}), labels.unread, self.backend.policy
        if not unread:
            return report, ()
        with memory_enough_for(f"step {step}, the pairs of its head update"):
            kept, offline = KeptStates(policy.device, self._config), unread[len(unread) - len(labels.offline) :]
            ratios = self._sums(policy, unread, kept)[2 * (len(unread) - len(offline)) :]
            if offline:
                with self.backend.as_reference() as reference:
                    ratios = ratios - self._sums(reference, offline)
                self._check_offline(step, labels, ratios)
            read = reread_pairs(labels, kept.taken(), ratios, step, self._config)
        return report, read

    def _check_offline(self, step: int, labels: LabelBatch, ratios: Tensor) -> None:
        """Raises NonFiniteStep, or logs, if the policy or the reference gives a pair of a data set no finite log-probability.

        One such pair would make the weights of all pairs NaN.

        Args:
            step: the policy step.
            labels: the labels of its head update.
            ratios: [2 P], log pi - log pi_ref of the responses of the P pairs.
        """
        if bad := first_bad(ratios):
            pair, response = divmod(bad[0], 2)
            prompt, which = labels.offline[pair].ticket.prompt.prompt_id, ("preferred", "other")[response]
            stop_or_log(
                f"step {step}: labels.offline {self._config.labels.offline!r}, {prompt}, the {which} response: its "
                f"log-probability by the policy less that by the reference is {ratios[bad[0]].item()}",
                self._config,
            )

    def _sums(self, model: Any, pairs: Sequence[tuple[Trajectory, ...]], kept: KeptStates | None = None) -> Tensor:
        """The log-probabilities of the two responses of each pair, summed over tokens: [2 P]. States go to `kept`."""
        trajectories = [trajectory for pair in pairs for trajectory in pair]
        rows = [range(start, start + 2) for start in range(0, len(trajectories), 2)]
        passes, mask = self._passes.of_groups(trajectories, rows), response_mask(trajectories)
        return self._passes.logprobs(model, trajectories, passes, mask, kept).sum(1)

    def _end_step(self) -> None:
        """Makes the weights the next version, and moves the reference if it is due, whatever the step has trained."""
        self._version += 1
        every = self._config.model.reference_every
        if self._moving and every and self._version % every == 0:
            self._moving.move(self.backend.named_parameters())

    def _train(
        self, batch: StepBatch, rewards: Sequence[GroupRewards]
    ) -> tuple[dict[str, float], tuple[PolicyFeedback, ...] | None]:
        """Makes all updates of a step. Returns the metrics and the refreshed feedback."""
        scored = [ScoredGroup(group=g, rewards=r) for g, r in zip(batch.groups, rewards, strict=True)]
        # All advantages come before the first update. So a step that fails here leaves the policy as it was.
        try:
            advantages, returns = step_advantages(
                self._estimator,
                scored,
                batch.old,
                batch.reference,
                self._config_now,
                batch.values,
                self._scale,
                self._probe,
                batch.prompts,
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
                passes = self._passes.of_minibatch(batch, rows)
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
        refreshed = batch.refreshed(states.taken())
        # In float64, because float32 does not count bytes exactly.
        kept_bytes = backend.total(torch.tensor(float(states.num_bytes), dtype=torch.float64))
        return metrics | {"memory/refreshed_states_bytes": kept_bytes.item()}, refreshed

    @property
    def _config_now(self) -> R2MConfig:
        """The run's config, with the KL coefficient of the present step."""
        if self._config.objective.kl_target is None:
            return self._config
        return self._config.objective(kl_coef=self._kl_coef)

    def _critic_step(self, batch: StepBatch, returns: Tensor | None) -> CriticStep | None:
        """The critic's side of the step, or None without a critic."""
        if self.critic is None:
            return None
        assert batch.values is not None and returns is not None
        lr = self._config.learning_rate(batch.step, self._config.critic.lr)
        return CriticStep(self.critic, batch.trajectories, batch.mask, batch.values, returns, lr)

    def _count(self, norm: float, counts: StepStatistics | CriticStep, batch: StepBatch, what: str, lr: float) -> None:
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
            # A loss of the user's may be finite and have a gradient that is not, as that of a root at 0.
            loss = self._config.objective.loss
            of = f", of objective.loss {loss!r}," if ":" in loss and isinstance(counts, StepStatistics) else ""
            raise NonFiniteStep(f"{batch.place}: {what}{of} is {norm}{after}")

    def _check_weights(self, backend: Backend, batch: StepBatch, model: str, key: str, lr: float) -> None:
        """Raises NonFiniteStep if a weight is not finite.

        It is called after every update, so such weights never become a version that is published.
        """
        if backend.finite():
            return
        raise NonFiniteStep(
            f"{batch.place}: the {model}'s weights are not finite after an update whose gradient was "
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
        if self._probe:
            state["reward_probe"] = self._probe.state()
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
        if self._probe:
            self._probe.restore(state["reward_probe"])
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

    def _minibatch(
        self,
        batch: StepBatch,
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
        config, place = self._config_now, batch.place
        for index, one in enumerate(passes):
            chosen, trajectories = list(one.rows), [batch.trajectories[row] for row in one.rows]
            logprobs_BT, states, entropies_BT = self._passes.forward(
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
