"""`from_scratch`: a small policy and a small reward model made from the user's own text, once, on one core.

They exist so that the whole ring can run on real text without a download. The policy (Qwen2) writes words in the
manner of its data, not sense. The reward model (Llama, another tokenizer) is a language model of the prompts and
responses first and then learns from the preferences; what it gets right on pairs that it never saw stands in
`measurements.json`, beside what picking the longer response gets.

    policy = text_policy("posts.jsonl")
    reward_model = text_reward_model("pairs.jsonl")    # score with reward.max_tokens = TextRewardSettings.max_tokens

On 1859 TL;DR posts the policy takes 2 minutes of one core, and on 959 pairs the reward model half a minute. That is
too little for the latter to beat length: 0.62 of 192 unseen pairs right, where the longer response is in 0.69. Its
rewards follow length (correlation 0.6 to 0.7), and so will a policy that is trained on them.
"""

import json
import random
from collections.abc import Callable, Sequence
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

from r2m_async.data import prompts, records, reward_text
from r2m_async.data.prompts import Preference, load_preferences, prompt_text
from r2m_async.data.records import PROMPT_FIELD, Content, OnBadRecord, Record, Source, load_records
from r2m_async.data.reward_text import reward_input_ids
from r2m_async.from_scratch import pretraining
from r2m_async.from_scratch.cache import cached_directory, made_by
from r2m_async.from_scratch.pretraining import Pair, reward_accuracy, train_language_model, train_reward_model
from r2m_async.models.loading import one_thread

OnStage = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""

Document = tuple[Content, str]
"""A prompt and its response; an empty response where the record has none."""

INITIALIZER_RANGE = 0.08
"""The usual 0.02 learns far more slowly at these widths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPolicySettings:
    seed: int = 0
    vocabulary: int = 4000
    width: int = 128
    layers: int = 3
    steps: int = 1500
    batch_size: int = 1
    """Documents. Small batches, because the number of steps is what a minute of one core lacks."""
    lr: float = 4e-3
    max_tokens: int = 576
    """Longer documents lose their beginning."""
    response_fields: tuple[str, ...] = ("reference_summary", "chosen")
    """The first of them that a record has is its response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRewardSettings:
    seed: int = 0
    vocabulary: int = 1500
    width: int = 96
    layers: int = 2
    max_tokens: int = 128
    """What the model reads, in training and wherever it scores: the response and the end of its prompt."""
    language_steps: int = 300
    language_batch_size: int = 4
    language_lr: float = 4e-3
    epochs: float = 2
    batch_size: int = 16
    lr: float = 5e-4
    weight_decay: float = 0.1
    held_out: float = 0.2
    """Share of the pairs kept from training, for `measurements.json`."""


def text_policy(
    source: Source,
    settings: TextPolicySettings | None = None,
    *,
    on_bad_record: OnBadRecord = "error",
    prompt_field: str = "prompt",
    split: str = "train",
    on_progress: OnStage | None = None,
) -> Path:
    """A directory for AutoModelForCausalLM and AutoTokenizer, trained on the records' prompts and responses.

    Raises `DataError` as `load_prompts` does. The same bits for the same text and settings on the same machine.
    """
    settings = settings or TextPolicySettings()

    def parse(record: Record) -> Document:
        content = record.content(prompt_field, PROMPT_FIELD)
        field = next((field for field in settings.response_fields if field in record.fields()), None)
        return content, "" if field is None else record.response(field)

    documents, skipped = load_records(source, split, parse, on_bad_record)

    def build(directory: Path) -> None:
        with one_thread(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            policy, tokenizer, measured = _trained_policy(documents, settings, on_progress or _silent)
        _save(directory, policy, tokenizer, measured | {"num_documents": len(documents), "skipped": skipped})

    return cached_directory("text-policy", _key(documents, skipped, settings), build)


def text_reward_model(
    source: Source,
    settings: TextRewardSettings | None = None,
    *,
    on_bad_record: OnBadRecord = "error",
    prompt_field: str = "prompt",
    split: str = "train",
    on_progress: OnStage | None = None,
) -> Path:
    """A directory for AutoModelForSequenceClassification and AutoTokenizer, trained on {prompt, chosen, rejected}.

    Errors and reproducibility as for `text_policy`.
    """
    settings = settings or TextRewardSettings()
    loaded = load_preferences(source, on_bad_record=on_bad_record, prompt_field=prompt_field, split=split)

    def build(directory: Path) -> None:
        with one_thread(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model, tokenizer, measured = _trained_reward_model(loaded.pairs, settings, on_progress or _silent)
        _save(directory, model, tokenizer, measured | {"skipped": loaded.skipped})

    return cached_directory("text-reward-model", _key(loaded.pairs, loaded.skipped, settings), build)


def _trained_policy(
    documents: Sequence[Document], settings: TextPolicySettings, on_progress: OnStage
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast, dict[str, Any]]:
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
        # Up to 1, the documents behind that number were seen for the first time.
        "passes": settings.steps * settings.batch_size / len(documents),
    }
    return policy, tokenizer, measured


def _trained_reward_model(
    pairs: Sequence[Preference], settings: TextRewardSettings, on_progress: OnStage
) -> tuple[LlamaForSequenceClassification, PreTrainedTokenizerFast, dict[str, Any]]:
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
    return [
        (
            reward_input_ids(tokenizer, pair.prompt, pair.chosen, True, max_tokens),
            reward_input_ids(tokenizer, pair.prompt, pair.rejected, True, max_tokens),
        )
        for pair in pairs
    ]


def _document_ids(tokenizer: PreTrainedTokenizerFast, document: Document) -> list[int]:
    """Prompt and response are tokenized apart, as generation meets them; a prompt alone does not end the text."""
    content, response = document
    prompt_ids = tokenizer(prompt_text(content, tokenizer))["input_ids"]
    return [*prompt_ids, *tokenizer(response)["input_ids"], tokenizer.eos_token_id] if response else prompt_ids


def _pieces(ids: list[int], length: int) -> list[list[int]]:
    """`ids` cut from the end, so that the last piece is what a reward model reads; a short first one is left out."""
    pieces = [ids[max(0, end - length) : end] for end in range(len(ids), 0, -length)]
    return [piece for piece in pieces if len(piece) >= length // 4] or pieces


def _byte_pair_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Every byte has a token, so that any text can be read; learnt by frequency from `texts`."""
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
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "measurements.json").write_text(json.dumps(measured, indent=2) + "\n")


def _key(data: Any, skipped: dict[str, int], settings: TextPolicySettings | TextRewardSettings) -> list[str]:
    code = made_by(pretraining.__file__, prompts.__file__, records.__file__, reward_text.__file__, __file__)
    return [*code, json.dumps([data, skipped, asdict(settings)])]


def _raw(content: Content) -> str:
    return content if isinstance(content, str) else "\n".join(text for _, text in content)


def _silent(stage: str, done: int, total: int) -> None:
    pass
