"""The training of one reward model: its data, its optimizer, its loss and its checkpoints."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from r2m_async.data.seeds import Stream, sampling_seed
from r2m_async.errors import ConfigError, NonFiniteStep
from r2m_async.finite import all_finite, first_bad
from r2m_async.from_scratch.cache import key_digest
from r2m_async.models.adapters import TrainedPart
from r2m_async.models.tokens import longest_text
from r2m_async.models.weights import MasterWeights
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.reward_models.frozen_states import frozen_states
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

OnWork = Callable[[str, int, int], None]
"""A function that is called with (what is done, parts done, parts in all) to show progress."""
NUM_SAMPLED = 128
"""Limit on the training pairs whose hidden states are measured beside those of the held-out pairs (BSR Fig. 3)."""


class RewardTrainer:
    """Trains one reward model, step by step.

    Within a torch.distributed process group the ranks divide a step's micro-batches among them and add up their
    results. The step is the same as that of a single process, except that sums are rounded in another order.
    """

    def __init__(
        self,
        config: RewardModelConfig,
        data: PreferenceData,
        start: str,
        on_work: OnWork = lambda text, done, total: None,
    ) -> None:
        """Loads the model and tokenizes the pairs. A frozen backbone reads all of them here, once.

        config: the configuration, with this model's own seed as run.seed.
        data: the pairs as text.
        start: Hugging Face name or directory of the model that training starts from.
        on_work: is called while a frozen backbone reads, and in evaluations.

        Raises ConfigError as `RewardTrainee` does.
        """
        self.config = config
        self._on_work = on_work
        self.model = RewardTrainee(start, config)
        self.held_out = self._tokenized(data.held_out)
        self.pairs = self._tokenized(data.training)
        if config.model.frozen:
            texts = [text for pair in (*self.pairs, *self.held_out) for text in (pair.chosen, pair.rejected)]
            limit = config.optimizer.tokens_per_microbatch
            self.model.know_states(
                frozen_states(self.model, texts, limit, partial(on_work, "frozen backbone: texts read once"))
            )
        num_sampled = min(NUM_SAMPLED, len(self.pairs))
        # Always the same pairs, so that evaluations of different steps can be compared.
        self.sample = random.Random(f"{config.run.seed}/sample").sample(self.pairs, num_sampled)
        """The training pairs whose hidden states are measured in evaluations."""
        self._hidden_size = self.model.state_size
        self.num_steps = config.num_steps(len(self.pairs))
        self.steps_done = 0
        # They belong to the model as it starts, so they are computed before any step and before `restore`.
        self._references = self._reference_logprobs() if config.loss.regularizer == "dpo" else None
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        """The parameters that are trained, by name. After a step their gradients are those of the step."""
        # A step of 1e-5 would vanish in bfloat16, so the optimizer moves float32 copies there.
        self._masters = MasterWeights(TrainedPart(self.model))
        decay = config.optimizer.weight_decay
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self._masters.tensors if p.ndim >= 2], "weight_decay": decay},
                {"params": [p for p in self._masters.tensors if p.ndim < 2], "weight_decay": 0.0},
            ]
        )

    @property
    def finished(self) -> bool:
        """Whether all steps have been taken."""
        return self.steps_done >= self.num_steps

    def step(self) -> dict[str, float]:
        """Takes one optimizer step on the next batch, and returns its metrics.

        The metrics are the number of the step (from 1 on), means over the batch's pairs (`_METRICS`), the standard
        deviation of the rewards, the norm of the gradient before clipping, and the learning rate.

        Raises NonFiniteStep if the gradient, or a weight after the update, is not finite. The message names the first
        pair whose reward or loss was not finite, if there was one.
        """
        optimizer = self.config.optimizer
        batch = self.batch(self.steps_done)
        parts = self.microbatches(batch)
        own_parts = parts[rank() :: num_ranks()]
        # The square of the batch's mean reward is no sum over micro-batches: each needs the mean of the whole batch.
        in_parts = self.config.loss.bsr == "squared_mean" and len(parts) > 1
        batch_mean = self._batch_mean(own_parts, len(batch)) if in_parts else None
        sums = torch.zeros(len(_METRICS), dtype=torch.float64)
        self._optimizer.zero_grad()
        source = ""
        for part in own_parts:
            terms, rewards = self._loss(part, batch_mean)
            source = source or self._broken(part, rewards, terms)
            # A micro-batch's loss is a mean over its pairs. With this weight the gradients add up to that of the whole
            # batch.
            (terms.loss * (len(part) / len(batch))).backward()
            sums += torch.tensor(_metrics(terms, *rewards), dtype=torch.float64) * (len(part) / len(batch))
        for parameter in self.parameters.values():
            # A rank without a micro-batch has no gradients, but must take part in each sum: the others wait for it.
            if num_ranks() > 1:
                parameter.grad = summed(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        self._masters.take_gradients()
        gradient_norm = torch.nn.utils.clip_grad_norm_(self._masters.tensors, optimizer.max_grad_norm).item()
        lr = self.config.learning_rate(self.steps_done, self.num_steps)
        # Checked before the update, so that the weights stay finite. The test is written so that NaN fails it.
        if not gradient_norm < float("inf"):
            raise NonFiniteStep(
                f"step {self.steps_done + 1}: the gradient's norm is {gradient_norm} at learning rate {lr:g}{source}; lower "
                f"optimizer.lr or use model.dtype float32"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._masters.write_back()
        if not all_finite(self.parameters.values()):
            raise NonFiniteStep(
                f"step {self.steps_done + 1}: the weights are not finite after an update with learning rate {lr:g} and "
                f"optimizer.weight_decay {optimizer.weight_decay:g}; lower them"
            )
        self.steps_done += 1
        metrics = dict(zip(_METRICS, summed(sums).tolist(), strict=True))
        # Rounding can make the variance slightly negative.
        metrics["reward/std"] = max(0.0, metrics.pop("reward/square") - metrics["reward/mean"] ** 2) ** 0.5
        return {"step": self.steps_done, **metrics, "gradient_norm": gradient_norm, "lr": lr}

    def evaluate(self) -> dict[str, float]:
        """Measures the model, and returns a line of evaluation.jsonl.

        The line has the number of steps taken, the norm of the head's weights, and `PairStates.record` of the held-out
        pairs and of a sample of the training pairs. The sample is the same at every evaluation.

        Raises NonFiniteStep naming a pair whose reward is not finite.
        """
        record = {"step": self.steps_done, "head/weight_norm": head_norm(self.model.classifier.score)}
        for name, pairs in (("held_out", self.held_out), ("training", self.sample)):
            told = partial(self._on_work, f"seed {self.config.run.seed}: evaluation on {name} pairs")
            states = pair_states(self.model, pairs, self.config.optimizer.tokens_per_microbatch, told)
            if bad := first_bad(states.rewards):
                reward = _reward_of(pairs[bad[1]], bad[0], states.rewards[tuple(bad)])
                raise NonFiniteStep(f"evaluation after step {self.steps_done}: {reward}: the model overflows")
            record |= states.record(name)
        return record

    def save_model(self, directory: Path) -> None:
        """Writes the reward model as `RewardTrainee.save` does. All its weights are float32 if all of them are trained."""
        # A file of two number formats would be read in one of them. With adapters or a frozen backbone the masters are
        # of a part of the weights only.
        model = self.config.model
        whole = not model.frozen and model.lora is None
        masters = dict(zip(self.parameters, self._masters.tensors, strict=True))
        self.model.save(directory, masters if whole else None)

    def save(self, directory: Path) -> None:
        """Writes a checkpoint, whole or not at all.

        It has the trained parameters and their float32 masters, AdamW's moments, the number of steps taken, a digest of the training pairs, and
        the config. Raises DiskError.
        """
        tensors = {}
        for (name, parameter), master in zip(self.parameters.items(), self._masters.tensors, strict=True):
            tensors[f"parameter/{name}"] = parameter.detach()
            if master is not parameter:
                tensors[f"master/{name}"] = master.detach()
            tensors |= {f"{key}/{name}": value for key, value in self._optimizer.state[master].items()}
        record = {"step": str(self.steps_done), "data": self._data_digest()}
        with whole_directory(directory, replace=True) as building:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, building / "state.safetensors", record
            )
            (building / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
            # The manifest covers all other files, so it comes last.
            seal(building)

    @torch.no_grad()
    def restore(self, directory: Path) -> None:
        """Goes on from a checkpoint that `save` wrote.

        Raises ConfigError if the checkpoint is not whole, if the training pairs are others than it was trained on, or
        if the config changed in a key that must stay.
        """
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
            for (name, parameter), master in zip(self.parameters.items(), self._masters.tensors, strict=True):
                # Copied into the tensors themselves, since the optimizer holds these very objects.
                parameter.copy_(file.get_tensor(f"parameter/{name}"))
                if master is not parameter:
                    master.copy_(file.get_tensor(f"master/{name}"))
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in names]
                state = {key: file.get_tensor(f"{key}/{name}") for key in keys}
                # AdamW keeps `step` on the CPU, and the moments beside their parameter.
                moments = {key: value.to(parameter.device) for key, value in state.items() if key != "step"}
                self._optimizer.state[master] = {"step": state["step"], **moments} if state else {}
        self.steps_done = int(record["step"])

    def _tokenized(self, pairs: Sequence[Any]) -> list[TokenizedPair]:
        """The pairs as tokens, cut to `data.max_tokens` or to the model's positions."""
        limit = longest_text(self.config.data.max_tokens, self.model.classifier.config)
        return [tokenized(pair, self.model.tokenizer, limit) for pair in pairs]

    def batch(self, step: int) -> list[int]:
        """Indices of the pairs of a step's batch.

        They depend on run.seed and the step alone, so a resumed run gets the same batches. Each pass over the data has
        its own order, and a batch may contain the end of one pass and the beginning of the next.
        """
        size, num = self.config.optimizer.batch_size, len(self.pairs)
        orders: dict[int, list[int]] = {}
        batch = []
        for place in range(step * size, (step + 1) * size):
            epoch, at = divmod(place, num)
            if epoch not in orders:
                orders[epoch] = random.Random(f"{self.config.run.seed}/{epoch}").sample(range(num), num)
            batch.append(orders[epoch][at])
        return batch

    def microbatches(self, batch: Sequence[int]) -> list[list[int]]:
        """The batch in parts of at most `optimizer.tokens_per_microbatch` tokens."""
        return microbatches(self.pairs, batch, self.config.optimizer.tokens_per_microbatch)

    @torch.no_grad()
    def _batch_mean(self, parts: Sequence[Sequence[int]], num_pairs: int) -> Tensor:
        """The mean of all 2 * num_pairs rewards of the batch, a scalar without gradient.

        parts: this rank's micro-batches. This is a forward pass of its own; `reward_objectives.squared_mean` says why.
        """
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            total += self._forward(part)[0].double().sum().cpu()
        return (summed(total) / (2 * num_pairs)).float().to(self.model.device)

    def _forward(self, part: Sequence[int], with_logprobs: bool = False) -> tuple[Tensor, Tensor | None]:
        """Rewards [2, B] of B pairs and, if asked for, log-probabilities [2, B]. Row 0 is the chosen responses."""
        pairs = [self.pairs[index] for index in part]
        texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        rewards, logprobs = self.model(texts, with_logprobs, self._dropout(part))
        return rewards.view(2, -1), None if logprobs is None else logprobs.view(2, -1)

    def _dropout(self, part: Sequence[int]) -> Tensor | None:
        """[2 B, D] factors of the states that the head reads, first those of the chosen responses. None without dropout.

        They depend on run.seed, the step and the pair alone: not on the micro-batch, the rank, or a run's interruption.
        """
        share = self.config.head.dropout
        if not share:
            return None
        factors_B2D = []
        for index in part:
            place = self.steps_done * len(self.pairs) + index
            seed = sampling_seed(self.config.run.seed, place, Stream.HEAD_DROPOUT)
            drawn = torch.rand(2, self._hidden_size, generator=torch.Generator().manual_seed(seed))
            factors_B2D.append((drawn >= share) / (1 - share))
        return torch.stack(factors_B2D, dim=1).flatten(0, 1)

    def _loss(self, part: Sequence[int], batch_mean: Tensor | None) -> tuple[PreferenceTerms, Tensor]:
        """The loss of a micro-batch with its terms, and its rewards [2, B] without gradient."""
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
            # Either all pairs have a margin or none has.
            margins=None if margins[0] is None else torch.tensor(margins, device=rewards.device),
            batch_mean=batch_mean,
            logprobs=responses,
            **loss.model_dump(),
        )
        return terms, rewards.detach()

    def _broken(self, part: Sequence[int], rewards_2B: Tensor, terms: PreferenceTerms) -> str:
        """For an error message: which reward of a micro-batch is not finite, or that its loss is not. Else empty."""
        if bad := first_bad(rewards_2B):
            return f": {_reward_of(self.pairs[part[bad[1]]], bad[0], rewards_2B[tuple(bad)])}"
        if not terms.loss.isfinite():
            return f": the loss is {terms.loss.item()}, of finite rewards of the pairs of {self.pairs[part[0]].place} and on"
        return ""

    @torch.no_grad()
    def _reference_logprobs(self) -> Tensor:
        """Log-probabilities [2, number of pairs] by the model as it starts, for GRM's `dpo`.

        Row 0 is the chosen responses. They are on the CPU.
        """
        references = torch.zeros(2, len(self.pairs))
        for part in self.microbatches(range(len(self.pairs)))[rank() :: num_ranks()]:
            _, logprobs = self._forward(part, with_logprobs=True)
            assert logprobs is not None
            references[:, part] = logprobs.cpu()
        # Each rank fills its own columns and leaves 0 in the others, so the sum is the whole.
        return summed(references)

    def _data_digest(self) -> str:
        """Digest of the training pairs' tokens and margins, by which a checkpoint recognises its data."""
        return key_digest(json.dumps([[p.chosen.token_ids, p.rejected.token_ids, p.margin] for p in self.pairs]))


def _reward_of(pair: TokenizedPair, side: int, reward: Tensor) -> str:
    """For error messages: whose reward it is, and its value. `side` 0 is the chosen response, 1 the rejected one."""
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
"""Each is a mean over a batch's pairs. A term of the loss that is off is NaN."""


def _metrics(terms: PreferenceTerms, chosen: Tensor, rejected: Tensor) -> list[float]:
    """The values of `_METRICS` for one micro-batch. A tie counts as half in the accuracy."""
    parts = (terms.loss, terms.preference, terms.bsr, terms.pos_reg, terms.regularizer)
    margin = chosen - rejected
    return [
        *(float("nan") if part is None else part.item() for part in parts),
        ((margin.sign() + 1) / 2).mean().item(),
        margin.mean().item(),
        (chosen + rejected).mean().item() / 2,
        (chosen.square() + rejected.square()).mean().item() / 2,
    ]
