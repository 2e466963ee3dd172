"""Trains with TRL's RLOOTrainer on a CPU, for `end_to_end.py`, which runs this in TRL's own environment.

    python benchmarks/trl_rloo.py SETTING    # JSON, see `trl_rate` there

The last line of its output is a JSON object: the responses per second after the first steps.
"""

import json
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer


class Clock(TrainerCallback):
    """Notes when each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    setting = json.loads(sys.argv[1])
    torch.set_num_threads(setting["threads"])
    clock = Clock()
    trainer = RLOOTrainer(
        model=setting["policy"],
        reward_funcs=setting["reward_model"],
        args=RLOOConfig(
            output_dir=setting["output"],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=setting["responses"],
            gradient_accumulation_steps=1,
            num_generations=setting["group_size"],
            max_completion_length=setting["max_new_tokens"],
            temperature=setting["temperature"],
            num_iterations=setting["epochs"],
            beta=setting["kl_coef"],
            learning_rate=setting["lr"],
            lr_scheduler_type="constant",
            max_steps=setting["steps"] * setting["epochs"],
            seed=setting["seed"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": setting["prompts"]}),
        processing_class=AutoTokenizer.from_pretrained(setting["policy"], padding_side="left"),
        callbacks=[clock],
    )
    trainer.train()
    # One optimizer step for each epoch on a batch of responses.
    first = setting["warm_up"] * setting["epochs"] - 1
    seconds = clock.ends[-1] - clock.ends[first]
    responses = (len(clock.ends) - 1 - first) / setting["epochs"] * setting["responses"]
    print(json.dumps({"responses_per_s": responses / seconds}))


if __name__ == "__main__":
    main()
