"""The pairs that reward models are trained on: read, split, flipped and turned into tokens.

A record has `prompt`, `chosen` and `rejected`, and may have `chosen_score` and `rejected_score` (numbers), and
`chosen_finished` and `rejected_finished` (false for a response that was cut off; true where absent).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from r2m_async.data.prompts import policy_reads
from r2m_async.data.records import PROMPT_FIELD, Content, Record, Source, load_records
from r2m_async.data.reward_text import reward_input_ids
from r2m_async.reward_models.config import RewardModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPair:
    """A pair as text."""

    prompt: Content
    chosen: str
    rejected: str
    chosen_finished: bool
    rejected_finished: bool
    margin: float | None
    """The score of the chosen response minus that of the rejected one; None where no loss asks for it."""
    place: str = field(compare=False)
    """Where its record stands, for messages: file and line, or data set and row."""

    def flipped(self) -> ScoredPair:
        """As an annotator who errs gives it: the scores go with the labels, so the margin stays."""
        return dataclasses.replace(
            self,
            chosen=self.rejected,
            rejected=self.chosen,
            chosen_finished=self.rejected_finished,
            rejected_finished=self.chosen_finished,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedText:
    """Prompt and response as the reward model reads them."""

    token_ids: tuple[int, ...]
    prompt_len: int
    """At least 1: the first token is never predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPair:
    chosen: TokenizedText
    rejected: TokenizedText
    margin: float | None
    place: str = field(compare=False)
    """As of `ScoredPair`."""

    @property
    def length(self) -> int:
        return max(len(self.chosen.token_ids), len(self.rejected.token_ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceData:
    training: tuple[ScoredPair, ...]
    """With label noise."""
    held_out: tuple[ScoredPair, ...]
    skipped: dict[str, int]
    """Reason -> records left out."""


EMBEDDED = ("embedded", "embedded_golden")


def load_preference_data(config: RewardModelConfig) -> PreferenceData:
    """What `data` names. Raises `DataError` for what cannot be read or used, and where nothing is left to train on."""
    data = config.data
    preferences, held_out_source = data.preferences, data.eval
    if preferences in EMBEDDED:
        from r2m_async.from_scratch.preferences import embedded_preferences

        files = embedded_preferences()
        held_out_source = held_out_source or str(files.held_out)
        preferences = str(files.training if preferences == "embedded" else files.golden)
    pairs, skipped = _load(preferences, data.split, config)
    if held_out_source is None:
        training, held_out = split_by_prompt(pairs, data.held_out, config.run.seed)
    else:
        training, (held_out, more) = pairs, _load(held_out_source, data.eval_split or data.split, config)
        skipped = {reason: skipped.get(reason, 0) + more.get(reason, 0) for reason in {**skipped, **more}}
    return PreferenceData(
        training=with_label_noise(training, data.label_noise, config.run.seed), held_out=held_out, skipped=skipped
    )


def given_pairs(source: str, config: RewardModelConfig, split: str | None = None) -> tuple[ScoredPair, ...]:
    """All pairs of `source`, as `data.preferences`, to measure on: none held back, none flipped. Raises `DataError`.

    Of the embedded preferences it is those of held-out prompts.
    split: of an HF data set; None means the config's `data.split`.
    """
    read = {"preferences": source, "split": split or config.data.split, "eval": None, "eval_split": None}
    data = load_preference_data(config.loss(preference="bt").data(**read, held_out=0.0, label_noise=0.0))
    return data.held_out if source in EMBEDDED else data.training


def split_by_prompt(
    pairs: Sequence[ScoredPair], share: float, seed: int
) -> tuple[tuple[ScoredPair, ...], tuple[ScoredPair, ...]]:
    """(the rest, the pairs of `share` of the prompts), a prompt's pairs together, at least one prompt in the rest."""
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    num = min(round(share * len(prompts)), len(prompts) - 1)
    held_out = set(random.Random(f"{seed}/held out").sample(prompts, num))
    return (
        tuple(pair for pair in pairs if pair.prompt not in held_out),
        tuple(pair for pair in pairs if pair.prompt in held_out),
    )


def with_label_noise(pairs: Sequence[ScoredPair], share: float, seed: int) -> tuple[ScoredPair, ...]:
    """The pairs in their order, round(share * their number) of them flipped."""
    flipped = set(random.Random(f"{seed}/label noise").sample(range(len(pairs)), round(share * len(pairs))))
    return tuple(pair.flipped() if index in flipped else pair for index, pair in enumerate(pairs))


def tokenized(pair: ScoredPair, tokenizer: Any, max_tokens: int) -> TokenizedPair:
    text = partial(_tokenized_text, tokenizer, pair.prompt, max_tokens=max_tokens)
    return TokenizedPair(
        chosen=text(pair.chosen, pair.chosen_finished),
        rejected=text(pair.rejected, pair.rejected_finished),
        margin=pair.margin,
        place=pair.place,
    )


def microbatches(pairs: Sequence[TokenizedPair], indices: Sequence[int], max_tokens: int) -> list[list[int]]:
    """`indices` in parts of like length, each within `max_tokens` with padding; one pair always fits."""
    parts: list[list[int]] = []
    for index in sorted(indices, key=lambda index: pairs[index].length):
        tokens = 2 * pairs[index].length * (len(parts[-1]) + 1 if parts else 1)
        if parts and tokens <= max_tokens:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def _tokenized_text(tokenizer: Any, prompt: Content, response: str, finished: bool, max_tokens: int) -> TokenizedText:
    """A token that the end of the prompt shares with the response is the response's."""
    whole = reward_input_ids(tokenizer, prompt, response, finished)
    read = reward_input_ids(tokenizer, prompt, response, finished, max_tokens)
    _, prompt_ids = policy_reads(prompt, tokenizer)
    shared = next((at for at, (a, b) in enumerate(zip(whole, prompt_ids, strict=False)) if a != b), len(prompt_ids))
    return TokenizedText(token_ids=tuple(read), prompt_len=max(1, shared - (len(whole) - len(read))))


def _load(source: Source, split: str, config: RewardModelConfig) -> tuple[tuple[ScoredPair, ...], dict[str, int]]:
    data, scored = config.data, config.loss.preference == "bt_margin"

    def parse(record: Record) -> ScoredPair:
        return ScoredPair(
            prompt=record.content(data.prompt_field, PROMPT_FIELD),
            chosen=record.response("chosen"),
            rejected=record.response("rejected"),
            chosen_finished=_optional(record, "chosen_finished"),
            rejected_finished=_optional(record, "rejected_finished"),
            margin=_score(record, "chosen_score") - _score(record, "rejected_score") if scored else None,
            place=record.place,
        )

    return load_records(source, split, parse, data.on_bad_record)


def _score(record: Record, key: str) -> float:
    value = record.field(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise record.refusal("wrong_type", key, value, "not a finite number", "write the score as a number")
    return float(value)


def _optional(record: Record, key: str) -> bool:
    fields: Mapping[str, Any] = record.fields()
    value = fields.get(key, True)
    if not isinstance(value, bool):
        raise record.refusal("wrong_type", key, value, "neither true nor false", "correct it, leave it out")
    return value
