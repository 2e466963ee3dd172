"""The configuration of a run: one typed, frozen tree of sections.

    config = R2MConfig.from_yaml("configs/quickstart.yaml").rollouts(num_actors=8).scheduling(max_policy_age=2)

A section of the YAML file is a field of `R2MConfig`, for example `config.rollouts`. Calling the field changes keys of
the section: the call returns a new config and leaves the old one as it was. Times are in seconds, and sizes in bytes.

An unknown key is refused, and the message names the nearest valid key. A value that breaks a rule is refused, and the
message names the values and the rule.

    config_sections.py  every key, with its default and its meaning
    config_tree.py      what a tree of sections can do: YAML, overrides, error messages
    config_rules.py     the rules that must hold between keys
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec

from r2m_async.config_rules import RULES
from r2m_async.config_sections import (
    REWARD_METRICS as REWARD_METRICS,
)
from r2m_async.config_sections import (
    AdvantageSection as AdvantageSection,
)
from r2m_async.config_sections import (
    CheckpointSection as CheckpointSection,
)
from r2m_async.config_sections import (
    ClusterSection as ClusterSection,
)
from r2m_async.config_sections import (
    CriticSection as CriticSection,
)
from r2m_async.config_sections import (
    DataSection as DataSection,
)
from r2m_async.config_sections import (
    EvaluationSection as EvaluationSection,
)
from r2m_async.config_sections import (
    FeedbackSection as FeedbackSection,
)
from r2m_async.config_sections import (
    HeadSection as HeadSection,
)
from r2m_async.config_sections import (
    LabelsSection as LabelsSection,
)
from r2m_async.config_sections import (
    LearnerSection as LearnerSection,
)
from r2m_async.config_sections import (
    LoggingSection as LoggingSection,
)
from r2m_async.config_sections import (
    LoRA as LoRA,
)
from r2m_async.config_sections import (
    ModelSection as ModelSection,
)
from r2m_async.config_sections import (
    ObjectiveSection as ObjectiveSection,
)
from r2m_async.config_sections import (
    OffPolicyMask as OffPolicyMask,
)
from r2m_async.config_sections import (
    QueueSection as QueueSection,
)
from r2m_async.config_sections import (
    RewardFunction as RewardFunction,
)
from r2m_async.config_sections import (
    RewardSection as RewardSection,
)
from r2m_async.config_sections import (
    RolloutsSection as RolloutsSection,
)
from r2m_async.config_sections import (
    RunSection as RunSection,
)
from r2m_async.config_sections import (
    SchedulingSection as SchedulingSection,
)
from r2m_async.config_sections import (
    WeightsSection as WeightsSection,
)
from r2m_async.config_tree import LARGEST as LARGEST
from r2m_async.config_tree import ConfigTree as ConfigTree
from r2m_async.config_tree import Section as Section

if TYPE_CHECKING:
    # Type checkers and editors see these classes. Calling one takes the keys of its own section, with their types, and
    # returns the whole config. At run time the sections themselves are used, and `Section.__call__` does that.
    P = ParamSpec("P")

    def _changes(section: Callable[P, Section]) -> Callable[Concatenate[Section, P], R2MConfig]: ...

    class _Run(RunSection):
        __call__ = _changes(RunSection)

    class _Model(ModelSection):
        __call__ = _changes(ModelSection)

    class _Reward(RewardSection):
        __call__ = _changes(RewardSection)

    class _Head(HeadSection):
        __call__ = _changes(HeadSection)

    class _Labels(LabelsSection):
        __call__ = _changes(LabelsSection)

    class _Feedback(FeedbackSection):
        __call__ = _changes(FeedbackSection)

    class _Rollouts(RolloutsSection):
        __call__ = _changes(RolloutsSection)

    class _Scheduling(SchedulingSection):
        __call__ = _changes(SchedulingSection)

    class _Cluster(ClusterSection):
        __call__ = _changes(ClusterSection)

    class _Queue(QueueSection):
        __call__ = _changes(QueueSection)

    class _Advantage(AdvantageSection):
        __call__ = _changes(AdvantageSection)

    class _Objective(ObjectiveSection):
        __call__ = _changes(ObjectiveSection)

    class _Critic(CriticSection):
        __call__ = _changes(CriticSection)

    class _Learner(LearnerSection):
        __call__ = _changes(LearnerSection)

    class _Weights(WeightsSection):
        __call__ = _changes(WeightsSection)

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
    _Reward = RewardSection
    _Head = HeadSection
    _Labels = LabelsSection
    _Feedback = FeedbackSection
    _Rollouts = RolloutsSection
    _Scheduling = SchedulingSection
    _Cluster = ClusterSection
    _Queue = QueueSection
    _Advantage = AdvantageSection
    _Objective = ObjectiveSection
    _Critic = CriticSection
    _Learner = LearnerSection
    _Weights = WeightsSection
    _Data = DataSection
    _Evaluation = EvaluationSection
    _Checkpoint = CheckpointSection
    _Logging = LoggingSection


RESPONSES_AT_ONCE = 64
"""The responses that a transformers engine draws at once where nobody says how many. `benchmarks/stage_costs.py` compares a
batch of 64 with eight batches of 8."""


class R2MConfig(ConfigTree):
    """The config of a run. Make it with `from_yaml` or `from_dict`, or with sections as keyword arguments.

    Each field is a section, for example `config.rollouts`. The keys of a section are its attributes. Calling a section
    returns a new config, in which some of its keys are changed.

    Making a config raises ConfigError for whatever is wrong. The message names the key, the value, the rule that it
    breaks, and what would be valid.
    """

    rules: ClassVar = RULES

    run: _Run = _Run()
    model: _Model = _Model()
    reward: _Reward = _Reward()
    head: _Head = _Head()
    labels: _Labels = _Labels()
    feedback: _Feedback = _Feedback()
    rollouts: _Rollouts = _Rollouts()
    scheduling: _Scheduling = _Scheduling()
    cluster: _Cluster = _Cluster()
    queue: _Queue = _Queue()
    advantage: _Advantage = _Advantage()
    objective: _Objective = _Objective()
    critic: _Critic = _Critic()
    learner: _Learner = _Learner()
    weights: _Weights = _Weights()
    data: _Data = _Data()
    evaluation: _Evaluation = _Evaluation()
    checkpoint: _Checkpoint = _Checkpoint()
    logging: _Logging = _Logging()

    def build_algo(self, **how: Any) -> Any:
        """Returns the RLlib algorithm (`R2M`) that runs this config. Its ring starts with the first step.

        Args:
            how: further arguments of `R2M`, for example RLlib's `callbacks`.

        Raises ConfigError or DataError if the run cannot start.
        """
        # Imported here and from the package, because a config must not depend on the algorithm, nor load Ray.
        from r2m_async import R2M

        return R2M(config=self, **how)

    @property
    def omega_horizon(self) -> int:
        """T of Eq. 4: `head.omega_horizon` if it is set, else `run.num_steps`."""
        return self.head.omega_horizon or self.run.num_steps

    @property
    def reads_feedback(self) -> bool:
        """Whether the head of this variant needs the policy's hidden states (the feedback)."""
        return self.head.variant not in ("vanilla", "iterative_head", "iterative_model")

    @property
    def wants_rollout_states(self) -> bool:
        """Whether rollout actors must return the hidden states of the policy that sampled a group."""
        return self.reads_feedback and self.feedback.source == "rollout"

    @property
    def trains_head(self) -> bool:
        """Whether the head of this variant is trained."""
        return self.head.trains

    @property
    def asynchronous(self) -> bool:
        """Whether stages may run ahead of each other freely: a bound on an age is above 0, and `lag` is `bounded`."""
        scheduling = self.scheduling
        return scheduling.lag == "bounded" and max(scheduling.max_policy_age, scheduling.max_head_age) > 0

    @property
    def concurrent_groups(self) -> int:
        """The number of groups that one rollout actor generates at once.

        It is `rollouts.concurrent_groups` if that is set. Otherwise it is 1 where the order of the groups must not change how
        they are rounded, where a rollout function drives each response alone, and for vllm, whose memory depends on it.
        """
        rollouts = self.rollouts
        if rollouts.concurrent_groups is not None:
            return rollouts.concurrent_groups
        if rollouts.engine == "vllm" or rollouts.function is not None or not self.asynchronous:
            return 1
        of_step = -(-rollouts.prompts_per_step // rollouts.num_actors)
        return max(1, min(of_step, RESPONSES_AT_ONCE // rollouts.group_size))

    @property
    def probes_weights(self) -> bool:
        """Whether engines must show that they have the learner's weights (`weights.probe`). Only vllm engines do."""
        return self.weights.probe and self.rollouts.engine == "vllm"

    @property
    def publishes_beside_passes(self) -> bool:
        """Whether a version can be copied out of the learner while it runs the proximal pass of the next step.

        Two things prevent it. In ZeRO stage 3 the copy needs the same collectives as the pass. And with LoRA the pass
        switches the adapters off for a while, to compute the reference policy.
        """
        return self.learner.zero_stage < 3 and self.model.lora is None

    @property
    def aggregation(self) -> str:
        """The aggregation of the policy's loss.

        It is `objective.aggregation` if that is set. Otherwise it is `token` for the ratio `token`, and `sequence` for the
        ratios of whole responses (Eq. 2; GSPO, Eq. 5) and for the loss `sapo`, as its paper has it.
        """
        objective = self.objective
        by_token = objective.ratio == "token" and objective.loss != "sapo"
        return objective.aggregation or ("token" if by_token else "sequence")

    @property
    def max_mismatch(self) -> float:
        """The most that learner and rollout engine may differ in the first step (`learner.max_mismatch`), in nats."""
        if self.learner.max_mismatch is not None:
            return self.learner.max_mismatch
        return {"float32": 0.01, "bfloat16": 0.1}[self.model.dtype]

    @property
    def feedback_dtype(self) -> str:
        """The number format in which the policy's hidden states are sent and kept."""
        return self.model.dtype if self.feedback.dtype == "model" else self.feedback.dtype

    def learning_rate(self, step: int, highest: float | None = None) -> float:
        """Returns the learning rate of a policy step.

        It rises linearly over the first `learner.warmup` steps, up to `highest`. Then it follows `learner.schedule`:
        `constant` stays there, and `linear` and `cosine` fall towards 0 at `run.num_steps`.

        Args:
            step: the policy step, from 0.
            highest: the highest learning rate. None is `learner.lr`.
        """
        learner, lr = self.learner, self.learner.lr if highest is None else highest
        if step < learner.warmup:
            return lr * (step + 1) / (learner.warmup + 1)
        progress = (step - learner.warmup) / (self.run.num_steps - learner.warmup)
        share = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return lr * share[learner.schedule]
