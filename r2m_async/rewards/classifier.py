"""`remote_reward`: a reward model that a vLLM server holds. Its number is that of the same model in `reward.model`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from r2m_async.errors import ConfigError
from r2m_async.rewards.packages import needs
from r2m_async.rewards.servers import check_server, reply_of

ENDPOINTS = ("classify", "pooling")
"""What of vLLM's API gives the number of a classifier. `score` joins two texts in a way of its own."""


_OF_RECORD = object()
"""Stands for an option that a column of the data gives."""


async def remote_reward(
    prompt: str,
    messages: Sequence[Mapping[str, str]],
    response: str,
    finished: bool,
    url: str,
    reward_model: str,
    model: str | None = None,
    endpoint: str = "classify",
    max_tokens: int | None = None,
    api_key_env: str | None = None,
    trust_remote_code: bool = False,
) -> float:
    """Returns the reward of a response by a sequence classifier with one label on a vLLM server.

    Args:
        prompt: the text that the policy read.
        messages: the prompt as turns.
        response: the response.
        finished: whether the policy ended it itself.
        url: the root of the server, for example `http://localhost:8000`.
        reward_model: Hugging Face name or directory of the model that the server holds. Its tokenizer, with its chat
            template, and its config are loaded here, and turn prompt and response into tokens as for `reward.model`.
        model: the name that the server has for the model. None: `reward_model`.
        endpoint: what is asked, `classify` or `pooling`.
        max_tokens: as `reward.max_tokens`. The server must take as many (`--max-model-len`).
        api_key_env: the name of the environment variable that holds the key of the server. None: the server needs none.
        trust_remote_code: whether Python code that comes with the files of `reward_model` may be run.

    The number is the logit, without sigmoid. Raises ConnectionError if the server cannot be reached, and ValueError if
    it refuses, if its model has not exactly one label, and if the chat template refuses the turns.
    """
    from r2m_async.data.reward_text import reward_input_ids

    tokenizer, positions, padding = _reader(reward_model, trust_remote_code)
    # The policy reads raw text as it stands in the data. Turns are given marks, or a newline, if there is no template.
    raw = len(messages) == 1 and messages[0]["content"] == prompt
    content = prompt if raw else [dict(turn) for turn in messages]
    ids = reward_input_ids(tokenizer, content, response, finished, positions if max_tokens is None else max_tokens)
    # A classifier of transformers scores the last token that is not padding, and the server scores the last token.
    while len(ids) > 1 and ids[-1] == padding:
        ids.pop()
    address = f"{url.rstrip('/')}/{endpoint}"
    request = {"model": model or reward_model, "input": ids, "use_activation": False}
    if endpoint == "pooling":
        request["task"] = "classify"
    reply = await reply_of(address, request, api_key_env)
    try:
        (numbers,) = (one["probs" if endpoint == "classify" else "data"] for one in reply["data"])
        rewards = list(numbers)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{address} replied {str(reply)[:200]}, which has no classifier's numbers") from None
    if len(rewards) != 1:
        raise ValueError(
            f"{address}: the model {model or reward_model} has {len(rewards)} labels, and a reward model has one; let the "
            f"server hold another"
        )
    if isinstance(rewards[0], bool) or not isinstance(rewards[0], int | float):
        raise ValueError(
            f"{address} replied {rewards[0]!r} as the reward of the response {response[:60]!r}, which is no number"
        )
    return float(rewards[0])


@functools.cache
def _reader(reward_model: str, trust_remote_code: bool) -> tuple[Any, int | None, int | None]:
    """The tokenizer of a reward model, the most tokens that it reads, and its padding token."""
    from r2m_async.models.pretrained import pretrained_config, pretrained_tokenizer
    from r2m_async.models.tokens import check_tokens, num_positions, padding_token

    key = "reward_model"
    config = pretrained_config(key, reward_model, trust=trust_remote_code)
    tokenizer = pretrained_tokenizer(key, reward_model, trust_remote_code)
    check_tokens(key, reward_model, tokenizer, config)
    return tokenizer, num_positions(config), padding_token(tokenizer, config)


def _check(
    url: str = "http://",
    reward_model: object = _OF_RECORD,
    model: str | None = None,
    endpoint: str = "classify",
    max_tokens: int | None = None,
    api_key_env: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    needs("httpx", "httpx")
    check_server(url, api_key_env)
    if reward_model is not _OF_RECORD and not (isinstance(reward_model, str) and reward_model):
        raise ConfigError(
            f"reward_model is {reward_model!r}; name the model that the server holds, by its Hugging Face name or a directory"
        )
    if model is not None and not (isinstance(model, str) and model):
        raise ConfigError(f"model is {model!r}; give the name that the server has for its model, or leave it out")
    if endpoint not in ENDPOINTS:
        raise ConfigError(f"endpoint is {endpoint!r}; give {' or '.join(ENDPOINTS)}")
    if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 2):
        raise ConfigError(f"max_tokens is {max_tokens!r}; give a number of tokens, 2 or more, or leave it out")
    if not isinstance(trust_remote_code, bool):
        raise ConfigError(f"trust_remote_code is {trust_remote_code!r}; give true or false")
    if isinstance(reward_model, str):
        _reader(reward_model, trust_remote_code)


remote_reward.check_options = _check  # type: ignore[attr-defined]
