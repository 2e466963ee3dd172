"""A first config for a policy, a reward model and hardware. `r2m init` writes it, and `r2m check` accepts it.

It takes what it must know from the models' files, and refuses to guess what it cannot know: a model that is not on this
machine, the prompts, and the memory of GPUs that are not here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from r2m_async.config import R2MConfig
from r2m_async.config_reference import commented
from r2m_async.errors import ConfigError
from r2m_async.from_scratch.languages import refuse_other_languages
from r2m_async.launch.gpus import gpu_share
from r2m_async.launch.memory import classifier_shape, lacking, language_model_shape, processes
from r2m_async.launch.prompts import check_data
from r2m_async.launch.workload import check_models, hidden_size, worst_group_bytes
from r2m_async.models.pretrained import pretrained_config, pretrained_tokenizer

SMALLEST_QUEUE = 2**28
"""Bytes. A smaller queue would save nothing that matters."""


def initial_config(
    policy: str, reward: str, prompts: str | None, gpus: int, gpu_memory: float | None
) -> dict[str, dict[str, Any]]:
    """Returns the keys of a config by section.

    Args:
        policy: Hugging Face name or directory of the policy, or `embedded`.
        reward: that of the reward model, or `embedded`.
        prompts: the source of the prompts, as `data.prompts`. None only with `policy: embedded`.
        gpus: the number of GPUs. 0: the CPU.
        gpu_memory: GiB of one GPU. None: that of this machine's.

    Raises ConfigError for what cannot be known here, for models that do not fit into the memory, and with DataError whatever
    `r2m check` raises for these models and prompts.
    """
    for option, name in (("--policy", policy), ("--reward", reward)):
        refuse_other_languages(option, name)
    if "embedded" in (policy, reward):
        if (policy, reward) != ("embedded", "embedded"):
            raise ConfigError(
                f"--policy {policy} --reward {reward}: the embedded models read the embedded language alone; name both or "
                f"neither"
            )
        return {
            "run": {"name": "first", "num_steps": 80, "device": "cuda" if gpus else "cpu"},
            "model": {"policy": policy},
            "reward": {"model": reward},
            "data": {"prompts": prompts or "embedded"},
            "rollouts": {"max_prompt_tokens": 16, "max_new_tokens": 40},
            "scheduling": {"max_policy_age": 1, "max_head_age": 1},
            "objective": {"kl_coef": 0.005},
            "learner": {"lr": 5e-5},
            "head": {"width": 96, "lr": 5e-5},
            "evaluation": {"every": 20, "gold": "r2m_async.from_scratch.language:gold_reward"},
        }
    if prompts is None:
        raise ConfigError(
            "--prompts is not given, and a config cannot guess them; name a file or a data set (docs/data.md)"
        )
    for option, key, name in (("--policy", "model.policy", policy), ("--reward", "reward.model", reward)):
        if hidden_size(key, name, fetch=False) is None:
            raise ConfigError(
                f"{option} {name}: is no directory, and not on this machine, so its size and its tokenizer are not known; "
                f"download it first (`hf download {name}`), or correct the name"
            )
    memory = _gpu_memory(gpus, gpu_memory)
    tree = _tree(policy, reward, prompts, gpus)
    # Each of these takes less memory than the one before, and costs more.
    for change in ({}, {"activation_checkpointing": True}, {"lora": {"rank": 16, "alpha": 32}}):
        tree["model" if "lora" in change else "learner"].update(change)
        if "lora" in change:
            tree["learner"]["lr"] = 2e-5
        config = R2MConfig.from_dict(tree)
        shapes = language_model_shape("model.policy", policy, config), classifier_shape(reward, config)
        group = worst_group_bytes(config, shapes[0].width, shapes[1].width, greedy_twin=False)
        steps = config.scheduling.max_policy_age + 1
        tree["queue"] = {"max_bytes": max(SMALLEST_QUEUE, 2 * steps * config.rollouts.prompts_per_step * group)}
        config = R2MConfig.from_dict(tree)
        found = processes(config, *shapes, None, group)
        too_large = lacking(found, memory, gpus, gpu_share(config, gpus))
        if not too_large:
            readers, _ = check_models(config, {"model.policy": policy, "reward.model": reward})
            check_data(config, readers, lambda line: None)
            return tree
    raise ConfigError("\n".join(f"the models do not fit, even with adapters: {line}" for line in too_large))


def written(tree: dict[str, dict[str, Any]], out: Path | None) -> str:
    """Returns the text of a config file: the keys with their docs as comments.

    out: the file that the text is for, to name in it. None: none.
    """
    name = out or "CONFIG"
    return (
        f"# Written by `r2m init`. `r2m check {name}` says what it takes, `r2m train {name}` runs it, and\n"
        f"# `r2m config --explain KEY` explains a key. Learning rates, lengths and numbers of responses are a beginning,\n"
        f"# and not tuned to these models.\n" + commented(R2MConfig, tree)
    )


def _gpu_memory(gpus: int, given: float | None) -> dict[str, float]:
    """The bytes of this machine, or those of a GPU. Raises ConfigError if they cannot be known."""
    import psutil
    import torch

    if not gpus:
        return {"machine": float(psutil.virtual_memory().total)}
    if given is not None:
        return {"GPU": given * 2**30}
    if torch.cuda.is_available():
        return {"GPU": float(torch.cuda.get_device_properties(0).total_memory)}
    raise ConfigError(
        f"--gpus {gpus}: this machine has no GPU, so the memory of one is not known; say it by --gpu-memory GIB"
    )


def _tree(policy: str, reward: str, prompts: str, gpus: int) -> dict[str, dict[str, Any]]:
    """The keys of a config by section, before anything is made smaller."""
    positions = [
        getattr(pretrained_config(key, name, fetch=False).get_text_config(), "max_position_embeddings", None) or 1024
        for key, name in (("model.policy", policy), ("reward.model", reward))
    ]
    tokens = min(512 if gpus else 128, min(positions) // 2)
    ranks = max(1, (gpus - 1) // 2)  # one GPU is the reward model's, and the engines have the rest
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "first", "num_steps": 100, "device": "cuda" if gpus else "cpu"},
        "model": {"policy": policy, "dtype": "bfloat16" if gpus else "float32"},
        "reward": {"model": reward, "dtype": "bfloat16" if gpus else "float32"},
        "data": {
            "prompts": prompts,
            "chat": pretrained_tokenizer("model.policy", policy).chat_template is not None,
            "on_bad_record": "skip",
        },
        "rollouts": {
            "engine": "vllm" if gpus else "transformers",
            "num_actors": max(1, gpus - 1 - ranks),
            "prompts_per_step": 32 if gpus else 4,
            "group_size": 8 if gpus else 4,
            "max_prompt_tokens": tokens,
            "max_new_tokens": tokens,
        },
        "scheduling": {"max_policy_age": 1, "max_head_age": 1},
        "advantage": {"name": "rloo"},
        "learner": {"lr": 1e-6, "tokens_per_microbatch": 8192 if gpus else 1024},
        "head": {"variant": "r2m", "width": 2048 if gpus else 256},
        "checkpoint": {"every": 20},
    }
    if gpus:  # the transformers engine on a CPU chooses itself
        tree["rollouts"]["concurrent_groups"] = 8
    if ranks > 1:
        tree["learner"] |= {"backend": "deepspeed", "num_ranks": ranks, "zero_stage": 2}
    return tree
