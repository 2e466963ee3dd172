"""Hidden states of a frozen backbone: each text is read once, and not in every epoch and evaluation.

They are kept in the cache on disk (`from_scratch.cache`), so further runs on the same pairs read no text at all: other
heads, losses and learning rates, the members of an ensemble, and a run that is resumed. They take D values a text,
where D is the hidden size.

The texts of one forward pass are other ones than without this. So the states are the same but for the rounding that
comes with the texts beside them and with the padding.

Shapes: N texts, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2m_async.from_scratch.cache import cached_directory, found_in_cache, made_by
from r2m_async.models import batches
from r2m_async.models.batches import by_length
from r2m_async.models.weights import tensor_digest
from r2m_async.reward_models import trainee
from r2m_async.reward_models.preferences import TokenizedText
from r2m_async.reward_models.process_group import made_by_first, num_ranks, rank, summed
from r2m_async.reward_models.trainee import RewardTrainee

OnTexts = Callable[[int, int], None]
"""A function that is called with (texts read, texts in all) to show progress."""

_FILE = "states.safetensors"


def frozen_states(
    model: RewardTrainee, texts: Iterable[TokenizedText], max_tokens: int, on_texts: OnTexts | None = None
) -> dict[tuple[int, ...], Tensor]:
    """Returns the hidden state [D] from which the head scores each text, by the token ids of the text.

    Takes them from the cache if it has them, and else computes and keeps them.

    model: its backbone must be frozen.
    max_tokens: limit on the tokens of a forward pass, padding included.

    Within a process group each rank reads a part of the texts, and all ranks return the whole.
    """
    # Sorted, so that neither the order of the pairs nor which of them are held out decides what is computed together.
    unique = sorted({text.token_ids: text for text in texts}.values(), key=lambda text: text.token_ids)
    key = _key(model, unique, max_tokens)
    # The first rank decides for all: each rank may look at another disk, and they compute together or not at all.
    if (kept := made_by_first(lambda: found_in_cache("backbone-states", key) or Path())) != Path():
        stored = load_file(kept / _FILE)["states"] if rank() == 0 else None
        states = _from_first(stored, model, len(unique))
    else:
        states = _computed(model, unique, max_tokens, on_texts)
        if rank() == 0:
            cached_directory("backbone-states", key, lambda directory: save_file({"states": states}, directory / _FILE))
    return dict(zip((text.token_ids for text in unique), states.to(model.device), strict=True))


@torch.no_grad()
def _computed(model: RewardTrainee, texts: list[TokenizedText], max_tokens: int, on_texts: OnTexts | None) -> Tensor:
    """The states [N, D] of the texts, in the model's dtype on the CPU."""
    found = _zeros(model, len(texts))
    done = 0
    parts = by_length([len(text.token_ids) for text in texts], max_tokens)
    for number, part in enumerate(parts):
        if number % num_ranks() == rank():
            found[part] = model.rewards_and_states([texts[index] for index in part])[1].float().cpu()
        done += len(part)
        if on_texts is not None:
            on_texts(done, len(texts))
    # Each rank fills its own rows and leaves 0 in the others, so the sum is the whole.
    return summed(found).to(model.classifier.dtype)


def _from_first(stored: Tensor | None, model: RewardTrainee, num: int) -> Tensor:
    """Gives all ranks the states [N, D] that the first one has read. `stored` is None in the others."""
    return summed(_zeros(model, num) if stored is None else stored.float()).to(model.classifier.dtype)


def _zeros(model: RewardTrainee, num: int) -> Tensor:
    """Zeros [num, D]. In float32, which holds every bfloat16 as it is, because not all backends of torch sum those."""
    return torch.zeros(num, model.state_size)


def _key(model: RewardTrainee, texts: list[TokenizedText], max_tokens: int) -> list[str]:
    """All that decides the states: the code, the weights of the backbone, how it computes, and the texts."""
    how = (model.device.type, model.classifier.config._attn_implementation, model.liger, max_tokens)
    return [
        *made_by(__file__, batches.__file__, trainee.__file__),
        model.classifier.base_model.config.to_json_string(),
        repr(how),
        *(f"{name} {tensor_digest(tensor)}" for name, tensor in model.classifier.base_model.state_dict().items()),
        json.dumps([text.token_ids for text in texts]),
    ]
