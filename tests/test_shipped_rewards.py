"""The reward functions that come with the package."""

import asyncio
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.workload import check_functions
from r2m_async.rewards import (
    json_schema,
    judge,
    keywords,
    length_window,
    matches_regex,
    math_answer,
    mathematics,
    remote_reward,
    tagged,
)

MATHS = [
    ("So it is 0.5.", "1/2", 1),
    (r"Thus \boxed{\frac{2}{4}}", "0.5", 1),
    ("first 3, then $\\frac{1}{2}$", "\\frac12", 1),
    ("0.5 and then 3", "1/2", 0),
    ("I do not know", "1/2", 0),
    ("$1 + 2x$", "2x+1", 1),
    ("2", "2x+1", 0),
    ("The answer is 1,234", 1234, 1),
    ("It costs 18", "6 * 3 = 18\n#### 18", 1),
    ("It costs 6", "6 * 3 = 18\n#### 18", 0),
    ("$9^{9^{9^{9}}}$", "7", 0),
]


def run_alone(work):
    """Runs it on a loop of its own, and ends the processes of that loop with it."""

    async def run():
        try:
            return await work
        finally:
            slots = mathematics._workers()._slots
            while not slots.empty():
                if worker := slots.get_nowait():
                    worker.stdin.close()
                    await worker.wait()

    return asyncio.run(run())


def test_a_mathematical_answer_is_compared_by_its_value_and_a_bottomless_one_is_wrong_in_time():
    """All on one loop, so one process reads them all, but for the last, which must be killed."""

    async def ask():
        return [
            await math_answer(response, answer, seconds=30 if at < len(MATHS) - 1 else 1)
            for at, (response, answer, _) in enumerate(MATHS)
        ]

    assert run_alone(ask()) == [right for _, _, right in MATHS]


def test_an_answer_of_the_data_that_cannot_be_read_is_told_and_a_dead_process_too(monkeypatch, tmp_path):
    script = tmp_path / "math_worker.py"
    script.write_text(
        "import sys\nfor line in sys.stdin:\n    'die' in line and sys.exit(3)\n    print('null', flush=True)\n"
    )
    monkeypatch.setattr(mathematics, "__file__", str(script))

    async def ask(answer):
        await math_answer("1", answer)

    with pytest.raises(ValueError, match=r"the column `answer` is 'what\?', which is no mathematical expression"):
        run_alone(ask("what?"))
    with pytest.raises(RuntimeError, match=r"has died \(status 3\)"):
        run_alone(ask("die"))


def test_a_response_matches_a_pattern_as_a_whole_or_in_part():
    assert matches_regex(" yes\nno ", "yes.no") == 1 and matches_regex("yes, no", "yes") == 0
    assert matches_regex("yes, no", "no", part="any") == 1 and matches_regex("yes", "no", part="any") == 0


def test_a_pattern_that_would_take_for_ever_does_not_match(monkeypatch):
    from r2m_async.rewards import texts

    monkeypatch.setattr(texts, "_REGEX_SECONDS", 0.05)
    assert matches_regex("a" * 60 + "c", r"(a|a)*b") == 0


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think>hm</think>\n<answer>4</answer>", 1),
        ("<think>hm</think><answer> </answer>", 0),
        ("<answer>4</answer><think>hm</think>", 0),
        ("<think>a</think><think>b</think><answer>4</answer>", 0),
        ("<think>hm</think> so <answer>4</answer>", 0),
        ("<think>hm</think><answer>4</answer> done", 0),
        ("hm</think><answer>4</answer>", 0),
    ],
)
def test_tags_stand_in_their_order_and_once(response, reward):
    assert tagged(response) == reward
    assert tagged(response.removeprefix("<think>"), opened=True) == (response.startswith("hm") or reward)


SCHEMA = {
    "type": "object",
    "properties": {"n": {"$ref": "#/$defs/n"}},
    "required": ["n"],
    "$defs": {"n": {"type": "integer"}},
}


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ('{"n": 3}', 1),
        ('```json\n{"n": 3}\n```', 1),
        ('{"n": "3"}', 0),
        ("{}", 0),
        ("n = 3", 0),
        ('{"n": NaN}', 0),
        ("[" * 9999, 0),
    ],
)
def test_json_is_held_against_a_schema(response, reward):
    assert json_schema(response, SCHEMA) == reward


@pytest.mark.parametrize(("words", "reward"), [(0, 0.0), (1, 0.5), (2, 1.0), (4, 1.0), (5, 0.5), (6, 0.0), (9, 0.0)])
def test_a_length_falls_along_a_line_outside_of_its_window(words, reward):
    text = " ".join(["ab"] * words)
    window = {"low": 2, "high": 4}
    assert length_window(text, [], **window, margin=2, unit="words") == reward
    assert length_window("", [0] * words, **window, margin=2) == reward
    assert length_window(text, [], **window, unit="words") == (reward == 1)


def test_keywords_are_whole_words():
    assert keywords("The cat, a dog.", required=["CAT", "dog", "bird", "a dog"]) == 0.75
    assert keywords("concatenate", required=["cat"]) == 0
    assert keywords("The cat", required=["cat"], forbidden=["the"]) == 0
    assert keywords("The cat", required=["cat"], forbidden=["the"], ignore_case=False) == 1
    assert keywords("", forbidden=["cat"]) == 1


@pytest.mark.parametrize(
    ("function", "options", "told"),
    [
        ("matches_regex", {"pattern": "("}, r"pattern '\(' is no regular expression"),
        ("matches_regex", {"pattern": "a", "part": "half"}, "part is 'half'; use 'whole' or 'any'"),
        ("matches_regex", {}, "asks for 'pattern'"),
        ("tagged", {"tags": "think"}, "tags is 'think'; give a list of names"),
        (
            "json_schema",
            {"schema": {"type": "objekt"}},
            r"schema is no JSON Schema: 'objekt' is not valid .* at \$\.type",
        ),
        ("length_window", {"low": 9, "high": 3}, "low is 9 and high is 3"),
        ("length_window", {"high": -1}, "high is -1; give a number of tokens"),
        ("length_window", {"high": 3, "unit": "lines"}, "unit is 'lines'"),
        ("keywords", {"required": "cat"}, "required is 'cat'; give a list of words"),
        ("keywords", {"forbid": ["cat"]}, "'forbid' and .* has no such parameter; did you mean 'forbidden'"),
        (
            "keywords",
            {"ignore_case": "no"},
            r"options\.ignore_case is 'no', and .* takes bool there; write it without quotes",
        ),
        ("tagged", {"opened": "false"}, r"options\.opened is 'false', and .* takes bool"),
        ("math_answer", {}, "asks for 'answer'"),
        ("math_answer", {"seconds": 0}, "seconds is 0; give a number above 0"),
        ("judge", {"url": "localhost:8000", "model": "m"}, "url is 'localhost:8000'; give the root"),
        ("judge", {"url": "http://h/v1", "model": "m", "template": "Rate it."}, r"without \{response\}"),
        ("judge", {"url": "http://h/v1", "model": "m", "low": 5, "high": 5}, "low is 5 and high is 5"),
        ("judge", {"url": "http://h/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"}, "has no such variable"),
        ("judge", {"url": "http://h/v1"}, "asks for 'model'"),
        ("remote_reward", {"url": "http://h"}, "asks for 'reward_model'"),
        ("remote_reward", {"url": "h", "reward_model": "m"}, "url is 'h'; give the root"),
        ("remote_reward", {"url": "http://h", "reward_model": 3}, "reward_model is 3; name the model"),
        ("remote_reward", {"url": "http://h", "reward_model": "no/such"}, "reward_model: 'no/such' cannot be loaded"),
        ("remote_reward", {"url": "http://h", "reward_model": "m", "endpoint": "score"}, "give classify or pooling"),
        ("remote_reward", {"url": "http://h", "reward_model": "m", "max_tokens": 1}, "max_tokens is 1; give"),
    ],
)
def test_wrong_options_are_refused_before_a_run(function, options, told):
    config = R2MConfig().reward(functions={"own": {"function": f"r2m_async.rewards:{function}", "options": options}})
    with pytest.raises(ConfigError, match=rf"^reward\.functions\.own.*{told}"):
        check_functions(config)


@pytest.mark.parametrize(
    ("function", "module"), [("math_answer", "math_verify"), ("json_schema", "jsonschema"), ("judge", "httpx")]
)
def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch, function, module):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else object())
    config = R2MConfig().reward(functions=[f"r2m_async.rewards:{function}"])
    with pytest.raises(ConfigError, match=r"not installed: pip install 'r2m-async\[rewards\]'"):
        check_functions(config)


# A judge on a server


class Reply:
    """An HTTP server that gives every request the same reply, and keeps what it was asked."""

    def __init__(self, status=200, content="", reply=None):
        reply = {"choices": [{"message": {"content": content}}]} if reply is None else reply
        self.asked, reply = [], (reply if isinstance(reply, str) else json.dumps(reply)).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                self.asked.append((handler.path, handler.headers.get("Authorization"), json.loads(body)))
                handler.send_response(status)
                handler.end_headers()
                handler.wfile.write(reply)

            def log_message(handler, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_a_judge_is_told_prompt_and_response_and_its_number_is_the_rating(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with Reply(content="Out of 10 I give it 7.5") as server:
        options = {"url": server.url, "model": "m", "template": "{response}|{prompt}|{low}", "api_key_env": "MY_KEY"}
        turns = [{"role": "user", "content": "{response}?"}]
        assert asyncio.run(judge(turns, "{prompt}!", **options, low=5, body={"seed": 3})) == 0.5
        asyncio.run(judge([{"role": "system", "content": "be kind"}, *turns], "a", url=server.url, model="m"))
    (path, key, body), (_, no_key, conversation) = server.asked
    assert (path, key, no_key) == ("/v1/chat/completions", "Bearer secret", None)
    assert body["messages"] == [{"role": "user", "content": "{prompt}!|{response}?|5"}]
    assert (body["model"], body["temperature"], body["seed"]) == ("m", 0, 3)
    assert "system: be kind\n\nuser: {response}?" in conversation["messages"][0]["content"]


@pytest.mark.parametrize(
    "content", ["8", "8/10", " 8 / 10.", "8 out of 10", "8 Out  of 10!", "**8**", "8, yes: 8.0", "Rating: 8\n"]
)
def test_the_scale_beside_a_rating_is_not_the_rating(content):
    with Reply(content=content) as server:
        assert asyncio.run(judge([{"role": "user", "content": "q"}], "a", url=server.url, model="m")) == 0.8


@pytest.mark.parametrize(
    ("status", "content", "told"),
    [
        (200, "good", "no number"),
        (200, "11", "11 is not between 0 and 10"),
        (200, "8 because it has 3 mistakes", "several numbers"),
        (200, "8/5", "several numbers"),
        (200, "8/100", "several numbers"),
        (200, "7 out of 10.5", "several numbers"),
        (503, "7", "refused: status 503"),
    ],
)
def test_a_judge_without_a_verdict_has_failed(status, content, told):
    with Reply(status, content) as server, pytest.raises(ValueError, match=told):
        asyncio.run(judge([{"role": "user", "content": "q"}], "a", url=server.url, model="m"))


# A reward model on a server


def scored(*rewards):
    return {"data": [{"probs": list(rewards)}]}


@pytest.mark.models
@pytest.mark.parametrize(
    ("status", "reply", "told"),
    [
        (200, scored(0.25, 0.75), "has 2 labels, and a reward model has one"),
        (200, scored(None), "replied None as the reward of the response ' warm', which is no number"),
        (200, scored(), "has 0 labels"),
        (200, {"data": []}, "which has no classifier's numbers"),
        (200, {"object": "list"}, "which has no classifier's numbers"),
        (200, "<html>", "replied no JSON: '<html>'; is it the right URL"),
        (500, "the engine is dead", "refused: status 500, 'the engine is dead'"),
        (422, {"detail": "Field required"}, "refused: status 422, .*Field required"),
    ],
)
def test_a_reply_without_one_number_is_a_failure(tiny, status, reply, told):
    turns, model = [{"role": "user", "content": "the river :"}], tiny("llama", True)
    with Reply(status, reply=reply) as server, pytest.raises(ValueError, match=told):
        asyncio.run(remote_reward("the river :", turns, " warm", True, url=server.url, reward_model=model))


@pytest.mark.models
def test_a_reward_that_is_not_finite_is_passed_on_to_the_check_of_all_functions(tiny):
    turns, model = [{"role": "user", "content": "the river :"}], tiny("llama", True)
    with Reply(reply=scored(math.nan)) as server:
        reward = asyncio.run(remote_reward("the river :", turns, " warm", True, url=server.url, reward_model=model))
    assert math.isnan(reward)
