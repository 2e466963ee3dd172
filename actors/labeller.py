"""The labeller lets somebody say which of two responses is better, and keeps what the head learns from.

It chooses pairs of each step and asks about them. The answers come in their own time and in any order. `labels` hands out
those that a head update may use, with all that the head needs: embeddings, and hidden states as they were refreshed in
the step of the pair. It is the only stage that remembers a pair, so a checkpoint has all labels under way (`state`).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import Any

from r2m_async.config import R2MConfig
from r2m_async.errors import FunctionFailed
from r2m_async.labels.pairs import chosen_pairs, offline_indices, pair_of, replayed_indices, with_noise
from r2m_async.labels.questions import Answer, Question, Source
from r2m_async.trajectories import (
    GroupRewards,
    HeadGroup,
    Label,
    LabelBatch,
    LabelledPair,
    LabelReport,
    PolicyFeedback,
    RewardEmbeddings,
    StepReport,
    TrajectoryGroup,
)


@dataclass(slots=True)
class _Asked:
    """A pair that waits for its label."""

    question: Question
    answer: Future[Answer]
    asked_at: float
    """When it was asked about, on the clock of `time.monotonic`."""
    group: HeadGroup | None
    """The two responses as the head learns from them, in the order shown. None until the step of the pair is trained."""

    @property
    def label(self) -> Label:
        """The label as it was asked for."""
        return self.question.label


class Labeller:
    """Asks about pairs, and hands out labels."""

    def __init__(self, source: Source | None, config: R2MConfig, offline: Sequence[TrajectoryGroup] = ()) -> None:
        """Begins with nothing asked.

        Args:
            source: gives the labels. None: nothing is asked.
            config: the run's config.
            offline: the pairs of `labels.offline`, each as a group of two.
        """
        self._source, self._config, self._offline = source, config, tuple(offline)
        self._asked: dict[tuple[int, int, int], _Asked] = {}
        """The pairs that wait, in the order in which they were asked about."""
        self._scored: dict[int, dict[int, tuple[RewardEmbeddings, GroupRewards]]] = {}
        """For each step that is not trained yet, its groups with pairs that were asked about."""
        self._pool: list[LabelledPair] = []
        """The pairs that may be used once more, the oldest first."""
        self._failed_in_a_row = 0
        # `labels` may wait while `ask` goes on in another thread.
        self._lock = threading.Lock()

    def ask(
        self,
        step: int,
        groups: list[TrajectoryGroup],
        embeddings: list[RewardEmbeddings],
        rewards: Sequence[GroupRewards],
    ) -> tuple[LabelReport]:
        """Chooses pairs of a step (`pairs.chosen_pairs`), and begins to ask about them.

        Args:
            step: the policy step.
            groups: the groups of the step.
            embeddings: the reward token embeddings of each group.
            rewards: the rewards of each group.

        Returns a report with the pairs.
        """
        labels = chosen_pairs(step, groups, embeddings, rewards, self._config) if self._source else ()
        by_id = {group.ticket.group_id: group for group in groups}
        wanted = {label.group_id for label in labels}
        with self._lock:
            self._scored[step] = {
                one.group_id: (one, scored)
                for one, scored in zip(embeddings, rewards, strict=True)
                if one.group_id in wanted
            }
            for label in labels:
                group, (first, second) = by_id[label.group_id], label.pair
                responses = group.trajectories[first], group.trajectories[second]
                self._begin(Question(label=label, prompt=group.ticket.prompt, responses=responses), None)
        return (LabelReport(version=step, labels=labels, records=[]),)

    def _begin(self, question: Question, group: HeadGroup | None) -> None:
        """Asks about a pair."""
        assert self._source is not None
        self._asked[question.label.key] = _Asked(question, self._source.ask(question), time.monotonic(), group)

    async def before_labels(self, step: int, refreshed: Sequence[PolicyFeedback] | None) -> None:
        """Waits as `labels` does. It is for a ring in one process, which goes on meanwhile."""
        for one in self._due(step):
            ended = asyncio.wrap_future(one.answer)
            # `labels` looks at what it raises. asyncio would complain that nobody has.
            ended.add_done_callback(lambda answer: answer.cancelled() or answer.exception())
            await asyncio.wait([ended], timeout=self._time_left(one))

    def labels(self, step: int, refreshed: Sequence[PolicyFeedback] | None) -> tuple[LabelReport, LabelBatch]:
        """Hands out the labels that the head update of a step uses.

        Under `labels.wait` these are the labels of the pairs that are `labels.max_age` steps old, for which it waits.
        Otherwise they are all that have come, and it waits for none.

        Args:
            step: the policy step.
            refreshed: the refreshed feedback on the step's groups. It is empty if the policy learner left the step out,
                and None if the head reads no feedback.

        Returns a report with all labels whose fate is decided, and the labels that are used. A pair is given up if it has no
        preference, if it took longer than `labels.timeout`, and if no later update could use it.

        Raises FunctionFailed, with what the source raised last, if it failed for more than `labels.max_failed` labels in a
        row.
        """
        for one in self._due(step):
            wait([one.answer], timeout=self._time_left(one))
        with self._lock:
            asked, settled, records, new = self._trained(step, refreshed), [], [], []
            for one in list(self._asked.values()):
                label = self._outcome(one, step)
                if label is None:
                    continue
                del self._asked[label.key]
                one.answer.cancel()
                settled.append(label)
                turned = with_noise(label, self._config)
                records.append(_record(one, turned, step, turned != label))
                if turned.reason is None:
                    new.append(_labelled(one, turned, self._config.labels.states == "refreshed"))
            replayed = tuple(self._pool[index] for index in replayed_indices(step, len(self._pool), self._config))
            if self._config.labels.replay:
                self._pool = [*self._pool, *new][-self._config.labels.replay_from :]
        drawn = offline_indices(step, len(self._offline), self._config)
        offline = tuple(self._offline[index] for index in drawn)
        batch = LabelBatch(step=step, asked=asked, new=tuple(new), replayed=replayed, offline=offline)
        return LabelReport(version=step, labels=tuple(settled), records=records), batch

    def _due(self, step: int) -> list[_Asked]:
        """The pairs whose labels the update of a step waits for."""
        labels = self._config.labels
        with self._lock:
            return [one for one in self._asked.values() if labels.wait and step - one.label.step >= labels.max_age]

    def _time_left(self, one: _Asked) -> float:
        """Seconds after which a pair that has no label is given up."""
        return max(0.0, one.asked_at + self._config.labels.timeout - time.monotonic())

    def _trained(self, step: int, refreshed: Sequence[PolicyFeedback] | None) -> tuple[int, ...]:
        """Completes the pairs of a step that was trained. Returns the groups of which pairs were asked about."""
        scored = self._scored.pop(step, {})
        feedback = {one.group_id: one for one in refreshed or ()}
        left_out = refreshed is not None and not refreshed
        for one in self._asked.values():
            if one.label.step == step and not left_out:
                embeddings, annotated = scored[one.label.group_id]
                states = feedback[one.label.group_id] if refreshed else None
                whole = HeadGroup(embeddings=embeddings, feedback=states, annotated=annotated)
                one.group = pair_of(whole, one.label.pair)
        return tuple(sorted(scored))

    def _outcome(self, one: _Asked, step: int) -> Label | None:
        """The label of a pair, or why it has none. None: its fate is not decided yet."""
        label, labels, age = one.label, self._config.labels, step - one.label.step
        if age < 0:  # the policy is ahead of the head
            return None
        if one.group is None:
            return replace(label, reason="left_out")
        if labels.wait and age < labels.max_age:
            return None
        if one.answer.done():
            try:
                answer = one.answer.result()
            except FunctionFailed as failure:
                self._failed_in_a_row += 1
                if self._failed_in_a_row > labels.max_failed:
                    raise FunctionFailed(
                        f"{failure}\n{self._failed_in_a_row} labels in a row were lost in this way, and labels.max_failed is "
                        f"{labels.max_failed}."
                    ) from None
                return replace(label, reason="failed")
            self._failed_in_a_row = 0
            return answer.of(label)
        if not self._time_left(one):
            return replace(label, reason="timeout")
        return replace(label, reason="late") if age >= labels.max_age else None

    def close(self) -> None:
        """Ends the source. Whoever is asked still is heard no more."""
        if self._source:
            self._source.close()

    # Checkpoints

    def state(self) -> tuple[StepReport, dict[str, Any]]:
        """Returns a report, and what `restore` needs to go on. Call it when all steps that were asked about are trained."""
        asked = [
            {"label": one.label, "prompt": one.question.prompt, "responses": one.question.responses, "group": one.group}
            | {"answer": _saved(one.answer)}
            for one in self._asked.values()
        ]
        state = {"asked": asked, "pool": self._pool, "failed_in_a_row": self._failed_in_a_row}
        return StepReport(version=len(asked), metrics={}), state

    def restore(self, state: dict[str, Any]) -> tuple[int]:
        """Goes on from what `state` returned, and returns the number of pairs that wait.

        A pair without an answer is asked about again, and its time begins anew.
        """
        self._pool, self._failed_in_a_row = list(state["pool"]), state["failed_in_a_row"]
        for one in state["asked"]:
            question = Question(label=one["label"], prompt=one["prompt"], responses=one["responses"])
            if one["answer"] is None:
                self._begin(question, one["group"])
                continue
            answer: Future[Answer] = Future()
            answer.set_result(Answer(**one["answer"]))
            self._asked[question.label.key] = _Asked(question, answer, time.monotonic(), one["group"])
        return (len(self._asked),)


def _labelled(one: _Asked, label: Label, rereads: bool) -> LabelledPair:
    """A pair with its preference, the preferred response first. rereads: whether the policy will read it once more."""
    assert one.group is not None
    order = (0, 1) if label.chosen == label.pair[0] else (1, 0)
    first, second = (one.question.responses[index] for index in order)
    group = pair_of(one.group, order)
    if rereads:
        return LabelledPair(label=label, group=replace(group, feedback=None), trajectories=(first, second))
    return LabelledPair(label=label, group=group)


def _record(one: _Asked, label: Label, step: int, turned: bool) -> dict[str, Any]:
    """What is written of a label: a preference pair as data sets have it, or the two texts and why there is none."""
    question = one.question
    content = question.prompt.content
    record: dict[str, Any] = {"prompt": content if isinstance(content, str) else question.messages}
    names = ("first", "second")
    if label.reason is None:
        names = ("chosen", "rejected") if label.chosen == label.pair[0] else ("rejected", "chosen")
    for name, response in zip(names, question.responses, strict=True):
        record |= {name: response.text, f"{name}_finished": response.finish_reason == "stop"}
    record |= {
        "reason": label.reason,
        "who": label.who,
        "step": label.step,
        "age": step - label.step,
        "group_id": label.group_id,
        "pair": list(label.pair),
        "prompt_id": question.prompt.prompt_id,
        "turned": turned,
    }
    return record


def _saved(answer: Future[Answer]) -> dict[str, Any] | None:
    """An answer as a checkpoint keeps it. None if there is none, or if the source failed: it is asked again."""
    if not answer.done() or answer.cancelled() or answer.exception() is not None:
        return None
    given = answer.result()
    return {"preferred": given.preferred, "reason": given.reason, "who": given.who}
