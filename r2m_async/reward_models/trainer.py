"""One reward model under training: its data, its optimizer, its loss, its checkpoints."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from r2m_async.errors import ConfigError, NonFiniteStep
from r2m_async.finite import all_finite, first_bad
from r2m_async.from_scratch.cache import key_digest
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.reward_models.preferences import (
    PreferenceData,
    TokenizedPair,
    microbatches,
    tokenized,
)
from r2m_async.reward_models.process_group import num_ranks, rank, summed
from r2m_async.reward_models.trainee import RewardTrainee
from r2m_async.reward_models.training_states import head_norm, pair_states
from r2m_async.reward_objectives import PreferenceTerms, ResponseLogprobs, preference_loss
from r2m_async.runs.checkpoints import saved_config, seal, verified
from r2m_async.runs.resuming import REWARD_MODEL_MAY_CHANGE, keys_of, refuse_changes
from r2m_async.whole import whole_directory

NUM_SAMPLED = 128
"""Training pairs at most whose states are measured beside those of the held-out ones (BSR Fig. 3)."""


class RewardTrainer:
    """Trains one model, step by step.

    Within a torch.distributed process group the ranks share out a step's micro-batches and add up what they find: the
    step is the same as that of one process but for the order of sums.
    """

    def __init__(self, config: RewardModelConfig, data: PreferenceData, start: str) -> None:
        self.config = config
        self.model = RewardTrainee(start, config)
        self.held_out = self._tokenized(data.held_out)
        self.pairs = self._tokenized(data.training)
        num_sampled = min(NUM_SAMPLED, len(self.pairs))
        self._sample = random.Random(f"{config.run.seed}/sample").sample(self.pairs, num_sampled)
        self.num_steps = config.num_steps(len(self.pairs))
        self.steps_done = 0
        self._references = self._reference_logprobs() if config.loss.regularizer == "dpo" else None
        self._parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        parameters = list(self._parameters.values())
        decay = config.optimizer.weight_decay
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ]
        )

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.num_steps

    def step(self) -> dict[str, float]:
        """One optimizer step on the next batch; its metrics.

        Raises NonFiniteStep where the gradient or then a weight is not finite, with the pair that began it if one did.
        """
        optimizer = self.config.optimizer
        batch = self._batch(self.steps_done)
        parts = self._microbatches(batch)
        own_parts = parts[rank() :: num_ranks()]
        in_parts = self.config.loss.bsr == "squared_mean" and len(parts) > 1
        batch_mean = self._batch_mean(own_parts, len(batch)) if in_parts else None
        sums = torch.zeros(len(_METRICS), dtype=torch.float64)
        self._optimizer.zero_grad()
        source = ""
        for part in own_parts:
            terms, rewards = self._loss(part, batch_mean)
            source = source or self._broken(part, rewards, terms)
            (terms.loss * (len(part) / len(batch))).backward()
            sums += torch.tensor(_metrics(terms, *rewards), dtype=torch.float64) * (len(part) / len(batch))
        for parameter in self._parameters.values():
            if num_ranks() > 1:
                parameter.grad = summed(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        gradient_norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), optimizer.max_grad_norm).item()
        lr = self.config.learning_rate(self.steps_done, self.num_steps)
        if not gradient_norm < float("inf"):
            raise NonFiniteStep(
                f"step {self.steps_done + 1}: the gradient's norm is {gradient_norm} at learning rate {lr:g}{source}; lower "
                f"optimizer.lr or use model.dtype float32"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        if not all_finite(self._parameters.values()):
            raise NonFiniteStep(
                f"step {self.steps_done + 1}: the weights are not finite after an update with learning rate {lr:g} and "
                f"optimizer.weight_decay {optimizer.weight_decay:g}; lower them"
            )
        self.steps_done += 1
        metrics = dict(zip(_METRICS, summed(sums).tolist(), strict=True))
        metrics["reward/std"] = max(0.0, metrics.pop("reward/square") - metrics["reward/mean"] ** 2) ** 0.5
        return {"step": self.steps_done, **metrics, "gradient_norm": gradient_norm, "lr": lr}

    def evaluate(self) -> dict[str, float]:
        """A line of evaluation.jsonl: the norm of the head, and `PairStates.record` of the held-out pairs and of a sample
        of the training pairs that is the same throughout. Raises NonFiniteStep naming a pair."""
        record = {"step": self.steps_done, "head/weight_norm": head_norm(self.model.classifier.score)}
        for name, pairs in (("held_out", self.held_out), ("training", self._sample)):
            states = pair_states(self.model, pairs, self.config.optimizer.tokens_per_microbatch)
            if bad := first_bad(states.rewards):
                reward = _reward_of(pairs[bad[1]], bad[0], states.rewards[tuple(bad)])
                raise NonFiniteStep(f"evaluation after step {self.steps_done}: {reward}: the model overflows")
            record |= states.record(name)
        return record

    def save(self, directory: Path) -> None:
        """A checkpoint, whole or not at all: the trained parameters, AdamW's moments, the step and what it goes with."""
        tensors = {}
        for name, parameter in self._parameters.items():
            tensors[f"parameter/{name}"] = parameter.detach()
            tensors |= {f"{key}/{name}": value for key, value in self._optimizer.state[parameter].items()}
        record = {"step": str(self.steps_done), "data": self._data_digest()}
        with whole_directory(directory, replace=True) as building:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, building / "state.safetensors", record
            )
            (building / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
            seal(building)

    @torch.no_grad()
    def restore(self, directory: Path) -> None:
        """Raises ConfigError where the data is not what the checkpoint was trained on, for keys that may not change and for
        a checkpoint that is not whole."""
        verified(directory)
        saved = saved_config(directory, RewardModelConfig)
        refuse_changes(directory, keys_of(saved), keys_of(self.config), REWARD_MODEL_MAY_CHANGE)
        with safe_open(directory / "state.safetensors", framework="pt") as file:
            record = file.metadata()
            if record["data"] != self._data_digest():
                raise ConfigError(
                    f"{directory}: was trained on other pairs than data.preferences now gives; put those back, or train anew"
                )
            names = set(file.keys())
            for name, parameter in self._parameters.items():
                parameter.copy_(file.get_tensor(f"parameter/{name}"))
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in names]
                saved = {key: file.get_tensor(f"{key}/{name}") for key in keys}
                moments = {key: value.to(parameter.device) for key, value in saved.items() if key != "step"}
                self._optimizer.state[parameter] = {"step": saved["step"], **moments} if saved else {}
        self.steps_done = int(record["step"])

    def _tokenized(self, pairs: Sequence[Any]) -> list[TokenizedPair]:
        return [tokenized(pair, self.model.tokenizer, self.config.data.max_tokens) for pair in pairs]

    def _batch(self, step: int) -> list[int]:
        """Indices of pairs, a function of (run.seed, step): each pass over the data is reshuffled."""
        size, num = self.config.optimizer.batch_size, len(self.pairs)
        orders: dict[int, list[int]] = {}
        batch = []
        for place in range(step * size, (step + 1) * size):
            epoch, at = divmod(place, num)
            if epoch not in orders:
                orders[epoch] = random.Random(f"{self.config.run.seed}/{epoch}").sample(range(num), num)
            batch.append(orders[epoch][at])
        return batch

    def _microbatches(self, batch: Sequence[int]) -> list[list[int]]:
        return microbatches(self.pairs, batch, self.config.optimizer.tokens_per_microbatch)

    @torch.no_grad()
    def _batch_mean(self, parts: Sequence[Sequence[int]], num_pairs: int) -> Tensor:
        """The mean of the whole batch's 2 * num_pairs rewards, a pass of its own: `squared_mean` says why."""
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            total += self._forward(part)[0].double().sum().cpu()
        return (summed(total) / (2 * num_pairs)).float().to(self.model.device)

    def _forward(self, part: Sequence[int], with_logprobs: bool = False) -> tuple[Tensor, Tensor | None]:
        """Rewards [2, B] and log-probs [2, B], chosen first."""
        pairs = [self.pairs[index] for index in part]
        texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        rewards, logprobs = self.model(texts, with_logprobs)
        return rewards.view(2, -1), None if logprobs is None else logprobs.view(2, -1)

    def _loss(self, part: Sequence[int], batch_mean: Tensor | None) -> tuple[PreferenceTerms, Tensor]:
        loss = self.config.loss
        rewards, logprobs = self._forward(part, with_logprobs=loss.regularizer is not None)
        margins = [self.pairs[index].margin for index in part]
        responses = None
        if logprobs is not None:
            references = (
                self._references[:, list(part)].to(rewards.device) if self._references is not None else (None,) * 2
            )
            responses = ResponseLogprobs(
                chosen=logprobs[0],
                rejected=logprobs[1],
                reference_chosen=references[0],
                reference_rejected=references[1],
            )
        terms = preference_loss(
            *rewards,
            margins=None if margins[0] is None else torch.tensor(margins, device=rewards.device),
            batch_mean=batch_mean,
            logprobs=responses,
            **loss.model_dump(),
        )
        return terms, rewards.detach()

    def _broken(self, part: Sequence[int], rewards_2B: Tensor, terms: PreferenceTerms) -> str:
        """Of a part of the batch, in words: which of its rewards is not finite, or that its loss is not; else nothing."""
        if bad := first_bad(rewards_2B):
            return f": {_reward_of(self.pairs[part[bad[1]]], bad[0], rewards_2B[tuple(bad)])}"
        if not terms.loss.isfinite():
            return f": the loss is {terms.loss.item()}, of finite rewards of the pairs of {self.pairs[part[0]].place} and on"
        return ""

    @torch.no_grad()
    def _reference_logprobs(self) -> Tensor:
        """[2, pairs] by the base model, which is what the model is before its first step."""
        references = torch.zeros(2, len(self.pairs))
        for part in self._microbatches(range(len(self.pairs)))[rank() :: num_ranks()]:
            references[:, part] = self._forward(part, with_logprobs=True)[1].cpu()
        return summed(references)

    def _data_digest(self) -> str:
        return key_digest(json.dumps([[p.chosen.token_ids, p.rejected.token_ids, p.margin] for p in self.pairs]))


def _reward_of(pair: TokenizedPair, side: int, reward: Tensor) -> str:
    return f"the reward of the {('chosen', 'rejected')[side]} response of {pair.place} is {reward.item()}"


_METRICS = (
    "loss",
    "loss/preference",
    "loss/bsr",
    "loss/pos_reg",
    "loss/regularizer",
    "accuracy",
    "margin",
    "reward/mean",
    "reward/square",
)
"""Means over a batch's pairs; NaN for a term that is off."""


def _metrics(terms: PreferenceTerms, chosen: Tensor, rejected: Tensor) -> list[float]:
    parts = (terms.loss, terms.preference, terms.bsr, terms.pos_reg, terms.regularizer)
    margin = chosen - rejected
    return [
        *(float("nan") if part is None else part.item() for part in parts),
        ((margin.sign() + 1) / 2).mean().item(),
        margin.mean().item(),
        (chosen + rejected).mean().item() / 2,
        (chosen.square() + rejected.square()).mean().item() / 2,
    ]
