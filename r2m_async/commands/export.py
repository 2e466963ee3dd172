"""`r2m export`: write the models of a run as directories that transformers loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from r2m_async.commands.arguments import add_trust, directory


def add_export(commands: Any) -> None:
    """Adds the command."""
    text = "Write a run's policy and reward model as directories that transformers loads."
    export = commands.add_parser("export", help=text, description=text)
    export.add_argument(
        "source", metavar="RUN", type=Path, help="a run directory (its newest checkpoint) or a checkpoint"
    )
    export.add_argument("out", metavar="OUT", type=directory, help="the directory to write, new or empty")
    add_trust(export)
    export.set_defaults(command=_export)


def _export(parsed: argparse.Namespace) -> dict[str, Any]:
    from r2m_async.export import export

    checkpoint = export(parsed.source, parsed.out, parsed.trust_remote_code)
    print(f"checkpoint    {checkpoint}")
    print(f"policy        {parsed.out / 'policy'}")
    reward_model = parsed.out / "reward_model"
    there = reward_model.exists()
    print(f"reward model  {reward_model if there else 'none: reward.model is null'}")
    return {
        "checkpoint": str(checkpoint),
        "policy": str(parsed.out / "policy"),
        "reward_model": str(reward_model) if there else None,
    }
