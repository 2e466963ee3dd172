"""An environment of the package `verifiers` as a rollout function, its rubric as a reward function, and its prompts.

    pip install -c constraints.txt 'verifiers==0.1.10'
    python examples/verifiers_environment.py ENVIRONMENT 200 > tasks.jsonl
    PYTHONPATH=examples r2m train CONFIG reward.model=null head.variant=vanilla data.prompts=tasks.jsonl \\
        rollouts.function=verifiers_environment:play rollouts.function_options.environment=ENVIRONMENT \\
        reward.functions='["verifiers_environment:rubric"]'

The environment asks a client of OpenAI's protocol for turns. Here the policy answers. What the environment says goes
through the chat template. Turns are text: an environment with tools in the protocol, with images, or of one raw text is
refused, and so is one that changes what was said before.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from r2m_async.rollouts import ResponseEnded, Rollout


async def play(rollout: Rollout, *, environment: str, arguments: Mapping[str, Any] | None = None) -> None:
    """Plays one task of an environment, and notes its rubric's reward and metrics in `rollout.info`.

    environment: its name in verifiers. arguments: those of its `load_environment`.

    A response that has no token left, or whose last turn is empty, is scored as it is. Raises whatever the environment
    fails with.
    """
    task, turns = rollout.prompt.columns, rollout.messages
    client = _PolicyAsClient(rollout)
    one = _loaded(environment, json.dumps(arguments or {}))
    given = {"prompt": turns, "example_id": task.get("example_id", 0), "task": task.get("task") or environment}
    given |= {name: task[name] for name in ("answer", "info") if task.get(name) is not None}
    state = await one.rollout(given, client, "policy", {})
    if state["error"] is not None and client.ended is None and not client.silent:
        raise state["error"].__cause__ or state["error"]
    await one.rubric.score_rollout(state)
    rollout.info |= {"reward": float(state["reward"]), "metrics": {k: float(v) for k, v in state["metrics"].items()}}
    if client.ended is not None:
        raise client.ended


def rubric(info: dict[str, Any]) -> float:
    """A reward function: what the environment's rubric gave the response."""
    return float(info["reward"])


class _PolicyAsClient:
    """What an environment takes for `openai.AsyncOpenAI`."""

    def __init__(self, rollout: Rollout) -> None:
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._create))
        self.ended: ResponseEnded | None = None
        """Set once the response had no token left for a turn or for what the environment said."""
        self.silent = False
        """Whether the last turn was empty, which an environment takes for an error."""
        self._rollout = rollout
        self._known = rollout.messages

    async def _create(self, *, messages: Sequence[Mapping[str, Any]], tools: object = None, **how: Any) -> Any:
        """Lets the policy go on from messages, and returns its turn as a `ChatCompletion`. `how` is passed over."""
        from openai.types.chat import ChatCompletion

        if tools:
            raise ValueError(
                "the environment offers tools in OpenAI's protocol: take one whose tools are called in the text"
            )
        said = [{"role": one["role"], "content": one["content"]} for one in messages]
        if said[: len(self._known)] != self._known:
            raise ValueError("the environment has changed what was said before: a response only grows")
        try:
            if new := said[len(self._known) :]:
                self._rollout.append_messages(new)
            turn = await self._rollout.generate()
        except ResponseEnded as ended:
            # The environment would pass it on and tell nothing of what it has so far. An error it keeps.
            self.ended = ended
            raise RuntimeError("the response has no token left") from None
        self.silent = not turn.text
        message = {"role": "assistant", "content": turn.text}
        self._known = [*said, message]
        choice = {"index": 0, "finish_reason": turn.finish_reason, "message": message}
        return ChatCompletion.model_validate(
            {"id": "", "object": "chat.completion", "created": int(time.time()), "model": "policy", "choices": [choice]}
        )


@functools.cache
def _loaded(name: str, arguments: str) -> Any:
    """The environment, once in a process. arguments: as JSON."""
    import verifiers

    return verifiers.load_environment(name, **json.loads(arguments))


def tasks(environment: Any, num: int) -> list[dict[str, Any]]:
    """Returns the records of the environment's first `num` tasks. Fields without a value are left out."""
    return [{key: value for key, value in row.items() if value is not None} for row in environment.get_dataset(num)]


if __name__ == "__main__":
    for record in tasks(_loaded(sys.argv[1], "{}"), int(sys.argv[2])):
        print(json.dumps(record))
