"""What the config of a resumed run may say otherwise than that of the run that saved the checkpoint.

Whatever decides which prompts there are, what is sampled, how it is rewarded and what is learnt from it stays: a key is
refused unless it stands here. docs/checkpoints.md says why each may change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from r2m_async.config import ConfigTree, R2MConfig
from r2m_async.errors import ConfigError

MAY_CHANGE = (
    "run.name",
    "run.num_steps",
    "run.output_dir",
    "run.device",
    "model.attention",
    "reward.replicas",
    "head.lr",
    "rollouts.num_actors",
    "rollouts.concurrent_groups",
    "rollouts.tensor_parallel",
    "rollouts.engine_options.gpu_memory_utilization",
    "rollouts.engine_options.kv_cache_memory_bytes",
    "rollouts.engine_options.max_num_seqs",
    "rollouts.engine_options.max_num_batched_tokens",
    "rollouts.engine_options.enforce_eager",
    "rollouts.max_restarts",
    "rollouts.hang_after",
    "scheduling.overage_after",
    "scheduling.stall_after",
    "queue.max_bytes",
    "objective.kl_stop",
    "critic.lr",
    "learner.num_ranks",
    "learner.zero_stage",
    "learner.zero_options",
    "learner.offload",
    "learner.activation_checkpointing",
    "learner.lr",
    "learner.schedule",
    "learner.warmup",
    "learner.weight_decay",
    "learner.max_grad_norm",
    "learner.tokens_per_microbatch",
    "learner.packing",
    "learner.on_nonfinite",
    "weights.*",
    "evaluation.*",
    "checkpoint.*",
    "logging.*",
)
"""Keys of the config; `*` stands for all of a section's. Some decide besides what may not change: `_facts` has that too."""


REWARD_MODEL_MAY_CHANGE = (
    "run.name",
    "run.output_dir",
    "run.device",
    "model.attention",
    "ensemble.*",
    "optimizer.lr",
    "optimizer.warmup",
    "optimizer.weight_decay",
    "optimizer.max_grad_norm",
    "optimizer.epochs",
    "optimizer.tokens_per_microbatch",
    "data.*",
    "evaluation.*",
    "checkpoint.*",
    "logging.*",
)
"""Of `r2m reward-model resume`. The pairs themselves are compared, and so where they come from is not."""


def check_resumable(directory: Path, saved: R2MConfig, config: R2MConfig) -> None:
    """Raises ConfigError naming the key and both values, also where DeepSpeed cannot share out anew what was saved."""
    refuse_changes(directory, dict(_facts(saved)), dict(_facts(config)), MAY_CHANGE)
    _check_sharing(directory, saved, config)


def refuse_changes(directory: Path, was: dict[str, Any], now: dict[str, Any], may_change: Sequence[str]) -> None:
    """Compares what two configs say by key. Raises ConfigError."""
    for key in dict.fromkeys((*was, *now)):
        if was.get(key) != now.get(key) and not any(fnmatchcase(key, pattern) for pattern in may_change):
            raise ConfigError(
                f"{directory} was saved with {key} = {was.get(key)}, and the config has {now.get(key)}: resume with the same"
            )


def keys_of(config: ConfigTree) -> dict[str, Any]:
    """Values by `section.key`."""
    return {f"{section}.{key}": value for section, fields in config.to_dict().items() for key, value in fields.items()}


def _facts(config: R2MConfig) -> Iterator[tuple[str, Any]]:
    """Every key and its value, and what keys that may change decide about others."""
    for key, value in keys_of(config).items():
        if key == "rollouts.engine_options":  # some of which are about memory alone
            yield from ((f"{key}.{option}", value[option]) for option in value)
        elif key == "head.omega_horizon":
            yield key, config.omega_horizon if config.reads_feedback else None
        else:
            yield key, value
    data, evaluation = config.data, config.evaluation
    from_prompts = bool(evaluation.every) and data.eval is None and data.prompts != "embedded"
    held_back = evaluation.num_prompts if from_prompts else 0
    yield "prompts held back (evaluation.num_prompts, where evaluation.every is set and data.eval is not)", held_back


def _check_sharing(directory: Path, saved: R2MConfig, config: R2MConfig) -> None:
    was, now = saved.learner.zero_stage, config.learner.zero_stage
    if was != now and {was, now} != {1, 2}:
        raise ConfigError(
            f"{directory} was saved with learner.zero_stage = {was}, and the config has {now}: DeepSpeed changes "
            f"between stages 1 and 2 alone (and the number of ranks in any); resume with {'1 or 2' if was in (1, 2) else was}"
        )
    sharing = ("num_ranks", "zero_stage", "zero_options", "offload")
    before, after = ({key: getattr(one.learner, key) for key in sharing} for one in (saved, config))
    if before != after and any(one["zero_options"].get("round_robin_gradients") for one in (before, after)):
        raise ConfigError(
            f"{directory} was saved with learner.zero_options = {before['zero_options']}, and the config has "
            f"{after['zero_options']}: DeepSpeed cannot share out anew what round_robin_gradients reorders; resume with "
            f"the same {', '.join(sharing)}"
        )
