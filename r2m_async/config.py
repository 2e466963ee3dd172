"""The configuration: one typed, frozen tree (YAML sections = fields of `R2MConfig` = fluent methods of it).

    config = R2MConfig.from_yaml("configs/quickstart.yaml").rollouts(num_actors=8).scheduling(max_policy_age=2)

Every fluent method returns a new config and leaves the old one as it was. Times are in seconds, sizes in bytes.
An unknown key is refused with the nearest valid one; a value that breaks a rule with both numbers.

    config_sections.py  every key with its default and its meaning
    config_tree.py      what a tree of sections can do: YAML, overrides, errors
    config_rules.py     what must hold between keys
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self

from pydantic import model_validator

from r2m_async.config_rules import broken_rules
from r2m_async.config_sections import (
    AdvantageSection as AdvantageSection,
)
from r2m_async.config_sections import (
    CheckpointSection as CheckpointSection,
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
    QueueSection as QueueSection,
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
    # What a section is to a type checker and an editor: calling it takes its own keys and returns the whole config. At run
    # time `Section.__call__` does that for all.
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

    class _Feedback(FeedbackSection):
        __call__ = _changes(FeedbackSection)

    class _Rollouts(RolloutsSection):
        __call__ = _changes(RolloutsSection)

    class _Scheduling(SchedulingSection):
        __call__ = _changes(SchedulingSection)

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
    _Feedback = FeedbackSection
    _Rollouts = RolloutsSection
    _Scheduling = SchedulingSection
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


class R2MConfig(ConfigTree):
    """The whole tree. Build it with `from_yaml`, `from_dict` or keyword sections; change it with its sections.

    `config.rollouts` is a section: its keys are attributes, and calling it returns a new config with some of them changed.
    Raises `ConfigError` naming the key, the value, the rule it breaks and what would be valid.
    """

    run: _Run = _Run()
    model: _Model = _Model()
    reward: _Reward = _Reward()
    head: _Head = _Head()
    feedback: _Feedback = _Feedback()
    rollouts: _Rollouts = _Rollouts()
    scheduling: _Scheduling = _Scheduling()
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
        return self.head.trains

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
        """objective.aggregation, or `token` with the token ratio and `sequence` otherwise (Eq. 2; GSPO, Eq. 5)."""
        return self.objective.aggregation or ("token" if self.objective.ratio == "token" else "sequence")

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
    def _rules(self) -> Self:
        """All rules at once: whoever has three keys wrong is told of three."""
        if broken := broken_rules(self):
            raise ValueError("\n".join(broken))
        return self
