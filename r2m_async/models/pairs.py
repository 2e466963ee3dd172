"""Labelled pairs that the policy reads for an update of the head, and pairs of a data set (`labels.offline`) among them.

Pairs of a data set come from other policies than the present one. Each is weighted by how much more often the present
policy would give the two responses than the reference policy (OCRM, arXiv 2507.15507).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from r2m_async.config import R2MConfig
from r2m_async.data.prompts import policy_reads
from r2m_async.head_objectives import importance_weights
from r2m_async.models.tokens import response_ids
from r2m_async.trajectories import (
    GroupRewards,
    HeadGroup,
    Label,
    LabelBatch,
    LabelledPair,
    PolicyFeedback,
    Prompt,
    RereadPair,
    RewardEmbeddings,
    Ticket,
    Trajectory,
    TrajectoryGroup,
)

OFFLINE = 2**40
"""The number of the first pair of a data set, as a group. No group of a run has such a number."""
OFFLINE_LABELLER = "offline"
"""Who has labelled them (`Label.who`)."""


def offline_group(index: int, prompt: Any, responses: Sequence[str], tokenizer: Any) -> TrajectoryGroup:
    """Returns a pair of a data set as a group, as if the responses had been sampled and had ended by themselves.

    index: the number of the pair in the data set. prompt: its prompt, a text or turns. responses: the preferred response,
    then the other. tokenizer: the policy's.
    """
    text, prompt_ids = policy_reads(prompt, tokenizer)

    def trajectory(response: str) -> Trajectory:
        ids = [*prompt_ids, *response_ids(tokenizer, text, prompt_ids, response, True)]
        return Trajectory(
            token_ids=torch.tensor(ids),
            prompt_len=len(prompt_ids),
            behaviour_logprobs=torch.zeros(len(ids)),
            policy_versions=torch.full((len(ids),), -1, dtype=torch.int32),
            finish_reason="stop",
            text=response,
        )

    asked = Prompt(prompt_id=f"offline pair {index}", content=prompt, text=text, token_ids=tuple(prompt_ids))
    ticket = Ticket(group_id=OFFLINE + index, due_step=0, seed=0, attempt=0, prompt=asked)
    return TrajectoryGroup(ticket=ticket, trajectories=tuple(map(trajectory, responses)), greedy=None)


def reread_pairs(
    labels: LabelBatch, states: Mapping[int, Tensor], log_ratios: Tensor, step: int, config: R2MConfig
) -> tuple[RereadPair, ...]:
    """Returns what the policy makes of those pairs of `labels.unread` whose states are there.

    states: by the place of a trajectory among all of `labels.unread`, its hidden states [S - 1, D].
    log_ratios: [2 P], for the trajectories of the P pairs of `labels.offline`: log pi - log pi_ref, summed over tokens.
    step: the policy step. The policy has the version after it.
    """
    num = len(labels.unread)
    first_offline = num - len(labels.offline)
    read = []
    for place in (place for place in range(num) if 2 * place in states):
        feedback = None
        if config.reads_feedback:
            feedback = PolicyFeedback(
                group_id=place,
                hidden_states=(states[2 * place], states[2 * place + 1]),
                greedy=None,
                policy_version=step + 1,
            )
        at = 2 * (place - first_offline)
        ratio = log_ratios[at] + log_ratios[at + 1] if at >= 0 else None
        read.append(RereadPair(group_id=place, feedback=feedback, log_ratio=ratio))
    return tuple(read)


def completed(
    labels: LabelBatch, reread: Sequence[RereadPair], embedded: Sequence[RewardEmbeddings], config: R2MConfig
) -> LabelBatch:
    """Returns the labels with the states of the present policy. Pairs of `offline` join those that are replayed.

    reread: what the policy makes of each pair of `labels.unread`, in their order.
    embedded: the reward token embeddings of each pair of `labels.offline`.
    """
    left = iter(reread)

    def read(pair: LabelledPair) -> LabelledPair:
        if pair.trajectories is None:
            return pair
        feedback = next(left).feedback
        if feedback is not None:  # under its own number, of which the noise of `r2m_noise` is drawn
            feedback = replace(feedback, group_id=pair.label.group_id)
        return replace(pair, group=replace(pair.group, feedback=feedback))

    new, replayed = tuple(map(read, labels.new)), tuple(map(read, labels.replayed))
    anchors = list(left)
    if len(anchors) != len(labels.offline):
        raise ValueError(f"{len(anchors)} pairs of {len(labels.offline)} offline ones were read")
    ratios = [one.log_ratio for one in anchors if one.log_ratio is not None]
    weights = importance_weights(torch.stack(ratios), config.labels.offline_temper).tolist() if ratios else []
    offline = [
        _anchor(embeddings, one, config.labels.offline_weight * weight)
        for embeddings, one, weight in zip(embedded, anchors, weights, strict=True)
    ]
    return replace(labels, new=new, replayed=(*replayed, *offline), offline=())


def _anchor(embeddings: RewardEmbeddings, read: RereadPair, weight: float) -> LabelledPair:
    """A pair of a data set, as the head learns from it."""
    group_id, nothing = embeddings.group_id, torch.zeros(2)
    feedback = None if read.feedback is None else replace(read.feedback, group_id=group_id)
    annotated = GroupRewards(
        group_id=group_id, rewards=nothing, model_rewards=nothing, greedy_reward=None, head_version=0, omega=1.0
    )
    label = Label(group_id=group_id, step=0, pair=(0, 1), chosen=0, who=OFFLINE_LABELLER)
    group = HeadGroup(embeddings=embeddings, feedback=feedback, annotated=annotated)
    return LabelledPair(label=label, group=group, weight=weight)
