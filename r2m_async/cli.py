"""`r2m train | plan | check | export | study | reward-model | policy-states | bon | eval`: the command line.

r2m train configs/quickstart.yaml run.num_steps=20
r2m plan  configs/quickstart.yaml --times runs/r2m-20260101-120000
r2m check configs/presets/dialogue_qwen2.5_3b.yaml
r2m export runs/r2m-20260101-120000 exported
r2m study configs/studies/variants.yaml studies/variants
r2m reward-model train configs/reward_model/bsr.yaml run.seed=1
r2m reward-model resume runs/bsr-20260101-120000
r2m reward-model eval runs/bsr-20260101-120000 --rm-bench rm_bench.jsonl
r2m policy-states exported --pairs pairs.jsonl --later exported-later
r2m bon runs/bt-20260101-120000 runs/bsr-20260101-120000
r2m eval generate exported --prompts alpaca_eval.json --format alpaca_eval --out answers
r2m eval judge answers/model_outputs.json --judge runs/bsr-20260101-120000 --against other/model_outputs.json
r2m eval win-rate annotations.json
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from r2m_async.config import R2MConfig
from r2m_async.errors import (
    CodecError,
    ConfigError,
    DataError,
    DiskError,
    StageLost,
    StalledRun,
    StepFailed,
    WeightMismatch,
)
from r2m_async.interruption import Interrupted, interruptible

Command: TypeAlias = Callable[[R2MConfig, argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    The status is 0 if the command is done, 1 if it failed, and 2 for a mistake of the user's. It is 128 + n if signal n
    asked the command to leave. With every status but 0, one message on standard error says why.
    """
    # The user's own `module:attr` functions are looked for in the current folder, after everything that is installed.
    sys.path.append(os.getcwd())
    parsed = _parsed(arguments)
    try:
        with interruptible():
            return int(parsed.command(parsed))
    except (ConfigError, DataError) as error:
        return _tell(error, 2, error, parsed)
    except (StageLost, StalledRun, StepFailed, WeightMismatch, CodecError, DiskError) as error:
        return _tell(f"the run ended: {error}", 1, error, parsed)
    except Interrupted as error:
        return _tell(error, error.status, error, parsed)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line. Overrides (`section.key=value`) may stand anywhere.

    argparse itself takes no positional argument behind an option, so what it leaves over is looked through here.
    """
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    late = [one for one in rest if hasattr(parsed, "overrides") and "=" in one and not one.startswith("-")]
    if len(late) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(one for one in rest if one not in late)}")
    if late:
        parsed.overrides = [*parsed.overrides, *late]
    return parsed


def _tell(what: object, status: int, error: BaseException, parsed: argparse.Namespace) -> int:
    if getattr(parsed, "traceback", False):
        traceback.print_exception(error)
    print("\n".join([f"r2m: {what}", *getattr(error, "__notes__", ())]), file=sys.stderr)
    return status


def entry() -> None:
    """Runs `main` and ends the process with its status.

    If Ray had to be given up, its threads would keep Python from ending. Then the process ends without waiting for them.
    """
    try:
        status = main()
    except Exception:
        # No message was written for this error, so its whole traceback is shown.
        traceback.print_exc()
        status = 1
    connection = sys.modules.get("r2m_async.launch.ray_connection")
    if connection is not None and connection.abandoned.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _directory(value: str) -> Path:
    """Converts an argument to the path of a folder. Raises ArgumentTypeError if a file is in the way.

    Some commands compute for hours before they write. So this is checked before they begin.
    """
    path = Path(value)
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file; name a directory")
    return path


class _Parser(argparse.ArgumentParser):
    """A parser with the option `--traceback`. argparse makes the parsers of the commands of the same class."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        text = "show where an error arose, also where a message says all that a user needs"
        self.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="r2m", description="RLHF with a reward model that keeps learning.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("config", metavar="CONFIG", help="a YAML file")
        added.add_argument("overrides", nargs="*", metavar="section.key=value", help="set over the file's keys")
        added.set_defaults(command=lambda parsed: command(R2MConfig.from_yaml(parsed.config, parsed.overrides), parsed))
        return added

    text = "Run the ring: a live table, then metrics, plots and TensorBoard events in the run directory."
    text_of_one = "all stages in this process, one call after the other, without Ray: for a debugger"
    add("train", _train, text).add_argument("--in-process", action="store_true", help=text_of_one)
    plan = add("plan", _plan, "Predict throughput, idle shares and ages on a virtual clock, for given stage times.")
    plan.add_argument("--times", metavar="RUN", type=Path, help="a run directory whose measured stage times are taken")
    from r2m_async.ring.simulator import StageTimes

    for field in dataclasses.fields(StageTimes):
        flag = f"--{field.name.replace('_', '-')}"
        unit = "log-std of generate" if field.name == "generate_spread" else "seconds per call"
        plan.add_argument(flag, type=float, metavar="S", help=f"{unit} (default {field.default:g})")
    add("check", _check, "Load a config, say what it resolves to and whether it can run, without a GPU.")
    text = "Write a run's policy and reward model as directories that transformers loads."
    export = commands.add_parser("export", help=text, description=text)
    export.add_argument(
        "source", metavar="RUN", type=Path, help="a run directory (its newest checkpoint) or a checkpoint"
    )
    export.add_argument("out", metavar="OUT", type=_directory, help="the directory to write, new or empty")
    export.set_defaults(command=_export)
    text = "Run a grid of configs over seeds, as many at once as there are cores; tables and plots at matched KL."
    study = commands.add_parser("study", help=text, description=text)
    study.add_argument("study", metavar="STUDY", type=Path, help="a YAML file, see r2m_async/studies/study.py")
    study.add_argument(
        "out", metavar="OUT", type=_directory, help="where runs and results go; what is there already is kept"
    )
    study.add_argument("--workers", type=int, metavar="N", help="runs at once (default: the number of cores)")
    study.set_defaults(command=_study)
    _add_reward_model(commands)
    _add_policy_states(commands)
    _add_best_of_n(commands)
    _add_eval(commands)
    return parser


def _add_reward_model(commands: Any) -> None:
    text = "Train reward models offline, on pairs of responses, and evaluate them."
    verbs = commands.add_parser("reward-model", help=text, description=text).add_subparsers(
        required=True, metavar="VERB"
    )
    text = "Train on {prompt, chosen, rejected}: a progress bar, then models, metrics and a plot in the run directory."
    train = verbs.add_parser("train", help=text, description=text)
    train.add_argument("config", metavar="CONFIG", help="a YAML file")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="set over the file's keys")
    train.set_defaults(command=_train_reward_model)
    text = "Go on with a run that ended early: to the same bits, on the same machine."
    resume = verbs.add_parser("resume", help=text, description=text)
    resume.add_argument("run", metavar="RUN", type=Path, help="a run directory of `reward-model train`")
    resume.set_defaults(command=_resume_reward_model)
    text = "Measure a reward model: accuracy, Kendall's tau, RM-Bench, its states. A table, results.json and a plot."
    evaluate = verbs.add_parser("eval", help=text, description=text)
    evaluate.add_argument(
        "model",
        metavar="RUN_OR_MODEL",
        help="a run of `reward-model train`, a sequence classifier, an OUT of `export`, or `embedded`",
    )
    evaluate.add_argument(
        "--out",
        type=_directory,
        metavar="DIR",
        help="where results go (default: RUN/evaluation, else evaluation/MODEL)",
    )
    evaluate.add_argument(
        "--pairs", metavar="FILE", help="pairs in place of those that the run held out; `embedded`: held-out ones"
    )
    evaluate.add_argument("--split", metavar="NAME", help="of --pairs that are an HF data set (default: the run's)")
    evaluate.add_argument(
        "--initial-policy", metavar="NAME", help="that an export's run started from, where the export does not name it"
    )
    evaluate.add_argument(
        "--rm-bench", type=Path, metavar="FILE", help="RM-Bench's files, commas between them, or JSONL"
    )
    evaluate.add_argument(
        "--embedded",
        action=argparse.BooleanOptionalAction,
        help="the four splits of the embedded language (default: for a model of its preferences)",
    )
    evaluate.add_argument("--prompts", type=int, default=200, metavar="N", help="prompts per split (default 200)")
    evaluate.add_argument("--max-tokens", type=int, metavar="N", help="longer texts lose the beginning of their prompt")
    evaluate.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the splits and of all drawing (default 0)"
    )
    evaluate.set_defaults(command=_evaluate_reward_model)


def _add_policy_states(commands: Any) -> None:
    text = (
        "What a policy's states tell of preferences, by layer, and their drift in later policies. A table and a plot."
    )
    states = commands.add_parser("policy-states", help=text, description=text)
    states.add_argument("policy", metavar="POLICY", help="an HF name or directory, an OUT of `export`, or `embedded`")
    states.add_argument("--pairs", metavar="FILE", help="as `data.preferences` (default for `embedded`: its own)")
    states.add_argument("--split", metavar="NAME", help="of --pairs that are an HF data set (default train)")
    states.add_argument(
        "--reward-model", metavar="RUN_OR_MODEL", help="as of `reward-model eval` (default: an export's own)"
    )
    states.add_argument("--later", nargs="+", default=(), metavar="POLICY", help="policies that POLICY became")
    states.add_argument("--out", type=_directory, metavar="DIR", help="(default policy_states/POLICY)")
    states.add_argument("--max-tokens", type=int, metavar="N", help="longer texts lose their beginning (default 1024)")
    states.add_argument("--seed", type=int, default=0, metavar="N", help="of all drawing (default 0)")
    states.set_defaults(command=_policy_states)


def _add_best_of_n(commands: Any) -> None:
    text = "Best-of-n by reward models: proxy and gold against KL. A table, results.json and a plot."
    bon = commands.add_parser("bon", help=text, description=text)
    bon.add_argument("models", nargs="+", metavar="RUN_OR_MODEL", help="as of `reward-model eval`")
    bon.add_argument(
        "--pool",
        type=Path,
        metavar="FILE",
        help="samples as JSONL: prompt, responses, golds, finished (default: the embedded policy's)",
    )
    bon.add_argument("--gold", metavar="MODEL", help="a reward model as judge in place of the pool's golds")
    bon.add_argument("--out", type=_directory, default=Path("best_of_n"), metavar="DIR", help="(default best_of_n)")
    bon.add_argument("--n", type=int, default=405, metavar="N", help="the largest n (default 405)")
    bon.add_argument("--prompts", type=int, default=40, metavar="N", help="of the embedded pool (default 40)")
    bon.add_argument("--samples", type=int, metavar="N", help="per prompt of the embedded pool (default: n)")
    bon.add_argument("--max-tokens", type=int, metavar="N", help="longer texts lose the beginning of their prompt")
    bon.add_argument("--seed", type=int, default=0, metavar="N", help="of the embedded pool (default 0)")
    bon.set_defaults(command=_best_of_n)


def _add_eval(commands: Any) -> None:
    text = "Answers for AlpacaEval, MT-Bench and TL;DR judges; reward models as judges; win rates."
    verbs = commands.add_parser("eval", help=text, description=text).add_subparsers(required=True, metavar="VERB")
    text = "Answer a judge's prompts, into the file that it reads. Interrupted, it goes on where it was."
    generate = verbs.add_parser("generate", help=text, description=text)
    generate.add_argument("model", metavar="MODEL", help="an HF name or directory, or an OUT of `export`")
    generate.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="a JSON list or JSONL")
    generate.add_argument("--format", choices=("alpaca_eval", "mt_bench", "tldr"), required=True)
    generate.add_argument("--out", type=Path, required=True, metavar="FILE_OR_DIR", help="new; a file has a suffix")
    generate.add_argument("--engine", choices=("vllm", "transformers"), default="vllm", help="(default vllm)")
    generate.add_argument("--name", metavar="GENERATOR", help="the model's name in the file (default: MODEL's)")
    generate.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the format's)")
    generate.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="per turn (default 2048, 1024, TL;DR 50; or what fits)"
    )
    generate.add_argument("--max-prompt-tokens", type=int, metavar="N", help="(default: as the prompts need)")
    generate.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="turns or raw text (default: TL;DR raw)"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="(default 0)")
    generate.add_argument("--num", type=int, metavar="N", help="the first N prompts only")
    generate.add_argument("--batch", type=int, metavar="N", help="prompts at once (default 128; transformers 1)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    generate.add_argument("--dtype", choices=dtypes, default="auto", help="(default: the checkpoint's)")
    generate.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs of the vLLM engine")
    generate.set_defaults(command=_generate_answers)
    text = "Score answers by a reward model, and against other answers: rewards and win rates."
    judge = verbs.add_parser("judge", help=text, description=text)
    judge.add_argument("outputs", metavar="OUTPUTS", type=Path, help="answers in any of the formats")
    judge.add_argument(
        "--judge", required=True, metavar="RUN_OR_MODEL", help="as of `reward-model eval`, or module:attr of a program"
    )
    judge.add_argument("--against", metavar="OUTPUTS", help="answers to the same prompts; `reference`: TL;DR's authors")
    judge.add_argument("--prompts", type=Path, metavar="FILE", help="MT-Bench's questions")
    judge.add_argument("--max-tokens", type=int, metavar="N", help="longer texts lose the beginning of their prompt")
    judge.add_argument("--out", type=_directory, metavar="DIR", help="(default: OUTPUTS without suffix, -judged)")
    judge.set_defaults(command=_judge)
    text = "Win rate and length-controlled win rate of a judge's annotations, as AlpacaEval writes them."
    rate = verbs.add_parser("win-rate", help=text, description=text)
    rate.add_argument("annotations", metavar="ANNOTATIONS", type=Path)
    rate.add_argument("--out", type=_directory, metavar="DIR", help="(default: ANNOTATIONS without suffix, -win-rate)")
    rate.set_defaults(command=_win_rate)


def _train(config: R2MConfig, parsed: argparse.Namespace) -> int:
    from r2m_async.launch.training import train

    directory = train(config, in_process=parsed.in_process)
    print(f"run directory: {directory}")
    return 0


def _study(parsed: argparse.Namespace) -> int:
    from r2m_async.studies.study import run_study

    failed = run_study(parsed.study, parsed.out, parsed.workers)
    for table in (parsed.out / "table.md", parsed.out / "reward_models" / "table.md"):
        if table.exists():
            print(table.read_text(encoding="utf-8"), end="")
    return 1 if failed else 0


def _plan(config: R2MConfig, parsed: argparse.Namespace) -> int:
    from r2m_async.ring.simulator import StageTimes, simulate, times_of_run
    from r2m_async.runs.records import read_records

    times = StageTimes()
    if parsed.times:
        try:
            times = times_of_run(read_records(parsed.times / "trace.jsonl"))
        except OSError as error:
            raise ConfigError(f"--times {parsed.times}: has no readable trace.jsonl ({error.strerror})") from None
    given = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(StageTimes)}
    times = dataclasses.replace(times, **{name: value for name, value in given.items() if value is not None})
    prediction = simulate(config, times)
    per_step = config.rollouts.prompts_per_step * config.rollouts.group_size
    seconds, bound, serial = (
        prediction.seconds_per_step,
        prediction.bound_seconds_per_step,
        prediction.serial_seconds_per_step,
    )
    print("stage times   " + "  ".join(f"{name} {value:.3g}" for name, value in dataclasses.asdict(times).items()))
    print(f"step          {seconds:.3f} s   {per_step / max(seconds, 1e-9):.2f} responses/s")
    print(f"bound         {bound:.3f} s   the busiest stage alone; reached to {bound / max(seconds, 1e-9):.0%}")
    print(f"synchronous   {serial:.3f} s   one stage after the other: {serial / max(seconds, 1e-9):.2f} x the step")
    print("idle shares   " + "  ".join(f"{name} {share:.0%}" for name, share in prediction.idle.items()))
    print(
        f"policy age    mean {prediction.policy_age_mean:.2f}  max {prediction.policy_age_max:g}  "
        f"bound {config.scheduling.max_policy_age}"
    )
    print(f"head age      max {prediction.head_age_max:g}  bound {config.scheduling.max_head_age}")
    return 0


def _check(config: R2MConfig, _: argparse.Namespace) -> int:
    """Checks a config and prints what it resolves to.

    It downloads no model. A model that is not on this machine is named, and the rest is checked without it.
    """
    from r2m_async.launch.workload import check_code, check_queue, worst_group_bytes

    estimator = check_code(config)
    responses = config.rollouts.prompts_per_step * config.rollouts.group_size
    print(config.to_yaml(), end="")
    print(f"# step: {responses} responses, {config.objective.epochs * config.objective.num_minibatches} policy updates")
    print(f"# policy age at most {config.scheduling.max_policy_age}, head age at most {config.scheduling.max_head_age}")
    sizes, unchecked = _check_models(config)
    if {"model.policy", "reward.model"} <= sizes.keys():
        group_bytes = worst_group_bytes(config, sizes["model.policy"], sizes["reward.model"], estimator.needs_greedy)
        check_queue(config, group_bytes)
        steps = config.queue.max_bytes / (group_bytes * config.rollouts.prompts_per_step)
        print(f"# queue: at most {group_bytes} bytes a group; max_bytes holds {steps:.1f} whole steps")
    print(f"# ok, but for {' and '.join(unchecked)}, not checked" if unchecked else "# ok")
    return 0


def _check_models(config: R2MConfig) -> tuple[dict[str, int], list[str]]:
    """Checks the models that are on this machine.

    Returns their hidden sizes by the key of the config, and the keys of the models that could not be checked.
    """
    from transformers import AutoTokenizer

    from r2m_async.launch.workload import BUILT_HERE, check_critic, hidden_size

    policy, critic = config.model.policy, config.critic.model
    sizes, unchecked = {}, []
    for key, name in (("model.policy", policy), ("reward.model", config.reward.model), ("critic.model", critic)):
        if name is None:
            continue
        if name in BUILT_HERE and key != "critic.model":
            print(f"# {key}: {name} is built by `r2m train`")
            continue
        size = hidden_size(key, name, fetch=False)
        if size is not None:
            sizes[key] = size
            continue
        unchecked.append(key)
        more = "" if key == "critic.model" else " and the bytes of its states"
        print(f"# {key}: {name} is not on this machine: it{more} {'were' if more else 'was'} not checked")
    if critic is not None and {"model.policy", "critic.model"} <= sizes.keys():
        check_critic(critic, policy, AutoTokenizer.from_pretrained(policy))
    elif "critic.model" in sizes:
        unchecked.append("critic.model")
        print(f"# critic.model: whether {critic} reads the tokens of model.policy was not checked")
    return sizes, unchecked


def _train_reward_model(parsed: argparse.Namespace) -> int:
    from r2m_async.reward_models.config import RewardModelConfig

    config = RewardModelConfig.from_yaml(parsed.config, parsed.overrides)
    from r2m_async.reward_models.process_group import process_group
    from r2m_async.reward_models.training import train

    with process_group(config.run.device):
        print(f"run directory: {train(config)}")
    return 0


def _resume_reward_model(parsed: argparse.Namespace) -> int:
    from r2m_async.reward_models.config import RewardModelConfig

    config = RewardModelConfig.from_yaml(parsed.run / "config.yaml")
    from r2m_async.reward_models.process_group import process_group
    from r2m_async.reward_models.training import resume

    with process_group(config.run.device):
        print(f"run directory: {resume(parsed.run)}")
    return 0


def _evaluate_reward_model(parsed: argparse.Namespace) -> int:
    from r2m_async.evaluation.reward_models import EvaluationSources, evaluate, write_evaluation

    _check_split(parsed)
    sources = EvaluationSources(
        pairs=parsed.pairs,
        split=parsed.split,
        initial_policy=parsed.initial_policy,
        rm_bench=parsed.rm_bench,
        embedded=parsed.embedded,
        num_prompts=parsed.prompts,
        max_tokens=parsed.max_tokens,
        seed=parsed.seed,
    )
    model = Path(parsed.model)
    is_run = (model / "config.yaml").is_file()
    out = parsed.out or (model / "evaluation" if is_run else Path("evaluation") / model.name)
    print(write_evaluation(evaluate(parsed.model, sources), out), end="")
    print(f"results: {out}")
    return 0


def _check_split(parsed: argparse.Namespace) -> None:
    if parsed.split is not None and parsed.pairs is None:
        raise ConfigError(f"--split {parsed.split}: is a split of --pairs, which is not given; give both or neither")


def _policy_states(parsed: argparse.Namespace) -> int:
    from r2m_async.evaluation.policy_states import PolicySources, policy_states, write_policy_states

    _check_split(parsed)
    sources = PolicySources(
        policy=parsed.policy,
        later=tuple(parsed.later),
        pairs=parsed.pairs,
        split=parsed.split,
        reward_model=parsed.reward_model,
        max_tokens=parsed.max_tokens,
        seed=parsed.seed,
    )
    out = parsed.out or Path("policy_states") / Path(parsed.policy).name
    print(write_policy_states(policy_states(sources), out), end="")
    print(f"results: {out}")
    return 0


def _best_of_n(parsed: argparse.Namespace) -> int:
    from r2m_async.evaluation.best_of_n import embedded_pool, load_pool, measure_best_of_n, write_best_of_n, write_pool
    from r2m_async.from_scratch.embedded import embedded_models
    from r2m_async.from_scratch.language import check_held_out
    from r2m_async.models.loading import one_thread

    if parsed.pool is not None:
        pool = load_pool(parsed.pool)
    else:
        check_held_out("--prompts", parsed.prompts)
        if not 1 <= parsed.n <= (parsed.samples or parsed.n):
            raise ConfigError(
                f"--n is {parsed.n}, --samples {parsed.samples}: the best of n takes n samples at least; give --n 1 or more, "
                f"and no --samples or as many"
            )
        parsed.out.mkdir(parents=True, exist_ok=True)
        with one_thread():
            pool = embedded_pool(embedded_models(), parsed.seed, parsed.prompts, parsed.samples or parsed.n)
        write_pool(pool, parsed.out / "pool.jsonl")
    results = measure_best_of_n(parsed.models, pool, parsed.gold, parsed.n, parsed.max_tokens)
    print(write_best_of_n(results, parsed.out), end="")
    print(f"results: {parsed.out}")
    return 0


def _generate_answers(parsed: argparse.Namespace) -> int:
    from r2m_async.evaluation.answering import GenerationSettings, generate_answers

    names = [field.name for field in dataclasses.fields(GenerationSettings)]
    settings = GenerationSettings(**{name: getattr(parsed, name) for name in names})
    print(f"answers: {generate_answers(parsed.model, parsed.prompts, parsed.out, settings, parsed.name)}")
    return 0


def _judge(parsed: argparse.Namespace) -> int:
    from r2m_async.evaluation.judging import judge, write_judgement

    out = parsed.out or parsed.outputs.with_name(f"{parsed.outputs.stem}-judged")
    judged = judge(parsed.outputs, parsed.judge, parsed.against, parsed.prompts, parsed.max_tokens)
    print(write_judgement(judged, out), end="")
    print(f"results: {out}")
    return 0


def _win_rate(parsed: argparse.Namespace) -> int:
    from r2m_async.evaluation.judging import read_annotations, win_rate_table, win_rates
    from r2m_async.runs.results import write_results

    out = parsed.out or parsed.annotations.with_name(f"{parsed.annotations.stem}-win-rate")
    results = win_rates(read_annotations(parsed.annotations))
    told = win_rate_table(results)
    write_results(out, results, told)
    print(told, end="")
    print(f"results: {out}")
    return 0


def _export(parsed: argparse.Namespace) -> int:
    from r2m_async.export import export

    checkpoint = export(parsed.source, parsed.out)
    print(f"checkpoint    {checkpoint}")
    print(f"policy        {parsed.out / 'policy'}")
    print(f"reward model  {parsed.out / 'reward_model'}")
    return 0


if __name__ == "__main__":
    entry()
