"""The tokens of one response, as a policy and an environment write them in turns.

Shapes: S prompt + response tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from r2m_async.data.prompts import prompt_text
from r2m_async.data.special_tokens import content_place, ids_after, parts, spells_special_tokens
from r2m_async.models.tokens import ResponseText
from r2m_async.trajectories import Prompt, Trajectory

_MARK = "R2MTURN"
"""Stands for the policy's turn where a chat template is asked what it writes after it."""


class Conversation:
    """A prompt and the response to it so far, token by token. Only one thread at a time may change it."""

    def __init__(self, prompt: Prompt, tokenizer: Any, ends: Collection[int]) -> None:
        """Begins with the prompt alone.

        Args:
            prompt: the prompt, with its tokens.
            tokenizer: the policy's tokenizer.
            ends: the ids of the end-of-text tokens.
        """
        self._tokenizer, self._ends, self._prompt = tokenizer, frozenset(ends), prompt
        turns = (("user", prompt.content),) if isinstance(prompt.content, str) else prompt.content
        self._closed = [{"role": role, "content": content} for role, content in turns]
        """The turns before the policy's open one."""
        self.token_ids = list(prompt.token_ids)
        """[S] the tokens so far."""
        self._logprobs = [0.0] * len(self.token_ids)
        self._versions = [-1] * len(self.token_ids)
        self._written = [False] * len(self.token_ids)
        self._opened = len(self.token_ids)
        """Where the policy's open turn begins among the tokens."""

    @property
    def num_response_tokens(self) -> int:
        """The number of tokens after the prompt."""
        return len(self.token_ids) - len(self._prompt.token_ids)

    @property
    def response(self) -> str:
        """The text of the response so far, without special tokens."""
        start = len(self._prompt.token_ids)
        return ResponseText(self._tokenizer, self._prompt.token_ids)(self.token_ids[start:])

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns so far, the open one included if it has tokens."""
        open_turn = [{"role": "assistant", "content": self._open_text}] if len(self.token_ids) > self._opened else []
        return [*map(dict, self._closed), *open_turn]

    @property
    def _open_text(self) -> str:
        return self.text_of(self.token_ids[self._opened :], self._opened)

    def text_of(self, token_ids: Sequence[int], start: int) -> str:
        """Returns the text of tokens that follow the first `start` ones, without special tokens."""
        return ResponseText(self._tokenizer, self.token_ids[:start])(token_ids)

    def stop_in(self, token_ids: Sequence[int], start: int, stops: Sequence[str]) -> str | None:
        """Returns the first of the stop strings that a turn ends with, or has in its last tokens; None if there is none.

        token_ids: the tokens of the turn so far. start: how many tokens come before the turn.

        It is asked after every token. So it looks at the last tokens alone, as many as a stop string can have.
        """
        # A character has at most four tokens. Some tokens have no text at all.
        first = max(0, len(token_ids) - 4 * max(map(len, stops)) - 8)
        before = [*self.token_ids[max(0, start - 4) : start], *token_ids[:first]][-4:]
        text = ResponseText(self._tokenizer, before)(token_ids[first:])
        return next((one for one in stops if one in text), None)

    def add_sampled(self, token_ids: Sequence[int], logprobs: Sequence[float], versions: Sequence[int]) -> None:
        """Appends tokens that the policy sampled, each with its log-probability and the version that sampled it."""
        self.token_ids += token_ids
        self._logprobs += logprobs
        self._versions += versions
        self._written += [True] * len(token_ids)

    def add_written(self, token_ids: Sequence[int]) -> None:
        """Appends tokens that an environment wrote."""
        self.token_ids += token_ids
        self._logprobs += [0.0] * len(token_ids)
        self._versions += [-1] * len(token_ids)
        self._written += [False] * len(token_ids)

    def add_messages(self, token_ids: Sequence[int], messages: Sequence[Mapping[str, str]]) -> None:
        """Appends turns that an environment wrote, given as tokens, too. The policy's next turn begins after them."""
        self._closed = [*self.messages, *map(dict, messages)]
        self.add_written(token_ids)
        self._opened = len(self.token_ids)

    def ids_of(self, text: str, special_tokens: bool = False) -> list[int]:
        """Returns the tokens of a text that follows the tokens so far. These stay as they are.

        The text is tokenised by itself. What was sampled must not be tokenised again: the policy may have written a word
        in other tokens than the tokenizer would.

        special_tokens: whether special tokens that the text spells out become these tokens.
        """
        return ids_after(self._tokenizer, self.token_ids, text, special_tokens)

    def ids_of_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Returns the tokens of `text_after_turn`. Special tokens that the contents of messages spell out stay text.

        Raises ValueError and TemplateRefusal as `text_after_turn` does, and ValueError if a content with special tokens
        cannot be found in what the template writes.
        """
        text, contents = self.text_after_turn(messages), []
        for index, one in enumerate(messages):
            if not spells_special_tokens(self._tokenizer, one["content"]):
                continue
            place = content_place(text, functools.partial(self._text_with, messages, index))
            if place is None:
                raise ValueError(
                    f"append_messages was given {one!r}, which spells out a special token, and the chat template writes the "
                    f"turns around it in another way for another content: take the special token out, or use append"
                )
            contents.append(place)
        ids: list[int] = []
        for part, special in parts(text, contents):
            ids += ids_after(self._tokenizer, [*self.token_ids, *ids], part, special)
        return ids

    def _text_with(self, messages: Sequence[Mapping[str, str]], index: int, content: str) -> str:
        """`text_after_turn` with another content of one of the messages."""
        changed = {"role": messages[index]["role"], "content": content}
        return self.text_after_turn([*messages[:index], changed, *messages[index + 1 :]])

    def text_after_turn(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Returns what the chat template writes after the policy's open turn if other turns follow it.

        messages: these turns, each with `role` and `content`.

        Raises ValueError if there is no turn of the policy to follow, or if the template writes what comes before in
        another way once the turns follow. Raises TemplateRefusal if it refuses the turns.
        """
        if isinstance(self._prompt.content, str):
            raise ValueError(
                "append_messages was called and the prompt is raw text, which has no turns: use append, or prompts of "
                "messages (data.chat)"
            )
        for one in messages:
            if set(one) != {"role", "content"} or not all(isinstance(value, str) for value in one.values()):
                raise ValueError(
                    f"append_messages was given {one!r}: give each message a text `role` and a text `content`"
                )
        if not messages:
            raise ValueError("append_messages was given no message: give one at least, or use append")
        if len(self.token_ids) == self._opened:
            raise ValueError(
                "append_messages was called and the policy has written nothing since the last messages: call generate "
                "before, or give all messages at once"
            )
        head, said = self._rendered([]), self._open_text
        text = self._rendered([{"role": "assistant", "content": _MARK}, *messages])
        # With its own words in the place of the mark: some templates leave out what an earlier turn has thought.
        spoken = self._rendered([{"role": "assistant", "content": said}, *messages])
        if not text.startswith(head + _MARK) or not spoken.startswith((head + said, head + said.strip())):
            raise ValueError(
                "append_messages was called and the chat template is not stable: with the new messages it writes the turns "
                f"before them in another way. It was {head[-200:] + said[-200:]!r}, and becomes "
                f"{spoken[: len(head) + len(said)][-400:]!r}. What the policy has written cannot be changed. Use append "
                f"with the text that the policy is to read and special_tokens=True, or correct the template (chat_template)"
            )
        after = text[len(head + _MARK) :]
        if self._written[-1] and self.token_ids[-1] in self._ends:
            end = self._tokenizer.decode([self.token_ids[-1]], skip_special_tokens=False)
            after = after.removeprefix(end)
        return after

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of the closed turns and of these, with the policy's turn opened."""
        return prompt_text(tuple((one["role"], one["content"]) for one in (*self._closed, *messages)), self._tokenizer)

    def trajectory(self, finish_reason: str, text: str | None, info: Mapping[str, Any]) -> Trajectory:
        """Returns the response as it is now.

        finish_reason: as in `Trajectory`. text: what is read instead of the response's own text, or None. info: as in
            `Trajectory`.
        """
        return Trajectory(
            token_ids=torch.tensor(self.token_ids),
            prompt_len=len(self._prompt.token_ids),
            behaviour_logprobs=torch.tensor(self._logprobs, dtype=torch.float32),
            policy_versions=torch.tensor(self._versions, dtype=torch.int32),
            finish_reason=finish_reason,
            text=self.response if text is None else text,
            written=torch.tensor(self._written),
            info=info,
        )
