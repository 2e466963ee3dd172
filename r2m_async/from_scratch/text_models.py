"""Trains a small policy and a small reward model on the user's own text. The config calls them `from_scratch`.

With them the whole ring can run on real text without a download. They are trained once and kept in the cache.

    policy = text_policy("posts.jsonl")
    reward_model = text_reward_model("pairs.jsonl")    # score with reward.max_tokens = TextRewardSettings.max_tokens

The policy (Qwen2) writes words in the manner of its data, but no sense. The reward model (Llama, with another
tokenizer) is first trained as a language model of the prompts and responses, and then on the preferences.
`measurements.json` gives its accuracy on unseen pairs, and the accuracy of picking the longer response.

On 1859 TL;DR posts the policy takes 2 minutes on one core. On 959 pairs the reward model takes half a minute. That is
too little for it to beat length: it ranks 0.62 of 192 unseen pairs right, and picking the longer response ranks 0.69
right. Its rewards follow length (correlation 0.6 to 0.7). A policy that is trained on them will do so too.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from r2m_async.cpu_threads import one_thread
from r2m_async.data import prompts, records, reward_text
from r2m_async.data.pairs import Preference, read_prompt, read_response
from r2m_async.data.prompts import load_preferences, prompt_text
from r2m_async.data.records import Content, OnBadRecord, Record, load_records
from r2m_async.data.reward_text import reward_input_ids
from r2m_async.data.sources import Source
from r2m_async.from_scratch import pretraining
from r2m_async.from_scratch.cache import cached_directory, made_by
from r2m_async.from_scratch.pretraining import Pair, reward_accuracy, train_language_model, train_reward_model
from r2m_async.from_scratch.word_models import OnStage, silent
from r2m_async.models import batches

Document = tuple[Content, str]
"""A prompt and its response. The response is empty if the record has none."""

INITIALIZER_RANGE = 0.08
"""The standard deviation of the first weights. The usual 0.02 learns far more slowly at these widths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPolicySettings:
    """The size of the policy, and how it is trained."""

    seed: int = 0
    vocabulary: int = 4000
    width: int = 128
    layers: int = 3
    steps: int = 1500
    batch_size: int = 1
    """The documents of a batch. It is small, because one core needs many steps more than it needs large batches."""
    lr: float = 4e-3
    max_tokens: int = 576
    """The most tokens of a document. A longer one loses its beginning."""
    response_fields: tuple[str, ...] = ("reference_summary", "chosen")
    """Fields that may hold the response. The first of them that a record has is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRewardSettings:
    """The size of the reward model, and how it is trained: as a language model first, on preferences then."""

    seed: int = 0
    vocabulary: int = 1500
    width: int = 96
    layers: int = 2
    max_tokens: int = 128
    """The most tokens that the model reads, in training and in scoring: the response and the end of its prompt."""
    language_steps: int = 300
    language_batch_size: int = 4
    language_lr: float = 4e-3
    epochs: float = 2
    batch_size: int = 16
    lr: float = 5e-4
    weight_decay: float = 0.1
    held_out: float = 0.2
    """The share of the pairs that is kept from training, for `measurements.json`."""


def text_policy(
    source: Source,
    settings: TextPolicySettings | None = None,
    *,
    on_bad_record: OnBadRecord = "error",
    prompt_field: str = "prompt",
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
    split: str = "train",
    on_progress: OnStage | None = None,
) -> Path:
    """Returns the directory of a policy that was trained on a source, and trains it first if need be.

    The directory is for AutoModelForCausalLM and AutoTokenizer. It is kept in the cache.

    source, on_bad_record, prompt_field, columns, chat, split: as in `load_prompts`.
    settings: None takes the defaults.
    on_progress: is called while the policy is trained.

    On one machine the same text and settings give the same bits. Raises DataError as `load_prompts` does.
    """
    settings = settings or TextPolicySettings()

    def parse(record: Record) -> Document:
        field = next((field for field in settings.response_fields if record.has(field)), None)
        return read_prompt(record, chat), "" if field is None else read_response(record, field)

    names = {"prompt": prompt_field, **(columns or {})}
    documents, skipped = load_records(source, split, parse, on_bad_record, names=names)

    def build(directory: Path) -> None:
        with one_thread(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            policy, tokenizer, measured = _trained_policy(documents, settings, on_progress or silent)
        _save(directory, policy, tokenizer, measured | {"num_documents": len(documents), "skipped": skipped})

    return cached_directory("text-policy", _key(documents, skipped, settings), build)


def text_reward_model(
    source: Source,
    settings: TextRewardSettings | None = None,
    *,
    on_bad_record: OnBadRecord = "error",
    prompt_field: str = "prompt",
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
    split: str = "train",
    on_progress: OnStage | None = None,
) -> Path:
    """Returns the directory of a reward model that was trained on preferences, and trains it first if need be.

    The directory is for AutoModelForSequenceClassification and AutoTokenizer. It is kept in the cache.

    source: as in `load_preferences`; its records have the fields prompt, chosen and rejected. The other arguments, the
    errors and the reproducibility are those of `text_policy`.
    """
    settings = settings or TextRewardSettings()
    loaded = load_preferences(
        source, on_bad_record=on_bad_record, prompt_field=prompt_field, columns=columns, chat=chat, split=split
    )

    def build(directory: Path) -> None:
        with one_thread(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model, tokenizer, measured = _trained_reward_model(loaded.pairs, settings, on_progress or silent)
        _save(directory, model, tokenizer, measured | {"skipped": loaded.skipped})

    return cached_directory("text-reward-model", _key(loaded.pairs, loaded.skipped, settings), build)


def _trained_policy(
    documents: Sequence[Document], settings: TextPolicySettings, on_progress: OnStage
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast, dict[str, Any]]:
    """Returns the trained policy, its tokenizer, and what goes into `measurements.json`."""
    tokenizer = _byte_pair_tokenizer(
        [text for content, response in documents for text in (_raw(content), response)], settings.vocabulary
    )
    policy = Qwen2ForCausalLM(Qwen2Config(**_shape(tokenizer, settings, kv_heads=2), tie_word_embeddings=True))
    sequences = [_document_ids(tokenizer, document)[-settings.max_tokens :] for document in documents]
    losses: list[float] = []

    def note(done: int, total: int, loss: float) -> None:
        losses.append(loss)
        on_progress("policy", done, total)

    train_language_model(
        policy,
        sequences,
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        seed=settings.seed,
        on_progress=note,
    )
    measured = {
        "nats_per_token": fmean(losses[-max(1, len(losses) // 10) :]),
        # If this is at most 1, the loss above is of documents that were seen for the first time.
        "passes": settings.steps * settings.batch_size / len(documents),
    }
    return policy, tokenizer, measured


def _trained_reward_model(
    pairs: Sequence[Preference], settings: TextRewardSettings, on_progress: OnStage
) -> tuple[LlamaForSequenceClassification, PreTrainedTokenizerFast, dict[str, Any]]:
    """Returns the trained reward model, its tokenizer, and what goes into `measurements.json`."""
    # The split is made here and not by `train_reward_model`: tokenizer and language model must not see held-out pairs.
    pairs = random.Random(settings.seed).sample(pairs, len(pairs))
    num_held_out = round(settings.held_out * len(pairs))
    held_out, training = pairs[:num_held_out], pairs[num_held_out:]
    tokenizer = _byte_pair_tokenizer(
        [text for pair in training for text in (_raw(pair.prompt), pair.chosen, pair.rejected)], settings.vocabulary
    )
    shape = _shape(tokenizer, settings, kv_heads=4)
    language_model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    documents = [_document_ids(tokenizer, (pair.prompt, pair.chosen)) for pair in training]
    train_language_model(
        language_model,
        [piece for ids in documents for piece in _pieces(ids, settings.max_tokens)],
        steps=settings.language_steps,
        batch_size=settings.language_batch_size,
        lr=settings.language_lr,
        seed=settings.seed,
        on_progress=lambda done, total, loss: on_progress("reward model, language", done, total),
    )
    # The backbone goes on from the language model; the head is new.
    model = LlamaForSequenceClassification(LlamaConfig(**shape | {"num_labels": 1}))
    model.model.load_state_dict(language_model.model.state_dict())
    train_reward_model(
        model,
        _token_pairs(tokenizer, training, settings.max_tokens),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        seed=settings.seed,
        held_out=0.0,
        weight_decay=settings.weight_decay,
        on_progress=lambda done, total, loss: on_progress("reward model, preferences", done, total),
    )
    return model, tokenizer, _accuracies(model, tokenizer, held_out, settings.max_tokens)


def _accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held_out: Sequence[Preference], max_tokens: int
) -> dict[str, Any]:
    """Returns the model's accuracy on the held-out pairs, and the accuracy of picking the longer response."""
    if not held_out:
        return {"num_held_out": 0, "max_tokens": max_tokens}
    longer = [(c > r) + (c == r) / 2 for c, r in ((len(pair.chosen), len(pair.rejected)) for pair in held_out)]
    return {
        "num_held_out": len(held_out),
        "reward_accuracy": reward_accuracy(model, _token_pairs(tokenizer, held_out, max_tokens)),
        "pick_the_longer_accuracy": fmean(longer),
        "max_tokens": max_tokens,
    }


def _token_pairs(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Preference], max_tokens: int) -> list[Pair]:
    """Returns the token ids of each pair, as the reward model reads them. Every response counts as finished."""
    return [
        (
            reward_input_ids(tokenizer, pair.prompt, pair.chosen, True, max_tokens),
            reward_input_ids(tokenizer, pair.prompt, pair.rejected, True, max_tokens),
        )
        for pair in pairs
    ]


def _document_ids(tokenizer: PreTrainedTokenizerFast, document: Document) -> list[int]:
    """Returns the token ids of a prompt, its response and an end of text. A prompt without response has no end."""
    # Tokenized apart, because a policy generates from the tokens of the prompt alone.
    content, response = document
    prompt_ids = tokenizer(prompt_text(content, tokenizer))["input_ids"]
    return [*prompt_ids, *tokenizer(response)["input_ids"], tokenizer.eos_token_id] if response else prompt_ids


def _pieces(ids: list[int], length: int) -> list[list[int]]:
    """Cuts `ids` into pieces of at most `length` ids, counted from the end.

    So the last piece is what a reward model reads. A first piece with less than a quarter of `length` is left out,
    unless it is the only one.
    """
    pieces = [ids[max(0, end - length) : end] for end in range(len(ids), 0, -length)]
    return [piece for piece in pieces if len(piece) >= length // 4] or pieces


def _byte_pair_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with at most `vocabulary` tokens, which are learnt from `texts` by frequency.

    Every byte has a token of its own, so that any text can be read.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )


def _shape(
    tokenizer: PreTrainedTokenizerFast, settings: TextPolicySettings | TextRewardSettings, kv_heads: int
) -> dict[str, Any]:
    """Returns the arguments that the configs of all these models share."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.width,
        "intermediate_size": 3 * settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1024,
        "initializer_range": INITIALIZER_RANGE,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _save(directory: Path, model: Any, tokenizer: PreTrainedTokenizerFast, measured: dict[str, Any]) -> None:
    """Writes the model, its tokenizer and `measurements.json` into `directory`."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "measurements.json").write_text(json.dumps(measured, indent=2) + "\n")


def _key(data: Any, skipped: dict[str, int], settings: TextPolicySettings | TextRewardSettings) -> list[str]:
    """Returns the key of a cached model: the code that makes it, the data, and the settings."""
    # The number of skipped records belongs to the key, because `measurements.json` states it.
    code = made_by(
        pretraining.__file__, batches.__file__, prompts.__file__, records.__file__, reward_text.__file__, __file__
    )
    return [*code, json.dumps([data, skipped, asdict(settings)])]


def _raw(content: Content) -> str:
    """Returns the text of a prompt, whose turns are joined by newlines. Tokenizers are trained on it."""
    return content if isinstance(content, str) else "\n".join(text for _, text in content)
