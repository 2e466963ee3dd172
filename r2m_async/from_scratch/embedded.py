"""The embedded default: a tiny policy and a tiny, imperfect reward model of the language in `language.py`.

    models = embedded_models()
    AutoModelForCausalLM.from_pretrained(models.policy)
    AutoModelForSequenceClassification.from_pretrained(models.reward_model)

Made from nothing in under a minute on one core, then found in the cache. The policy (Qwen3, one token per word)
is trained on sampled text. The reward model (Llama, byte-pair tokens of its own) is trained on comparisons of the
policy's samples, few and noisy enough that it can be over-optimised.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from r2m_async.data import reward_text
from r2m_async.data.reward_text import reward_input_ids
from r2m_async.from_scratch import language, pretraining
from r2m_async.from_scratch.cache import cached_directory, made_by
from r2m_async.from_scratch.language import gold_reward, prompts, sample_response
from r2m_async.from_scratch.pretraining import Pair, reward_accuracy, train_language_model, train_reward_model
from r2m_async.models.loading import one_thread

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
HEAD_WIDTH = 32
"""The least that vLLM's attention kernels take."""
MAX_NEW_TOKENS = 40
SAMPLES_PER_PROMPT = 4
SAMPLING_PROMPTS = 64
NUM_MEASURED_PROMPTS = language.NUM_HELD_OUT_PROMPTS

OnStage = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedSettings:
    """Sizes and steps of the embedded models; the defaults are what every quickstart uses."""

    seed: int = 0
    policy_width: int = 96
    policy_layers: int = 3
    policy_texts: int = 12_000
    policy_noise: float = 0.02
    """Probability that a sentence of the policy's training text has a fault."""
    policy_steps: int = 600
    policy_batch_size: int = 24
    policy_lr: float = 3e-3
    reward_width: int = 64
    reward_layers: int = 2
    reward_vocabulary: int = 160
    reward_prompts: int = 400
    reward_comparisons: int = 600
    """At most; each prompt gives two, less those whose responses tie in gold."""
    reward_label_scale: float = 1.0
    """A comparison follows gold with probability sigmoid(scale x difference in gold)."""
    reward_epochs: float = 4
    reward_batch_size: int = 32
    reward_lr: float = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedModels:
    """Hugging Face directories, each with its tokenizer."""

    policy: Path
    reward_model: Path
    measurements: Path
    """JSON, on held-out prompts at temperature 1: `reward_accuracy` (share of comparisons decided as gold does),
    `policy_gold`, `policy_num_tokens` (end of text included) and `policy_finished` (means over responses)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response of the policy, as text."""

    prompt: str
    response: str
    finished: bool
    num_tokens: int
    """End of text included."""

    @property
    def gold(self) -> float:
        return gold_reward(self.prompt, self.response, self.finished)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two responses to one prompt that differ in gold."""

    better: Sample
    worse: Sample

    @property
    def margin(self) -> float:
        return self.better.gold - self.worse.gold


def embedded_models(*, settings: EmbeddedSettings | None = None, on_progress: OnStage | None = None) -> EmbeddedModels:
    """The embedded models, built unless the cache has them (`cache` says where, and what concurrent builders do).

    They are the same bit for bit on the same machine; a change to their source files or `settings` makes new ones.
    """
    settings = settings or EmbeddedSettings()
    code = made_by(language.__file__, pretraining.__file__, reward_text.__file__, __file__)
    key = [*code, json.dumps(asdict(settings))]
    directory = cached_directory("embedded", key, lambda path: _build(path, settings, on_progress or _silent))
    return EmbeddedModels(
        policy=directory / "policy",
        reward_model=directory / "reward_model",
        measurements=directory / "measurements.json",
    )


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _build(directory: Path, settings: EmbeddedSettings, on_progress: OnStage) -> None:
    with one_thread(), torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        policy, policy_tokenizer = _train_policy(settings, on_progress)
        samples = partial(sample_policy, policy, policy_tokenizer, samples_per_prompt=SAMPLES_PER_PROMPT)
        on_progress("comparisons", 0, 1)
        seen = samples(prompts(settings.reward_prompts, settings.seed), seed=settings.seed)
        unseen = samples(prompts(NUM_MEASURED_PROMPTS, settings.seed, held_out=True), seed=settings.seed + 1)
        on_progress("comparisons", 1, 1)
        reward_model, reward_tokenizer = _train_reward_model(_comparisons(seen), settings, on_progress)
        measurements = _measurements(unseen, reward_model, reward_tokenizer)
    policy.save_pretrained(directory / "policy")
    policy_tokenizer.save_pretrained(directory / "policy")
    reward_model.save_pretrained(directory / "reward_model")
    reward_tokenizer.save_pretrained(directory / "reward_model")
    (directory / "measurements.json").write_text(json.dumps(measurements, indent=2) + "\n")


def _train_policy(settings: EmbeddedSettings, on_progress: OnStage) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = _word_tokenizer()
    policy = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=settings.policy_width,
            intermediate_size=3 * settings.policy_width,
            num_hidden_layers=settings.policy_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=HEAD_WIDTH,
            max_position_embeddings=256,
            initializer_range=0.1,  # the usual 0.02 is slow to learn at this width: it takes 400 steps to copy the noun
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
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
    """(prompt, response) on training prompts."""
    rng = random.Random(settings.seed)
    chosen = rng.choices(prompts(language.NUM_TRAINING_PROMPTS, settings.seed), k=settings.policy_texts)
    return [(prompt, sample_response(prompt, rng, settings.policy_noise)) for prompt in chosen]


def _train_reward_model(
    comparisons: list[Comparison], settings: EmbeddedSettings, on_progress: OnStage
) -> tuple[LlamaForSequenceClassification, PreTrainedTokenizerFast]:
    tokenizer = _byte_pair_tokenizer(settings)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.reward_width,
            intermediate_size=3 * settings.reward_width,
            num_hidden_layers=settings.reward_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            num_labels=1,  # type: ignore[call-arg]
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rng = random.Random(settings.seed)
    pairs = []
    for comparison in comparisons[: settings.reward_comparisons]:
        better, worse = _pair(comparison, tokenizer)
        follows_gold = rng.random() < 1 / (1 + math.exp(-settings.reward_label_scale * comparison.margin))
        pairs.append((better, worse) if follows_gold else (worse, better))
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


def _measurements(
    samples: list[list[Sample]], model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    every = [sample for of_prompt in samples for sample in of_prompt]
    pairs = [_pair(comparison, tokenizer) for comparison in _comparisons(samples)]
    return {
        "reward_accuracy": reward_accuracy(model, pairs),
        "policy_gold": fmean(sample.gold for sample in every),
        "policy_num_tokens": fmean(sample.num_tokens for sample in every),
        "policy_finished": fmean(sample.finished for sample in every),
    }


def _comparisons(samples: list[list[Sample]]) -> list[Comparison]:
    """Of the first and second response to each prompt, the third and fourth, ...; those that tie are left out."""
    neighbours = [pair for of_prompt in samples for pair in zip(of_prompt[0::2], of_prompt[1::2], strict=True)]
    return [
        Comparison(better=max(pair, key=lambda sample: sample.gold), worse=min(pair, key=lambda sample: sample.gold))
        for pair in neighbours
        if pair[0].gold != pair[1].gold
    ]


def _pair(comparison: Comparison, tokenizer: PreTrainedTokenizerFast) -> Pair:
    return reward_ids(tokenizer, comparison.better), reward_ids(tokenizer, comparison.worse)


def reward_ids(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> list[int]:
    return reward_input_ids(tokenizer, sample.prompt, sample.response, sample.finished)


@torch.no_grad()
def sample_policy(
    policy: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt_texts: list[str],
    *,
    samples_per_prompt: int,
    seed: int,
) -> list[list[Sample]]:
    """Responses to each prompt of the language, sampled at temperature 1 and cut after MAX_NEW_TOKENS."""
    sampled = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(prompt_texts), SAMPLING_PROMPTS):
            batch = prompt_texts[start : start + SAMPLING_PROMPTS]
            prompt_ids = torch.tensor(tokenizer(batch)["input_ids"])  # prompts of the language are equally long
            output = policy.generate(  # type: ignore[misc]
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=MAX_NEW_TOKENS,
                num_return_sequences=samples_per_prompt,
            )
            responses = output[:, prompt_ids.shape[1] :].view(len(batch), samples_per_prompt, -1).tolist()
            sampled += [
                [_sample(prompt, ids, tokenizer) for ids in of_prompt]
                for prompt, of_prompt in zip(batch, responses, strict=True)
            ]
    return sampled


def _sample(prompt: str, ids: list[int], tokenizer: PreTrainedTokenizerFast) -> Sample:
    finished = tokenizer.eos_token_id in ids
    if finished:
        ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
    response = str(tokenizer.decode(ids, skip_special_tokens=True))
    return Sample(prompt=prompt, response=response, finished=finished, num_tokens=len(ids))


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, decoded with a space before it: a decoded response can follow its prompt as it is.

    Not for a `qwen2` policy: for that type AutoTokenizer (transformers 5) loads a Qwen2Tokenizer whatever was saved.
    """
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS.values(), *language.WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Replace(Regex("^"), " ")
    return _wrapped(tokenizer)


def _byte_pair_tokenizer(settings: EmbeddedSettings) -> PreTrainedTokenizerFast:
    """Pieces of words, learnt from natural text: other tokens and other lengths than the policy's."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.reward_vocabulary,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(set("".join(language.WORDS)) | {"Ġ"}),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{prompt} {response}" for prompt, response in _natural_texts(settings)), trainer)
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)
