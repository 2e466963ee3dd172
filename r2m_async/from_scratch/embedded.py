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

from r2m_async.cpu_threads import one_thread
from r2m_async.data import reward_text
from r2m_async.data.reward_text import reward_input_ids
from r2m_async.from_scratch import language, pretraining
from r2m_async.from_scratch.cache import cached_directory, made_by
from r2m_async.from_scratch.language import gold_reward, prompts, sample_response
from r2m_async.from_scratch.pretraining import Pair, reward_accuracy, train_language_model, train_reward_model
from r2m_async.models import batches

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
HEAD_WIDTH = 32
"""The width of an attention head. It is the smallest that vLLM's attention kernels support."""
MAX_NEW_TOKENS = 40
"""The most tokens of a sampled response, end of text included."""
SAMPLES_PER_PROMPT = 4
"""Responses that are sampled for each prompt. They give two comparisons."""
SAMPLING_PROMPTS = 64
"""Prompts that are sampled from as one batch."""
NUM_MEASURED_PROMPTS = language.NUM_HELD_OUT_PROMPTS
"""Held-out prompts that the measurements are taken on."""

OnStage = Callable[[str, int, int], None]
"""A function that is called with (name of the stage, steps done, steps in all) to show progress."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedModels:
    """Where the embedded models are on disk."""

    policy: Path
    """The directory of the policy and its tokenizer, for AutoModelForCausalLM and AutoTokenizer."""
    reward_model: Path
    """The directory of the reward model and its tokenizer, for AutoModelForSequenceClassification and AutoTokenizer."""
    measurements: Path
    """A JSON file of what the models do on held-out prompts, with samples at temperature 1.

    `reward_accuracy` is the share of comparisons that the reward model decides as gold does. `policy_gold`,
    `policy_num_tokens` (end of text included) and `policy_finished` are means over the policy's responses.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response of the policy, as text."""

    prompt: str
    response: str
    """The response without special tokens. Every word has a space before it, the first one too."""
    finished: bool
    """True if the policy ended the response itself, False if the limit of length cut it."""
    num_tokens: int
    """The number of its tokens, end of text included."""

    @property
    def gold(self) -> float:
        """The gold reward of the response."""
        return gold_reward(self.prompt, self.response, self.finished)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two responses to one prompt that differ in their gold reward."""

    better: Sample
    """The response with the higher gold reward."""
    worse: Sample
    """The response with the lower gold reward."""

    @property
    def margin(self) -> float:
        """The difference of their gold rewards, always above 0."""
        return self.better.gold - self.worse.gold


def embedded_models(*, settings: EmbeddedSettings | None = None, on_progress: OnStage | None = None) -> EmbeddedModels:
    """Returns the embedded models, and trains them first if the cache does not have them.

    settings: None takes the defaults. on_progress: is called while the models are trained.

    On one machine the models are always the same, bit for bit. A change to `settings`, or to the source files that
    they are made by, gives new models.
    """
    settings = settings or EmbeddedSettings()
    code = made_by(language.__file__, pretraining.__file__, batches.__file__, reward_text.__file__, __file__)
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
    """Trains both models, measures them, and saves them into `directory`."""
    # One thread, because the rounding of sums on the CPU depends on how many threads there are.
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
    """Returns the policy, trained on natural text of the language, and its tokenizer."""
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
            # The usual 0.02 learns slowly at this width: it needs 400 steps to learn to copy the prompt's noun.
            initializer_range=0.1,
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
    """Returns (prompt, response) texts to train the policy on, all on training prompts."""
    rng = random.Random(settings.seed)
    chosen = rng.choices(prompts(language.NUM_TRAINING_PROMPTS, settings.seed), k=settings.policy_texts)
    return [(prompt, sample_response(prompt, rng, settings.policy_noise)) for prompt in chosen]


def _train_reward_model(
    comparisons: list[Comparison], settings: EmbeddedSettings, on_progress: OnStage
) -> tuple[LlamaForSequenceClassification, PreTrainedTokenizerFast]:
    """Returns the reward model, trained on noisy labels of the comparisons, and its tokenizer."""
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
            num_labels=1,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rng = random.Random(settings.seed)
    pairs = []
    for comparison in comparisons[: settings.reward_comparisons]:
        better, worse = _pair(comparison, tokenizer)
        # Some labels are wrong on purpose. The closer two responses are in gold, the more often their label is wrong.
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
    """Returns what `EmbeddedModels.measurements` says. samples: for each held-out prompt, the policy's responses."""
    every = [sample for of_prompt in samples for sample in of_prompt]
    pairs = [_pair(comparison, tokenizer) for comparison in _comparisons(samples)]
    return {
        "reward_accuracy": reward_accuracy(model, pairs),
        "policy_gold": fmean(sample.gold for sample in every),
        "policy_num_tokens": fmean(sample.num_tokens for sample in every),
        "policy_finished": fmean(sample.finished for sample in every),
    }


def _comparisons(samples: list[list[Sample]]) -> list[Comparison]:
    """Compares the first response to each prompt with the second, the third with the fourth, and so on.

    Two responses with the same gold reward give no comparison.
    """
    neighbours = [pair for of_prompt in samples for pair in zip(of_prompt[0::2], of_prompt[1::2], strict=True)]
    return [
        Comparison(better=max(pair, key=lambda sample: sample.gold), worse=min(pair, key=lambda sample: sample.gold))
        for pair in neighbours
        if pair[0].gold != pair[1].gold
    ]


def _pair(comparison: Comparison, tokenizer: PreTrainedTokenizerFast) -> Pair:
    """Returns the token ids of the better and of the worse text, as the reward model reads them."""
    return reward_ids(tokenizer, comparison.better), reward_ids(tokenizer, comparison.worse)


def reward_ids(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> list[int]:
    """Returns the token ids of a prompt and its response, as the reward model reads them.

    tokenizer: the reward model's.
    """
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
    """Samples responses to prompts of the language at temperature 1. They are cut after MAX_NEW_TOKENS tokens.

    prompt_texts: prompts of the language.
    samples_per_prompt: the number of responses to each prompt.
    seed: decides all random numbers.

    Returns, for each prompt, the list of its responses. The caller's random state is left as it was.
    """
    sampled = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(prompt_texts), SAMPLING_PROMPTS):
            batch = prompt_texts[start : start + SAMPLING_PROMPTS]
            prompt_ids = torch.tensor(tokenizer(batch)["input_ids"])  # no padding: all prompts have the same length
            output = policy.generate(
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
    """Returns the response with these token ids. What follows the first end of text is padding."""
    finished = tokenizer.eos_token_id in ids
    if finished:
        ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
    response = str(tokenizer.decode(ids, skip_special_tokens=True))
    return Sample(prompt=prompt, response=response, finished=finished, num_tokens=len(ids))


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the policy's tokenizer, which has one token for each word of the language.

    It decodes a response with a space before it, so that the text can be appended to its prompt as it is.
    """
    # The policy must not be a Qwen2: for that type AutoTokenizer (transformers 5) ignores what was saved and loads a
    # Qwen2Tokenizer.
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS.values(), *language.WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Replace(Regex("^"), " ")
    return _wrapped(tokenizer)


def _byte_pair_tokenizer(settings: EmbeddedSettings) -> PreTrainedTokenizerFast:
    """Returns the reward model's tokenizer, whose tokens are pieces of words, learnt from natural text.

    Its tokens differ from the policy's on purpose, because they differ in practice.
    """
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
