"""Computes the metrics of a step from what the controller sees, and keeps the trace of all calls.

The controller sees which stage was at work when, and it sees tokens, gold rewards, ages and ledgers. Stages measure
losses and rewards themselves. These measurements are passed on as they are.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from r2m_async.ring.progress import Progress
from r2m_async.ring.stages import Stages
from r2m_async.schedule import Assembly, Schedule
from r2m_async.trajectories import GroupReport

MAX_INTERVALS = 100_000
"""The most intervals that a trace holds. If nobody takes the trace, the oldest are dropped.

A full trace takes about 15 MB, and holds some twenty steps of the largest preset.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """One call of a stage, and when the stage was at work on it."""

    stage: str
    """The name of the stage, for example `rollout-0`."""
    method: str
    """The name of the method that was called."""
    step: int
    """The policy step or the policy version that the call was for. It is -1 for a call of an evaluation."""
    start: float
    """When the work began, in seconds that the ring has run. A resumed run counts on."""
    end: float
    """When the work ended, on the same clock."""


class StepMetrics:
    """Notes what happens in a ring, and computes the metrics of each step from it.

    All times that its methods take are seconds on one clock.
    """

    def __init__(self, stages: Stages, now: float, progress: Progress) -> None:
        """Begins with an empty trace.

        Args:
            stages: the stages of the ring.
            now: the present time. Times in the trace and in the metrics count from here.
            progress: the counts to go on from.
        """
        self.trace: list[Interval] = []
        """At most `MAX_INTERVALS` calls, the one that ended first before the others.

        Whoever takes the trace puts an empty list in its place.
        """
        self.num_dropped = 0
        """How many intervals were dropped because nobody took the trace in time."""
        self.standing: dict[str, dict[str, float]] = {"head": dict(progress.head_update)}
        """Metrics that are a part of every step until their source measures again.

        They are kept by source: the last publication, the last head update, the last load of weights.
        """
        self.waited: dict[str, float] = {}
        """For how many seconds the policy learner waited for what before the present step (`wait/...`)."""
        self._last_arrival: dict[int, tuple[float, int]] = {}
        """For each step, when its last group so far arrived, and from which rollout actor."""
        self._actors = {stage.name: index for index, stage in enumerate(stages.rollouts)}
        self._kinds = {
            "rollouts": [stage.name for stage in stages.rollouts],
            "annotators": [stage.name for stage in stages.annotators],
            "policy_learner": [stages.policy.name],
            "head_learner": [stages.head.name],
        }
        self._reports: dict[int, GroupReport] = {}
        self._gold: dict[int, float] = {}
        self._tokens = Counter(generated=progress.generated_tokens, trained=progress.trained_tokens)
        self._responses, self._sampled = progress.responses, progress.tokens
        """Responses and response tokens of all trained groups."""
        self._busy: dict[str, float] = defaultdict(float)
        self._free_at: dict[str, float] = defaultdict(float)
        self._began, self._reported = now - progress.seconds, now

    def worked(self, stage: str, method: str, step: int, asked: float, end: float, beside: bool = False) -> None:
        """Notes that a call has ended.

        Args:
            stage: the name of the stage.
            method: the name of the method.
            step: the policy step or the policy version that the call was for, or -1 for an evaluation.
            asked: when the call was made.
            end: when it ended.
            beside: True if the stage may have done other work at the same time. The call then does not count as time in
                which the stage was busy.
        """
        start = asked
        # Time in which calls overlap counts once. So this call begins where the call before it ended: perhaps it had to
        # wait until then.
        if not beside:
            start = max(asked, self._free_at[stage])
            self._free_at[stage] = end
            self._busy[stage] += end - start
        if len(self.trace) >= MAX_INTERVALS:
            # Many at once, because every deletion at the front moves the whole rest of the list.
            too_old = MAX_INTERVALS // 10
            del self.trace[:too_old]
            self.num_dropped += too_old
        self.trace.append(
            Interval(stage=stage, method=method, step=step, start=start - self._began, end=end - self._began)
        )

    def generated(self, num_tokens: int) -> None:
        """Counts response tokens that were generated, whether or not they are ever trained."""
        self._tokens["generated"] += num_tokens

    def arrived(self, group_id: int, report: GroupReport) -> None:
        """Keeps the report of a group that has arrived, for the metrics of its step."""
        self._reports[group_id] = report

    def delivered(self, step: int, actor: str, now: float) -> None:
        """Notes that a rollout actor has delivered a group of a step."""
        self._last_arrival[step] = now, self._actors[actor]

    def step_begins(self, step: int, waited_since: float, now: float) -> None:
        """Says for what the policy learner has waited since a time: for the groups of the step, and then for the head.

        `wait/slowest_rollout` is the number of the actor whose group came last, if the learner waited for it.
        """
        arrived, actor = self._last_arrival.pop(step, (waited_since, 0))
        for_rollouts = min(max(arrived - waited_since, 0.0), now - waited_since)
        self.waited = {"wait/rollouts": for_rollouts, "wait/head": now - waited_since - for_rollouts}
        if for_rollouts > 0:
            self.waited["wait/slowest_rollout"] = float(actor)

    def annotated(self, group_id: int, gold: float) -> None:
        """Keeps the mean gold reward of a group, which comes with its embeddings, for the metrics of its step.

        Args:
            group_id: the group.
            gold: the reward. It is NaN if there is none, or if it is not finite.
        """
        self._gold[group_id] = gold

    def forget(self, group_ids: Iterable[int]) -> None:
        """Forgets groups that will be in no step."""
        for group_id in group_ids:
            self._reports.pop(group_id, None)
            self._gold.pop(group_id, None)

    def progress(self, schedule: Schedule, now: float, **further: Any) -> Progress:
        """Returns how far the run has come at the time `now`. `schedule` must be drained.

        further: the fields of `Progress` that neither these metrics nor the schedule know.
        """
        return Progress(
            step=schedule.head_version,
            seconds=now - self._began,
            trained=schedule.head_ledger.trained,
            voided=dict(schedule.voided_so_far()),
            reissued=dict(schedule.reissued),
            fenced=schedule.fenced,
            responses=self._responses,
            tokens=self._sampled,
            generated_tokens=self._tokens["generated"],
            trained_tokens=self._tokens["trained"],
            head_update=self.standing["head"],
            **further,
        )

    def of_step(
        self, assembly: Assembly, schedule: Schedule, measured: Mapping[str, float], now: float
    ) -> dict[str, float]:
        """Returns the metrics of the step that was just trained, by name. It forgets the groups of the step.

        Args:
            assembly: the step.
            schedule: the schedule, which has noted already that the step is trained.
            measured: the metrics that the stages measured in this step.
            now: the present time.

        Metrics named `time/...` are in seconds, and those named `age/...` in steps. `idle/...` is the share of the time
        since the last step in which the stages of a kind did not work.
        """
        reports = [self._reports.pop(group_id) for group_id in assembly.group_ids]
        gold = [self._gold.pop(group_id) for group_id in assembly.group_ids]
        self._tokens["trained"] += int(measured.get("length/trained_tokens", 0))
        elapsed = max(now - self._reported, 1e-9)
        responses, tokens = (sum(getattr(one, name) for one in reports) for name in ("num_responses", "num_tokens"))
        self._responses += responses
        self._sampled += tokens
        metrics = {
            "step": float(schedule.policy_version),
            "time/since_start": now - self._began,
            "time/step": elapsed,
            "throughput/responses_per_s": responses / elapsed,
            "throughput/responses": float(responses),
            "throughput/tokens": float(tokens),
            "throughput/tokens_per_s": tokens / elapsed,
            "age/policy_max": float(max(assembly.policy_ages, default=0)),
            "age/policy_mean": statistics.fmean(assembly.policy_ages) if assembly.policy_ages else 0.0,
            "age/head": float(assembly.step - assembly.head_version),
            "length/trained_over_generated": self._tokens["trained"] / max(1, self._tokens["generated"]),
            "queue/bytes": float(schedule.reserved_bytes),
            "ledger/admitted": float(schedule.policy_ledger.admitted),
            "ledger/trained": float(schedule.policy_ledger.trained),
            "ledger/voided": float(schedule.policy_ledger.voided.total()),
            "ledger/reissued": float(schedule.reissued.total()),
            "ledger/fenced": float(schedule.fenced),
        }
        for reason, count in schedule.policy_ledger.voided.items():
            metrics[f"ledger/voided/{reason}"] = float(count)
        for reason, count in schedule.reissued.items():
            metrics[f"ledger/reissued/{reason}"] = float(count)
        if gold and not any(map(math.isnan, gold)):
            metrics["reward/gold"] = statistics.fmean(gold)
        for kind, members in self._kinds.items():
            busy = sum(self._busy[name] for name in members) / elapsed / len(members)
            metrics[f"idle/{kind}"] = 1 - min(1.0, busy)
        metrics |= {**self.waited, **measured}
        for ones in self.standing.values():
            metrics |= ones
        self._reported = now
        self._busy.clear()
        return metrics
