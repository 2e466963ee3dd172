"""Finds the source of labels that a config names."""

from __future__ import annotations

from collections.abc import Callable, Collection

from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.labels.files import FileSource, check_files
from r2m_async.labels.functions import FunctionSource
from r2m_async.labels.judge import pairwise
from r2m_async.labels.people import PeopleSource, check_people
from r2m_async.labels.questions import Source


def source_of(config: R2MConfig) -> Source:
    """Returns the source of a config that has one. Raises ConfigError as `check_source` does."""
    make, _ = _found(config)
    return make()


def check_source(config: R2MConfig) -> None:
    """Raises ConfigError if the source of labels cannot be found, or its options do not fit. Without a source it is fine."""
    if config.labels.source is not None:
        _found(config)


def missing_columns(config: R2MConfig, columns: Collection[str]) -> list[str]:
    """Returns what the source asks for and a record with these columns does not have."""
    if config.labels.source is None:
        return []
    _, asks = _found(config)
    return [name for name in asks if name not in columns]


def _found(config: R2MConfig) -> tuple[Callable[[], Source], Collection[str]]:
    """Returns what makes the source, and the columns that it asks for. Raises ConfigError."""
    labels = config.labels
    watched: dict[str, tuple[Callable[..., Source], Callable[..., None]]] = {
        "people": (PeopleSource, check_people),
        "file": (FileSource, check_files),
    }
    if labels.source in watched:
        make, check = watched[labels.source]
        try:
            check(**labels.options)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"labels.source {labels.source!r}: labels.options: {error}") from None
        return lambda: make(**labels.options), ()
    if labels.source == "judge":
        function = FunctionSource(labels, pairwise, f"judge:{labels.options.get('model')}")
    else:
        function = FunctionSource(labels)
    return lambda: function, function.columns
