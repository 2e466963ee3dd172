"""Special tokens that a text spells out, such as `<|im_end|>`: the template's become tokens, and those in contents stay text.

A tool may return such a text, and a policy may write it letter by letter. If it became the token, it would end the turn
and could begin another. Tokens that the tokenizer has besides, and does not call special, are found in every text.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

from r2m_async.function_loops import OncePerProcess

_MARK = "R2MCONTENT"
"""Stands for a content where a chat template is asked where it writes it."""


def token_ids(tokenizer: Any, text: str, special_tokens: bool = True) -> list[int]:
    """Returns the token ids of a text, with nothing added to it.

    special_tokens: whether special tokens that the text spells out become these tokens.
    """
    ids = _encoded(tokenizer, text, special_tokens)
    if special_tokens or not (found := _special_among(tokenizer, ids)):
        return ids
    # The model of the tokenizer may have the special token as a word, as Unigram has. Cut apart, it is none.
    cuts = [match.start() + 1 for match in re.finditer("|".join(map(re.escape, found)), text)]
    ids = []
    for start, end in pairwise((0, *cuts, len(text))):
        ids += _after(tokenizer, ids, text[start:end], functools.partial(_encoded, tokenizer, special_tokens=False))
    return ids


def _encoded(tokenizer: Any, text: str, special_tokens: bool) -> list[int]:
    how = {} if special_tokens else {"split_special_tokens": True}
    with _tokenizing():
        ids: list[int] = tokenizer(text, add_special_tokens=False, **how)["input_ids"]
    return ids


_tokenizing = OncePerProcess(threading.Lock)
"""Held while a text is tokenised: transformers sets `split_special_tokens` on the tokenizer, which threads may share."""


def _special_among(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The special tokens among some ids, as text, the longest first."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = (special | set(tokenizer.all_special_ids)) & set(ids)
    return sorted(map(str, tokenizer.convert_ids_to_tokens(list(found))), key=len, reverse=True)


def spells_special_tokens(tokenizer: Any, text: str) -> bool:
    """Returns whether a text spells out special tokens."""
    return token_ids(tokenizer, text) != token_ids(tokenizer, text, special_tokens=False)


def content_place(text: str, write: Callable[[str], str]) -> tuple[int, int] | None:
    """Returns where a chat template has written a content into a text: its start and its end.

    write: returns the text with another content in the place of this one.

    Returns None if it cannot be found, because what is around it depends on the content.
    """
    before, *after = write(_MARK).split(_MARK)
    if len(after) != 1 or not text.startswith(before) or not text.endswith(after[0]):
        return None
    place = len(before), len(text) - len(after[0])
    return place if place[0] <= place[1] else None


def parts(text: str, contents: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """Splits a text into parts, each with whether special tokens in it become tokens.

    contents: the places of contents in which they do not, in their order.
    """
    found, end = [], 0
    for start, stop in contents:
        found += [(text[end:start], True), (text[start:stop], False)]
        end = stop
    return [part for part in (*found, (text[end:], True)) if part[0]]


def continuations(text: str, contexts: Sequence[str], encode: Callable[[str], list[int]]) -> Iterator[list[int]]:
    """Yields the token ids that a text may have in the middle of another: as it is read alone, and after each context.

    A tokenizer in the style of SentencePiece puts a space before a text that it reads alone. contexts: texts that the
    text is read after. One that has other tokens then than alone is passed over. encode: returns the ids of a text.
    """
    yield encode(text)
    for context in contexts:
        whole, start = encode(context + text), encode(context)
        if whole[: len(start)] == start:
            yield whole[len(start) :]


def ids_after(tokenizer: Any, before: Sequence[int], text: str, special_tokens: bool = True) -> list[int]:
    """Returns the token ids of a text that follows other tokens. These stay as they are.

    before: the tokens before. special_tokens: as in `token_ids`.
    """
    return _after(tokenizer, before, text, functools.partial(token_ids, tokenizer, special_tokens=special_tokens))


def _after(tokenizer: Any, before: Sequence[int], text: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Does what `ids_after` does. encode: returns the ids of a text."""

    def decoded(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def added_by(ids: Sequence[int]) -> str:
        return decoded([*before, *ids])[len(decoded(before)) :]

    # A line break has tokens of its own, whatever follows.
    read = continuations(text, ("\n",), encode)
    alone = next(read)
    return next((ids for ids in chain((alone,), read) if not before or added_by(ids) == text), alone)
