"""The configuration of `r2m reward-model train`, a tree like `config.R2MConfig` with sections of its own.

config = RewardModelConfig.from_yaml("configs/reward_model/bsr.yaml").loss(bsr_weight=1e-2).run(seed=3)
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from r2m_async.config_rules import held_out
from r2m_async.config_sections import LoRA
from r2m_async.config_tree import ConfigTree, Section


class RunSection(Section):
    name: str = "reward-model"
    seed: int = Field(0, ge=0)
    """Of the head, the order of the data and its noise."""
    output_dir: str = "runs"
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ModelSection(Section):
    start: str = "embedded"
    """HF name or directory of a causal language model or a sequence classifier; `embedded` is a small language model of the
    synthetic language, `embedded_reward` the reward model that goes by `embedded` in `reward.model`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    frozen: bool = False
    """Train the head alone."""
    lora: LoRA | None = None
    """Train adapters and the head; the saved model has them merged."""


class HeadSection(Section):
    layers: Literal[1, 2] = 1
    """1: Linear(H, 1) without bias. 2: Linear(H, width)-ReLU-Linear(width, 1), GRM's."""
    width: int = Field(1024, gt=1)
    """Of two layers."""
    init: Literal["normal", "keep"] = "normal"
    """Weights from N(0, 1/(inputs + 1)), biases 0; or the head that the start has."""


class LossSection(Section):
    """The keyword arguments of `reward_objectives.preference_loss` by their names."""

    preference: Literal["bt", "bt_margin", "label_smooth", "hinge", "norm", "dr"] = "bt"
    epsilon: float = Field(0.1, gt=0, lt=0.5)
    """Of label_smooth."""
    hinge_margin: float = Field(1.0, gt=0)
    bsr: Literal["squared_mean", "mean_square"] | None = None
    """BSR's square of the batch's mean reward (Eq. 25), or the mean of squares that Eq. 28 is the gradient of."""
    bsr_weight: float = Field(1e-3, gt=0)
    """lambda of Eq. 24 as printed. The authors' code multiplies its own by the pairs of one device's forward pass: their
    recipe, 1e-3 with 16 pairs per device, is 1.6e-2 here."""
    pos_reg_weight: float = Field(0.0, ge=0)
    """gamma of GRM App. C.6."""
    regularizer: Literal["sft", "sft_nll", "dpo", "dpo_noref"] | None = None
    """GRM's, on the kept LM head of the start, which is not saved."""
    alpha: float = Field(0.01, gt=0, lt=1)
    """The regularizer's share (GRM Eq. 4); the paper takes 0.01 with two layers and 0.001 with one."""
    beta: float = Field(0.1, gt=0)


class EnsembleSection(Section):
    size: int = Field(1, gt=0)
    """Models of the seeds run.seed, run.seed + 1, ..., trained one after the other."""
    combine: Literal["mean", "min"] = "mean"
    """Of their rewards."""


class OptimizerSection(Section):
    """AdamW; the learning rate rises over the warm-up and falls linearly to 0."""

    lr: float = Field(1e-5, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(128, gt=0)
    """Pairs in one step."""
    tokens_per_microbatch: int = Field(8192, gt=0)
    """Tokens per forward pass, padding included; one pair always fits."""


class DataSection(Section):
    preferences: str = "embedded"
    """{prompt, chosen, rejected[, chosen_score, rejected_score]} in JSONL file(s), comma-separated, or an HF dataset;
    `embedded`: noisy comparisons of the embedded policy's samples; `embedded_golden`: the same without noise."""
    eval: str | None = None
    """Held-out pairs, as `preferences`; None holds `held_out` back (`embedded`: pairs of held-out prompts, without noise)."""
    held_out: float = Field(0.05, ge=0, lt=1)
    """Share of the prompts, with all their pairs."""
    label_noise: float = Field(0.0, ge=0, lt=0.5)
    """Share of the training pairs that are flipped."""
    max_tokens: int = Field(1024, gt=1)
    """Longer texts lose the beginning of their prompt."""
    on_bad_record: Literal["error", "skip"] = "error"
    prompt_field: str = "prompt"
    split: str = "train"
    """Of HF data sets."""
    eval_split: str | None = None
    """Of `eval`; None: `split`."""


class EvaluationSection(Section):
    every: int | None = Field(None, gt=0)
    """Steps between evaluations, besides one before the first step and one after the last; None: those two alone."""


class CheckpointSection(Section):
    every: int | None = Field(None, gt=0)
    """Steps between checkpoints; None: a run that ends early starts its present model anew."""


class LoggingSection(Section):
    live: bool = True
    """A progress bar in the terminal (plain lines where the output is not one)."""


class RewardModelConfig(ConfigTree):
    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    head: HeadSection = HeadSection()
    loss: LossSection = LossSection()
    ensemble: EnsembleSection = EnsembleSection()
    optimizer: OptimizerSection = OptimizerSection()
    data: DataSection = DataSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()

    @property
    def seeds(self) -> list[int]:
        return [self.run.seed + member for member in range(self.ensemble.size)]

    def num_steps(self, num_pairs: int) -> int:
        """epochs * num_pairs / batch_size, rounded, at least 1."""
        return max(1, round(self.optimizer.epochs * num_pairs / self.optimizer.batch_size))

    def learning_rate(self, step: int, num_steps: int) -> float:
        """Of step 0 <= step < num_steps."""
        warmup = round(self.optimizer.warmup * num_steps)
        if step < warmup:
            return self.optimizer.lr * (step + 1) / (warmup + 1)
        return self.optimizer.lr * (num_steps - step) / (num_steps - warmup)

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if broken := [message for message in (rule(self) for rule in _RULES) if message]:
            raise ValueError("\n".join(broken))
        return self


def _evaluation_pairs_are_held_out(config: RewardModelConfig) -> str | None:
    return held_out(config.data, "preferences")


def _a_frozen_backbone_has_no_adapters(config: RewardModelConfig) -> str | None:
    if not config.model.frozen or config.model.lora is None:
        return None
    return "model.frozen is True and model.lora is set: a frozen backbone has no adapters; use one"


def _frozen_states_need_no_regularizer(config: RewardModelConfig) -> str | None:
    if not config.model.frozen or config.loss.regularizer is None:
        return None
    return (
        f"model.frozen is True and loss.regularizer is {config.loss.regularizer!r}: it holds hidden states, and frozen ones "
        f"do not move; leave one of them out"
    )


def _a_head_that_is_kept_has_one_layer(config: RewardModelConfig) -> str | None:
    if config.head.init != "keep" or config.head.layers != 2:
        return None
    return "head.init is 'keep' and head.layers is 2: a start has one layer; use init 'normal'"


_RULES = (
    _evaluation_pairs_are_held_out,
    _a_frozen_backbone_has_no_adapters,
    _frozen_states_need_no_regularizer,
    _a_head_that_is_kept_has_one_layer,
)
