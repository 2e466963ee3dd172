"""`people`: a web page on which people choose between two responses, side by side, by mouse or by keys.

The page is served by this process, to this machine alone unless `host` says otherwise. Its address has a token, without
which nothing is shown and nothing is taken. A person keeps a pair until it is answered or no longer asked about, and
several people get different pairs.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import secrets
import sys
import threading
import time
from concurrent.futures import Future, InvalidStateError
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from r2m_async.errors import ConfigError
from r2m_async.labels.questions import CHOICES, Answer, Question

log = logging.getLogger(__name__)

_LONGEST_BODY = 4096
_LONGEST_NAME = 64
_POLL = 0.05
"""Seconds until the server of the page sees that it is to end."""
_PAGE = Path(__file__).with_name("people.html")


class PeopleSource:
    """Asks people. `url` is the address of the page."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, token_env: str | None = None, ask: str = "") -> None:
        """Begins to serve the page, and says in the log where.

        Args:
            host: the address of this machine on which the page is served. `127.0.0.1`: for this machine alone.
            port: the port. 0: one that is free.
            token_env: the name of the environment variable that holds the token. None: a new one at every start.
            ask: what people are asked, above the pair. Empty: which answer is better.

        Raises ConfigError if the port cannot be used.
        """
        self._token = os.environ[token_env] if token_env else secrets.token_urlsafe(16)
        self._ask = ask or "Which answer is better?"
        self._open: dict[str, tuple[Question, Future[Answer]]] = {}
        """The pairs that are not answered, by name, the oldest first."""
        self._held: dict[str, tuple[str, float]] = {}
        """For each person, the pair that is shown, and when it was last asked for."""
        self._num_answered = 0
        self._lock = threading.Lock()
        try:
            self._server = _Server((host, port), _handler_of(self))
        except (OSError, UnicodeError) as error:  # the latter for a host that can be no name
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"labels.options has host {host!r} and port {port}, and no page can be served there: {why}; use another port, "
                f"or 0 for one that is free"
            ) from None
        self.url = f"http://{host}:{self._server.server_port}/?token={self._token}"
        threading.Thread(target=self._server.serve_forever, args=(_POLL,), name="labels-page", daemon=True).start()
        log.warning("labels are given at %s", self.url)

    def ask(self, question: Question) -> Future[Answer]:
        """Shows a pair on the page until somebody has answered it, or until the result is cancelled."""
        answer: Future[Answer] = Future()
        with self._lock:
            self._open[question.name] = question, answer
        return answer

    def close(self) -> None:
        """Ends the page."""
        self._server.shutdown()
        self._server.server_close()

    # What the page asks for

    def admits(self, token: str) -> bool:
        """Whether this is the token."""
        return hmac.compare_digest(token.encode(), self._token.encode())

    def shown_to(self, who: str) -> dict[str, Any]:
        """Returns what the page shows to a person: `pair`, which is None if there is none, and two counts."""
        with self._lock:
            self._open = {name: one for name, one in self._open.items() if not one[1].done()}
            name = self._next_for(who)
            pair = None if name is None else _told(self._open[name][0])
            return {"ask": self._ask, "pair": pair, "open": len(self._open), "answered": self._num_answered}

    def _next_for(self, who: str) -> str | None:
        """The pair that a person sees next: the one that is shown already, or else the one that was shown longest ago."""
        held, _ = self._held.get(who, (None, 0.0))
        if held not in self._open:
            shown = dict(self._held.values())
            held = min(self._open, key=lambda name: shown.get(name, 0.0), default=None)
        if held is not None:
            self._held[who] = held, time.monotonic()
        return held

    def answered(self, name: str, choice: str, who: str) -> str | None:
        """Takes a person's answer. Returns None, or why it cannot be taken, in words for the page."""
        if choice not in CHOICES:
            return f"there is no answer {choice!r}"
        preferred, reason = CHOICES[choice]
        with self._lock:
            self._held.pop(who, None)
            _, answer = self._open.pop(name, (None, None))
            try:
                if answer is not None:
                    answer.set_result(Answer(preferred=preferred, reason=reason, who=f"people:{who}"))
                    self._num_answered += 1
                    return None
            except InvalidStateError:  # it was cancelled at this moment
                pass
        return "this pair is no longer asked about"


def check_people(host: object = "127.0.0.1", port: object = 0, token_env: object = None, ask: object = "") -> None:
    """Raises ConfigError unless a page can be made with these options."""
    if not (isinstance(host, str) and host):
        raise ConfigError(f"host is {host!r}; give an address of this machine, such as 127.0.0.1")
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 2**16:
        raise ConfigError(f"port is {port!r}; give a port, or 0 for one that is free")
    if token_env is not None and not os.environ.get(str(token_env)):
        raise ConfigError(f"token_env is {token_env!r}, and the environment has no such variable; set it")
    if not isinstance(ask, str):
        raise ConfigError(f"ask is {ask!r}; give a text")


def _told(question: Question) -> dict[str, Any]:
    """A pair as the page shows it."""
    return {
        "name": question.name,
        "prompt": question.messages,
        "answers": [
            {"text": response.text, "cut": response.finish_reason != "stop"} for response in question.responses
        ],
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says in a line of the log what a request ended with, such as a browser that left. Nothing else comes of it."""
        log.info("a request to the page of labels from %s failed: %r", client_address[0], sys.exception())


def _handler_of(source: PeopleSource) -> type[BaseHTTPRequestHandler]:
    """Returns the class that answers the requests to the page of a source."""

    class Handler(BaseHTTPRequestHandler):
        """Answers one request."""

        protocol_version = "HTTP/1.1"
        timeout = 30  # seconds in which a request must be sent; it holds a thread until then

        def do_GET(self) -> None:
            """Sends the page, or the pair that a person sees next."""
            try:
                parts = urlsplit(self.path)
            except ValueError:
                return self._refuse(HTTPStatus.BAD_REQUEST, "the address cannot be read")
            asked = {key: values[0] for key, values in parse_qs(parts.query).items()}
            if not source.admits(self.headers.get("X-Token") or asked.get("token", "")):
                return self._refuse(HTTPStatus.FORBIDDEN, "the address lacks the token that the run has shown")
            if parts.path == "/":
                nonce = secrets.token_urlsafe(16)
                page = _PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
                return self._send(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8", nonce)
            if parts.path == "/pair":
                return self._send_json(HTTPStatus.OK, source.shown_to(_named(asked.get("who", ""))))
            return self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

        def do_POST(self) -> None:
            """Takes an answer."""
            # The header, and not the address: no form of another page can set it.
            if not source.admits(self.headers.get("X-Token", "")):
                return self._refuse(HTTPStatus.FORBIDDEN, "the token is missing")
            length = self.headers.get("Content-Length", "")
            if not re.fullmatch("[0-9]{1,4}", length) or int(length) > _LONGEST_BODY:
                return self._refuse(HTTPStatus.BAD_REQUEST, "the request is too long")
            try:
                said = json.loads(self.rfile.read(int(length)))
                name, choice, who = (str(said[key]) for key in ("name", "choice", "who"))
            except (ValueError, TypeError, KeyError, RecursionError):
                return self._refuse(HTTPStatus.BAD_REQUEST, "the request cannot be read")
            if why := source.answered(name, choice, _named(who)):
                return self._refuse(HTTPStatus.CONFLICT, why)
            return self._send_json(HTTPStatus.OK, {})

        def _refuse(self, status: HTTPStatus, why: str) -> None:
            self.close_connection = True  # what it may have sent besides is not read
            self._send_json(status, {"error": why})

        def _send_json(self, status: HTTPStatus, content: Any) -> None:
            self._send(status, json.dumps(content).encode(), "application/json", "")

        def _send(self, status: HTTPStatus, body: bytes, kind: str, nonce: str) -> None:
            self.send_response(status)
            headers = {
                "Content-Type": kind,
                "Content-Length": str(len(body)),
                "Cache-Control": "no-store",
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
                "Content-Security-Policy": f"default-src 'none'; connect-src 'self'; style-src 'nonce-{nonce}'; "
                f"script-src 'nonce-{nonce}'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
            }
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing: the address in a request has the token."""

    return Handler


def _named(who: str) -> str:
    """A person's name as it is written down."""
    name = "".join(character for character in who if character.isprintable()).strip()
    return name[:_LONGEST_NAME] or "somebody"
