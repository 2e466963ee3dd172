"""`r2m train | resume | plan | check`: run the ring of a config or go on with it, predict its speed, check the config."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from r2m_async.commands.arguments import positive, whole_number
from r2m_async.commands.results import result_of_run
from r2m_async.config import R2MConfig
from r2m_async.config_reference import keys_by_section
from r2m_async.errors import ConfigError
from r2m_async.ring.simulator import StageTimes, simulate, times_of_run
from r2m_async.standard_output import say

Command: TypeAlias = Callable[[R2MConfig, argparse.Namespace], dict[str, Any]]


def add_ring(commands: Any) -> None:
    """Adds the three commands that read a config of the ring."""

    keys = keys_by_section(R2MConfig)

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=text, epilog=keys, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        added.add_argument("config", metavar="CONFIG", help="a YAML file")
        added.add_argument("overrides", nargs="*", metavar="section.key=value", help="set over the file's keys")
        added.set_defaults(command=lambda parsed: command(R2MConfig.from_yaml(parsed.config, parsed.overrides), parsed))
        return added

    text = "Run the ring: a live table, then metrics, plots and TensorBoard events in the run directory."
    text_of_one = "all stages in this process, one call after the other, without Ray: for a debugger"
    train = add("train", _train, text)
    train.add_argument("--in-process", action="store_true", help=text_of_one)
    text = "go on with the newest run of this name in run.output_dir, if it has a checkpoint: for jobs that are retried"
    train.add_argument("--resume-if-exists", action="store_true", help=text)
    text = (
        "Go on with a run that ended early, from its newest whole checkpoint. docs/checkpoints.md has the keys to set."
    )
    resume = commands.add_parser("resume", help=text, description=text)
    resume.add_argument("run", metavar="RUN", type=Path, help="a run directory of `r2m train`")
    resume.add_argument("overrides", nargs="*", metavar="section.key=value", help="set over the run's config")
    resume.add_argument("--in-process", action="store_true", help=text_of_one)
    resume.set_defaults(command=_resume)
    plan = add("plan", _plan, "Predict throughput, idle shares and ages on a virtual clock, for given stage times.")
    _add_times(plan)
    plan.add_argument(
        "--cores", metavar="N", type=float, help="cores that all stages share (default: each has its own)"
    )
    for field in dataclasses.fields(StageTimes):
        flag = f"--{field.name.replace('_', '-')}"
        unit = "log-std of generate" if field.name == "generate_spread" else "seconds per call"
        plan.add_argument(flag, type=float, metavar="S", help=f"{unit} (default {field.default:g})")
    check = add("check", _check, "Load a config, say what it resolves to and whether it can run, without a GPU.")
    text = "also compare with the Ray cluster at ADDRESS, or at RAY_ADDRESS; comes last"
    check.add_argument("--cluster", nargs="?", const="", metavar="ADDRESS", help=text)
    check.add_argument(
        "--gpus", type=whole_number, metavar="N", help="GPUs that the run will have (default: those of this machine)"
    )
    text = "memory of one of them (default: that of this machine's; without either nothing is compared)"
    check.add_argument("--gpu-memory", type=positive, metavar="GIB", help=text)
    _add_times(check)


def _add_times(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names a run whose stage times are taken."""
    parser.add_argument(
        "--times", metavar="RUN", type=Path, help="a run directory whose measured stage times are taken"
    )


def _measured_times(run: Path) -> StageTimes:
    """The mean stage times of a run. Raises ConfigError if it has no readable trace."""
    from r2m_async.runs.records import read_trace

    try:
        return times_of_run(read_trace(run / "trace.jsonl"))
    except OSError as error:
        raise ConfigError(f"--times {run}: has no readable trace.jsonl ({error.strerror})") from None


def _train(config: R2MConfig, parsed: argparse.Namespace) -> dict[str, Any]:
    _prepare(config, parsed)
    from r2m_async.launch.training import train

    directory = train(config, in_process=parsed.in_process, resume_if_exists=parsed.resume_if_exists)
    say(f"run directory: {directory}")
    return result_of_run(directory)


def _prepare(config: R2MConfig, parsed: argparse.Namespace) -> None:
    """Lets the process that workers are forked from make its imports beside those of this one."""
    from r2m_async.launch import forked_workers

    if not parsed.in_process and not os.environ.get("RAY_ADDRESS"):
        forked_workers.prepare(config.rollouts.engine)


def _resume(parsed: argparse.Namespace) -> dict[str, Any]:
    from r2m_async.runs.directory import config_of_run

    _prepare(config_of_run(parsed.run, parsed.overrides), parsed)
    from r2m_async.launch.training import resume

    directory = resume(parsed.run, parsed.overrides, in_process=parsed.in_process)
    say(f"run directory: {directory}")
    return result_of_run(directory)


def _plan(config: R2MConfig, parsed: argparse.Namespace) -> dict[str, Any]:
    times = _measured_times(parsed.times) if parsed.times else StageTimes()
    given = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(StageTimes)}
    times = dataclasses.replace(times, **{name: value for name, value in given.items() if value is not None})
    if parsed.cores is not None and not 0 < parsed.cores < math.inf:
        raise ConfigError(f"--cores is {parsed.cores}; expected a number above 0")
    prediction = simulate(config, times, cores=parsed.cores)
    per_step = config.rollouts.prompts_per_step * config.rollouts.group_size
    seconds, bound, serial = (
        prediction.seconds_per_step,
        prediction.bound_seconds_per_step,
        prediction.serial_seconds_per_step,
    )
    print("stage times   " + "  ".join(f"{name} {value:.3g}" for name, value in dataclasses.asdict(times).items()))
    print(f"step          {seconds:.3f} s   {per_step / max(seconds, 1e-9):.2f} responses/s")
    cores = "" if parsed.cores is None else f", or {parsed.cores:g} cores that never wait"
    print(f"bound         {bound:.3f} s   the busiest stage alone{cores}; reached to {bound / max(seconds, 1e-9):.0%}")
    print(f"synchronous   {serial:.3f} s   one stage after the other: {serial / max(seconds, 1e-9):.2f} x the step")
    print("idle shares   " + "  ".join(f"{name} {share:.0%}" for name, share in prediction.idle.items()))
    print(
        f"policy age    mean {prediction.policy_age_mean:.2f}  max {prediction.policy_age_max:g}  "
        f"bound {config.scheduling.max_policy_age}"
    )
    print(f"head age      max {prediction.head_age_max:g}  bound {config.scheduling.max_head_age}")
    print(f"discarded     {prediction.discarded:.1%} of all groups, as late (scheduling.overage)")
    return {"stage_times": dataclasses.asdict(times), **dataclasses.asdict(prediction)}


def _check(config: R2MConfig, parsed: argparse.Namespace) -> dict[str, Any]:
    """Checks a config and prints what it resolves to.

    It downloads no model. A model that is not on this machine is named, and the rest is checked without it.
    """
    from r2m_async.launch.makers import check_rollout_engine
    from r2m_async.launch.preflight import preflight
    from r2m_async.launch.prompts import check_data
    from r2m_async.launch.workload import check_code, check_models, check_queue, worst_group_bytes

    estimator = check_code(config)
    responses = config.rollouts.prompts_per_step * config.rollouts.group_size
    print(config.to_yaml(), end="")
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        print(f"# {line}")

    tell(f"step: {responses} responses, {config.objective.epochs * config.objective.num_minibatches} policy updates")
    tell(f"policy age at most {config.scheduling.max_policy_age}, head age at most {config.scheduling.max_head_age}")
    there, sizes, unchecked = _models_on_this_machine(config, tell)
    readers, notes = check_models(config, there, estimator.needs_values)
    for note in notes:
        tell(note)
    if "model.policy" in there and (reason := check_rollout_engine(config, there["model.policy"])):
        tell(f"model.policy: whether rollouts.engine can run it was not checked: {reason}")
    in_columns = check_data(config, readers, tell)
    group_bytes = None
    if {"model.policy", "reward.model"} <= sizes.keys():
        group_bytes = worst_group_bytes(config, sizes["model.policy"], sizes["reward.model"], estimator.needs_greedy)
        group_bytes += in_columns
        check_queue(config, group_bytes)
        steps = config.queue.max_bytes / (group_bytes * config.rollouts.prompts_per_step)
        tell(f"queue: at most {group_bytes} bytes a group; max_bytes holds {steps:.1f} whole steps")
    for line in preflight(config, there, group_bytes, estimator.needs_values, parsed.gpus, parsed.gpu_memory):
        tell(line)
    if parsed.times:
        prediction = simulate(config, _measured_times(parsed.times))
        tell(
            f"predicted: {prediction.seconds_per_step:.3f} s a step, policy age at most {prediction.policy_age_max:g}, head "
            f"age at most {prediction.head_age_max:g}, {prediction.discarded:.1%} of all groups discarded as late"
        )
    else:
        tell("discarded groups: not predicted without stage times; --times RUN takes those of a run")
    if parsed.cluster is not None:
        from r2m_async.launch.cluster_check import check_cluster

        for line in check_cluster(config, parsed.cluster):
            tell(line)
    tell(f"ok, but for {' and '.join(unchecked)}, not checked" if unchecked else "ok")
    return {"config": config.to_dict(), "lines": lines, "changes": _changes(lines), "not_checked": unchecked}


def _changes(lines: list[str]) -> list[str]:
    """What `check` says has to be changed."""
    return [line.removeprefix("change: ") for line in lines if line.startswith("change: ")]


def _models_on_this_machine(
    config: R2MConfig, tell: Callable[[str], None]
) -> tuple[dict[str, str], dict[str, int], list[str]]:
    """Looks which models of a config are on this machine, and tells of the others.

    Returns the models that are there, by the key of the config; the hidden sizes of those whose config is there; and the
    keys of the models that cannot be checked.
    """
    from r2m_async.from_scratch.cache import NotCached, only_cached
    from r2m_async.launch.prompts import sources_are_here
    from r2m_async.launch.workload import BUILT_HERE, built_models, hidden_size, trusted
    from r2m_async.models.weight_files import weights_are_here

    named = {
        "model.policy": config.model.policy,
        "reward.model": config.reward.model,
        "model.reference": config.model.reference,
        "critic.model": config.critic.model,
    }
    built: dict[str, str] = {}
    if "from_scratch" not in (config.model.policy, config.reward.model) or sources_are_here(config):
        with suppress(NotCached), only_cached():
            built = built_models(config)
    there: dict[str, str] = {}
    # Without a reward model there are no embeddings.
    sizes = {} if config.reward.model else {"reward.model": 0}
    unchecked = []
    for key, name in named.items():
        if name is None:
            continue
        if name in BUILT_HERE and key in ("model.policy", "reward.model"):
            tell(f"{key}: {name} is built by `r2m train`{', and was before' if key in built else ''}")
            if key not in built:
                continue
            name = built[key]
        size = hidden_size(key, name, fetch=False, trust=trusted(config, key))
        if size is not None:
            sizes[key] = size
        if size is not None and weights_are_here(name):
            there[key] = name
            continue
        unchecked.append(key)
        tell(f"{key}: {name} is not on this machine: it was not checked")
    for key in ("model.reference", "critic.model"):
        if key in there and "model.policy" not in there:
            unchecked.append(key)
            tell(f"{key}: whether {there[key]} reads the tokens of model.policy was not checked")
    return there, sizes, unchecked
