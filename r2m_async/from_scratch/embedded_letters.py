"""Trains the embedded models of the second language: a policy of a million parameters and a reward model of `letters.py`.

    models = embedded_letters()

Training takes two minutes on one core. After that the models are found in the cache.

The policy (Qwen3, one token per word) learns from careful letters what belongs to what, and from natural ones how often it
is written. The reward model (Llama, with byte-pair tokens of its own) starts as a language model, learns to tell careful
letters from natural ones, and then learns from comparisons of the policy's samples. It is right about what the policy
writes, and knows little of what the policy never writes: there a policy can over-optimise it.
"""

# This file repeats a little of embedded.py. The code of that file belongs to the key of the first language's models, so a
# function that moved out of it would give them all a new name.

import json
import math
import random
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from r2m_async.cpu_threads import one_thread
from r2m_async.data import reward_text
from r2m_async.data.reward_text import reward_input_ids
from r2m_async.from_scratch import embedded, letters, pretraining
from r2m_async.from_scratch.cache import cached_directory, made_by
from r2m_async.from_scratch.embedded import HEAD_WIDTH, SPECIAL_TOKENS, EmbeddedModels, OnStage
from r2m_async.from_scratch.letters import Writing, gold_reward, prompts, sample_response
from r2m_async.from_scratch.pretraining import Pair, reward_accuracy, train_language_model, train_reward_model
from r2m_async.models import batches

MAX_NEW_TOKENS = 64
"""The most tokens of a sampled letter, end of text included."""
SAMPLES_PER_PROMPT = 4
"""Letters that are sampled for each prompt. They give two comparisons."""
SAMPLING_PROMPTS = 64
"""Prompts that are sampled from as one batch."""
NUM_MEASURED_PROMPTS = letters.NUM_HELD_OUT_PROMPTS
"""Held-out prompts that the measurements are taken on."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
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
        """The gold reward of the letter."""
        return gold_reward(self.prompt, self.response, self.finished)


def embedded_letters(*, settings: LettersSettings | None = None, on_progress: OnStage | None = None) -> EmbeddedModels:
    """Returns the models of the language `letters`, and trains them first if the cache does not have them.

    settings: None takes the defaults. on_progress: is called while the models are trained.

    On one machine the models are always the same, bit for bit. A change to `settings`, or to the source files that
    they are made by, gives new models.
    """
    settings = settings or LettersSettings()
    code = made_by(
        letters.__file__, pretraining.__file__, batches.__file__, reward_text.__file__, embedded.__file__, __file__
    )
    key = [*code, json.dumps(asdict(settings))]
    directory = cached_directory("embedded-letters", key, lambda path: _build(path, settings, on_progress or _silent))
    return EmbeddedModels(
        policy=directory / "policy",
        reward_model=directory / "reward_model",
        measurements=directory / "measurements.json",
    )


def _report(on_progress: OnStage, stage: str, done: int, total: int, loss: float) -> None:
    on_progress(stage, done, total)


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _build(directory: Path, settings: LettersSettings, on_progress: OnStage) -> None:
    """Trains both models, measures them, and saves them into `directory`."""
    # One thread, because the rounding of sums on the CPU depends on how many threads there are.
    with one_thread(), torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        policy, policy_tokenizer = _train_policy(settings, on_progress)
        num = settings.reward_prompts + NUM_MEASURED_PROMPTS
        on_progress("comparisons", 0, num)
        seen = sample_letters(policy, policy_tokenizer, prompts(settings.reward_prompts, settings.seed), settings.seed)
        on_progress("comparisons", settings.reward_prompts, num)
        held_out = prompts(NUM_MEASURED_PROMPTS, settings.seed, held_out=True)
        unseen = sample_letters(policy, policy_tokenizer, held_out, settings.seed + 1)
        on_progress("comparisons", num, num)
        reward_model, reward_tokenizer = _train_reward_model(compared(seen), settings, on_progress)
        measurements = _measurements(unseen, reward_model, reward_tokenizer)
    policy.save_pretrained(directory / "policy")
    policy_tokenizer.save_pretrained(directory / "policy")
    reward_model.save_pretrained(directory / "reward_model")
    reward_tokenizer.save_pretrained(directory / "reward_model")
    (directory / "measurements.json").write_text(json.dumps(measurements, indent=2) + "\n")


def new_policy(settings: LettersSettings) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Returns a policy with random weights, and its tokenizer."""
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
            initializer_range=0.08,  # the usual 0.02 learns slowly at this width
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return policy, tokenizer


def _train_policy(settings: LettersSettings, on_progress: OnStage) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Returns the policy, and its tokenizer. It learns from careful letters what belongs to what, from natural ones how
    often it is written."""
    policy, tokenizer = new_policy(settings)
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
    comparisons: list[tuple[Letter, Letter]], settings: LettersSettings, on_progress: OnStage
) -> tuple[LlamaForSequenceClassification, PreTrainedTokenizerFast]:
    """Returns the reward model, trained on noisy labels of the comparisons, and its tokenizer."""
    texts = [
        f"{prompt} {response}" for prompt, response in _texts(settings, settings.reward_texts, 0.0, letters.CAREFUL)
    ]
    tokenizer = _byte_pair_tokenizer(texts, settings)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.reward_width,
        "intermediate_size": 3 * settings.reward_width,
        "num_hidden_layers": settings.reward_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
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
        ("reward model, comparisons", _labelled(comparisons, settings, tokenizer, rng), settings.reward_epochs),
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


def _labelled(
    comparisons: list[tuple[Letter, Letter]],
    settings: LettersSettings,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
) -> list[Pair]:
    """Returns the comparisons as (preferred, other). Some labels are wrong on purpose.

    The closer two letters are in gold, the more often their label is wrong.
    """
    pairs = []
    for comparison in comparisons:
        better, worse = _pair(comparison, tokenizer)
        margin = comparison[0].gold - comparison[1].gold
        follows_gold = rng.random() < 1 / (1 + math.exp(-settings.reward_label_scale * margin))
        pairs.append((better, worse) if follows_gold else (worse, better))
    return pairs


def _measurements(
    samples: list[list[Letter]], model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """Returns what `EmbeddedModels.measurements` says. samples: for each held-out prompt, the policy's letters."""
    every = [letter for of_prompt in samples for letter in of_prompt]
    return {
        "reward_accuracy": reward_accuracy(model, [_pair(comparison, tokenizer) for comparison in compared(samples)]),
        "policy_gold": fmean(letter.gold for letter in every),
        "policy_num_tokens": fmean(letter.num_tokens for letter in every),
        "policy_finished": fmean(letter.finished for letter in every),
    }


def compared(samples: list[list[Letter]]) -> list[tuple[Letter, Letter]]:
    """Compares the first letter for each prompt with the second, the third with the fourth, and so on.

    Returns (better, worse) by gold. Two letters with the same gold reward give no comparison.
    """
    neighbours = [pair for of_prompt in samples for pair in zip(of_prompt[0::2], of_prompt[1::2], strict=True)]
    return [
        (first, second) if first.gold > second.gold else (second, first)
        for first, second in neighbours
        if first.gold != second.gold
    ]


def _pair(comparison: tuple[Letter, Letter], tokenizer: PreTrainedTokenizerFast) -> Pair:
    """Returns the token ids of the better and of the worse text, as the reward model reads them."""
    better, worse = (
        reward_input_ids(tokenizer, letter.prompt, letter.response, letter.finished) for letter in comparison
    )
    return better, worse


@torch.no_grad()
def sample_letters(
    policy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt_texts: list[str], seed: int
) -> list[list[Letter]]:
    """Samples SAMPLES_PER_PROMPT letters for each prompt at temperature 1. They are cut after MAX_NEW_TOKENS tokens.

    prompt_texts: prompts of the language. seed: decides all random numbers.

    Returns, for each prompt, the list of its letters. The caller's random state is left as it was.
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
                num_return_sequences=SAMPLES_PER_PROMPT,
            )
            responses = output[:, prompt_ids.shape[1] :].view(len(batch), SAMPLES_PER_PROMPT, -1).tolist()
            sampled += [
                [_letter(prompt, ids, tokenizer) for ids in of_prompt]
                for prompt, of_prompt in zip(batch, responses, strict=True)
            ]
    return sampled


def _letter(prompt: str, ids: list[int], tokenizer: PreTrainedTokenizerFast) -> Letter:
    """Returns the letter with these token ids. What follows the first end of text is padding."""
    finished = tokenizer.eos_token_id in ids
    if finished:
        ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
    response = str(tokenizer.decode(ids, skip_special_tokens=True))
    return Letter(prompt=prompt, response=response, finished=finished, num_tokens=len(ids))


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the policy's tokenizer, which has one token for each word of the language.

    It decodes a response with a space before it, so that the text can be appended to its prompt as it is.
    """
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS.values(), *letters.WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Replace(Regex("^"), " ")
    return _wrapped(tokenizer)


def _byte_pair_tokenizer(texts: list[str], settings: LettersSettings) -> PreTrainedTokenizerFast:
    """Returns the reward model's tokenizer, whose tokens are pieces of words, learnt from `texts`."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.reward_vocabulary,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(set("".join(letters.WORDS)) | {"Ġ"}),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)
