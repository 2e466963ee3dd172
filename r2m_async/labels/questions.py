"""What a source of labels is asked, and what it answers."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

from r2m_async.trajectories import Label, Prompt, Trajectory

REASONS = ("tie", "refused", "disagreed")
"""The answers that are no preference: both are as good, the labeller does not say, and two orders gave two answers."""
CHOICES: dict[str, tuple[int | None, str | None]] = {
    "first": (0, None),
    "second": (1, None),
    "tie": (None, "tie"),
    "refused": (None, "refused"),
}
"""What a person may answer: the preferred response, and the reason if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Two responses to one prompt, as they are shown to whoever gives the label."""

    label: Label
    """The label that is asked for. It says which pair this is."""
    prompt: Prompt
    responses: tuple[Trajectory, Trajectory]
    """The first and the second response, in the order of `label.pair`."""

    @property
    def name(self) -> str:
        """A name that no other question has, of this run or another: step, group, responses, and a digest of the texts."""
        digest = hashlib.blake2b(digest_size=8)
        for text in (self.prompt.text, *(response.text for response in self.responses)):
            digest.update(len(text).to_bytes(8, "little") + text.encode())
        return "-".join(map(str, (self.label.step, *self.label.key, digest.hexdigest())))

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as turns. Raw text is one turn of the user."""
        content = self.prompt.content
        turns = (("user", content),) if isinstance(content, str) else content
        return [{"role": role, "content": said} for role, said in turns]

    @property
    def place(self) -> str:
        """The name of the pair in messages."""
        first, second = self.label.pair
        prompt = f" (prompt {self.prompt.prompt_id!r})" if self.prompt.prompt_id else ""
        return f"step {self.label.step}, group {self.label.group_id}{prompt}, responses {first} and {second}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a source says to a question."""

    preferred: int | None
    """0 for the response that was shown first, 1 for the second. None: no preference, for `reason`."""
    reason: str | None = None
    """One of `REASONS` if there is no preference."""
    who: str

    def of(self, label: Label) -> Label:
        """The label that was asked for, with this answer."""
        chosen = None if self.preferred is None else label.pair[self.preferred]
        return replace(label, chosen=chosen, reason=self.reason, who=self.who)


class Source(Protocol):
    """Whoever gives labels. All methods may be called from any thread."""

    def ask(self, question: Question) -> Future[Answer]:
        """Begins to ask, and returns at once. The result raises FunctionFailed if the source fails.

        Whoever no longer wants an answer cancels the result.
        """

    def close(self) -> None:
        """Ends what the source has started. What is asked is answered no more."""
