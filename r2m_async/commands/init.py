"""`r2m init`: write a first config for a policy, a reward model and hardware."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from r2m_async.commands.arguments import positive, whole_number
from r2m_async.errors import ConfigError


def add_init(commands: Any) -> None:
    """Adds the command."""
    text = "Write a commented config for a policy, a reward model and hardware. Models must be on this machine."
    init = commands.add_parser("init", help=text, description=text)
    init.add_argument("--policy", required=True, metavar="NAME", help="an HF name or directory, or `embedded`")
    init.add_argument("--reward", required=True, metavar="NAME", help="an HF name or directory, or `embedded`")
    init.add_argument("--prompts", metavar="SOURCE", help="as `data.prompts` (default for `embedded`: its own)")
    hardware = init.add_mutually_exclusive_group(required=True)
    hardware.add_argument("--gpus", type=whole_number, metavar="N", help="number of GPUs, 1 or more")
    hardware.add_argument("--cpu", action="store_true", help="no GPU")
    init.add_argument("--gpu-memory", type=positive, metavar="GIB", help="of one GPU (default: of this machine's)")
    init.add_argument("--out", type=Path, metavar="FILE", help="a new file (default: standard output)")
    init.set_defaults(command=_init)


def _init(parsed: argparse.Namespace) -> dict[str, Any]:
    from r2m_async.launch.initial_config import initial_config, written
    from r2m_async.whole import write_file

    if parsed.gpus == 0:
        raise ConfigError(f"--gpus is {parsed.gpus}: expected 1 or more; without a GPU write --cpu")
    if parsed.out is not None and parsed.out.exists():
        raise ConfigError(f"--out {parsed.out}: is there already; name a new file")
    if parsed.out is not None and not parsed.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {parsed.out}: {parsed.out.absolute().parent} is no directory; make it first")
    tree = initial_config(parsed.policy, parsed.reward, parsed.prompts, parsed.gpus or 0, parsed.gpu_memory)
    text = written(tree, parsed.out)
    if parsed.out is None:
        print(text, end="")
    else:
        write_file(parsed.out, text)
        print(f"written: {parsed.out}; `r2m check {parsed.out}` says what it takes")
    return {"file": None if parsed.out is None else str(parsed.out), "config": tree}
