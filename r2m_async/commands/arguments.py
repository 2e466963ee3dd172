"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from pathlib import Path

from r2m_async.errors import ConfigError


def directory(value: str) -> Path:
    """Converts an argument to the path of a folder. Raises ArgumentTypeError if a file is in the way.

    Some commands compute for hours before they write. So this is checked before they begin.
    """
    path = Path(value)
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file; name a directory")
    return path


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--trust-remote-code` of commands that load models without a config."""
    text = "run Python code that comes with a model's files (default: refuse a model that needs it)"
    parser.add_argument("--trust-remote-code", action="store_true", help=text)


def check_split(parsed: argparse.Namespace) -> None:
    """Raises ConfigError if `--split` is given, but neither `--pairs` nor `--ranked`, whose split it would be."""
    if parsed.split is not None and parsed.pairs is None and getattr(parsed, "ranked", None) is None:
        raise ConfigError(f"--split {parsed.split}: is a split of --pairs, which is not given; give both or neither")
