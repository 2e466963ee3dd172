"""Computes the advantages of a step's groups, and the policy loss (Eq. 2) of one microbatch.

R2M, arXiv 2601.22664, Eq. 2. pi_old is the policy at the start of the step.

Shapes: B trajectories of a step in the order of their groups, T response tokens (padded), K responses of a group, n
groups of one size.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from r2m_async.advantages import (
    AdvantageInputs,
    AdvantageNotFinite,
    Estimator,
    advantages_and_returns,
    whitened,
)
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, FunctionFailed, NonFiniteStep
from r2m_async.finite import first_bad
from r2m_async.models.policy import response_mask
from r2m_async.models.reward_probe import RewardProbe
from r2m_async.models.reward_scale import RewardScale
from r2m_async.objectives import PolicyLoss, WeightBounds, aggregate, kl_loss, loss_denominator, policy_loss
from r2m_async.plugins import called
from r2m_async.policy_losses import LossInputs, get_loss
from r2m_async.trajectories import ScoredGroup, Trajectory, TrajectoryGroup


def step_place(step: int, groups: Sequence[TrajectoryGroup]) -> str:
    """Returns the name of a step for messages, for example `step 3 (groups [24, 25])`."""
    return f"step {step} (groups {[group.ticket.group_id for group in groups]})"


def check_passes(
    groups: Sequence[TrajectoryGroup],
    logprobs_BT: Tensor,
    ref_BT: Tensor,
    values_BT: Tensor | None,
    config: R2MConfig,
) -> None:
    """Checks that the first passes of a step gave finite numbers.

    logprobs_BT, ref_BT: [B, T], log-probabilities by pi_old and by the reference.
    values_BT: [B, T], values by the critic, or None without a critic.

    All may hold anything on padding.

    Raises NonFiniteStep if one is not finite. The message names the model, the response and the first such token.
    """
    mask_BT = response_mask([trajectory for group in groups for trajectory in group.trajectories])
    reference = f"model.reference {config.model.reference!r}" if config.model.reference else "model.policy as it began"
    for what, of_model in (
        ("its log-probability by the policy", logprobs_BT),
        (f"its log-probability by the reference ({reference})", ref_BT),
        ("its value by the critic", values_BT),
    ):
        if of_model is not None and (bad := first_bad(of_model, mask_BT)):
            row, token = bad
            raise NonFiniteStep(
                f"{row_place(groups, row)}: {what} is {of_model[row, token].item()}, first at response token {token}: the "
                f"model overflows in model.dtype {config.model.dtype}, or its weights are not finite"
            )


def row_place(groups: Sequence[TrajectoryGroup], row: int) -> str:
    """Returns the name of one trajectory for messages: its group, and its place in the group.

    row: the trajectory's index among the trajectories of all `groups`. Raises IndexError if there are fewer.
    """
    for group in groups:
        if row < len(group.trajectories):
            return f"{group.ticket.place}, response {row}"
        row -= len(group.trajectories)
    raise IndexError(row)


def _check_rewards(scored: Sequence[ScoredGroup]) -> None:
    """Raises NonFiniteStep, which names the response, if a reward is NaN or infinite."""
    for one in scored:
        twin = [] if one.rewards.greedy_reward is None else [one.rewards.greedy_reward[None]]
        rewards = torch.cat([one.rewards.rewards, *twin])
        if bad := first_bad(rewards):
            which = f"response {bad[0]}" if bad[0] < len(one.rewards.rewards) else "the greedy response"
            raise NonFiniteStep(f"{one.group.ticket.place}, {which}: its reward is {rewards[bad[0]].item()}")


def step_advantages(
    estimator: Estimator,
    scored: Sequence[ScoredGroup],
    logprobs_BT: Tensor,
    ref_BT: Tensor,
    config: R2MConfig,
    values_BT: Tensor | None = None,
    scale: RewardScale | None = None,
    probe: RewardProbe | None = None,
    states_BD: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns the advantages of a step's trajectories, and the returns if there is a critic.

    estimator: the advantage estimator of the run.
    logprobs_BT, ref_BT: [B, T], log-probabilities by pi_old and by the reference.
    values_BT: [B, T], values by the critic at the start of the step, or None without a critic.
    scale: the scale of rewards, which remembers those of earlier steps under `reward.normalize: running`. None makes one
        that has seen nothing.
    probe: predicts the reward of each prompt, and learns from the step. None without an estimator that needs states.
    states_BD: [B, D], the state of each response's prompt, for the probe.

    The advantages are [B] or [B, T], as the estimator gives them. The returns are [B, T], or None without a critic. The
    estimator sees groups of one size at a time. So groups that the schedule cut are estimated apart from whole ones.

    Raises NonFiniteStep if a reward, a log-probability, a value or an advantage is not finite. Raises FunctionFailed if
    the estimator raises, or returns something else than it must. Both messages name the step.
    """
    whole = [one.group for one in scored]
    _check_rewards(scored)
    check_passes(whole, logprobs_BT, ref_BT, values_BT, config)
    named = step_place(whole[0].ticket.due_step, whole)
    scaled = dict(zip(map(id, scored), (scale or RewardScale(config)).scaled(scored), strict=True))
    baselines_B = None
    if probe is not None:
        assert states_BD is not None
        if bad := first_bad(states_BD):
            raise NonFiniteStep(
                f"{row_place(whole, bad[0])}: the policy's state at the end of the prompt is not finite"
            )
        baselines_B = probe.baselines(states_BD, torch.cat([scaled[id(one)][0] for one in scored]))
    mask_BT = response_mask([trajectory for group in whole for trajectory in group.trajectories])
    options = copy.deepcopy(config.advantage.options)  # the user's function may change them
    if estimator.kl_in_reward and estimator.accepts("beta"):
        # These subtract the KL from the rewards themselves, by default with the coefficient of the loss's KL term.
        options.setdefault("beta", config.objective.kl_coef)
    # Tensors [n, K, ...] need groups of one K. `order` below remembers which trajectories each tensor holds.
    rows_by_size: dict[int, list[list[int]]] = defaultdict(list)
    groups_by_size: dict[int, list[ScoredGroup]] = defaultdict(list)
    start = 0
    for one in scored:
        size = len(one.group.trajectories)
        rows_by_size[size].append(list(range(start, start + size)))
        groups_by_size[size].append(one)
        start += size
    order: list[int] = []
    estimates: list[tuple[Tensor, Tensor | None]] = []
    for size, rows in rows_by_size.items():
        groups, index_nK = groups_by_size[size], torch.tensor(rows)
        inputs = AdvantageInputs(
            rewards=torch.stack([scaled[id(one)][0] for one in groups]),
            response_mask=mask_BT[index_nK],
            logprobs=logprobs_BT[index_nK],
            ref_logprobs=ref_BT[index_nK],
            greedy_rewards=(
                torch.stack([_greedy(one, scaled[id(one)][1]) for one in groups]) if estimator.needs_greedy else None
            ),
            values=None if values_BT is None else values_BT[index_nK],
            baselines=None if baselines_B is None else baselines_B[index_nK],
            **_parts(groups, config),
        )
        order += index_nK.flatten().tolist()
        call = functools.partial(called, key="advantage.name", name=estimator.name, place=named)
        try:
            estimates.append(advantages_and_returns(estimator, inputs, options, call))
        except AdvantageNotFinite as error:
            raise NonFiniteStep(f"{row_place(whole, rows[error.place[0]][error.place[1]])}: {error}") from None
        except ConfigError as error:
            raise FunctionFailed(f"{named}: {error}") from None
    assert estimates, "a step without groups has no advantages"
    parts, returns = zip(*estimates, strict=True)
    advantages = _in_order(order, parts)
    if config.advantage.whiten != "none":
        # Over the whole step at once, so that groups which the schedule cut are whitened with the others.
        advantages = whitened(advantages, mask_BT, config.advantage.whiten)
    return advantages, _in_order(order, returns) if estimator.needs_values else None


def _in_order(order: list[int], parts: Sequence[Tensor]) -> Tensor:
    """Joins parts [n, K, ...] into one tensor [B, ...] in the order of the step's trajectories.

    order: for each response of the parts, one after the other, its index among the step's trajectories.
    """
    ordered = torch.cat([part.flatten(0, 1) for part in parts])
    # The clone is what is read: without it, rows would be overwritten before they are moved.
    ordered[order] = ordered.clone()
    return ordered


def microbatch_loss(
    logprobs_BT: Tensor,
    entropies_BT: Tensor | None,
    behaviour_BT: Tensor,
    old_BT: Tensor,
    ref_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    denominator: int,
    responses: int,
    estimator: Estimator,
    config: R2MConfig,
    place: str,
) -> tuple[Tensor, PolicyLoss, Tensor]:
    """Returns the policy loss of one microbatch (Eq. 2), which is its part of the loss of a minibatch.

    The losses of a minibatch's microbatches add up to the loss of the minibatch.

    logprobs_BT: [B, T] with gradient, log-probabilities of this microbatch's B trajectories by the policy now.
    entropies_BT: [B, T] with gradient and 0 on padding, the entropies of the same policy. None without `entropy_coef`.
    behaviour_BT, old_BT, ref_BT: [B, T or more], by the policy that sampled, by pi_old and by the reference.
    advantages: [B], or [B, T or more].
    mask_BT: [B, T] bool, True on response tokens.
    denominator, responses: the results of `denominators` for the whole minibatch.
    place: the name of the step, for messages.

    The three results are the scalar loss, the surrogate with its statistics, and the scalar KL to the reference without
    gradient. If the estimator has the KL in its rewards, the loss has no KL term.

    Raises FunctionFailed if the user's own loss raises or returns something else than it must, and NonFiniteStep if its
    loss is not finite, unless `learner.on_nonfinite` is `skip`.
    """
    # The other tensors are as wide as the longest response of the step; this microbatch's may be shorter.
    width, objective = mask_BT.shape[1], config.objective
    surrogate = _surrogate(
        logprobs_BT,
        behaviour_BT[:, :width],
        None if objective.off_policy == "none" else old_BT[:, :width],
        advantages[:, :width] if advantages.ndim == 2 else advantages,
        mask_BT,
        denominator,
        config,
        place,
    )
    # Eq. 2 has the KL of whole responses beside the ratio of whole responses: a sum over tokens, not a mean.
    whole = objective.ratio == "sequence" and config.aggregation == "sequence"
    kl = kl_loss(
        logprobs_BT,
        ref_BT[:, :width],
        mask_BT,
        estimator=objective.kl_estimator,
        cap=objective.kl_cap,
        aggregation="sequence_sum" if whole else config.aggregation,
        denominator=responses if whole else denominator,
    )
    weight = 0.0 if estimator.kl_in_reward else objective.kl_coef
    loss = surrogate.loss + weight * kl
    if objective.entropy_coef > 0:
        assert entropies_BT is not None
        loss = loss - objective.entropy_coef * aggregate(entropies_BT, mask_BT, config.aggregation, denominator)
    return loss, surrogate, kl.detach()


def _surrogate(
    logprobs_BT: Tensor,
    behaviour_BT: Tensor,
    old_BT: Tensor | None,
    advantages: Tensor,
    mask_BT: Tensor,
    denominator: int,
    config: R2MConfig,
    place: str,
) -> PolicyLoss:
    """The policy loss without KL and entropy. A loss of the user's own is run so that its failures are told as its own."""
    objective, loss = config.objective, get_loss(config.objective.loss)
    masked = objective.off_policy_mask
    bounds = WeightBounds(level=masked.level, low=masked.low, high=masked.high) if masked else None
    own = ":" in objective.loss
    if own:
        users = loss.function

        # What the user's function raises is told by `called`, with the key, the function and the step.
        def guarded(inputs: LossInputs, **options: Any) -> Any:
            call = functools.partial(users, **copy.deepcopy(options))
            return called(call, (inputs,), key="objective.loss", name=objective.loss, place=place)

        loss = dataclasses.replace(loss, function=guarded)
    try:
        surrogate = policy_loss(
            logprobs_BT,
            behaviour_BT,
            advantages,
            mask_BT,
            old_logprobs=old_BT,
            ratio=objective.ratio,
            loss=loss,
            loss_options=objective.loss_options,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            off_policy=objective.off_policy,
            off_policy_cap=objective.off_policy_cap,
            off_policy_low=objective.off_policy_low,
            off_policy_level=objective.off_policy_level,
            off_policy_mask=bounds,
            aggregation=config.aggregation,
            denominator=denominator,
        )
    except ConfigError as error:
        if not own:
            raise
        raise FunctionFailed(f"{place}: {error}") from None
    # The built-in losses are finite wherever their inputs are. To look would wait for the GPU in every pass.
    if own and config.learner.on_nonfinite == "stop" and not surrogate.loss.isfinite():
        raise NonFiniteStep(f"{place}: objective.loss {objective.loss!r} gave {surrogate.loss.item()}")
    return surrogate


def minibatch_bounds(scored: Sequence[ScoredGroup], num_minibatches: int) -> list[tuple[int, int]]:
    """Splits the trajectories of a step into minibatches, and returns each as a range (first, last + 1).

    A minibatch is a run of whole groups. The numbers of groups differ by at most one. There are never more
    minibatches than groups.
    """
    sizes = [len(one.group.trajectories) for one in scored]
    count = min(num_minibatches, len(sizes))
    cuts = [len(sizes) * part // count for part in range(count + 1)]
    return [(sum(sizes[:first]), sum(sizes[:last])) for first, last in zip(cuts, cuts[1:], strict=False)]


def denominators(mask_BT: Tensor, config: R2MConfig) -> tuple[int, int]:
    """Returns the two counts that the losses of a minibatch's microbatches are divided by.

    mask_BT: [B, T] bool, True on the response tokens of the whole minibatch.

    The first is the count for the surrogate, see `loss_denominator`. The second is the number of responses that have
    tokens.
    """
    tokens = config.rollouts.max_new_tokens
    return loss_denominator(mask_BT, config.aggregation, tokens), loss_denominator(mask_BT, "sequence")


def _parts(groups: Sequence[ScoredGroup], config: R2MConfig) -> dict[str, Any]:
    """The fields of `AdvantageInputs` about the parts of rewards. None without parts."""
    parts = [one.rewards.parts for one in groups if one.rewards.parts is not None]
    if len(parts) < len(groups):
        return {}
    weights = torch.tensor(list(config.reward.parts.values()))
    return {"reward_parts": torch.stack(parts), "part_weights": weights}


def loss_mask(trajectories: Sequence[Trajectory], config: R2MConfig) -> Tensor:
    """Returns [B, T] bool: the response tokens that the policy's loss trains.

    They are those of `response_mask`, but for cut responses under `objective.mask_cut`.
    """
    mask_BT = response_mask(trajectories)
    if config.objective.mask_cut:
        mask_BT &= torch.tensor([one.finish_reason != "length" for one in trajectories])[:, None]
    return mask_BT


def _greedy(scored: ScoredGroup, reward: Tensor | None) -> Tensor:
    """Returns the scaled reward of the greedy twin. Raises RuntimeError if the group has no twin."""
    if reward is None:
        raise RuntimeError(f"group {scored.rewards.group_id} has no greedy twin and its estimator asks for one")
    return reward
