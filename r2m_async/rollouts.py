"""What a user's rollout function is given: a response that it drives, turn by turn.

    async def play(rollout: Rollout) -> None:
        turn = await rollout.generate(stop=["</calc>"])
        if turn.stop:
            rollout.append(f"<result>{answer_to(turn.text)}</result>")
            await rollout.generate()

`rollouts.function: module:play` in the config names it. It is called once for each response. The policy writes with
`generate`, and an environment with `append`. Only what the policy wrote is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from r2m_async.trajectories import Prompt


class ResponseEnded(BaseException):
    """The response has ended, and nothing more can be written into it.

    `generate` and the two `append` raise it if the response has reached `rollouts.max_new_tokens`, and if the schedule
    has aborted the group. Let it through: it ends the function, and is no failure. It is no `Exception`, so that an
    `except Exception` around a tool does not stop it.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the policy wrote in one turn."""

    text: str
    """Its text, without special tokens. A stop string at its end is a part of it."""
    token_ids: tuple[int, ...]
    """Its tokens, the end-of-text token included."""
    finish_reason: str
    """`stop` if the policy ended the turn, with an end-of-text token or a stop string. `length` if it was cut."""
    stop: str | None
    """The stop string that ended the turn, or None if none did."""


class Writer(Protocol):
    """What a `Rollout` passes its calls to. Methods and attributes are those of `Rollout` with the same names."""

    async def generate(self, max_new_tokens: int | None, stop: Sequence[str]) -> Turn:
        """As `Rollout.generate`, with all stop strings in a sequence."""
        ...

    def append(self, text: str, special_tokens: bool) -> None:
        """As `Rollout.append`."""
        ...

    def append_messages(self, messages: Sequence[Mapping[str, str]]) -> None:
        """As `Rollout.append_messages`."""
        ...

    @property
    def messages(self) -> list[dict[str, str]]:
        """As `Rollout.messages`."""
        ...

    @property
    def response(self) -> str:
        """As `Rollout.response`."""
        ...

    @property
    def num_tokens_left(self) -> int:
        """As `Rollout.num_tokens_left`."""
        ...


class Rollout:
    """One response to a prompt, while the policy and an environment write it."""

    prompt: Prompt
    """The prompt. `prompt.content` is what the data has, and `prompt.columns` has the other fields of its record."""
    index: int
    """Which response of its group this is, from 0. The greedy twin is the last."""
    seed: int
    """A number below 2**63 for the random numbers of the environment. It is the same whenever the response is repeated."""
    group_seed: int
    """The same for all responses of the group, for environments that must begin alike."""
    info: dict[str, Any]
    """What is noted about the response, as JSON values. Reward functions get it as the argument `info`."""
    text: str | None
    """The text that the reward model and reward functions read. None: the whole response, the environment's part too."""

    def __init__(self, prompt: Prompt, index: int, seed: int, group_seed: int, writer: Writer) -> None:
        """Begins a response without tokens. `writer` does the work."""
        self.prompt, self.index, self.seed, self.group_seed = prompt, index, seed, group_seed
        self.info, self.text = {}, None
        self._writer = writer

    async def generate(self, max_new_tokens: int | None = None, stop: str | Sequence[str] = ()) -> Turn:
        """Lets the policy go on from all tokens so far, until it ends its turn.

        Args:
            max_new_tokens: the most tokens of this turn. None: as many as the response has left.
            stop: strings that end the turn. The tokens up to the one that completes a string are kept, that one included:
                what was sampled is what is trained.

        Raises ResponseEnded if no token is left, ValueError for a wrong argument, and RuntimeError while another turn of
        this response is being generated.
        """
        return await self._writer.generate(max_new_tokens, (stop,) if isinstance(stop, str) else tuple(stop))

    def append(self, text: str, special_tokens: bool = False) -> None:
        """Appends a text of the environment. It is tokenised by itself, so tokens that are there do not change.

        special_tokens: whether special tokens that the text spells out, such as `<|im_end|>`, become these tokens. What a
            tool found must not, for it would end the turn. Text that was made for the policy may.

        Raises ResponseEnded if the text has more tokens than are left; then none of it is appended. Raises RuntimeError
        while a turn is being generated.
        """
        self._writer.append(text, special_tokens)

    def append_messages(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Appends turns of a conversation, each with `role` and `content`, and opens the policy's next turn.

        The text is what the tokenizer's chat template has after the policy's turn. An end that the policy has written
        itself is not written twice. Special tokens of the template become tokens, and those that a `content` spells out
        stay text.

        Raises ResponseEnded as `append` does. Raises ValueError if the prompt is raw text, if the policy has written
        nothing since the last messages, if the template writes the turns before in another way once others follow, or if
        a `content` with a special token cannot be found in what it writes.
        """
        self._writer.append_messages(messages)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, with `role` and `content`. The policy's open turn is the last, if it has begun."""
        return self._writer.messages

    @property
    def response(self) -> str:
        """The text of the response so far, whoever wrote it, without special tokens."""
        return self._writer.response

    @property
    def num_tokens_left(self) -> int:
        """How many tokens the response may still get, from the policy and the environment together."""
        return self._writer.num_tokens_left
