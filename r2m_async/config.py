"""The configuration: one typed, frozen tree (YAML sections = fields of `R2MConfig` = fluent methods of it).

    config = R2MConfig.from_yaml("configs/quickstart.yaml").rollouts(num_actors=8).scheduling(max_policy_age=2)

Every fluent method returns a new config and leaves the old one as it was. Times are in seconds, sizes in bytes.
An unknown key is refused with the nearest valid one; a value that breaks a rule with both numbers.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from r2m_async.errors import ConfigError
from r2m_async.yaml_tree import check_plain, cut_repr, parse_yaml, read_yaml, write_yaml


def _as_lists(value: Any) -> Any:
    """YAML and JSON have no tuples; Python's users do."""
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value


Options = dict[str, JsonValue]
"""Keys that another library defines, or a user's estimator."""

LARGEST = 1e37
"""Of the tree's numbers. They meet float32 tensors, which end at 3.4e38, and AdamW's first step takes ten times its rate."""


class Section(BaseModel):
    """One section of a config. Calling it returns a new config with the named keys changed."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )
    _config: Any = PrivateAttr(None)
    _name: str = PrivateAttr("")

    @field_validator("*")
    @classmethod
    def _in_float32(cls, value: Any) -> Any:
        if isinstance(value, float) and abs(value) > LARGEST:
            raise ValueError(f"beyond the {LARGEST:g} that float32 can still compute with; use a smaller number")
        return value

    def __call__(self, /, **changes: Any) -> Any:
        tree = self._config.to_dict()
        tree[self._name].update(_as_lists(changes))
        return type(self._config).from_dict(tree)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.model_dump() == other.model_dump()


class ConfigTree(BaseModel):
    """A whole config: its fields are sections.

    Raises `ConfigError` naming the key, the value, the rule it breaks and what would be valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def __init__(self, /, **sections: Any) -> None:
        try:
            check_plain(sections)
            super().__init__(**sections)
        except ValidationError as error:
            raise ConfigError(
                "\n".join(_explain(problem, type(self).model_fields) for problem in error.errors())
            ) from None
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def model_post_init(self, _: Any) -> None:
        for name in type(self).model_fields:
            section = getattr(self, name).model_copy()
            section._config, section._name = self, name
            self.__dict__[name] = section

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Self:
        return cls(**{str(key): section for key, section in tree.items()})

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Self:
        """Reads a file, and under it the files its `base` key names; `overrides` are `section.key=value` strings."""
        tree = _read_yaml(Path(path))
        for override in overrides:
            key, equals, value = override.partition("=")
            section, dot, field = key.partition(".")
            if not (equals and dot):
                raise ConfigError(f"{override!r} is not of the form section.key=value, e.g. run.num_steps=20")
            if not isinstance(tree.setdefault(section, {}), dict):
                raise ConfigError(f"{path}: {section} is {tree[section]!r}, not a section of keys")
            tree[section][field] = parse_yaml(value, cut_repr(override))
        try:
            return cls.from_dict(tree)
        except ConfigError as error:
            given = tuple(override.partition("=")[0] for override in overrides)
            lines = str(error).splitlines()
            told = (line if line.startswith(given) else f"{path}: {line}" for line in lines)
            raise ConfigError("\n".join(told)) from None

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return write_yaml(self.to_dict())


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
    engine_options: Options = {}
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
    options: Options = {}


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
    """None: `sequence` with the sequence ratio, `token` otherwise."""
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
    zero_options: Options = {}
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


class R2MConfig(ConfigTree):
    """The whole tree. Build it with `from_yaml`, `from_dict` or keyword sections; change it with its sections.

    Raises `ConfigError` naming the key, the value, the rule it breaks and what would be valid.
    """

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    reward: RewardSection = RewardSection()
    head: HeadSection = HeadSection()
    feedback: FeedbackSection = FeedbackSection()
    rollouts: RolloutsSection = RolloutsSection()
    scheduling: SchedulingSection = SchedulingSection()
    queue: QueueSection = QueueSection()
    advantage: AdvantageSection = AdvantageSection()
    objective: ObjectiveSection = ObjectiveSection()
    critic: CriticSection = CriticSection()
    learner: LearnerSection = LearnerSection()
    weights: WeightsSection = WeightsSection()
    data: DataSection = DataSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()

    def build_algo(self, **how: Any) -> Any:
        """The RLlib algorithm that runs this config; its ring starts with its first step. `callbacks` are RLlib's."""
        from r2m_async import R2M  # through the package's door: a config knows no algorithm

        return R2M(config=self, **how)

    @property
    def omega_horizon(self) -> int:
        """T of Eq. 4 = head.omega_horizon, or run.num_steps."""
        return self.head.omega_horizon or self.run.num_steps

    @property
    def reads_feedback(self) -> bool:
        """Whether the variant's head looks at policy states at all."""
        return self.head.variant not in ("vanilla", "iterative_head")

    @property
    def wants_rollout_states(self) -> bool:
        """Whether groups come with the sampling policy's states."""
        return self.reads_feedback and self.feedback.source == "rollout"

    @property
    def trains_head(self) -> bool:
        return self.head.variant not in ("vanilla", "r2m_no_train")

    @property
    def asynchronous(self) -> bool:
        """Whether stages run ahead of each other freely: a staleness bound above 0, and not `lag: exact`."""
        scheduling = self.scheduling
        return scheduling.lag == "bounded" and max(scheduling.max_policy_age, scheduling.max_head_age) > 0

    @property
    def probes_weights(self) -> bool:
        return self.weights.probe and self.rollouts.engine == "vllm"

    @property
    def publishes_beside_passes(self) -> bool:
        """Whether a version can be copied out of the learner while it computes the next step's proximal pass.

        Stage 3 gathers it with the collectives that passes use too, and pi_ref's pass switches LoRA's adapters off.
        """
        return self.learner.zero_stage < 3 and self.model.lora is None

    @property
    def aggregation(self) -> str:
        """objective.aggregation, or `sequence` with the sequence ratio (Eq. 2) and `token` otherwise."""
        return self.objective.aggregation or ("sequence" if self.objective.ratio == "sequence" else "token")

    @property
    def feedback_dtype(self) -> str:
        return self.model.dtype if self.feedback.dtype == "model" else self.feedback.dtype

    def learning_rate(self, step: int, highest: float | None = None) -> float:
        """Of a policy step: rises over learner.warmup steps, then follows learner.schedule down to 0 at run.num_steps.

        `highest` is learner.lr unless given.
        """
        learner, lr = self.learner, self.learner.lr if highest is None else highest
        if step < learner.warmup:
            return lr * (step + 1) / (learner.warmup + 1)
        progress = (step - learner.warmup) / (self.run.num_steps - learner.warmup)
        share = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return lr * share[learner.schedule]

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        rollouts, scheduling, objective = self.rollouts, self.scheduling, self.objective
        if scheduling.lag == "exact" and scheduling.overage != "wait":
            raise ValueError(
                f"scheduling.overage is {scheduling.overage!r} and scheduling.lag is 'exact': what a clock cuts off is "
                f"not reproducible; use overage 'wait' or lag 'bounded'"
            )
        if scheduling.lag == "exact":
            for key, value in (
                ("concurrent_groups", rollouts.concurrent_groups > 1),
                ("in_flight_updates", rollouts.in_flight_updates),
            ):
                if value:
                    raise ValueError(
                        f"rollouts.{key} is {getattr(rollouts, key)} and scheduling.lag is 'exact': exact bits need groups "
                        f"generated one by one with one version; leave it out or use lag 'bounded'"
                    )
        if rollouts.engine != "vllm":
            for key in ("tensor_parallel", "in_flight_updates", "engine_options"):
                if getattr(rollouts, key) != type(rollouts).model_fields[key].default:
                    raise ValueError(
                        f"rollouts.{key} is {getattr(rollouts, key)} and rollouts.engine is {rollouts.engine!r}: it is an "
                        f"option of engine 'vllm'"
                    )
        for key, value, needed, reason in (
            ("rollouts.engine", rollouts.engine, "vllm", "only vLLM's engine receives directly"),
            ("scheduling.lag", scheduling.lag, "bounded", "direct transports keep no old versions"),
        ):
            if self.weights.direct and value != needed:
                raise ValueError(
                    f"weights.transport is {self.weights.transport!r} and {key} is {value!r}: {reason}; use object_store, or "
                    f"{key} {needed!r}"
                )
        if rollouts.keep_stale_cache and not rollouts.in_flight_updates:
            raise ValueError(
                "rollouts.keep_stale_cache is True and rollouts.in_flight_updates is False: without in-flight updates no "
                "request outlives its weights; set both or neither"
            )
        if self.model.lora and self.model.reference is not None:
            raise ValueError(
                f"model.reference is {self.model.reference!r} and model.lora is set: with adapters pi_ref is the policy "
                f"without them; leave model.reference out"
            )
        self._check_learner()
        if objective.num_minibatches > rollouts.prompts_per_step:
            raise ValueError(
                f"objective.num_minibatches is {objective.num_minibatches} and rollouts.prompts_per_step is "
                f"{rollouts.prompts_per_step}: a minibatch holds whole groups, so there can be at most that many"
            )
        if rollouts.group_size < 2 and self.trains_head:
            raise ValueError(
                f"rollouts.group_size is {rollouts.group_size} and head.variant is {self.head.variant!r}: the head learns "
                f"from the best and the worst of a group; use at least 2, or variant 'vanilla'"
            )
        self._check_head()
        if self.learner.warmup >= self.run.num_steps:
            raise ValueError(
                f"learner.warmup is {self.learner.warmup} and run.num_steps is {self.run.num_steps}: the learning rate "
                f"would never be reached; use a warmup below run.num_steps"
            )
        if scheduling.overage == "mask" and self.advantage.name in ("reinforce_pp", "reinforce_pp_baseline", "gae"):
            raise ValueError(
                f"scheduling.overage is 'mask' and advantage.name is {self.advantage.name!r}: it normalises over the whole "
                f"batch, which cut groups leave in parts of different size; use overage 'wait' or 'drop'"
            )
        check_held_out(self.data, "prompts")
        if self.reward.model == "from_scratch" and self.data.preferences is None:
            raise ValueError("reward.model is 'from_scratch' and data.preferences is not set: name a JSONL of pairs")
        if self.model.policy == "from_scratch" and self.data.prompts == "embedded":
            raise ValueError(
                "model.policy is 'from_scratch' and data.prompts is 'embedded': use model.policy 'embedded'"
            )
        return self

    def _check_head(self) -> None:
        head, defaults = self.head, type(self.head).model_fields
        for key in ("hold", "pair_source"):
            if getattr(head, key) != defaults[key].default and not self.trains_head:
                raise ValueError(
                    f"head.{key} is {getattr(head, key)!r} and head.variant is {head.variant!r}: that head does not move; "
                    f"leave it out, or use variant 'r2m'"
                )
        for key, of in (("hold_weight", ("divergence", "bsr")), ("hold_decay", ("average",))):
            if getattr(head, key) != defaults[key].default and head.hold not in of:
                raise ValueError(
                    f"head.{key} is {getattr(head, key)} and head.hold is {head.hold!r}: it is an option of hold "
                    f"{' and '.join(map(repr, of))}; use {'one of them' if len(of) > 1 else 'that'}, or leave it out"
                )

    def _check_learner(self) -> None:
        learner = self.learner
        if learner.backend != "deepspeed":
            for key in ("num_ranks", "zero_stage", "zero_options", "offload"):
                if getattr(learner, key) != type(learner).model_fields[key].default:
                    raise ValueError(
                        f"learner.{key} is {getattr(learner, key)!r} and learner.backend is {learner.backend!r}: it is an "
                        f"option of backend 'deepspeed'; use that, or leave it out"
                    )
            return
        if self.scheduling.lag == "exact":
            raise ValueError(
                "learner.backend is 'deepspeed' and scheduling.lag is 'exact': sums over ranks round as the ranks are "
                "many; use backend 'torch' or lag 'bounded'"
            )
        if learner.zero_stage == 0 and self.model.dtype == "bfloat16":
            raise ValueError(
                "learner.zero_stage is 0 and model.dtype is 'bfloat16': DeepSpeed would take a hidden optimizer step as it "
                "starts; use zero_stage 1, 2 or 3"
            )
        for key, own in (("stage", "zero_stage"), ("offload_optimizer", "offload"), ("offload_param", "offload")):
            if key in learner.zero_options:
                raise ValueError(
                    f"learner.zero_options has {key!r}, and learner.{own} is {getattr(learner, own)!r}: say it there, where it "
                    f"is checked"
                )
        needed = {"none": 0, "optimizer": 1, "params": 3}[learner.offload]
        if learner.zero_stage < needed:
            raise ValueError(
                f"learner.offload is {learner.offload!r} and learner.zero_stage is {learner.zero_stage}: what is not "
                f"shared out cannot be offloaded; use zero_stage {needed} or more, or offload 'none'"
            )
        if learner.offload != "none" and self.run.device == "cpu":
            raise ValueError(
                f"learner.offload is {learner.offload!r} and run.device is 'cpu': all lies in the CPU's memory already; use "
                f"offload 'none'"
            )


def check_held_out(data: Any, key: str) -> None:
    """Raises ValueError if `data.eval` is what data.`key` trains on, or a split is named of no `data.eval`."""
    if data.eval is None and data.eval_split is not None:
        raise ValueError(
            f"data.eval_split is {data.eval_split!r} and data.eval is None: it is a split of data.eval; name the data set "
            f"there, too, or leave it out"
        )
    if data.eval is None or data.eval != getattr(data, key):
        return
    if data.eval_split in (None, data.split) or Path(data.eval).is_file():
        raise ValueError(
            f"data.eval and data.{key} are both {data.eval!r}, with data.split {data.split!r} and data.eval_split "
            f"{data.eval_split!r}: what trains would be held out; name another split of an HF dataset in data.eval_split, or "
            f"another source, or leave data.eval out"
        )


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    tree = read_yaml(path)
    if path.resolve() in above:
        raise ConfigError(f"{path}: its base files name each other in a circle")
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}; expected sections like `run:` with keys under them")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base is {base!r}; expected the path of another config file, relative to this one")
    merged = _read_yaml(path.parent / base, (*above, path.resolve()))
    for section, values in tree.items():
        both_sections = isinstance(values, dict) and isinstance(merged.get(section), dict)
        merged[section] = {**merged[section], **values} if both_sections else values
    return merged


def _explain(problem: Any, sections: dict[str, Any]) -> str:
    """One line of what is wrong, from pydantic's record of it."""
    location = [str(part) for part in problem["loc"]]
    if len(location) > 3 and sections[location[0]].annotation.model_fields[location[1]].annotation == Options:
        location[3:] = location[4::2]  # pydantic names each value's type before its key
    key = ".".join(location)
    if problem["type"] == "extra_forbidden" and location[-1] in ("top_p", "top_k", "min_p"):
        return (
            f"{key}: training samples from the whole distribution, because a truncated one would bias the ratio of Eq. 2; "
            f"leave it out and use rollouts.temperature"
        )
    if problem["type"] == "extra_forbidden":
        return f"{key}: no such key{_nearest(location, sections)}"
    if not location:
        return problem["msg"].removeprefix("Value error, ")
    why = problem["msg"].removeprefix("Value error, ")
    told = f"{key}: {why[0].lower()}{why[1:]}; got {cut_repr(problem['input'])}"
    if problem["type"] == "string_type" and isinstance(problem["input"], (bool, int, float)):
        told += " (YAML reads it as a number or a truth value; put it in quotes)"
    return told


def _nearest(location: list[str], sections: dict[str, Any]) -> str:
    owner = sections[location[0]].annotation.model_fields if len(location) > 1 else sections
    if location[:2] == ["model", "lora"]:
        owner = LoRA.model_fields
    elsewhere = [
        f"{name}.{location[-1]}" for name, field in sections.items() if location[-1] in field.annotation.model_fields
    ]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    close = difflib.get_close_matches(location[-1], owner, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join([*location[:-1], close[0]])}?"
    return f"; valid are {', '.join(owner)}"
