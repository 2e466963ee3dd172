"""Numbers that are not finite: found in one pass, and told by what gave them.

A NaN spreads: a damaged reward model makes NaN rewards, these a NaN gradient, and that would make a NaN policy. Whoever
meets one asks here, in the order of the flow, what had it first. `learner.on_nonfinite` decides whether the run ends.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from r2m_async.errors import ConfigError, NonFiniteStep
from r2m_async.trajectories import PolicyFeedback, RewardEmbeddings, Ticket

if TYPE_CHECKING:
    from r2m_async.config import R2MConfig

log = logging.getLogger(__name__)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number of them is finite: one fused pass where the sum of their squares is, as it nearly always is."""
    tensors = [one.detach() for one in tensors if one.is_floating_point() and one.numel()]
    if math.isfinite(torch.nn.utils.get_total_norm(tensors).item() if tensors else 0.0):
        return True
    return all(bool(one.isfinite().all()) for one in tensors)


def stop_or_log(message: str, config: R2MConfig) -> None:
    """Raises NonFiniteStep; under `learner.on_nonfinite: skip` it is a line in the log instead."""
    if config.learner.on_nonfinite == "stop":
        raise NonFiniteStep(message)
    log.warning("%s (learner.on_nonfinite is skip)", message)


def check_weights(model: nn.Module, key: str, path: str | Path) -> None:
    """Raises ConfigError naming the first parameter of a loaded model that is not finite; `key` is what named the model."""
    if all_finite(model.parameters()):
        return
    name, parameter = next(one for one in model.named_parameters() if not all_finite([one[1]]))
    bad = ~parameter.detach().isfinite()
    raise ConfigError(
        f"{key} is {str(path)!r}: its parameter {name} has {int(bad.sum())} numbers of {bad.numel()} that are NaN or "
        f"infinite; its file is damaged, or its training diverged: name another model"
    )


def response_name(index: int, num_responses: int) -> str:
    """Of the trajectories of a group and its greedy twin, which comes last."""
    return f"response {index}" if index < num_responses else "the greedy response"


def check_embeddings(embeddings: RewardEmbeddings, place: str, config: R2MConfig) -> None:
    """`stop_or_log` of the first response that the reward model embeds, or rewards, with numbers that are not finite."""
    twin = [] if embeddings.greedy_rte is None else [embeddings.greedy_rte]
    rows = [*embeddings.rte, *twin]
    if all_finite([embeddings.rte, embeddings.frozen_rewards, *twin]):
        return
    num = len(embeddings.rte)
    for index, row in enumerate(rows):
        frozen = embeddings.frozen_rewards[index] if index < num else row
        if not all_finite([row, frozen]):
            what = "its reward" if all_finite([row]) else "the response's embedding"
            stop_or_log(
                f"{place}, {response_name(index, num)}: {what} by reward.model {config.reward.model!r} is not finite, of "
                f"finite weights: the model overflows in reward.dtype {config.reward.dtype}",
                config,
            )
            return


def reward_source(
    embeddings: RewardEmbeddings,
    feedback: PolicyFeedback | None,
    index: int,
    head: nn.Module,
    head_version: int,
    config: R2MConfig,
) -> str:
    """What made the reward of a response, by its index (the twin's is the group's size), NaN or infinite."""
    twin = index == len(embeddings.rte)
    rte = embeddings.greedy_rte if twin else embeddings.rte[index]
    bonus = embeddings.greedy_bonus if twin else embeddings.bonus[index]
    assert rte is not None and bonus is not None
    if not bonus.isfinite():
        return f"reward.functions and the penalties of the reward section add {bonus.item()}"
    return head_source(rte, feedback, index, head, head_version, config)


def head_source(
    rte: Tensor,
    feedback: PolicyFeedback | None,
    index: int,
    head: nn.Module,
    head_version: int,
    config: R2MConfig,
) -> str:
    """What made the head's reward of a response NaN or infinite: what it read, its weights, or its own arithmetic."""
    if not all_finite([rte]):
        return f"the response's embedding by reward.model {config.reward.model!r} is not finite"
    if feedback is not None:
        states = [*feedback.hidden_states, *([] if feedback.greedy is None else [feedback.greedy])][index]
        if not all_finite([states]):
            return f"the states of the policy (model.policy, version {feedback.policy_version}) on it are not finite"
    for name, parameter in head.named_parameters():
        if not all_finite([parameter]):
            return f"the weights of the head (version {head_version}) are not finite, first {name}"
    largest = max(float(parameter.detach().abs().max()) for parameter in head.parameters())
    return (
        f"the head (version {head_version}) overflows: what it reads is finite and so are its weights, the largest "
        f"{largest:.3g}; lower head.lr ({config.head.lr:g})"
    )


def no_probability(ticket: Ticket, index: int, num_responses: int, token: int, version: int) -> NonFiniteStep:
    """That a policy could not sample a response's token. It ends the run in any mode: no other group would fare better."""
    return NonFiniteStep(
        f"{ticket.place}, {response_name(index, num_responses)}: the policy (version {version}) gives no finite probability "
        f"at response token {token}: its weights have grown too large for its arithmetic, or rollouts.temperature is too "
        f"small; lower learner.lr and go on from an older checkpoint"
    )


def first_bad(values: Tensor, counted: Tensor | None = None) -> list[int] | None:
    """The first place of `values` that is not finite, among those that are `counted`; None where all are finite."""
    bad = ~values.isfinite()
    if counted is not None:
        bad &= counted
    return bad.nonzero()[0].tolist() if bad.any() else None
