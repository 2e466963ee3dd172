"""Labels in the ring: their clock, their book, and the way of a pair to the head's update.

    scored step -> ask -> (a labeller, in its own time) -> labels -> head update

The *age* of a label is the step whose head update uses it first, minus the step of its responses. The label stage hands
out what may be used, and what is given up. What is asserted and counted here is:

    asked = used + waiting + voided (with a reason)
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from r2m_async.ring.stages import Payload
from r2m_async.ring.state import RingState
from r2m_async.trajectories import Label


class LabelBook:
    """The book of the labels of one run. Every pair that was asked about is in it once: used, waiting or voided."""

    def __init__(self, max_age: int, exact: bool, saved: Mapping[str, Any] | None = None) -> None:
        """Begins empty, or with what `saved` returned.

        Args:
            max_age: the largest age of a label, in steps.
            exact: whether every label that is used has that age.
            saved: what the book was when a checkpoint was written. None or empty: nothing was asked yet.
        """
        saved = saved or {}
        self._max_age, self._exact = max_age, exact
        self.asked: int = saved.get("asked", 0)
        self.used: int = saved.get("used", 0)
        self.voided: Counter[str] = Counter(saved.get("voided", {}))
        self._waiting: dict[tuple[int, ...], int] = {tuple(key): step for *key, step in saved.get("waiting", [])}
        """For each pair that waits for its label, the step of its responses."""

    def ask(self, labels: Sequence[Label]) -> None:
        """Notes pairs that were asked about. Raises RuntimeError if one waits already."""
        for label in labels:
            if label.key in self._waiting:
                raise RuntimeError(f"the pair {label.key} is asked about twice")
            self._waiting[label.key] = label.step
            self.asked += 1

    def settle(self, step: int, labels: Sequence[Label]) -> list[int]:
        """Notes the labels that the head update of `step` uses, and those that are given up. Returns the ages of the former.

        Raises RuntimeError for a label that nobody waits for, for one of another age than it may have, and if a pair
        is left waiting that no later update could use.
        """
        ages = []
        for label in labels:
            asked_in = self._waiting.pop(label.key, None)
            if asked_in != label.step:
                raise RuntimeError(f"a label came for the pair {label.key} of step {label.step}, which waits for none")
            if label.reason is not None:
                self.voided[label.reason] += 1
                continue
            age = step - asked_in
            if not 0 <= age <= self._max_age or (self._exact and age != self._max_age):
                raise RuntimeError(
                    f"the update of step {step} would use a label of age {age}, and labels.max_age is {self._max_age}"
                    f"{' (labels.wait)' if self._exact else ''}"
                )
            self.used += 1
            ages.append(age)
        if late := [key for key, asked_in in self._waiting.items() if step - asked_in >= self._max_age]:
            raise RuntimeError(f"after the update of step {step} no other can use the labels of the pairs {late}")
        self.check()
        return ages

    def check(self) -> None:
        """Raises RuntimeError if the book does not balance."""
        if self.asked != self.used + len(self._waiting) + self.voided.total():
            raise RuntimeError(
                f"the book of labels does not balance: {self.asked} asked, {self.used} used, {len(self._waiting)} waiting, "
                f"voided {dict(self.voided)}"
            )

    def metrics(self, ages: Sequence[int]) -> dict[str, float]:
        """The counts of the run so far, and the ages of the labels that the last update used, in steps."""
        counts = {
            "asked": self.asked,
            "used": self.used,
            "waiting": len(self._waiting),
            "voided": self.voided.total(),
            **{f"voided/{reason}": count for reason, count in self.voided.items()},
        }
        metrics = {f"labels/{name}": float(count) for name, count in counts.items()}
        if ages:
            metrics |= {"age/label_max": float(max(ages)), "age/label_mean": statistics.fmean(ages)}
        return metrics

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps of the book."""
        waiting = [[*key, step] for key, step in self._waiting.items()]
        return {"asked": self.asked, "used": self.used, "voided": dict(self.voided), "waiting": waiting}


class Labels:
    """What the controller does with the labels of a run that has a `labels.source`."""

    def __init__(self, state: RingState, saved: Mapping[str, Any]) -> None:
        """Begins where `saved` ends, which is what `LabelBook.saved` returned, or empty for a new run."""
        assert state.stages.labels is not None
        self._state, self._stage = state, state.stages.labels
        self.book = LabelBook(state.config.labels.max_age, state.config.labels.wait, saved)
        self.records: list[dict[str, Any]] = []
        """What is to be written of the labels that have come since somebody took this list."""

    async def ask(self, step: int, groups: list[Payload], embeddings: list[Payload], rewards: Payload) -> None:
        """Lets the label stage choose pairs of a step that was scored, and ask about them. It waits for no answer."""
        report = await self._state.calls.traced(self._stage.ask(step, groups, embeddings, rewards), step=step)
        self.book.ask(report.labels)

    async def due(self, step: int, refreshed: Payload) -> tuple[Payload, dict[str, float]]:
        """Returns the labels that the head update of a step uses, and the metrics of the book.

        It waits for labels only under `labels.wait`.

        Args:
            step: the policy step. `ask` has returned for it.
            refreshed: the refreshed feedback of the step, as the policy learner's `train` made it.
        """
        report, batch = await self._state.calls.traced(self._stage.labels(step, refreshed), step=step)
        ages = self.book.settle(step, report.labels)
        self.records += report.records
        return batch, self.book.metrics(ages)
