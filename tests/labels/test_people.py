"""The page on which people choose: by requests, and in a headless Chromium by mouse and by keys."""

import asyncio
import json
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import pytest

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.labels import people
from r2m_async.labels.people import PeopleSource
from r2m_async.labels.sources import source_of

TIMEOUT = 60


@pytest.fixture
def page():
    source = PeopleSource()
    yield source
    source.close()


def token_of(page):
    return parse_qs(urlsplit(page.url).query)["token"][0]


def request(page, path, body=None, token=None, headers=None):
    """(status, content): what the page answers, JSON read."""
    address = page.url.split("?")[0].rstrip("/") + path
    headers = {"X-Token": token_of(page) if token is None else token} | (headers or {})
    asked = urllib.request.Request(address, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(asked, timeout=TIMEOUT) as answer:
            content = answer.read().decode()
            return answer.status, json.loads(content) if "json" in answer.headers["Content-Type"] else content
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def pair_for(page, who):
    return request(page, f"/pair?who={who}")[1]["pair"]


def choose(page, name, choice, who="anna"):
    return request(page, "/answer", {"name": name, "choice": choice, "who": who})


@pytest.mark.parametrize(
    ("choice", "meant"),
    [("first", (0, None)), ("second", (1, None)), ("tie", (None, "tie")), ("refused", (None, "refused"))],
)
def test_a_choice_is_the_label_and_says_who_chose(page, questions, choice, meant):
    (question,) = questions(1)
    waiting = page.ask(question)
    shown = pair_for(page, "anna")
    assert shown["prompt"] == [{"role": "user", "content": "prompt 0"}]
    assert shown["answers"] == [
        {"text": "prompt 0 answer 0", "cut": True},
        {"text": "prompt 0 answer 1", "cut": False},
    ]
    assert choose(page, shown["name"], choice) == (200, {})
    answer = waiting.result(TIMEOUT)
    assert (answer.preferred, answer.reason, answer.who) == (*meant, "people:anna")
    assert request(page, "/pair?who=anna")[1] == {
        "ask": "Which answer is better?",
        "pair": None,
        "open": 0,
        "answered": 1,
    }


def test_a_person_keeps_a_pair_and_others_get_others(page, questions):
    for question in questions(2):
        page.ask(question)
    anna, bert = pair_for(page, "anna"), pair_for(page, "bert")
    assert anna["name"] != bert["name"]
    assert pair_for(page, "anna") == anna and pair_for(page, "bert") == bert
    assert choose(page, anna["name"], "first")[0] == 200
    assert pair_for(page, "anna") == bert, "there is no other"


def test_a_pair_is_answered_once_and_not_after_it_was_given_up(page, questions):
    one, other = questions(2)
    waiting, given_up = page.ask(one), page.ask(other)
    assert choose(page, one.name, "first", "anna")[0] == 200
    assert choose(page, one.name, "second", "bert") == (409, {"error": "this pair is no longer asked about"})
    assert waiting.result(0).who == "people:anna"
    given_up.cancel()
    assert choose(page, other.name, "first")[0] == 409
    assert pair_for(page, "anna") is None


def test_without_the_token_nothing_is_shown_and_nothing_taken(page, questions):
    (question,) = questions(1)
    waiting = page.ask(question)
    for token in ("", "wrong", token_of(page)[:-1], "\u00e9"):
        headers = {"X-Token": token.encode("utf-8").decode("latin-1")}
        assert request(page, "/pair?who=anna", headers=headers)[0] == 403
        assert request(page, "/", headers=headers)[0] == 403
        body = {"name": question.name, "choice": "first", "who": "anna"}
        assert request(page, "/answer", body, headers=headers)[0] == 403
    # A form of another page may post to an address with a token, but sets no header.
    assert request(page, f"/answer?token={token_of(page)}", body, token="")[0] == 403
    assert not waiting.done()
    assert "127.0.0.1" in page.url and len(token_of(page)) > 20


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"name": 1},
        {"name": "n", "choice": "first", "who": "x" * 5000},
        {"name": "n", "choice": "best", "who": "x"},
    ],
)
def test_a_request_that_is_no_answer_is_refused(page, body):
    status, content = request(page, "/answer", body)
    assert status in (400, 409) and content["error"]
    assert request(page, "/nothing")[0] == 404


@pytest.mark.parametrize(
    ("line", "header"),
    [
        ("GET http://[ HTTP/1.1", ""),
        ("POST /answer HTTP/1.1", "Content-Length: \xb2"),
        ("POST /answer HTTP/1.1", f"Content-Length: {'9' * 5000}"),
    ],
)
def test_a_request_that_cannot_be_read_is_refused_without_a_traceback(page, capfd, line, header):
    with socket.create_connection(("127.0.0.1", urlsplit(page.url).port), TIMEOUT) as connection:
        connection.sendall(f"{line}\r\nX-Token: {token_of(page)}\r\n{header}\r\n\r\n".encode("latin-1"))
        assert connection.makefile().readline().split()[1] == "400"
    assert not capfd.readouterr().err


def test_a_browser_that_leaves_before_its_answer_leaves_no_traceback(page, capfd, monkeypatch):
    failed = threading.Event()
    monkeypatch.setattr(page, "shown_to", lambda who: (_ for _ in ()).throw(ConnectionResetError()))
    monkeypatch.setattr(people.log, "info", lambda *_: failed.set())
    with pytest.raises(ConnectionError):
        request(page, "/pair?who=anna")
    assert failed.wait(TIMEOUT) and not capfd.readouterr().err


def test_a_name_is_written_down_without_what_cannot_be_seen(page, questions):
    (question,) = questions(1)
    waiting = page.ask(question)
    choose(page, question.name, "tie", " anna\x00\n ")
    assert waiting.result(0).who == "people:anna"


def test_the_source_people_serves_what_the_config_says_and_a_port_that_is_taken_is_told(monkeypatch, page):
    monkeypatch.setenv("MY_TOKEN", "sesame")
    options = {"token_env": "MY_TOKEN", "ask": "Which is kinder?"}
    source = source_of(R2MConfig().labels(source="people", options=options))
    try:
        assert source.url.endswith("/?token=sesame")
        assert request(source, "/pair?who=anna")[1]["ask"] == "Which is kinder?"
    finally:
        source.close()
    port = urlsplit(page.url).port
    with pytest.raises(ConfigError, match=f"port {port}, and no page can be served there: Address already in use"):
        PeopleSource(port=port)
    with pytest.raises(ConfigError, match="host 'a..b' and port 0, and no page can be served there"):
        PeopleSource(host="a..b")


class Browser:
    """A headless Chromium with the page open, driven over its debugging port."""

    def __init__(self, process, socket):
        self.process, self.socket, self.number = process, socket, 0

    async def send(self, method, **arguments):
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": arguments})
        while (answer := await self.socket.receive_json(timeout=TIMEOUT)).get("id") != self.number:
            pass
        return answer["result"]

    async def value(self, expression):
        return (await self.send("Runtime.evaluate", expression=expression))["result"].get("value")

    async def until(self, expression):
        async with asyncio.timeout(TIMEOUT):
            while not (value := await self.value(expression)):
                await asyncio.sleep(0.02)
            return value

    async def press(self, key):
        text = {"text": key} if len(key) == 1 else {}
        await self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        await self.send("Input.dispatchKeyEvent", type="keyUp", key=key)


async def in_chromium(url, folder, work):
    """Opens a page in Chromium, and does `work(browser)` with it."""
    import aiohttp

    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
    ]
    process = subprocess.Popen(["chromium", *options, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = folder / "DevToolsActivePort"
        async with asyncio.timeout(TIMEOUT), aiohttp.ClientSession() as session:
            while not port_file.exists() or "\n" not in port_file.read_text():
                await asyncio.sleep(0.05)
            port = port_file.read_text().splitlines()[0]
            while True:
                tabs = await (await session.get(f"http://127.0.0.1:{port}/json/list")).json()
                if found := [tab for tab in tabs if tab["type"] == "page" and tab["url"] == url]:
                    break
                await asyncio.sleep(0.05)
            async with session.ws_connect(found[0]["webSocketDebuggerUrl"]) as socket:
                await work(Browser(process, socket))
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_in_a_browser_a_pair_is_shown_as_text_and_answered_by_mouse_and_by_keys(page, questions, tmp_path):
    asked = questions(6)
    marked = "<b id=bad>bold</b>"
    asked[0] = replace(asked[0], responses=(replace(asked[0].responses[0], text=marked), asked[0].responses[1]))
    waiting = [page.ask(question) for question in asked]

    async def work(browser):
        await browser.until("!document.getElementById('pair').hidden")
        texts = "[...document.querySelectorAll('.answer p')].map(p => p.textContent).join('|')"
        await browser.until(f"{texts} === '{marked}|prompt 0 answer 1'")
        assert await browser.value("document.getElementById('bad') === null"), "text, and no element"
        await browser.press("1")
        for index, press in enumerate(["ArrowRight", "0", "s", "ArrowLeft"], 1):
            await browser.until(f"{texts} === 'prompt {index} answer 0|prompt {index} answer 1'")
            await browser.press(press)
        await browser.until(f"{texts} === 'prompt 5 answer 0|prompt 5 answer 1'")
        await browser.value("document.querySelectorAll('.answer')[1].click()")
        await browser.until("document.getElementById('pair').hidden && document.getElementById('told').textContent")

    asyncio.run(in_chromium(page.url, tmp_path, work))
    answers = [one.result(TIMEOUT) for one in waiting]
    assert [one.preferred for one in answers] == [0, 1, None, None, 0, 1]
    assert [one.reason for one in answers] == [None, None, "tie", "refused", None, None]
