"""Peak memory of a policy pass, forward and backward, with all logits at once and a chunk of tokens at a time.

    python benchmarks/large_vocabulary.py --activation-checkpointing --entropy    # writes docs/large_vocabulary.json
    python benchmarks/large_vocabulary.py --responses 16 --out result.json

The model has the shape of SmolLM2-135M (vocabulary 49,152) and random weights. Each way is measured in a process of its
own, as the peak of the resident memory minus what the process had before the pass. On a GPU it is torch's peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

OUT = Path(__file__).resolve().parents[1] / "docs" / "large_vocabulary.json"
VOCABULARY = 49_152


def measured(
    chunked: bool, responses: int, tokens: int, entropy: bool, activation_checkpointing: bool, tiny: bool = False
) -> dict[str, float]:
    """Runs one pass in this process. Returns {mib, seconds, sum}. tiny: two layers and 64 tokens, to see that it runs."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from r2m_async.models import policy
    from r2m_async.models.loading import checkpoint_activations
    from r2m_async.trajectories import Trajectory

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64 if tiny else VOCABULARY,
        hidden_size=576,
        num_hidden_layers=2 if tiny else 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    model = AutoModelForCausalLM.from_config(config).to(device).eval()
    if activation_checkpointing:
        checkpoint_activations(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # they belong to the learner either way
    if not chunked:
        policy.LOGITS_AT_ONCE = sys.maxsize
    prompt = tokens // 4
    batch = [
        Trajectory(
            token_ids=torch.randint(64 if tiny else VOCABULARY, (tokens,)),
            prompt_len=prompt,
            behaviour_logprobs=torch.zeros(tokens),
            policy_versions=torch.zeros(tokens, dtype=torch.int32),
            finish_reason="length",
            text="",
        )
        for _ in range(responses)
    ]
    before, began = peak_mib(device), time.perf_counter()
    logprobs, _, entropies = policy.policy_pass(model, batch, 1.0, entropy=entropy)
    total = logprobs.sum() + (entropies.sum() if entropies is not None else 0)
    total.backward()
    return {
        "mib": round(peak_mib(device) - before),
        "seconds": round(time.perf_counter() - began, 1),
        "sum": round(total.item(), 1),
    }


def peak_mib(device: str) -> float:
    """Returns the most memory in use so far, in MiB."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument(
        "--tokens", type=int, default=256, help="of a prompt with its response; a quarter is the prompt"
    )
    parser.add_argument("--entropy", action="store_true", help="compute entropies, too")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--way", choices=("whole", "chunked"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    how = (options.responses, options.tokens, options.entropy, options.activation_checkpointing)
    if options.way:
        print(json.dumps(measured(options.way == "chunked", *how)))
        return
    results = {}
    for way in ("whole", "chunked"):
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[way] = json.loads(told.splitlines()[-1])
        print(f"{way:8}  {results[way]['mib']} MiB  {results[way]['seconds']} s")
    results["ratio"] = round(results["chunked"]["mib"] / results["whole"]["mib"], 3)
    print(f"chunked / whole: {results['ratio']}")
    names = ("responses", "tokens", "entropy", "activation_checkpointing")
    settings = {name: getattr(options, name) for name in names}
    options.out.write_text(json.dumps(settings | results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
