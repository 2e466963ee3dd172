"""Two training loops for small models made from scratch: next-token cross entropy and Bradley-Terry.

Plain PyTorch on the model's own device: AdamW, linear warm-up, cosine decay, gradients clipped at norm 1. With the
same seed, model, data and number of threads the resulting weights are the same bit for bit on a CPU. The caller's
random state is left as it was.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

Pair = tuple[list[int], list[int]]
"""Token ids of the chosen and of the rejected text."""

OnStep = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, loss of the last one)."""

IGNORED_LABEL = -100
WARMUP_SHARE = 0.05
FINAL_LR_SHARE = 0.05


def train_language_model(
    model: PreTrainedModel,
    sequences: Sequence[list[int]],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    prompt_lens: Sequence[int] | None = None,
    microbatch_size: int = 12,
    weight_decay: float = 0.01,
    on_progress: OnStep | None = None,
) -> None:
    """Trains a Hugging Face causal language model in place on `sequences` of token ids, right-padded per batch.

    prompt_lens: leading tokens of each sequence that are read but not predicted, at least 1; None means 1.
    steps: batches of `batch_size` sequences; the data is passed over as often as that takes.
    microbatch_size: sequences in one forward pass; decides memory and padding, and of the gradients only low bits.
    """
    prompt_lens = [1] * len(sequences) if prompt_lens is None else prompt_lens
    device = _device(model)

    def loss_of(batch: list[int]) -> Tensor:
        ids, mask = _right_padded([sequences[i] for i in batch], padding=0, device=device)
        prompt_len = torch.tensor([[prompt_lens[i]] for i in batch], device=device)
        position = torch.arange(ids.shape[1], device=device)
        labels = ids.masked_fill(~mask | (position < prompt_len), IGNORED_LABEL)[:, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # causal: right padding needs no attention mask
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL)

    _train(
        model,
        loss_of,
        lengths=[len(ids) for ids in sequences],
        counts=[len(ids) - prompt_len for ids, prompt_len in zip(sequences, prompt_lens, strict=True)],
        steps=steps,
        batch_size=batch_size,
        microbatch_size=microbatch_size,
        lr=lr,
        weight_decay=weight_decay,
        seed=seed,
        on_progress=on_progress,
    )


def train_reward_model(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    *,
    epochs: float,
    batch_size: int,
    lr: float,
    seed: int,
    trainable: Literal["all", "head"] = "all",
    held_out: float = 0.1,
    microbatch_size: int = 12,
    weight_decay: float = 0.01,
    on_progress: OnStep | None = None,
) -> float:
    """Trains an AutoModelForSequenceClassification with one label in place on `pairs`, with the Bradley-Terry loss.

    trainable: "head" leaves the backbone as it is.
    held_out: the share of `pairs`, drawn by `seed`, that is kept from training; the returned accuracy is theirs,
        NaN at 0. Give the pairs of one prompt a split of your own where leakage through the prompt matters.
    """
    from r2m_async.head_objectives import bradley_terry

    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    num_held_out = round(held_out * len(pairs))
    held_out_pairs = [pairs[i] for i in order[:num_held_out]]
    train_pairs = [pairs[i] for i in order[num_held_out:]]

    def loss_of(batch: list[int]) -> Tensor:
        chosen = [train_pairs[i][0] for i in batch]
        rejected = [train_pairs[i][1] for i in batch]
        return bradley_terry(*_rewards(model, chosen + rejected).chunk(2))

    with _only_head_trainable(model) if trainable == "head" else nullcontext():
        _train(
            model,
            loss_of,
            lengths=[max(map(len, pair)) for pair in train_pairs],
            counts=[1] * len(train_pairs),
            steps=max(1, round(epochs * len(train_pairs) / batch_size)),
            batch_size=batch_size,
            microbatch_size=microbatch_size,
            lr=lr,
            weight_decay=weight_decay,
            seed=seed,
            on_progress=on_progress,
        )
    return reward_accuracy(model, held_out_pairs, batch_size=batch_size)


def reward_accuracy(model: PreTrainedModel, pairs: Sequence[Pair], *, batch_size: int = 64) -> float:
    """Share of `pairs` whose chosen text gets the higher reward, a tie counting half; NaN for no pairs."""
    rewards = score(model, [ids for pair in pairs for ids in pair], batch_size=batch_size)
    margins = rewards[0::2] - rewards[1::2]
    return ((margins.sign() + 1) / 2).mean().item()


@torch.no_grad()
def score(model: PreTrainedModel, sequences: Sequence[list[int]], *, batch_size: int = 64) -> Tensor:
    """The model's rewards [len(sequences)] in their order, float32 on the CPU; computed by similar length."""
    model.eval()
    rewards = torch.empty(len(sequences))
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        rewards[batch] = _rewards(model, [sequences[i] for i in batch]).float().cpu()
    return rewards


def _rewards(model: PreTrainedModel, sequences: Sequence[list[int]]) -> Tensor:
    padding = model.config.get_text_config().pad_token_id
    if padding is None:
        raise ValueError("the reward model's config has no pad_token_id: set it, it marks where a text ends")
    ids, mask = _right_padded(sequences, padding=padding, device=_device(model))
    return model(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1)


def _train(
    model: PreTrainedModel,
    loss_of: Callable[[list[int]], Tensor],
    lengths: Sequence[int],
    counts: Sequence[int],
    *,
    steps: int,
    batch_size: int,
    microbatch_size: int,
    lr: float,
    weight_decay: float,
    seed: int,
    on_progress: OnStep | None,
) -> None:
    """loss_of: the mean loss of the data with these indices. counts: how many terms each of them has in a mean.

    Lengths are alike within a microbatch, which saves padding, but not within a batch: clipping steps that hold one
    length each would shift how often short texts are seen to end.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.95),
    )
    warmup = max(1, round(steps * WARMUP_SHARE))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step, warmup, steps))
    batches = _batches(len(lengths), batch_size, seed)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(1, steps + 1):
            batch = sorted(next(batches), key=lengths.__getitem__)
            total_count = sum(counts[i] for i in batch)
            batch_loss = 0.0
            for start in range(0, len(batch), microbatch_size):
                microbatch = batch[start : start + microbatch_size]
                loss = loss_of(microbatch) * (sum(counts[i] for i in microbatch) / total_count)
                loss.backward()
                batch_loss += loss.item()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if on_progress is not None:
                on_progress(step, steps, batch_loss)
    model.eval()


def _lr_share(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def _batches(num: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices; an index comes back when every other had its turn."""
    if num == 0:
        raise ValueError("nothing to train on: the data is empty")
    rng = random.Random(seed)
    order = list(range(num))
    while True:
        rng.shuffle(order)
        yield from (order[start : start + batch_size] for start in range(0, num, batch_size))


def _right_padded(sequences: Sequence[list[int]], *, padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, S] and the boolean mask of those that are no padding."""
    length = max(map(len, sequences))
    ids = torch.tensor([[*ids, *[padding] * (length - len(ids))] for ids in sequences], device=device)
    lengths = torch.tensor([[len(ids)] for ids in sequences], device=device)
    return ids, torch.arange(length, device=device) < lengths


@contextmanager
def _only_head_trainable(model: PreTrainedModel) -> Iterator[None]:
    frozen = [parameter for parameter in model.base_model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _device(model: PreTrainedModel) -> torch.device:
    return next(model.parameters()).device
