"""`judge`: a language model on a server rates responses. The server speaks OpenAI's protocol, as vLLM's does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import regex

from r2m_async.errors import ConfigError
from r2m_async.rewards.servers import chat_reply, check_chat, filled, question_of

TEMPLATE = """Rate the answer to the question from {low} (useless) to {high} (could not be better). Reply with the number alone.

Question:
{prompt}

Answer:
{response}"""
"""What the judge is told if `template` says nothing else."""
_NUMBER = r"-?\d+(?:\.\d+)?"


async def judge(
    messages: Sequence[Mapping[str, str]],
    response: str,
    url: str,
    model: str,
    template: str = TEMPLATE,
    low: float = 0.0,
    high: float = 10.0,
    max_tokens: int = 16,
    temperature: float = 0.0,
    api_key_env: str | None = None,
    body: Mapping[str, Any] | None = None,
) -> float:
    """Returns how a language model on a server rates a response, from 0 (`low`) to 1 (`high`).

    Args:
        messages: the prompt as turns.
        response: the response.
        url: the root of the server's API, for example `http://localhost:8000/v1`.
        model: the name that the server has for its model.
        template: what the model is told. `{prompt}`, `{response}`, `{low}` and `{high}` are filled in.
        low: the rating that gives 0.
        high: the rating that gives 1.
        max_tokens: the most tokens of a reply.
        temperature: the sampling temperature of the reply. 0 takes the likeliest tokens.
        api_key_env: the name of the environment variable that holds the key of the server. None: the server needs none.
        body: further keys of the request.

    The number in the reply is the rating; `/10` and `out of 10` may stand beside it if `high` is 10. Raises ValueError if
    there is no number or more than one, because which of them rates would be a guess, and if it lies beyond `low` and
    `high`. Raises ConnectionError if the server cannot be reached, and ValueError if it refuses.
    """
    told = filled(
        template, {"prompt": question_of(messages), "response": response, "low": f"{low:g}", "high": f"{high:g}"}
    )
    reply = await chat_reply(told, url, model, max_tokens, temperature, api_key_env, body)
    of_scale = rf"(?:/|\bout\s+of)\s*{regex.escape(f'{high:g}')}(?![\d.]*\d)"
    numbers = set(map(float, regex.findall(_NUMBER, regex.sub(of_scale, " ", reply, flags=regex.IGNORECASE))))
    if len(numbers) != 1:
        said = "several numbers, and which of them rates is not clear" if numbers else "no number"
        raise ValueError(f"the judge {model} replied {reply[:200]!r}, in which there is {said}")
    (rating,) = numbers
    if not low <= rating <= high:
        raise ValueError(
            f"the judge {model} replied {reply[:200]!r}, and {rating:g} is not between {low:g} and {high:g}"
        )
    return (rating - low) / (high - low)


def _check(
    url: str = "http://",
    model: str = "any",
    template: str = TEMPLATE,
    low: float = 0.0,
    high: float = 10.0,
    max_tokens: int = 16,
    temperature: float = 0.0,
    api_key_env: str | None = None,
    body: Mapping[str, Any] | None = None,
) -> None:
    check_chat(url, model, max_tokens, temperature, api_key_env, body)
    if not isinstance(template, str) or "{response}" not in template:
        raise ConfigError(f"template is {template!r}, without {{response}}: the judge would not see what it rates")
    if not (all(isinstance(one, int | float) and math.isfinite(one) for one in (low, high)) and low < high):
        raise ConfigError(f"low is {low!r} and high is {high!r}; give two numbers, the smaller first")


judge.check_options = _check  # type: ignore[attr-defined]
