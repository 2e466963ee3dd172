"""Preference pairs for the training of reward models: how they are read, split, given label noise, and tokenized.

`data/pairs.py` says in which forms a record has its pair. It may also have `chosen_score` and `rejected_score`, which
are numbers, and `chosen_finished` and `rejected_finished`, which are false for a response that was cut off. Where the
last two are absent, the response counts as finished.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from r2m_async.config_records import Filters
from r2m_async.data.chat import TemplateRefusal
from r2m_async.data.pairs import read_scored_preference
from r2m_async.data.prompts import check_lengths, policy_reads
from r2m_async.data.records import Content, Record, load_records
from r2m_async.data.reward_text import reward_input_ids
from r2m_async.data.sources import Source
from r2m_async.from_scratch.languages import refuse_other_languages
from r2m_async.models.batches import by_length
from r2m_async.models.pretrained import pretrained_config, pretrained_tokenizer
from r2m_async.models.tokens import num_tokens_known, unknown_token
from r2m_async.reward_models.config import RewardModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPair:
    """A preference pair as text."""

    prompt: Content
    """A text, or messages as (role, text)."""
    chosen: str
    rejected: str
    chosen_finished: bool
    """Whether the chosen response ended by itself and was not cut off."""
    rejected_finished: bool
    margin: float | None
    """The score of the chosen response minus that of the rejected one. None unless the loss is `bt_margin`, which alone
    reads it."""
    place: str = field(compare=False)
    """Where the pair's record is, for error messages: file and line, or data set and row."""

    def flipped(self) -> ScoredPair:
        """The same pair with its responses swapped, as an annotator gives it who errs.

        The margin stays as it is: an annotator who errs gives the higher score to the wrong response, too.
        """
        return dataclasses.replace(
            self,
            chosen=self.rejected,
            rejected=self.chosen,
            chosen_finished=self.rejected_finished,
            rejected_finished=self.chosen_finished,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedText:
    """A prompt and its response as tokens of the reward model."""

    token_ids: tuple[int, ...]
    """Token ids of the prompt, then those of the response."""
    prompt_len: int
    """Number of tokens of the prompt. It is at least 1, because nothing predicts the first token of a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPair:
    """A preference pair as tokens."""

    chosen: TokenizedText
    rejected: TokenizedText
    margin: float | None
    """As in `ScoredPair`."""
    place: str = field(compare=False)
    """As in `ScoredPair`."""

    @property
    def length(self) -> int:
        """Number of tokens of the longer text."""
        return max(len(self.chosen.token_ids), len(self.rejected.token_ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceData:
    """The preference pairs of a run."""

    training: tuple[ScoredPair, ...]
    """The pairs to train on. Label noise has been applied to them."""
    held_out: tuple[ScoredPair, ...]
    """The pairs to measure on. Label noise never touches them."""
    skipped: dict[str, int]
    """How many records were left out, by reason."""


class PairReader(NamedTuple):
    """A model that reads pairs, as far as texts are concerned."""

    tokenizer: Any
    config: Any
    """The model's config, as transformers has it."""

    @property
    def has_unknown(self) -> bool:
        """Whether the tokenizer has tokens that the model has no embedding for."""
        return len(self.tokenizer) > num_tokens_known(self.config)


EMBEDDED = ("embedded", "embedded_golden")
"""Values of `data.preferences` that stand for pairs of the embedded language."""


def load_preference_data(config: RewardModelConfig, reader: PairReader | None = None) -> PreferenceData:
    """Reads the pairs that the section `data` names, separates the held-out pairs, and applies the label noise.

    reader: the model that will read the pairs. A pair that it cannot read is a bad record. None leaves that to whoever
        reads them.

    Raises `DataError` for a source that cannot be read or has no usable record, and for a bad record unless
    `data.on_bad_record` is `skip`.
    """
    data = config.data
    preferences, held_out_source = data.preferences, data.eval
    refuse_other_languages("data.preferences", preferences)
    if preferences in EMBEDDED:
        from r2m_async.from_scratch.preferences import embedded_preferences

        files = embedded_preferences()
        held_out_source = held_out_source or str(files.held_out)
        preferences = str(files.training if preferences == "embedded" else files.golden)
    pairs, skipped = _load(preferences, data.split, config, reader)
    pairs = pairs[:: data.stride]
    if held_out_source is None:
        training, held_out = split_by_prompt(pairs, data.held_out, config.run.seed)
    else:
        training, (held_out, more) = pairs, _load(held_out_source, data.eval_split or data.split, config, reader)
        skipped = {reason: skipped.get(reason, 0) + more.get(reason, 0) for reason in {**skipped, **more}}
    return PreferenceData(
        training=with_label_noise(training, data.label_noise, config.run.seed), held_out=held_out, skipped=skipped
    )


def given_pairs(
    source: str, config: RewardModelConfig, split: str | None = None, reader: PairReader | None = None
) -> tuple[ScoredPair, ...]:
    """All pairs of a source, to measure a model on. None is held back, filtered or flipped.

    source: as `data.preferences`. For the embedded pairs the result is the pairs of held-out prompts.
    config: says how the source is read.
    split: split of a Hugging Face data set; None means the config's `data.split`.
    reader: as in `load_preference_data`.

    Raises `DataError` as `load_preference_data` does.
    """
    # `bt` reads no margins, so pairs without scores can be measured, too.
    by_bt, split = config.loss(preference="bt"), split or config.data.split
    whole = by_bt.data(
        preferences=source,
        split=split,
        eval=None,
        eval_split=None,
        held_out=0.0,
        label_noise=0.0,
        stride=1,
        filters=Filters(),
    )
    data = load_preference_data(whole, reader)
    return data.held_out if source in EMBEDDED else data.training


def split_by_prompt(
    pairs: Sequence[ScoredPair], share: float, seed: int
) -> tuple[tuple[ScoredPair, ...], tuple[ScoredPair, ...]]:
    """Splits pairs into (pairs to train on, held-out pairs). Pairs of one prompt stay together.

    share: the share of the prompts that is held out, rounded to whole prompts. At least one prompt is left to train on.
    seed: decides which prompts are held out.
    """
    # A dict keeps the order of the data. The order of a set differs from process to process, and so would the split.
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    num = min(round(share * len(prompts)), len(prompts) - 1)
    held_out = set(random.Random(f"{seed}/held out").sample(prompts, num))
    return (
        tuple(pair for pair in pairs if pair.prompt not in held_out),
        tuple(pair for pair in pairs if pair.prompt in held_out),
    )


def with_label_noise(pairs: Sequence[ScoredPair], share: float, seed: int) -> tuple[ScoredPair, ...]:
    """The pairs in their order, with round(share * number of pairs) of them flipped. `seed` decides which."""
    flipped = set(random.Random(f"{seed}/label noise").sample(range(len(pairs)), round(share * len(pairs))))
    return tuple(pair.flipped() if index in flipped else pair for index, pair in enumerate(pairs))


def tokenized(pair: ScoredPair, tokenizer: Any, max_tokens: int) -> TokenizedPair:
    """The pair as tokens. A text of more than `max_tokens` tokens loses the beginning of its prompt."""
    text = partial(_tokenized_text, tokenizer, pair.prompt, max_tokens=max_tokens)
    return TokenizedPair(
        chosen=text(pair.chosen, pair.chosen_finished),
        rejected=text(pair.rejected, pair.rejected_finished),
        margin=pair.margin,
        place=pair.place,
    )


def microbatches(pairs: Sequence[TokenizedPair], indices: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Splits pairs into parts of similar length, one for each forward pass.

    pairs: all pairs.
    indices: which of the pairs to split.
    max_tokens: limit on the tokens of a part, padding included. A pair that is longer by itself gets a part of its own.

    Returns the parts. Each is a list of indices, and each index is in one part.
    """
    return by_length([2 * pair.length for pair in pairs], max_tokens, indices)


def _tokenized_text(tokenizer: Any, prompt: Content, response: str, finished: bool, max_tokens: int) -> TokenizedText:
    """Tokenizes a prompt with its response, and finds where the response begins.

    A token that contains the end of the prompt and the beginning of the response counts as part of the response.
    """
    whole = reward_input_ids(tokenizer, prompt, response, finished)
    read = reward_input_ids(tokenizer, prompt, response, finished, max_tokens)
    _, prompt_ids = policy_reads(prompt, tokenizer)
    # A tokenizer may merge the prompt's end with the response, so the prompt's own tokens need not all be in the text.
    shared = next((at for at, (a, b) in enumerate(zip(whole, prompt_ids, strict=False)) if a != b), len(prompt_ids))
    # Cutting takes tokens from the beginning, so the prompt's share shrinks by as many as the text lost.
    return TokenizedText(token_ids=tuple(read), prompt_len=max(1, shared - (len(whole) - len(read))))


def _load(
    source: Source, split: str, config: RewardModelConfig, reader: PairReader | None
) -> tuple[tuple[ScoredPair, ...], dict[str, int]]:
    """(the pairs of `source`, how many records were left out by reason)."""
    data, limits = config.data, config.data.filters.limits()
    tokenizer = pretrained_tokenizer("model.start", _start(config), config.model.trust_remote_code) if limits else None

    def parse(record: Record) -> ScoredPair:
        # Scores are demanded only by the loss that reads them; many data sets have none.
        pair, margin = read_scored_preference(record, data.chat, scored=config.loss.preference == "bt_margin")
        if limits:
            num_prompt_tokens = len(policy_reads(pair.prompt, tokenizer)[1])
            check_lengths(record, limits, tokenizer, num_prompt_tokens)
        scored = ScoredPair(
            prompt=pair.prompt,
            chosen=pair.chosen,
            rejected=pair.rejected,
            chosen_finished=record.flag("chosen_finished", True),
            rejected_finished=record.flag("rejected_finished", True),
            margin=margin,
            place=record.place,
        )
        if reader is not None:
            _check_readable(record, scored, reader)
        return scored

    return load_records(source, split, parse, data.on_bad_record, names=data.names)


def _check_readable(record: Record, pair: ScoredPair, reader: PairReader) -> None:
    """Raises BadRecord if a text of the pair is refused by the chat template, or has a token without embedding."""
    if isinstance(pair.prompt, str) and not reader.has_unknown:
        return
    for response, finished in ((pair.chosen, pair.chosen_finished), (pair.rejected, pair.rejected_finished)):
        try:
            ids = reward_input_ids(reader.tokenizer, pair.prompt, response, finished)
        except TemplateRefusal as error:
            why = f"the chat template of the reward model's tokenizer refuses it ({error.reason})"
            raise record.refusal(
                "chat_template", record.called("prompt"), pair.prompt, why, "reorder the turns"
            ) from None
        if (unknown := unknown_token(ids, reader.config)) is not None:
            token = reader.tokenizer.convert_ids_to_tokens(unknown)
            why = f"its token {token!r} ({unknown}) has no embedding in the reward model"
            remedy = "resize the model's embeddings and save it anew, take the pair out"
            raise record.refusal("unreadable", record.called("prompt"), pair.prompt, why, remedy)


def start_reader(config: RewardModelConfig) -> PairReader:
    """The model that training starts from, as a reader of pairs. Raises ConfigError."""
    start, trust = _start(config), config.model.trust_remote_code
    return PairReader(
        pretrained_tokenizer("model.start", start, trust), pretrained_config("model.start", start, trust=trust)
    )


def _start(config: RewardModelConfig) -> str:
    """The name or directory of the model whose tokenizer reads the pairs."""
    refuse_other_languages("model.start", config.model.start)
    if config.model.start in ("embedded", "embedded_reward"):
        from r2m_async.from_scratch.embedded import embedded_models

        return str(embedded_models().policy)
    return config.model.start
