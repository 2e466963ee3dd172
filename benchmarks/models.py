"""Which families of models run on which engine: `python benchmarks/models.py [--json FILE] [--only NAME ...]`.

Each family is a tiny random model whose peculiarities matter: caps and scales of logits, sliding windows shorter than the
texts, biases, padded vocabularies. A run trains it for two synchronous steps in one process. In the first step the engine
has the files' weights, in the second those that the learner sent. Per step two numbers are measured: the largest
difference between the learner's and the engine's log-probabilities of the sampled tokens, and that between their hidden
states, divided by the root mean square of the states. A family that an engine refuses has the error instead.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from r2m_async.config import R2MConfig
from r2m_async.cpu_threads import one_thread
from r2m_async.launch.ring import Ring
from r2m_async.models.loading import load_policy
from r2m_async.models.policy import group_feedback
from r2m_async.models.pretrained import quiet
from r2m_async.models.weights import load_weights, named_weights

PAST = {"sliding_window": 8}
"""A window that every text outgrows."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> model type in transformers, its keys in config.json
    "Llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("mistral", {"head_dim": 32, **PAST}),
    "Qwen2": ("qwen2", {}),
    "Qwen2 with windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **PAST}),
    "Qwen3": ("qwen3", {"head_dim": 32}),
    "Qwen3 with biases": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "Qwen3-MoE": (
        "qwen3_moe",
        {"head_dim": 32, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    ),
    "Gemma": ("gemma", {"head_dim": 64}),
    "Gemma 2": (
        "gemma2",
        {
            "head_dim": 64,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 48,
            **PAST,
        },
    ),
    "Gemma 3": (
        "gemma3_text",
        {
            "head_dim": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 48,
            **PAST,
        },
    ),
    "GPT-NeoX": ("gpt_neox", {"rotary_pct": 0.25}),
    "GPT-NeoX, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "GPT-2": ("gpt2", {}),
    "OPT": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "Phi": ("phi", {"partial_rotary_factor": 0.5}),
    "Phi-3": ("phi3", PAST),
    "BLOOM": ("bloom", {"hidden_size": 96, "num_attention_heads": 3}),  # slopes of no power of two
    "Cohere": ("cohere", {"logit_scale": 0.5}),
    "Granite": (
        "granite",
        {
            "logits_scaling": 4.0,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
}
_EQUAL_HEADS = ("gpt_neox", "gpt2", "opt", "bloom")
"""Model types without groups of query heads."""
_EAGER = ("Gemma 2", "BLOOM")
"""Families that transformers' `sdpa` does not compute."""
_WORDS = ("the", "a", "river", "stone", "wind", "old", "warm", "sings", "falls", "softly")
_PADDING = 13
"""Rows of the embedding beyond the tokenizer's tokens. The number of rows is then no multiple of anything, either."""


def save_model(directory: Path, name: str, tied: bool, classifier: bool = False) -> str:
    """Saves a tiny random model of a family with a tokenizer. Returns the directory."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [prefix + word for word in _WORDS for prefix in ("", "Ġ")]
    tokens = dict.fromkeys(["<pad>", "</s>", *letters, *words])
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(directory)
    kind, own = FAMILIES[name]
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    if kind not in _EQUAL_HEADS:
        sizes["num_key_value_heads"] = 1
    if kind not in ("gpt2", "bloom", "opt"):
        sizes["intermediate_size"] = 128
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    keys = sizes | ends | own | ({"num_labels": 1} if classifier else {})
    config = AutoConfig.for_model(kind, vocab_size=len(tokens) + _PADDING, tie_word_embeddings=tied, **keys)
    torch.manual_seed(1)
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # or all tokens would be about as likely
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape))  # or biases would be 0, and norms 1
    with quiet():
        model.save_pretrained(directory)
    return str(directory)


def attention_of(name: str) -> str:
    """The value of `model.attention` for a family."""
    return "eager" if name in _EAGER else "sdpa"


def config_of(policy: str, reward_model: str, prompts: str, engine: str, attention: str) -> R2MConfig:
    """Two synchronous steps. Responses end late, because one token of three hundred ends them."""
    return R2MConfig.from_dict(
        {
            "run": {"num_steps": 2, "seed": 1, "device": "cpu"},
            "model": {"policy": policy, "attention": attention},
            "reward": {"model": reward_model},
            "data": {"prompts": prompts},
            "rollouts": {
                "engine": engine,
                "prompts_per_step": 2,
                "group_size": 3,
                "max_new_tokens": 20,
                "max_prompt_tokens": 24,
            },
            "head": {"width": 16},
            "learner": {"lr": 1e-3},
        }
    )


def save_inputs(directory: Path) -> tuple[str, str]:
    """Saves a reward model and prompts. Returns their paths."""
    prompts = directory / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"the {one} {other} {one}"}) for one in _WORDS[2:6] for other in _WORDS[5:]]
    prompts.write_text("\n".join(lines))
    return save_model(directory / "reward", "Llama", False, classifier=True), str(prompts)


def measure(config: R2MConfig) -> dict[str, Any]:
    """Runs the ring of a config in this process.

    Returns `mismatch` and `states`, each with a number per step (see above), and `still`: the weights that training did
    not move.
    """
    with one_thread(), Ring.of(config, in_process=True) as ring:
        engine = ring.controller.stages.rollouts[0].carrier.stage.engine
        loaded, generated, steps = [None], [], []
        load, generate = engine.load, engine.generate

        def listen_load(weights, *args):
            loaded.append(weights)
            return load(weights, *args)

        def listen_generate(ticket):
            generated.append((len(loaded) - 1, generate(ticket)))
            return generated[-1][1]

        engine.load, engine.generate = listen_load, listen_generate
        try:
            while not ring.finished:
                steps.append(ring.step())
            moved = ring.policy_weights().tensors
        finally:
            getattr(engine, "close", lambda: None)()
        model = load_policy(config.model.policy, config)
        first = named_weights(model, 0).tensors
        states: dict[int, float] = {}
        for index, (group, feedback) in generated:
            if loaded[index] is not None:
                load_weights(model, loaded[index])
            own = group_feedback(model, group.finished(), config, 0).hidden_states
            size = torch.cat(own).square().mean().sqrt()
            worst = max((a - b).abs().max() / size for a, b in zip(own, feedback.hidden_states, strict=True))
            step = group.ticket.due_step
            states[step] = max(states.get(step, 0.0), worst.item())
    return {
        "mismatch": [metrics["policy/mismatch_max"] for metrics in steps],
        "states": [states[step] for step in sorted(states)],
        "still": sorted(name for name, tensor in first.items() if torch.equal(tensor, moved[name])),
    }


def rows(only: list[str], engines: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures every family, tied and untied, on every engine."""
    with tempfile.TemporaryDirectory() as folder:
        reward_model, prompts = save_inputs(Path(folder))
        for name in only or FAMILIES:
            for tied in (True, False):
                policy = save_model(Path(folder, f"{name}-{tied}"), name, tied)
                for engine in engines:
                    try:
                        result = measure(config_of(policy, reward_model, prompts, engine, attention_of(name)))
                    except Exception as error:
                        result = {"error": f"{type(error).__name__}: {error}".replace(policy, name)}
                    yield f"{name}, {'tied' if tied else 'untied'}, {engine}", result


def table(results: dict[str, dict[str, Any]]) -> str:
    """The measurements as a table in Markdown: the larger number of the two steps each, or how the run was refused."""

    def told(result: dict[str, Any], what: str) -> str:
        if "error" in result:
            return "computes another model" if "computes another model" in result["error"] else "does not start"
        return f"{max(result[what]):.0e}"

    lines = [
        "| family | embeddings | transformers: log-probabilities | vLLM: log-probabilities | vLLM: states |",
        "|---|---|---:|---:|---:|",
    ]
    for name in FAMILIES:
        for tied in ("tied", "untied"):
            plain, engine = (results[f"{name}, {tied}, {one}"] for one in ("transformers", "vllm"))
            states = "" if "error" in engine else told(engine, "states")
            lines.append(f"| {name} | {tied} | {told(plain, 'mismatch')} | {told(engine, 'mismatch')} | {states} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", choices=[*FAMILIES])
    parser.add_argument("--engines", nargs="*", default=["transformers", "vllm"])
    options = parser.parse_args()
    results = {}
    for name, result in rows(options.only, options.engines):
        results[name] = result
        print(name, json.dumps(result), flush=True)
    if not options.only and len(options.engines) == 2:
        print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
