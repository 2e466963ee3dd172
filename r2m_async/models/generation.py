"""Samples groups of responses with transformers.

A ticket gives one prompt and one seed. Its group has K sampled responses and, where the advantage estimator asks for
it, a greedy twin: one more response that takes the most likely token each time.

With the user's rollout function (`rollouts.function`) a response has several turns. They are sampled one at a time, each
alone, and each turn computes all tokens before it anew.

Every token is kept with its log-probability under the distribution that it was drawn from. Sampling is plain. Top-p,
top-k or penalties would bias the ratio of Eq. 2, so `load_policy` drops those that a model's files ask for.

Shapes: R rows (all responses of all groups in the batch), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from r2m_async.config import R2MConfig
from r2m_async.finite import no_probability
from r2m_async.models.plays import RolloutFunction, play_group
from r2m_async.models.tokens import ResponseText, end_of_text
from r2m_async.models.turns import Sampled, SampledTurn, TurnRequest
from r2m_async.trajectories import Ticket, Trajectory, TrajectoryGroup


class _Draw(LogitsProcessor):
    """Draws the next token of every row itself, and remembers the token's log-probability.

    Each group has a random generator of its own, so what one group draws does not depend on the others in the batch.

    The rows of one group follow each other: `num_responses` sampled rows first, then the greedy twin if there is one.
    """

    def __init__(
        self,
        tickets: Sequence[Ticket],
        num_responses: int,
        num_rows: int,
        temperature: float,
        version: int,
        device: Any,
        turn: TurnRequest | None = None,
    ) -> None:
        """turn: the turn that is drawn, if there is one row, whose ticket has that turn's seed."""
        self._turn = turn
        self._tickets, self._num_responses, self._num_rows = tickets, num_responses, num_rows
        self._version = version
        self._generators = [torch.Generator(device).manual_seed(ticket.seed) for ticket in tickets]
        self._sampled = [slice(first * num_rows, first * num_rows + num_responses) for first in range(len(tickets))]
        self._temperature = temperature
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores [R, V] that are 0 at each row's drawn token and -inf elsewhere.

        `generate` runs in greedy mode, so it takes exactly the drawn tokens.

        input_ids: [R, tokens so far]; not used. scores: [R, V], the logits of the next token.

        Raises NonFiniteStep if a row has no finite distribution.
        """
        logprobs_RV = (scores.float() / self._temperature).log_softmax(-1)
        broken_R = logprobs_RV[:, 0].isnan()  # softmax spreads one NaN over its whole row
        if broken_R.any():  # checked before the draw, because a draw from NaN ends the process on a GPU
            group, response = divmod(int(broken_R.nonzero()[0]), self._num_rows)
            token = len(self._logprobs)
            if self._turn:
                response, token = self._turn.response, self._turn.num_before + token
            raise no_probability(self._tickets[group], response, self._num_responses, token, self._version)
        # Greedy twins keep this token; the sampled rows are overwritten.
        drawn_R1 = logprobs_RV.argmax(-1, keepdim=True)
        # Rows that have ended draw too: a group then uses up the same random numbers whenever its responses end.
        for rows, generator in zip(self._sampled, self._generators, strict=True):
            drawn_R1[rows] = torch.multinomial(logprobs_RV[rows].softmax(-1), 1, generator=generator)
        self._logprobs.append(logprobs_RV.gather(1, drawn_R1))
        return torch.full_like(scores, -torch.inf).scatter(1, drawn_R1, 0.0)

    def logprobs(self) -> Tensor:
        """Returns the log-probabilities [R, tokens drawn] float32, those drawn after a row's end included."""
        return torch.cat(self._logprobs, dim=1)


class _Aborted(StoppingCriteria):
    """Ends the rows of a group as soon as the schedule has aborted the group."""

    def __init__(self, tickets: Sequence[Ticket], num_rows: int, aborted: Callable[[Ticket], bool]) -> None:
        self._tickets, self._num_rows, self._aborted = tickets, num_rows, aborted
        self.ends: list[int | None] = [None] * len(tickets)
        """For each group, the length of its sequences (prompt included) when it was aborted, or None.

        What `generate` writes after that length is padding.
        """

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Returns [R] bool: True on every row of an aborted group. `generate` calls this after every token."""
        for index, ticket in enumerate(self._tickets):
            if self.ends[index] is None and self._aborted(ticket):
                self.ends[index] = input_ids.shape[1]
        done = torch.tensor([end is not None for end in self.ends], device=input_ids.device)
        return done.repeat_interleave(self._num_rows)


class _Stopped(StoppingCriteria):
    """Ends a turn as soon as its text has a stop string."""

    def __init__(self, turn: TurnRequest) -> None:
        self._turn = turn
        self.stop: str | None = None
        """The stop string that was found."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Returns [1] bool."""
        if self._turn.stop_in is not None:
            self.stop = self._turn.stop_in(input_ids[0, len(self._turn.token_ids) :].tolist())
        return torch.tensor([self.stop is not None], device=input_ids.device)


def play_with_model(
    function: RolloutFunction,
    model: Any,
    tokenizer: Any,
    ticket: Ticket,
    config: R2MConfig,
    *,
    greedy_twin: bool,
    version: int,
    aborted: Callable[[Ticket], bool] = lambda _: False,
) -> TrajectoryGroup:
    """Generates the group of a ticket with the user's rollout function, one response after the other.

    function: what `rollout_function` returned. config: the run's config. The other arguments are those of
        `sample_groups`.

    The group is a function of the weights and the ticket, if the user's function is one of what it is given.

    Raises FunctionFailed if the function fails, and NonFiniteStep as `sample_groups` does.
    """

    def sample(turn: TurnRequest, done: Callable[[Sampled], None]) -> None:
        done(sample_turn(model, tokenizer, ticket, turn, config, version=version, aborted=aborted))

    return play_group(
        function,
        ticket,
        sample,
        tokenizer=tokenizer,
        ends=end_of_text(tokenizer, model.config, model.generation_config),
        twin=greedy_twin,
        config=config,
        aborted=lambda: aborted(ticket),
    )


@torch.no_grad()
def sample_turn(
    model: Any,
    tokenizer: Any,
    ticket: Ticket,
    turn: TurnRequest,
    config: R2MConfig,
    *,
    version: int,
    aborted: Callable[[Ticket], bool] = lambda _: False,
) -> SampledTurn:
    """Samples one turn of a response, alone. Arguments and errors are those of `play_with_model`."""
    ends = end_of_text(tokenizer, model.config, model.generation_config)
    temperature, num_sampled = config.rollouts.temperature, int(turn.seed is not None)
    of_turn = ticket if turn.seed is None else replace(ticket, seed=turn.seed)
    draw = _Draw([of_turn], num_sampled, 1, temperature, version, model.device, turn)
    aborts, stopped = _Aborted([ticket], 1, aborted), _Stopped(turn)
    input_ids = torch.tensor([turn.token_ids], device=model.device)
    sequence = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=GenerationConfig(
            max_new_tokens=turn.max_new_tokens, eos_token_id=list(ends), pad_token_id=ends[0], do_sample=False
        ),
        logits_processor=LogitsProcessorList([draw]),
        stopping_criteria=StoppingCriteriaList([aborts, stopped]),
    )[0].cpu()
    drawn = sequence[len(turn.token_ids) :].tolist()
    ended = drawn[-1] in ends or stopped.stop is not None
    return SampledTurn(
        token_ids=drawn,
        logprobs=draw.logprobs()[0].tolist(),
        versions=[version] * len(drawn),
        finish_reason="stop" if ended else "length" if len(drawn) == turn.max_new_tokens else "abort",
        stop=None if drawn[-1] in ends else stopped.stop,
    )


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
    """Samples the groups of all `tickets` as one batch, and returns them in the order of the tickets.

    The random numbers of a group come from its ticket's seed alone. Log-probabilities also depend on the batch,
    because a larger batch rounds differently. So a group is a function of the weights and its ticket only if its
    ticket is alone.

    num_responses: K, the sampled responses of each group.
    temperature: divides the logits; it must be above 0.
    max_new_tokens: the most tokens that a response may have, end of text included.
    greedy_twin: whether each group gets a greedy twin.
    version: the version of the policy whose weights `model` has. It is recorded with every token.
    aborted: is asked about every ticket after every token. Once it answers True, the group's unfinished responses end
        with the finish_reason `abort`.

    Raises NonFiniteStep, which names the first response whose next token has no finite probability.
    """
    num_rows = num_responses + greedy_twin
    prompts = [torch.tensor(ticket.prompt.token_ids) for ticket in tickets]
    eos = end_of_text(tokenizer, model.config, model.generation_config)
    # The mask hides padding, so any token will do that the model has. It may not have the tokenizer's padding token.
    pad = eos[0]
    input_ids = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left").to(model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    width = input_ids.shape[1]
    # From the lengths and not from the ids: the padding token may also be an end-of-text token within a prompt.
    attention_mask = (torch.arange(width, device=model.device) >= width - lengths[:, None]).long()
    aborts = _Aborted(tickets, num_rows, aborted)
    draw = _Draw(tickets, num_responses, num_rows, temperature, version, model.device)
    sequences = model.generate(
        input_ids=input_ids.repeat_interleave(num_rows, 0),
        attention_mask=attention_mask.repeat_interleave(num_rows, 0),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=list(eos), pad_token_id=pad, do_sample=False
        ),
        logits_processor=LogitsProcessorList([draw]),
        stopping_criteria=StoppingCriteriaList([aborts]),
    ).cpu()
    logprobs, groups = draw.logprobs().cpu(), []
    for index, (ticket, prompt) in enumerate(zip(tickets, prompts, strict=True)):
        text_of = ResponseText(tokenizer, ticket.prompt.token_ids)
        rows = range(index * num_rows, (index + 1) * num_rows)
        both = tuple(
            _trajectory(
                prompt,
                sequences[row, width : aborts.ends[index]],
                logprobs[row],
                set(eos),
                max_new_tokens,
                version,
                text_of,
            )
            for row in rows
        )
        twin = both[num_responses] if greedy_twin else None
        groups.append(TrajectoryGroup(ticket=ticket, trajectories=both[:num_responses], greedy=twin))
    return groups


def _trajectory(
    prompt: Tensor,
    drawn: Tensor,
    logprobs: Tensor,
    eos: set[int],
    limit: int,
    version: int,
    text_of: Callable[[list[int]], str],
) -> Trajectory:
    """Builds the trajectory of one row.

    prompt: [prompt tokens] int64, without padding. drawn: [tokens] int64, cut where the group was aborted, but with
    whatever follows the first end-of-text token. logprobs: [tokens drawn] float32. limit: the most response tokens.
    text_of: returns the text of response tokens after this prompt.
    """
    response = drawn.tolist()
    end = next((index + 1 for index, token in enumerate(response) if token in eos), None)
    length = end or len(response)
    # A row that neither ended nor reached the limit can only have been aborted.
    finish_reason = "stop" if end else "length" if length == limit else "abort"
    return Trajectory(
        token_ids=torch.cat([prompt, drawn[:length]]),
        prompt_len=len(prompt),
        behaviour_logprobs=torch.cat([torch.zeros(len(prompt)), logprobs[:length]]),
        policy_versions=torch.cat([torch.full((len(prompt),), -1), torch.full((length,), version)]).to(torch.int32),
        finish_reason=finish_reason,
        text=text_of(response[:length]),
    )
