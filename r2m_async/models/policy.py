"""Computes the policy's log-probabilities and hidden states on trajectories that were sampled before.

The learner trains on the log-probabilities. The reward head reads the hidden states, which
are called feedback there.

What an environment wrote into a response (`Trajectory.written`) is read by the policy like its prompt. So it has hidden
states. But it is no data: all tensors with the dimension T hold the tokens that the policy wrote, one after the other.
Losses and estimators so see a response without holes.

Shapes: B trajectories, T response tokens that the policy wrote (padded), S prompt + response tokens of one trajectory, D
hidden size, V vocabulary, N such tokens of all trajectories, R rows of C input tokens, X = R C input tokens flattened.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from r2m_async.config import R2MConfig
from r2m_async.models.padding import similar_lengths
from r2m_async.trajectories import PolicyFeedback, Trajectory, TrajectoryGroup

LOGITS_AT_ONCE = 1 << 24
"""The most logits, tokens times vocabulary, that a forward or backward pass holds at once: 64 MiB in float32."""


def microbatches(trajectories: Sequence[Trajectory], max_tokens: int, packed: bool = False) -> list[list[int]]:
    """Splits trajectories into the microbatches of one forward pass each, by their lengths.

    max_tokens, packed, and the indices that it returns: as in `similar_lengths`.
    """
    return similar_lengths([len(trajectory.token_ids) for trajectory in trajectories], max_tokens, packed)


def response_mask(trajectories: Sequence[Trajectory], length: int | None = None) -> Tensor:
    """Returns [B, T] bool, True on the tokens that the policy wrote for each trajectory and False on padding.

    length: T. None makes T the largest number of such tokens.
    """
    counts = torch.tensor([trajectory.num_policy_tokens for trajectory in trajectories])
    width = int(counts.max()) if length is None else length
    return torch.arange(width) < counts[:, None]


def behaviour_logprobs(trajectories: Sequence[Trajectory]) -> Tensor:
    """Returns [B, T] float32: the log-probability of each response token when it was sampled. Padding has 0."""
    return _stacked([trajectory.of_policy(trajectory.behaviour_logprobs) for trajectory in trajectories], 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassInputs:
    """Trajectories laid out for one forward pass.

    The last token of a trajectory is left out, because nothing follows that it would predict. There is no mask for
    padding: it comes after all tokens of its row, and a causal model looks at no later token.
    """

    inputs_RC: Tensor
    """[R, C] int64 token ids."""
    positions_RC: Tensor | None
    """[R, C] int64: each token's position in its own trajectory. None if the trajectories are padded."""
    places_N: Tensor
    """[N] int64, for each token that the policy wrote, the flat position (of R C) of the token before it, where it is
    chosen."""
    rows: tuple[slice, ...]
    """For each trajectory, the range of flat positions that it takes."""

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], packed: bool) -> PassInputs:
        """Lays out trajectories for one forward pass.

        packed: False gives each trajectory a row of its own, padded on the right. True puts all of them into one row
            without padding. Each then attends to itself alone: transformers knows where a trajectory begins, because
            the positions start at 0 there.
        """
        inputs = [trajectory.token_ids[:-1] for trajectory in trajectories]
        lengths = [len(row) for row in inputs]
        positions_RC = None
        if packed:
            inputs_RC = torch.cat(inputs)[None]
            positions_RC = torch.cat([torch.arange(length) for length in lengths])[None]
            starts = [0, *itertools.accumulate(lengths[:-1])]
        else:
            inputs_RC = _stacked(inputs, 0)
            starts = [row * max(lengths) for row in range(len(lengths))]
        # Where each token of a trajectory is chosen, were it the only one of the pass.
        chosen = [one.of_policy(torch.arange(len(one.token_ids))) - 1 for one in trajectories]
        return cls(
            inputs_RC=inputs_RC,
            positions_RC=positions_RC,
            places_N=torch.cat([start + places for start, places in zip(starts, chosen, strict=True)]),
            rows=tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True)),
        )

    def on(self, device: torch.device) -> tuple[Tensor | None, ...]:
        """Returns (inputs, positions, places) on `device`: the first arguments of a forward pass."""
        given = (self.inputs_RC, self.positions_RC, self.places_N)
        return tuple(None if one is None else one.to(device) for one in given)


class PolicyForward(nn.Module):
    """The whole computation of `logprobs_and_states` with a causal language model, as one module.

    DeepSpeed works by hooks on modules. It wraps this module, and so it sees every use of a parameter, that of the
    output layer too.
    """

    def __init__(self, model: Any) -> None:
        """model: a causal language model of transformers."""
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        """The config of the language model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The device of the language model's parameters."""
        return self.model.device

    def forward(
        self,
        inputs_RC: Tensor,
        positions_RC: Tensor | None,
        places_N: Tensor,
        targets_N: Tensor,
        temperature: float,
        entropy: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns (log-probabilities [N] float32, hidden states [R C, D], entropies [N] float32 or None).

        The first three arguments are those of `PassInputs`.

        targets_N: [N] int64, the response tokens themselves. Token n is predicted at the flat position places_N[n].
        temperature: divides the logits before the softmax.
        entropy: whether to compute the entropy, in nats, of the distribution that each response token is chosen from.

        The hidden states are those of the last layer, after the final norm.
        """
        outputs = self.model.base_model(input_ids=inputs_RC, position_ids=positions_RC, use_cache=False)
        states_XD = outputs.last_hidden_state.flatten(0, 1)
        # Only positions that predict a response token: logits of the prompt and of padding would be for nothing.
        logprobs_N, entropies_N = chosen_logprobs(
            self.model, states_XD[places_N], targets_N, outputs, temperature, entropy
        )
        return logprobs_N, states_XD, entropies_N


def chosen_logprobs(
    model: Any, states_ND: Tensor, targets_N: Tensor, outputs: Any, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Returns the log-probabilities [N] float32 of N tokens, and their entropies [N] if asked for, else None.

    model, states_ND, outputs: as in `logits_of`. Token n is predicted from the state n.
    targets_N: [N] int64, the tokens.
    temperature: divides the logits before the softmax.
    entropy: whether to compute the entropies of the distributions, in nats.

    At most LOGITS_AT_ONCE logits are in memory at once, in the backward pass as well.
    """
    size = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    if len(states_ND) <= size:
        return _chosen(model, states_ND, targets_N, outputs, temperature, entropy)
    parts = []
    for states, targets in zip(states_ND.split(size), targets_N.split(size), strict=True):
        given = (model, states, targets, outputs, temperature, entropy)
        # The backward pass computes the logits again, chunk by chunk, so that they are never all in memory.
        parts.append(checkpoint(_chosen, *given, use_reentrant=False) if states.requires_grad else _chosen(*given))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


def _chosen(
    model: Any, states_ND: Tensor, targets_N: Tensor, outputs: Any, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Does what `chosen_logprobs` does, with all logits at once."""
    # In float32, because a log-probability rounded to bfloat16 is too coarse for the ratio of Eq. 2.
    logits_NV = logits_of(model, states_ND, outputs).float() / temperature
    logprobs_NV = logits_NV.log_softmax(-1)
    entropies_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1) if entropy else None
    return logprobs_NV.gather(1, targets_N[:, None]).squeeze(1), entropies_N


def logits_of(model: Any, states_ND: Tensor, outputs: Any) -> Tensor:
    """Returns the logits [N, V] of hidden states of the last layer, as the model's own forward pass computes them.

    The arguments are those of `LogitsOf`.
    """
    return LogitsOf(model)(states_ND, outputs)


class LogitsOf:
    """Computes logits from hidden states of the last layer, as a model's own forward pass does.

    Some models do more after the states than one linear layer: Gemma 2 caps its logits, Cohere and Granite scale them.
    So the model's own code is run from the states on, with a base model that returns the states.
    """

    def __init__(self, model: Any) -> None:
        """model: a causal language model of transformers."""
        self._given = _Given(model.base_model)
        # A shallow copy: it has the same head, and the model itself stays as it is. Another thread may be computing with
        # the model or copying its weights out (`config.publishes_beside_passes`).
        self._headed = copy.copy(model)
        self._headed._modules = model._modules | {model.base_model_prefix: self._given}

    def __call__(self, states_ND: Tensor, outputs: Any) -> Tensor:
        """Returns the logits [N, V].

        states_ND: [N, D], hidden states after the final norm.
        outputs: what the model's base model returned in the pass that made the states.
        """
        self._given.outputs = type(outputs)(**{**outputs, "last_hidden_state": states_ND[None]})
        # The ids only say how long the text is. No layer reads them.
        ids_1N = torch.zeros(1, len(states_ND), dtype=torch.int64, device=states_ND.device)
        logits_NV: Tensor = self._headed(input_ids=ids_1N, use_cache=False).logits[0]
        return logits_NV


class _Given(nn.Module):
    """Stands for a base model whose outputs are known."""

    outputs: Any = None

    def __init__(self, base: Any) -> None:
        """base: the base model. Falcon-H1 reads a number from it, by which it scales its logits."""
        super().__init__()
        self.__dict__["_base"] = base  # past `nn.Module`, which would list its parameters a second time

    def __getattr__(self, name: str) -> Any:
        """Returns what the base model has under a name."""
        return getattr(self.__dict__["_base"], name)

    @property
    def decoder(self) -> _Given:
        """Itself: OPT calls the decoder of its base model, and not the base model."""
        return self

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.outputs


def logprobs_and_states(
    model: Any, trajectories: Sequence[Trajectory], temperature: float, packed: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns the log-probabilities of the response tokens, and the hidden states, from one forward pass.

    model: a causal language model, or an engine that wraps its `PolicyForward`.
    temperature: divides the logits; it should be the one that the trajectories were sampled at.
    packed: False pads every trajectory to the longest one. True puts all trajectories into one row without padding.

    The first result is [B, T] float32 with gradient, and 0 on padding. The second is one tensor [S - 1, D] per
    trajectory, without gradient: the last layer's hidden states after the final norm. The last token is never an
    input, so it has no hidden state.
    """
    logprobs_BT, states, _ = policy_pass(model, trajectories, temperature, packed)
    return logprobs_BT, states


def policy_pass(
    model: Any, trajectories: Sequence[Trajectory], temperature: float, packed: bool = False, entropy: bool = False
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """Returns what `logprobs_and_states` does, and with `entropy` the entropies [B, T] of the response tokens.

    entropy: whether to compute the entropies. They are float32, in nats, with gradient, and 0 on padding. The entropy
        at a token is that of the distribution, at `temperature`, from which the token was chosen.
    """
    forward = model if isinstance(getattr(model, "module", None), PolicyForward) else PolicyForward(model)
    inputs = PassInputs.of(trajectories, packed)
    targets_N = torch.cat([trajectory.of_policy(trajectory.token_ids) for trajectory in trajectories])
    chosen_N, states_XD, entropies_N = forward(
        *inputs.on(model.device), targets_N.to(model.device), temperature, entropy
    )
    states_XD = states_XD.detach()  # the reward head reads them and must not train the policy
    entropies_BT = None if entropies_N is None else by_response(entropies_N, trajectories)
    return by_response(chosen_N, trajectories), tuple(states_XD[row] for row in inputs.rows), entropies_BT


def by_response(values_N: Tensor, trajectories: Sequence[Trajectory]) -> Tensor:
    """Spreads values [N] of the response tokens, in the order of the trajectories, over [B, T]. Padding gets 0."""
    mask_BT = response_mask(trajectories).to(values_N.device)
    return torch.zeros(mask_BT.shape, device=values_N.device).masked_scatter(mask_BT, values_N)


@torch.no_grad()
def proximal_pass(
    model: Any, trajectories: Sequence[Trajectory], config: R2MConfig
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Computes log-probabilities and hidden states by pi_old, the policy as it is when a step begins.

    The passes are microbatches of at most `learner.tokens_per_microbatch` tokens, without gradient.

    Returns log-probabilities [B, T] float32 (0 on padding) and one tensor [S - 1, D] of hidden states in
    `feedback.dtype` per trajectory. All are on the CPU.
    """
    logprobs_BT = torch.zeros(response_mask(trajectories).shape)
    kept: dict[int, Tensor] = {}
    packed = config.learner.packing
    for rows in microbatches(trajectories, config.learner.tokens_per_microbatch, packed):
        chosen = [trajectories[row] for row in rows]
        part_BT, states = logprobs_and_states(model, chosen, config.rollouts.temperature, packed)
        logprobs_BT[rows, : part_BT.shape[1]] = part_BT.cpu()
        kept |= zip(rows, feedback_states(states, config), strict=True)
    return logprobs_BT, tuple(kept[row] for row in range(len(trajectories)))


def token_logprobs(model: Any, trajectories: Sequence[Trajectory], config: R2MConfig) -> Tensor:
    """Returns the log-probabilities [B, T] float32 of the response tokens, on the CPU. See `proximal_pass`."""
    return proximal_pass(model, trajectories, config)[0]


@torch.no_grad()
def group_feedback(model: Any, group: TrajectoryGroup, config: R2MConfig, version: int) -> PolicyFeedback:
    """Returns the hidden states of a group and of its greedy twin, if it has one. One forward pass computes them all.

    version: the version of the policy whose weights `model` has. It is recorded in the result.
    """
    both = (*group.trajectories, *(() if group.greedy is None else (group.greedy,)))
    _, states = logprobs_and_states(model, both, config.rollouts.temperature)
    return feedback_of(group, states, config, version)


def feedback_of(group: TrajectoryGroup, states: Sequence[Tensor], config: R2MConfig, version: int) -> PolicyFeedback:
    """Makes the feedback on the finished responses of a group from hidden states that were computed already.

    states: one tensor [S - 1, D] for each trajectory of the group, and one for its greedy twin, if it has one.
    version: the version of the policy that computed them.
    """
    finished = [index for index, one in enumerate(group.trajectories) if one.finish_reason != "abort"]
    kept = feedback_states([states[index] for index in finished], config)
    greedy = None if group.greedy is None else feedback_states(states[-1:], config)[0]
    return PolicyFeedback(group_id=group.ticket.group_id, hidden_states=kept, greedy=greedy, policy_version=version)


@torch.no_grad()
def proximal_feedback(
    model: Any, group: TrajectoryGroup, states: Sequence[Tensor], config: R2MConfig, version: int
) -> PolicyFeedback:
    """Makes a group's feedback from hidden states that the proximal pass (the pass by pi_old) computed already.

    states: K tensors [S - 1, D], those of the group's trajectories.
    version: the version of the policy whose weights `model` has. It is recorded in the result.

    The greedy twin is never trained on, so the states do not include it. It gets a forward pass here.
    """
    greedy = None
    if group.greedy is not None:
        _, own = logprobs_and_states(model, [group.greedy], config.rollouts.temperature)
        (greedy,) = feedback_states(own, config)
    return PolicyFeedback(
        group_id=group.ticket.group_id, hidden_states=tuple(states), greedy=greedy, policy_version=version
    )


def feedback_states(states: Sequence[Tensor], config: R2MConfig) -> tuple[Tensor, ...]:
    """Returns copies of hidden states on the CPU, in the dtype that `feedback.dtype` asks for."""
    dtype = getattr(torch, config.feedback_dtype)
    # A forced copy: on a CPU, `to` may return the tensor itself, a slice that keeps its whole pass's states in memory.
    return tuple(rows.to("cpu", dtype, copy=True) for rows in states)


def _stacked(rows: Sequence[Tensor], padding: float) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=padding)
