"""Arguments that several commands take."""

from __future__ import annotations

import argparse
import math
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


def whole_number(value: str) -> int:
    """Converts an argument to a whole number, 0 or more. Raises ArgumentTypeError if it is none."""
    if not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{value!r} is no whole number of 0 or more")
    return int(value)


def positive(value: str) -> float:
    """Converts an argument to a finite number above 0. Raises ArgumentTypeError if it is none."""
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{value!r} is no finite number above 0")
    return number
