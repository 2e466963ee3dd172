"""Writes the model cards of an export: README.md with the metadata that Hugging Face's Hub reads.

A card says what is known: the run's method, its step, and what its evaluation measured. What only the user knows, such as a
licence and the data, it names as missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from r2m_async.config import R2MConfig
from r2m_async.yaml_tree import write_yaml

_MEASURED = {
    "reward": "the whole reward",
    "proxy": "reward of the head at that step",
    "frozen": "reward of the reward model as it came",
    "gold": "gold reward, which training never sees",
    "length": "tokens of a response",
}


def model_card(what: str, config: R2MConfig, step: int, base: str | None, evaluation: Mapping[str, Any] | None) -> str:
    """Returns the card of one of the models of an export.

    Args:
        what: `policy` or `reward model`.
        config: of the run.
        step: the step of the weights.
        base: the name of the model that the run started from, if it means the same elsewhere.
        evaluation: the last record of evaluation.jsonl up to that step, if there is one.
    """
    is_policy = what == "policy"
    metadata: dict[str, Any] = {"library_name": "transformers", "tags": ["rlhf", "r2m-async"]}
    metadata["pipeline_tag"] = "text-generation" if is_policy else "text-classification"
    if base is not None and base.count("/") == 1:
        metadata["base_model"] = base
    started = f"`{base}`" if base is not None else "a model of its own machine, or one that was made there"
    trained = f"Trained for {step} of {config.run.num_steps} steps" if is_policy else f"Taken after step {step}"
    lines = [
        f"# {config.run.name}: {what}",
        "",
        f"{trained} of a run of r2m-async, RLHF in which the reward model keeps learning while the policy moves. "
        f"It started from {started}.",
        "",
        "| | |",
        "|---|---|",
        f"| `head.variant` | `{config.head.variant}` |",
        f"| `advantage.name` | `{config.advantage.name}` |",
        f"| `objective.kl_coef` | {config.objective.kl_coef:g} |",
        f"| ages of policy and head | at most {config.scheduling.max_policy_age} and {config.scheduling.max_head_age} steps |",
        f"| seed | {config.run.seed} |",
    ]
    if not is_policy and config.head.variant not in ("vanilla", "iterative_head", "iterative_model"):
        lines += [
            "",
            "Its head reads the policy's hidden states. `RewardScorer` of `r2m_async.export` scores with both.",
        ]
    if evaluation is not None:
        lines += [
            "",
            f"Held-out prompts, policy of step {evaluation['step']:.0f}, mean ± standard error:",
            "",
            "| | |",
            "|---|---|",
        ]
        for name, meaning in _MEASURED.items():
            if math.isfinite(value := evaluation.get(name, math.nan)):
                error = evaluation.get(f"{name}_se", math.nan)
                lines.append(f"| {meaning} | {value:.3f}" + (f" ± {error:.3f} |" if math.isfinite(error) else " |"))
    lines += ["", "Not said here, because the run does not know it: the licence, the data, the intended use.", ""]
    return f"---\n{write_yaml(metadata)}---\n\n" + "\n".join(lines)
