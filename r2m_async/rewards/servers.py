"""Requests to servers that reward functions ask, and the options that they have in common."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from r2m_async.errors import ConfigError

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
