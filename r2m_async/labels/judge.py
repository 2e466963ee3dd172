"""`judge`: a language model on a server compares two responses, in both orders. The server speaks OpenAI's protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import regex

from r2m_async.errors import ConfigError
from r2m_async.rewards.servers import chat_reply, check_chat, filled, question_of

TEMPLATE = """Which of two answers to the question is better? Reply with A, with B, or with TIE if neither is. Reply with \
nothing else.

Question:
{prompt}

Answer A:
{first}

Answer B:
{second}"""
"""What the judge is told if `template` says nothing else."""
_VERDICT = regex.compile(r"[^\p{L}]*(?:(?:answer|response)\s+)?(A|B|TIE)[^\p{L}]*", regex.IGNORECASE)


async def pairwise(
    messages: Sequence[Mapping[str, str]],
    first: str,
    second: str,
    url: str,
    model: str,
    template: str = TEMPLATE,
    max_tokens: int = 16,
    temperature: float = 0.0,
    api_key_env: str | None = None,
    body: Mapping[str, Any] | None = None,
) -> str:
    """Returns which of two responses a language model prefers: `first`, `second`, `tie`, `refused` or `disagreed`.

    The model is asked twice at the same time, once in each order. It has a preference only if both replies name the same
    response.

    Args:
        messages: the prompt as turns.
        first, second: the responses.
        template: what the model is told. `{prompt}`, `{first}` and `{second}` are filled in. The reply must be A, B or TIE,
            perhaps as `Answer A` or `[[A]]`. Any other reply is a refusal.

    The others are as in `rewards.judge`. Raises ConnectionError if the server cannot be reached, and ValueError if it
    refuses.
    """
    question = question_of(messages)

    async def preferred(left: str, right: str) -> str | None:
        told = filled(template, {"prompt": question, "first": left, "second": right})
        return verdict(await chat_reply(told, url, model, max_tokens, temperature, api_key_env, body))

    one, other = await asyncio.gather(preferred(first, second), preferred(second, first))
    if one is None or other is None:
        return "refused"
    turned = {"first": "second", "second": "first", "tie": "tie"}[other]
    return one if one == turned else "disagreed"


def verdict(reply: str) -> str | None:
    """Returns what a reply says: `first`, `second` or `tie`. None for a reply that is not one of A, B and TIE alone."""
    match = _VERDICT.fullmatch(reply)
    return {"a": "first", "b": "second", "tie": "tie"}[match[1].lower()] if match else None


def _check(
    url: str = "http://",
    model: str = "any",
    template: str = TEMPLATE,
    max_tokens: int = 16,
    temperature: float = 0.0,
    api_key_env: str | None = None,
    body: Mapping[str, Any] | None = None,
) -> None:
    check_chat(url, model, max_tokens, temperature, api_key_env, body)
    if not isinstance(template, str) or not all(part in template for part in ("{first}", "{second}")):
        raise ConfigError(f"template is {template!r}; it must have {{first}} and {{second}}, which the judge compares")


pairwise.check_options = _check  # type: ignore[attr-defined]
