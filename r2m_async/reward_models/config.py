"""The configuration of `r2m reward-model train`.

It is a tree of sections like `config.R2MConfig`, with sections of its own. Calling a section returns a new
configuration in which the named keys are changed:

    config = RewardModelConfig.from_yaml("configs/reward_model/bsr.yaml").loss(bsr_weight=1e-2).run(seed=3)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Concatenate, Literal, ParamSpec

from pydantic import Field

from r2m_async.config_records import RecordsSection, one_name_for_the_prompt
from r2m_async.config_rules import held_out
from r2m_async.config_sections import LoRA
from r2m_async.config_tree import ConfigTree, Rule, Section


class RunSection(Section):
    """What a run is called, where it is written, and what it runs on."""

    name: str = "reward-model"
    """The run directory is called `<name>-<UTC time of its start>`."""
    seed: int = Field(0, ge=0)
    """Seed of everything random: new weights of the head and of adapters, the held-out prompts, label noise, and the
    order of the pairs."""
    output_dir: str = "runs"
    """The directory in which the run directory is made."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to train on. `auto` is a GPU if there is one, else the CPU."""


class ModelSection(Section):
    """The model that training starts from, and which part of it is trained."""

    start: str = "embedded"
    """Hugging Face name or directory of a causal language model or a sequence classifier. `embedded` is a small
    language model of the embedded language, the synthetic language that comes with this package. `embedded_reward` is
    the reward model that `reward.model: embedded` stands for."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the model's weights."""
    attention: str = "sdpa"
    """Attention implementation of the model, by its name in transformers."""
    liger: bool = False
    """Whether norms and gated layers compute with the kernels of the package liger-kernel, on a GPU (docs/models.md)."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model's files may be run. If false, a model that needs it is refused."""
    frozen: bool = False
    """If true, the head alone is trained and the backbone stays as it is. Each text is then read once, and its hidden
    state is kept in the cache for later runs."""
    lora: LoRA | None = None
    """If set, adapters (LoRA) and the head are trained, and the backbone's own weights stay as they are. The saved
    model has the adapters merged into its weights. None trains all weights."""


class HeadSection(Section):
    """The scoring head, which turns a hidden state into a reward."""

    layers: Literal[1, 2] = 1
    """1 is Linear(H, 1) without bias, where H is the hidden size. 2 is GRM's head: Linear(H, width), ReLU,
    Linear(width, 1)."""
    width: int = Field(1024, gt=1)
    """Width of the middle layer. It counts only with two layers."""
    init: Literal["normal", "uniform", "keep"] = "normal"
    """`normal` draws the weights from N(0, 1/(inputs + 1)) and sets biases to 0. `uniform` draws weights and biases as
    PyTorch does for a linear layer, from +-1/sqrt(inputs); GRM's code has it so. `keep` takes the head of the model that
    training starts from."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the numbers of a hidden state that are set to 0 in training before the head reads it. The others are
    divided by the rest of the share. GRM's code has 0.1. Evaluations and the saved model have none."""


class LossSection(Section):
    """The loss. Each key is the keyword argument of the same name of `reward_objectives.preference_loss`."""

    preference: Literal["bt", "bt_margin", "label_smooth", "hinge", "norm", "dr"] = "bt"
    """The loss of a pair's two rewards. `bt` is Bradley-Terry; `bt_margin` is the same with margins from the data's
    scores; `label_smooth` is the same with smoothed labels; `hinge`, `norm` and `dr` are BSR Eq. 30, 29 and 31."""
    epsilon: float = Field(0.1, gt=0, lt=0.5)
    """For `label_smooth`: the weight of the opposite label."""
    hinge_margin: float = Field(1.0, gt=0)
    """For `hinge`: a pair costs nothing once its rewards differ by this much."""
    bsr: Literal["squared_mean", "mean_square"] | None = None
    """Batch sum-to-zero regularization, which keeps rewards centred on 0. `squared_mean` is the square of the batch's
    mean reward (BSR Eq. 25). `mean_square` is the mean of the squared rewards, and its gradient is BSR Eq. 28. None
    leaves the term out."""
    bsr_weight: float = Field(1e-3, gt=0)
    """lambda of BSR Eq. 24, as printed. The authors' code multiplies its lambda by the number of pairs in one device's
    forward pass, so their recipe of 1e-3 with 16 pairs per device is 1.6e-2 here."""
    pos_reg_weight: float = Field(0.0, ge=0)
    """gamma of GRM App. C.6: weight of a term that raises the rewards of chosen responses. 0 leaves it out."""
    regularizer: Literal["sft", "sft_nll", "dpo", "dpo_noref"] | None = None
    """GRM's regularizer, a loss on the language-model head of the model that training starts from. That head is not
    saved. None leaves the regularizer out."""
    alpha: float = Field(0.01, gt=0, lt=1)
    """The regularizer's share of the loss (GRM Eq. 4). The paper takes 0.01 with two layers and 0.001 with one."""
    beta: float = Field(0.1, gt=0)
    """Factor of the log-probabilities in the regularizers `sft`, `dpo` and `dpo_noref`."""


class EnsembleSection(Section):
    """Several reward models that are trained on the same pairs and score together."""

    size: int = Field(1, gt=0)
    """Number of models. They have the seeds run.seed, run.seed + 1, and so on, and are trained one after the other."""
    combine: Literal["mean", "min"] = "mean"
    """How the models' rewards of a text become one reward: by their mean or by their minimum."""


class OptimizerSection(Section):
    """AdamW. The learning rate rises linearly over the warm-up, and then falls towards 0."""

    lr: float = Field(1e-5, gt=0)
    """The highest learning rate."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the learning rate falls after the warm-up: in a line, or as half a cosine, which GRM's code has."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW. Parameters with fewer than two dimensions, such as biases, are not decayed."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients with a larger norm are scaled down to this norm."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the training pairs. It need not be a whole number."""
    batch_size: int = Field(128, gt=0)
    """Pairs in one optimizer step, over all ranks together."""
    tokens_per_microbatch: int = Field(8192, gt=0)
    """Limit on the tokens of one forward pass, padding included. A pair that is longer by itself gets a pass of its
    own."""


class DataSection(RecordsSection):
    """The preference pairs to train on, and the held-out pairs to measure on."""

    preferences: str = "embedded"
    """Training pairs {prompt, chosen, rejected[, chosen_score, rejected_score]}: files with commas between them (JSONL,
    a JSON list, CSV, Parquet), a folder, or a Hugging Face data set. `embedded` is noisy comparisons of samples of the
    embedded policy; `embedded_golden` is the same pairs, labelled without noise."""
    eval: str | None = None
    """Held-out pairs, given as in `preferences`. None holds back the share `held_out` of the prompts; for the embedded
    pairs None takes pairs of held-out prompts, labelled without noise."""
    held_out: float = Field(0.05, ge=0, lt=1)
    """Share of the prompts that is held back. All pairs of such a prompt are held back."""
    stride: int = Field(1, gt=0)
    """Takes every so-many-th usable pair of `preferences`, as GRM does: 20 makes its 40K set of Unified-Feedback."""
    label_noise: float = Field(0.0, ge=0, lt=0.5)
    """Share of the training pairs in which the chosen and the rejected response change places."""
    max_tokens: int = Field(1024, gt=1)
    """Longest text that is read, in tokens. A longer one loses the beginning of its prompt."""


class EvaluationSection(Section):
    """When the model in training is measured."""

    every: int | None = Field(None, gt=0)
    """Steps between evaluations. There is always an evaluation before the first step and after the last; None means
    these two alone."""


class CheckpointSection(Section):
    """When a checkpoint is written."""

    every: int | None = Field(None, gt=0)
    """Steps between checkpoints. None writes none: if such a run is interrupted, the model in training starts anew."""


class LoggingSection(Section):
    """What the terminal shows."""

    live: bool = True
    """Whether to show a progress bar. Without it, or where the output is no terminal, plain lines are printed."""


def _evaluation_pairs_are_held_out(data: DataSection) -> str | None:
    """The pairs of evaluations must not be those that are trained on."""
    return held_out(data, "preferences")


def _the_prompt_has_one_name(data: DataSection) -> str | None:
    """`data.prompt_field` and `data.columns` may both name the field of the prompt, if they agree."""
    return one_name_for_the_prompt(data)


def _a_frozen_backbone_has_no_adapters(model: ModelSection) -> str | None:
    """Adapters train the backbone."""
    if not model.frozen or model.lora is None:
        return None
    return "model.frozen is True and model.lora is set: a frozen backbone has no adapters; use one"


def _frozen_states_need_no_regularizer(model: ModelSection, loss: LossSection) -> str | None:
    """A regularizer holds hidden states, which only move if the backbone is trained."""
    if not model.frozen or loss.regularizer is None:
        return None
    return (
        f"model.frozen is True and loss.regularizer is {loss.regularizer!r}: it holds hidden states, and frozen ones "
        f"do not move; leave one of them out"
    )


def _a_head_that_is_kept_has_one_layer(head: HeadSection) -> str | None:
    """The head of a model to start from is one layer."""
    if head.init != "keep" or head.layers != 2:
        return None
    return "head.init is 'keep' and head.layers is 2: a start has one layer; use init 'normal'"


RULES: tuple[Rule, ...] = (
    _evaluation_pairs_are_held_out,
    _the_prompt_has_one_name,
    _a_frozen_backbone_has_no_adapters,
    _frozen_states_need_no_regularizer,
    _a_head_that_is_kept_has_one_layer,
)
"""The rules between keys, as those of `config_rules`."""


if TYPE_CHECKING:  # as in `config.py`: calling a section takes its keys and returns the whole config
    P = ParamSpec("P")

    def _changes(section: Callable[P, Section]) -> Callable[Concatenate[Section, P], RewardModelConfig]: ...

    class _Run(RunSection):
        __call__ = _changes(RunSection)

    class _Model(ModelSection):
        __call__ = _changes(ModelSection)

    class _Head(HeadSection):
        __call__ = _changes(HeadSection)

    class _Loss(LossSection):
        __call__ = _changes(LossSection)

    class _Ensemble(EnsembleSection):
        __call__ = _changes(EnsembleSection)

    class _Optimizer(OptimizerSection):
        __call__ = _changes(OptimizerSection)

    class _Data(DataSection):
        __call__ = _changes(DataSection)

    class _Evaluation(EvaluationSection):
        __call__ = _changes(EvaluationSection)

    class _Checkpoint(CheckpointSection):
        __call__ = _changes(CheckpointSection)

    class _Logging(LoggingSection):
        __call__ = _changes(LoggingSection)

else:
    _Run = RunSection
    _Model = ModelSection
    _Head = HeadSection
    _Loss = LossSection
    _Ensemble = EnsembleSection
    _Optimizer = OptimizerSection
    _Data = DataSection
    _Evaluation = EvaluationSection
    _Checkpoint = CheckpointSection
    _Logging = LoggingSection


class RewardModelConfig(ConfigTree):
    """The whole configuration, with one field per section.

    Raises `ConfigError` for a key or value that is not valid, and for keys that contradict each other.
    """

    rules: ClassVar = RULES

    run: _Run = _Run()
    model: _Model = _Model()
    head: _Head = _Head()
    loss: _Loss = _Loss()
    ensemble: _Ensemble = _Ensemble()
    optimizer: _Optimizer = _Optimizer()
    data: _Data = _Data()
    evaluation: _Evaluation = _Evaluation()
    checkpoint: _Checkpoint = _Checkpoint()
    logging: _Logging = _Logging()

    @property
    def seeds(self) -> list[int]:
        """The seed of each model of the ensemble."""
        return [self.run.seed + member for member in range(self.ensemble.size)]

    def num_steps(self, num_pairs: int) -> int:
        """Optimizer steps for `num_pairs` training pairs: epochs * num_pairs / batch_size, rounded, and at least 1."""
        return max(1, round(self.optimizer.epochs * num_pairs / self.optimizer.batch_size))

    def learning_rate(self, step: int, num_steps: int) -> float:
        """The learning rate of step `step` of `num_steps`. Steps count from 0 here."""
        warmup = round(self.optimizer.warmup * num_steps)
        if step < warmup:
            # Neither end of the schedule is 0, because a step with learning rate 0 would teach nothing.
            return self.optimizer.lr * (step + 1) / (warmup + 1)
        left = (num_steps - step) / (num_steps - warmup)
        return self.optimizer.lr * (left if self.optimizer.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)
