"""What an editor and a type checker know of a config's calls. `make check` reads this file; nobody runs it.

An `ignore` that stands where nothing is wrong is an error itself (warn_unused_ignores), so each line below is a test.
"""

from typing import assert_type

from r2m_async.config import R2MConfig
from r2m_async.reward_models.config import RewardModelConfig

config = R2MConfig()
assert_type(config.rollouts(num_actors=8), R2MConfig)
assert_type(config.rollouts(num_actors=8).scheduling(max_policy_age=2).rollouts.num_actors, int)
config.rollouts(num_actros=8)  # type: ignore[call-arg]
config.rollouts(num_actors="8")  # type: ignore[arg-type]
config.rollout  # type: ignore[attr-defined]  # noqa: B018
assert_type(RewardModelConfig().run(seed=3), RewardModelConfig)
RewardModelConfig().run(num_steps=3)  # type: ignore[call-arg]
