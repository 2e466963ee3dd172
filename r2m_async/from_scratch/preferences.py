"""What reward models of the embedded language are trained from: a language model to start with, and comparisons.

The comparisons are of the embedded policy's samples. An annotator scores each response with its gold reward plus Gumbel
noise and prefers the higher score, so a pair's label follows gold with probability sigmoid(label_scale x difference in
gold). The golden pairs are the same ones without noise; held-out pairs are of other prompts and follow gold always.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from r2m_async.from_scratch import embedded, language
from r2m_async.from_scratch.cache import cached_directory, made_by
from r2m_async.from_scratch.embedded import EmbeddedModels, Sample, embedded_models, sample_policy
from r2m_async.from_scratch.language import sample_response
from r2m_async.from_scratch.pretraining import train_language_model
from r2m_async.models.loading import one_thread


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedPreferenceSettings:
    seed: int = 0
    prompts: int = language.NUM_TRAINING_PROMPTS
    held_out_prompts: int = language.NUM_HELD_OUT_PROMPTS
    label_scale: float = 1.0
    width: int = 64
    layers: int = 2
    texts: int = 6000
    """Natural text for the language model, on training prompts."""
    steps: int = 300
    batch_size: int = 24
    lr: float = 3e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedPreferences:
    start: Path
    """A Llama for AutoModelForCausalLM with the embedded reward model's tokenizer."""
    training: Path
    """JSONL that `preference_data` reads, scores included."""
    golden: Path
    """The training pairs as gold orders them."""
    held_out: Path


def embedded_preferences(
    models: EmbeddedModels | None = None, settings: EmbeddedPreferenceSettings | None = None
) -> EmbeddedPreferences:
    """Found in the cache or made of the embedded `models`, in about half a minute of one core."""
    models, settings = models or embedded_models(), settings or EmbeddedPreferenceSettings()
    key = [*made_by(__file__), models.policy.parent.name, json.dumps(asdict(settings))]
    directory = cached_directory("embedded-preferences", key, lambda path: _build(path, models, settings))
    files = {name: directory / f"{name}.jsonl" for name in ("training", "golden", "held_out")}
    return EmbeddedPreferences(start=directory / "start", **files)


def _build(directory: Path, models: EmbeddedModels, settings: EmbeddedPreferenceSettings) -> None:
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        tokenizer = AutoTokenizer.from_pretrained(models.reward_model)
        start = _language_model(tokenizer, settings)
        start.save_pretrained(directory / "start")
        tokenizer.save_pretrained(directory / "start")
        pairs, unseen = (_sampled_pairs(models, settings, held_out) for held_out in (False, True))
        _write_pairs(directory / "training.jsonl", pairs, settings.label_scale, settings.seed)
        _write_pairs(directory / "golden.jsonl", pairs, math.inf, settings.seed)
        _write_pairs(directory / "held_out.jsonl", unseen, math.inf, settings.seed)


def _language_model(tokenizer: PreTrainedTokenizerFast, settings: EmbeddedPreferenceSettings) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.width,
            intermediate_size=3 * settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            initializer_range=0.1,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rng = random.Random(settings.seed)
    prompts = rng.choices(language.prompts(language.NUM_TRAINING_PROMPTS, settings.seed), k=settings.texts)
    texts = [f"{prompt} {sample_response(prompt, rng)}" for prompt in prompts]
    train_language_model(
        model,
        [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts],
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        seed=settings.seed,
    )
    return model


def _sampled_pairs(
    models: EmbeddedModels, settings: EmbeddedPreferenceSettings, held_out: bool
) -> list[tuple[Sample, Sample]]:
    num = settings.held_out_prompts if held_out else settings.prompts
    policy, tokenizer = (kind.from_pretrained(models.policy) for kind in (AutoModelForCausalLM, AutoTokenizer))
    samples = sample_policy(
        policy,
        tokenizer,
        language.prompts(num, settings.seed, held_out=held_out),
        samples_per_prompt=embedded.SAMPLES_PER_PROMPT,
        seed=settings.seed + held_out,
    )
    return [
        pair
        for of_prompt in samples
        for pair in zip(of_prompt[0::2], of_prompt[1::2], strict=True)
        if pair[0].gold != pair[1].gold and all(sample.response.strip() for sample in pair)
    ]


def _write_pairs(path: Path, pairs: list[tuple[Sample, Sample]], scale: float, seed: int) -> None:
    rng = random.Random(seed)
    path.write_text("".join(json.dumps(_record(pair, scale, rng)) + "\n" for pair in pairs), encoding="utf-8")


def _record(pair: tuple[Sample, Sample], scale: float, rng: random.Random) -> dict[str, Any]:
    """The difference of two Gumbel numbers is logistic: hence the sigmoid above."""
    scores = [sample.gold - math.log(-math.log(1 - rng.random())) / scale for sample in pair]
    (chosen_score, _, chosen), (rejected_score, _, rejected) = sorted(
        zip(scores, (0, 1), pair, strict=True), reverse=True
    )
    return {
        "prompt": chosen.prompt,
        "chosen": chosen.response,
        "rejected": rejected.response,
        "chosen_score": chosen_score,
        "rejected_score": rejected_score,
        "chosen_finished": chosen.finished,
        "rejected_finished": rejected.finished,
    }
