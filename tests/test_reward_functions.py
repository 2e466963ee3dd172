"""Reward functions: what they are given, how they are called, and what becomes of a group if one fails."""

import asyncio
import functools
import json
import math
import re
import sys
import threading

import pytest
import torch
from rings import assert_same_bits, record_groups
from transformers import AutoTokenizer

from actors.reward_annotator import RewardAnnotator
from r2m_async import reference
from r2m_async.cli import main
from r2m_async.config import R2MConfig, RewardFunction
from r2m_async.errors import ConfigError, FunctionFailed, FunctionsHang, RewardFailed
from r2m_async.launch.ray_stages import embeds_at_once
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import TicketOffice, resolve
from r2m_async.models.heads import build_head
from r2m_async.models.reward import load_reward_model, scoring_head
from r2m_async.rewards import calls
from r2m_async.rewards.arguments import Signature, find_function, known_arguments
from r2m_async.rewards.calls import start_calls
from r2m_async.ring.stages import AnnotatorStage
from r2m_async.trajectories import Prompt, Ticket, Trajectory, TrajectoryGroup


def group_of(*texts: str, group_id: int = 3, content="hi", **columns) -> TrajectoryGroup:
    def trajectory(text: str) -> Trajectory:
        return Trajectory(
            token_ids=torch.tensor([5, 6, 7, 8]),
            prompt_len=2,
            behaviour_logprobs=torch.zeros(4),
            policy_versions=torch.zeros(4, dtype=torch.int32),
            finish_reason="length" if text.endswith("...") else "stop",
            text=text,
        )

    prompt = Prompt(prompt_id="p.jsonl:7", content=content, text="<hi>", token_ids=(5, 6), columns=columns)
    ticket = Ticket(group_id=group_id, due_step=1 if group_id >= 0 else -1, seed=0, attempt=0, prompt=prompt)
    return TrajectoryGroup(ticket=ticket, trajectories=tuple(map(trajectory, texts)), greedy=None)


@pytest.fixture
def mine(monkeypatch):
    """`mine(f, g)`: a module `mine` of the user's with these functions, each by its own name."""

    def module(*functions, **named):
        one = type(sys)("mine")
        vars(one).update({function.__name__: function for function in functions} | named)
        monkeypatch.setitem(sys.modules, "mine", one)

    return module


def values(group: TrajectoryGroup, functions, **learner):
    return start_calls(group, R2MConfig().reward(functions=functions).learner(**learner)).result(timeout=60)


# What a function is given


def test_a_function_is_given_what_it_names_and_all_if_it_takes_all(mine):
    seen = {}

    def by_name(response, *, answer, finished, tokens, messages, absent="its own"):
        seen["by name"] = (response, answer, finished, tokens, messages, absent)
        return 1

    def everything(**known):
        seen["everything"] = known
        return 2

    def by_place(response, answer, /):
        return answer + len(response)

    mine(by_name, everything, by_place)
    turns = (("system", "be brief"), ("user", "hi"))
    group = group_of("yes...", content=turns, answer=3, response="a column", extra=[1])
    assert values(group, ["mine:by_name", "mine:everything", "mine:by_place"]) == ((1.0, 2.0, 9.0),)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert seen["by name"] == ("yes...", 3, False, [7, 8], messages, "its own")
    assert seen["everything"] == {
        "prompt": "<hi>",
        "response": "yes...",
        "messages": messages,
        "tokens": [7, 8],
        "finished": False,
        "answer": 3,
        "extra": [1],
    }


def test_raw_text_is_one_turn_of_the_user():
    group = group_of("yes")
    known = known_arguments(group.ticket.prompt, group.trajectories[0])
    assert known["messages"] == [{"role": "user", "content": "hi"}] and known["finished"] is True


class Scorer:
    def __call__(self, text, reply):
        return 10 * len(text) + len(reply)


def test_functions_of_two_other_names_are_called_with_prompt_and_response(mine):
    """Also where the data has a column of such a name: what once scored the response must not score the answer."""

    def old(prompt, answer):
        return 10 * len(prompt) + len(answer)

    def defaulted(question, text, bonus=0):
        return 10 * len(question) + len(text) + bonus

    mine(
        old,
        defaulted,
        lambda_=lambda _, response: 40 + len(response),
        any_number=lambda *both: 10 * len(both[0]) + len(both[1]),
        scorer=Scorer(),
        partial=functools.partial(defaulted, bonus=0),
    )
    names = ["old", "defaulted", "lambda_", "any_number", "scorer", "partial"]
    group = group_of("yes", answer="a long column", bonus=100)
    assert values(group, [f"mine:{name}" for name in names]) == ((43.0,) * 6,)


@pytest.mark.parametrize(
    ("function", "columns", "style", "unknown"),
    [
        (lambda prompts, completions, **more: 0, (), "places", ["prompts", "completions"]),
        (lambda completions, **more: 0, (), None, ["completions"]),
        (lambda response, answer: 0, (), None, ["answer"]),
        (lambda response, answer: 0, ("answer",), "keywords", []),
        (lambda question, response: 0, (), "places", ["question"]),
        (lambda question, response: 0, ("question",), "keywords", []),
        (lambda prompt, response, solution: 0, ("answer",), None, ["solution"]),
    ],
)
def test_a_signature_says_how_it_is_called(function, columns, style, unknown):
    signature = Signature.of(function)
    assert (signature.style(columns), signature.unknown(columns)) == (style, unknown)


def test_options_are_given_besides_and_checked(mine):
    mine(scaled=lambda response, *, scale, floor=0.0: max(floor, scale * len(response)))
    one = {"function": "mine:scaled", "options": {"scale": 2}}
    assert values(group_of("yes"), {"scaled": one}) == ((6.0,),)
    for options, told in (
        ({"scale": 2, "flor": 1}, r"reward\.functions\.scaled\.options has 'flor' and .* did you mean 'floor'"),
        ({"response": "x"}, "'response', which every reward function is given"),
    ):
        with pytest.raises(ConfigError, match=told):
            values(group_of("yes"), {"scaled": one | {"options": options}})


def test_a_function_may_change_what_it_is_given(mine):
    """The groups of a prompt share its columns, and all calls the options."""

    def pops(response, cases, *, words: list):
        cases.append(response)
        words.append(response)
        return 10 * len(cases) + len(words)

    mine(pops)
    group, one = group_of("yes", "no", cases=["one"]), {"function": "mine:pops", "options": {"words": []}}
    for _ in range(2):
        assert values(group, {"pops": one}) == ((21.0,), (21.0,))
    assert group.ticket.prompt.columns == {"cases": ["one"]}


def yields(response):
    yield 1.0


class Verifier:
    def __call__(self, prompt, response):
        return 1.0


def test_a_compiled_function_that_does_not_say_what_it_takes_may_have_options():
    setting = RewardFunction(function="builtins:max", options={"default": 0})
    assert find_function("reward.functions", setting) is max


@pytest.mark.parametrize(
    ("function", "told"),
    [(yields, "'mine:yields' yields"), (Verifier, r"'mine:Verifier' is a class.*`scorer = Verifier\(\)`")],
)
def test_what_could_never_return_a_number_is_refused_before_the_run(mine, function, told):
    mine(function)
    with pytest.raises(ConfigError, match=told):
        calls.functions_of(R2MConfig().reward(functions=[f"mine:{function.__name__}"]))


# Names and weights


def test_each_function_has_a_name_of_its_own():
    def named(functions):
        return list(R2MConfig().reward(functions=functions).reward.named_functions)

    assert named(["m:f", "n:g"]) == ["f", "g"]
    assert named(["m:f", "n:f", "m:mean"]) == ["m:f", "n:f", "m:mean"], "metrics of their own"
    assert named({"exact": {"function": "m:f"}}) == ["exact"]


@pytest.mark.parametrize(
    ("functions", "told"),
    [
        (["m:f", "m:f"], "'m:f' stands twice; name it once, and give it a weight"),
        ({"std": {"function": "m:f"}}, "'std' cannot be the name of a reward"),
        ({"a b": {"function": "m:f"}}, "'a b' cannot be the name of a reward"),
        ({"f": {"function": "m:f", "wait": 1}}, r"reward\.functions\.f\.wait: no such key; did you mean"),
        ({"f": {"weight": 1.0}}, r"reward\.functions\.f\.function: field required"),
        ({"f": {"function": "m:f", "timeout": 0}}, r"reward\.functions\.f\.timeout: input should be greater than 0"),
        ({"f": {"function": "m:f", "weight": 1e38}}, r"reward\.functions\.f\.weight: input should be less than"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_their_key(functions, told):
    with pytest.raises(ConfigError, match=told):
        R2MConfig().reward(functions=functions)


# Calls


def test_slow_functions_wait_together_whether_they_are_async_or_not(mine):
    """Each waits until all responses of the group have come to it."""
    both = threading.Barrier(3, timeout=30)
    met = asyncio.Barrier(3)

    def waits(response):
        return both.wait() >= 0

    async def awaits(response):
        return await met.wait() >= 0

    def returns_an_awaitable(response):
        return awaits(response)

    mine(waits, awaits, returns_an_awaitable)
    for name in ("waits", "awaits", "returns_an_awaitable"):
        assert values(group_of("a", "b", "c"), [f"mine:{name}"]) == ((1.0,),) * 3


def test_quick_functions_are_called_in_order_one_at_a_time(mine):
    calls = []
    mine(
        first=lambda response: calls.append(("first", response)) or 0,
        second=lambda response: calls.append(("second", response)) or 0,
    )
    values(group_of("a", "b"), ["mine:first", "mine:second"])
    assert calls == [(name, response) for response in "ab" for name in ("first", "second")]


async def never(response):
    await asyncio.Event().wait()


async def own_timeout(response):
    raise TimeoutError("the sandbox took too long")


async def leaves(response):
    raise SystemExit(3)


async def cancels(response):
    raise asyncio.CancelledError


async def nothing(response):
    return None


async def huge(response):
    return 10**5000


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (never, "did not return within 0.05 s, its timeout"),
        (own_timeout, "raised TimeoutError: the sandbox took too long"),
        (leaves, "raised SystemExit: 3"),
        (cancels, "was cancelled by itself"),
        (nothing, r"returned None \(NoneType\), which is no number"),
        (huge, r"returned a value that cannot be shown: ValueError \(int\), which is no number"),
        (
            lambda response: huge(response),
            r"returned a value that cannot be shown: ValueError \(int\), which is no number",
        ),
        (lambda response: 10**5000, r"returned a value that cannot be shown: ValueError \(int\), which is no number"),
        (lambda response: cancels(response), "raised .*CancelledError"),
    ],
)
def test_what_goes_wrong_in_an_async_function_is_told_as_its_own(mine, function, told):
    mine(f=function)
    timeout = 0.05 if function is never else 60
    setting = {"function": "mine:f", "timeout": timeout}
    named = rf"^step 1, group 3 \(prompt 'p.jsonl:7'\), response 0: reward\.functions\.own 'mine:f' {told}"
    with pytest.raises(FunctionFailed, match=named) as caught:
        values(group_of("a", "b"), {"own": setting})
    assert not isinstance(caught.value, RewardFailed), "without retries it ends the run"
    assert "rewards/calls.py" not in str(caught.value), "only the user's own frames"


def test_a_function_that_never_returns_misses_its_deadline(mine):
    forever = threading.Event()
    mine(blocks=lambda response: forever.wait() and 1.0)
    with pytest.raises(FunctionFailed, match="did not return within 0.05 s"):
        values(group_of("a"), {"own": {"function": "mine:blocks", "timeout": 0.05}})
    forever.set()


def test_calls_that_never_return_end_the_run_before_their_threads_take_everything(mine, monkeypatch):
    monkeypatch.setattr(calls, "MOST_LEFT", 2)
    forever = threading.Event()
    mine(blocks=lambda response: forever.wait() and 1.0, quick=lambda response: 2.0)
    # The pauses between tries grow, and the third try is not begun.
    blocks = {"function": "mine:blocks", "timeout": 0.05, "retries": 9}
    with pytest.raises(FunctionsHang, match=r"reward.functions.own 'mine:blocks' was not called: 2 calls .* still run"):
        values(group_of("a"), {"own": blocks})
    with pytest.raises(FunctionsHang, match="'mine:quick' was not called"):
        values(group_of("a"), ["mine:quick"])
    forever.set()
    for thread in calls._loops().left:
        thread.join(30)
    assert values(group_of("a"), ["mine:quick"]) == ((2.0,),)


def test_a_column_that_a_function_of_all_misses_is_told_with_those_that_there_are(mine):
    mine(exact=lambda **given: given["awnser"] == given["response"], own=lambda response, **given: {}["x"])
    told = (
        r"reward.functions 'mine:exact' raised KeyError: 'awnser'[\s\S]*if 'awnser' is to be a column .*has none of the name; "
        r"did you mean 'answer'\? The function is given 'answer', 'prompt', .*make it a parameter: `r2m check` then looks"
    )
    with pytest.raises(FunctionFailed, match=told):
        values(group_of("a", answer="4"), ["mine:exact"])
    with pytest.raises(FunctionFailed, match=r"KeyError: 'x'"):
        values(group_of("a", answer="4"), ["mine:own"])


@pytest.mark.parametrize("key", [("a", 1), ["no", "hash"], "response"])
def test_a_key_that_can_be_no_missing_column_is_told_as_it_is(mine, key):
    def own(response, **given):
        raise KeyError(key)

    mine(own)
    with pytest.raises(FunctionFailed, match=re.escape(f"KeyError: {key!r}")) as raised:
        values(group_of("a", answer="4"), ["mine:own"])
    assert "is to be a column" not in str(raised.value)


async def takes_all(response, **given):
    if "hint" in given:
        given["noted"] = given["hint"]
    return float(response == given["answer"]) + given["level"] + given["limit"] + len(given["tokens"])


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.models
def test_a_column_that_code_takes_and_some_records_lack_is_told_before_the_run(
    tiny_config, tmp_path, mine, capsys, command
):
    mine(takes_all, partial=functools.partial(takes_all, answer="4"))
    records = [{"prompt": "the river", "level": 1}, {"prompt": "the stone", "answer": "4", "level": 1}, {"prompt": "a"}]
    functions = {
        "all": {"function": "mine:takes_all", "options": {"limit": 3}},
        "part": {"function": "mine:partial", "options": {"limit": 3}},
    }
    config = tiny_config.reward(functions=functions).data(prompts=written(tmp_path / "p.jsonl", *records))
    if command == "train":
        told = resolve(config).notes
    else:
        (tmp_path / "c.yaml").write_text(config.to_yaml())
        assert main(["check", str(tmp_path / "c.yaml")]) == 0
        told = [line for line in capsys.readouterr().out.splitlines() if "keyword arguments" in line]
    lines = (
        "reward.functions.all 'mine:takes_all' takes 'answer' from its keyword arguments, and 2 of 3 records have no such "
        "column, p.jsonl:1 first",
        "reward.functions.all 'mine:takes_all' takes 'level' from its keyword arguments, and 1 of 3 records have no such "
        "column, p.jsonl:3 first",
        "reward.functions.part 'mine:partial' takes 'level'",
    )
    assert len(told) == 3 and all(line in one for line, one in zip(lines, told, strict=True))


def test_the_first_failure_in_the_order_of_responses_is_told(mine):
    second_failed = threading.Event()

    def fails(response):
        if response == "b":
            second_failed.set()
        second_failed.wait(30)
        raise ValueError(response)

    mine(fails)
    with pytest.raises(FunctionFailed, match=r"response 0: .* raised ValueError: a"):
        values(group_of("a", "b"), ["mine:fails"])


def test_a_failing_call_is_tried_again_and_then_costs_the_group(mine):
    tries = []

    def fails(response):
        tries.append(response)
        if response == "b" or tries.count(response) < 2:
            raise ValueError(f"try {tries.count(response)}")
        return 1.0

    mine(fails)
    setting = {"own": {"function": "mine:fails", "retries": 1}}
    assert values(group_of("a"), setting) == ((1.0,),)
    with pytest.raises(RewardFailed, match=r"response 1: .*ValueError: try 2[\s\S]*It was tried 2 times\.$") as caught:
        values(group_of("c", "b"), setting)
    assert caught.value.reason == "reward.own"
    assert tries.count("a") == tries.count("b") == tries.count("c") == 2


def test_what_is_no_number_is_a_failure_under_skip_too_if_there_are_retries(mine):
    mine(f=lambda response: math.nan)
    plain, tried = {"function": "mine:f"}, {"function": "mine:f", "retries": 1}
    assert math.isnan(values(group_of("a"), {"f": plain}, on_nonfinite="skip")[0][0])
    with pytest.raises(RewardFailed, match="returned nan"):
        values(group_of("a"), {"f": tried}, on_nonfinite="skip")
    assert math.isnan(values(group_of("a", group_id=-1), {"f": tried})[0][0]), "an evaluation has a gap instead"


def test_an_error_that_costs_a_group_crosses_to_another_process_whole():
    import pickle

    error = pickle.loads(pickle.dumps(RewardFailed("reward.own", "why")))
    assert (error.reason, str(error)) == ("reward.own", "why")


# What the data must have


def written(path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("records", "function", "told"),
    [
        (
            [{"prompt": "the river", "answer": 1}, {"prompt": "the stone"}],
            lambda response, answer: 1.0,
            r"asks for 'answer', and p.jsonl:2 has no such column; a reward function is given prompt, response, messages",
        ),
        (
            [{"prompt": "the river", "answer": 1}],
            lambda response, anwser: 1.0,
            r"asks for 'anwser', and p.jsonl:1 has no such column; did you mean 'answer'\?",
        ),
        (
            [{"prompt": "the river", "text": 1}, {"prompt": "the stone"}],
            lambda text, response: 1.0,
            "would be called in two ways",
        ),
        ([{"prompt": "the river"}], "mine:missing", r"module 'mine' has no callable 'missing'"),
    ],
)
@pytest.mark.models
def test_check_refuses_what_train_refuses_of_the_data(
    tiny_config, tmp_path, mine, capsys, command, records, function, told
):
    mine(f=function)
    name = function if isinstance(function, str) else "mine:f"
    config = tiny_config.data(prompts=written(tmp_path / "p.jsonl", *records)).reward(functions=[name])
    (tmp_path / "config.yaml").write_text(config.run(output_dir=str(tmp_path)).to_yaml())
    assert main([command, str(tmp_path / "config.yaml"), *(["--in-process"] if command == "train" else [])]) == 2
    assert re.search(told, capsys.readouterr().err)


# In the ring


@pytest.mark.models
def test_a_ring_with_named_weighted_functions_is_the_reference_bit_for_bit_and_measures_each(
    tiny_config, tmp_path, mine
):
    async def answer(response, answer):
        await asyncio.sleep(0)
        return answer + response.count("the")

    mine(answer, words=lambda p, r: len(r.split()))
    records = [
        {"prompt": f"the {word} river :", "answer": number} for number, word in enumerate(("old", "warm", "cold"))
    ]
    functions = {
        "right": {"function": "mine:answer", "weight": 0.5},
        "watched": {"function": "mine:words", "weight": 0},
    }
    config = (
        tiny_config.data(prompts=written(tmp_path / "p.jsonl", *records)).reward(functions=functions).run(num_steps=2)
    )
    with Ring.of(config, in_process=True) as ring:
        seen, steps = record_groups(ring), []
        while not ring.finished:
            steps.append(ring.step())
        ring.drain()
        assert_same_bits(ring, reference.train(config), seen)
    for step in steps:
        assert step["reward/mean"] - step["reward/model_mean"] == pytest.approx(0.5 * step["reward/right"], abs=1e-5)
        assert step["reward/watched"] > 0, "a weight of 0 only watches"


@pytest.mark.models
def test_a_group_whose_function_fails_is_left_out_under_its_reason_and_the_rest_is_the_references(tiny_config, mine):
    """The step that loses one group, and the step that loses all, too."""
    config = tiny_config.reward(functions={"own": {"function": "mine:fails", "retries": 1}}).run(num_steps=4)
    mine(fails=lambda prompt, response: 0.0)
    office = TicketOffice(config, resolve(config))
    doomed = [office.group(group_id, 0).prompt.text for group_id in (1, 4, 5)]

    def fails(prompt, response):
        if prompt in doomed:
            raise ValueError("no verdict")
        return 1.0

    mine(fails)
    with Ring.of(config, in_process=True) as ring:
        seen, steps = record_groups(ring), []
        while not ring.finished:
            steps.append(ring.step())
        ring.drain()
        assert_same_bits(ring, expected := reference.train(config))
    assert [len(rewards) for rewards in expected.rewards] == [3, 6, 0, 6]
    assert seen["rewards"] == dict(enumerate(expected.rewards))
    assert [step.get("ledger/voided/reward.own", 0) for step in steps] == [1, 1, 3, 3]
    assert [step["throughput/responses"] for step in steps] == [3, 6, 0, 6]
    assert "policy/loss" not in steps[2] and steps[3]["ledger/trained"] == 5


@pytest.mark.models
def test_a_function_that_always_fails_ends_the_run_with_its_own_error(tiny_config, mine):
    def fails(prompt, response):
        raise ValueError("no verdict")

    mine(fails)
    config = tiny_config.reward(functions={"own": {"function": "mine:fails", "retries": 1}}, max_voided=1)
    with Ring.of(config, in_process=True) as ring, pytest.raises(FunctionFailed) as caught:
        ring.step()
    told = str(caught.value)
    assert "ValueError: no verdict" in told and "2 groups in a row" in told and "reward.max_voided is 1" in told
    with pytest.raises(FunctionFailed, match="no verdict"):
        reference.train(config)


@pytest.mark.models
def test_a_gold_function_is_given_what_it_names_or_its_three_places(tiny_config, tmp_path, mine):
    async def named(response, answer):
        return answer

    mine(named, placed=lambda text, reply, ended: 10 * len(text) + ended, unknown=lambda response, solution: 0)
    config = tiny_config.data(prompts=written(tmp_path / "p.jsonl", {"prompt": "the river", "answer": 0.25}))
    for name, gold in (("named", {0.25}), ("placed", {90 + share / 6 for share in range(7)})):
        with Ring.of(config.evaluation(gold=f"mine:{name}").run(num_steps=1), in_process=True) as ring:
            assert any(ring.step()["reward/gold"] == pytest.approx(one) for one in gold)
    with pytest.raises(
        ConfigError, match=r"evaluation\.gold 'mine:unknown' asks for 'solution', and p\.jsonl:1 has no"
    ):
        Ring.of(config.evaluation(gold="mine:unknown"), in_process=True)


@pytest.mark.models
def test_an_evaluation_has_a_gap_where_a_function_fails_and_the_run_goes_on(tiny_config, mine, caplog):
    mine(fails=lambda prompt, response: 1.0)
    config = tiny_config.reward(functions={"own": {"function": "mine:fails", "retries": 1}})
    config = config.run(num_steps=1).evaluation(every=1, num_prompts=2)
    held_out = resolve(config).eval_prompts[0].text

    def fails(prompt, response):
        if prompt == held_out:
            raise ValueError("no verdict")
        return 1.0

    mine(fails)
    with Ring.of(config, in_process=True) as ring:
        assert ring.step()["reward/own"] == 1.0
        first, last = ring.drain()
    for one in (first, last):
        assert math.isnan(one["reward/own"]) and math.isnan(one["reward"]) and math.isfinite(one["proxy"])
    assert "evaluation prompt 0" in caplog.text and "ValueError: no verdict" in caplog.text


def test_no_function_sees_what_another_did_to_its_arguments(mine):
    def changes(response, messages):
        messages.append("mine")
        return len(messages)

    mine(changes, alike=changes)
    assert values(group_of("a", "b"), ["mine:changes", "mine:alike"]) == ((2.0, 2.0),) * 2


@pytest.mark.models
def test_a_slow_function_keeps_the_reward_model_from_no_other_group(tiny_config, mine):
    """Both groups of a step wait for each other, so neither would ever come if the embeddings of one had to come first."""
    both = threading.Barrier(2 * 3, timeout=60)
    mine(waits=lambda prompt, response: both.wait() >= 0)
    config = tiny_config.reward(functions=["mine:waits"]).run(num_steps=1)
    with Ring.of(config, in_process=True) as ring:
        ring.step()
    assert AnnotatorStage.methods()["embed"].beside == "embed"
    assert embeds_at_once(config) >= 2 and embeds_at_once(tiny_config) == 1


@pytest.mark.models
def test_in_a_process_of_its_own_an_annotator_embeds_a_group_while_another_waits(tiny_config, tiny, mine):
    from concurrent.futures import ThreadPoolExecutor

    both = threading.Barrier(2 * 2, timeout=60)
    mine(waits=lambda prompt, response: both.wait() >= 0)
    config = tiny_config.reward(functions=["mine:waits"]).head(variant="vanilla")
    model = load_reward_model(config.reward.model, config)
    annotator = RewardAnnotator(
        model,
        AutoTokenizer.from_pretrained(config.reward.model),
        build_head(scoring_head(model), 48, 32, config),
        config,
    )
    groups = [group_of("the river", "warm", group_id=number) for number in (1, 2)]
    with ThreadPoolExecutor(2) as threads:
        bonuses = [embeddings.bonus.tolist() for _, embeddings in threads.map(annotator.embed, groups)]
    assert bonuses == [[1.0, 1.0]] * 2


@pytest.mark.ring
@pytest.mark.usefixtures("ray_session")
def test_over_ray_a_function_that_fails_for_one_record_costs_that_group_alone(tiny_config, tmp_path):
    """`math_answer` runs in processes of the annotator's own, and cannot read one of the four answers."""
    answers = {"the old river :": "4", "the warm river :": "", "the cold river :": 7, "the old wind :": "$x^2$"}
    records = [{"prompt": prompt, "answer": answer} for prompt, answer in answers.items()]
    right = {"function": "r2m_async.rewards:math_answer", "retries": 1}
    config = tiny_config.data(prompts=written(tmp_path / "p.jsonl", *records)).reward(functions={"right": right})
    with Ring.of(config.run(num_steps=2).checkpoint(at_end=False)) as ring:
        steps = [ring.step() for _ in range(2)]
    assert sorted(step["throughput/responses"] for step in steps) == [3, 6]
    assert steps[1]["ledger/voided/reward.right"] == steps[1]["ledger/voided"] == 1
    assert all(step["reward/right"] == 0 for step in steps)
