"""The parts of both embedded languages' models: a policy with a token for each word, and a reward model of byte pairs.

They know no language. Its words and its gold reward are given.
"""

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from r2m_async.data.reward_text import reward_input_ids
from r2m_async.from_scratch.pretraining import Pair, reward_accuracy

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
HEAD_WIDTH = 32
"""The width of an attention head. It is the smallest that vLLM's attention kernels support."""
SAMPLES_PER_PROMPT = 4
"""Responses that are sampled for each prompt. They give two comparisons."""
SAMPLING_PROMPTS = 64
"""Prompts that are sampled from as one batch."""

OnStage = Callable[[str, int, int], None]
"""A function that is called with (name of the stage, steps done, steps in all) to show progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedModels:
    """Where the models of an embedded language are on disk."""

    policy: Path
    """The directory of the policy and its tokenizer, for AutoModelForCausalLM and AutoTokenizer."""
    reward_model: Path
    """The directory of the reward model and its tokenizer, for AutoModelForSequenceClassification and AutoTokenizer."""
    measurements: Path
    """A JSON file of what the models do on held-out prompts, with samples at temperature 1.

    `reward_accuracy` is the share of comparisons that the reward model decides as gold does. `policy_gold`,
    `policy_num_tokens` (end of text included) and `policy_finished` are means over the policy's responses.
    """

    @classmethod
    def in_directory(cls, directory: Path) -> "EmbeddedModels":
        """Returns the models that `save` has put there."""
        return cls(
            policy=directory / "policy",
            reward_model=directory / "reward_model",
            measurements=directory / "measurements.json",
        )


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
    gold: float
    """The gold reward of the response."""


@torch.no_grad()
def sample_responses(
    policy: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt_texts: list[str],
    *,
    gold_reward: Callable[[str, str, bool], float],
    max_new_tokens: int,
    samples_per_prompt: int,
    seed: int,
) -> list[list[Sample]]:
    """Samples responses to prompts of a language at temperature 1.

    prompt_texts: prompts of the language.
    gold_reward: the language's, of (prompt, response, whether the response is finished).
    max_new_tokens: the most tokens of a response, end of text included.
    samples_per_prompt: the number of responses to each prompt.
    seed: decides all random numbers.

    Returns, for each prompt, the list of its responses. The caller's random state is left as it was.
    """

    def sample(prompt: str, ids: list[int]) -> Sample:
        finished = tokenizer.eos_token_id in ids
        if finished:  # what follows the first end of text is padding
            ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
        response = str(tokenizer.decode(ids, skip_special_tokens=True))
        gold = gold_reward(prompt, response, finished)
        return Sample(prompt=prompt, response=response, finished=finished, num_tokens=len(ids), gold=gold)

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
                max_new_tokens=max_new_tokens,
                num_return_sequences=samples_per_prompt,
            )
            responses = output[:, prompt_ids.shape[1] :].view(len(batch), samples_per_prompt, -1).tolist()
            sampled += [
                [sample(prompt, ids) for ids in of_prompt] for prompt, of_prompt in zip(batch, responses, strict=True)
            ]
    return sampled


def compared(samples: list[list[Sample]]) -> list[tuple[Sample, Sample]]:
    """Compares the first response to each prompt with the second, the third with the fourth, and so on.

    Returns (better, worse) by gold. Two responses with the same gold reward give no comparison.
    """
    neighbours = [pair for of_prompt in samples for pair in zip(of_prompt[0::2], of_prompt[1::2], strict=True)]
    return [
        (first, second) if first.gold > second.gold else (second, first)
        for first, second in neighbours
        if first.gold != second.gold
    ]


def labelled(
    comparisons: list[tuple[Sample, Sample]], tokenizer: PreTrainedTokenizerFast, scale: float, rng: random.Random
) -> list[Pair]:
    """Returns the comparisons as (preferred, other). Some labels are wrong on purpose.

    scale: a comparison is labelled as gold ranks it with probability sigmoid(scale x difference in gold). So the closer two
        responses are in gold, the more often their label is wrong.
    """
    pairs = []
    for better, worse in comparisons:
        first, second = reward_ids(tokenizer, better), reward_ids(tokenizer, worse)
        follows_gold = rng.random() < 1 / (1 + math.exp(-scale * (better.gold - worse.gold)))
        pairs.append((first, second) if follows_gold else (second, first))
    return pairs


def reward_ids(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> list[int]:
    """Returns the token ids of a prompt and its response, as the reward model reads them.

    tokenizer: the reward model's.
    """
    return reward_input_ids(tokenizer, sample.prompt, sample.response, sample.finished)


def measured(
    samples: list[list[Sample]], model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """Returns what `EmbeddedModels.measurements` says. samples: for each held-out prompt, the policy's responses."""
    every = [sample for of_prompt in samples for sample in of_prompt]
    pairs = [(reward_ids(tokenizer, better), reward_ids(tokenizer, worse)) for better, worse in compared(samples)]
    return {
        "reward_accuracy": reward_accuracy(model, pairs),
        "policy_gold": fmean(sample.gold for sample in every),
        "policy_num_tokens": fmean(sample.num_tokens for sample in every),
        "policy_finished": fmean(sample.finished for sample in every),
    }


def save(
    directory: Path,
    policy: tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast],
    reward_model: tuple[LlamaForSequenceClassification, PreTrainedTokenizerFast],
    measurements: dict[str, float],
) -> None:
    """Writes both models, each with its tokenizer, and what was measured of them."""
    for name, parts in (("policy", policy), ("reward_model", reward_model)):
        for part in parts:
            part.save_pretrained(directory / name)
    (directory / "measurements.json").write_text(json.dumps(measurements, indent=2) + "\n")


def new_policy(
    tokenizer: PreTrainedTokenizerFast, width: int, num_layers: int, initializer_range: float
) -> Qwen3ForCausalLM:
    """Returns a policy with random weights."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            **_token_ids(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=HEAD_WIDTH,
            max_position_embeddings=256,
            initializer_range=initializer_range,
            tie_word_embeddings=False,
        )
    )


def reward_model_shape(tokenizer: PreTrainedTokenizerFast, width: int, num_layers: int) -> dict[str, Any]:
    """Returns the arguments of a reward model's `LlamaConfig`."""
    return {
        **_token_ids(tokenizer),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
    }


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Returns a policy's tokenizer, which has one token for each word of the language.

    It decodes a response with a space before it, so that the text can be appended to its prompt as it is.
    """
    # The policy must not be a Qwen2: for that type AutoTokenizer (transformers 5) ignores what was saved and loads a
    # Qwen2Tokenizer.
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS.values(), *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Replace(Regex("^"), " ")
    return _wrapped(tokenizer)


def byte_pair_tokenizer(words: Iterable[str], texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Returns a reward model's tokenizer, whose tokens are pieces of words, learnt from texts.

    Its tokens differ from the policy's on purpose, because they differ in practice.

    words: the language's, whose letters are tokens whether the texts have them or not. vocabulary: the number of tokens.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(set("".join(words)) | {"Ġ"}),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)


def silent(stage: str, done: int, total: int) -> None:
    """An `OnStage` that shows nothing."""
