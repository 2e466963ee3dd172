"""Trains small models from scratch, in two loops: language models with cross entropy, reward models with Bradley-Terry.

The loops are plain PyTorch on the model's own device: AdamW, linear warm-up, cosine decay, gradients clipped at norm
1. On a CPU the same seed, model, data and number of threads give the same weights, bit for bit. The caller's random
state is left as it was.

Shapes: B sequences of a batch, S tokens of a sequence (padded).
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

from r2m_async.models.batches import right_padded

Pair = tuple[list[int], list[int]]
"""The token ids of the chosen and of the rejected text, each with its prompt."""

OnStep = Callable[[int, int, float], None]
"""A function that is called after every step with (steps done, steps in all, loss of the step)."""

IGNORED_LABEL = -100
"""The label of positions that the loss leaves out."""
WARMUP_SHARE = 0.05
"""The share of the steps in which the learning rate rises."""
FINAL_LR_SHARE = 0.05
"""The learning rate at the end, as a share of the highest one."""


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
    """Trains a causal language model of transformers in place, with next-token cross entropy.

    sequences: the token ids of each training text.
    steps: the number of batches. The data is passed over as often as that takes.
    batch_size: the sequences of a batch. The last batch of a pass over the data may be smaller.
    lr: the highest learning rate.
    seed: decides the order of the data, and dropout if the model has any.
    prompt_lens: for each sequence, how many of its first tokens are read but not predicted, at least 1. None means 1.
    microbatch_size: the sequences of one forward pass. It changes memory and padding. Of the gradients it changes the
        rounding alone.
    on_progress: is called after every step.

    The model is in eval mode afterwards. Raises ValueError if there are no sequences.
    """
    prompt_lens = [1] * len(sequences) if prompt_lens is None else prompt_lens
    device = _device(model)

    def loss_of(batch: list[int]) -> Tensor:
        ids, mask = right_padded([sequences[i] for i in batch], 0, device)
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
    """Trains a sequence classifier with one label in place, with the Bradley-Terry loss. Returns its accuracy.

    pairs: the token ids of chosen and rejected texts.
    epochs: how often the training pairs are passed over. It may be a fraction.
    batch_size: the pairs of a batch.
    lr: the highest learning rate.
    seed: decides which pairs are held out, the order of the data, and dropout if the model has any.
    trainable: "head" leaves the backbone as it is.
    held_out: the share of `pairs` that is kept from training. Pairs are drawn one by one, so two pairs of one prompt
        may be on both sides. Split the data yourself if that matters.
    microbatch_size: the pairs of one forward pass.
    on_progress: is called after every step.

    The accuracy is that on the held-out pairs, or NaN if none are held out. Raises ValueError if there is no pair to
    train on, or if the model has no padding token.
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
    """Returns the share of `pairs` whose chosen text gets the higher reward. A tie counts half. No pairs give NaN."""
    rewards = score(model, [ids for pair in pairs for ids in pair], batch_size=batch_size)
    margins = rewards[0::2] - rewards[1::2]
    return ((margins.sign() + 1) / 2).mean().item()


@torch.no_grad()
def score(model: PreTrainedModel, sequences: Sequence[list[int]], *, batch_size: int = 64) -> Tensor:
    """Returns the rewards [number of sequences] float32 on the CPU, in the order of the sequences.

    model: a sequence classifier with one label, which is put into eval mode. sequences: the token ids of each text.
    batch_size: the sequences of one forward pass. Raises ValueError if the model has no padding token.
    """
    model.eval()
    rewards = torch.empty(len(sequences))
    # Texts of similar length go through the model together, because that takes the least padding.
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        rewards[batch] = _rewards(model, [sequences[i] for i in batch]).float().cpu()
    return rewards


def _rewards(model: PreTrainedModel, sequences: Sequence[list[int]]) -> Tensor:
    """Returns the rewards [B] of one batch, in the model's dtype and on its device."""
    padding = model.config.get_text_config().pad_token_id
    if padding is None:
        raise ValueError("the reward model's config has no pad_token_id: set it, it marks where a text ends")
    ids, mask = right_padded(sequences, padding, _device(model))
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
    """Runs the training loop that both kinds of models share.

    loss_of: returns the mean loss of the data with the given indices. It is called on one microbatch at a time.
    lengths: the tokens of each item of the data.
    counts: for each item, the number of terms that it has in a mean: predicted tokens, or 1 for a pair.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},  # norms and biases do not decay
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
            # Sorted within the batch alone, so that a microbatch has little padding. Batches must mix lengths: the
            # gradient of each is clipped, and with one length per batch the model would learn wrongly how often short
            # texts end.
            batch = sorted(next(batches), key=lengths.__getitem__)
            total_count = sum(counts[i] for i in batch)
            batch_loss = 0.0
            for start in range(0, len(batch), microbatch_size):
                microbatch = batch[start : start + microbatch_size]
                # Weighed by its share of the terms: the sum over microbatches is the mean over the batch.
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
    """Returns the learning rate of a step, counted from 0, as a share of the highest one."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def _batches(num: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yields batches of indices below `num` without end, in a new order for each pass over them.

    Raises ValueError if `num` is 0.
    """
    if num == 0:
        raise ValueError("nothing to train on: the data is empty")
    rng = random.Random(seed)
    order = list(range(num))
    while True:
        rng.shuffle(order)
        yield from (order[start : start + batch_size] for start in range(0, num, batch_size))


@contextmanager
def _only_head_trainable(model: PreTrainedModel) -> Iterator[None]:
    """Freezes the backbone within the block. Afterwards, the parameters that were trainable before are so again."""
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
