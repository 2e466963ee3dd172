"""Trains the embedded models: a tiny policy and a tiny, imperfect reward model of the language in `language.py`.

    models = embedded_models()
    AutoModelForCausalLM.from_pretrained(models.policy)
    AutoModelForSequenceClassification.from_pretrained(models.reward_model)

Training takes less than a minute on one core. After that the models are found in the cache.

The policy (Qwen3, one token per word) is trained on sampled text of the language. The reward model (Llama, with
byte-pair tokens of its own) is trained on comparisons of the policy's samples. They are so few and so noisy that a
policy can over-optimise the reward model, as it can in practice.
"""

import json
import random
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast, Qwen3ForCausalLM

from r2m_async.cpu_threads import one_thread
from r2m_async.data import reward_text
from r2m_async.from_scratch import language, pretraining, word_models
from r2m_async.from_scratch.cache import cached_directory, made_by
from r2m_async.from_scratch.language import gold_reward, prompts, sample_response
from r2m_async.from_scratch.pretraining import train_language_model, train_reward_model
from r2m_async.from_scratch.word_models import (
    SAMPLES_PER_PROMPT,
    EmbeddedModels,
    OnStage,
    Sample,
    byte_pair_tokenizer,
    compared,
    labelled,
    measured,
    new_policy,
    reward_model_shape,
    sample_responses,
    save,
    silent,
    word_tokenizer,
)
from r2m_async.models import batches

MAX_NEW_TOKENS = 40
"""The most tokens of a sampled response, end of text included."""
NUM_MEASURED_PROMPTS = language.NUM_HELD_OUT_PROMPTS
"""Held-out prompts that the measurements are taken on."""

sample_policy = partial(sample_responses, gold_reward=gold_reward, max_new_tokens=MAX_NEW_TOKENS)
"""Samples responses to prompts of this language (`word_models.sample_responses`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedSettings:
    """Sizes and training steps of the embedded models. Every quickstart uses the defaults."""

    seed: int = 0
    policy_width: int = 96
    policy_layers: int = 3
    policy_texts: int = 12_000
    policy_noise: float = 0.02
    """The probability that a sentence of the policy's training text has a fault."""
    policy_steps: int = 600
    policy_batch_size: int = 24
    policy_lr: float = 3e-3
    reward_width: int = 64
    reward_layers: int = 2
    reward_vocabulary: int = 160
    reward_prompts: int = 400
    reward_comparisons: int = 600
    """The most comparisons to train on. Each prompt gives two, except where two responses have the same gold reward."""
    reward_label_scale: float = 1.0
    """A comparison is labelled as gold ranks it with probability sigmoid(scale x difference in gold)."""
    reward_epochs: float = 4
    reward_batch_size: int = 32
    reward_lr: float = 1e-3


def embedded_models(*, settings: EmbeddedSettings | None = None, on_progress: OnStage | None = None) -> EmbeddedModels:
    """Returns the embedded models, and trains them first if the cache does not have them.

    settings: None takes the defaults. on_progress: is called while the models are trained.

    On one machine the models are always the same, bit for bit. A change to `settings`, or to the source files that
    they are made by, gives new models.
    """
    settings = settings or EmbeddedSettings()
    code = made_by(
        language.__file__, pretraining.__file__, batches.__file__, reward_text.__file__, word_models.__file__, __file__
    )
    key = [*code, json.dumps(asdict(settings))]
    directory = cached_directory("embedded", key, lambda path: _build(path, settings, on_progress or silent))
    return EmbeddedModels.in_directory(directory)


def _build(directory: Path, settings: EmbeddedSettings, on_progress: OnStage) -> None:
    """Trains both models, measures them, and saves them into `directory`."""
    # One thread, because the rounding of sums on the CPU depends on how many threads there are.
    with one_thread(), torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        policy = _train_policy(settings, on_progress)
        samples = partial(sample_policy, *policy, samples_per_prompt=SAMPLES_PER_PROMPT)
        on_progress("comparisons", 0, 1)
        seen = samples(prompts(settings.reward_prompts, settings.seed), seed=settings.seed)
        unseen = samples(prompts(NUM_MEASURED_PROMPTS, settings.seed, held_out=True), seed=settings.seed + 1)
        on_progress("comparisons", 1, 1)
        reward_model = _train_reward_model(compared(seen), settings, on_progress)
        save(directory, policy, reward_model, measured(unseen, *reward_model))


def _train_policy(settings: EmbeddedSettings, on_progress: OnStage) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Returns the policy, trained on natural text of the language, and its tokenizer."""
    tokenizer = word_tokenizer(language.WORDS)
    # The usual 0.02 learns slowly at this width: it needs 400 steps to learn to copy the prompt's noun.
    policy = new_policy(tokenizer, settings.policy_width, settings.policy_layers, initializer_range=0.1)
    texts = _natural_texts(settings)
    train_language_model(
        policy,
        [[*tokenizer(f"{prompt} {response}")["input_ids"], tokenizer.eos_token_id] for prompt, response in texts],
        prompt_lens=[len(tokenizer(prompt)["input_ids"]) for prompt, _ in texts],
        steps=settings.policy_steps,
        batch_size=settings.policy_batch_size,
        microbatch_size=settings.policy_batch_size,
        lr=settings.policy_lr,
        seed=settings.seed,
        on_progress=lambda done, total, loss: on_progress("policy", done, total),
    )
    return policy, tokenizer


def _natural_texts(settings: EmbeddedSettings) -> list[tuple[str, str]]:
    """Returns (prompt, response) texts to train the policy on, all on training prompts."""
    rng = random.Random(settings.seed)
    chosen = rng.choices(prompts(language.NUM_TRAINING_PROMPTS, settings.seed), k=settings.policy_texts)
    return [(prompt, sample_response(prompt, rng, settings.policy_noise)) for prompt in chosen]


def _train_reward_model(
    comparisons: list[tuple[Sample, Sample]], settings: EmbeddedSettings, on_progress: OnStage
) -> tuple[LlamaForSequenceClassification, PreTrainedTokenizerFast]:
    """Returns the reward model, trained on noisy labels of the comparisons, and its tokenizer."""
    texts = (f"{prompt} {response}" for prompt, response in _natural_texts(settings))
    tokenizer = byte_pair_tokenizer(language.WORDS, texts, settings.reward_vocabulary)
    shape = reward_model_shape(tokenizer, settings.reward_width, settings.reward_layers)
    model = LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1))
    rng = random.Random(settings.seed)
    pairs = labelled(comparisons[: settings.reward_comparisons], tokenizer, settings.reward_label_scale, rng)
    train_reward_model(
        model,
        pairs,
        epochs=settings.reward_epochs,
        batch_size=settings.reward_batch_size,
        lr=settings.reward_lr,
        seed=settings.seed,
        held_out=0.0,
        on_progress=lambda done, total, loss: on_progress("reward model", done, total),
    )
    return model, tokenizer
