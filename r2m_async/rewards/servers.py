"""Requests to servers that reward functions and labellers ask, and the options that they have in common."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import regex

from r2m_async.errors import ConfigError
from r2m_async.rewards.packages import needs

if TYPE_CHECKING:
    from httpx import AsyncClient

_MOST_CONNECTIONS = 64
_SHOWN = 500
"""The most characters of a server's words in a message."""

_of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncClient] = weakref.WeakKeyDictionary()


async def reply_of(address: str, request: Mapping[str, Any], api_key_env: str | None) -> Any:
    """Posts a request as JSON, and returns the reply.

    address: the whole URL. api_key_env: the name of the environment variable that holds the key of the server, or None.

    It waits as long as the server takes: the deadline of the reward function holds. Raises ConnectionError if the
    server cannot be reached or falls silent, and ValueError if it refuses or does not reply in JSON.
    """
    import httpx

    headers = {"Authorization": f"Bearer {os.environ[api_key_env]}"} if api_key_env else {}
    try:
        answer = await _client().post(address, json=request, headers=headers)
    except httpx.HTTPError as error:
        raise ConnectionError(
            f"{address} cannot be reached: {type(error).__name__} {error}; is the server up?"
        ) from None
    if answer.is_error:
        raise ValueError(f"{address} refused: status {answer.status_code}, {answer.text[:_SHOWN]!r}")
    try:
        return answer.json()
    except ValueError:
        raise ValueError(f"{address} replied no JSON: {answer.text[:_SHOWN]!r}; is it the right URL?") from None


async def chat_reply(
    told: str,
    url: str,
    model: str,
    max_tokens: int,
    temperature: float,
    api_key_env: str | None,
    body: Mapping[str, Any] | None,
) -> str:
    """Returns what a language model on a server replies to one message. The server speaks OpenAI's protocol.

    told: the message. url: the root of the server's API. The others are as in `judge.judge`. Raises as `reply_of` does.
    """
    request = {
        "model": model,
        "messages": [{"role": "user", "content": told}],
        "max_tokens": max_tokens,
        "temperature": temperature,
        **(body or {}),
    }
    address = f"{url.rstrip('/')}/chat/completions"
    replied = await reply_of(address, request, api_key_env)
    try:
        return replied["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError):
        raise ValueError(
            f"{address} replied {str(replied)[:200]}, which has no message; is it the right URL?"
        ) from None


def check_chat(
    url: object,
    model: object,
    max_tokens: object,
    temperature: object,
    api_key_env: str | None,
    body: object,
) -> None:
    """Raises ConfigError unless `chat_reply` can be called with these options."""
    needs("httpx", "httpx")
    check_server(url, api_key_env)
    if not (isinstance(model, str) and model):
        raise ConfigError(f"model is {model!r}; give the name that the server has for its model")
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens!r}; give a number of tokens, 1 or more")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or temperature < 0:
        raise ConfigError(f"temperature is {temperature!r}; give a number, 0 or more")
    if body is not None and not isinstance(body, Mapping):
        raise ConfigError(f"body is {body!r}; give a mapping of further keys of the request")


def filled(template: str, values: Mapping[str, str]) -> str:
    """Returns a template with `{name}` replaced by the value of each name, in one pass: values may hold such braces."""
    return regex.sub(rf"\{{({'|'.join(values)})\}}", lambda match: values[match[1]], template)


def question_of(messages: Sequence[Mapping[str, str]]) -> str:
    """Returns a prompt of several turns as one text. A single turn is what it says, without the role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def check_server(url: object, api_key_env: str | None) -> None:
    """Raises ConfigError unless these options of a reward function can be used."""
    if not (isinstance(url, str) and url.startswith(("http://", "https://"))):
        raise ConfigError(f"url is {url!r}; give the root of the server's API, for example http://localhost:8000/v1")
    if api_key_env is not None and api_key_env not in os.environ:
        raise ConfigError(f"api_key_env is {api_key_env!r}, and the environment has no such variable; set it")


def _client() -> AsyncClient:
    """The client of the running event loop."""
    import httpx

    loop = asyncio.get_running_loop()
    if loop not in _of_loop:
        limits = httpx.Limits(max_connections=_MOST_CONNECTIONS)
        _of_loop[loop] = httpx.AsyncClient(timeout=None, limits=limits)
    return _of_loop[loop]
