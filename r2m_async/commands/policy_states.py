"""`r2m policy-states`: measure what a policy's states tell of preferences."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from r2m_async.commands.arguments import add_trust, check_split, directory
from r2m_async.commands.results import results_in


def add_policy_states(commands: Any) -> None:
    """Adds the command."""
    text = (
        "What a policy's states tell of preferences, by layer, and their drift in later policies. A table and a plot."
    )
    states = commands.add_parser("policy-states", help=text, description=text)
    states.add_argument("policy", metavar="POLICY", help="an HF name or directory, an OUT of `export`, or `embedded`")
    states.add_argument(
        "--pairs", metavar="FILE", help="named as in `data.preferences` (default for `embedded`: its own)"
    )
    states.add_argument("--split", metavar="NAME", help="split of --pairs that are an HF data set (default train)")
    states.add_argument(
        "--reward-model", metavar="RUN_OR_MODEL", help="named as for `reward-model eval` (default: an export's own)"
    )
    states.add_argument("--later", nargs="+", default=(), metavar="POLICY", help="policies that POLICY became")
    states.add_argument("--out", type=directory, metavar="DIR", help="(default policy_states/POLICY)")
    states.add_argument("--max-tokens", type=int, metavar="N", help="longer texts lose their beginning (default 1024)")
    states.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all drawing (default 0)")
    add_trust(states)
    states.set_defaults(command=_policy_states)


def _policy_states(parsed: argparse.Namespace) -> dict[str, Any]:
    from r2m_async.evaluation.policy_states import PolicySources, policy_states, write_policy_states

    check_split(parsed)
    sources = PolicySources(
        policy=parsed.policy,
        later=tuple(parsed.later),
        pairs=parsed.pairs,
        split=parsed.split,
        reward_model=parsed.reward_model,
        max_tokens=parsed.max_tokens,
        seed=parsed.seed,
        trust_remote_code=parsed.trust_remote_code,
    )
    out = parsed.out or Path("policy_states") / Path(parsed.policy).name
    print(write_policy_states(policy_states(sources), out), end="")
    print(f"results: {out}")
    return results_in(out)
