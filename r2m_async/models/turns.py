"""What is asked of an engine when a rollout function wants a turn of the policy, and what the engine answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """What the policy is to go on from, and how far."""

    response: int
    """Which response of the group this is. The greedy twin is the last."""
    turn: int
    """How many turns the response had before."""
    token_ids: tuple[int, ...]
    """All tokens so far, the prompt included."""
    num_before: int
    """How many of them are the response's."""
    max_new_tokens: int
    """The most tokens to sample, 1 or more."""
    seed: int | None
    """Seeds the random numbers of this turn. None: greedy."""
    stop_in: Callable[[Sequence[int]], str | None] | None
    """Returns the stop string that the tokens of the turn so far have in their text, or None. None: there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTurn:
    """What the policy sampled for a `TurnRequest`."""

    token_ids: list[int]
    logprobs: list[float]
    """The log-probability of each token under the distribution that it was sampled from."""
    versions: list[int]
    """The policy version that sampled each token."""
    finish_reason: str
    """`stop`, `length` or `abort`, of the turn."""
    stop: str | None
    """The stop string that ended it, or None if none did."""


Sampled: TypeAlias = SampledTurn | BaseException
Sample = Callable[[TurnRequest, Callable[[Sampled], None]], None]
"""Begins to sample a turn. It calls the second argument once, from any thread, with the turn or with what went wrong."""
