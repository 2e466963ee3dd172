"""The rules that must hold between keys of a config. Each rule is a function.

The arguments of a rule are sections of the config, and have the names of the sections. A rule returns None if it holds.
Otherwise it returns a message with both keys, both values, the reason and a remedy, and a line for each key that breaks
it. All rules are asked, so the user learns of all mistakes at once.

Rules about models, data sets and advantage estimators are not here but in `launch.workload`, because these must first
be looked up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from r2m_async.config_records import one_name_for_the_prompt
from r2m_async.config_sections import (
    EMBEDDED_GOLD,
    DataSection,
    EvaluationSection,
    HeadSection,
    LabelsSection,
    LearnerSection,
    ModelSection,
    ObjectiveSection,
    RewardSection,
    RolloutsSection,
    RunSection,
    SchedulingSection,
    WeightsSection,
)
from r2m_async.config_tree import Rule, Section, one_per_line


def changed(section: Section, *keys: str) -> list[str]:
    """Returns those of the named keys of a section whose values are not the defaults."""
    defaults = type(section).model_fields
    return [key for key in keys if getattr(section, key) != defaults[key].get_default(call_default_factory=True)]


# Rollout actors


def no_more_actors_are_asked_for_than_there_are(rollouts: RolloutsSection) -> str | None:
    """The fleet never has more actors than `num_actors`."""
    if rollouts.min_actors is None or rollouts.min_actors <= rollouts.num_actors:
        return None
    return (
        f"rollouts.min_actors is {rollouts.min_actors} and rollouts.num_actors is {rollouts.num_actors}: the run could "
        f"never go on; lower min_actors, or raise num_actors"
    )


# Where it is written


def runs_are_written_to_a_disk(run: RunSection) -> str | None:
    """A run directory is on a disk, because a checkpoint becomes whole by renaming a directory."""
    if "://" not in run.output_dir:
        return None
    return (
        f"run.output_dir is {run.output_dir!r}, a URL: a checkpoint becomes whole by renaming a directory, and storage of "
        f"objects has no such step; name a directory on a disk that all nodes see (docs/cluster.md), and copy what is done"
    )


# The schedule


def exact_lag_cuts_nothing_off(scheduling: SchedulingSection) -> str | None:
    """Under `lag: exact` no group may be cut off as late, because that depends on the time."""
    if scheduling.lag != "exact" or scheduling.overage == "wait":
        return None
    return (
        f"scheduling.overage is {scheduling.overage!r} and scheduling.lag is 'exact': which groups are late depends on "
        f"the time, so the run could not be repeated; use overage 'wait' or lag 'bounded'"
    )


def exact_lag_takes_one_group_at_a_time(rollouts: RolloutsSection, scheduling: SchedulingSection) -> str | None:
    """Under `lag: exact` an actor generates one group at a time, with one version. A batch would round differently."""
    if scheduling.lag != "exact":
        return None
    at_once = ["concurrent_groups"] if (rollouts.concurrent_groups or 1) > 1 else []
    return one_per_line(
        f"rollouts.{key} is {getattr(rollouts, key)} and scheduling.lag is 'exact': a run gives the same bits "
        f"again only if an actor generates one group at a time, with one version; leave rollouts.{key} out, or use "
        f"lag 'bounded'"
        for key in [*at_once, *changed(rollouts, "in_flight_updates")]
    )


def exact_lag_needs_one_rank(learner: LearnerSection, scheduling: SchedulingSection) -> str | None:
    """Under `lag: exact` the learner is one process, because sums over ranks are rounded in another way."""
    if learner.backend != "deepspeed" or scheduling.lag != "exact":
        return None
    return (
        "learner.backend is 'deepspeed' and scheduling.lag is 'exact': sums over ranks are not rounded as in one "
        "process; use backend 'torch' or lag 'bounded'"
    )


# Rollouts and their weights


def options_of_vllm_need_vllm(rollouts: RolloutsSection) -> str | None:
    """Keys that only a vllm engine reads need `engine: vllm`."""
    if rollouts.engine == "vllm":
        return None
    return one_per_line(
        f"rollouts.{key} is {getattr(rollouts, key)} and rollouts.engine is {rollouts.engine!r}: only engine 'vllm' "
        f"reads this key; use that engine, or leave rollouts.{key} out"
        for key in changed(rollouts, "tensor_parallel", "in_flight_updates", "engine_options")
    )


def options_of_a_rollout_function_need_one(rollouts: RolloutsSection) -> str | None:
    """Keys about `rollouts.function` need that function."""
    if rollouts.function is not None:
        return None
    return one_per_line(
        f"rollouts.{key} is {getattr(rollouts, key)} and rollouts.function is None: there is no function that it is about; "
        f"name one, or leave rollouts.{key} out"
        for key in changed(rollouts, "function_options", "function_timeout")
    )


def a_rollout_function_is_told_of_before_its_actor_is_killed(rollouts: RolloutsSection) -> str | None:
    """A function that hangs must end the run with its name, before the actor counts as hung and is replaced."""
    if rollouts.function is None or rollouts.function_timeout < rollouts.hang_after:
        return None
    return (
        f"rollouts.function_timeout is {rollouts.function_timeout:g} and rollouts.hang_after is {rollouts.hang_after:g}: an "
        f"actor whose function hangs would be killed before anybody is told why; use a smaller function_timeout, or a "
        f"larger hang_after"
    )


def turns_on_transformers_are_sampled_alone(rollouts: RolloutsSection) -> str | None:
    """With a rollout function the transformers engine has no batch, so several groups at once would gain nothing."""
    if rollouts.function is None or rollouts.engine == "vllm" or (rollouts.concurrent_groups or 1) == 1:
        return None
    return (
        f"rollouts.concurrent_groups is {rollouts.concurrent_groups} and rollouts.function is {rollouts.function!r}: engine "
        f"{rollouts.engine!r} samples the turns of a rollout function one at a time; use engine 'vllm', or leave "
        f"concurrent_groups out"
    )


def direct_transports_need_an_engine_that_receives(weights: WeightsSection, rollouts: RolloutsSection) -> str | None:
    """If the learner sends weights itself, the engine must be able to receive them. Only a vllm engine is."""
    if not weights.direct or rollouts.engine == "vllm":
        return None
    return (
        f"weights.transport is {weights.transport!r} and rollouts.engine is {rollouts.engine!r}: with this transport "
        f"the learner sends weights to the engine itself, and only vLLM's engine can receive them; use transport "
        f"'object_store', or engine 'vllm'"
    )


def direct_transports_keep_no_old_versions(weights: WeightsSection, scheduling: SchedulingSection) -> str | None:
    """Under `lag: exact` old versions are loaded, and a learner that sends weights itself keeps only the newest."""
    if not weights.direct or scheduling.lag == "bounded":
        return None
    return (
        f"weights.transport is {weights.transport!r} and scheduling.lag is {scheduling.lag!r}: lag 'exact' generates "
        f"with older versions, and with this transport the learner keeps only the newest; use transport 'object_store', or "
        f"lag 'bounded'"
    )


def a_stale_cache_needs_updates_in_flight(rollouts: RolloutsSection) -> str | None:
    """Without in-flight updates, every request ends before new weights come, so no cache can become stale."""
    if not rollouts.keep_stale_cache or rollouts.in_flight_updates:
        return None
    return (
        "rollouts.keep_stale_cache is True and rollouts.in_flight_updates is False: without in-flight updates every "
        "request ends before new weights come, so no cache becomes stale; set both or neither"
    )


# The learners


def adapters_are_their_own_reference(model: ModelSection) -> str | None:
    """With adapters, the reference policy is the policy without them. No other can be named."""
    if not model.lora or model.reference is None:
        return None
    return (
        f"model.reference is {model.reference!r} and model.lora is set: with adapters the reference policy is the policy "
        f"without its adapters; leave model.reference out"
    )


def a_moving_reference_is_a_model_of_its_own(model: ModelSection, learner: LearnerSection) -> str | None:
    """A reference that moves must be whole, must begin as the policy, and must not be the policy without adapters."""
    if model.reference_every is None:
        if not changed(model, "reference_mix"):
            return None
        return (
            f"model.reference_mix is {model.reference_mix} and model.reference_every is None: the reference does not move; "
            f"set model.reference_every, or leave it out"
        )
    why = None
    if model.lora:
        why = "model.lora is set: with adapters pi_ref is the policy without them, which cannot move"
    elif model.reference is not None:
        why = f"model.reference is {model.reference!r}: only a reference that begins as the policy has its parameters"
    elif learner.backend == "deepspeed" and learner.zero_stage == 3:
        why = "learner.zero_stage is 3: there the ranks share the reference out"
    return why and f"model.reference_every is {model.reference_every} and {why}; leave one of them out"


def options_of_deepspeed_need_deepspeed(learner: LearnerSection) -> str | None:
    """Keys that only DeepSpeed reads need `backend: deepspeed`."""
    if learner.backend == "deepspeed":
        return None
    return one_per_line(
        f"learner.{key} is {getattr(learner, key)!r} and learner.backend is {learner.backend!r}: only backend "
        f"'deepspeed' reads this key; use that backend, or leave learner.{key} out"
        for key in changed(learner, "num_ranks", "zero_stage", "zero_options", "offload")
    )


def bfloat16_needs_a_zero_stage(learner: LearnerSection, model: ModelSection) -> str | None:
    """In bfloat16 with stage 0, DeepSpeed would take an optimizer step of its own when it starts."""
    if learner.backend != "deepspeed" or learner.zero_stage > 0 or model.dtype != "bfloat16":
        return None
    return (
        "learner.zero_stage is 0 and model.dtype is 'bfloat16': DeepSpeed would take a hidden optimizer step as it starts; "
        "use zero_stage 1, 2 or 3"
    )


def zero_options_leave_out_what_has_a_key(learner: LearnerSection) -> str | None:
    """`zero_options` must not set what has a key of its own in the config, where it is checked."""
    if learner.backend != "deepspeed":
        return None
    own_keys = {"stage": "zero_stage", "offload_optimizer": "offload", "offload_param": "offload"}
    return one_per_line(
        f"learner.zero_options has {key!r}, and learner.{own} is {getattr(learner, own)!r}: set learner.{own} "
        f"instead, which is checked against the rest of the config"
        for key, own in own_keys.items()
        if key in learner.zero_options
    )


def offload_needs_its_zero_stage(learner: LearnerSection) -> str | None:
    """Only what the ranks share out can be offloaded: the optimizer's state from stage 1 on, the weights in stage 3."""
    needed = {"none": 0, "optimizer": 1, "params": 3}[learner.offload]
    if learner.backend != "deepspeed" or learner.zero_stage >= needed:
        return None
    return (
        f"learner.offload is {learner.offload!r} and learner.zero_stage is {learner.zero_stage}: only what the "
        f"ranks share out can be offloaded; use zero_stage {needed} or more, or offload 'none'"
    )


def offload_needs_a_gpu(learner: LearnerSection, run: RunSection) -> str | None:
    """Offloading moves data from the GPU to the memory of the CPU, so it needs a GPU."""
    if learner.backend != "deepspeed" or learner.offload == "none" or run.device != "cpu":
        return None
    return (
        f"learner.offload is {learner.offload!r} and run.device is 'cpu': everything is in the CPU's memory already; use "
        f"offload 'none'"
    )


def options_of_the_weight_need_a_weight(objective: ObjectiveSection) -> str | None:
    """Keys about the off-policy weight need an `off_policy` that reads them."""
    weighs = ("full", "clamp", "mask")
    readers = {"off_policy_low": ("clamp", "mask"), "off_policy_level": weighs, "off_policy_mask": ("ignore", *weighs)}
    return one_per_line(
        f"objective.{key} is {getattr(objective, key)} and objective.off_policy is {objective.off_policy!r}: it is "
        f"an option of off_policy {', '.join(map(repr, of))}; use one of them, or leave it out"
        for key, of in readers.items()
        if changed(objective, key) and objective.off_policy not in of
    )


def options_of_the_kl_need_a_kl(objective: ObjectiveSection) -> str | None:
    """Keys about the KL to the reference need a coefficient above 0. An adapted one stays 0, too."""
    if objective.kl_coef != 0:
        return None
    return one_per_line(
        f"objective.{key} is {getattr(objective, key)!r} and objective.kl_coef is 0: there is no KL term; use a "
        f"kl_coef above 0, or leave it out"
        for key in changed(objective, "kl_estimator", "kl_cap", "kl_target")
    )


def a_gain_needs_a_target(objective: ObjectiveSection) -> str | None:
    """`kl_gain` is how fast the coefficient is adapted to `kl_target`."""
    if objective.kl_target is not None or not changed(objective, "kl_gain"):
        return None
    return (
        f"objective.kl_gain is {objective.kl_gain} and objective.kl_target is None: nothing is adapted; set kl_target, or "
        f"leave it out"
    )


def a_minibatch_has_a_group(objective: ObjectiveSection, rollouts: RolloutsSection) -> str | None:
    """A minibatch is made of whole groups, so there are at most as many minibatches as groups."""
    if objective.num_minibatches <= rollouts.prompts_per_step:
        return None
    return (
        f"objective.num_minibatches is {objective.num_minibatches} and rollouts.prompts_per_step is "
        f"{rollouts.prompts_per_step}: a minibatch holds whole groups, and a step has one group per prompt; use "
        f"at most {rollouts.prompts_per_step} minibatches"
    )


def the_learning_rate_is_reached(learner: LearnerSection, run: RunSection) -> str | None:
    """The warmup must end before the run does."""
    if learner.warmup < run.num_steps:
        return None
    return (
        f"learner.warmup is {learner.warmup} and run.num_steps is {run.num_steps}: the learning rate would never be "
        f"reached; use a warmup below run.num_steps"
    )


# The head


def a_head_learns_from_pairs(rollouts: RolloutsSection, head: HeadSection) -> str | None:
    """A head that is trained compares responses of one group, so a group needs at least two."""
    if rollouts.group_size > 1 or not head.trains:
        return None
    return (
        f"rollouts.group_size is {rollouts.group_size} and head.variant is {head.variant!r}: the head learns from the "
        f"best and the worst response of a group; use group_size 2 or more, or variant 'vanilla'"
    )


def refills_need_rewards_that_are_known(rollouts: RolloutsSection, head: HeadSection) -> str | None:
    """A group is refilled for its rewards, which are known at its arrival if no head moves."""
    if rollouts.max_refills == 0 or head.variant == "vanilla":
        return None
    return (
        f"rollouts.max_refills is {rollouts.max_refills} and head.variant is {head.variant!r}: the rewards of that head are "
        f"known only when the step has begun; use variant 'vanilla', or max_refills 0"
    )


def a_head_that_does_not_move_needs_no_hold(head: HeadSection) -> str | None:
    """Keys about the training of the head need a variant whose head is trained."""
    if head.trains:
        return None
    return one_per_line(
        f"head.{key} is {getattr(head, key)!r} and head.variant is {head.variant!r}: the head of this "
        f"variant is not trained; leave head.{key} out, or use variant 'r2m'"
        for key in changed(head, "hold", "pair_source", "ensemble")
    )


def options_of_a_hold_need_that_hold(head: HeadSection) -> str | None:
    """`hold_weight` and `hold_decay` need the `hold` that reads them."""
    readers = {"hold_weight": ("divergence", "bsr"), "hold_decay": ("average",)}
    return one_per_line(
        f"head.{key} is {getattr(head, key)} and head.hold is {head.hold!r}: only hold "
        f"{' or '.join(map(repr, of))} reads this key; use that hold, or leave head.{key} out"
        for key, of in readers.items()
        if changed(head, key) and head.hold not in of
    )


def pessimism_needs_an_ensemble(head: HeadSection) -> str | None:
    """One head has no spread."""
    if head.pessimism == 0 or head.ensemble > 1:
        return None
    return (
        f"head.pessimism is {head.pessimism} and head.ensemble is 1: one head has no standard deviation; use an ensemble of "
        f"several, or leave head.pessimism out"
    )


def steering_needs_a_head_that_trains(head: HeadSection) -> str | None:
    """No response moves a head that stays as it is."""
    if head.steering == 0 or head.trains:
        return None
    return (
        f"head.steering is {head.steering} and head.variant is {head.variant!r}: the head of this variant is not trained, so no "
        f"response moves it; use variant 'r2m' or 'iterative_head', or leave head.steering out"
    )


def labels_teach_a_head(labels: LabelsSection, head: HeadSection) -> str | None:
    """The head learns from labels, so there must be one that learns."""
    if not labels.active or head.trains:
        return None
    key = "offline" if labels.source is None else "source"
    return (
        f"labels.{key} is {getattr(labels, key)!r} and head.variant is {head.variant!r}: the head of this variant is not trained, "
        f"so nothing would learn from labels; use variant 'r2m' or 'iterative_head', or leave labels out"
    )


def refreshed_states_are_read(labels: LabelsSection, head: HeadSection) -> str | None:
    """Pairs are read once more for a head that reads states."""
    if labels.states == "kept" or head.variant in ("r2m", "r2m_noise"):
        return None
    return (
        f"labels.states is {labels.states!r} and head.variant is {head.variant!r}: the head of this variant reads no states; use "
        f"states 'kept', or variant 'r2m'"
    )


def options_of_labels_need_a_source(labels: LabelsSection) -> str | None:
    """Keys about labels need somebody who gives them, and keys about a replay need a replay."""
    of_both = () if labels.source is None and labels.offline is None else ("self_weight",)
    of_offline = ("offline", "offline_pairs", "offline_weight", "offline_temper")
    keys = [key for key in type(labels).model_fields if key not in (*of_both, *of_offline)]
    missing = {
        "source": () if labels.source else changed(labels, *keys),
        "offline": () if labels.offline else changed(labels, *of_offline),
    }
    if any(missing.values()):
        return one_per_line(
            f"labels.{key} is {getattr(labels, key)!r} and labels.{of} is None: there are no such labels; name a source in "
            f"labels.{of}, or leave labels.{key} out"
            for of, wrong in missing.items()
            for key in wrong
        )
    if labels.replay == 0 and changed(labels, "replay_from"):
        return (
            f"labels.replay_from is {labels.replay_from} and labels.replay is 0: no pair is used once more; set labels.replay, "
            f"or leave labels.replay_from out"
        )
    return None


def exact_lag_waits_for_labels(labels: LabelsSection, scheduling: SchedulingSection) -> str | None:
    """Under `lag: exact` a label is used at a fixed age. Without waiting, it depends on the time when it is used."""
    if labels.source is None or labels.wait or scheduling.lag != "exact":
        return None
    return (
        "labels.wait is False and scheduling.lag is 'exact': which update uses a label depends on the time when it comes, so "
        "the run could not be repeated; use labels.wait true, or lag 'bounded'"
    )


def a_label_of_its_own_step_is_waited_for(labels: LabelsSection) -> str | None:
    """The head update of a step comes at once. What may be used by no other, and is not waited for, comes too late."""
    if labels.source is None or labels.wait or labels.max_age > 0:
        return None
    return (
        "labels.max_age is 0 and labels.wait is False: only the head update of its own step could use a label, and that "
        "does not wait, so labels would be given up as late; set labels.wait true, or labels.max_age at least 1"
    )


def a_wait_for_labels_ends_before_the_ring_counts_as_still(
    labels: LabelsSection, scheduling: SchedulingSection
) -> str | None:
    """Whoever waits for a label must give it up before the run is ended because nothing moves."""
    if labels.source is None or not labels.wait or labels.timeout < scheduling.stall_after:
        return None
    return (
        f"labels.timeout is {labels.timeout:g} and scheduling.stall_after is {scheduling.stall_after:g}: the run would end "
        f"while it waits for a label; use a smaller timeout, or a larger stall_after"
    )


def a_step_has_the_pairs_that_are_asked_about(labels: LabelsSection, rollouts: RolloutsSection) -> str | None:
    """No response is in two pairs, so a group has at most K // 2 of them."""
    most = rollouts.prompts_per_step * (rollouts.group_size // 2)
    if labels.source is None or labels.budget <= most:
        return None
    return (
        f"labels.budget is {labels.budget}, and a step has at most {most} pairs: rollouts.prompts_per_step "
        f"{rollouts.prompts_per_step} groups, and of rollouts.group_size {rollouts.group_size} responses none is in two pairs; "
        f"use a budget of at most {most}"
    )


def a_head_needs_a_reward_model(reward: RewardSection, head: HeadSection) -> str | None:
    """Every head but `vanilla` is a part of a reward model that reads more, or learns."""
    if reward.model is not None or head.variant == "vanilla":
        return None
    return (
        f"reward.model is null and head.variant is {head.variant!r}: without a reward model there is no head that could "
        f"read or learn; use head.variant 'vanilla', or name a reward model"
    )


def something_gives_a_reward(reward: RewardSection) -> str | None:
    """Without a reward model, the reward comes from functions."""
    if reward.model is not None or reward.functions:
        return None
    return (
        "reward.model is null and reward.functions is empty: nothing would give a reward; name functions, or a reward "
        "model"
    )


def the_overlong_penalty_has_a_slope(reward: RewardSection, rollouts: RolloutsSection) -> str | None:
    """The penalty rises from `start` to `end`, so `start` comes first."""
    if reward.overlong is None:
        return None
    end, of = reward.overlong.end, "reward.overlong.end"
    if end is None:
        end, of = rollouts.max_new_tokens, "rollouts.max_new_tokens"
    if reward.overlong.start < end:
        return None
    return (
        f"reward.overlong.start is {reward.overlong.start} and {of} is {end}: the penalty rises between them; use a smaller "
        f"start"
    )


def a_clip_of_normalized_rewards_needs_them(reward: RewardSection) -> str | None:
    """`normalize_clip` is about what `normalize` gives."""
    if reward.normalize_clip is None or reward.normalize != "none":
        return None
    return (
        f"reward.normalize_clip is {reward.normalize_clip:g} and reward.normalize is 'none': nothing would be clipped; set "
        f"reward.normalize, or use reward.clip for the model's reward"
    )


def options_of_a_reward_model_need_one(reward: RewardSection) -> str | None:
    """Keys that only the reward model reads need a reward model."""
    if reward.model is not None:
        return None
    return one_per_line(
        f"reward.{key} is {getattr(reward, key)!r} and reward.model is null: it is about the reward model, and there "
        f"is none; leave it out"
        for key in changed(reward, "dtype", "max_tokens", "clip")
    )


# The data


def held_out(data: Any, key: str) -> str | None:
    """Checks that held-out data is not trained on. The configs of runs and of reward models share this rule.

    Args:
        data: the section `data`.
        key: the name of the key of `data` that names the training data, `prompts` or `preferences`.

    Returns a message if `data.eval` is the same data, or if `data.eval_split` is set without `data.eval`; else None.
    """
    if data.eval is None and data.eval_split is not None:
        return (
            f"data.eval_split is {data.eval_split!r} and data.eval is None: data.eval_split is a split of the "
            f"data set that data.eval names; set data.eval, too, or leave data.eval_split out"
        )
    if data.eval is None or data.eval != getattr(data, key):
        return None
    if data.eval_split in (None, data.split) or Path(data.eval).is_file():
        return (
            f"data.eval and data.{key} are both {data.eval!r}, with data.split {data.split!r} and data.eval_split "
            f"{data.eval_split!r}: the model would be evaluated on the data that it is trained on; name another split of an HF dataset in data.eval_split, "
            f"or another source, or leave data.eval out"
        )
    return None


def the_prompt_has_one_name(data: DataSection) -> str | None:
    """`data.prompt_field` and `data.columns` may both name the field of the prompt, if they agree."""
    return one_name_for_the_prompt(data)


def options_of_records_need_records(data: DataSection) -> str | None:
    """Keys that say how records are read need a source of records."""
    if data.prompts not in EMBEDDED_GOLD:
        return None
    return one_per_line(
        f"data.{key} is {getattr(data, key)!r} and data.prompts is {data.prompts!r}: these prompts are no records; name "
        f"a source, or leave it out"
        for key in changed(data, "filters", *(["chat", "columns"] if data.preferences is None else []))
    )


def evaluation_prompts_are_held_out(data: DataSection) -> str | None:
    """The prompts of evaluations must not be those that are trained on."""
    return held_out(data, "prompts")


def the_embedded_language_holds_out_its_own_prompts(data: DataSection) -> str | None:
    """Refuses a source of held-out prompts that nothing would read."""
    if data.prompts not in EMBEDDED_GOLD or data.eval is None:
        return None
    return (
        f"data.eval is {data.eval!r} and data.prompts is {data.prompts!r}: the embedded language holds out prompts of its own, "
        f"and nothing would read those of data.eval; leave data.eval out, or name the prompts' source in data.prompts"
    )


def a_reward_model_from_scratch_needs_pairs(reward: RewardSection, data: DataSection) -> str | None:
    """`reward.model: from_scratch` is trained on preference pairs, so there must be some."""
    if reward.model != "from_scratch" or data.preferences is not None:
        return None
    return (
        "reward.model is 'from_scratch' and data.preferences is not set: this reward model is trained on preference "
        "pairs; name a JSONL file of pairs in data.preferences"
    )


def a_policy_from_scratch_needs_texts(model: ModelSection, data: DataSection) -> str | None:
    """`model.policy: from_scratch` is trained on the texts of a source, and the embedded language has no source."""
    if model.policy != "from_scratch" or data.prompts not in EMBEDDED_GOLD:
        return None
    return (
        f"model.policy is 'from_scratch' and data.prompts is {data.prompts!r}: a policy from scratch is trained on the texts of a "
        f"source, and the embedded language has none; use model.policy {data.prompts!r}"
    )


def embedded_languages_exist(
    model: ModelSection, reward: RewardSection, data: DataSection, labels: LabelsSection
) -> str | None:
    """A name that begins as an embedded language's is one, and only the first has pairs of its own."""
    named = {"model.policy": model.policy, "reward.model": reward.model, "data.prompts": data.prompts}
    lines = [
        f"{key} is {name!r}: there is no such embedded language; the embedded languages are {', '.join(EMBEDDED_GOLD)}"
        for key, name in named.items()
        if name is not None and name.startswith("embedded:") and name not in EMBEDDED_GOLD
    ]
    if labels.offline is not None and labels.offline.startswith("embedded:"):
        lines.append(
            f"labels.offline is {labels.offline!r}: of the embedded languages only 'embedded' has pairs; use a file of pairs, or "
            f"leave it out"
        )
    return one_per_line(lines)


def a_run_has_one_embedded_language(
    model: ModelSection, reward: RewardSection, data: DataSection, evaluation: EvaluationSection, labels: LabelsSection
) -> str | None:
    """Models, prompts and gold reward of one embedded language know no word of another."""
    language = data.prompts
    if language not in EMBEDDED_GOLD:
        return None
    named = {"model.policy": model.policy, "reward.model": reward.model, "labels.offline": labels.offline}
    of_gold = {gold: name for name, gold in EMBEDDED_GOLD.items()}
    lines = [
        f"{key} is {name!r} and data.prompts is {language!r}: these are two languages; name one of them in both"
        for key, name in named.items()
        if name in EMBEDDED_GOLD and name != language
    ]
    known = of_gold.get(evaluation.gold or "", language)
    if known != language:
        lines.append(
            f"evaluation.gold is {evaluation.gold!r} and data.prompts is {language!r}: this gold reward knows the prompts of "
            f"{known!r} alone; use {EMBEDDED_GOLD[language]!r}"
        )
    return one_per_line(lines)


RULES: tuple[Rule, ...] = (
    no_more_actors_are_asked_for_than_there_are,
    runs_are_written_to_a_disk,
    exact_lag_cuts_nothing_off,
    exact_lag_takes_one_group_at_a_time,
    exact_lag_needs_one_rank,
    options_of_vllm_need_vllm,
    options_of_a_rollout_function_need_one,
    a_rollout_function_is_told_of_before_its_actor_is_killed,
    turns_on_transformers_are_sampled_alone,
    direct_transports_need_an_engine_that_receives,
    direct_transports_keep_no_old_versions,
    a_stale_cache_needs_updates_in_flight,
    adapters_are_their_own_reference,
    a_moving_reference_is_a_model_of_its_own,
    options_of_deepspeed_need_deepspeed,
    bfloat16_needs_a_zero_stage,
    zero_options_leave_out_what_has_a_key,
    offload_needs_its_zero_stage,
    offload_needs_a_gpu,
    options_of_the_weight_need_a_weight,
    options_of_the_kl_need_a_kl,
    a_gain_needs_a_target,
    a_minibatch_has_a_group,
    the_learning_rate_is_reached,
    a_head_learns_from_pairs,
    refills_need_rewards_that_are_known,
    a_head_that_does_not_move_needs_no_hold,
    options_of_a_hold_need_that_hold,
    pessimism_needs_an_ensemble,
    steering_needs_a_head_that_trains,
    labels_teach_a_head,
    refreshed_states_are_read,
    options_of_labels_need_a_source,
    exact_lag_waits_for_labels,
    a_label_of_its_own_step_is_waited_for,
    a_wait_for_labels_ends_before_the_ring_counts_as_still,
    a_step_has_the_pairs_that_are_asked_about,
    the_prompt_has_one_name,
    options_of_records_need_records,
    a_head_needs_a_reward_model,
    something_gives_a_reward,
    options_of_a_reward_model_need_one,
    the_overlong_penalty_has_a_slope,
    a_clip_of_normalized_rewards_needs_them,
    evaluation_prompts_are_held_out,
    the_embedded_language_holds_out_its_own_prompts,
    a_reward_model_from_scratch_needs_pairs,
    a_policy_from_scratch_needs_texts,
    embedded_languages_exist,
    a_run_has_one_embedded_language,
)
"""All rules, in the order in which their messages are shown."""
