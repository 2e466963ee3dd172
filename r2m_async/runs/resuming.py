"""Says which keys of the config a resumed run may change.

A key must not change if it decides which prompts there are, what is sampled, how responses are rewarded, or what is
learnt from them. So every key must stay as it was, except those in the lists below. docs/checkpoints.md says why each
of them may change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from r2m_async.config import ConfigTree, R2MConfig
from r2m_async.config_sections import EMBEDDED_GOLD
from r2m_async.errors import ConfigError

MAY_CHANGE = (
    "run.name",
    "run.num_steps",
    "run.output_dir",
    "run.max_restarts",
    "run.device",
    "model.attention",
    "reward.replicas",
    "reward.max_voided",
    "head.lr",
    "labels.options",
    "labels.timeout",
    "labels.max_failed",
    "rollouts.num_actors",
    "rollouts.min_actors",
    "rollouts.concurrent_groups",
    "rollouts.tensor_parallel",
    "rollouts.engine_options.gpu_memory_utilization",
    "rollouts.engine_options.kv_cache_memory_bytes",
    "rollouts.engine_options.max_num_seqs",
    "rollouts.engine_options.max_num_batched_tokens",
    "rollouts.engine_options.enforce_eager",
    "rollouts.max_restarts",
    "rollouts.retries",
    "rollouts.hang_after",
    "rollouts.function_timeout",
    "scheduling.overage_after",
    "scheduling.stall_after",
    "cluster.*",
    "queue.max_bytes",
    "queue.journal",
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
    "learner.max_mismatch",
    "learner.on_nonfinite",
    "weights.*",
    "evaluation.*",
    "checkpoint.*",
    "logging.*",
)
"""The keys that a resumed run may change. `*` stands for all keys of a section.

Some of them also decide something that must not change. `_facts` adds that as a fact of its own, which is compared.
"""


REWARD_MODEL_MAY_CHANGE = (
    "run.name",
    "run.output_dir",
    "run.device",
    "model.attention",
    "ensemble.*",
    "optimizer.lr",
    "optimizer.schedule",
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
"""The keys that `r2m reward-model resume` lets change. `data.*` may, because the pairs themselves are compared."""


def check_resumable(directory: Path, saved: R2MConfig, config: R2MConfig) -> None:
    """Checks that a run with `config` may go on from a checkpoint of a run with the config `saved`.

    directory: the checkpoint, for messages.

    Raises ConfigError if a key was changed that must stay, or if DeepSpeed cannot spread the saved state over the new
    ranks. The message names the key and both values.
    """
    refuse_changes(directory, dict(_facts(saved)), dict(_facts(config)), MAY_CHANGE)
    _check_sharing(directory, saved, config)


def refuse_changes(directory: Path, was: dict[str, Any], now: dict[str, Any], may_change: Sequence[str]) -> None:
    """Raises ConfigError, which names the key and both values, for a changed key that may not change.

    directory: the checkpoint, for the message. was, now: values by `section.key`. may_change: patterns of keys.
    """
    for key in dict.fromkeys((*was, *now)):
        if was.get(key) != now.get(key) and not any(fnmatchcase(key, pattern) for pattern in may_change):
            raise ConfigError(
                f"{directory} was saved with {key} = {was.get(key)}, and the config has {now.get(key)}: resume with the same"
            )


def changes(was: R2MConfig, now: R2MConfig) -> dict[str, list[Any]]:
    """Returns the keys in which two configs differ, as [value in `was`, value in `now`] by `section.key`."""
    before, after = keys_of(was), keys_of(now)
    return {key: [before[key], after[key]] for key in after if before[key] != after[key]}


def keys_of(config: ConfigTree) -> dict[str, Any]:
    """Returns the values of a config by `section.key`."""
    return {f"{section}.{key}": value for section, fields in config.to_dict().items() for key, value in fields.items()}


def _facts(config: R2MConfig) -> Iterator[tuple[str, Any]]:
    """Yields what is compared, as (name, value): every key, with the following three exceptions.

    Each of `rollouts.engine_options` is compared by itself. For `head.omega_horizon` it is the horizon that results.
    And keys that may change decide how many prompts are held back from training, so that number is compared too.
    """
    for key, value in keys_of(config).items():
        if key == "rollouts.engine_options":  # some of them concern memory alone, and may change
            yield from ((f"{key}.{option}", value[option]) for option in value)
        elif key == "head.omega_horizon":
            # Without a value it follows run.num_steps, which may change. The horizon that results may not.
            yield key, config.omega_horizon if config.reads_feedback else None
        else:
            yield key, value
    data, evaluation = config.data, config.evaluation
    from_prompts = bool(evaluation.every) and data.eval is None and data.prompts not in EMBEDDED_GOLD
    held_back = evaluation.num_prompts if from_prompts else 0
    yield "prompts held back (evaluation.num_prompts, where evaluation.every is set and data.eval is not)", held_back


def _check_sharing(directory: Path, saved: R2MConfig, config: R2MConfig) -> None:
    """Raises ConfigError if DeepSpeed cannot load the saved optimizer state under the new `learner` keys."""
    was, now = saved.learner.zero_stage, config.learner.zero_stage
    if was != now and {was, now} != {1, 2}:
        raise ConfigError(
            f"{directory} was saved with learner.zero_stage = {was}, and the config has {now}: DeepSpeed can "
            f"resume a checkpoint in another stage only between 1 and 2; resume with {'1 or 2' if was in (1, 2) else was}"
        )
    sharing = ("num_ranks", "zero_stage", "zero_options", "offload")
    before, after = ({key: getattr(one.learner, key) for key in sharing} for one in (saved, config))
    if before != after and any(one["zero_options"].get("round_robin_gradients") for one in (before, after)):
        raise ConfigError(
            f"{directory} was saved with learner.zero_options = {before['zero_options']}, and the config has "
            f"{after['zero_options']}: with round_robin_gradients DeepSpeed cannot share out a checkpoint in another way; "
            f"resume with the same {', '.join(sharing)}"
        )
