"""`r2m reward-model train | resume | eval`: train reward models offline, and evaluate them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from r2m_async.commands.arguments import add_trust, check_split, directory
from r2m_async.commands.results import results_in
from r2m_async.config_reference import keys_by_section
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.standard_output import say


def add_reward_model(commands: Any) -> None:
    """Adds the command with its verbs."""
    text = "Train reward models offline, on pairs of responses, and evaluate them."
    verbs = commands.add_parser("reward-model", help=text, description=text).add_subparsers(
        required=True, metavar="VERB"
    )
    text = "Train on {prompt, chosen, rejected}: a progress bar, then models, metrics and a plot in the run directory."
    train = verbs.add_parser(
        "train",
        help=text,
        description=text,
        epilog=keys_by_section(RewardModelConfig, "--reward-model "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
        type=directory,
        metavar="DIR",
        help="where results go (default: RUN/evaluation, else evaluation/MODEL)",
    )
    evaluate.add_argument(
        "--pairs", metavar="FILE", help="pairs in place of those that the run held out; `embedded`: held-out ones"
    )
    evaluate.add_argument(
        "--ranked", metavar="FILE", help="prompts with ranked responses, as BSR publishes them, commas between files"
    )
    evaluate.add_argument(
        "--split", metavar="NAME", help="split of --pairs or --ranked, in an HF data set (default: the run's)"
    )
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
        "--seed", type=int, default=0, metavar="N", help="seed of the splits and of all drawing (default 0)"
    )
    add_trust(evaluate)
    evaluate.set_defaults(command=_evaluate_reward_model)


def _train_reward_model(parsed: argparse.Namespace) -> dict[str, Any]:
    config = RewardModelConfig.from_yaml(parsed.config, parsed.overrides)
    from r2m_async.reward_models.process_group import process_group
    from r2m_async.reward_models.training import train

    with process_group(config.run.device):
        run = train(config)
        say(f"run directory: {run}")  # inside, where the first process alone prints
    return {"run_directory": str(run)}


def _resume_reward_model(parsed: argparse.Namespace) -> dict[str, Any]:
    config = RewardModelConfig.from_yaml(parsed.run / "config.yaml")
    from r2m_async.reward_models.process_group import process_group
    from r2m_async.reward_models.training import resume

    with process_group(config.run.device):
        run = resume(parsed.run)
        say(f"run directory: {run}")
    return {"run_directory": str(run)}


def _evaluate_reward_model(parsed: argparse.Namespace) -> dict[str, Any]:
    from r2m_async.evaluation.reward_models import EvaluationSources, evaluate, write_evaluation

    check_split(parsed)
    sources = EvaluationSources(
        pairs=parsed.pairs,
        split=parsed.split,
        ranked=parsed.ranked,
        initial_policy=parsed.initial_policy,
        rm_bench=parsed.rm_bench,
        embedded=parsed.embedded,
        num_prompts=parsed.prompts,
        max_tokens=parsed.max_tokens,
        seed=parsed.seed,
        trust_remote_code=parsed.trust_remote_code,
    )
    model = Path(parsed.model)
    is_run = (model / "config.yaml").is_file()
    out = parsed.out or (model / "evaluation" if is_run else Path("evaluation") / model.name)
    results = evaluate(parsed.model, sources, on_part=lambda what: print(what, file=sys.stderr, flush=True))
    print(write_evaluation(results, out), end="")
    print(f"results: {out}")
    return results_in(out)
