"""Reward functions that look at the text of a response: its form, its length, its words, and whether it is JSON.

Each returns a number from 0 to 1. Its options come from `options` in the config, or, where they are not there, from the
columns of the data record. So a record may have a `pattern` or a `schema` of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import regex

from r2m_async.errors import ConfigError
from r2m_async.rewards.packages import needs

_REGEX_SECONDS = 5.0
"""Some patterns would take years on some texts. A response that takes longer does not match."""


def matches_regex(response: str, pattern: str, part: Literal["whole", "any"] = "whole") -> float:
    """Returns 1 if a response matches a pattern, and else 0.

    Args:
        response: the response. White space around it is left out.
        pattern: a regular expression of the package `regex`, which has all that Python's `re` has. A dot stands for
            line breaks, too.
        part: `whole`: the whole response must match. `any`: some part of it.
    """
    compiled = _compiled(pattern)
    match = compiled.fullmatch if part == "whole" else compiled.search
    try:
        # `concurrent` lets other threads go on meanwhile.
        return float(match(response.strip(), timeout=_REGEX_SECONDS, concurrent=True) is not None)
    except TimeoutError:
        return 0.0


def _compiled(pattern: str) -> Any:
    try:
        return regex.compile(pattern, regex.DOTALL)
    except (regex.error, TypeError) as error:
        raise ConfigError(f"pattern {pattern!r} is no regular expression ({error}); correct it") from None


def _check_regex(pattern: str = "", part: str = "whole") -> None:
    _compiled(pattern)
    if part not in ("whole", "any"):
        raise ConfigError(f"part is {part!r}; use 'whole' or 'any'")


def tagged(response: str, tags: Sequence[str] = ("think", "answer"), opened: bool = False) -> float:
    """Returns 1 if a response consists of tags in this order, each once and with text in it, and else 0.

    For example `<think>...</think><answer>...</answer>`. White space may stand around the tags.

    Args:
        response: the response.
        tags: the names of the tags.
        opened: whether the prompt ends with the first tag, so that the response begins inside it.
    """
    rest = (f"<{tags[0]}>" if opened else "") + response.strip()
    for tag in tags:
        begin, end = f"<{tag}>", f"</{tag}>"
        inside, closed, after = rest.removeprefix(begin).partition(end)
        if not rest.startswith(begin) or not closed or not inside.strip() or begin in inside or begin in after:
            return 0.0
        rest = after.strip()
    return float(not rest)


def _check_tags(tags: Sequence[str] = ("think", "answer"), opened: bool = False) -> None:
    if isinstance(tags, str) or not tags or not all(isinstance(tag, str) and tag.strip() for tag in tags):
        raise ConfigError(f"tags is {tags!r}; give a list of names, for example [think, answer]")


def json_schema(response: str, schema: dict[str, Any] | bool) -> float:
    """Returns 1 if a response is JSON that a JSON Schema allows, and else 0.

    Args:
        response: the response. It may be a fenced code block, as many chat models write it. NaN and infinity are no
            JSON.
        schema: the schema. What it refers to must be within it: nothing is fetched.
    """
    import jsonschema
    import referencing

    text = response.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text.removesuffix("```").partition("\n")[2]
    try:
        value = json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return 0.0
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return float(validator(schema, registry=referencing.Registry()).is_valid(value))


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _check_schema(schema: dict[str, Any] | bool = True) -> None:
    needs("jsonschema", "jsonschema")
    import jsonschema

    try:
        jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"schema is no JSON Schema: {error.message}, at {error.json_path}; correct it") from None


Unit = Literal["tokens", "words", "characters"]


def length_window(
    response: str, tokens: Sequence[int], high: float, low: float = 0, margin: float = 0, unit: Unit = "tokens"
) -> float:
    """Returns 1 if a response is as long as it should be, and falls to 0 outside of that window.

    Args:
        response: the response.
        tokens: its tokens.
        high: the largest length that gives 1.
        low: the smallest length that gives 1.
        margin: the distance from the window at which the result has fallen to 0, along a straight line. With 0 it falls
            at once.
        unit: what a length is a number of: `tokens`, `words` or `characters`.
    """
    length = {"tokens": len(tokens), "words": len(response.split()), "characters": len(response)}[unit]
    distance = max(low - length, length - high, 0)
    return 1.0 if distance == 0 else max(0.0, 1 - distance / margin) if margin else 0.0


def _check_window(high: float = float("inf"), low: float = 0, margin: float = 0, unit: str = "tokens") -> None:
    numbers = {"high": high, "low": low, "margin": margin}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or number < 0:
            raise ConfigError(f"{name} is {number!r}; give a number of {unit}, 0 or more")
    if low > high:
        raise ConfigError(f"low is {low} and high is {high}: no length lies between them; swap them")
    if unit not in ("tokens", "words", "characters"):
        raise ConfigError(f"unit is {unit!r}; use 'tokens', 'words' or 'characters'")


def keywords(
    response: str, required: Sequence[str] = (), forbidden: Sequence[str] = (), ignore_case: bool = True
) -> float:
    """Returns the share of the required words that a response has, or 0 if it has a forbidden one.

    Args:
        response: the response.
        required: words or phrases that it should have. Without any the share is 1.
        forbidden: words or phrases that it must not have.
        ignore_case: whether capital and small letters are the same.

    A word counts where no letter or digit stands beside it: `cat` is not in `concatenate`.
    """
    _check_keywords(required, forbidden)
    flags = regex.IGNORECASE if ignore_case else 0

    def has(phrase: str) -> bool:
        return regex.search(rf"(?<!\w){regex.escape(phrase)}(?!\w)", response, flags) is not None

    if any(map(has, forbidden)):
        return 0.0
    return sum(map(has, required)) / len(required) if required else 1.0


def _check_keywords(required: Sequence[str] = (), forbidden: Sequence[str] = (), ignore_case: bool = True) -> None:
    for name, phrases in (("required", required), ("forbidden", forbidden)):
        if isinstance(phrases, str) or not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
            raise ConfigError(f"{name} is {phrases!r}; give a list of words")


matches_regex.check_options = _check_regex  # type: ignore[attr-defined]
tagged.check_options = _check_tags  # type: ignore[attr-defined]
json_schema.check_options = _check_schema  # type: ignore[attr-defined]
length_window.check_options = _check_window  # type: ignore[attr-defined]
keywords.check_options = _check_keywords  # type: ignore[attr-defined]
