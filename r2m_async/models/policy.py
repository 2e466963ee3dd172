"""The policy as the learner and the feedback see it: log-probabilities and last-layer states of given trajectories.

Shapes: B trajectories, T response tokens (padded), S prompt + response tokens (padded), D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from r2m_async.config import R2MConfig
from r2m_async.trajectories import PolicyFeedback, Trajectory, TrajectoryGroup


def microbatches(trajectories: Sequence[Trajectory], max_tokens: int, packed: bool = False) -> list[slice]:
    """Consecutive runs within `max_tokens`, padding included unless `packed`: never reordered. One trajectory always fits."""
    slices, start, longest, total = [], 0, 0, 0
    for index, trajectory in enumerate(trajectories):
        length = len(trajectory.token_ids)
        longest, total = max(longest, length), total + length
        if index > start and (total if packed else longest * (index + 1 - start)) > max_tokens:
            slices.append(slice(start, index))
            start, longest, total = index, length, length
    return [*slices, slice(start, len(trajectories))] if trajectories else []


def response_mask(trajectories: Sequence[Trajectory], length: int | None = None) -> Tensor:
    """[B, T] bool; T is the longest response, or `length`."""
    counts = torch.tensor([trajectory.num_response_tokens for trajectory in trajectories])
    width = int(counts.max()) if length is None else length
    return torch.arange(width) < counts[:, None]


def behaviour_logprobs(trajectories: Sequence[Trajectory]) -> Tensor:
    """[B, T] float32, 0 on padding."""
    return _stacked([trajectory.behaviour_logprobs[trajectory.prompt_len :] for trajectory in trajectories], 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassInputs:
    """Trajectories as one forward pass reads them: every token but the last, R rows of C. N response tokens in all."""

    inputs_RC: Tensor
    attention_RC: Tensor | None
    """None where packed."""
    positions_RC: Tensor | None
    """None where padded."""
    places_N: Tensor
    """Where among the R x C input tokens, flattened, the state lies in which each response token is chosen."""
    rows: tuple[slice, ...]
    """Where each trajectory lies among them."""

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], packed: bool) -> PassInputs:
        """Rows padded on the right, or with `packed` one row without padding, in which each attends to itself alone:

        transformers tells them apart by their positions, which begin anew.
        """
        inputs = [trajectory.token_ids[:-1] for trajectory in trajectories]
        lengths = [len(row) for row in inputs]
        attention_RC = positions_RC = None
        if packed:
            inputs_RC = torch.cat(inputs)[None]
            positions_RC = torch.cat([torch.arange(length) for length in lengths])[None]
            starts = [0, *itertools.accumulate(lengths[:-1])]
        else:
            inputs_RC = _stacked(inputs, 0)
            attention_RC = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
            starts = [row * max(lengths) for row in range(len(lengths))]
        begun = zip(trajectories, starts, strict=True)
        return cls(
            inputs_RC=inputs_RC,
            attention_RC=attention_RC,
            positions_RC=positions_RC,
            places_N=torch.cat([start + torch.arange(t.prompt_len - 1, len(t.token_ids) - 1) for t, start in begun]),
            rows=tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True)),
        )

    def on(self, device: torch.device) -> tuple[Tensor | None, ...]:
        """Inputs, attention, positions and places."""
        given = (self.inputs_RC, self.attention_RC, self.positions_RC, self.places_N)
        return tuple(None if one is None else one.to(device) for one in given)


class PolicyForward(nn.Module):
    """All that `logprobs_and_states` computes with a causal language model, as one module.

    An engine that works by hooks on modules (DeepSpeed) wraps this one, and so sees every use of a parameter.
    N response tokens; token n is targets_N[n] and is predicted at places_N[n] of the R x C input tokens, flattened.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(
        self,
        inputs_RC: Tensor,
        attention_RC: Tensor | None,
        positions_RC: Tensor | None,
        places_N: Tensor,
        targets_N: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """(log-probs [N] float32, states [R C, D])."""
        model = self.model
        outputs = model.base_model(
            input_ids=inputs_RC, attention_mask=attention_RC, position_ids=positions_RC, use_cache=False
        )
        states_XD = outputs.last_hidden_state.flatten(0, 1)
        logits_NV = model.get_output_embeddings()(states_XD[places_N]).float() / temperature
        return logits_NV.log_softmax(-1).gather(1, targets_N[:, None]).squeeze(1), states_XD


def logprobs_and_states(
    model: Any, trajectories: Sequence[Trajectory], temperature: float, packed: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One forward pass: (log-probs [B, T] float32 of the response tokens at `temperature`, B states [S_b - 1, D]).

    `model` is a causal language model, or an engine around its `PolicyForward`. The states are the last layer's after
    the final norm, without gradient; the last token is never an input, so it has none. Log-probs on padding are 0.
    """
    forward = model if isinstance(getattr(model, "module", None), PolicyForward) else PolicyForward(model)
    inputs = PassInputs.of(trajectories, packed)
    targets_N = torch.cat([trajectory.token_ids[trajectory.prompt_len :] for trajectory in trajectories])
    picked_N, states_XD = forward(*inputs.on(model.device), targets_N.to(model.device), temperature)
    states_XD = states_XD.detach()
    return by_response(picked_N, trajectories), tuple(states_XD[row] for row in inputs.rows)


def by_response(values_N: Tensor, trajectories: Sequence[Trajectory]) -> Tensor:
    """[B, T]: what was computed for every response token, 0 on padding."""
    mask_BT = response_mask(trajectories).to(values_N.device)
    return torch.zeros(mask_BT.shape, device=values_N.device).masked_scatter(mask_BT, values_N)


@torch.no_grad()
def proximal_pass(
    model: Any, trajectories: Sequence[Trajectory], config: R2MConfig
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(log-probs [B, T] float32, B states in `feedback.dtype`) on the CPU, by micro-batches."""
    width = response_mask(trajectories).shape[1]
    rows, kept = [], []
    packed = config.learner.packing
    for part in microbatches(trajectories, config.learner.tokens_per_microbatch, packed):
        logprobs_BT, states = logprobs_and_states(model, trajectories[part], config.rollouts.temperature, packed)
        rows.append(nn.functional.pad(logprobs_BT.cpu(), (0, width - logprobs_BT.shape[1])))
        kept += feedback_states(states, config)
    return torch.cat(rows), tuple(kept)


def token_logprobs(model: Any, trajectories: Sequence[Trajectory], config: R2MConfig) -> Tensor:
    """[B, T] float32 on the CPU, by micro-batches."""
    return proximal_pass(model, trajectories, config)[0]


@torch.no_grad()
def group_feedback(model: Any, group: TrajectoryGroup, config: R2MConfig, version: int) -> PolicyFeedback:
    """The states of one group (and its twin), computed as one batch."""
    both = (*group.trajectories, *(() if group.greedy is None else (group.greedy,)))
    _, states = logprobs_and_states(model, both, config.rollouts.temperature)
    kept = feedback_states(states, config)
    return PolicyFeedback(
        group_id=group.ticket.group_id,
        hidden_states=kept[: len(group.trajectories)],
        greedy=None if group.greedy is None else kept[-1],
        policy_version=version,
    )


@torch.no_grad()
def proximal_feedback(
    model: Any, group: TrajectoryGroup, states: Sequence[Tensor], config: R2MConfig, version: int
) -> PolicyFeedback:
    """A group's feedback of states that its proximal pass yielded; a greedy twin, which is not trained, has a pass of its own."""
    greedy = None
    if group.greedy is not None:
        _, own = logprobs_and_states(model, [group.greedy], config.rollouts.temperature)
        (greedy,) = feedback_states(own, config)
    return PolicyFeedback(
        group_id=group.ticket.group_id, hidden_states=tuple(states), greedy=greedy, policy_version=version
    )


def feedback_states(states: Sequence[Tensor], config: R2MConfig) -> tuple[Tensor, ...]:
    """Copies on the CPU in `feedback.dtype`."""
    dtype = getattr(torch, config.feedback_dtype)
    return tuple(rows.to("cpu", dtype, copy=True) for rows in states)


def _stacked(rows: Sequence[Tensor], padding: float) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=padding)
