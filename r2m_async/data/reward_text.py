"""Turns a prompt and a response into the token ids that a reward model reads.

A response goes from the policy to the reward model as text, because their tokenizers may differ. Training and scoring
must read the same text in the same way, so both use `reward_input_ids`.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from r2m_async.data.chat import templated
from r2m_async.data.raw_text import raw_ids, without_start
from r2m_async.data.special_tokens import content_place, ids_after, parts, spells_special_tokens

Message = dict[str, str] | tuple[str, str]
"""One turn of a conversation: {"role": ..., "content": ...} or (role, content)."""


def reward_input_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    response_text: str,
    finished: bool,
    max_tokens: int | None = None,
) -> list[int]:
    """Returns the token ids of a prompt and its response under the reward model's own tokenizer.

    tokenizer: the reward model's.
    prompt: a text, or a list of messages.
    response_text: the response as text, without special tokens. It is appended to a text prompt as it is. So a space
        between the two must belong to one of them.
    finished: whether the policy ended the response itself, with an end-of-text token.
    max_tokens: the most ids to return. What is too much is cut from the start, but a leading beginning-of-text token is
        kept. None means no limit.

    Messages go through the tokenizer's chat template. A finished response becomes a closed assistant turn, an
    unfinished one a turn that is left open. Special tokens that the response spells out stay text. Without a chat
    template, all contents are joined by newlines.

    Text that went through no template ends with the tokenizer's end-of-text token if the response is finished, and
    never otherwise. In a template the closed turn says the same.

    Raises TemplateRefusal if the chat template refuses the turns, and ValueError if the tokenizer has no end-of-text
    token where it is needed, or if `max_tokens` is below 2.
    """
    if isinstance(prompt, str):
        ids = _raw_ids(tokenizer, prompt + response_text, finished)
    else:
        chat = [m if isinstance(m, dict) else dict(zip(("role", "content"), m, strict=True)) for m in prompt]
        chat.append({"role": "assistant", "content": response_text})
        if tokenizer.chat_template is None:
            ids = _raw_ids(tokenizer, "\n".join(message["content"] for message in chat), finished)
        else:
            ids = _templated_ids(tokenizer, chat, finished)
    if max_tokens is None:
        return ids
    if max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens}: a reward model needs at least 2 tokens")
    return without_start(ids, max_tokens, tokenizer.bos_token_id)


def _templated_ids(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], finished: bool) -> list[int]:
    """Returns the ids of turns that go through the chat template. The last is the response."""

    def write(response: str) -> str:
        last = {"role": "assistant", "content": response}
        return templated(tokenizer, [*chat[:-1], last], continue_final_message=not finished)

    response = chat[-1]["content"]
    text = write(response)
    place = content_place(text, write) if spells_special_tokens(tokenizer, response) else None
    ids: list[int] = []
    for part, special in parts(text, [place] if place else []):
        ids += ids_after(tokenizer, ids, part, special)
    return ids


def _raw_ids(tokenizer: PreTrainedTokenizerBase, text: str, finished: bool) -> list[int]:
    """Returns the ids of a text. They end with the end-of-text token if `finished`, and never otherwise."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the reward tokenizer has no eos_token: set one, it tells finished responses from cut ones")
    ids = raw_ids(tokenizer, text)
    if ids and ids[-1] == eos:  # spelled out by the text itself, which would make a cut response look finished
        ids.pop()
    return [*ids, eos] if finished else ids
