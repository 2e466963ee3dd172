"""`r2m config`: what the keys of a config mean."""

from __future__ import annotations

import argparse
import json
from typing import Any

from r2m_async.config import R2MConfig
from r2m_async.config_reference import explain, json_schema, keys_by_section
from r2m_async.reward_models.config import RewardModelConfig


def add_config(commands: Any) -> None:
    """Adds the command."""
    text = "Say what a key of a config means, or write a JSON schema with which an editor checks a config."
    config = commands.add_parser(
        "config",
        help=text,
        description=text,
        epilog=keys_by_section(R2MConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = config.add_mutually_exclusive_group(required=True)
    text = "doc, type, allowed values, unit and default of a key; the keys of a section; without KEY the sections"
    what.add_argument("--explain", nargs="?", const="", metavar="KEY", help=text)
    text = "the JSON schema, on standard output; docs/configs.md says how an editor uses it"
    what.add_argument("--schema", action="store_true", help=text)
    text = "of the configs of `r2m reward-model train`, instead of those of `r2m train`"
    config.add_argument("--reward-model", action="store_true", help=text)
    config.set_defaults(command=_config)


def _config(parsed: argparse.Namespace) -> dict[str, Any]:
    tree = RewardModelConfig if parsed.reward_model else R2MConfig
    if parsed.schema:
        schema = json_schema(tree)
        print(json.dumps(schema, indent=1))
        return schema
    told = explain(tree, parsed.explain)
    print(told, end="")
    return {"explanation": told}
