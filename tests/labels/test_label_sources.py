"""Functions, judges and files as sources of labels: what they are told, what they may say, and how they fail."""

import asyncio
import json
import sys
import threading
from concurrent.futures import CancelledError
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, FunctionFailed
from r2m_async.labels import by_score
from r2m_async.labels.files import FileSource
from r2m_async.labels.judge import pairwise, verdict
from r2m_async.labels.sources import check_source, source_of

TIMEOUT = 60


@pytest.fixture
def source(monkeypatch):
    """`source(function, **options)`: the source that asks this function."""
    made = []

    def make(function, **options):
        monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(better=function))
        made.append(source_of(R2MConfig().labels(source="mine:better", options=options)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def answered(source, questions):
    return [source.ask(question).result(TIMEOUT) for question in questions]


def test_a_function_is_told_what_it_names_and_its_options(source, questions):
    told = []

    def better(first, second, messages, second_finished, first_finished, prompt, mood):
        told.append((first, second, messages, first_finished, second_finished, prompt, mood))
        return "second"

    (answer,) = answered(source(better, mood="kind"), questions(1))
    said = [{"role": "user", "content": "prompt 0"}]
    assert told == [("prompt 0 answer 0", "prompt 0 answer 1", said, False, True, "prompt 0", "kind")]
    assert (answer.preferred, answer.reason, answer.who) == (1, None, "mine:better")


def test_a_function_may_change_what_it_is_given_and_its_options_have_types(source, questions):
    def better(first, second, cases, *, words: list, weight: float = 1.0):
        cases.append(1)
        words.append(1)
        return "first" if len(cases) == len(words) == 1 else "second"

    asked = [replace(one, prompt=replace(one.prompt, columns={"cases": []})) for one in questions(1)] * 2
    assert [one.preferred for one in answered(source(better, words=[]), asked)] == [0, 0]
    with pytest.raises(ConfigError, match=r"labels.options.weight is '2', and mine:better takes float there"):
        source(better, words=[], weight="2")


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("returned", "meant"),
    [("first", (0, None)), ("second", (1, None)), (None, (None, "refused"))]
    + [(reason, (None, reason)) for reason in ("tie", "refused", "disagreed")],
)
def test_what_a_function_may_return(source, questions, is_async, returned, meant):
    async def awaited(first):
        return returned

    (answer,) = answered(source(awaited if is_async else lambda first: returned), questions(1))
    assert (answer.preferred, answer.reason) == meant


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("returned", [0, 1, True, "1", "First", ["first"]])
def test_anything_else_is_a_failure_and_no_guess(source, questions, is_async, returned):
    async def awaited(first):
        return returned

    with pytest.raises(
        FunctionFailed, match=r"responses 0 and 1: labels.source 'mine:better' returned .*must return 'first'"
    ):
        answered(source(awaited if is_async else lambda first: returned), questions(1))


@pytest.mark.parametrize("error", [ZeroDivisionError("why"), SystemExit(3)])
@pytest.mark.parametrize("is_async", [False, True])
def test_what_a_function_raises_is_told_with_its_place_and_the_next_pair_is_asked_about(
    source, questions, is_async, error
):
    def plain(first):
        if first == "prompt 0 answer 0":
            raise error
        return "first"

    async def awaited(first):
        return plain(first)

    asked = source(awaited if is_async else plain)
    failed, fine = [asked.ask(question) for question in questions(2)]
    with pytest.raises(FunctionFailed, match=r"step 7, group 0 \(prompt 'prompt 0'\).*raised .*(why|3)"):
        failed.result(TIMEOUT)
    assert fine.result(TIMEOUT).preferred == 0


@pytest.mark.parametrize("cancel", [lambda: asyncio.current_task().cancel(), lambda: 1 / 0])
def test_a_function_that_cancels_itself_has_failed_and_is_not_given_up_by_the_run(source, questions, cancel):
    async def better(first):
        try:
            cancel()
            await asyncio.sleep(TIMEOUT)
        except ZeroDivisionError:
            raise asyncio.CancelledError from None

    with pytest.raises(FunctionFailed, match="step 7, group 0 .*labels.source 'mine:better' was cancelled by itself"):
        answered(source(better), questions(1))


@pytest.mark.parametrize("is_async", [False, True])
def test_a_value_that_cannot_even_be_shown_fails_its_own_pair_alone(source, questions, is_async):
    class Ends:
        def __repr__(self):
            raise SystemExit

    values = {"prompt 0 answer 0": 10**5000, "prompt 1 answer 0": Ends(), "prompt 2 answer 0": "first"}

    async def awaited(first):
        return values[first]

    asked = source(awaited if is_async else lambda first: values[first])
    *failed, fine = [asked.ask(question) for question in questions(3)]
    for one, kind in zip(failed, ("int", "Ends"), strict=True):
        with pytest.raises(FunctionFailed, match=rf"returned a value that cannot be shown: .*\({kind}\)"):
            one.result(TIMEOUT)
    assert fine.result(TIMEOUT).preferred == 0


def test_a_plain_function_is_called_for_one_pair_after_the_other_and_an_async_one_for_all_at_once(source, questions):
    at_once, most = 0, []

    def plain(first):
        nonlocal at_once
        at_once += 1
        most.append(at_once)
        at_once -= 1
        return "tie"

    answered(source(plain), questions(4))
    assert most == [1, 1, 1, 1]
    together = asyncio.Barrier(4)

    async def awaited(first):
        await together.wait()
        return "tie"

    asked = source(awaited)
    assert {one.result(TIMEOUT).reason for one in [asked.ask(question) for question in questions(4)]} == {"tie"}


def test_a_pair_that_is_given_up_is_not_asked_about(source, questions):
    begun, go, seen = threading.Event(), threading.Event(), []

    def slow(first):
        seen.append(first)
        begun.set()
        go.wait(TIMEOUT)
        return "first"

    asked = source(slow)
    one, other, last = [asked.ask(question) for question in questions(3)]
    begun.wait(TIMEOUT)
    assert other.cancel()
    go.set()
    assert one.result(TIMEOUT).preferred == last.result(TIMEOUT).preferred == 0
    assert seen == ["prompt 0 answer 0", "prompt 2 answer 0"]


def test_scores_are_compared_and_what_cannot_be_compared_fails(monkeypatch, source, questions):
    scores = {"a": 1, "b": 2.5, "c": float("nan"), "d": "five"}
    monkeypatch.setitem(
        sys.modules, "gold", SimpleNamespace(gold=lambda prompt, said, finished: scores[said] - 9 * (not finished))
    )
    compare = lambda first, second, finished=True: by_score("p", first, second, True, finished, "gold:gold")  # noqa: E731
    assert [compare("a", "b"), compare("b", "a"), compare("a", "a")] == ["second", "first", "tie"]
    assert compare("a", "b", finished=False) == "first"
    with pytest.raises(FunctionFailed, match="the second response: labels.options.score 'gold:gold' returned nan"):
        compare("a", "c")
    with pytest.raises(FunctionFailed, match="the first response: labels.options.score 'gold:gold' raised TypeError"):
        compare("d", "a")


# A judge on a server


class Judge:
    """An HTTP server that replies to a comparison by what `says(left, right)` returns."""

    def __init__(self, says, status=200):
        self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                self.asked.append(body)
                left, right = body["messages"][0]["content"].split("|")[-2:]
                reply = json.dumps({"choices": [{"message": {"content": says(left, right)}}]}).encode()
                handler.send_response(status)
                handler.send_header("Content-Length", str(len(reply)))
                handler.end_headers()
                handler.wfile.write(reply)

            def log_message(handler, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.options = {
            "url": f"http://127.0.0.1:{self.server.server_port}/v1",
            "model": "m",
            "template": "{prompt}|{first}|{second}",
        }

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize(
    ("says", "meant"),
    [
        (lambda left, right: "A" if left == "good" else "B", "first"),
        (lambda left, right: "B" if left == "good" else "A", "second"),
        (lambda left, right: "TIE", "tie"),
        (lambda left, right: "A", "disagreed"),
        (lambda left, right: "A" if left == "good" else "TIE", "disagreed"),
        (lambda left, right: "I will not judge people." if left == "good" else "B", "refused"),
    ],
)
def test_a_judge_prefers_what_it_names_in_both_orders(says, meant):
    with Judge(says) as server:
        turns = [{"role": "user", "content": "{first}?"}]
        assert asyncio.run(pairwise(turns, "good", "bad", **server.options, body={"seed": 3})) == meant
    told = sorted(body["messages"][0]["content"] for body in server.asked)
    assert told == ["{first}?|bad|good", "{first}?|good|bad"]
    assert all((body["model"], body["temperature"], body["seed"]) == ("m", 0, 3) for body in server.asked)


@pytest.mark.parametrize(
    ("reply", "meant"),
    [
        *[(reply, "first") for reply in ("A", " a.\n", "[[A]]", "Answer A", "**Response A**", "(A)")],
        *[(reply, "second") for reply in ("B", "answer B!")],
        *[(reply, "tie") for reply in ("TIE", "Tie.")],
        *[(reply, None) for reply in ("", "A tie", "A or B", "C", "A is better", "Both A and B", "Apple", "neither")],
    ],
)
def test_a_reply_is_a_verdict_only_if_it_says_nothing_else(reply, meant):
    assert verdict(reply) == meant


def test_the_source_judge_says_who_it_is_and_fails_if_the_server_refuses(questions):
    says = lambda left, right: "A" if left.endswith("1") else "B"  # noqa: E731
    with Judge(says) as server:
        judge = source_of(R2MConfig().labels(source="judge", options=server.options))
        (answer,) = answered(judge, questions(1))
        assert (answer.preferred, answer.who) == (1, "judge:m")
    with Judge(says, status=503) as server:
        judge = source_of(R2MConfig().labels(source="judge", options=server.options))
        with pytest.raises(FunctionFailed, match="labels.source 'judge' raised ValueError: .*refused: status 503"):
            answered(judge, questions(1))


# Files


@pytest.fixture
def files(tmp_path):
    made = []

    def make(every=3600.0):
        made.append(FileSource(str(tmp_path / "questions.jsonl"), str(tmp_path / "answers.jsonl"), every=every))
        return made[-1]

    yield make
    for one in made:
        one.close()


def written(path, *lines):
    with path.open("a") as file:
        file.write("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def test_pairs_are_written_to_a_file_and_labels_read_from_another_line_by_line(files, tmp_path, questions):
    source, answers = files(), tmp_path / "answers.jsonl"
    asked = questions(3)
    waiting = [source.ask(question) for question in asked]
    told = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert [(one["prompt"], one["first"], one["second_finished"]) for one in told] == [
        (f"prompt {index}", f"prompt {index} answer 0", True) for index in range(3)
    ]
    names = [one["name"] for one in told]
    written(answers, {"name": names[1], "answer": "second", "who": "anna"}, "\n", f'{{"name": "{names[0]}", "answer": ')
    source.look()
    assert waiting[1].result(0).who == "file:anna" and not waiting[0].done(), "a line that is being written"
    written(answers, '"tie"}\n', {"name": names[2], "answer": "refused"})
    source.look()
    assert [one.result(0).reason for one in waiting] == ["tie", None, "refused"]


def test_a_line_that_is_no_label_is_told_and_one_of_no_choice_fails_its_own_pair(files, tmp_path, questions, caplog):
    source, (question,) = files(), questions(1)
    waiting = source.ask(question)
    written(tmp_path / "answers.jsonl", "better\n", "[1]\n", {"name": "9-9-0-1-ff", "answer": "first"})
    source.look()
    assert not waiting.done()
    assert [record.getMessage().split(": ")[0][-2:] for record in caplog.records] == [":1", ":2"]
    written(tmp_path / "answers.jsonl", {"name": question.name, "answer": ["first"]})
    source.look()
    with pytest.raises(FunctionFailed, match=r"answers.jsonl:4: has answer \['first'\]; write one of first, second"):
        waiting.result(0)


def test_a_label_counts_for_a_resumed_run_and_never_for_other_texts(files, tmp_path, questions):
    first, (question,) = files(), questions(1)
    first.ask(question)
    written(tmp_path / "answers.jsonl", {"name": question.name, "answer": "first"})
    again = files()
    assert again.ask(question).result(0).preferred == 0
    other = replace(question, responses=question.responses[::-1])
    assert other.name != question.name and not again.ask(other).done()


@pytest.mark.parametrize("how", ["in place", "another file"])
def test_a_file_of_labels_that_is_written_anew_is_read_from_its_beginning_also_if_it_is_longer(
    files, tmp_path, questions, how
):
    source, answers, asked = files(), tmp_path / "answers.jsonl", questions(3)
    waiting = [source.ask(question) for question in asked]
    written(answers, {"name": asked[0].name, "answer": "first"})
    source.look()
    if how == "another file":
        answers.rename(tmp_path / "answers.jsonl.1")
    else:
        answers.write_text("")
    written(answers, *({"name": question.name, "answer": "second"} for question in asked[1:]))
    source.look()
    assert [one.result(0).preferred for one in waiting] == [0, 1, 1]
    source.look()
    written(answers, {"name": "no such pair", "answer": "first"})
    source.look()
    assert source._read_lines == 3


def test_labels_that_cannot_be_read_for_a_while_are_told_once_and_read_when_they_can(
    files, tmp_path, questions, caplog
):
    (question,) = questions(1)
    (tmp_path / "answers.jsonl").mkdir()
    source = files(every=0.01)
    waiting = source.ask(question)
    for _ in range(3):
        source.look()
    assert caplog.text.count("which cannot be read: Is a directory") == 1
    (tmp_path / "answers.jsonl").rmdir()
    written(tmp_path / "answers.jsonl", {"name": question.name, "answer": "first"})
    assert waiting.result(TIMEOUT).preferred == 0, "the watch goes on"


def test_a_resumed_run_does_not_write_a_pair_twice_and_what_a_kill_cut_off_is_written_again(files, tmp_path, questions):
    asked, file = questions(2), tmp_path / "questions.jsonl"
    for question in asked:
        files().ask(question)
    whole = file.read_text()
    file.write_text(whole[:-20])
    again = files()
    for question in asked:
        again.ask(question)
    assert file.read_text() == whole


def test_nobody_hears_of_a_label_that_is_no_longer_wanted(files, tmp_path, questions):
    source, (question,) = files(), questions(1)
    waiting = source.ask(question)
    assert waiting.cancel()
    written(tmp_path / "answers.jsonl", {"name": question.name, "answer": "first"})
    source.look()
    with pytest.raises(CancelledError):
        waiting.result(0)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("judge", {"url": "localhost", "model": "m"}, "url is 'localhost'; give the root"),
        ("judge", {"url": "http://h/v1", "model": "m", "template": "{first}"}, r"must have \{first\} and \{second\}"),
        ("judge", {"url": "http://h/v1", "model": "m", "modle": 1}, "has no such parameter; did you mean 'model'?"),
        ("people", {"port": "any"}, "port is 'any'; give a port"),
        ("people", {"token_env": "NO_SUCH_TOKEN"}, "has no such variable"),
        ("people", {"prot": 1}, "unexpected keyword argument 'prot'"),
        ("file", {"questions": "q.jsonl"}, "answers is None; give the path"),
        ("file", {"questions": "q.jsonl", "answers": "q.jsonl"}, "are both 'q.jsonl'"),
        ("file", {"questions": "q.jsonl", "answers": "./q.jsonl"}, "are both 'q.jsonl'"),
        ("file", {"questions": "q.jsonl", "answers": "/"}, "answers is '/', which is a folder"),
        ("file", {"questions": "q.jsonl", "answers": "a.jsonl", "every": 1e10}, "every is 10000000000.0; give seconds"),
        ("file", {"questions": "no/such/q.jsonl", "answers": "a.jsonl"}, "there is no folder 'no/such'"),
    ],
)
def test_wrong_options_of_a_source_are_refused_before_the_run(source, options, message):
    with pytest.raises(ConfigError, match=message):
        check_source(R2MConfig().labels(source=source, options=options))
