"""Turns text that went through no chat template into the token ids that a model reads, and cuts what is too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from r2m_async.data.special_tokens import token_ids

_PROBE = "a"


def raw_ids(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a text that goes on: with what the tokenizer puts before a text, without what it puts after.

    What it puts before is mostly a beginning-of-text token. A text that spells it out itself, as texts do that went
    through a chat template elsewhere, has it once. What it puts after is an end-of-text token, or a separator.
    """
    ids = token_ids(tokenizer, text)
    before = _put_before(tokenizer)
    return ids if ids[: len(before)] == before else [*before, *ids]


def _put_before(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts before every text."""
    whole: list[int] = tokenizer(_PROBE)["input_ids"]
    alone = token_ids(tokenizer, _PROBE)
    return next((whole[:at] for at in range(len(whole)) if alone and whole[at : at + len(alone)] == alone), [])


def without_start(ids: Sequence[int], max_tokens: int, bos: int | None) -> list[int]:
    """Returns the last `max_tokens` ids. The id `bos`, if the ids begin with it, counts among them and stays first."""
    if len(ids) > max_tokens > 0 and ids[0] == bos:
        return [ids[0], *ids[len(ids) - max_tokens + 1 :]]
    return list(ids[-max_tokens:])
