"""Trains the embedded models of the second language: a policy of a million parameters and a reward model of `letters.py`.

    models = embedded_letters()

Training takes two minutes on one core. After that the models are found in the cache.

The policy (Qwen3, one token per word) learns from careful letters what belongs to what, and from natural ones how often it
is written. The reward model (Llama, with byte-pair tokens of its own) starts as a language model, learns to tell careful
letters from natural ones, and then learns from comparisons of the policy's samples. It is right about what the policy
writes, and knows little of what the policy never writes: there a policy can over-optimise it.
"""

import json
import random
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)

from r2m_async.cpu_threads import one_thread
from r2m_async.data import reward_text
from r2m_async.data.reward_text import reward_input_ids
from r2m_async.from_scratch import language, letters, pretraining, word_models
from r2m_async.from_scratch.cache import cached_directory, made_by
from r2m_async.from_scratch.letters import Writing, gold_reward, prompts, sample_response
from r2m_async.from_scratch.pretraining import Pair, train_language_model, train_reward_model
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

MAX_NEW_TOKENS = 64
"""The most tokens of a sampled letter, end of text included."""
NUM_MEASURED_PROMPTS = letters.NUM_HELD_OUT_PROMPTS
"""Held-out prompts that the measurements are taken on."""

sample_letters = partial(sample_responses, gold_reward=gold_reward, max_new_tokens=MAX_NEW_TOKENS)
"""Samples responses to prompts of this language (`word_models.sample_responses`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LettersSettings:
    """Sizes and training steps of the models. `embedded:letters` in a config stands for the defaults."""

    seed: int = 0
    policy_width: int = 176
    policy_layers: int = 3
    policy_texts: int = 12_000
    policy_noise: float = 0.02
    """The probability that a sentence of the policy's training text has a fault."""
    policy_careful_steps: int = 200
    policy_steps: int = 300
    policy_batch_size: int = 16
    policy_lr: float = 3e-3
    reward_width: int = 64
    reward_layers: int = 2
    reward_vocabulary: int = 1000
    reward_texts: int = 6000
    """The number of natural texts that the reward model's language model is trained on."""
    reward_language_steps: int = 300
    reward_language_batch_size: int = 16
    reward_language_lr: float = 3e-3
    reward_careful_pairs: int = 12_000
    """Pairs of a careful and a natural letter. The reward model learns from them what belongs to what."""
    reward_prompts: int = 1500
    """Prompts whose samples are compared. Each gives two comparisons, except where two letters have the same gold."""
    reward_label_scale: float = 6.0
    """A comparison is labelled as gold ranks it with probability sigmoid(scale x difference in gold)."""
    reward_epochs: float = 2
    reward_batch_size: int = 32
    reward_lr: float = 1e-3


def embedded_letters(*, settings: LettersSettings | None = None, on_progress: OnStage | None = None) -> EmbeddedModels:
    """Returns the models of the language `letters`, and trains them first if the cache does not have them.

    settings: None takes the defaults. on_progress: is called while the models are trained.

    On one machine the models are always the same, bit for bit. A change to `settings`, or to the source files that
    they are made by, gives new models.
    """
    settings = settings or LettersSettings()
    files = (letters, language, pretraining, batches, reward_text, word_models)
    code = made_by(*(str(module.__file__) for module in files), __file__)
    key = [*code, json.dumps(asdict(settings))]
    directory = cached_directory("embedded-letters", key, lambda path: _build(path, settings, on_progress or silent))
    return EmbeddedModels.in_directory(directory)


def _report(on_progress: OnStage, stage: str, done: int, total: int, loss: float) -> None:
    on_progress(stage, done, total)


def _build(directory: Path, settings: LettersSettings, on_progress: OnStage) -> None:
    """Trains both models, measures them, and saves them into `directory`."""
    # One thread, because the rounding of sums on the CPU depends on how many threads there are.
    with one_thread(), torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        policy = _train_policy(settings, on_progress)
        samples = partial(sample_letters, *policy, samples_per_prompt=SAMPLES_PER_PROMPT)
        num = settings.reward_prompts + NUM_MEASURED_PROMPTS
        on_progress("comparisons", 0, num)
        seen = samples(prompts(settings.reward_prompts, settings.seed), seed=settings.seed)
        on_progress("comparisons", settings.reward_prompts, num)
        unseen = samples(prompts(NUM_MEASURED_PROMPTS, settings.seed, held_out=True), seed=settings.seed + 1)
        on_progress("comparisons", num, num)
        reward_model = _train_reward_model(compared(seen), settings, on_progress)
        save(directory, policy, reward_model, measured(unseen, *reward_model))


def _train_policy(settings: LettersSettings, on_progress: OnStage) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Returns the policy, and its tokenizer. It learns from careful letters what belongs to what, from natural ones how
    often it is written."""
    tokenizer = word_tokenizer(letters.WORDS)
    # The usual 0.02 learns slowly at this width.
    policy = new_policy(tokenizer, settings.policy_width, settings.policy_layers, initializer_range=0.08)
    for stage, writing, steps in (
        ("policy, careful letters", letters.CAREFUL, settings.policy_careful_steps),
        ("policy, natural letters", letters.NATURAL, settings.policy_steps),
    ):
        texts = _texts(settings, settings.policy_texts, settings.policy_noise, writing)
        train_language_model(
            policy,
            [[*tokenizer(f"{prompt} {response}")["input_ids"], tokenizer.eos_token_id] for prompt, response in texts],
            prompt_lens=[len(tokenizer(prompt)["input_ids"]) for prompt, _ in texts],
            steps=steps,
            batch_size=settings.policy_batch_size,
            microbatch_size=settings.policy_batch_size,
            lr=settings.policy_lr,
            seed=settings.seed,
            on_progress=partial(_report, on_progress, stage),
        )
    return policy, tokenizer


def _texts(settings: LettersSettings, num: int, noise: float, writing: Writing) -> list[tuple[str, str]]:
    """Returns `num` texts, (prompt, response), all on training prompts."""
    rng = random.Random(settings.seed)
    chosen = rng.choices(prompts(letters.NUM_TRAINING_PROMPTS, settings.seed), k=num)
    return [(prompt, sample_response(prompt, rng, noise, writing)) for prompt in chosen]


def _train_reward_model(
    comparisons: list[tuple[Sample, Sample]], settings: LettersSettings, on_progress: OnStage
) -> tuple[LlamaForSequenceClassification, PreTrainedTokenizerFast]:
    """Returns the reward model, trained on noisy labels of the comparisons, and its tokenizer."""
    texts = [
        f"{prompt} {response}" for prompt, response in _texts(settings, settings.reward_texts, 0.0, letters.CAREFUL)
    ]
    tokenizer = byte_pair_tokenizer(letters.WORDS, texts, settings.reward_vocabulary)
    shape = reward_model_shape(tokenizer, settings.reward_width, settings.reward_layers) | {"initializer_range": 0.1}
    language_model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    train_language_model(
        language_model,
        [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts],
        steps=settings.reward_language_steps,
        batch_size=settings.reward_language_batch_size,
        microbatch_size=settings.reward_language_batch_size,
        lr=settings.reward_language_lr,
        seed=settings.seed,
        on_progress=partial(_report, on_progress, "reward model, language"),
    )
    # The backbone goes on from the language model; the scoring head is new.
    model = LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1))
    model.model.load_state_dict(language_model.model.state_dict())
    rng = random.Random(settings.seed)
    for stage, pairs, epochs in (
        ("reward model, careful letters", _careful_pairs(settings, tokenizer, rng), 1.0),
        (
            "reward model, comparisons",
            labelled(comparisons, tokenizer, settings.reward_label_scale, rng),
            settings.reward_epochs,
        ),
    ):
        train_reward_model(
            model,
            pairs,
            epochs=epochs,
            batch_size=settings.reward_batch_size,
            lr=settings.reward_lr,
            seed=settings.seed,
            held_out=0.0,
            on_progress=partial(_report, on_progress, stage),
        )
    return model, tokenizer


def _careful_pairs(settings: LettersSettings, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[Pair]:
    """Returns pairs of a careful letter, which is the better one, and a natural one."""
    chosen = rng.choices(prompts(letters.NUM_TRAINING_PROMPTS, settings.seed), k=settings.reward_careful_pairs)

    def read(prompt: str, writing: Writing) -> list[int]:
        return reward_input_ids(tokenizer, prompt, f" {sample_response(prompt, rng, 0.0, writing)}", True)

    return [(read(prompt, letters.CAREFUL), read(prompt, letters.NATURAL)) for prompt in chosen]
