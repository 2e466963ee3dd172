"""The variants' heads (method.md section 7): how each is built, scores a group, and what its update minimises."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from r2m_async.config import R2MConfig
from r2m_async.data.seeds import Stream, sampling_seed
from r2m_async.finite import all_finite, first_bad, head_source, response_name, reward_source, stop_or_log
from r2m_async.head_objectives import GrebtTerms, grebt_terms, preference_divergence
from r2m_async.models.weights import load_weights
from r2m_async.reward_head import R2MHead, mixing_weight, noise_like
from r2m_async.trajectories import (
    GroupRewards,
    HeadGroup,
    PolicyFeedback,
    RewardEmbeddings,
    Weights,
    group_place,
)


def build_head(phi: nn.Module, rm_hidden_size: int, policy_hidden_size: int, config: R2MConfig) -> nn.Module:
    """A module with `.scoring_head`, a copy of phi; an `R2MHead` where the variant reads feedback. Float32."""
    phi = copy.deepcopy(phi).float().cpu().requires_grad_(True)
    if config.reads_feedback:
        generator = torch.Generator().manual_seed(sampling_seed(config.run.seed, 0, Stream.HEAD))
        return R2MHead(rm_hidden_size, policy_hidden_size, config.head.width, phi, generator=generator)
    head = nn.Module()
    head.scoring_head = phi
    return head


def omega_of(step: int, config: R2MConfig) -> float:
    """Eq. 4 at t = step + 1; 1 where the variant reads no feedback."""
    if not config.reads_feedback:
        return 1.0
    return mixing_weight(step + 1, config.omega_horizon, config.head.omega_floor)


def head_rewards(head: nn.Module, rte: Tensor, states: Sequence[Tensor] | None, omega: float) -> Tensor:
    """[K] rewards of one group: `rte` [K, D_m], `states` K tensors [S - 1, D_p] or None."""
    if states is None:
        return head.scoring_head(rte.to(next(head.parameters()).device)).squeeze(-1)
    device = next(head.parameters()).device
    offsets = torch.tensor([0, *(len(rows) for rows in states)]).cumsum(0)
    return head(rte.to(device), torch.cat(list(states)).to(device), None, omega, offsets=offsets)


@torch.no_grad()
def score_group(
    head: nn.Module,
    embeddings: RewardEmbeddings,
    feedback: PolicyFeedback | None,
    step: int,
    head_version: int,
    config: R2MConfig,
) -> GroupRewards:
    """Binds a group's rewards: the head's, clipped, plus bonuses.

    Raises NonFiniteStep naming the response whose reward is not finite and what made it so; under
    `learner.on_nonfinite: skip` such rewards are returned as they are.
    """
    omega = omega_of(step, config)
    states, greedy_states = _states(feedback, Stream.SAMPLED_NOISE, config)
    model_rewards = head_rewards(head, embeddings.rte, states, omega).cpu()
    rewards = _clipped(model_rewards, config) + embeddings.bonus
    greedy = None
    of_all = [rewards]
    if embeddings.greedy_rte is not None:
        (greedy_reward,) = head_rewards(head, embeddings.greedy_rte[None], greedy_states, omega).cpu()
        greedy = _clipped(greedy_reward, config) + embeddings.greedy_bonus
        of_all.append(greedy[None])
    if bad := first_bad(torch.cat(of_all)):
        index, place = bad[0], group_place(step, embeddings.group_id)
        source = reward_source(embeddings, feedback, index, head, head_version, config)
        stop_or_log(f"{place}, {response_name(index, len(rewards))}: its reward is not finite: {source}", config)
    return GroupRewards(
        group_id=embeddings.group_id,
        rewards=rewards,
        model_rewards=model_rewards,
        greedy_reward=greedy,
        head_version=head_version,
        omega=omega,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTerms:
    """Of one group; scalars. Only `loss` carries a gradient."""

    loss: Tensor
    """What the update minimises, in the mean over groups."""
    grebt: GrebtTerms
    """Eq. 7, as it is in the paper's version."""
    hold: Tensor
    """The penalty of `head.hold` in `loss`, weight included."""
    agrees: Tensor
    """bool; the frozen reward model, too, ranks the pair's chosen response above its rejected one."""
    teaches: Tensor
    """bool; False for a group that `hold: agreement` leaves out. A step of such groups alone does not move the head."""


def head_losses(head: nn.Module, groups: Sequence[HeadGroup], step: int, config: R2MConfig) -> Iterator[HeadTerms]:
    """Group by group, so that one graph is alive at a time: rewards by the present head on the refreshed feedback."""
    step_rewards = None
    if config.head.hold == "bsr":
        with torch.no_grad():
            step_rewards = [_refreshed_rewards(head, one, step, config) for one in groups]
    for group in groups:
        yield _head_terms(_refreshed_rewards(head, group, step, config), group, step_rewards, config)


def _refreshed_rewards(head: nn.Module, group: HeadGroup, step: int, config: R2MConfig) -> Tensor:
    states, _ = _states(group.feedback, Stream.REFRESHED_NOISE, config)
    return head_rewards(head, group.embeddings.rte, states, omega_of(step, config))


def _head_terms(
    rewards: Tensor, group: HeadGroup, step_rewards: Sequence[Tensor] | None, config: R2MConfig
) -> HeadTerms:
    """`step_rewards`: of all the step's groups, for BSR."""
    hold, weight = config.head.hold, config.head.hold_weight
    frozen = group.embeddings.frozen_rewards.to(rewards.device)
    pairs = {"refreshed": None, "annotated": group.annotated.model_rewards.to(rewards.device), "frozen": frozen}
    of_pairs = pairs[config.head.pair_source]
    grebt = grebt_terms(rewards[None], config.head.alpha, None if of_pairs is None else of_pairs[None])
    chooses = rewards if of_pairs is None else of_pairs
    agrees = frozen[chooses.argmax()] > frozen[chooses.argmin()]
    teaches = agrees | (hold != "agreement")
    penalty, loss = torch.zeros((), device=rewards.device), grebt.loss
    if hold == "divergence":
        penalty = weight * preference_divergence(rewards[None], frozen[None])
    elif step_rewards is not None:
        penalty = weight * _mean_square_share(rewards, step_rewards)
    return HeadTerms(loss=loss * teaches + penalty, grebt=grebt, hold=penalty.detach(), agrees=agrees, teaches=teaches)


def improve_head(
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    held: HeldHead,
    groups: Sequence[HeadGroup],
    step: int,
    config: R2MConfig,
) -> tuple[list[HeadTerms], bool]:
    """One update of the trained head on a step's groups (Algorithm 1, lines 17-20); its terms, and whether it counts.

    A head whose loss, gradient, weights or rewards after the update are not finite is no version. Raises NonFiniteStep
    naming the step and what made it so; under `learner.on_nonfinite: skip` head and optimizer stay as they were.
    """
    kept = None
    if config.learner.on_nonfinite == "skip":
        kept = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
    terms = []
    for term in head_losses(head, groups, step, config):
        (term.loss / len(groups)).backward()
        terms.append(term)
    failure = _failed_update(head, groups, terms, step, config)
    if failure is None and any(term.teaches for term in terms):
        optimizer.step()
        failure = _failed_head(head, groups[0], step, config)
    optimizer.zero_grad(set_to_none=True)
    if failure is None:
        held.follow()
        return terms, True
    stop_or_log(failure, config)
    assert kept is not None
    head.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    return terms, False


@torch.no_grad()
def _failed_update(
    head: nn.Module, groups: Sequence[HeadGroup], terms: Sequence[HeadTerms], step: int, config: R2MConfig
) -> str | None:
    """Why the head must not be moved by its gradients, or None."""
    named = f"step {step} (groups {[group.embeddings.group_id for group in groups]})"
    losses = torch.stack([term.loss.detach() for term in terms])
    if losses.isfinite().all():
        gradients = (parameter.grad for parameter in head.parameters() if parameter.grad is not None)
        return None if all_finite(gradients) else f"{named}: the gradient of the head is not finite, of finite losses"
    what = f"the loss of the head's update is {losses[~losses.isfinite()][0].item()}"
    for group in groups:
        frozen = group.embeddings.frozen_rewards
        if bad := first_bad(_refreshed_rewards(head, group, step, config)):
            source = head_source(group.embeddings.rte[bad[0]], group.feedback, bad[0], head, step, config)
        elif bad := first_bad(frozen):
            source = f"the reward by reward.model {config.reward.model!r} is {frozen[bad[0]].item()}"
        else:
            continue
        return f"{group_place(step, group.embeddings.group_id)}, response {bad[0]}: {what}: {source}"
    return f"{named}: {what}, of finite rewards"


@torch.no_grad()
def _failed_head(head: nn.Module, group: HeadGroup, step: int, config: R2MConfig) -> str | None:
    """Why the moved head must not be published, or None. Weights may be finite and too large to give a finite reward."""
    bad = first_bad(_refreshed_rewards(head, group, step, config))
    if bad is None and all_finite(head.parameters()):
        return None
    index = bad[0] if bad else 0
    source = head_source(group.embeddings.rte[index], group.feedback, index, head, step + 1, config)
    place = f"{group_place(step, group.embeddings.group_id)}, response {index}"
    return f"{place}: the head is not finite once it is updated with head.lr {config.head.lr:g}: {source}"


def _mean_square_share(rewards: Tensor, step_rewards: Sequence[Tensor]) -> Tensor:
    """One group's share in the square of the mean of all of `step_rewards`, whose groups may be of different size: the
    mean of these shares over groups is that square, and has its gradient."""
    every = torch.cat(list(step_rewards))
    mean, rewards_per_group = every.mean(), len(every) / len(step_rewards)
    return 2 * mean * rewards.sum() / rewards_per_group - mean.square()


class HeldHead:
    """The head that scores: the trained one, or under `hold: average` the exponential moving average of its weights."""

    def __init__(self, head: nn.Module, config: R2MConfig) -> None:
        self._averaged = None
        if config.head.hold == "average":
            self._averaged = AveragedModel(head, multi_avg_fn=get_ema_multi_avg_fn(config.head.hold_decay))
        self._trained = head

    @property
    def scoring(self) -> nn.Module:
        return self._trained if self._averaged is None else self._averaged.module

    def start(self) -> None:
        """From the trained head's present weights."""
        if self._averaged is not None:
            self._averaged.n_averaged.zero_()
            self.follow()

    def follow(self) -> None:
        """After an update of the trained head."""
        if self._averaged is not None:
            self._averaged.update_parameters(self._trained)

    def resume(self, weights: Weights) -> None:
        """From a checkpoint's scoring head."""
        if self._averaged is not None:
            load_weights(self._averaged.module, weights)
            self._averaged.n_averaged.fill_(1)


def _clipped(rewards: Tensor, config: R2MConfig) -> Tensor:
    """Infinity stays what it is: it is no large reward, but a sum that overflowed."""
    clip = config.reward.clip
    return rewards if clip is None else torch.where(rewards.isfinite(), rewards.clamp(-clip, clip), rewards)


def _states(
    feedback: PolicyFeedback | None, noise_stream: int, config: R2MConfig
) -> tuple[Sequence[Tensor] | None, Sequence[Tensor] | None]:
    """(states, the twin's as a list of one) as the variant's head sees them."""
    if feedback is None:
        return None, None
    states = [*feedback.hidden_states, *([] if feedback.greedy is None else [feedback.greedy])]
    if config.head.variant == "r2m_noise":
        first = _noise_seed(feedback.group_id, noise_stream, config)
        states = [noise_like(rows, first ^ index) for index, rows in enumerate(states)]
    num = len(feedback.hidden_states)
    return states[:num], states[num:]


def _noise_seed(group_id: int, stream: int, config: R2MConfig) -> int:
    """Groups of the evaluation, numbered from -1 down, have a stream of their own: none shares another group's noise."""
    if group_id < 0:
        return sampling_seed(config.run.seed, -1 - group_id, Stream.EVALUATION_NOISE)
    return sampling_seed(config.run.seed, group_id, stream)
