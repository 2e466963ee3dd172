"""Says which package a reward function lacks. They are the extra `rewards`, which not everybody installs."""

from __future__ import annotations

import importlib.util

from r2m_async.errors import ConfigError


def needs(module: str, package: str) -> None:
    """Raises ConfigError, with the command that installs it, if a module cannot be imported."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"needs the package {package}, which is not installed: pip install 'r2m-async[rewards]'")
