"""The head learner makes one AdamW update of the reward head per policy step (R2M, Algorithm 1, lines 15-20)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from torch import nn

from learners.optimizer_state import moments, restore_moments
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.finite import all_finite
from r2m_async.models.heads import HeldHead, PairTerms, head_groups, improve_head
from r2m_async.models.pairs import OFFLINE_LABELLER, completed
from r2m_async.models.weights import adamw, load_weights, named_weights
from r2m_async.trajectories import (
    GroupRewards,
    HeadGroup,
    LabelBatch,
    LabelledPair,
    PolicyFeedback,
    RereadPair,
    RewardEmbeddings,
    StepReport,
    Weights,
)


class HeadLearner:
    """Trains the reward head.

    Every policy step raises the head version by one, even if the weights stay as they were. Before `start` or
    `restore` the head's weights mean nothing.
    """

    def __init__(self, head: nn.Module, config: R2MConfig) -> None:
        """Keeps the head.

        Args:
            head: a reward head of the run's variant (`heads.build_head`). It is trained in place.
            config: the run's config.
        """
        self._head = head
        self._config = config
        self._version = 0
        self._held = HeldHead(head, config)
        self._optimizer = adamw(head.parameters(), config.head.lr)

    def start(self, weights: Weights) -> tuple[int]:
        """Takes the first weights. They come from the annotator, the only stage that has loaded the reward model.

        Returns their version. Raises ValueError if they do not fit the head.
        """
        load_weights(self._head, weights)
        self._held.start()
        return (weights.version,)

    def update(
        self,
        step: int,
        embeddings: list[RewardEmbeddings],
        refreshed: Sequence[PolicyFeedback] | None,
        annotated: Sequence[GroupRewards],
        labels: LabelBatch | None = None,
        reread: Sequence[RereadPair] | None = None,
        embedded: Sequence[RewardEmbeddings] | None = None,
    ) -> tuple[StepReport, Weights]:
        """Makes the update of one step.

        Only the version changes, and no weight, if the step has no groups, if the variant's head does not train, or if
        the policy learner left the step out. Labelled pairs teach in such a step, too. No weight changes, either, if the
        update made the head not finite and was undone.

        Args:
            step: the policy step.
            embeddings: the reward token embeddings of the step's groups.
            refreshed: the policy's hidden states on these groups, from the last epoch of the step. It is empty if the
                policy learner left the step out, and None if the head reads no states.
            annotated: the rewards of these groups that the policy was trained on.
            labels: the labels that this update uses. None without a `labels.source`.
            reread: what the present policy makes of pairs among them. None if it reads none.
            embedded: the reward token embeddings of those from a data set. None if the policy reads none.

        Returns a report, and the weights of the new version: those that score from now on.

        Raises NonFiniteStep if the update is not finite, unless `learner.on_nonfinite` is `skip`.
        """
        metrics: dict[str, float] = {}
        if labels and reread is not None:
            labels = completed(labels, reread, embedded or (), self._config)
        if self._config.trains_head:
            groups = head_groups(embeddings, refreshed, annotated)
            if groups or (labels and labels.pairs):
                metrics = self._update(step, groups, labels)
            elif embeddings:
                metrics = {"head/skipped_updates": 1.0}
        self._version += 1
        return StepReport(version=self._version, metrics=metrics), named_weights(self._held.scoring, self._version)

    def _update(self, step: int, groups: list[HeadGroup], labels: LabelBatch | None) -> dict[str, float]:
        """Updates the head on a step's groups and labels. Returns the metrics, which are means over groups or pairs."""
        terms, pairs, counts = improve_head(self._head, self._optimizer, self._held, groups, step, self._config, labels)
        if not counts:
            return {"head/skipped_updates": 1.0}
        metrics = {"head/skipped_updates": 0.0}
        if terms:
            metrics |= {
                "head/loss": statistics.fmean(float(term.loss.detach()) for term in terms),
                "head/bradley_terry": statistics.fmean(float(term.grebt.bradley_terry) for term in terms),
                "head/group_reward_entropy": statistics.fmean(float(term.grebt.group_reward_entropy) for term in terms),
                "head/gap": statistics.fmean(float(term.grebt.gap) for term in terms),
                "head/hold": statistics.fmean(float(term.hold) for term in terms),
                "head/agreement": statistics.fmean(float(term.agrees) for term in terms),
            }
        if labels:
            metrics |= _label_metrics(labels.new, pairs[: len(labels.new)], "labels/")
            offline = [place for place, pair in enumerate(labels.pairs) if pair.label.who == OFFLINE_LABELLER]
            own = [labels.pairs[place] for place in offline]
            metrics |= _label_metrics(own, [pairs[place] for place in offline], "labels/offline_")
            if own:
                metrics["labels/offline_max_weight"] = max(pair.weight for pair in own)
        return metrics

    def state(self) -> tuple[StepReport, dict[str, Any]]:
        """Returns a report, and what `restore` needs to go on bit for bit."""
        # Under `head.hold: average` the head that scores is an average, and differs from the one that trains.
        state = {
            "weights": named_weights(self._head, self._version),
            "scoring": named_weights(self._held.scoring, self._version),
            "optimizer": moments(self._optimizer),
        }
        return StepReport(version=self._version, metrics={}), state

    def restore(self, state: dict[str, Any]) -> tuple[int]:
        """Goes on from what `state` returned, and returns the head version.

        Raises ConfigError if the head is not finite. Raises ValueError if it is of another shape.
        """
        load_weights(self._head, state["weights"])
        self._held.resume(state["scoring"])
        for weights in (state["weights"], state["scoring"]):
            if not all_finite(weights.tensors.values()):
                raise ConfigError(
                    f"the checkpoint's head (version {weights.version}) has weights that are NaN or infinite: its training "
                    f"had diverged; resume from an older checkpoint"
                )
        self._version = state["weights"].version
        restore_moments(self._optimizer, state["optimizer"])
        return (self._version,)


def _label_metrics(labelled: Sequence[LabelledPair], terms: Sequence[PairTerms], prefix: str) -> dict[str, float]:
    """Means over labelled pairs. Without any there are none."""
    if not labelled:
        return {}
    return {
        f"{prefix}bradley_terry": statistics.fmean(float(term.bradley_terry) for term in terms),
        f"{prefix}accuracy": statistics.fmean(float(term.agrees) for term in terms),
    }
