"""Makes what reward models of the embedded language are trained from: a language model to start with, and pairs.

A pair is two samples of the embedded policy for one prompt. A simulated annotator scores each sample with its gold
reward plus Gumbel noise, and prefers the higher score. So a label follows gold with probability sigmoid(label_scale x
difference in gold). The golden pairs are the same pairs without noise. The held-out pairs are of other prompts, and
always follow gold.
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

from r2m_async.cpu_threads import one_thread
from r2m_async.from_scratch import language
from r2m_async.from_scratch.cache import cached_directory, made_by
from r2m_async.from_scratch.embedded import embedded_models, sample_policy
from r2m_async.from_scratch.language import sample_response
from r2m_async.from_scratch.pretraining import train_language_model
from r2m_async.from_scratch.word_models import SAMPLES_PER_PROMPT, EmbeddedModels, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedPreferenceSettings:
    """How many pairs are made, and how large the language model is and how long it trains."""

    seed: int = 0
    prompts: int = language.NUM_TRAINING_PROMPTS
    """Training prompts. Each gives two pairs, except where two samples have the same gold reward or one is empty."""
    held_out_prompts: int = language.NUM_HELD_OUT_PROMPTS
    """Held-out prompts, which give pairs in the same way."""
    label_scale: float = 1.0
    """How sharply the annotator sees differences in gold. A larger scale gives fewer wrong labels."""
    width: int = 64
    layers: int = 2
    texts: int = 6000
    """The number of natural texts, on training prompts, that the language model is trained on."""
    steps: int = 300
    batch_size: int = 24
    lr: float = 3e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedPreferences:
    """Where the language model and the pairs are on disk."""

    start: Path
    """The directory of a Llama for AutoModelForCausalLM, with the embedded reward model's tokenizer."""
    training: Path
    """A JSONL file of pairs with noisy labels, the annotator's scores included."""
    golden: Path
    """A JSONL file of the training pairs, labelled as gold ranks them."""
    held_out: Path
    """A JSONL file of pairs of held-out prompts, labelled as gold ranks them."""


def embedded_preferences(
    models: EmbeddedModels | None = None, settings: EmbeddedPreferenceSettings | None = None
) -> EmbeddedPreferences:
    """Returns the language model and the pairs, and makes them first if the cache does not have them.

    models: the embedded models whose policy is sampled. None takes the default ones. settings: None takes the defaults.

    Making them takes about half a minute on one core.
    """
    models, settings = models or embedded_models(), settings or EmbeddedPreferenceSettings()
    # The name of the models' directory ends with the digest of all that they were made from.
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
        # Both training files get the very same pairs, in the same order: they differ in their labels alone.
        pairs, unseen = (_sampled_pairs(models, settings, held_out) for held_out in (False, True))
        _write_pairs(directory / "training.jsonl", pairs, settings.label_scale, settings.seed)
        _write_pairs(directory / "golden.jsonl", pairs, math.inf, settings.seed)
        _write_pairs(directory / "held_out.jsonl", unseen, math.inf, settings.seed)


def _language_model(tokenizer: PreTrainedTokenizerFast, settings: EmbeddedPreferenceSettings) -> LlamaForCausalLM:
    """Returns a language model, trained on natural text of the language. Reward models start from it."""
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
    """Samples the policy and returns pairs of neighbouring responses that differ in gold, neither of them empty."""
    num = settings.held_out_prompts if held_out else settings.prompts
    policy, tokenizer = (kind.from_pretrained(models.policy) for kind in (AutoModelForCausalLM, AutoTokenizer))
    samples = sample_policy(
        policy,
        tokenizer,
        language.prompts(num, settings.seed, held_out=held_out),
        samples_per_prompt=SAMPLES_PER_PROMPT,
        seed=settings.seed + held_out,  # True counts as 1: other random numbers than for training
    )
    return [
        pair
        for of_prompt in samples
        for pair in zip(of_prompt[0::2], of_prompt[1::2], strict=True)
        if pair[0].gold != pair[1].gold and all(sample.response.strip() for sample in pair)
    ]


def _write_pairs(path: Path, pairs: list[tuple[Sample, Sample]], scale: float, seed: int) -> None:
    """Labels the pairs and writes them as JSONL. scale: of the annotator; infinity means no noise."""
    rng = random.Random(seed)
    path.write_text("".join(json.dumps(_record(pair, scale, rng)) + "\n" for pair in pairs), encoding="utf-8")


def _record(pair: tuple[Sample, Sample], scale: float, rng: random.Random) -> dict[str, Any]:
    """Returns a pair as a record, with the response that the annotator prefers as chosen."""
    # Gumbel noise: the difference of two Gumbel numbers is logistic, so the label follows gold with a sigmoid's odds.
    scores = [sample.gold - math.log(-math.log(1 - rng.random())) / scale for sample in pair]
    # The index decides a tie of scores. Without it, `sorted` would compare samples, which have no order.
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
