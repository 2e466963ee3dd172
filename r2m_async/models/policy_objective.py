"""Eq. 2 for a step of groups: their advantages, and the loss of a micro-batch.

Shapes: B trajectories of a step in group order, T response tokens (padded), K responses of a group.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from r2m_async.advantages import (
    AdvantageInputs,
    AdvantageNotFinite,
    Estimator,
    advantages_and_returns,
)
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, FunctionFailed, NonFiniteStep
from r2m_async.finite import first_bad
from r2m_async.models.policy import response_mask
from r2m_async.objectives import PolicyLoss, kl_loss, loss_denominator, policy_loss
from r2m_async.plugins import called
from r2m_async.trajectories import ScoredGroup, TrajectoryGroup


def step_place(step: int, groups: Sequence[TrajectoryGroup]) -> str:
    """A step's name in messages."""
    return f"step {step} (groups {[group.ticket.group_id for group in groups]})"


def check_passes(
    groups: Sequence[TrajectoryGroup],
    logprobs_BT: Tensor,
    ref_BT: Tensor,
    values_BT: Tensor | None,
    config: R2MConfig,
) -> None:
    """Raises NonFiniteStep naming the first response token for which a model gave a number that is not finite.

    Of the step's first passes: pi_old's and the reference's log-probabilities and the critic's values.
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
    """The name in messages of a row of the step's trajectories."""
    for group in groups:
        if row < len(group.trajectories):
            return f"{group.ticket.place}, response {row}"
        row -= len(group.trajectories)
    raise IndexError(row)


def _check_rewards(scored: Sequence[ScoredGroup]) -> None:
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
) -> tuple[Tensor, Tensor | None]:
    """([B] or [B, T] advantages, [B, T] returns or None without a critic).

    `logprobs_BT` are pi_old's, `values_BT` the critic's at the start of the step. Groups that the schedule cut are
    estimated apart, by size.

    Raises NonFiniteStep where a reward, a log-probability, a value or then an advantage is not finite, and FunctionFailed
    where the estimator raises or returns what it must not; both name the step.
    """
    whole = [one.group for one in scored]
    _check_rewards(scored)
    check_passes(whole, logprobs_BT, ref_BT, values_BT, config)
    named = step_place(whole[0].ticket.due_step, whole)
    mask_BT = response_mask([trajectory for group in whole for trajectory in group.trajectories])
    options = dict(config.advantage.options)
    if estimator.kl_in_reward and estimator.accepts("beta"):
        options.setdefault("beta", config.objective.kl_coef)
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
            rewards=torch.stack([one.rewards.rewards for one in groups]),
            response_mask=mask_BT[index_nK],
            logprobs=logprobs_BT[index_nK],
            ref_logprobs=ref_BT[index_nK],
            greedy_rewards=torch.stack([_greedy(one) for one in groups]) if estimator.needs_greedy else None,
            values=None if values_BT is None else values_BT[index_nK],
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
    advantages, returns = zip(*estimates, strict=True)
    return _in_order(order, advantages), _in_order(order, returns) if estimator.needs_values else None


def _in_order(order: list[int], parts: Sequence[Tensor]) -> Tensor:
    """[B, ...] of parts [n, K, ...], whose responses stand in `order`."""
    ordered = torch.cat([part.flatten(0, 1) for part in parts])
    ordered[order] = ordered.clone()
    return ordered


def microbatch_loss(
    logprobs_BT: Tensor,
    behaviour_BT: Tensor,
    old_BT: Tensor,
    ref_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    denominator: int,
    responses: int,
    estimator: Estimator,
    config: R2MConfig,
) -> tuple[Tensor, PolicyLoss, Tensor]:
    """(loss, surrogate, KL to the reference) of a part of a minibatch; the parts' losses add up to the minibatch's.

    All but `logprobs_BT` are wider than the part's T or as wide; `denominator` is the minibatch's (`loss_denominator`),
    `responses` its number of responses. The KL term of an estimator with its KL in the reward is 0.
    """
    width, objective = mask_BT.shape[1], config.objective
    surrogate = policy_loss(
        logprobs_BT,
        behaviour_BT[:, :width],
        advantages[:, :width] if advantages.ndim == 2 else advantages,
        mask_BT,
        old_logprobs=None if objective.off_policy == "none" else old_BT[:, :width],
        ratio=objective.ratio,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        off_policy=objective.off_policy,
        off_policy_cap=objective.off_policy_cap,
        aggregation=config.aggregation,
        denominator=denominator,
    )
    whole = objective.ratio == "sequence" and config.aggregation == "sequence"
    kl = kl_loss(
        logprobs_BT,
        ref_BT[:, :width],
        mask_BT,
        aggregation="sequence_sum" if whole else config.aggregation,
        denominator=responses if whole else denominator,
    )
    weight = 0.0 if estimator.kl_in_reward else objective.kl_coef
    return surrogate.loss + weight * kl, surrogate, kl.detach()


def minibatch_bounds(scored: Sequence[ScoredGroup], num_minibatches: int) -> list[tuple[int, int]]:
    """Trajectory ranges of the minibatches: consecutive whole groups, as even as they come."""
    sizes = [len(one.group.trajectories) for one in scored]
    count = min(num_minibatches, len(sizes))
    cuts = [len(sizes) * part // count for part in range(count + 1)]
    return [(sum(sizes[:first]), sum(sizes[:last])) for first, last in zip(cuts, cuts[1:], strict=False)]


def denominators(mask_BT: Tensor, config: R2MConfig) -> tuple[int, int]:
    """(what the surrogate is divided by, number of responses) of a minibatch."""
    return loss_denominator(mask_BT, config.aggregation), loss_denominator(mask_BT, "sequence")


def widened(values_BT: Tensor, width: int) -> Tensor:
    """[B, width], zeros on the right."""
    return pad(values_BT, (0, width - values_BT.shape[1]))


def _greedy(scored: ScoredGroup) -> Tensor:
    if scored.rewards.greedy_reward is None:
        raise RuntimeError(f"group {scored.rewards.group_id} has no greedy twin and its estimator asks for one")
    return scored.rewards.greedy_reward
