"""The reward head of each variant: how it is built, how it scores a group, and how it is updated.

A reward head turns what the frozen reward model computed for a response into a reward. Its last part is the scoring
head phi, which comes with the reward model. `head.variant` decides what the reward head reads and whether it learns:

    r2m             reads the policy's hidden states (the feedback), and learns
    r2m_no_train    reads the feedback, and stays as it began
    r2m_noise       reads noise with the mean and variance of the feedback, and learns
    iterative_head  is phi alone, and learns
    vanilla         is phi alone, and stays as it came

R2M, arXiv 2601.22664, Sec. 4 and Algorithm 1, lines 15-20.

Shapes: K responses of a group, S prompt + response tokens of one trajectory, D_m hidden size of the reward model, D_p
hidden size of the policy.
"""

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


def build_head(phi: nn.Module | None, rm_hidden_size: int, policy_hidden_size: int, config: R2MConfig) -> nn.Module:
    """Returns a new float32 reward head on the CPU, all of whose parameters require gradients.

    phi: the reward model's own scoring head. The new head has a copy of it as `.scoring_head`. None if there is no reward
        model: the head then has no parameters, and its rewards are 0.
    rm_hidden_size, policy_hidden_size: D_m and D_p.

    Variants that read feedback get an `R2MHead`. Its first weights are drawn from `run.seed`. The others get a plain
    module that holds the copy of phi and nothing else.
    """
    if phi is None:
        return nn.Module()
    # A copy, because phi stays a part of the frozen reward model, whose own rewards must not change.
    phi = copy.deepcopy(phi).float().cpu().requires_grad_(True)
    if config.reads_feedback:
        generator = torch.Generator().manual_seed(sampling_seed(config.run.seed, 0, Stream.HEAD))
        return R2MHead(rm_hidden_size, policy_hidden_size, config.head.width, phi, generator=generator)
    head = nn.Module()
    head.scoring_head = phi
    return head


def omega_of(step: int, config: R2MConfig) -> float:
    """Returns omega, the weight of the response's embedding beside the feedback: Eq. 4 at t = `step` + 1.

    step: the policy step, counted from 0. Variants that read no feedback have omega 1.
    """
    if not config.reads_feedback:
        return 1.0
    return mixing_weight(step + 1, config.omega_horizon, config.head.omega_floor)


def head_rewards(head: nn.Module, rte: Tensor, states: Sequence[Tensor] | None, omega: float) -> Tensor:
    """Returns the rewards [K] float32 of one group by `head`, on the head's device. Gradients flow if enabled.

    rte: [K, D_m] float32, the reward token embeddings of the responses.
    states: K tensors [S - 1, D_p] of hidden states of the policy, or None if the head reads no feedback.
    omega: the weight of the embedding beside the feedback, see `omega_of`.
    """
    if not rte.shape[-1]:
        return torch.zeros(len(rte))
    if states is None:
        return head.scoring_head(rte.to(next(head.parameters()).device)).squeeze(-1)
    device = next(head.parameters()).device
    return head(rte.to(device), [rows.to(device) for rows in states], None, omega)


@torch.no_grad()
def score_group(
    head: nn.Module,
    embeddings: RewardEmbeddings,
    feedback: PolicyFeedback | None,
    step: int,
    head_version: int,
    config: R2MConfig,
) -> GroupRewards:
    """Returns the rewards of a group: those of the reward head, clipped to `reward.clip`, plus the bonuses.

    embeddings: the group's reward token embeddings and bonuses. If they have a greedy twin, it is scored too.
    feedback: the policy's hidden states on the group, or None if the head reads no feedback.
    step: the policy step, counted from 0, which sets omega.
    head_version: the version of `head`, which is recorded in the result.

    Raises NonFiniteStep if a reward is not finite. The message names the first such response and what made its reward
    so. Under `learner.on_nonfinite: skip` a line in the log says so instead, and the rewards are returned as they are.
    """
    omega = omega_of(step, config)
    states, greedy_states = _states(feedback, Stream.SAMPLED_NOISE, config)
    model_rewards = head_rewards(head, embeddings.rte, states, omega).cpu()
    clipped = _clipped(model_rewards, config)
    rewards = clipped + embeddings.bonus
    greedy = None
    of_all = [rewards]
    if embeddings.greedy_rte is not None:
        (greedy_reward,) = head_rewards(head, embeddings.greedy_rte[None], greedy_states, omega).cpu()
        greedy = _clipped(greedy_reward, config) + embeddings.greedy_bonus
        of_all.append(greedy[None])
    # A reward function that failed for a held-out response leaves a gap in the evaluation. The log says so already.
    gap = embeddings.group_id < 0 and bool(embeddings.bonus.isnan().any())
    if (bad := first_bad(torch.cat(of_all))) and not gap:
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
        parts=_parts(clipped, embeddings, config),
    )


def reward_spread(embeddings: RewardEmbeddings, config: R2MConfig) -> float:
    """Returns the largest reward of a group minus the smallest. Without a head that moves, they are known at once.

    It is meant for `head.variant: vanilla`, whose rewards are those of the original reward model, if there is one, and the
    bonuses. It is NaN if a reward is not finite.
    """
    rewards = frozen_whole_rewards(embeddings, config)
    return (rewards.max() - rewards.min()).item()


def frozen_whole_rewards(embeddings: RewardEmbeddings, config: R2MConfig) -> Tensor:
    """Returns the rewards [K] of a group by the reward model as it came, clipped to `reward.clip`, plus the bonuses."""
    return _clipped(embeddings.frozen_rewards, config) + embeddings.bonus


def _parts(clipped: Tensor, embeddings: RewardEmbeddings, config: R2MConfig) -> Tensor:
    """Returns the parts [K, R] of a group's rewards, in the order of `RewardSection.parts`. clipped: [K]."""
    parts = [] if config.reward.model is None else [clipped[:, None]]
    parts += [] if embeddings.functions is None else [embeddings.functions]
    parts += [] if embeddings.penalties is None else [embeddings.penalties[:, None]]
    return torch.cat(parts, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTerms:
    """The terms of the reward head's loss for one group. All are scalars. Only `loss` carries a gradient."""

    loss: Tensor
    """The group's loss. An update minimises its mean over the groups of a step."""
    grebt: GrebtTerms
    """The terms of Eq. 7 as the paper has it, without the penalty of `head.hold`."""
    hold: Tensor
    """The penalty that `head.hold` adds to `loss`, already multiplied by its weight. Zero if there is no penalty."""
    agrees: Tensor
    """bool: True if the frozen reward model also ranks the pair's chosen response above its rejected one."""
    teaches: Tensor
    """bool: False for a group that `hold: agreement` leaves out. A step of such groups alone does not move the head."""


RESPONSES_AT_ONCE = 64
"""About how many responses one pass of the head takes in an update.

The head has many more weights than a response has numbers in an embedding, so a pass costs hardly more for many responses
than for one.
"""


def head_losses(
    head: nn.Module, groups: Sequence[HeadGroup], step: int, config: R2MConfig
) -> Iterator[list[HeadTerms]]:
    """Yields the loss terms of the groups of a step in order, some groups at a time: those of one pass of the head.

    The rewards in the loss are those of `head` as it is now, on the refreshed feedback (the hidden states of the policy
    from the last epoch of the step's training). step: the policy step, counted from 0.

    The caller should call `backward` on the sum of the losses before it asks for the next. Then only one graph is in memory.
    """
    step_rewards = None
    if config.head.hold == "bsr":
        # This penalty needs the rewards of all groups at once. They are computed here without a graph, and once more
        # with one below: `_mean_square_share` makes the sum of the parts have the gradient of the whole.
        with torch.no_grad():
            step_rewards = [
                rewards for part in _passes(groups) for rewards in _refreshed_rewards(head, part, step, config)
            ]
    for part in _passes(groups):
        rewards = _refreshed_rewards(head, part, step, config)
        yield [_head_terms(own, group, step_rewards, config) for own, group in zip(rewards, part, strict=True)]


def _passes(groups: Sequence[HeadGroup]) -> list[list[HeadGroup]]:
    """Cuts groups, in their order, into parts of at least `RESPONSES_AT_ONCE` responses; the last may have fewer."""
    parts: list[list[HeadGroup]] = []
    count = RESPONSES_AT_ONCE
    for group in groups:
        if count >= RESPONSES_AT_ONCE:
            parts.append([])
            count = 0
        parts[-1].append(group)
        count += len(group.embeddings.rte)
    return parts


def _refreshed_rewards(
    head: nn.Module, groups: Sequence[HeadGroup], step: int, config: R2MConfig
) -> tuple[Tensor, ...]:
    """Returns the rewards [K] of each group by `head` as it is now, on the feedback that the groups come with."""
    states: list[Tensor] | None = []
    for group in groups:
        own, _ = _states(group.feedback, Stream.REFRESHED_NOISE, config)
        states = None if own is None or states is None else [*states, *own]
    rte = torch.cat([group.embeddings.rte for group in groups])
    rewards = head_rewards(head, rte, states, omega_of(step, config))
    return rewards.split([len(group.embeddings.rte) for group in groups])


def _head_terms(
    rewards: Tensor, group: HeadGroup, step_rewards: Sequence[Tensor] | None, config: R2MConfig
) -> HeadTerms:
    """Returns the loss terms of one group.

    rewards: [K], by the present head, with gradient. step_rewards: the rewards [K] of every group of the step without
    gradient, for `hold: bsr`; otherwise None.
    """
    hold, weight = config.head.hold, config.head.hold_weight
    frozen = group.embeddings.frozen_rewards.to(rewards.device)
    pairs = {"refreshed": None, "annotated": group.annotated.model_rewards.to(rewards.device), "frozen": frozen}
    of_pairs = pairs[config.head.pair_source]
    grebt = grebt_terms(rewards[None], config.head.alpha, None if of_pairs is None else of_pairs[None])
    chooses = rewards if of_pairs is None else of_pairs
    agrees = frozen[chooses.argmax()] > frozen[chooses.argmin()]
    teaches = agrees | (hold != "agreement")
    # `head.hold` is either a penalty that is added, a choice of groups (`agreement`), or an average (`HeldHead`).
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
    """Updates the trained head once on the groups of a step (Algorithm 1, lines 17-20).

    head: the trained head. held: the head that scores, which follows the trained one. step: counted from 0.

    Returns the loss terms of the groups, and True if the update counts.

    An update fails if a loss, a gradient, a weight or a reward after the update is not finite. Then it raises
    NonFiniteStep, whose message names the step and what was not finite. Under `learner.on_nonfinite: skip` the head and
    the optimizer are put back as they were instead, and the second result is False.
    """
    kept = None
    if config.learner.on_nonfinite == "skip":
        # A deep copy: the optimizer changes these very tensors in place.
        kept = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
    terms: list[HeadTerms] = []
    for part in head_losses(head, groups, step, config):
        (torch.stack([term.loss for term in part]).sum() / len(groups)).backward()
        terms += part
    failure = _failed_update(head, groups, terms, step, config)
    # Without a group that teaches there is no step: AdamW would move the head by its old moments all the same.
    if failure is None and any(term.teaches for term in terms):
        optimizer.step()
        # A sample: the rewards of one group show weights that are finite and yet too large.
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
    """Returns why the gradients must not move the head, in words for a message, or None if they may."""
    named = f"step {step} (groups {[group.embeddings.group_id for group in groups]})"
    losses = torch.stack([term.loss.detach() for term in terms])
    if losses.isfinite().all():
        gradients = (parameter.grad for parameter in head.parameters() if parameter.grad is not None)
        # Losses may be finite and gradients not: a backward pass can overflow by itself.
        return None if all_finite(gradients) else f"{named}: the gradient of the head is not finite, of finite losses"
    what = f"the loss of the head's update is {losses[~losses.isfinite()][0].item()}"
    for group in groups:
        frozen = group.embeddings.frozen_rewards
        if bad := first_bad(_refreshed_rewards(head, [group], step, config)[0]):
            source = head_source(group.embeddings.rte[bad[0]], group.feedback, bad[0], head, step, config)
        elif bad := first_bad(frozen):
            source = f"the reward by reward.model {config.reward.model!r} is {frozen[bad[0]].item()}"
        else:
            continue
        return f"{group_place(step, group.embeddings.group_id)}, response {bad[0]}: {what}: {source}"
    return f"{named}: {what}, of finite rewards"


@torch.no_grad()
def _failed_head(head: nn.Module, group: HeadGroup, step: int, config: R2MConfig) -> str | None:
    """Returns why the updated head must not be published, in words for a message, or None if it may.

    Finite weights are not enough: they may be so large that the rewards overflow.
    """
    bad = first_bad(_refreshed_rewards(head, [group], step, config)[0])
    if bad is None and all_finite(head.parameters()):
        return None
    index = bad[0] if bad else 0
    source = head_source(group.embeddings.rte[index], group.feedback, index, head, step + 1, config)
    place = f"{group_place(step, group.embeddings.group_id)}, response {index}"
    return f"{place}: the head is not finite once it is updated with head.lr {config.head.lr:g}: {source}"


def _mean_square_share(rewards: Tensor, step_rewards: Sequence[Tensor]) -> Tensor:
    """Returns one group's share, a scalar, in the squared mean of all rewards of a step.

    rewards: [K], the group's, with gradient.
    step_rewards: the rewards [K] of every group, without gradient. Groups may differ in K.

    The mean of the shares over the groups is the squared mean, and it has the gradient of the squared mean.
    """
    every = torch.cat(list(step_rewards))
    mean, rewards_per_group = every.mean(), len(every) / len(step_rewards)
    return 2 * mean * rewards.sum() / rewards_per_group - mean.square()


class HeldHead:
    """The reward head that scores.

    It is the trained head itself, or under `hold: average` an exponential moving average of the trained head's weights.
    """

    def __init__(self, head: nn.Module, config: R2MConfig) -> None:
        """head: the trained head. Under `hold: average` a second head is made here, with decay `head.hold_decay`."""
        self._averaged = None
        if config.head.hold == "average":
            self._averaged = AveragedModel(head, multi_avg_fn=get_ema_multi_avg_fn(config.head.hold_decay))
        self._trained = head

    @property
    def scoring(self) -> nn.Module:
        """The module to score with, and to publish."""
        return self._trained if self._averaged is None else self._averaged.module

    def start(self) -> None:
        """Begins the average anew, at the trained head's present weights. Without an average it does nothing."""
        if self._averaged is not None:
            # At a count of zero, torch copies the weights instead of averaging them.
            self._averaged.n_averaged.zero_()
            self.follow()

    def follow(self) -> None:
        """Takes the trained head's present weights into the average. Call it after every update of the trained head."""
        if self._averaged is not None:
            self._averaged.update_parameters(self._trained)

    def resume(self, weights: Weights) -> None:
        """Goes on with the average that a checkpoint saved. Without an average it does nothing.

        weights: the weights of `scoring` in the checkpoint.
        """
        if self._averaged is not None:
            load_weights(self._averaged.module, weights)
            # Any count above zero: the next `follow` must average, not copy.
            self._averaged.n_averaged.fill_(1)


def _clipped(rewards: Tensor, config: R2MConfig) -> Tensor:
    """Returns the rewards clipped to [-reward.clip, reward.clip], or as they are if there is no clip.

    Infinity and NaN are not clipped. Infinity is not a large reward but a sum that overflowed, and it must be noticed.
    """
    clip = config.reward.clip
    return rewards if clip is None else torch.where(rewards.isfinite(), rewards.clamp(-clip, clip), rewards)


def _states(
    feedback: PolicyFeedback | None, noise_stream: int, config: R2MConfig
) -> tuple[Sequence[Tensor] | None, Sequence[Tensor] | None]:
    """Returns the hidden states that the variant's head reads: the K responses', and the greedy twin's.

    Each is a tensor [S - 1, D_p]. The second result is a list of one tensor, or empty if there is no twin. Both are
    None without feedback. noise_stream: the `Stream` that `r2m_noise` draws from.
    """
    if feedback is None:
        return None, None
    states = [*feedback.hidden_states, *([] if feedback.greedy is None else [feedback.greedy])]
    if config.head.variant == "r2m_noise":
        first = _noise_seed(feedback.group_id, noise_stream, config)
        # Seeds of one group differ in their lowest bits only, which is enough to give each trajectory other noise.
        states = [noise_like(rows, first ^ index) for index, rows in enumerate(states)]
    num = len(feedback.hidden_states)
    return states[:num], states[num:]


def _noise_seed(group_id: int, stream: int, config: R2MConfig) -> int:
    """Returns the seed of the noise for a group.

    Evaluation groups are numbered from -1 downwards and have a stream of their own. So no two groups share noise.
    """
    if group_id < 0:
        return sampling_seed(config.run.seed, -1 - group_id, Stream.EVALUATION_NOISE)
    return sampling_seed(config.run.seed, group_id, stream)
