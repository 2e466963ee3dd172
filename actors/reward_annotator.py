"""The reward annotator: the frozen backbone (which embeds responses as they arrive) and the scoring by a given head.

It keeps no head and no group: weights and embeddings come with each call, so any replica can do any of it and a
version can be pinned by handing it in.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from r2m_async.config import R2MConfig
from r2m_async.models.heads import score_group
from r2m_async.models.reward import embed_group
from r2m_async.models.weights import load_weights, named_weights
from r2m_async.plugins import called_for_number, named_function
from r2m_async.reward_metrics import ranking_accuracy
from r2m_async.ring.stages import produces
from r2m_async.trajectories import (
    GroupRewards,
    PolicyFeedback,
    RewardEmbeddings,
    StepReport,
    TrajectoryGroup,
    Weights,
)


class RewardAnnotator:
    """`head` is a module of the run's variant whose weights every call overwrites."""

    def __init__(self, model: Any, tokenizer: Any, head: nn.Module, config: R2MConfig) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._head = head.to(model.device)
        self._initial = named_weights(head, 0)
        self._config = config
        gold = config.evaluation.gold
        self._gold = named_function(gold, "evaluation.gold") if gold else None

    @produces(1)
    def initial_head(self) -> tuple[StepReport, Weights]:
        """Version 0 of the head: phi as the reward model came with it, cross-attention as drawn."""
        return StepReport(version=0, metrics={}), self._initial

    @produces(1)
    def embed(self, group: TrajectoryGroup) -> tuple[StepReport, RewardEmbeddings]:
        """The group's RTEs. The report has its mean gold reward where one is known: watched, never trained on."""
        embeddings = embed_group(self._model, self._tokenizer, group, self._config)
        gold = self._gold_rewards(group)
        metrics = {"gold": _mean(gold)} if gold else {}
        return StepReport(version=group.ticket.group_id, metrics=metrics), embeddings

    @produces(1)
    def score(
        self,
        step: int,
        head: Weights,
        embeddings: list[RewardEmbeddings],
        feedback: list[PolicyFeedback | None],
    ) -> tuple[StepReport, tuple[GroupRewards, ...]]:
        """Binds the rewards of a whole step with one head version."""
        load_weights(self._head, head)
        rewards = tuple(
            score_group(self._head, one, states, step, head.version, self._config)
            for one, states in zip(embeddings, feedback, strict=True)
        )
        return StepReport(version=head.version, metrics=_reward_metrics(rewards)), rewards

    @produces(0)
    def judge(
        self,
        step: int,
        head: Weights,
        groups: list[TrajectoryGroup],
        embeddings: list[RewardEmbeddings],
        feedback: list[PolicyFeedback | None],
    ) -> tuple[StepReport]:
        """Mean rewards of held-out groups, and their standard errors over prompts: `proxy` by the given head, `frozen`
        by the reward model as it came, `gold` where known; per-prompt means beside them as `frozen/<prompt index>`.
        `proxy_accuracy` and `frozen_accuracy`: shares of pairs of a group that are ranked as gold ranks them."""
        load_weights(self._head, head)
        horizon = max(0, step - 1)
        proxy = [
            score_group(self._head, one, states, horizon, head.version, self._config).model_rewards.tolist()
            for one, states in zip(embeddings, feedback, strict=True)
        ]
        frozen = [one.frozen_rewards.tolist() for one in embeddings]
        gold = [self._gold_rewards(group) for group in groups]
        lengths = [t.num_response_tokens for group in groups for t in group.trajectories]
        metrics = {"length": statistics.fmean(lengths)}
        for name, rewards in (("proxy", proxy), ("frozen", frozen), *([("gold", gold)] if self._gold else [])):
            values = [_mean(of_prompt) for of_prompt in rewards]
            metrics[name] = _mean(values)
            metrics[f"{name}_se"] = 0.0
            if len(values) > 1:
                known = math.isfinite(metrics[name])
                metrics[f"{name}_se"] = statistics.stdev(values) / len(values) ** 0.5 if known else math.nan
        if any(len(set(of_prompt)) > 1 for of_prompt in gold) and math.isfinite(metrics["gold"]):
            metrics |= {
                "proxy_accuracy": ranking_accuracy(proxy, gold),
                "frozen_accuracy": ranking_accuracy(frozen, gold),
            }
        metrics |= {f"frozen/{index}": _mean(of_prompt) for index, of_prompt in enumerate(frozen)}
        return (StepReport(version=head.version, metrics=metrics),)

    def _gold_rewards(self, group: TrajectoryGroup) -> list[float]:
        """Of the responses; raises FunctionFailed. Under `on_nonfinite: skip` they may be NaN: not known."""
        gold, name, ticket = self._gold, self._config.evaluation.gold, group.ticket
        if gold is None or name is None:
            return []
        finite = self._config.learner.on_nonfinite == "stop"
        golds = []
        for index, one in enumerate(group.trajectories):
            arguments = (ticket.prompt.text, one.text, one.finish_reason == "stop")
            place = f"{ticket.place}, response {index}"
            golds.append(called_for_number(gold, arguments, "evaluation.gold", name, place, finite))
        return golds


def _mean(values: Sequence[float]) -> float:
    """NaN where one of them is not finite, as it may be under `learner.on_nonfinite: skip`."""
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.nan


def _reward_metrics(rewards: tuple[GroupRewards, ...]) -> dict[str, float]:
    if not rewards:
        return {}
    values = torch.cat([one.rewards for one in rewards])
    spreads = torch.stack([one.model_rewards.std(correction=0) for one in rewards])
    return {
        "reward/mean": values.mean().item(),
        "reward/std": values.std(correction=0).item(),
        "reward/nonfinite": float((~values.isfinite()).sum()),
        "reward/group_std": spreads.mean().item(),
        "reward/model_mean": torch.cat([one.model_rewards for one in rewards]).mean().item(),
        "head/omega": rewards[0].omega,
    }
