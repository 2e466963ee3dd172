"""Finds numbers that are NaN or infinite, and names what they came from.

A NaN spreads: a damaged reward model gives NaN rewards, these give a NaN gradient, and that would give a NaN policy.
The functions here follow the data from its source, and so name the first thing that was not finite.
`learner.on_nonfinite` in the config decides whether the run then ends or goes on.
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
    """Whether every number in the tensors is finite. Tensors of integers are always finite."""
    # If the norm over all tensors is finite, so is every number: one fused pass and one transfer from the GPU. It may
    # overflow although every number is finite, so in that case each tensor is looked at.
    tensors = [one.detach() for one in tensors if one.is_floating_point() and one.numel()]
    if math.isfinite(torch.nn.utils.get_total_norm(tensors).item() if tensors else 0.0):
        return True
    return all(bool(one.isfinite().all()) for one in tensors)


def stop_or_log(message: str, config: R2MConfig) -> None:
    """Raises NonFiniteStep with `message`. Under `learner.on_nonfinite: skip` it logs the message instead."""
    if config.learner.on_nonfinite == "stop":
        raise NonFiniteStep(message)
    log.warning("%s (learner.on_nonfinite is skip)", message)


def check_weights(model: nn.Module, key: str, path: str | Path) -> None:
    """Raises ConfigError, naming the first bad parameter, if a loaded model has weights that are NaN or infinite.

    `key` is the key of the config that names the model, `path` is what it says.
    """
    if all_finite(model.parameters()):
        return
    name, parameter = next(one for one in model.named_parameters() if not all_finite([one[1]]))
    bad = ~parameter.detach().isfinite()
    raise ConfigError(
        f"{key} is {str(path)!r}: its parameter {name} has {int(bad.sum())} numbers of {bad.numel()} that are NaN or "
        f"infinite; its file is damaged, or its training diverged: name another model"
    )


def response_name(index: int, num_responses: int) -> str:
    """The name of a response in messages. The greedy twin of a group has the index after its last response."""
    return f"response {index}" if index < num_responses else "the greedy response"


def check_embeddings(embeddings: RewardEmbeddings, place: str, config: R2MConfig) -> None:
    """Checks what the frozen reward model computed for a group: embeddings and rewards.

    Names the first response with a number that is not finite; `place` is the group's name in messages. Raises
    NonFiniteStep, or logs the message under `learner.on_nonfinite: skip`.
    """
    twin = [] if embeddings.greedy_rte is None else [embeddings.greedy_rte]
    rows = [*embeddings.rte, *twin]
    if all_finite([embeddings.rte, embeddings.frozen_rewards, *twin]):
        return
    num = len(embeddings.rte)
    for index, row in enumerate(rows):
        # The greedy twin has no frozen reward; only its embedding is checked.
        frozen = embeddings.frozen_rewards[index] if index < num else row
        if not all_finite([row, frozen]):
            what = "its reward" if all_finite([row]) else "the response's embedding"
            stop_or_log(
                f"{place}, {response_name(index, num)}: {what} by reward.model {config.reward.model!r} is not finite, "
                f"although the model's weights are: the model overflows in reward.dtype {config.reward.dtype}",
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
    """Says what made the reward of a response NaN or infinite: a bonus, or else what `head_source` finds.

    `index` is that of the response in its group. The greedy twin has the index K, the number of responses.
    """
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
    """Says what made the head's reward of a response NaN or infinite.

    The embedding is looked at first, then the policy's states, then the weights of the head. If all of them are finite,
    the head's own arithmetic has overflowed. `rte` is [D_m], and `index` is as in `reward_source`.
    """
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
        f"the head (version {head_version}) overflows: what it reads is finite, and so are its weights, of which the "
        f"largest is {largest:.3g}; lower head.lr ({config.head.lr:g})"
    )


def no_probability(ticket: Ticket, index: int, num_responses: int, token: int, version: int) -> NonFiniteStep:
    """The error for a response whose next token could not be sampled, because its probabilities were not finite.

    `token` counts the tokens of the response from 0. The caller raises the error even under `learner.on_nonfinite:
    skip`: the same weights would fail for other groups too.
    """
    return NonFiniteStep(
        f"{ticket.place}, {response_name(index, num_responses)}: the policy (version {version}) gives no finite probability "
        f"at response token {token}: its weights have grown too large for its arithmetic, or rollouts.temperature is too "
        f"small; lower learner.lr and go on from an older checkpoint"
    )


def first_bad(values: Tensor, counted: Tensor | None = None) -> list[int] | None:
    """The index of the first entry of `values` that is NaN or infinite, or None if all are finite.

    With `counted`, a bool tensor of the same shape, only entries where it is True are looked at.
    """
    bad = ~values.isfinite()
    if counted is not None:
        bad &= counted
    return bad.nonzero()[0].tolist() if bad.any() else None
