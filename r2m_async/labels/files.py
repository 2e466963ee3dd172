"""`file`: labels that somebody else writes, pair by pair, into a file.

    questions   a line for each pair: name, prompt, first, second, and whether each response was finished
    answers     a line for each label: {"name": ..., "answer": "first", "who": "anna"}

An answer is `first`, `second`, `tie` or `refused`. The name of a pair says its step, group and responses, and has a digest
of the texts. So an answer counts whenever it comes, before a resumed run has asked again, too, and never for another run.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any

from r2m_async.errors import ConfigError, FunctionFailed
from r2m_async.labels.questions import CHOICES, Answer, Question
from r2m_async.whole import append_lines, cut_partial_line

log = logging.getLogger(__name__)

_KNOWN_BYTES = 4096
"""How many bytes of what was read are compared to see whether the file is still the same."""
_LONGEST_EVERY = 3600.0


class FileSource:
    """Writes pairs to one file, and reads labels from another as they come."""

    def __init__(self, questions: str, answers: str, every: float = 1.0) -> None:
        """Begins to watch.

        Args:
            questions: the file to which pairs are appended. A pair that it has already, from before the run was resumed, is
                not written again.
            answers: the file to which somebody appends labels. It need not be there yet.
            every: seconds between two looks.

        Raises DiskError if the questions cannot be written.
        """
        self._questions, self._answers, self._every = Path(questions), Path(answers), every
        cut_partial_line(self._questions)
        self._written = {_name(said) for line in self._questions.read_bytes().splitlines() if (said := _record(line))}
        """The names of the pairs that the questions have."""
        self._read_bytes = self._read_lines = 0
        self._known = (0, b"")
        """Of the answers as they were read: the number of the file on its disk, and the last bytes."""
        self._trouble = ""
        """Why the answers could not be read at the last look. Empty: they could."""
        self._given: dict[str, Answer | FunctionFailed] = {}
        self._open: dict[str, Future[Answer]] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        threading.Thread(target=self._watch, name="labels-file", daemon=True).start()

    def ask(self, question: Question) -> Future[Answer]:
        """Writes a pair, and returns its label as soon as it is in the file. Raises DiskError if it cannot be written."""
        first, second = question.responses
        content = question.prompt.content
        told = {
            "name": question.name,
            "prompt": content if isinstance(content, str) else question.messages,
            "first": first.text,
            "second": second.text,
            "first_finished": first.finish_reason == "stop",
            "second_finished": second.finish_reason == "stop",
        }
        if question.name not in self._written:
            append_lines(self._questions, json.dumps(told) + "\n")
            self._written.add(question.name)
        answer: Future[Answer] = Future()
        with self._lock:
            self._open[question.name] = answer
        self.look()
        return answer

    def close(self) -> None:
        """Ends the watch."""
        self._ended.set()

    def _watch(self) -> None:
        """Looks again and again."""
        while not self._ended.wait(self._every):
            self.look()

    def look(self) -> None:
        """Takes the lines that have come since the last look. A line without an end is still being written."""
        with self._lock:
            for number, line in self._new_lines():
                self._take(f"{self._answers}:{number}", line)
            for name in self._open.keys() & self._given.keys():
                answer, given = self._open.pop(name), self._given[name]
                try:
                    answer.set_exception(given) if isinstance(given, FunctionFailed) else answer.set_result(given)
                except InvalidStateError:
                    pass  # nobody wants it any more
            self._open = {name: answer for name, answer in self._open.items() if not answer.cancelled()}

    def _new_lines(self) -> list[tuple[int, bytes]]:
        """The new lines of the answers, with their numbers. Another file in the place of the last is read from its beginning.

        What keeps the file from being read may pass, as on a shared disk. So it is told in the log, and the next look
        tries again.
        """
        trouble, lines = "", list[tuple[int, bytes]]()
        try:
            lines = self._read()
        except FileNotFoundError:
            pass
        except OSError as error:
            trouble = (
                f"labels are read from {self._answers} (labels.options.answers), which cannot be read: {error.strerror}"
            )
        if trouble and trouble != self._trouble:
            log.warning("%s; mend that: the run reads them then", trouble)
        self._trouble = trouble
        return lines

    def _read(self) -> list[tuple[int, bytes]]:
        """Does what `_new_lines` does, and raises OSError."""
        with self._answers.open("rb") as file:
            number, known = self._known
            # A program that turns the file over, or an editor, puts another file there, perhaps a longer one.
            file.seek(max(0, self._read_bytes - len(known)))
            if os.fstat(file.fileno()).st_ino != number or file.read(len(known)) != known:
                self._read_bytes = self._read_lines = 0
                known = b""
                file.seek(0)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._known = os.fstat(file.fileno()).st_ino, (known + whole)[-_KNOWN_BYTES:]
        first = self._read_lines + 1
        lines = whole.splitlines()
        self._read_bytes += len(whole)
        self._read_lines += len(lines)
        return list(enumerate(lines, first))

    def _take(self, place: str, line: bytes) -> None:
        """Takes one line. A line that is no label is told in the log, or fails the label that it names."""
        if not line.strip():
            return
        if (said := _record(line)) is None:
            log.warning('%s: is no label; write {"name": ..., "answer": "first"}', place)
            return
        name, answer = _name(said), said.get("answer")
        if not isinstance(answer, str) or answer not in CHOICES:
            choices = ", ".join(CHOICES)
            self._given[name] = FunctionFailed(f"{place}: has answer {answer!r}; write one of {choices}")
            return
        preferred, reason = CHOICES[answer]
        self._given[name] = Answer(preferred=preferred, reason=reason, who=f"file:{said.get('who', '?')}")


def _record(line: bytes) -> dict[str, Any] | None:
    """The object in a line, or None if it is none with a name."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) and "name" in said else None


def _name(record: dict[str, Any]) -> str:
    return str(record["name"])


def check_files(questions: object = None, answers: object = None, every: object = 1.0) -> None:
    """Raises ConfigError unless these files can be used."""
    paths = []
    for key, path in (("questions", questions), ("answers", answers)):
        if not (isinstance(path, str) and path):
            raise ConfigError(f"{key} is {path!r}; give the path of a JSONL file")
        if not Path(path).parent.is_dir():
            raise ConfigError(f"{key} is {path!r}, and there is no folder {str(Path(path).parent)!r}; make it")
        if Path(path).is_dir():
            raise ConfigError(f"{key} is {path!r}, which is a folder; give the path of a JSONL file")
        paths.append(Path(path).resolve())
    if paths[0] == paths[1]:
        raise ConfigError(f"questions and answers are both {questions!r}; give two files")
    if isinstance(every, bool) or not isinstance(every, int | float) or not 0 < every <= _LONGEST_EVERY:
        raise ConfigError(f"every is {every!r}; give seconds, above 0 and at most {_LONGEST_EVERY:g}")
