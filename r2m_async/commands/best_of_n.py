"""`r2m bon`: best-of-n by reward models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from r2m_async.commands.arguments import add_trust, directory
from r2m_async.commands.results import results_in
from r2m_async.errors import ConfigError


def add_best_of_n(commands: Any) -> None:
    """Adds the command."""
    text = "Best-of-n by reward models: proxy and gold against KL. A table, results.json and a plot."
    bon = commands.add_parser("bon", help=text, description=text)
    bon.add_argument("models", nargs="+", metavar="RUN_OR_MODEL", help="named as for `reward-model eval`")
    bon.add_argument(
        "--pool",
        type=Path,
        metavar="FILE",
        help="samples as JSONL: prompt, responses, golds, finished (default: the embedded policy's)",
    )
    bon.add_argument("--gold", metavar="MODEL", help="a reward model whose rewards replace the pool's golds")
    bon.add_argument("--out", type=directory, default=Path("best_of_n"), metavar="DIR", help="(default best_of_n)")
    bon.add_argument("--n", type=int, default=405, metavar="N", help="the largest n (default 405)")
    bon.add_argument(
        "--prompts", type=int, default=40, metavar="N", help="number of prompts of the embedded pool (default 40)"
    )
    bon.add_argument("--samples", type=int, metavar="N", help="samples per prompt of the embedded pool (default: n)")
    bon.add_argument("--max-tokens", type=int, metavar="N", help="longer texts lose the beginning of their prompt")
    bon.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the embedded pool (default 0)")
    add_trust(bon)
    bon.set_defaults(command=_best_of_n)


def _best_of_n(parsed: argparse.Namespace) -> dict[str, Any]:
    from r2m_async.cpu_threads import one_thread
    from r2m_async.evaluation.best_of_n import embedded_pool, load_pool, measure_best_of_n, write_best_of_n, write_pool
    from r2m_async.from_scratch.embedded import embedded_models
    from r2m_async.from_scratch.language import check_held_out

    if parsed.pool is not None:
        pool = load_pool(parsed.pool)
    else:
        check_held_out("--prompts", parsed.prompts)
        if not 1 <= parsed.n <= (parsed.samples or parsed.n):
            raise ConfigError(
                f"--n is {parsed.n} and --samples is {parsed.samples}: the best of n needs n samples or more; "
                f"give --n 1 or more, and either no --samples or as many as --n or more"
            )
        parsed.out.mkdir(parents=True, exist_ok=True)
        with one_thread():
            pool = embedded_pool(embedded_models(), parsed.seed, parsed.prompts, parsed.samples or parsed.n)
        write_pool(pool, parsed.out / "pool.jsonl")
    results = measure_best_of_n(parsed.models, pool, parsed.gold, parsed.n, parsed.max_tokens, parsed.trust_remote_code)
    print(write_best_of_n(results, parsed.out), end="")
    print(f"results: {parsed.out}")
    return results_in(parsed.out)
