"""`r2m eval generate | judge | win-rate`: answers for judges, reward models as judges, and win rates."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from r2m_async.commands.arguments import add_trust, directory
from r2m_async.commands.results import results_in


def add_eval(commands: Any) -> None:
    """Adds the command with its verbs."""
    text = "Answers for AlpacaEval, MT-Bench and TL;DR judges; reward models as judges; win rates."
    verbs = commands.add_parser("eval", help=text, description=text).add_subparsers(required=True, metavar="VERB")
    text = "Answer a judge's prompts, into the file that it reads. Interrupted, it goes on where it was."
    generate = verbs.add_parser("generate", help=text, description=text)
    generate.add_argument("model", metavar="MODEL", help="an HF name or directory, or an OUT of `export`")
    generate.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="a JSON list or JSONL")
    generate.add_argument("--format", choices=("alpaca_eval", "mt_bench", "tldr", "pool"), required=True)
    generate.add_argument("--out", type=Path, required=True, metavar="FILE_OR_DIR", help="new; a file has a suffix")
    generate.add_argument("--engine", choices=("vllm", "transformers"), default="vllm", help="(default vllm)")
    generate.add_argument("--name", metavar="GENERATOR", help="the model's name in the file (default: MODEL's)")
    generate.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the format's)")
    generate.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="per turn (default 2048, 1024, TL;DR 50, pool 512; or what fits)",
    )
    generate.add_argument("--max-prompt-tokens", type=int, metavar="N", help="(default: as the prompts need)")
    generate.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="turns or raw text (default: TL;DR raw)"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="(default 0)")
    generate.add_argument("--num", type=int, metavar="N", help="the first N prompts only")
    generate.add_argument("--samples", type=int, default=1, metavar="N", help="per prompt of a pool (default 1)")
    generate.add_argument("--batch", type=int, metavar="N", help="prompts at once (default 128; transformers 1)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    generate.add_argument("--dtype", choices=dtypes, default="auto", help="(default: the checkpoint's)")
    generate.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs of the vLLM engine")
    add_trust(generate)
    generate.set_defaults(command=_generate_answers)
    text = "Score answers by a reward model, and against other answers: rewards and win rates."
    judge = verbs.add_parser("judge", help=text, description=text)
    judge.add_argument("outputs", metavar="OUTPUTS", type=Path, help="answers in any of the formats")
    judge.add_argument(
        "--judge",
        required=True,
        metavar="RUN_OR_MODEL",
        help="named as for `reward-model eval`, or module:attr of a function",
    )
    judge.add_argument("--against", metavar="OUTPUTS", help="answers to the same prompts; `reference`: TL;DR's authors")
    judge.add_argument("--prompts", type=Path, metavar="FILE", help="MT-Bench's questions")
    judge.add_argument("--max-tokens", type=int, metavar="N", help="longer texts lose the beginning of their prompt")
    judge.add_argument("--out", type=directory, metavar="DIR", help="(default: OUTPUTS without suffix, -judged)")
    add_trust(judge)
    judge.set_defaults(command=_judge)
    text = "Win rate and length-controlled win rate of a judge's annotations, as AlpacaEval writes them."
    rate = verbs.add_parser("win-rate", help=text, description=text)
    rate.add_argument("annotations", metavar="ANNOTATIONS", type=Path)
    text = "AlpacaEval's df_gamed.csv, for its own length-controlled rate"
    rate.add_argument("--gamed", type=Path, metavar="FILE", help=text)
    rate.add_argument("--out", type=directory, metavar="DIR", help="(default: ANNOTATIONS without suffix, -win-rate)")
    rate.set_defaults(command=_win_rate)


def _generate_answers(parsed: argparse.Namespace) -> dict[str, Any]:
    from r2m_async.evaluation.answering import GenerationSettings, generate_answers

    names = [field.name for field in dataclasses.fields(GenerationSettings)]
    settings = GenerationSettings(**{name: getattr(parsed, name) for name in names})
    answers = generate_answers(parsed.model, parsed.prompts, parsed.out, settings, parsed.name)
    print(f"answers: {answers}")
    return {"answers": str(answers)}


def _judge(parsed: argparse.Namespace) -> dict[str, Any]:
    from r2m_async.evaluation.judging import judge, write_judgement

    out = parsed.out or parsed.outputs.with_name(f"{parsed.outputs.stem}-judged")
    judged = judge(
        parsed.outputs, parsed.judge, parsed.against, parsed.prompts, parsed.max_tokens, parsed.trust_remote_code
    )
    print(write_judgement(judged, out), end="")
    print(f"results: {out}")
    return results_in(out)


def _win_rate(parsed: argparse.Namespace) -> dict[str, Any]:
    from r2m_async.evaluation.alpaca_length_control import load_gamed_baselines
    from r2m_async.evaluation.judging import read_annotations, win_rate_table, win_rates
    from r2m_async.runs.results import write_results

    out = parsed.out or parsed.annotations.with_name(f"{parsed.annotations.stem}-win-rate")
    gamed = None if parsed.gamed is None else load_gamed_baselines(parsed.gamed)
    results = win_rates(read_annotations(parsed.annotations), gamed)
    told = win_rate_table(results)
    write_results(out, results, told)
    print(told, end="")
    print(f"results: {out}")
    return results_in(out)
