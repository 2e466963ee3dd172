"""Completions of the command line in bash, zsh and fish: commands, options, keys of configs, and their values."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from r2m_async.config import R2MConfig
from r2m_async.config_reference import allowed_values
from r2m_async.reward_models.config import RewardModelConfig


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell, which says by environment variables what has been typed, and leaves. docs/start.md turns it on."""
    import argcomplete
    from argcomplete.completers import FilesCompleter

    files, configs = FilesCompleter(), FilesCompleter(("yaml", "yml"))

    def candidates(prefix: str, action: argparse.Action, parser: argparse.ArgumentParser, **_: object) -> Iterable[str]:
        if action.dest in ("overrides", "explain"):
            of_reward_model = parser.prog.endswith("reward-model train")
            return key_candidates(prefix, of_reward_model, with_values=action.dest == "overrides")
        found: Iterable[str] = (configs if action.dest == "config" else files)(prefix)
        return found

    argcomplete.autocomplete(parser, default_completer=candidates)


def key_candidates(prefix: str, of_reward_model: bool, with_values: bool) -> list[str]:
    """Returns how a key of a config may go on.

    Args:
        prefix: what has been typed of it.
        of_reward_model: whether the config is that of `r2m reward-model train`.
        with_values: whether `=` and a value follow a key. Values are those of keys that allow only some.
    """
    values = allowed_values(RewardModelConfig if of_reward_model else R2MConfig)
    key, given, _ = prefix.partition("=")
    if not with_values:
        return [name for name in values if name.startswith(prefix)]
    if not given:
        return [f"{name}=" for name in values if name.startswith(prefix)]
    return [one for value in values.get(key, ()) if (one := f"{key}={value}").startswith(prefix)]
