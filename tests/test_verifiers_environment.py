"""The example that plays environments of the package `verifiers`: with the package where it is, and with one in its place."""

import asyncio
import json
import sys
import types
from pathlib import Path

import pytest

from r2m_async.rollouts import ResponseEnded, Rollout, Turn
from r2m_async.trajectories import Prompt

pytest.importorskip("openai")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
QUESTION = {"role": "user", "content": "guess a number"}
LOWER = {"role": "user", "content": "lower"}


class Script:
    """A writer whose policy says what a test has written down, a token each."""

    def __init__(self, *turns: str, room: int = 99) -> None:
        self.turns, self.said, self.room = list(turns), [dict(QUESTION)], room

    @property
    def messages(self):
        return [dict(one) for one in self.said]

    async def generate(self, max_new_tokens, stop):
        if not self.room:
            raise ResponseEnded("no token left")
        self.room -= 1
        text = self.turns.pop(0)
        self.said.append({"role": "assistant", "content": text})
        return Turn(text=text, token_ids=(1,), finish_reason="stop", stop=None)

    def append_messages(self, messages):
        if not self.room:
            raise ResponseEnded("no token left")
        self.said += map(dict, messages)


class Guessing:
    """An environment as verifiers 0.1.10 has them: it keeps an error that its client raised."""

    def __init__(self, say=lambda messages: [*messages, LOWER], tools=None):
        self.say, self.tools, self.rubric = say, tools, self
        self.given = []

    async def rollout(self, given, client, model, sampling_args):
        self.given.append(given)
        messages, state = list(given["prompt"]), {"error": None, "said": []}
        while "3" not in state["said"]:
            try:
                how = {"tools": self.tools} if self.tools else {}
                done = await client.chat.completions.create(model=model, messages=messages, **how)
                if not (text := done.choices[0].message.content):
                    raise ValueError("Model returned no content")
            except Exception as error:
                state["error"] = RuntimeError("model error")
                state["error"].__cause__ = error
                break
            state["said"].append(text)
            messages = self.say([*messages, {"role": "assistant", "content": text}])
        return state

    async def score_rollout(self, state):
        state["reward"], state["metrics"] = float("3" in state["said"]), {"turns": len(state["said"])}


@pytest.fixture
def example(monkeypatch):
    """The example, and `example.environment`, which `verifiers.load_environment` returns."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import verifiers_environment as one

    one.environment = Guessing()
    package = types.ModuleType("verifiers")
    package.load_environment = lambda name, **arguments: one.environment
    monkeypatch.setitem(sys.modules, "verifiers", package)
    yield one
    del sys.modules["verifiers_environment"]


def played(example, writer, **columns) -> Rollout:
    prompt = Prompt(prompt_id="p", content=(("user", QUESTION["content"]),), text="", token_ids=(1,), columns=columns)
    rollout = Rollout(prompt, 0, 0, 0, writer)
    try:
        asyncio.run(example.play(rollout, environment="guessing"))
    except ResponseEnded:
        rollout.info["ended"] = True
    return rollout


def test_the_policy_answers_the_environment_until_it_has_enough_and_its_rubric_is_the_reward(example):
    writer = Script("9", "3")
    rollout = played(example, writer, answer="3", example_id=7, info={"hard": True})
    assert [one["content"] for one in writer.messages] == ["guess a number", "9", "lower", "3"]
    assert rollout.info == {"reward": 1.0, "metrics": {"turns": 2.0}} and example.rubric(rollout.info) == 1.0
    (given,) = example.environment.given
    assert given == {"prompt": [QUESTION], "example_id": 7, "task": "guessing", "answer": "3", "info": {"hard": True}}


@pytest.mark.parametrize(("turns", "room", "ended"), [(["9"], 1, True), (["9", ""], 9, False)])
def test_a_response_without_a_token_left_or_with_an_empty_turn_is_scored_as_it_is(example, turns, room, ended):
    rollout = played(example, Script(*turns, room=room))
    assert (rollout.info["reward"], rollout.info["metrics"]) == (0.0, {"turns": 1.0})
    assert rollout.info.get("ended", False) == ended


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (Guessing(say=lambda messages: [messages[0], LOWER]), "has changed what was said before"),
        (Guessing(tools=[{"type": "function"}]), "offers tools in OpenAI's protocol"),
    ],
)
def test_what_a_response_cannot_hold_is_refused_in_the_examples_own_words(example, environment, says):
    example.environment = environment
    with pytest.raises(ValueError, match=says):
        played(example, Script("9", "8"))


def test_records_have_what_the_environment_needs_of_a_task(example):
    rows = [{"prompt": [QUESTION], "answer": "3", "info": None, "example_id": 0}]
    example.environment.get_dataset = lambda num: rows[:num]
    assert example.tasks(example.environment, 1) == [{"prompt": [QUESTION], "answer": "3", "example_id": 0}]


GUESSING_0_1_10 = """
import verifiers as vf
from datasets import Dataset

class Guessing(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **more):
        return [{"role": "user", "content": "lower"}]

    @vf.stop
    async def is_right(self, state):
        return bool(state["trajectory"]) and "3" in state["trajectory"][-1]["completion"][-1]["content"]

def right(completion, answer):
    return float(answer in completion[-1]["content"])

def load_environment():
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "guess a number"}], "answer": "3"}])
    return Guessing(dataset=data, rubric=vf.Rubric(funcs=[right]), max_turns=4)
"""


def test_an_environment_of_the_package_itself_is_played(monkeypatch, tmp_path):
    pytest.importorskip("verifiers", reason="not among the packages of the tests: pip install verifiers==0.1.10")
    (tmp_path / "guessing.py").write_text(GUESSING_0_1_10)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import verifiers_environment as one

    (record,) = one.tasks(one._loaded("guessing", "{}"), 1)
    json.dumps(record)
    columns = {key: value for key, value in record.items() if key != "prompt"}
    for turns, room, reward in ((["9", "3"], 99, 1.0), (["9"], 1, 0.0), (["9", ""], 99, 0.0), (["9"] * 4, 99, 0.0)):
        rollout = played(one, Script(*turns, room=room), **columns)
        assert rollout.info["reward"] == reward and rollout.info["metrics"]["num_turns"] == min(len(turns), 4) - (
            turns[-1] == ""
        )
    del sys.modules["verifiers_environment"]
