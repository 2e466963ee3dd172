"""The sections of `R2MConfig`: every key with its default, its limits and what it means."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from r2m_async.config_tree import LARGEST, Options, Section


class RunSection(Section):
    name: str = "r2m"
    seed: int = Field(0, ge=0)
    num_steps: int = Field(100, gt=0)
    output_dir: str = "runs"
    device: Literal["auto", "cpu", "cuda"] = "auto"


class LoRA(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0, le=LARGEST)
    """The adapters' product is scaled by alpha / rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Names of modules that get one, or all linear layers but the language-model head."""


class ModelSection(Section):
    policy: str = "embedded"
    """HF name or directory; `embedded` (the synthetic language) and `from_scratch` (small, built from the data) are built here."""
    reference: str | None = None
    """HF name or directory of pi_ref; None is the policy as it started."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    lora: LoRA | None = None
    """Train adapters (`{rank: 16, alpha: 32}`) instead of the weights; pi_ref is the policy without them."""


class RewardSection(Section):
    model: str = "embedded"
    """HF name or directory of a sequence classifier with one label; `embedded` or `from_scratch` as in `model.policy`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    replicas: int = Field(1, gt=0)
    """Copies of the frozen backbone; the head scores in one place."""
    max_tokens: int = Field(4096, gt=1)
    """Longer texts lose the beginning of their prompt."""
    functions: tuple[str, ...] = ()
    """Verifiable rewards `module:attr`, f(prompt_text, response_text) -> float, added to the model's reward. Each must return
    one number for every response, finite in float32; what a function raises ends the run."""
    clip: float | None = Field(None, gt=0)
    """Clips the model's reward to [-clip, clip]."""
    length_penalty: float = Field(0.0, ge=0)
    """Subtracted per response token."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Subtracted from a response that did not end by itself."""


class HeadSection(Section):
    variant: Literal["r2m", "vanilla", "r2m_no_train", "r2m_noise", "iterative_head"] = "r2m"
    """method.md section 7; `r2m_no_bt` and `r2m_no_gre` are r2m with alpha 1 and 0."""
    width: int = Field(2048, gt=0)
    omega_floor: float = Field(0.6, ge=0.0, le=1.0)
    """Omega of Eq. 4."""
    omega_horizon: int | None = Field(None, gt=0)
    """T of Eq. 4; None is run.num_steps."""
    alpha: float = Field(0.3, ge=0.0, le=1.0)
    """Weight of the group reward entropy in Eq. 7."""
    pair_source: Literal["refreshed", "annotated", "frozen"] = "refreshed"
    """Which rewards choose winner and loser of Eq. 5: the head's on refreshed states, the annotation's, or phi(RTE)'s."""
    hold: Literal["none", "divergence", "bsr", "agreement", "average"] = "none"
    """Beyond the paper: what keeps the head near the reward model it began as (docs/holding_the_head.md)."""
    hold_weight: float = Field(1.0, gt=0)
    """Of the penalty that `divergence` and `bsr` add to Eq. 7."""
    hold_decay: float = Field(0.9, gt=0, lt=1)
    """Of `average`."""
    lr: float = Field(1e-6, gt=0)

    @property
    def trains(self) -> bool:
        """Whether the variant's head moves at all."""
        return self.variant not in ("vanilla", "r2m_no_train")


class FeedbackSection(Section):
    source: Literal["rollout", "learner"] = "rollout"
    """Whose states score: the sampling policy's (the paper) or the proximal pass's."""
    dtype: Literal["model", "float32", "bfloat16"] = "model"
    """In which states travel; `model` is the policy's dtype."""


class RolloutsSection(Section):
    engine: Literal["transformers", "vllm"] = "transformers"
    num_actors: int = Field(1, gt=0)
    concurrent_groups: int = Field(1, gt=0)
    """Groups that one actor generates at once, with vllm or in a ring of one process (`r2m study`); more than 1 batches
    them, and rounding then depends on the batch."""
    tensor_parallel: int = Field(1, gt=0)
    """GPUs of one vllm engine."""
    in_flight_updates: bool = False
    """New weights reach a vllm engine while its requests wait, rather than after they have ended."""
    keep_stale_cache: bool = False
    """With in-flight updates: go on with keys and values of the old weights instead of computing them again."""
    engine_options: Options = Field(default_factory=dict)
    """Further arguments of vLLM's `EngineArgs`, e.g. gpu_memory_utilization."""
    prompts_per_step: int = Field(8, gt=0)
    """B: groups that one policy step trains."""
    group_size: int = Field(8, gt=0)
    """K: responses per prompt."""
    temperature: float = Field(1.0, gt=0)
    max_prompt_tokens: int = Field(512, gt=0)
    max_new_tokens: int = Field(512, gt=0)
    max_restarts: int = Field(3, ge=0)
    """Deaths in a row, without a finished group between, after which a rollout actor ends the run."""
    hang_after: float = Field(1200.0, gt=0)
    """Seconds for one group after which its engine counts as hung and is started anew."""


class SchedulingSection(Section):
    max_policy_age: int = Field(0, ge=0)
    """A group's due step minus the oldest policy version in it, at most."""
    max_head_age: int = Field(0, ge=0)
    """A step minus the head version that scores it, at most."""
    lag: Literal["bounded", "exact"] = "bounded"
    """`exact`: every age is the largest allowed, so that an asynchronous run is reproducible bit for bit."""
    overage: Literal["wait", "mask", "drop"] = "wait"
    """What happens to late groups: waited for, cut to their finished responses, or voided."""
    overage_after: float = Field(60.0, gt=0)
    """Seconds after the rest of its step is ready that make a group late."""
    stall_after: float = Field(1800.0, gt=0)
    """Seconds without any stage finishing anything after which the run stops and says who waits for what."""


class QueueSection(Section):
    max_bytes: int = Field(2 * 1024**3, gt=0)


class AdvantageSection(Section):
    name: str = "rloo"
    """rloo, grpo, remax, reinforce_pp, reinforce_pp_baseline, gae, a registered name, or `module:attr`."""
    options: Options = Field(default_factory=dict)


class ObjectiveSection(Section):
    ratio: Literal["sequence", "token", "sequence_mean"] = "sequence"
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    off_policy: Literal["none", "full", "clamp", "mask"] = "clamp"
    off_policy_cap: float = Field(2.0, gt=1)
    kl_coef: float = Field(0.05, ge=0)
    """beta of Eq. 2."""
    kl_stop: float | None = Field(None, gt=0)
    """The run ends after a step whose mean KL(policy || reference), in nats per response, exceeds this."""
    aggregation: Literal["sequence", "token"] | None = None
    """`token` gives every token the same weight, `sequence` every response. None: `token` with the token ratio, else
    `sequence`, as Eq. 2 and GSPO have it."""
    epochs: int = Field(2, gt=0)
    num_minibatches: int = Field(1, gt=0)
    """Optimizer steps per epoch."""


class CriticSection(Section):
    """Of an advantage estimator that needs values (`gae`); other estimators train no critic."""

    model: str | None = None
    """HF name or directory with the policy's tokenizer; a head of one label is kept. None: model.policy with a head of zeros."""
    lr: float = Field(1e-5, ge=0)
    """At its highest; schedule, warmup, weight_decay, max_grad_norm and all else that trains are `learner`'s."""
    clip: float | None = Field(0.2, gt=0)
    """How far a value may be pushed from what it was at the start of the step, in units of reward; None: as far as it goes."""


class LearnerSection(Section):
    backend: Literal["torch", "deepspeed"] = "torch"
    """`torch`: one process, the same bits in every run. `deepspeed`: ZeRO over ranks."""
    num_ranks: int = Field(1, gt=0)
    """Processes, each with a GPU of its own where there are any, that share a step's groups (deepspeed)."""
    zero_stage: int = Field(0, ge=0, le=3)
    """What the ranks share out: nothing, the optimizer's state (1), gradients too (2), weights too (3) (deepspeed)."""
    zero_options: Options = Field(default_factory=dict)
    """Further keys of DeepSpeed's `zero_optimization`, e.g. overlap_comm or stage3_param_persistence_threshold."""
    offload: Literal["none", "optimizer", "params"] = "none"
    """What lies in the CPU's memory instead of the GPU's: the optimizer's state and step, or the weights too (deepspeed)."""
    activation_checkpointing: bool = False
    """Layers are computed again in the backward pass instead of kept: less memory, about a third more time, same bits."""
    lr: float = Field(1e-6, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(0, ge=0)
    """Policy steps over which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    tokens_per_microbatch: int = Field(8192, gt=0)
    """Tokens per forward pass, padding included; one trajectory always fits."""
    packing: bool = False
    """A pass is one row of whole trajectories without padding, each attending to itself alone. For `flash_attention_2`: other
    attention computes the whole row's square and masks it, which costs more than padding unless lengths differ widely."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Where a reward, an advantage, a gradient or the head's update is NaN or infinite: end the run with what made it so, or
    leave the weights and go on. A step with such a reward or advantage is left out whole, for the head too."""


class WeightsSection(Section):
    transport: Literal["auto", "object_store", "gloo", "nccl", "ipc"] = "auto"
    """How a version reaches a vllm engine: `object_store` (Ray's, then shared memory) or sent by the learner itself, by `gloo`
    or `nccl`, or as `ipc` handles within one GPU. `auto`: nccl where learner and engines have GPUs of their own, ipc where
    they share one, else object_store."""
    probe: bool = True
    """After every update a vllm engine must show that it has the learner's weights and computes the same with them."""
    timeout: float = Field(300.0, gt=0)
    """Seconds for each part of an update, after which the engine counts as dead."""

    @property
    def direct(self) -> bool:
        """Whether the learner itself sends."""
        return self.transport in ("gloo", "nccl", "ipc")


class DataSection(Section):
    prompts: str = "embedded"
    """JSONL file(s, comma-separated) or HF dataset; `embedded` is the synthetic language."""
    preferences: str | None = None
    """JSONL of {prompt, chosen, rejected}, read by `reward.model: from_scratch`."""
    eval: str | None = None
    """Held-out prompts, as `prompts`; None holds `evaluation.num_prompts` of the prompts back."""
    on_bad_record: Literal["error", "skip"] = "error"
    prompt_field: str = "prompt"
    split: str = "train"
    """Of HF datasets."""
    eval_split: str | None = None
    """Of `eval`; None: `split`."""


class EvaluationSection(Section):
    every: int | None = Field(None, gt=0)
    """Steps between evaluations, besides one before the first and one after the last; None: no evaluation."""
    num_prompts: int = Field(16, gt=0)
    gold: str | None = None
    """`module:attr`, f(prompt_text, response_text, finished) -> float: reported beside the proxy, never trained on. It must be
    finite; under `learner.on_nonfinite: skip` a step or evaluation with a NaN among its golds reports none."""

    @field_validator("gold", mode="before")
    @classmethod
    def _moved(cls, value: Any) -> Any:
        """A config of an earlier version names the function where it was then."""
        return "r2m_async.from_scratch.language:gold_reward" if value == "r2m_async.language:gold_reward" else value


class CheckpointSection(Section):
    every: int | None = Field(None, gt=0)
    """Steps between checkpoints into the run directory; None: none on the way."""
    at_end: bool = True
    """A checkpoint after the last step, for `r2m export`."""
    keep: int = Field(2, gt=0)
    """The newest that stay; older ones are deleted."""


class LoggingSection(Section):
    tensorboard: bool = True
    live: bool = True
    """A live table in the terminal (plain lines where the output is not one)."""
    actors: bool = True
    """What the stages' processes print, a user's own functions among them, is shown with the name of the process."""
