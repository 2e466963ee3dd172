"""What a tokenizer and a model must agree on, and the text that response tokens stand for.

Tokenizer, config.json and generation_config.json of one model often contradict each other. Here they are held against
each other. `key` and `name` are those of `models.pretrained`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r2m_async.data.special_tokens import continuations, token_ids
from r2m_async.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def num_tokens_known(config: Any) -> int:
    """Returns the number of rows of a model's token embeddings. It cannot read a token with a larger id."""
    return int(config.get_text_config().vocab_size)


def state_size(config: Any) -> int | None:
    """Returns the number of values in a hidden state after the last norm, or None if the config names none.

    OPT-350m projects its states to another size than `hidden_size`.
    """
    text_config = config.get_text_config()
    size = getattr(text_config, "word_embed_proj_dim", None) or getattr(text_config, "hidden_size", None)
    return None if size is None else int(size)


def num_positions(config: Any) -> int | None:
    """Returns the most tokens of a text that a model was made for, or None if its config names no limit."""
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or getattr(text_config, "max_seq_len", None)
    return None if limit is None or limit < 0 else int(limit)  # -1 is none, as XLNet has it


def check_positions(key: str, name: str | Path, config: Any, num_tokens: int, asked_by: str) -> None:
    """Raises ConfigError if texts may have more tokens than a model has positions.

    num_tokens: the most tokens of a text. asked_by: the keys that say so, with their values, for the message.
    """
    limit = num_positions(config)
    if limit is not None and num_tokens > limit:
        raise ConfigError(
            f"{asked_by}: a text may then have {num_tokens} tokens, and {key} {str(name)!r} has {limit} positions; lower them, "
            f"or name a model for longer texts"
        )


def longest_text(max_tokens: int, config: Any) -> int:
    """Returns the most tokens of a text that a model is given: `max_tokens`, or its positions if they are fewer."""
    limit = num_positions(config)
    if limit is None or max_tokens <= limit:
        return max_tokens
    _warn_of_cut(limit, max_tokens)
    return limit


@functools.cache  # once in a process is enough
def _warn_of_cut(limit: int, max_tokens: int) -> None:
    log.warning(
        "texts are cut to %d tokens, and not to max_tokens %d: the model has no more positions", limit, max_tokens
    )


def check_tokens(key: str, name: str | Path, tokenizer: Any, config: Any, pads: bool = False) -> None:
    """Raises ConfigError if a model cannot read the special tokens of its tokenizer, or if that has no end of text.

    pads: whether texts are padded with the tokenizer's padding token before the model reads them.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{key} {str(name)!r} has a tokenizer without end-of-text token (eos_token): responses could not end; save it "
            f"with one"
        )
    rows = num_tokens_known(config)
    for what in ("eos_token", "bos_token", *(("pad_token",) if pads else ())):
        number = getattr(tokenizer, f"{what}_id")
        if number is not None and number >= rows:
            raise ConfigError(
                f"{key} {str(name)!r}: its tokenizer's {what} {getattr(tokenizer, what)!r} has the id {number}, and the model "
                f"has embeddings for {rows} tokens: resize the embeddings (resize_token_embeddings) and save the model anew, "
                f"or give the tokenizer a token that the model has"
            )


def padding_token(tokenizer: Any, config: Any) -> int | None:
    """Returns the id of the token that pads the texts of a classifier: its config's, or else its tokenizer's."""
    named = config.get_text_config().pad_token_id
    padding = tokenizer.pad_token_id if named is None or named < 0 else named
    return None if padding is None else int(padding)


def unknown_token(token_ids: Sequence[int], config: Any) -> int | None:
    """Returns the first token id that a model has no embedding for, or None if it has one for each."""
    rows = num_tokens_known(config)
    return next((number for number in token_ids if number >= rows), None)


def check_known(name: str, tokenizer: Any, token_ids: Sequence[int], config: Any, place: str = "") -> None:
    """Raises DataError for a text with a token that a model has no embedding for.

    name: the model's, for the message. place: where the text is from. Empty shows the text's beginning.
    """
    if (unknown := unknown_token(token_ids, config)) is not None:
        text = place or f"the text {tokenizer.decode(list(token_ids))[:80]!r}"
        raise DataError(
            f"{text}: its token {tokenizer.convert_ids_to_tokens(unknown)!r} ({unknown}) has no embedding in {name}, which has "
            f"them for {num_tokens_known(config)} tokens; take the text out, or resize the model's embeddings "
            f"(resize_token_embeddings) and save it anew"
        )


def end_of_text_by_source(tokenizer: Any, config: Any, generation_config: Any) -> dict[str, tuple[int, ...]]:
    """Returns the ids of the end-of-text tokens that each source names: `tokenizer`, `config`, `generation_config`.

    Raises ConfigError if what a source names is no id and no list of ids.
    """
    named = {
        "tokenizer": tokenizer.eos_token_id,
        "config": getattr(config, "eos_token_id", None) or getattr(config.get_text_config(), "eos_token_id", None),
        "generation_config": generation_config.eos_token_id,
    }
    found: dict[str, tuple[int, ...]] = {}
    for source, ids in named.items():
        # Some old configs have -1 for none.
        given = list(ids) if isinstance(ids, list | tuple) else [] if ids in (None, -1) else [ids]
        if wrong := [one for one in given if isinstance(one, bool) or not isinstance(one, int) or one < 0]:
            raise ConfigError(
                f"{tokenizer.name_or_path}: its {source} names {wrong[0]!r} as end of text (eos_token_id), which is no "
                f"token's id; correct eos_token_id in config.json and generation_config.json"
            )
        found[source] = tuple(given)
    return found


def end_of_text(tokenizer: Any, config: Any, generation_config: Any) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a response: those that any of the three sources names.

    Raises ConfigError for an id that the model has no embedding for.
    """
    rows = num_tokens_known(config)
    ids: dict[int, None] = {}  # a dict keeps the order
    for source, named in end_of_text_by_source(tokenizer, config, generation_config).items():
        for number in named:
            if number >= rows:
                raise ConfigError(
                    f"{tokenizer.name_or_path}: its {source} names {number} as end of text (eos_token_id), and the model has "
                    f"embeddings for {rows} tokens; correct eos_token_id in config.json and generation_config.json"
                )
            ids[number] = None
    return tuple(ids)


def is_special(tokenizer: Any, number: int) -> bool:
    """Returns whether a token is a mark, such as an end of text, and no part of ordinary texts."""
    return number in tokenizer.all_special_ids or number in tokenizer.added_tokens_decoder


class ResponseText:
    """Turns the tokens of responses to one prompt into text.

    A text in the middle of another is not always what its tokens say alone: tokenizers in the style of SentencePiece
    (Llama 2, Mistral) drop a space at the beginning. So prompt and response are decoded together, and cut then.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        """prompt_ids: the tokens of the prompt, as the policy reads it."""
        self._tokenizer, self._prompt = tokenizer, list(prompt_ids)
        self._start = self._decoded([])

    def __call__(self, response_ids: Sequence[int]) -> str:
        """Returns the text of a response, without special tokens."""
        whole = self._decoded(response_ids)
        # A prompt may end in the middle of a character, whose bytes the response completes. Then its own text ends with
        # a replacement mark that the whole does not have.
        shared = next(
            (at for at, (a, b) in enumerate(zip(whole, self._start, strict=False)) if a != b), len(self._start)
        )
        return whole[shared:]

    def _decoded(self, response_ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                [*self._prompt, *response_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def response_ids(
    tokenizer: Any, prompt_text: str, prompt_ids: Sequence[int], response: str, finished: bool
) -> list[int]:
    """Returns the token ids of a response that is given as text, as the policy would read them after the prompt.

    prompt_text, prompt_ids: the prompt as the policy reads it.
    finished: True adds the tokenizer's end-of-text token.
    """
    text_of = ResponseText(tokenizer, prompt_ids)
    read = list(continuations(response, (prompt_text, "\n"), functools.partial(token_ids, tokenizer)))
    # Some tokenizers have no tokens for some text, such as line breaks. Then the text in the middle of another is nearest.
    ids = next((one for one in read if text_of(one) == response), read[min(1, len(read) - 1)])
    return [*ids, *([tokenizer.eos_token_id] if finished else [])]
