"""The schedule: who may do what, when. Pure Python, no Ray, no torch, no waiting (design.md, "The two clocks").

Groups are numbered 0, 1, 2, ...; group g is due in step d = g // B. Two clocks tick once per step: the policy version
v (completed policy steps) and the head version u (completed head updates). A group's life:

    admitted -> in flight (-> lost -> in flight again) -> queued -> leased -> trained by the policy -> by the head -> freed
                     \\-> voided(reason)

The controller and the simulator drive this very code; every method is a transition that either happens at once or
raises `RuntimeError` because the caller broke the contract.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the schedule is told once."""

    num_steps: int
    groups_per_step: int
    """B."""
    max_policy_age: int
    """Due step minus the oldest policy version in a group, at most."""
    max_head_age: int
    """Step minus the head version that scores it, at most."""
    lag: Literal["bounded", "exact"] = "bounded"
    overage: Literal["wait", "mask", "drop"] = "wait"
    overage_after: float = 60.0
    max_bytes: int
    group_bytes: int
    """Worst case of one group; `max_bytes` holds at least B of them."""
    embedding_bytes: int = 0
    """The part of it that embedding adds to a group after its arrival."""

    def __post_init__(self) -> None:
        if self.max_bytes < self.groups_per_step * self.group_bytes:
            raise ValueError(
                f"max_bytes {self.max_bytes} does not hold one step of {self.groups_per_step} x {self.group_bytes} bytes"
            )

    def due_step(self, group_id: int) -> int:
        return group_id // self.groups_per_step

    def policy_version_for(self, step: int) -> int:
        """The oldest version that may generate for `step`; in `exact` the only one."""
        return max(0, step - self.max_policy_age)

    def head_version_for(self, step: int) -> int:
        """The oldest head version that may score `step`; in `exact` the only one."""
        return max(0, step - self.max_head_age)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """Leave to generate a group with one policy version."""

    group_id: int
    due_step: int
    attempt: int
    policy_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """A step whose groups are all there (or voided) and the head version that scores it."""

    step: int
    group_ids: tuple[int, ...]
    head_version: int
    policy_ages: tuple[int, ...]
    """Per group: step minus its oldest policy version."""


@dataclass
class Ledger:
    """Double entry for one learner: admitted = trained + in flight + queued + voided(reason)."""

    admitted: int = 0
    in_flight: int = 0
    queued: int = 0
    trained: int = 0
    voided: Counter[str] = field(default_factory=Counter)

    def check(self) -> None:
        accounted = self.trained + self.in_flight + self.queued + self.voided.total()
        if self.admitted != accounted or min(self.in_flight, self.queued) < 0:
            raise RuntimeError(f"the ledger does not balance: {self}")


@dataclass
class _Group:
    due_step: int
    attempt: int
    worker: str | None
    """Who generates it; None once arrived, or while it waits to be issued again."""
    policy_version: int
    admitted_at: float
    num_bytes: int
    """Reserved: the worst case until it arrives."""
    arrived: bool = False
    oldest_version: int = 0
    passed_policy: bool = False


class Schedule:
    """Tickets, clocks, bytes and ledgers of one run, from `first_step` on (a resumed run's trained frontier)."""

    def __init__(self, plan: Plan, first_step: int = 0) -> None:
        self.plan = plan
        self.policy_version = first_step
        self.head_version = first_step
        self.num_steps = plan.num_steps
        self.reserved_bytes = 0
        self.policy_ledger = Ledger()
        self.head_ledger = Ledger()
        self.reissued: Counter[str] = Counter()
        self.fenced = 0
        self._groups: dict[int, _Group] = {}
        self._next_group = first_step * plan.groups_per_step
        self._lost: list[int] = []  # a heap; whoever takes the first of it asks whether that still waits
        self._arrived_steps: Counter[int] = Counter()
        self._voided_steps: Counter[int] = Counter()
        self._leased: Assembly | None = None
        self._last_arrival: dict[int, float] = {}
        self._step_began = 0.0

    # Tickets

    def admit(self, worker: str, latest: int, now: float) -> Admission | None:
        """The oldest group that `worker` may start, or None while there is none.

        `latest` is the newest policy version that the worker has or can load; the admission says which one it uses.
        """
        if (lost := self._oldest_lost()) is not None:
            group_id = lost
            version = self._version_for(self._groups[group_id].due_step, latest)
            if version is None:
                return None
            heapq.heappop(self._lost)
        else:
            group_id = self._next_group
            step = self.plan.due_step(group_id)
            version = self._version_for(step, latest)
            if version is None or step >= self.num_steps:
                return None
            if self.reserved_bytes + self.plan.group_bytes > self.plan.max_bytes:
                return None
            self._next_group += 1
            self.reserved_bytes += self.plan.group_bytes
            self._groups[group_id] = _Group(step, -1, None, version, now, self.plan.group_bytes)
            for ledger in self._ledgers:
                ledger.admitted += 1
                ledger.in_flight += 1
        group = self._groups[group_id]
        group.attempt += 1
        group.worker, group.policy_version, group.admitted_at = worker, version, now
        return Admission(group_id=group_id, due_step=group.due_step, attempt=group.attempt, policy_version=version)

    def _oldest_lost(self) -> int | None:
        """The first group that waits to be issued again; those that were voided meanwhile are forgotten here."""
        while self._lost and self._lost[0] not in self._groups:
            heapq.heappop(self._lost)
        return self._lost[0] if self._lost else None

    def _version_for(self, step: int, latest: int) -> int | None:
        oldest = self.plan.policy_version_for(step)
        if latest < oldest:
            return None
        return oldest if self.plan.lag == "exact" else latest

    def expects(self, group_id: int, attempt: int) -> bool:
        """Whether this attempt is the one waited for; a late duplicate, or of a voided group, is counted as fenced."""
        group = self._groups.get(group_id)
        expected = group is not None and not group.arrived and group.attempt == attempt
        self.fenced += not expected
        return expected

    def arrived(self, group_id: int, attempt: int, oldest_version: int, num_bytes: int, now: float) -> bool:
        """Takes a finished group; False if it is not the one expected."""
        if not self.expects(group_id, attempt):
            return False
        group = self._groups[group_id]
        num_bytes += self.plan.embedding_bytes
        if num_bytes > group.num_bytes:
            raise RuntimeError(f"group {group_id} takes {num_bytes} bytes and reserved {group.num_bytes}")
        self.reserved_bytes += num_bytes - group.num_bytes
        group.arrived, group.worker, group.num_bytes = True, None, num_bytes
        group.oldest_version = min(oldest_version, group.due_step)
        self._last_arrival[group.due_step] = now
        self._arrived_steps[group.due_step] += 1
        for ledger in self._ledgers:
            ledger.in_flight -= 1
            ledger.queued += 1
        return True

    def lost(self, worker: str, reason: str) -> tuple[int, ...]:
        """The worker died: its tickets wait to be issued again, with the same group, prompt and seed."""
        orphans = [group_id for group_id, group in self._groups.items() if group.worker == worker]
        for group_id in orphans:
            self._groups[group_id].worker = None
            heapq.heappush(self._lost, group_id)
            self.reissued[reason] += 1
        return tuple(orphans)

    def holds(self, group_id: int) -> bool:
        """Whether the group was admitted and neither voided nor freed: something may still be kept for it."""
        return group_id in self._groups

    def void(self, group_id: int, reason: str, attempt: int | None = None) -> bool:
        """Gives a group up for both learners.

        False, and nothing happens, for a group that is no longer held, and for one that is generated, or arrived, in
        another attempt than `attempt`: whoever waited for something meanwhile need not ask first. Raises RuntimeError
        if the group's step was assembled already.
        """
        group = self._groups.get(group_id)
        if group is None or attempt not in (None, group.attempt):
            return False
        if group.passed_policy or (self._leased and group_id in self._leased.group_ids):
            raise RuntimeError(f"group {group_id} was voided ({reason}) after its step {group.due_step} was assembled")
        del self._groups[group_id]
        self.reserved_bytes -= group.num_bytes
        self._voided_steps[group.due_step] += 1
        for ledger in self._ledgers:
            if group.arrived:
                ledger.queued -= 1
            else:
                ledger.in_flight -= 1
            ledger.voided[reason] += 1
        self._arrived_steps[group.due_step] -= group.arrived
        return True

    def late(self, now: float) -> tuple[tuple[int, int, str], ...]:
        """(group, attempt, worker) of the next step's groups that are late and may be aborted (`mask` and `drop` only)."""
        return tuple(late for deadline, late in self._deadlines() if deadline <= now)

    def next_deadline(self, after: Container[tuple[int, int, str]] = ()) -> float | None:
        """When `late` has something to say that is not in `after`; None: not before something else happens."""
        return min((deadline for deadline, late in self._deadlines() if late not in after), default=None)

    def _deadlines(self) -> list[tuple[float, tuple[int, int, str]]]:
        """(deadline, (group, attempt, worker)): `overage_after` seconds after the last arrival of the group's step, at the soonest."""
        step, plan = self.policy_version, self.plan
        some_not_admitted_yet = plan.due_step(self._next_group) <= step < self.num_steps
        nothing_to_compare = step not in self._last_arrival and plan.groups_per_step > 1
        if plan.overage == "wait" or self._leased or some_not_admitted_yet or nothing_to_compare:
            return []
        since = max(self._last_arrival.get(step, 0.0), self._step_began)
        return [
            (max(since, group.admitted_at) + plan.overage_after, (group_id, group.attempt, group.worker))
            for group_id, group in self._of_step(step)
            if group.worker is not None
        ]

    def _of_step(self, step: int) -> list[tuple[int, _Group]]:
        """(number, group) of those that are held, by rising number."""
        first = step * self.plan.groups_per_step
        numbers = range(first, first + self.plan.groups_per_step)
        return [(group_id, self._groups[group_id]) for group_id in numbers if group_id in self._groups]

    # Clocks

    def assemble(self) -> Assembly | None:
        """Leases the next policy step if all its groups are there and the head is young enough; None while not."""
        step = self.policy_version
        if self._leased or step >= self.num_steps or self.head_version < self.plan.head_version_for(step):
            return None
        if self._arrived_steps[step] + self._voided_steps[step] < self.plan.groups_per_step:
            return None
        ready = tuple(group_id for group_id, group in self._of_step(step) if group.arrived)
        ages = tuple(step - self._groups[group_id].oldest_version for group_id in ready)
        exact = self.plan.lag == "exact"
        head_version = self.plan.head_version_for(step) if exact else self.head_version
        self._assert_bounds(step, head_version, ages)
        self._leased = Assembly(step=step, group_ids=ready, head_version=head_version, policy_ages=ages)
        return self._leased

    def _assert_bounds(self, step: int, head_version: int, ages: tuple[int, ...]) -> None:
        expected = step - self.plan.policy_version_for(step)
        broken = [
            age for age in ages if age > self.plan.max_policy_age or (self.plan.lag == "exact" and age != expected)
        ]
        if broken or not 0 <= step - head_version <= self.plan.max_head_age:
            raise RuntimeError(
                f"step {step} would break its bounds: policy ages {ages} against max_policy_age {self.plan.max_policy_age} "
                f"({self.plan.lag}), head version {head_version} against max_head_age {self.plan.max_head_age}"
            )

    def policy_trained(self, step: int, now: float) -> None:
        """The policy finished the leased step (trained, skipped or empty): v + 1. Its groups wait for the head."""
        if self._leased is None or self._leased.step != step:
            raise RuntimeError(f"policy step {step} was trained and {self._leased} is leased")
        group_ids = self._leased.group_ids
        self._leased, self._step_began = None, now
        self._last_arrival.pop(step, None)
        self.policy_version += 1
        self.policy_ledger.queued -= len(group_ids)
        self.policy_ledger.trained += len(group_ids)
        for group_id in group_ids:
            self._groups[group_id].passed_policy = True

    def head_trained(self, step: int) -> tuple[int, ...]:
        """The head passed a step (updated, or frozen and merely ticked): u + 1. Returns the groups it frees."""
        if step != self.head_version or step >= self.policy_version:
            raise RuntimeError(
                f"head step {step} was trained at head {self.head_version}, policy {self.policy_version}"
            )
        self.head_version += 1
        passed = tuple(group_id for group_id, _ in self._of_step(step))
        for group_id in passed:
            self.reserved_bytes -= self._groups.pop(group_id).num_bytes
        self.head_ledger.queued -= len(passed)
        self.head_ledger.trained += len(passed)
        self._voided_steps.pop(step, None)
        self._arrived_steps.pop(step, None)
        return passed

    def end(self) -> tuple[int, ...]:
        """No step beyond the current version will be trained: voids what was admitted for later ones."""
        self.num_steps = self.policy_version
        ahead = tuple(group_id for group_id, group in self._groups.items() if not group.passed_policy)
        for group_id in ahead:
            self.void(group_id, "run_ended")
        return ahead

    @property
    def finished(self) -> bool:
        return self.policy_version >= self.num_steps and self.head_version >= self.policy_version

    @property
    def oldest_policy_version_needed(self) -> int:
        """Versions below this one can be forgotten."""
        if self.plan.lag == "bounded":
            return self.policy_version
        steps = [group.due_step for group in self._groups.values() if not group.arrived]
        return self.plan.policy_version_for(min(steps, default=self.plan.due_step(self._next_group)))

    @property
    def oldest_head_version_needed(self) -> int:
        step = self.policy_version
        return self.plan.head_version_for(step) if self.plan.lag == "exact" else self.head_version

    # Ledger

    @property
    def _ledgers(self) -> tuple[Ledger, Ledger]:
        return self.policy_ledger, self.head_ledger

    def in_flight(self) -> dict[int, str]:
        """Group -> who generates it (`nobody` while it waits to be issued again)."""
        return {group_id: group.worker or "nobody" for group_id, group in self._groups.items() if not group.arrived}

    def audit(self) -> None:
        """Asserts that both ledgers balance and agree with the groups and the bytes held. Raises `RuntimeError`."""
        for ledger in self._ledgers:
            ledger.check()
        groups = self._groups.values()
        in_flight = sum(not group.arrived for group in groups)
        for_head = len(groups) - in_flight
        for_policy = sum(group.arrived and not group.passed_policy for group in groups)
        held = sum(group.num_bytes for group in groups)
        told = (
            self.policy_ledger.in_flight,
            self.head_ledger.in_flight,
            self.policy_ledger.queued,
            self.head_ledger.queued,
        )
        if told != (in_flight, in_flight, for_policy, for_head) or held != self.reserved_bytes:
            raise RuntimeError(
                f"the ledgers say {told}, {self.reserved_bytes} bytes; the groups are "
                f"{(in_flight, in_flight, for_policy, for_head)}, {held} bytes"
            )
        if self.reserved_bytes > self.plan.max_bytes:
            raise RuntimeError(f"{self.reserved_bytes} bytes are reserved; the limit is {self.plan.max_bytes}")
