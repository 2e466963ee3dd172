"""How long the policy learner stands still while a version is copied out of it: `python benchmarks/publication.py [--steps 8]`.

The ring on Ray with a policy of 29M parameters and staleness of one step, on torch and on DeepSpeed with every ZeRO stage, two
ranks. `publish` is from the end of a step to the version's being loadable, `stall` what of it the learner's next step
had to wait for: seconds, and as shares of a step. In stage 3 nothing runs beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForSequenceClassification
from vllm_engine import SHAPES, make_model

from r2m_async.config import R2MConfig
from r2m_async.launch.ring import Ring

WARM_UP = 2


def reward_model(directory: Path) -> str:
    """Small, and with the policy's tokenizer."""
    make_model(directory, SHAPES["tiny, D 128"])
    config = AutoConfig.from_pretrained(directory, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    return str(directory)


def measured(config: R2MConfig) -> dict[str, float]:
    with Ring.of(config) as ring:
        steps = [ring.step() for _ in range(config.run.num_steps)][WARM_UP:]
    medians = {
        name: statistics.median(one[f"time/{name}"] for one in steps) for name in ("publish", "publish_stall", "step")
    }
    return medians | {"stall_share": medians["publish_stall"] / medians["step"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        prompts = Path(directory, "prompts.jsonl")
        prompts.write_text("\n".join(json.dumps({"prompt": f"{index:06d}"}) for index in range(64)))
        base = R2MConfig.from_dict(
            {
                "run": {"num_steps": parsed.steps},
                "model": {"policy": make_model(Path(directory, "policy"), SHAPES["29M, D 512"])},
                "reward": {"model": reward_model(Path(directory, "reward"))},
                "data": {"prompts": str(prompts)},
                "rollouts": {"prompts_per_step": 4, "group_size": 4, "max_prompt_tokens": 8, "max_new_tokens": 32},
                "scheduling": {"max_policy_age": 1, "max_head_age": 1},
                "head": {"width": 64},
            }
        )
        for stage in (None, 0, 1, 2, 3):
            name, config = "torch", base
            if stage is not None:
                name, config = f"stage {stage}", base.learner(backend="deepspeed", num_ranks=2, zero_stage=stage)
            results[name] = measured(config)
    table = Table("learner", "publish s", "stall s", "step s", "stall / step")
    for name, row in results.items():
        table.add_row(
            name, *(f"{row[key]:.3f}" for key in ("publish", "publish_stall", "step")), f"{row['stall_share']:.1%}"
        )
    Console().print(table)
    if parsed.json:
        parsed.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
