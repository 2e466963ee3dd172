"""Samples groups of responses with transformers.

A ticket gives one prompt and one seed. Its group has K sampled responses and, where the advantage estimator asks for
it, a greedy twin: one more response that takes the most likely token each time.

With the user's rollout function (`rollouts.function`) a response has several turns. They are sampled one at a time, each
alone, and each turn computes all tokens before it anew.

Every token is kept with its log-probability under the distribution that it was drawn from. Sampling is plain. Top-p,
top-k or penalties would bias the ratio of Eq. 2, so `load_policy` drops those that a model's files ask for.

Shapes: R rows of a pass (responses that are being drawn), K responses of a group, T the most tokens of a response, P
prompt tokens (padded), D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, GenerationConfig

from r2m_async.config import R2MConfig
from r2m_async.finite import no_probability
from r2m_async.models.plays import RolloutFunction, play_group
from r2m_async.models.policy import LogitsOf, feedback_of
from r2m_async.models.tokens import ResponseText, end_of_text
from r2m_async.models.turns import Sampled, SampledTurn, TurnRequest
from r2m_async.trajectories import PolicyFeedback, Ticket, Trajectory, TrajectoryGroup

ENDED_ROWS = 1 / 4
"""The share of rows whose responses have ended, from which on the next pass leaves these rows out. It copies the cache of the
others, so it is not done for every row."""


class _Decoder:
    """Draws the responses of some groups, one token of each in every pass.

    It takes the place of the loop in transformers' `generate` (`custom_generate`), which prepares positions and cache
    for whatever family the model is of. This loop reads a prompt once for all responses to it, leaves out responses that
    have ended, and keeps the hidden states that it computes.

    The rows of one group follow each other: K sampled rows first, then the greedy twin if there is one.
    """

    def __init__(
        self,
        tickets: Sequence[Ticket],
        seeds: Sequence[int | None],
        *,
        config: R2MConfig,
        limit: int,
        ends: Sequence[int],
        version: int,
        aborted: Callable[[Ticket], bool],
        greedy_twin: bool = False,
        turn: TurnRequest | None = None,
        keep_states: bool = False,
    ) -> None:
        """Draws nothing yet.

        tickets, seeds: of each group. Without a seed the row of a turn is greedy.
        limit: T. ends: the tokens that end a response.
        turn: the turn that is drawn, which has one row. None: whole groups are drawn.
        keep_states: whether `states` will be asked for.

        The other arguments are those of `sample_groups`.
        """
        num_sampled = config.rollouts.group_size if turn is None else 1
        self.num_rows = num_sampled + greedy_twin
        """The rows of each group."""
        self.limit = limit
        self._tickets, self._config, self._turn, self._version = tickets, config, turn, version
        self._ends, self._aborted = frozenset(ends), aborted
        # Each row has all of its random numbers from the beginning. So what it draws does not depend on how long other rows are,
        # nor on what else is in the batch.
        uniform = torch.full((len(tickets), self.num_rows, limit), torch.nan, dtype=torch.float64)
        for group, seed in zip(uniform, seeds, strict=True):
            if seed is not None:
                source = torch.Generator().manual_seed(seed)
                group[:num_sampled] = torch.rand(num_sampled, limit, dtype=torch.float64, generator=source)
        self._uniform_RT = uniform.flatten(0, 1)
        self.tokens: list[list[int]] = [[] for _ in self._uniform_RT]
        """The tokens drawn for each row."""
        self.logprobs: list[list[float]] = [[] for _ in self._uniform_RT]
        """Their log-probabilities."""
        self.stop: str | None = None
        """The stop string that ended the turn."""
        self._rows = list(range(len(self._uniform_RT)))
        """Which row of the batch each row of the pass is."""
        self._ended = [False] * len(self._rows)
        self._keep_states = keep_states
        self._prompt_states: Tensor | None = None
        self._states: list[tuple[list[int], Tensor]] = []
        """For each pass after the first, its rows and their hidden states [R, D]."""

    def __call__(self, model: Any, input_ids: Tensor, *_: Any, **given: Any) -> None:
        """Draws all responses. `generate` calls it.

        input_ids: [groups, P], the prompts, padded on the left. given: the further inputs of the model, and what else
            `generate` hands to a loop.

        Raises NonFiniteStep if a row has no finite distribution.
        """
        inputs = {name: value for name, value in given.items() if name not in _OF_THE_LOOP}
        ids, logits_of = input_ids, LogitsOf(model)
        for drawn in range(self.limit):
            prepared = model.prepare_inputs_for_generation(
                ids,
                next_sequence_length=1 if drawn and inputs.get("use_cache") else None,
                is_first_iteration=not drawn,
                **inputs,
            )
            outputs = model.base_model(**prepared)
            states_RPD = outputs.last_hidden_state
            inputs = model._update_model_kwargs_for_generation(outputs, inputs)
            self._keep(states_RPD)
            logits_RV = logits_of(states_RPD[:, -1], outputs)
            if not drawn:
                rows = torch.arange(len(ids), device=ids.device).repeat_interleave(self.num_rows)
                ids, logits_RV = ids[rows], logits_RV[rows]
                inputs = _rows_of(inputs, rows)
            tokens_R = self._draw(logits_RV, drawn)
            ids = torch.cat([ids, tokens_R[:, None]], dim=1)
            self._end_aborted()
            left = [place for place, row in enumerate(self._rows) if not self._ended[row]]
            if not left:
                return
            if len(left) <= (1 - ENDED_ROWS) * len(self._rows):
                self._rows = [self._rows[place] for place in left]
                rows = torch.tensor(left, device=ids.device)
                ids, inputs = ids[rows], _rows_of(inputs, rows)

    def _keep(self, states_RPD: Tensor) -> None:
        """Keeps the hidden states of a pass."""
        if not self._keep_states:
            return
        if self._prompt_states is None:
            self._prompt_states = states_RPD
        else:
            self._states.append((self._rows, states_RPD[:, -1]))

    def _draw(self, logits_RV: Tensor, drawn: int) -> Tensor:
        """Draws the next token of every row, notes it for the rows that have not ended, and returns the tokens [R].

        logits_RV: [R, V]. drawn: the number of tokens that each row has drawn.
        """
        logprobs_RV = (logits_RV.float() / self._config.rollouts.temperature).log_softmax(-1)
        broken_R = logprobs_RV[:, 0].isnan()  # softmax spreads one NaN over its whole row
        if broken_R.any():
            self._fail(self._rows[int(broken_R.nonzero()[0])], drawn)
        tokens_R = _at(logprobs_RV, self._uniform_RT[self._rows, drawn].to(logits_RV.device))
        chosen_R = logprobs_RV.gather(1, tokens_R[:, None])[:, 0]
        for row, token, logprob in zip(self._rows, tokens_R.tolist(), chosen_R.tolist(), strict=True):
            if not self._ended[row]:
                self.tokens[row].append(token)
                self.logprobs[row].append(logprob)
                self._ended[row] = token in self._ends or len(self.tokens[row]) == self.limit
        if self._turn and self._turn.stop_in:
            self.stop = self._turn.stop_in(self.tokens[0])
            self._ended[0] |= self.stop is not None
        return tokens_R

    def _fail(self, row: int, drawn: int) -> None:
        """Raises NonFiniteStep for a row whose next token has no finite probability."""
        group, response = divmod(row, self.num_rows)
        if self._turn:
            response, drawn = self._turn.response, self._turn.num_before + drawn
        num = self._config.rollouts.group_size
        raise no_probability(self._tickets[group], response, num, drawn, self._version)

    def _end_aborted(self) -> None:
        """Ends all rows of the groups that the schedule has aborted."""
        for group, ticket in enumerate(self._tickets):
            if self._aborted(ticket):
                self._ended[group * self.num_rows : (group + 1) * self.num_rows] = [True] * self.num_rows

    def ended_itself(self, row: int) -> bool:
        """Whether the last token of a row is one that ends a response."""
        return self.tokens[row][-1] in self._ends

    def states(self) -> list[Tensor]:
        """Returns the hidden states of each row, [prompt + drawn tokens - 1, D].

        The last token was never an input, so it has no state.
        """
        assert self._prompt_states is not None
        prompts_GPD = self._prompt_states
        drawn_RTD = prompts_GPD.new_zeros(len(self.tokens), len(self._states), prompts_GPD.shape[-1])
        for place, (rows, states_RD) in enumerate(self._states):
            drawn_RTD[rows, place] = states_RD
        prompts = [prompts_GPD[group, -len(one.prompt.token_ids) :] for group, one in enumerate(self._tickets)]
        return [
            torch.cat([prompts[row // self.num_rows], drawn_RTD[row, : len(tokens) - 1]])
            for row, tokens in enumerate(self.tokens)
        ]


_OF_THE_LOOP = (
    "logits_processor",
    "stopping_criteria",
    "generation_config",
    "synced_gpus",
    "streamer",
    "logits_to_keep",
)
"""What `generate` hands to a loop, and the model must not be given."""


def _rows_of(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Chooses rows of a model's inputs, which may occur several times. The cache among them is changed in place."""
    for value in inputs.values():
        if isinstance(value, Cache):
            value.reorder_cache(rows)
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _at(logprobs_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Returns the tokens [R] at which the cumulative distributions pass the given numbers, from [0, 1).

    logprobs_RV: [R, V] float32. uniform_R: [R] float64. NaN stands for the most likely token.
    """
    cumulative_RV = logprobs_RV.exp().cumsum(-1, dtype=torch.float64)
    total_R = cumulative_RV[:, -1]
    # Below the total, however the product is rounded. So the token that is found has a probability above 0.
    passed_R = torch.minimum(uniform_R * total_R, total_R.nextafter(torch.zeros_like(total_R)))
    tokens_R = torch.searchsorted(cumulative_RV, passed_R[:, None], right=True)[:, 0]
    greedy_R = uniform_R.isnan()
    return torch.where(greedy_R, logprobs_RV.argmax(-1), tokens_R) if greedy_R.any() else tokens_R


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
    decoder = _Decoder(
        [ticket],
        [turn.seed],
        config=config,
        limit=turn.max_new_tokens,
        ends=end_of_text(tokenizer, model.config, model.generation_config),
        version=version,
        aborted=aborted,
        turn=turn,
    )
    _generate(model, [torch.tensor(turn.token_ids)], decoder)
    (drawn,) = decoder.tokens
    ended = decoder.ended_itself(0) or decoder.stop is not None
    return SampledTurn(
        token_ids=drawn,
        logprobs=decoder.logprobs[0],
        versions=[version] * len(drawn),
        finish_reason="stop" if ended else "length" if len(drawn) == turn.max_new_tokens else "abort",
        stop=None if decoder.ended_itself(0) else decoder.stop,
    )


@torch.no_grad()
def sample_groups(
    model: Any,
    tokenizer: Any,
    tickets: Sequence[Ticket],
    config: R2MConfig,
    *,
    greedy_twin: bool,
    version: int,
    aborted: Callable[[Ticket], bool] = lambda _: False,
) -> list[tuple[TrajectoryGroup, PolicyFeedback | None]]:
    """Samples the groups of all `tickets` as one batch, and returns them in the order of the tickets.

    The random numbers of a group come from its ticket's seed alone. Log-probabilities also depend on the batch,
    because a larger batch rounds differently. So a group is a function of the weights and its ticket only if its
    ticket is alone.

    config: the run's config. greedy_twin: whether each group gets a greedy twin.
    version: the version of the policy whose weights `model` has. It is recorded with every token.
    aborted: is asked about every ticket after every token. Once it answers True, the group's unfinished responses end
        with the finish_reason `abort`.

    With each group comes its feedback, which is the hidden states of the sampling passes on its finished responses. It is
    None if the run does not need it, or if no response finished.

    Raises NonFiniteStep, which names the first response whose next token has no finite probability.
    """
    keep_states = config.wants_rollout_states
    decoder = _Decoder(
        tickets,
        [ticket.seed for ticket in tickets],
        config=config,
        limit=config.rollouts.max_new_tokens,
        ends=end_of_text(tokenizer, model.config, model.generation_config),
        version=version,
        aborted=aborted,
        greedy_twin=greedy_twin,
        keep_states=keep_states,
    )
    prompts = [torch.tensor(ticket.prompt.token_ids) for ticket in tickets]
    _generate(model, prompts, decoder)
    states = decoder.states() if keep_states else []
    groups = []
    for index, (ticket, prompt) in enumerate(zip(tickets, prompts, strict=True)):
        text_of = ResponseText(tokenizer, ticket.prompt.token_ids)
        rows = slice(index * decoder.num_rows, (index + 1) * decoder.num_rows)
        both = [
            _trajectory(prompt, decoder, row, config.rollouts.max_new_tokens, version, text_of)
            for row in range(len(decoder.tokens))[rows]
        ]
        twin = both.pop() if greedy_twin else None
        whole = TrajectoryGroup(ticket=ticket, trajectories=tuple(both), greedy=twin)
        reads = keep_states and whole.finished().trajectories
        groups.append((whole, feedback_of(whole, states[rows], config, version) if reads else None))
    return groups


def _generate(model: Any, prompts: Sequence[Tensor], decoder: _Decoder) -> None:
    """Lets transformers' `generate` run a decoder. prompts: the tokens [P] of each group's prompt, without padding."""
    # The mask hides padding, so any token will do that the model has: 0. It may not have the tokenizer's padding token.
    input_ids = pad_sequence(list(prompts), batch_first=True, padding_side="left").to(model.device)
    # From the lengths and not from the ids: the padding token may also occur in a prompt.
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    width = input_ids.shape[1]
    model.generate(
        input_ids=input_ids,
        attention_mask=(torch.arange(width, device=model.device) >= width - lengths[:, None]).long(),
        generation_config=GenerationConfig(max_new_tokens=decoder.limit, pad_token_id=0, do_sample=False),
        custom_generate=decoder,
    )


def _trajectory(
    prompt: Tensor, decoder: _Decoder, row: int, limit: int, version: int, text_of: Callable[[list[int]], str]
) -> Trajectory:
    """Builds the trajectory of one row.

    prompt: [prompt tokens] int64, without padding. limit: the most response tokens. text_of: returns the text of response
    tokens after this prompt.
    """
    drawn, length = decoder.tokens[row], len(decoder.tokens[row])
    # A row that neither ended nor reached the limit can only have been aborted.
    finish_reason = "stop" if decoder.ended_itself(row) else "length" if length == limit else "abort"
    return Trajectory(
        token_ids=torch.cat([prompt, torch.tensor(drawn)]),
        prompt_len=len(prompt),
        behaviour_logprobs=torch.cat([torch.zeros(len(prompt)), torch.tensor(decoder.logprobs[row])]),
        policy_versions=torch.cat([torch.full((len(prompt),), -1), torch.full((length,), version)]).to(torch.int32),
        finish_reason=finish_reason,
        text=text_of(drawn),
    )
