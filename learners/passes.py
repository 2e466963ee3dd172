"""The forward passes of one rank over a step: which trajectories each has, and what it computes of them.

Shapes: B trajectories of a step in group order, T response tokens (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learners.backend import PolicyBackend
from learners.kept_states import KeptStates
from learners.shares import MicroBatch, group_shares, rank_microbatches
from learners.step_batch import StepBatch
from r2m_async.config import R2MConfig
from r2m_async.models.policy import policy_pass, proximal_feedback
from r2m_async.models.reward_probe import PromptStates
from r2m_async.trajectories import PolicyFeedback, Trajectory


class Passes:
    """Makes the forward passes of a backend's rank."""

    def __init__(self, backend: PolicyBackend, config: R2MConfig) -> None:
        """Keeps the backend and the run's config."""
        self._backend = backend
        self._config = config

    def of_groups(self, trajectories: Sequence[Trajectory], groups: Sequence[range]) -> list[MicroBatch]:
        """This rank's micro-batches of some groups, given by the rows of their trajectories."""
        backend, learner = self._backend, self._config.learner
        return rank_microbatches(
            trajectories, groups, backend.rank, backend.num_ranks, learner.tokens_per_microbatch, learner.packing
        )

    def of_minibatch(self, batch: StepBatch, rows: slice) -> list[MicroBatch]:
        """This rank's micro-batches of a minibatch, which is the groups whose rows lie within `rows`."""
        groups = [group for group in batch.rows if rows.start <= group.start and group.stop <= rows.stop]
        return self.of_groups(batch.trajectories, groups)

    def forward(
        self, model: Any, trajectories: Sequence[Trajectory], entropy: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """One forward pass: the log-probabilities, the hidden states and, if asked for, the entropies (`policy_pass`)."""
        config = self._config
        return policy_pass(model, trajectories, config.rollouts.temperature, config.learner.packing, entropy)

    @torch.no_grad()
    def logprobs(
        self,
        model: Any,
        trajectories: Sequence[Trajectory],
        passes: Sequence[MicroBatch],
        mask: Tensor,
        *keepers: KeptStates | PromptStates | None,
    ) -> Tensor:
        """Log-probabilities of all ranks' trajectories under `model`, [B, T] float32 on the CPU, 0 on padding.

        The hidden states of this rank's trajectories go to each of `keepers` that is not None.
        """
        logprobs_BT = torch.zeros(mask.shape)
        for one in passes:
            chosen = [trajectories[row] for row in one.rows]
            part_BT, states, _ = self.forward(model, chosen)
            for kept in keepers:
                if one.counts and kept:
                    kept.keep(one.rows, states)
            if one.counts:
                logprobs_BT[list(one.rows), : part_BT.shape[1]] = part_BT.cpu()
        # Every row is 0 but on the rank that computed it, so the sum over ranks puts all rows together.
        return self._backend.total(logprobs_BT)

    def own_feedback(self, batch: StepBatch, states: dict[int, Tensor]) -> tuple[PolicyFeedback, ...]:
        """pi_old's feedback on this rank's groups, from the states of the proximal pass by row.

        Greedy twins are not trained and have no such states, so each twin takes a forward pass of its own.
        """
        backend = self._backend
        owned = group_shares(batch.trajectories, batch.rows, backend.num_ranks)
        mine = owned[backend.rank]
        # Every rank must make equally many passes. A rank with fewer groups repeats group 0 and drops the results.
        pace = mine + [0] * (max(map(len, owned)) - len(mine))
        return tuple(
            proximal_feedback(
                backend.policy,
                batch.groups[index],
                [states[row] for row in batch.rows[index] if row in states],
                self._config,
                batch.step,
            )
            for index in pace
        )[: len(mine)]
