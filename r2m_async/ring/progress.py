"""How far a run has come: what a checkpoint keeps of its counts, so that a resumed run counts on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The counts of a run between two steps, when nothing is under way. A new run begins with the defaults.

    Groups that were generated ahead are in none of the counts: no checkpoint holds them, and a resumed run generates
    them anew.
    """

    step: int = 0
    """Policy steps taken."""
    seconds: float = 0.0
    """How long the ring has run, in seconds. The time between two starts does not count."""
    trained: int = 0
    """Groups that were trained."""
    voided: Mapping[str, int] = field(default_factory=dict)
    """Groups of these steps that were given up, by reason."""
    reissued: Mapping[str, int] = field(default_factory=dict)
    """Groups that were taken back from a lost worker, or refilled, by reason."""
    fenced: int = 0
    """Results of attempts that nobody waited for any more."""
    responses: int = 0
    """Responses of the trained groups."""
    tokens: int = 0
    """Response tokens of the trained groups."""
    generated_tokens: int = 0
    """Response tokens that were generated, whether or not they were trained."""
    trained_tokens: int = 0
    """Response tokens that were trained."""
    stopped_at_kl: float | None = None
    """The KL to the reference at which `objective.kl_stop` ended the run. None if it did not."""
    head_update: Mapping[str, float] = field(default_factory=dict)
    """What the head's last update measured. The metrics of the next step show it."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """The book of labels (`labels.LabelBook.saved`). Empty without a `labels.source`."""
    evaluation: Mapping[str, float] | None = None
    """The newest evaluation. None if there was none."""

    def is_stopped_by(self, kl_stop: float | None) -> bool:
        """Whether a KL ended the run that `kl_stop` would end it for again."""
        return self.stopped_at_kl is not None and kl_stop is not None and self.stopped_at_kl > kl_stop
