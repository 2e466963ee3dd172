"""Sampling groups with transformers: of each ticket one prompt, K responses and a greedy twin, one seed.

The log-probabilities kept are those of the distribution each token was drawn from, taken where it is drawn. Sampling is
plain: top-p, top-k and penalties would bias the ratio of Eq. 2 (`load_policy` drops a checkpoint's own).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from r2m_async.finite import no_probability
from r2m_async.trajectories import Ticket, Trajectory, TrajectoryGroup


class _Draw(LogitsProcessor):
    """Draws every row's next token itself, each group's with a generator of its own, and remembers its log-probability."""

    def __init__(
        self,
        tickets: Sequence[Ticket],
        num_responses: int,
        num_rows: int,
        temperature: float,
        version: int,
        device: Any,
    ) -> None:
        self._tickets, self._num_responses, self._num_rows = tickets, num_responses, num_rows
        self._version = version
        self._generators = [torch.Generator(device).manual_seed(ticket.seed) for ticket in tickets]
        self._sampled = [slice(first * num_rows, first * num_rows + num_responses) for first in range(len(tickets))]
        self._temperature = temperature
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """-inf everywhere but for the tokens drawn, which `generate` then takes; the greedy twins' are the likeliest."""
        logprobs_RV = (scores.float() / self._temperature).log_softmax(-1)
        broken_R = logprobs_RV[:, 0].isnan()  # softmax spreads one NaN over its whole row
        if broken_R.any():  # asked before the draw, which on a GPU would end the process
            group, response = divmod(int(broken_R.nonzero()[0]), self._num_rows)
            token = len(self._logprobs)
            raise no_probability(self._tickets[group], response, self._num_responses, token, self._version)
        drawn_R1 = logprobs_RV.argmax(-1, keepdim=True)
        for rows, generator in zip(self._sampled, self._generators, strict=True):
            drawn_R1[rows] = torch.multinomial(logprobs_RV[rows].softmax(-1), 1, generator=generator)
        self._logprobs.append(logprobs_RV.gather(1, drawn_R1))
        return torch.full_like(scores, -torch.inf).scatter(1, drawn_R1, 0.0)

    def logprobs(self) -> Tensor:
        """[rows, tokens drawn] float32."""
        return torch.cat(self._logprobs, dim=1)


class _Aborted(StoppingCriteria):
    def __init__(self, tickets: Sequence[Ticket], num_rows: int, aborted: Callable[[Ticket], bool]) -> None:
        self._tickets, self._num_rows, self._aborted = tickets, num_rows, aborted
        self.ends: list[int | None] = [None] * len(tickets)
        """By group: the length of its sequences when it was aborted; what `generate` writes after it is padding."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        for index, ticket in enumerate(self._tickets):
            if self.ends[index] is None and self._aborted(ticket):
                self.ends[index] = input_ids.shape[1]
        done = torch.tensor([end is not None for end in self.ends], device=input_ids.device)
        return done.repeat_interleave(self._num_rows)


@torch.no_grad()
def sample_groups(
    model: Any,
    tokenizer: Any,
    tickets: Sequence[Ticket],
    *,
    num_responses: int,
    temperature: float,
    max_new_tokens: int,
    greedy_twin: bool,
    version: int,
    aborted: Callable[[Ticket], bool] = lambda _: False,
) -> list[TrajectoryGroup]:
    """Samples the tickets' groups as one batch, prompts padded on the left.

    A group's draws come from its ticket's seed alone; its log-probabilities round as the batch has it, so one ticket at a
    time is a function of the weights and the ticket. `aborted` is asked after every token; once true, the group's
    unfinished responses end with finish_reason `abort`. Raises NonFiniteStep naming the response whose next token has no
    finite probability.
    """
    num_rows = num_responses + greedy_twin
    prompts = [torch.tensor(ticket.prompt.token_ids) for ticket in tickets]
    eos = eos_ids(model.generation_config, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    input_ids = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left").to(model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    width = input_ids.shape[1]
    attention_mask = (torch.arange(width, device=model.device) >= width - lengths[:, None]).long()
    aborts = _Aborted(tickets, num_rows, aborted)
    draw = _Draw(tickets, num_responses, num_rows, temperature, version, model.device)
    sequences = model.generate(
        input_ids=input_ids.repeat_interleave(num_rows, 0),
        attention_mask=attention_mask.repeat_interleave(num_rows, 0),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad, do_sample=False
        ),
        logits_processor=LogitsProcessorList([draw]),
        stopping_criteria=StoppingCriteriaList([aborts]),
    ).cpu()
    logprobs, groups = draw.logprobs().cpu(), []
    for index, (ticket, prompt) in enumerate(zip(tickets, prompts, strict=True)):
        rows = range(index * num_rows, (index + 1) * num_rows)
        both = tuple(
            _trajectory(
                prompt,
                sequences[row, width : aborts.ends[index]],
                logprobs[row],
                set(eos),
                max_new_tokens,
                version,
                tokenizer,
            )
            for row in rows
        )
        twin = both[num_responses] if greedy_twin else None
        groups.append(TrajectoryGroup(ticket=ticket, trajectories=both[:num_responses], greedy=twin))
    return groups


def checkpoint_generation_config(path: str) -> GenerationConfig:
    """What `from_pretrained` gives a model at `path` as its generation_config."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(path))


def eos_ids(generation_config: GenerationConfig, tokenizer: Any) -> list[int]:
    """The model's end-of-text tokens (chat models have several), else the tokenizer's."""
    ids = generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    return list(ids) if isinstance(ids, list | tuple) else [ids]


def _trajectory(
    prompt: Tensor, drawn: Tensor, logprobs: Tensor, eos: set[int], limit: int, version: int, tokenizer: Any
) -> Trajectory:
    response = drawn.tolist()
    end = next((index + 1 for index, token in enumerate(response) if token in eos), None)
    length = end or len(response)
    finish_reason = "stop" if end else "length" if length == limit else "abort"
    return Trajectory(
        token_ids=torch.cat([prompt, drawn[:length]]),
        prompt_len=len(prompt),
        behaviour_logprobs=torch.cat([torch.zeros(len(prompt)), logprobs[:length]]),
        policy_versions=torch.cat([torch.full((len(prompt),), -1), torch.full((length,), version)]).to(torch.int32),
        finish_reason=finish_reason,
        text=tokenizer.decode(response[:length], skip_special_tokens=True),
    )
