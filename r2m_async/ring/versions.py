"""Keeps the weights of the versions of policy and head that may still be needed."""

from __future__ import annotations

from r2m_async.ring.stages import Payload
from r2m_async.schedule import Schedule


class Versions:
    """The weights of policy and head by version. They are payloads, which nobody reads here."""

    def __init__(self, schedule: Schedule) -> None:
        """Begins without versions. The schedule says which are still needed."""
        self.policies: dict[int, Payload] = {}
        """The policy versions that rollout actors may still load. All of them are published."""
        self.heads: dict[int, Payload] = {}
        """The head versions that may still score a step."""
        self._schedule = schedule

    @property
    def newest_policy(self) -> int:
        """The newest policy version that rollout actors can load.

        The policy learner may be one step ahead of it, until it has published its present version.
        """
        return max(self.policies)

    def add_policy(self, version: int, weights: Payload) -> None:
        """Adds a policy version that the policy learner has published, and drops those that are not needed."""
        self.policies[version] = weights
        self.policies = self.needed_policies()

    def needed_policies(self) -> dict[int, Payload]:
        """The policy versions with which some group may still be generated, as weights by version.

        A run that resumes from a checkpoint of the present step counts, too.
        """
        plan, schedule = self._schedule.plan, self._schedule
        oldest = schedule.oldest_policy_version_needed
        # A checkpoint holds no groups. A resumed run generates those of the present step anew, with the same version.
        if plan.lag == "exact":
            oldest = min(oldest, plan.policy_version_for(schedule.policy_version))
        oldest = min(oldest, self.newest_policy)
        return {version: payload for version, payload in self.policies.items() if version >= oldest}

    def drop_heads(self) -> None:
        """Drops the head versions that are not needed."""
        oldest = self._schedule.oldest_head_version_needed
        self.heads = {version: payload for version, payload in self.heads.items() if version >= oldest}
