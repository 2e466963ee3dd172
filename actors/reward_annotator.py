"""The reward annotator embeds responses with the frozen reward model and scores them with a given reward head.

Reward token embeddings are computed as responses arrive, because the frozen reward model never changes. They are scored one whole step
at a time. No call depends on an earlier one: the weights of the reward head and the embeddings come with each call.
So any replica can serve any call, and a caller chooses the head version by passing its weights.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from actors.gathering import Gathered
from r2m_async.config import R2MConfig
from r2m_async.models.heads import frozen_whole_rewards, reward_spread, score_group
from r2m_async.models.reward import embed_group, embed_offline, embed_responses
from r2m_async.models.weights import load_weights, named_weights
from r2m_async.reward_metrics import ranking_accuracy
from r2m_async.rewards.calls import Values, gold_of, start_calls
from r2m_async.trajectories import (
    EvaluationReport,
    GroupRewards,
    LabelBatch,
    PolicyFeedback,
    RewardEmbeddings,
    Sample,
    StepReport,
    TrajectoryGroup,
    Weights,
)

AT_ONCE = 64
"""The most groups that go through the reward model together. Their texts are held in memory, and not all in one pass."""


class RewardAnnotator:
    """Embeds and scores groups of responses for training, and scores held-out groups for an evaluation."""

    def __init__(self, model: Any, tokenizer: Any, head: nn.Module, config: R2MConfig) -> None:
        """Keeps the models and finds the gold reward function.

        Args:
            model: the frozen reward model, a sequence classifier with one label. None if there is none.
            tokenizer: the reward model's tokenizer.
            head: a reward head of the run's variant (`heads.build_head`). `score` and `evaluate` overwrite its weights.
            config: the run's config.

        Raises ConfigError if `evaluation.gold` names no function.
        """
        self._model = model
        self._tokenizer = tokenizer
        self._head = head if model is None else head.to(model.device)
        self._initial = named_weights(head, 0)  # a copy: later calls overwrite the weights of this very module
        self._config = config
        at_once = AT_ONCE if config.asynchronous else 1  # else rewards would be rounded by what else has arrived
        self._passes: Gathered[TrajectoryGroup, tuple[Tensor, Tensor, list[Tensor]]] = Gathered(
            lambda groups: embed_responses(model, tokenizer, groups, config), at_once
        )
        self._calls: dict[tuple[int, int], Future[Values]] = {}
        """The calls of reward functions that `before_embed` has started, by group and attempt."""
        self._gold = gold_of(config)

    def initial_head(self) -> tuple[StepReport, Weights]:
        """Returns a report and version 0 of the reward head.

        Its scoring layer phi is the reward model's own. Its cross-attention, if the variant has one, is random.
        """
        return StepReport(version=0, metrics={}), self._initial

    async def before_embed(self, group: TrajectoryGroup) -> None:
        """Calls the reward functions for a group before its embeddings are computed, and waits until they have ended.

        It is for a ring in one process, which goes on meanwhile. In a process of its own, `embed` waits in a thread.
        """
        if self._config.reward.functions:
            calls = self._calls[group.ticket.group_id, group.ticket.attempt] = start_calls(group, self._config)
            ended = asyncio.wrap_future(calls)
            # `embed` raises what they raise. asyncio would complain that nobody has looked at it here.
            ended.add_done_callback(lambda calls: calls.cancelled() or calls.exception())
            await asyncio.wait([ended])

    def embed(self, group: TrajectoryGroup) -> tuple[StepReport, RewardEmbeddings]:
        """Computes the reward token embeddings (RTE) and the reward bonuses of a group.

        Several threads may call it. The groups that have arrived meanwhile go through the reward model together if the run
        is asynchronous, and otherwise one by one.

        Returns a report and the embeddings. If `evaluation.gold` is set, the report has the group's mean gold reward
        under `gold`. The gold reward is only watched: nothing is trained on it. If groups may be refilled
        (`rollouts.max_refills`), the report has the spread of the group's rewards under `spread`.

        Raises FunctionFailed if a reward function or the gold function fails, and RewardFailed if a reward function has
        failed in every try. Raises NonFiniteStep if an embedding or a reward is NaN or infinite, unless
        `learner.on_nonfinite` is `skip`.
        """
        calls = self._calls.pop((group.ticket.group_id, group.ticket.attempt), None)
        embeddings = embed_group(self._model, self._tokenizer, group, self._config, calls, self._passes)
        gold = self._gold_rewards(group)
        metrics = {"gold": _mean(gold)} if gold else {}
        if self._config.rollouts.max_refills > 0:
            metrics["spread"] = reward_spread(embeddings, self._config)
        return StepReport(version=group.ticket.group_id, metrics=metrics), embeddings

    def embed_pairs(self, step: int, labels: LabelBatch) -> tuple[StepReport, tuple[RewardEmbeddings, ...]]:
        """Computes the reward token embeddings of the pairs of `labels.offline` in a head update. Nobody is rewarded for them.

        step: the policy step. labels: the labels of its head update.

        Returns a report, and the embeddings of each pair. Raises NonFiniteStep as `embed` does.
        """
        embedded = embed_offline(self._model, self._tokenizer, labels.offline, self._config)
        return StepReport(version=step, metrics={}), embedded

    def score(
        self,
        step: int,
        head: Weights,
        embeddings: list[RewardEmbeddings],
        feedback: list[PolicyFeedback | None],
    ) -> tuple[StepReport, tuple[GroupRewards, ...]]:
        """Computes the rewards of all groups of one step with one version of the reward head.

        Args:
            step: the policy step that trains on the groups. It decides omega, the weight of the embedding.
            head: the weights of the reward head.
            embeddings: what `embed` returned for each group.
            feedback: the policy's hidden states for each group, or None for each if the head reads none.

        Returns a report with statistics of the rewards, and the rewards of each group in the same order.

        Raises NonFiniteStep if a reward is NaN or infinite, unless `learner.on_nonfinite` is `skip`. Raises ValueError
        if the weights do not fit the head, or if the lists differ in length.
        """
        load_weights(self._head, head)
        rewards = tuple(
            score_group(self._head, one, states, step, head.version, self._config)
            for one, states in zip(embeddings, feedback, strict=True)
        )
        metrics = _reward_metrics(rewards, self._config) | _function_metrics(embeddings, self._config)
        return StepReport(version=head.version, metrics=metrics), rewards

    def evaluate(
        self,
        step: int,
        head: Weights,
        groups: list[TrajectoryGroup],
        embeddings: list[RewardEmbeddings],
        feedback: list[PolicyFeedback | None],
    ) -> tuple[EvaluationReport]:
        """Scores held-out groups for an evaluation, and returns a report.

        Args:
            step: the policy version that generated the groups.
            head: the weights of the reward head.
            groups: the held-out groups, one per prompt.
            embeddings: what `embed` returned for each group.
            feedback: the policy's hidden states for each group, or None for each if the head reads none.

        The report's metrics are:

        - `reward`: the mean whole reward by the reward model as it came, with reward functions, clipping and penalties.
          It means the same in every evaluation; heads change, and so does omega.
        - `proxy`: the mean reward by the given head. Without a reward model it is `reward`.
        - `frozen`: the mean reward by the reward model as it came. `frozen/<prompt index>` is that of one prompt. Both are
          left out without a reward model.
        - `gold`: the mean gold reward, if `evaluation.gold` is set.
        - `reward_se`, `proxy_se`, `frozen_se`, `gold_se`: the standard errors over prompts. One prompt alone has 0.
        - `proxy_accuracy`, `frozen_accuracy`: of the pairs of responses to one prompt, the share that is ranked as
          gold ranks it. They are left out if gold ranks no pair or is not finite.
        - `reward/<name>`: the mean of what each reward function returned.
        - `length`: the mean number of tokens that the policy wrote for a response.

        The report's samples are the first response to each prompt.

        A mean over a reward that is not finite is NaN. Raises FunctionFailed if the gold function fails.
        """
        load_weights(self._head, head)
        # Omega is that of the step which made this policy version. No step made version 0, so step 0 stands in.
        horizon = max(0, step - 1)
        scored = [
            score_group(self._head, one, states, horizon, head.version, self._config)
            for one, states in zip(embeddings, feedback, strict=True)
        ]
        whole = [frozen_whole_rewards(one, self._config).tolist() for one in embeddings]
        by_model = {
            "proxy": [one.model_rewards.tolist() for one in scored],
            "frozen": [one.frozen_rewards.tolist() for one in embeddings],
        }
        if self._model is None:
            by_model = {"proxy": [one.rewards.tolist() for one in scored]}
        gold = [self._gold_rewards(group) for group in groups]
        lengths = [t.num_policy_tokens for group in groups for t in group.trajectories]
        metrics = {"length": statistics.fmean(lengths)}
        of_kind = {"reward": whole} | by_model | ({"gold": gold} if self._gold else {})
        for name, rewards in of_kind.items():
            values = [_mean(of_prompt) for of_prompt in rewards]
            metrics[name] = _mean(values)
            metrics[f"{name}_se"] = 0.0
            if len(values) > 1:
                known = math.isfinite(metrics[name])
                metrics[f"{name}_se"] = statistics.stdev(values) / len(values) ** 0.5 if known else math.nan
        if any(len(set(of_prompt)) > 1 for of_prompt in gold) and math.isfinite(metrics["gold"]):
            metrics |= {f"{name}_accuracy": ranking_accuracy(rewards, gold) for name, rewards in by_model.items()}
        for index, of_prompt in enumerate(by_model.get("frozen", ())):
            metrics[f"frozen/{index}"] = _mean(of_prompt)
        metrics |= _function_metrics(embeddings, self._config)
        samples = tuple(map(_sample, groups, whole, gold))
        return (EvaluationReport(version=head.version, metrics=metrics, samples=samples),)

    def _gold_rewards(self, group: TrajectoryGroup) -> list[float]:
        """The gold rewards of a group's responses, or an empty list if `evaluation.gold` is not set.

        Under `learner.on_nonfinite: skip` a gold reward may be NaN or infinite. Raises FunctionFailed if the gold
        function fails.
        """
        if self._gold is None:
            return []
        sampled = replace(group, greedy=None)
        return [value for (value,) in start_calls(sampled, self._config, [self._gold]).result()]


def _sample(group: TrajectoryGroup, rewards: Sequence[float], golds: Sequence[float]) -> Sample:
    """The first response of a group, with its reward. `golds` is empty if there is no gold reward."""
    prompt, first = group.ticket.prompt, group.trajectories[0]
    return Sample(
        prompt_id=prompt.prompt_id,
        prompt=prompt.content,
        response=first.text,
        finished=first.finish_reason == "stop",
        reward=rewards[0],
        gold=golds[0] if golds else None,
    )


def _mean(values: Sequence[float]) -> float:
    """The mean. It is NaN if a value is not finite, which `learner.on_nonfinite: skip` allows."""
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.nan


def _reward_metrics(rewards: tuple[GroupRewards, ...], config: R2MConfig) -> dict[str, float]:
    """Statistics of one step's rewards. A step without groups has none."""
    if not rewards:
        return {}
    values = torch.cat([one.rewards for one in rewards])
    has_model = config.reward.model is not None
    by_group = [one.model_rewards if has_model else one.rewards for one in rewards]
    metrics = {
        "reward/mean": values.mean().item(),
        "reward/std": values.std(correction=0).item(),
        "reward/nonfinite": float((~values.isfinite()).sum()),
        "reward/group_std": torch.stack([one.std(correction=0) for one in by_group]).mean().item(),
    }
    if has_model:
        metrics["reward/model_mean"] = torch.cat(by_group).mean().item()
        metrics["head/omega"] = rewards[0].omega
    return metrics


def _function_metrics(embeddings: Sequence[RewardEmbeddings], config: R2MConfig) -> dict[str, float]:
    """The mean of what each reward function returned for the responses, before its weight."""
    returned = [one.functions for one in embeddings if one.functions is not None]
    if not returned:
        return {}
    means = torch.cat(returned).double().mean(0).tolist()
    return {f"reward/{name}": mean for name, mean in zip(config.reward.named_functions, means, strict=True)}
