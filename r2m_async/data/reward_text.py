"""The text a reward model reads: how a prompt and a response become its token ids, in one place for the whole project.

A response crosses from the policy to the reward model as text, because their tokenizers may differ.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

Message = dict[str, str] | tuple[str, str]


def reward_input_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    response_text: str,
    finished: bool,
    max_tokens: int | None = None,
) -> list[int]:
    """Token ids of prompt and response under the reward model's own tokenizer.

    prompt: a text, or messages, each {"role": ..., "content": ...} or (role, content) as in `Prompt.content`.
    response_text: the policy tokenizer's decoding without special tokens. To a prompt that is a text it is appended
        as it is, so any space between the two belongs to one of them.
    finished: whether the response ended with end of text.
    max_tokens: the prompt's start is cut away to get down to it, a leading beginning-of-text token kept; of a
        response that is longer by itself the end is kept. None means no bound.

    Messages go through the chat template: a finished response as a closed assistant turn, an unfinished one as a turn
    left open. Where there is no template, their contents and the response are joined by newlines. Raw text ends with
    the tokenizer's end-of-text token if, and only if, the response is finished; a template's closing says as much.
    """
    if isinstance(prompt, str):
        ids = _raw_ids(tokenizer, prompt + response_text, finished)
    else:
        chat = [m if isinstance(m, dict) else dict(zip(("role", "content"), m, strict=True)) for m in prompt]
        chat.append({"role": "assistant", "content": response_text})
        if tokenizer.chat_template is None:
            ids = _raw_ids(tokenizer, "\n".join(message["content"] for message in chat), finished)
        else:
            text = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=not finished)
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids if max_tokens is None else _without_start(ids, max_tokens, tokenizer.bos_token_id)


def _raw_ids(tokenizer: PreTrainedTokenizerBase, text: str, finished: bool) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the reward tokenizer has no eos_token: set one, it tells finished responses from cut ones")
    ids = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] == eos:  # some tokenizers always append it, which would make every response look finished
        ids.pop()
    return [*ids, eos] if finished else ids


def _without_start(ids: list[int], max_tokens: int, bos: int | None) -> list[int]:
    if max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens}: a reward model needs at least 2 tokens")
    if len(ids) <= max_tokens:
        return ids
    if bos is not None and ids[0] == bos:
        return [bos, *ids[len(ids) - max_tokens + 1 :]]
    return ids[len(ids) - max_tokens :]
