"""The policy as the learner and the feedback see it: log-probabilities and last-layer states of given trajectories.

Shapes: B trajectories, T response tokens (padded), S prompt + response tokens (padded), D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.finite import check_weights
from r2m_async.reward_config import RewardModelConfig
from r2m_async.trajectories import PolicyFeedback, Trajectory, TrajectoryGroup, WeightProbe, Weights
from r2m_async.weight_digest import tensor_digest

_PROBE_LENGTH = 12


def device_of(config: R2MConfig | RewardModelConfig) -> torch.device:
    """run.device; `auto` is the GPU where there is one."""
    if config.run.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.run.device)


def load_policy(path: str, config: R2MConfig) -> Any:
    """The causal language model at `path` (HF name or directory) in the configured dtype, on the device, in eval mode.

    Every copy keeps `requires_grad`, those that never train too: torch picks other CPU kernels without it, even where
    no gradient is recorded, and they round otherwise. Raises ConfigError where a weight is not finite.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = getattr(torch, config.model.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=config.model.attention, trust_remote_code=False
        )
    except ImportError as error:
        raise ConfigError(f"model.attention is {config.model.attention!r}: {error}; or use sdpa") from None
    check_weights(model, "model.reference" if path == config.model.reference else "model.policy", path)
    own = model.generation_config  # its penalties and bans would be sampled with and not trained with
    ends = {"eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id, "bos_token_id": own.bos_token_id}
    model.generation_config = GenerationConfig(**ends)
    return settled(model, config)


@torch.no_grad()
def settled(model: Any, config: R2MConfig | RewardModelConfig) -> Any:
    """The loaded model on its device in eval mode, its parameters in memory of torch's own.

    A loader may leave them in a mapped file at odd addresses, and CPU kernels round by alignment: two copies of the same
    weights would then give different bits.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.to(device_of(config)).eval()


def checkpoint_activations(model: Any) -> None:
    """Every layer keeps its input alone and computes the rest again in the backward pass, to the same bits.

    transformers does so only where a layer says it is in training. The layers' insides stay in eval mode: no dropout.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


@contextmanager
def one_thread() -> Iterator[None]:
    """CPU sums depend on how many threads share them: wherever bits matter, one does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def named_weights(model: Any, version: int, probe: bool = False) -> Weights:
    """A copy of the `named_parameters()` on the CPU; a tied pair stands once. With `probe`, what an engine must see of them."""
    tensors = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    return Weights(version=version, tensors=tensors, probe=weight_probe(model) if probe else None)


@torch.no_grad()
def weight_probe(model: Any, tensors: Mapping[str, Tensor] | None = None) -> WeightProbe:
    """`tensors` are the parameters by name, where the model itself does not hold them whole."""
    size = getattr(model, "module", model).config.get_text_config().vocab_size
    tokens = torch.arange(_PROBE_LENGTH) * 7919 % size  # a prime: all over the vocabulary
    text = Trajectory(
        token_ids=tokens,
        prompt_len=1,
        behaviour_logprobs=torch.zeros(_PROBE_LENGTH),
        policy_versions=torch.zeros(_PROBE_LENGTH, dtype=torch.int32),
        finish_reason="length",
        text="",
    )
    logprobs_BT, _ = logprobs_and_states(model, [text], temperature=1.0)
    tensors = dict(model.named_parameters()) if tensors is None else tensors
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return WeightProbe(digests=digests, token_ids=tokens, logprobs=logprobs_BT[0].cpu())


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Overwrites the parameters. Raises ValueError naming what is missing, unknown or of another shape."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.tensors.keys():
        raise ValueError(f"weights and model differ in {sorted(parameters.keys() ^ weights.tensors.keys())}")
    for name, parameter in parameters.items():
        if parameter.shape != weights.tensors[name].shape:
            raise ValueError(f"{name} is {list(parameter.shape)}, the weights have {list(weights.tensors[name].shape)}")
        parameter.copy_(weights.tensors[name])


class MasterWeights:
    """What the optimizer moves: float32 copies of the parameters, or the parameters themselves where they are float32.

    A step of 1e-6 vanishes in bfloat16. After `backward`: `take_gradients`, clip and step on `tensors`, `write_back`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self.tensors = [p if p.dtype == torch.float32 else p.detach().float() for p in self._parameters]
        self._copies = [(m, p) for m, p in zip(self.tensors, self._parameters, strict=True) if m is not p]

    @property
    def copies(self) -> list[Tensor]:
        """The masters that are no parameter: what a checkpoint must keep beside the weights."""
        return [master for master, _ in self._copies]

    def take_gradients(self) -> None:
        for master, parameter in self._copies:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        for master, parameter in self._copies:
            parameter.copy_(master)

    @torch.no_grad()
    def restore(self, copies: Sequence[Tensor]) -> None:
        for master, saved in zip(self.copies, copies, strict=True):
            master.copy_(saved)


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
