"""Names the embedded languages: `embedded`, the quickstart's, and `embedded:letters`, a harder one.

    language = LANGUAGES["embedded:letters"]
    language.prompts(8, seed=0)
    language.models().policy

A config chooses one by the same name in `model.policy`, `reward.model` and `data.prompts`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from r2m_async.errors import ConfigError
from r2m_async.from_scratch import language, letters

if TYPE_CHECKING:
    from r2m_async.from_scratch.word_models import EmbeddedModels, OnStage


class Prompts(Protocol):
    """How prompts of a language are drawn, as in `language.prompts`."""

    def __call__(self, num: int, seed: int, *, held_out: bool = False) -> list[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedLanguage:
    """A language that comes with this package."""

    name: str
    """Its name in a config."""
    prompts: Prompts
    num_training_prompts: int
    num_held_out_prompts: int
    build: Callable[[OnStage | None], EmbeddedModels]

    def models(self, on_progress: OnStage | None = None) -> EmbeddedModels:
        """Returns the models of the language, and trains them first if the cache does not have them."""
        return self.build(on_progress)


def _quickstart_models(on_progress: OnStage | None) -> EmbeddedModels:
    from r2m_async.from_scratch.embedded import embedded_models  # loads torch

    return embedded_models(on_progress=on_progress)


def _letters_models(on_progress: OnStage | None) -> EmbeddedModels:
    from r2m_async.from_scratch.embedded_letters import embedded_letters  # loads torch

    return embedded_letters(on_progress=on_progress)


LANGUAGES = {
    one.name: one
    for one in (
        EmbeddedLanguage(
            name="embedded",
            prompts=language.prompts,
            num_training_prompts=language.NUM_TRAINING_PROMPTS,
            num_held_out_prompts=language.NUM_HELD_OUT_PROMPTS,
            build=_quickstart_models,
        ),
        EmbeddedLanguage(
            name="embedded:letters",
            prompts=letters.prompts,
            num_training_prompts=letters.NUM_TRAINING_PROMPTS,
            num_held_out_prompts=letters.NUM_HELD_OUT_PROMPTS,
            build=_letters_models,
        ),
    )
}
"""All embedded languages, by the name that a config gives them."""


def refuse_other_languages(key: str, name: str) -> None:
    """Raises ConfigError for an embedded language where only the quickstart's is known. key: what gives the name."""
    if name.startswith("embedded:"):
        raise ConfigError(
            f"{key} is {name!r}: only the quickstart's language is known here; use 'embedded', or name {name!r} in model.policy, "
            f"reward.model and data.prompts of a run, as configs/letters.yaml does"
        )
