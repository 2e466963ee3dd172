"""The reward head of each variant: how it is built, how it scores a group, and how it is updated.

A reward head turns what the frozen reward model computed for a response into a reward. Its last part is the scoring
head phi, which comes with the reward model. `head.variant` decides what the reward head reads and whether it learns:

    r2m             reads the policy's hidden states (the feedback), and learns
    r2m_no_train    reads the feedback, and stays as it began
    r2m_noise       reads noise with the mean and variance of the feedback, and learns
    iterative_head  is phi alone, and learns
    iterative_model is the whole reward model, its backbone included, and learns
    vanilla         is phi alone, and stays as it came

R2M, arXiv 2601.22664, Sec. 4 and Algorithm 1, lines 15-20.

Shapes: K responses of a group, S prompt + response tokens of one trajectory, D_m hidden size of the reward model, D_p
hidden size of the policy.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from r2m_async.config import R2MConfig
from r2m_async.data.seeds import Stream, sampling_seed
from r2m_async.finite import all_finite, first_bad, head_source, response_name, reward_source, stop_or_log
from r2m_async.head_objectives import (
    GrebtTerms,
    bradley_terry,
    grebt_terms,
    pair_weights,
    pessimistic,
    preference_divergence,
    steering_penalty,
)
from r2m_async.models.batches import right_padded
from r2m_async.models.reward import reward_token_embeddings, scoring_head
from r2m_async.models.weights import load_weights
from r2m_async.reward_head import R2MHead, mixing_weight, noise_like
from r2m_async.state_attention import aligned
from r2m_async.trajectories import (
    GroupRewards,
    HeadGroup,
    LabelBatch,
    PolicyFeedback,
    RewardEmbeddings,
    Weights,
    group_place,
)


class WholeModel(nn.Module):
    """A reward model as a head of its own: it reads the tokens of responses, and all of it is trained."""

    def __init__(self, model: nn.Module) -> None:
        """model: a reward model. The new head has a copy of it in float32."""
        super().__init__()
        self.model = copy.deepcopy(model).float().requires_grad_(True)

    def forward(self, input_ids: Sequence[Tensor]) -> Tensor:
        """Returns the rewards [K] of K responses, each given by its tokens [S], as the reward model reads it."""
        device, pad = next(self.parameters()).device, self.model.config.get_text_config().pad_token_id
        rows, mask = right_padded([ids.tolist() for ids in input_ids], pad or 0, device)
        return scoring_head(self.model)(reward_token_embeddings(self.model, rows, mask.long())).squeeze(-1)


class Ensemble(nn.Module):
    """Several heads of one variant, which learn from the same groups and labels, each with weights of its own."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        """members: the heads."""
        super().__init__()
        self.members = nn.ModuleList(members)


def members_of(head: nn.Module) -> list[nn.Module]:
    """Returns the heads of an ensemble, or the one head itself."""
    return list(head.members) if isinstance(head, Ensemble) else [head]


def bootstrap_weight(group_id: int, member: int, config: R2MConfig) -> int:
    """Returns how often one head of an ensemble sees a group or a labelled pair of it: 0, 1, 2, ... times.

    The numbers are Poisson with mean 1, as in the online bootstrap (Oza and Russell, 2001): heads that begin alike then
    learn apart. They depend on the run's seed, the group and the member alone. A head that is alone sees all once.
    """
    if config.head.ensemble == 1:
        return 1
    seed = sampling_seed(config.run.seed, group_id, Stream.HEAD_BOOTSTRAP)
    left, probability, number = random.Random(f"{seed}/{member}").random(), math.exp(-1.0), 0
    while left > probability:
        left -= probability
        number += 1
        probability /= number
    return number


def build_head(
    phi: nn.Module | None,
    rm_hidden_size: int,
    policy_hidden_size: int,
    config: R2MConfig,
    reward_model: nn.Module | None = None,
) -> nn.Module:
    """Returns a new float32 reward head on the CPU, all of whose parameters require gradients.

    phi: the reward model's own scoring head. The new head has a copy of it as `.scoring_head`. None if there is no reward
        model: the head then has no parameters, and its rewards are 0.
    rm_hidden_size, policy_hidden_size: D_m and D_p.
    reward_model: the reward model. Only `iterative_model` reads it, whose head is a copy of it.

    Variants that read feedback get an `R2MHead`. Its first weights are drawn from `run.seed`. The others get a plain
    module that holds the copy of phi and nothing else.
    """
    if phi is None:
        return nn.Module()
    sizes, number = (rm_hidden_size, policy_hidden_size), config.head.ensemble
    members = [_build_member(phi, *sizes, config, reward_model, member) for member in range(number)]
    return Ensemble(members) if number > 1 else members[0]


def _build_member(
    phi: nn.Module,
    rm_hidden_size: int,
    policy_hidden_size: int,
    config: R2MConfig,
    reward_model: nn.Module | None,
    member: int,
) -> nn.Module:
    """Returns one head, as `build_head` describes it. Of several, each `R2MHead` draws weights of its own."""
    if config.head.reads_tokens:
        assert reward_model is not None
        return WholeModel(reward_model).cpu()
    # A copy, because phi stays a part of the frozen reward model, whose own rewards must not change.
    phi = copy.deepcopy(phi).float().cpu().requires_grad_(True)
    if config.reads_feedback:
        generator = torch.Generator().manual_seed(sampling_seed(config.run.seed, member, Stream.HEAD))
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
    device = next(head.parameters()).device
    rte = aligned(rte.to(device))
    if states is None:
        return head.scoring_head(rte).squeeze(-1)
    return head(rte, [rows.to(device) for rows in states], None, omega)


def member_rewards(
    head: nn.Module, embeddings: RewardEmbeddings, states: Sequence[Tensor] | None, omega: float
) -> Tensor:
    """Returns the rewards [M, K] float32 of one group by each of the M heads of an ensemble, or by the one head."""
    return torch.stack([rewards_of(member, embeddings, states, omega) for member in members_of(head)])


def rewards_of(head: nn.Module, embeddings: RewardEmbeddings, states: Sequence[Tensor] | None, omega: float) -> Tensor:
    """Returns the rewards [K] float32 of one group by one head: by its tokens, or as `head_rewards` from its embeddings."""
    if embeddings.input_ids is not None:
        return head(embeddings.input_ids)
    return head_rewards(head, embeddings.rte, states, omega)


def twin_of(embeddings: RewardEmbeddings) -> RewardEmbeddings | None:
    """Returns the greedy twin of a group as a group of its own. None if there is no twin."""
    if embeddings.greedy_rte is None or embeddings.greedy_bonus is None:
        return None
    ids = embeddings.greedy_input_ids
    return RewardEmbeddings(
        group_id=embeddings.group_id,
        rte=embeddings.greedy_rte[None],
        greedy_rte=None,
        bonus=embeddings.greedy_bonus[None],
        greedy_bonus=None,
        frozen_rewards=torch.zeros(1),
        input_ids=None if ids is None else (ids,),
    )


@torch.no_grad()
def score_group(
    head: nn.Module,
    embeddings: RewardEmbeddings,
    feedback: PolicyFeedback | None,
    step: int,
    head_version: int,
    config: R2MConfig,
) -> GroupRewards:
    """Returns the rewards of a group: those of the reward head, clipped to `reward.clip`, plus the bonuses, minus the penalty
    of `head.steering`. The greedy twin has no such penalty.

    embeddings: the group's reward token embeddings and bonuses. If they have a greedy twin, it is scored too.
    feedback: the policy's hidden states on the group, or None if the head reads no feedback.
    step: the policy step, counted from 0, which sets omega.
    head_version: the version of `head`, which is recorded in the result.

    Raises NonFiniteStep if a reward is not finite. The message names the first such response and what made its reward
    so. Under `learner.on_nonfinite: skip` a line in the log says so instead, and the rewards are returned as they are.
    """
    omega = omega_of(step, config)
    states, greedy_states = _states(feedback, Stream.SAMPLED_NOISE, config)
    members_MK = member_rewards(head, embeddings, states, omega).cpu()
    model_rewards = pessimistic(members_MK, config.head.pessimism)
    clipped = _clipped(model_rewards, config)
    if config.head.steering:
        clipped = clipped - config.head.steering * _steering(head, embeddings, states, omega)
    rewards = clipped + embeddings.bonus
    greedy = None
    of_all = [rewards]
    if (twin := twin_of(embeddings)) is not None:
        of_twin = member_rewards(head, twin, greedy_states, omega).cpu()
        (greedy_reward,) = pessimistic(of_twin, config.head.pessimism)
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
        members=members_MK if len(members_MK) > 1 else None,
    )


@torch.enable_grad()
def _steering(head: nn.Module, embeddings: RewardEmbeddings, states: Sequence[Tensor] | None, omega: float) -> Tensor:
    """Returns the `steering_penalty` [K] of each response, on the CPU. Of an ensemble it is the mean over the heads."""
    penalties = []
    for member in members_of(head):
        parameters, rewards = list(member.parameters()), rewards_of(member, embeddings, states, omega)
        gradients = [
            torch.cat(
                [
                    part.flatten()
                    for part in torch.autograd.grad(reward, parameters, retain_graph=True, materialize_grads=True)
                ]
            )
            for reward in rewards
        ]
        penalties.append(steering_penalty(torch.stack(gradients)).cpu())
    return torch.stack(penalties).mean(0)


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
    """bool: False for a group that `hold: agreement` leaves out, or that awaits labels and adds nothing else to the loss.
    A step of such groups alone does not move the head."""


RESPONSES_AT_ONCE = 64
"""About how many responses one pass of the head takes in an update.

The head has many more weights than a response has numbers in an embedding, so a pass costs hardly more for many responses
than for one.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTerms:
    """The terms of the reward head's loss for one labelled pair. All are scalars. Only `loss` carries a gradient."""

    loss: Tensor
    """The pair's part of the loss of an update, which is the sum of these and the mean of the groups' losses."""
    bradley_terry: Tensor
    """The Bradley-Terry term (Eq. 5) with the labelled pair in the place of the best and the worst response. It is a mean
    over the heads of an ensemble."""
    agrees: Tensor
    """bool: True if the head, before the update, ranks the two as the label does. Of an ensemble it is the mean."""


def head_groups(
    embeddings: Sequence[RewardEmbeddings],
    refreshed: Sequence[PolicyFeedback] | None,
    annotated: Sequence[GroupRewards],
) -> list[HeadGroup]:
    """Puts together what the head learns from in one step.

    embeddings, annotated: those of the step's groups, in the same order. refreshed: the refreshed feedback on them. It is
    empty if the policy learner left the step out, which then has no groups, and None if the head reads no feedback.
    """
    if refreshed is not None and not refreshed:
        return []
    feedback: Sequence[PolicyFeedback | None] = refreshed or [None] * len(embeddings)
    return [
        HeadGroup(embeddings=one, feedback=states, annotated=rewards)
        for one, states, rewards in zip(embeddings, feedback, annotated, strict=True)
    ]


def head_losses(
    head: nn.Module,
    groups: Sequence[HeadGroup],
    step: int,
    config: R2MConfig,
    labels: LabelBatch | None = None,
) -> Iterator[list[HeadTerms]]:
    """Yields the loss terms of the groups of a step in order, some groups at a time: those of one pass of the head.

    The rewards in the loss are those of `head` as it is now, on the refreshed feedback (the hidden states of the policy
    from the last epoch of the step's training). step: the policy step, counted from 0. labels: those of this update, if
    there is a `labels.source`. `label_losses` yields their own terms.

    The caller should call `backward` on the sum of the losses before it asks for the next. Then only one graph is in memory.
    """
    asked, weight = set(labels.asked) if labels else set(), 1.0
    if labels:
        weight = len(groups) * _pair_weights(groups, labels, config)[1]
    members = members_of(head)
    step_rewards: list[list[Tensor] | None] = [None] * len(members)
    if config.head.hold == "bsr":
        # This penalty needs the rewards of all groups at once. They are computed here without a graph, and once more
        # with one below: `_mean_square_share` makes the sum of the parts have the gradient of the whole.
        with torch.no_grad():
            step_rewards = [
                [rewards for part in _passes(groups) for rewards in _refreshed_rewards(member, part, step, config)]
                for member in members
            ]
    for part in _passes(groups):
        of_members = [_refreshed_rewards(member, part, step, config) for member in members]
        terms = []
        for index, group in enumerate(part):
            own = 0.0 if group.embeddings.group_id in asked else weight
            of_group = [
                _head_terms(rewards[index], group, of_step, own, config)
                for rewards, of_step in zip(of_members, step_rewards, strict=True)
            ]
            terms.append(of_group[0] if len(members) == 1 else _joined(of_group, group, config))
        yield terms


def _joined(terms: Sequence[HeadTerms], group: HeadGroup, config: R2MConfig) -> HeadTerms:
    """Joins the terms of the heads of an ensemble for one group. Each head sees the group as often as `bootstrap_weight` says.

    The loss is the sum of theirs. The other terms are means, of which the last two ask whether a head agrees or learns.
    """
    weights = [bootstrap_weight(group.embeddings.group_id, member, config) for member in range(len(terms))]

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)).float().mean()

    loss = torch.zeros(())
    for weight, term in zip(weights, terms, strict=True):
        if weight:  # a head that does not see the group gets no gradient, so that its old moments do not move it
            loss = loss + weight * term.loss
    return HeadTerms(
        loss=loss,
        grebt=GrebtTerms(
            loss=mean([term.grebt.loss.detach() for term in terms]),
            bradley_terry=mean([term.grebt.bradley_terry for term in terms]),
            group_reward_entropy=mean([term.grebt.group_reward_entropy for term in terms]),
            gap=mean([term.grebt.gap for term in terms]),
        ),
        hold=mean([term.hold for term in terms]),
        agrees=mean([term.agrees for term in terms]) > 0.5,
        teaches=torch.stack([term.teaches & (weight > 0) for weight, term in zip(weights, terms, strict=True)]).any(),
    )


def label_losses(
    head: nn.Module, groups: Sequence[HeadGroup], step: int, config: R2MConfig, labels: LabelBatch
) -> Iterator[PairTerms]:
    """Yields the loss terms of each labelled pair of an update, in order. Arguments are those of `head_losses`.

    A pair is compared by `head` as it is now, with the omega of this step. Its states are those that it comes with.
    """
    weight = (1 - config.head.alpha) * _pair_weights(groups, labels, config)[0]
    for pair in labels.pairs:
        loss, terms, gaps = torch.zeros(()), [], []
        for member, one in enumerate(members_of(head)):
            chosen, rejected = _refreshed_rewards(one, [pair.group], step, config)[0]
            term = bradley_terry(chosen, rejected)
            terms.append(term.detach())
            gaps.append((chosen - rejected).detach())
            if seen := bootstrap_weight(pair.label.group_id, member, config):
                loss = loss + seen * (weight * pair.weight) * term
        mean_gap = torch.stack(gaps).mean()
        yield PairTerms(loss=loss, bradley_terry=torch.stack(terms).mean(), agrees=mean_gap > 0)


def _pair_weights(groups: Sequence[HeadGroup], labels: LabelBatch, config: R2MConfig) -> tuple[float, float]:
    """Returns the weights of one labelled pair and of one pair of the head's own in an update (`pair_weights`)."""
    asked = set(labels.asked)
    num_own = sum(group.embeddings.group_id not in asked for group in groups)
    labelled = sum(pair.weight for pair in labels.pairs)
    return pair_weights(labelled, num_own, config.labels.self_weight)


def _passes(groups: Sequence[HeadGroup]) -> list[list[HeadGroup]]:
    """Cuts groups, in their order, into parts of at least `RESPONSES_AT_ONCE` responses; the last may have fewer.

    A head that reads tokens, which is a whole model, gets one group at a time.
    """
    parts: list[list[HeadGroup]] = []
    count = RESPONSES_AT_ONCE
    for group in groups:
        if count >= RESPONSES_AT_ONCE or group.embeddings.input_ids is not None:
            parts.append([])
            count = 0
        parts[-1].append(group)
        count += len(group.embeddings.rte)
    return parts


def _refreshed_rewards(
    head: nn.Module, groups: Sequence[HeadGroup], step: int, config: R2MConfig
) -> tuple[Tensor, ...]:
    """Returns the rewards [K] of each group by `head` as it is now, on the feedback that the groups come with."""
    if groups[0].embeddings.input_ids is not None:
        return tuple(rewards_of(head, group.embeddings, None, omega_of(step, config)) for group in groups)
    states: list[Tensor] | None = []
    for group in groups:
        own, _ = _states(group.feedback, Stream.REFRESHED_NOISE, config)
        states = None if own is None or states is None else [*states, *own]
    rte = torch.cat([group.embeddings.rte for group in groups])
    rewards = head_rewards(head, rte, states, omega_of(step, config))
    return rewards.split([len(group.embeddings.rte) for group in groups])


def _head_terms(
    rewards: Tensor,
    group: HeadGroup,
    step_rewards: Sequence[Tensor] | None,
    pair_weight: float,
    config: R2MConfig,
) -> HeadTerms:
    """Returns the loss terms of one group.

    rewards: [K], by the present head, with gradient. step_rewards: the rewards [K] of every group of the step without
    gradient, for `hold: bsr`; otherwise None. pair_weight: the weight of the pair that the head ranks itself, 1 without
    labels.
    """
    hold, weight = config.head.hold, config.head.hold_weight
    frozen = group.embeddings.frozen_rewards.to(rewards.device)
    pairs = {"refreshed": None, "annotated": group.annotated.model_rewards.to(rewards.device), "frozen": frozen}
    of_pairs = pairs[config.head.pair_source]
    grebt = grebt_terms(rewards[None], config.head.alpha, None if of_pairs is None else of_pairs[None], pair_weight)
    chooses = rewards if of_pairs is None else of_pairs
    agrees = frozen[chooses.argmax()] > frozen[chooses.argmin()]
    adds = pair_weight > 0 or config.head.alpha > 0 or hold in ("divergence", "bsr")
    teaches = (agrees | (hold != "agreement")) & adds
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
    labels: LabelBatch | None = None,
) -> tuple[list[HeadTerms], list[PairTerms], bool]:
    """Updates the trained head once on the groups of a step (Algorithm 1, lines 17-20), and on its labels.

    head: the trained head. held: the head that scores, which follows the trained one. groups: those of the step. There may
    be none if there are labelled pairs. step: counted from 0. labels: None without a `labels.source`.

    Returns the loss terms of the groups, those of the labelled pairs, and True if the update counts.

    An update fails if a loss, a gradient, a weight or a reward after the update is not finite. Then it raises
    NonFiniteStep, whose message names the step and what was not finite. Under `learner.on_nonfinite: skip` the head and
    the optimizer are put back as they were instead, and the last result is False.
    """
    kept = None
    if config.learner.on_nonfinite == "skip":
        # A deep copy: the optimizer changes these very tensors in place.
        kept = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
    terms: list[HeadTerms] = []
    for part in head_losses(head, groups, step, config, labels):
        loss = torch.stack([term.loss for term in part]).sum()
        if loss.requires_grad:  # else no head of the ensemble sees these groups
            (loss / len(groups)).backward()
        terms += part
    pairs: list[PairTerms] = []
    for pair in label_losses(head, groups, step, config, labels) if labels else ():
        if pair.loss.requires_grad:
            pair.loss.backward()
        pairs.append(pair)
    taught = [*groups, *(pair.group for pair in labels.pairs)] if labels else groups
    losses = [one.loss.detach() for one in terms] + [one.loss.detach() for one in pairs]
    failure = _failed_update(head, taught, losses, step, config)
    # Without anything that teaches there is no step: AdamW would move the head by its old moments all the same.
    if failure is None and (any(term.teaches for term in terms) or (pairs and config.head.alpha < 1)):
        optimizer.step()
        # A sample: the rewards of one group show weights that are finite and yet too large.
        failure = _failed_head(head, taught[0], step, config)
    optimizer.zero_grad(set_to_none=True)
    if failure is None:
        held.follow()
        return terms, pairs, True
    stop_or_log(failure, config)
    assert kept is not None
    head.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    return terms, pairs, False


@torch.no_grad()
def _failed_update(
    head: nn.Module, groups: Sequence[HeadGroup], group_losses: Sequence[Tensor], step: int, config: R2MConfig
) -> str | None:
    """Returns why the gradients must not move the head, in words for a message, or None if they may."""
    named = f"step {step} (groups {[group.embeddings.group_id for group in groups]})"
    losses = torch.stack(list(group_losses))
    if losses.isfinite().all():
        gradients = (parameter.grad for parameter in head.parameters() if parameter.grad is not None)
        # Losses may be finite and gradients not: a backward pass can overflow by itself.
        return None if all_finite(gradients) else f"{named}: the gradient of the head is not finite, of finite losses"
    what = f"the loss of the head's update is {losses[~losses.isfinite()][0].item()}"
    for group in groups:
        frozen = group.embeddings.frozen_rewards
        if bad := _first_bad_response(head, group, step, config):
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
    bad = _first_bad_response(head, group, step, config)
    if bad is None and all_finite(head.parameters()):
        return None
    index = bad[0] if bad else 0
    source = head_source(group.embeddings.rte[index], group.feedback, index, head, step + 1, config)
    place = f"{group_place(step, group.embeddings.group_id)}, response {index}"
    return f"{place}: the head is not finite once it is updated with head.lr {config.head.lr:g}: {source}"


def _first_bad_response(head: nn.Module, group: HeadGroup, step: int, config: R2MConfig) -> list[int] | None:
    """Returns the first response whose reward by the present head, or by one of an ensemble, is not finite, or None."""
    states, _ = _states(group.feedback, Stream.REFRESHED_NOISE, config)
    return first_bad(member_rewards(head, group.embeddings, states, omega_of(step, config)).sum(0))


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
