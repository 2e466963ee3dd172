"""The DeepSpeed learner on two real ranks over gloo, against the torch learner of one process.

Two processes join once and build a new engine for every case; the last tests start a whole ring instead.
"""

import dataclasses
import os
import signal
import sys

import pytest
import torch
from rings import SHARDED

from learners import deepspeed_backend
from learners.critic import Critic
from learners.policy_learner import PolicyLearner
from learners.torch_backend import TorchBackend
from r2m_async.advantages import get_advantage
from r2m_async.config import R2MConfig
from r2m_async.cpu_threads import one_thread
from r2m_async.errors import ConfigError, StageLost, StepFailed
from r2m_async.launch.ring import Ring
from r2m_async.models.critic import load_critic
from r2m_async.models.loading import load_policy
from r2m_async.models.weights import named_weights, tensor_digest
from r2m_async.trajectories import GroupRewards, Prompt, Ticket, Trajectory, TrajectoryGroup

pytestmark = [pytest.mark.ring, pytest.mark.usefixtures("ray_session")]

STAGES = [0, 1, 2, 3]
OUTER_STAGES = [*(pytest.param(stage, marks=pytest.mark.cross) for stage in (0, 1, 2)), 3]
"""For what makes no difference between stages 1 and 2 and the two beside them, which `make test` has everywhere."""
PROMPT_LEN = 5
NUM_STEPS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a learner made of some steps."""

    weights: dict[str, torch.Tensor] | None
    metrics: list[dict[str, float]]
    refreshed: dict[int, list[torch.Tensor]]
    """The last step's states by group."""
    critic: dict[str, torch.Tensor] | None = None
    """Its weights, where one is trained."""
    error: str = ""


@pytest.fixture
def config(tiny_config) -> R2MConfig:
    config = tiny_config.run(num_steps=NUM_STEPS).rollouts(prompts_per_step=4).objective(num_minibatches=2, epochs=2)
    return config.learner(lr=1e-4, warmup=2, tokens_per_microbatch=40, weight_decay=0.1)


def sharded(config: R2MConfig, stage: int, **learner) -> R2MConfig:
    options = SHARDED if stage == 3 else {}
    return config.learner(backend="deepspeed", num_ranks=2, zero_stage=stage, zero_options=options, **learner)


def batch_of(step: int, sizes=(3, 2, 5, 3), rewards_of_first=None) -> tuple[list[TrajectoryGroup], list[GroupRewards]]:
    """Random groups of uneven sizes and lengths, with rewards. Their behaviour is nearly the uniform policy's."""
    generator = torch.Generator().manual_seed(step)
    groups, rewards = [], []
    for index, size in enumerate(sizes):
        prompt = torch.randint(2, 250, (PROMPT_LEN,), generator=generator)
        trajectories = []
        for _ in range(size):
            length = int(torch.randint(1, 3 + 3 * index, (1,), generator=generator))
            logprobs = torch.zeros(PROMPT_LEN + length)
            logprobs[PROMPT_LEN:] = -5.6 + 0.3 * torch.randn(length, generator=generator)
            response = torch.randint(2, 250, (length,), generator=generator)
            trajectories.append(
                Trajectory(
                    token_ids=torch.cat([prompt, response]),
                    prompt_len=PROMPT_LEN,
                    behaviour_logprobs=logprobs,
                    # Of no version that a learner has: it would compare its log-probabilities with these random ones.
                    policy_versions=torch.full((PROMPT_LEN + length,), 1000 + step, dtype=torch.int32),
                    finish_reason="stop",
                    text="",
                )
            )
        group_id = 4 * step + index
        text = Prompt(prompt_id="", content="", text="", token_ids=tuple(prompt.tolist()))
        ticket = Ticket(group_id=group_id, due_step=step, seed=0, attempt=0, prompt=text)
        groups.append(TrajectoryGroup(ticket=ticket, trajectories=tuple(trajectories), greedy=None))
        own = torch.randn(size, generator=generator)
        if index == 0 and rewards_of_first is not None:
            own = rewards_of_first * own
        rewards.append(
            GroupRewards(
                group_id=group_id, rewards=own, model_rewards=own, greedy_reward=None, head_version=step, omega=1.0
            )
        )
    return groups, rewards


def torch_learner(config: R2MConfig) -> PolicyLearner:
    return learner_on(TorchBackend, config)


def rank_learner(config: R2MConfig) -> PolicyLearner:
    return learner_on(deepspeed_backend.DeepSpeedBackend, config)


def learner_on(backend: type, config: R2MConfig) -> PolicyLearner:
    estimator = get_advantage(config.advantage.name)
    critic = None
    if estimator.needs_values:
        values = without_amplification(backend(load_critic(config.model.policy, config), None, config))
        critic = Critic(values, config)
    return PolicyLearner(without_amplification(backend(*models_of(config), config)), estimator, config, critic)


def without_amplification(backend):
    """Its AdamW divides by |gradient| + 1e-4: what rounds in a gradient near 0 becomes no whole step.

    Most gradients are larger and move weights by about the learning rate, as ever.
    """
    optimizer = backend._optimizer if isinstance(backend, TorchBackend) else backend.policy.optimizer
    for group in optimizer.param_groups:
        group["eps"] = 1e-4
    return backend


def models_of(config: R2MConfig) -> tuple:
    """The policy and, without adapters, pi_ref."""
    model = load_policy(config.model.policy, config)
    return model, None if config.model.lora else load_policy(config.model.policy, config)


def learn(learner: PolicyLearner, batches: dict[int, tuple]) -> Outcome:
    """Takes the steps; on the last one's refreshed states and weights, as they were published."""
    metrics = []
    for step, (groups, rewards) in batches.items():
        learner.proximal(step, groups)
        try:
            report, refreshed = learner.train(step, rewards)
        except StepFailed as error:
            weights = learner.weights()[1]
            return Outcome(weights=weights and weights.tensors, metrics=metrics, refreshed={}, error=str(error))
        metrics.append(report.metrics)
    weights = learner.weights()[1]
    states = {one.group_id: list(one.hidden_states) for one in refreshed or ()}
    critic = None
    if learner.critic:
        critic = {name: p.detach().cpu().clone() for name, p in learner.critic.backend.named_parameters()}
    return Outcome(weights=weights and weights.tensors, metrics=metrics, refreshed=states, critic=critic)


def with_torch(config: R2MConfig, batches: dict[int, tuple], then: tuple[R2MConfig, dict] | None = None) -> Outcome:
    """`then`: what another config makes of further steps, from a checkpoint of the first."""
    plain = {"backend": "torch", "num_ranks": 1, "zero_stage": 0, "zero_options": {}}
    with one_thread():
        learner = torch_learner(config.learner(**plain))
        outcome = learn(learner, batches)
        if then is None:
            return outcome
        changed, further = then
        second = torch_learner(changed.learner(**plain))
        second.restore(learner.state()[1])
        return learn(second, further)


def steps(count: int = NUM_STEPS, **how) -> dict[int, tuple]:
    return {step: batch_of(step, **how) for step in range(count)}


class Ranks:
    """Processes that have joined; `run` calls a function on all and returns what each returned."""

    def __init__(self, num_ranks: int = 2) -> None:
        import ray

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        config = R2MConfig(run={"device": "cpu"}, learner={"backend": "deepspeed", "num_ranks": num_ranks}).to_dict()

        class Rank:
            def __init__(self, rank: int, port: int) -> None:
                torch.set_num_threads(1)
                deepspeed_backend.join_ranks(rank, "127.0.0.1", port, R2MConfig.from_dict(config))

            def run(self, function, config: dict, *args):
                return function(R2MConfig.from_dict(config), *args)

        remote = ray.remote(num_cpus=0)(Rank)
        self.actors = [remote.remote(rank, self._store.port) for rank in range(num_ranks)]

    def stop(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)

    def run(self, function, config: R2MConfig, *args) -> list:
        import ray

        return ray.get([actor.run.remote(function, config.to_dict(), *args) for actor in self.actors], timeout=120)

    def learn(self, config: R2MConfig, batches: dict[int, tuple]) -> Outcome:
        """Rank 0's outcome with the refreshed states of both."""
        first, second = self.run(learn_on_rank, config, batches)
        assert second.weights is None and second.error == first.error
        assert second.metrics == first.metrics, "the ranks report the same numbers"
        assert not first.refreshed.keys() & second.refreshed.keys(), "a group has one rank"
        return dataclasses.replace(first, refreshed=first.refreshed | second.refreshed)


def learn_on_rank(config: R2MConfig, batches: dict[int, tuple]) -> Outcome:
    return learn(rank_learner(config), batches)


@pytest.fixture(scope="module")
def ranks(ray_session) -> Ranks:
    ranks = Ranks()
    yield ranks
    ranks.stop()


def assert_close(ours: Outcome, theirs: Outcome, tolerance: float = 1e-5) -> None:
    """Absolutely for what is of order one; relatively for what is larger, such as norms."""
    assert ours.weights.keys() == theirs.weights.keys()
    for name, tensor in theirs.weights.items():
        assert (ours.weights[name] - tensor).abs().max() < tolerance, name
    assert len(ours.metrics) == len(theirs.metrics)
    for step, (own, their) in enumerate(zip(ours.metrics, theirs.metrics, strict=True)):
        assert own.keys() == their.keys()
        for name, value in their.items():
            assert own[name] == pytest.approx(value, abs=tolerance, rel=tolerance), (step, name)
    assert (ours.critic or {}).keys() == (theirs.critic or {}).keys()
    for name, tensor in (theirs.critic or {}).items():
        assert (ours.critic[name] - tensor).abs().max() < tolerance, name
    assert ours.refreshed.keys() == theirs.refreshed.keys()
    for group_id, states in theirs.refreshed.items():
        for own, their in zip(ours.refreshed[group_id], states, strict=True):
            assert own.shape == their.shape
            assert (own - their).abs().max() < 10 * tolerance


def moved(outcome: Outcome, config: R2MConfig) -> float:
    start = named_weights(load_policy(config.model.policy, config), 0).tensors
    return max(float((outcome.weights[name] - tensor).abs().max()) for name, tensor in start.items())


# The same numbers as one process


@pytest.mark.parametrize("stage", STAGES)
def test_ten_steps_on_two_ranks_are_the_torch_learners_to_1e_5(config, ranks, stage):
    config = sharded(config, stage)
    if stage % 2:  # normalised over the batch, a value for each token, its KL in the reward
        config = config.advantage(name="reinforce_pp").objective(ratio="token")
    theirs = with_torch(config, steps())
    assert moved(theirs, config) > 1e-3
    assert_close(ranks.learn(config, steps()), theirs)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.cross), 3])
def test_neither_microbatches_nor_idle_ranks_change_the_numbers(config, ranks, stage):
    """With a group a minibatch one of two ranks has nothing to do, ever."""
    config = sharded(config, stage).objective(num_minibatches=4)
    theirs = with_torch(config.learner(tokens_per_microbatch=10_000), steps(4))
    for tokens in (1, 10_000):
        assert_close(ranks.learn(config.learner(tokens_per_microbatch=tokens), steps(4)), theirs)


@pytest.fixture
def ppo(config) -> R2MConfig:
    """With a critic whose every step moves it, several minibatches and the clip."""
    return config.advantage(name="gae").objective(ratio="token").critic(lr=1e-4, clip=1e-3)


@pytest.mark.parametrize(("stage", "every"), [(2, 1), (3, None)])
def test_entropy_an_adapted_coefficient_and_a_moving_reference_are_the_torch_learners_too(config, ranks, stage, every):
    config = config.objective(loss="cispo", ratio="token", entropy_coef=0.1, kl_target=0.01, kl_gain=1.0)
    config = sharded(config, stage).model(reference_every=every, reference_mix=0.5 if every else 1.0)
    assert_close(ranks.learn(config, steps(4)), with_torch(config, steps(4)))


@pytest.mark.parametrize("stage", OUTER_STAGES)
def test_ppo_on_two_ranks_and_its_critic_are_the_torch_learners_to_1e_5(ppo, ranks, stage):
    config = sharded(ppo, stage, packing=stage % 2 == 1)
    theirs = with_torch(config.learner(packing=False), steps())
    start = named_weights(load_critic(config.model.policy, config), 0).tensors
    assert max((theirs.critic[name] - tensor).abs().max() for name, tensor in start.items()) > 1e-3
    assert any(metrics["critic/clip_share"] > 0 for metrics in theirs.metrics)
    assert_close(ranks.learn(config, steps()), theirs)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.cross)])
def test_with_ppo_too_neither_microbatches_nor_idle_ranks_nor_adapters_change_the_numbers(ppo, ranks, stage):
    config = sharded(ppo, stage).objective(num_minibatches=4).model(lora={"rank": 4} if stage == 3 else None)
    theirs = with_torch(config.learner(tokens_per_microbatch=10_000), steps(3))
    for tokens in (1, 10_000):
        assert_close(ranks.learn(config.learner(tokens_per_microbatch=tokens), steps(3)), theirs)


@pytest.mark.parametrize("stage", OUTER_STAGES)
def test_packed_passes_and_adapters_give_the_torch_learners_numbers_too(config, ranks, stage):
    config = sharded(config, stage, packing=stage % 2 == 1).model(lora={"rank": 4}).learner(lr=1e-3)
    theirs = with_torch(config.learner(packing=False), steps(4))
    assert moved(theirs, config) > 1e-3
    assert_close(ranks.learn(config, steps(4)), theirs)


def test_the_statistics_of_one_process_do_not_depend_on_its_microbatches(config):
    small, large = (with_torch(config.learner(tokens_per_microbatch=tokens), steps(3)) for tokens in (1, 10_000))
    assert_close(small, large)


def gradient_norms(config: R2MConfig, batches: dict[int, tuple]) -> list[float]:
    return [metrics["policy/grad_norm"] for metrics in learn_on_rank(config, batches).metrics]


def test_without_the_clip_that_hides_their_scale_gradients_are_of_the_same_size(config, ranks):
    """Adam and clipping forgive a factor; weight decay and SGD-like first steps do not, and norms least of all."""
    config = config.learner(max_grad_norm=1e9)
    theirs = [metrics["policy/grad_norm"] for metrics in with_torch(config, steps(2)).metrics]
    for stage in STAGES:
        assert ranks.run(gradient_norms, sharded(config, stage), steps(2))[0] == pytest.approx(theirs, rel=1e-5)


def test_the_learners_own_feedback_is_shared_out_and_whole(config, ranks):
    config = config.feedback(source="learner")
    with one_thread():
        _, theirs = torch_learner(config).proximal(0, batch_of(0)[0])
    ours = [one for part in ranks.run(proximal_feedback, sharded(config, 3)) for one in part]
    ours.sort(key=lambda one: one.group_id)
    assert [one.group_id for one in ours] == [one.group_id for one in theirs] == [0, 1, 2, 3]
    for own, their in zip(ours, theirs, strict=True):
        for mine, yours in zip(own.hidden_states, their.hidden_states, strict=True):
            assert (mine - yours).abs().max() < 1e-5


def proximal_feedback(config: R2MConfig):
    return rank_learner(config).proximal(0, batch_of(0)[0])[1]


# bfloat16, memory


def masters_after(config: R2MConfig, batches: dict[int, tuple]) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    learner = rank_learner(config)
    outcome = learn(learner, batches)
    masters = {
        name: safe_get_full_fp32_param(parameter) for name, parameter in learner.backend._model.named_parameters()
    }
    assert outcome.weights is None or all(
        torch.equal(outcome.weights[name], master.bfloat16()) for name, master in masters.items()
    )
    return masters


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.cross), 3])
def test_in_bfloat16_the_masters_stay_near_a_float32_run(config, ranks, stage):
    theirs = with_torch(config, steps(5)).weights
    start = named_weights(load_policy(config.model.policy, config), 0).tensors
    masters = ranks.run(masters_after, sharded(config.model(dtype="bfloat16"), stage), steps(5))[0]
    own = torch.cat([(masters[name] - start[name].bfloat16().float()).flatten() for name in start])
    their = torch.cat([(theirs[name] - start[name]).flatten() for name in start])
    assert torch.nn.functional.cosine_similarity(own, their, dim=0) > 0.99  # 0.999 as measured
    assert 0.99 < own.norm() / their.norm() < 1.01


def counted(make, config: R2MConfig) -> tuple[Outcome, int]:
    """A step, and how often its first layer computed."""
    learner, passes = make(config), []
    policy = learner.backend.policy
    model = getattr(policy, "module", policy)
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
    layer.register_forward_pre_hook(lambda *_: passes.append(1))  # computing again stops before a layer's end
    return learn(learner, steps(1)), len(passes)


def rank_counted(config: R2MConfig) -> tuple[Outcome, int]:
    return counted(rank_learner, config)


def test_checkpointed_activations_are_computed_again_to_the_same_bits(config, ranks):
    config = config.learner(tokens_per_microbatch=10_000).objective(num_minibatches=1, epochs=2)
    both = [config.learner(activation_checkpointing=on) for on in (False, True)]
    with one_thread():
        torch_results = [counted(torch_learner, one) for one in both]
    for results in (torch_results, [ranks.run(rank_counted, sharded(one, 3))[0] for one in both]):
        (plain, passes), (checkpointed, more_passes) = results
        assert (passes, more_passes) == (3, 5), "the proximal pass and two epochs, the latter again in backward"
        assert all(torch.equal(checkpointed.weights[name], tensor) for name, tensor in plain.weights.items())
        assert checkpointed.metrics == plain.metrics


# Weights, checkpoints


def published(config: R2MConfig, chunk: int) -> tuple:
    """Weights, probe and the largest share of parameters that were whole at once while a version was published."""
    deepspeed_backend.GATHERED_BYTES = chunk
    learner = rank_learner(config)
    parameters = list(learner.backend._model.parameters())
    before = sum(p.numel() for p in parameters)
    most = max(sum(p.numel() for p in parameters) for _ in learner.backend.named_parameters())
    return learner.weights()[1], before, most, sum(p.ds_numel for p in parameters)


def test_under_stage_3_weights_are_gathered_piece_by_piece_and_published_whole(config, ranks):
    config = sharded(config, 3).rollouts(engine="vllm")
    model = load_policy(config.model.policy, config)
    chunk = 4 * max(p.numel() for p in model.parameters())
    (weights, before, most, num), (nothing, *_) = ranks.run(published, config, chunk)
    assert nothing is None
    assert before == 0 and most * 4 <= chunk < 4 * num
    theirs = named_weights(model, 0, probe=True)
    assert weights.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in theirs.tensors.items())
    assert weights.probe.digests == theirs.probe.digests
    assert torch.equal(weights.probe.token_ids, theirs.probe.token_ids)
    assert (weights.probe.logprobs - theirs.probe.logprobs).abs().max() < 1e-5


def staged(config: R2MConfig):
    learner = rank_learner(config)
    weights = learner.weights()[1]
    return weights and (weights.layout, weights.probe.digests, learner._publication._sender.staged(0))


def test_direct_transports_stage_whole_weights_on_rank_0_alone(config, ranks):
    config = sharded(config, 3).rollouts(engine="vllm").weights(transport="gloo")
    (layout, digests, tensors), nothing = ranks.run(staged, config)
    theirs = named_weights(load_policy(config.model.policy, config), 0).tensors
    assert nothing is None
    assert layout["names"] == list(theirs) and layout["shapes"] == [list(one.shape) for one in theirs.values()]
    assert digests == {name: tensor_digest(tensor) for name, tensor in theirs.items()}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in theirs.items())


def interrupted(config: R2MConfig, directory: str) -> tuple:
    """Four steps at once, and two with two more after a restart; both outcomes and the random numbers that follow."""
    whole = learn(rank_learner(config), steps(4))
    first = rank_learner(config)
    learn(first, steps(2))
    _, state = first.state(directory)
    expected = torch.rand(3)
    second = rank_learner(config)
    second.restore(state, directory)
    drawn = torch.rand(3)
    resumed = learn(second, {step: batch for step, batch in steps(4).items() if step >= 2})
    return whole, resumed, torch.equal(expected, drawn), second._version


@pytest.mark.parametrize("stage", OUTER_STAGES)
def test_a_critic_restored_from_its_checkpoint_goes_on_bit_for_bit_beside_its_policy(ppo, ranks, stage, tmp_path):
    (whole, resumed, *_), _ = both = ranks.run(interrupted, sharded(ppo, stage), str(tmp_path))
    assert [outcome[2:] for outcome in both] == [(True, 4), (True, 4)]
    for ours, theirs in ((resumed.weights, whole.weights), (resumed.critic, whole.critic)):
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert resumed.metrics == whole.metrics[2:]


@pytest.mark.parametrize(
    ("stage", "lora"),
    [
        (0, None),
        (3, {"rank": 4}),
        *(pytest.param(*cell, marks=pytest.mark.cross) for cell in [(1, None), (2, None), (3, None), (2, {"rank": 4})]),
    ],
)
def test_a_learner_restored_from_its_checkpoint_goes_on_bit_for_bit(config, ranks, stage, lora, tmp_path):
    config = sharded(config, stage).model(lora=lora)
    if stage == 0:
        config = config.model(reference_every=1, reference_mix=0.5).objective(kl_target=0.01, kl_gain=1.0)
    (whole, resumed, *_), _ = both = ranks.run(interrupted, config, str(tmp_path))
    if lora:
        saved = sum(path.stat().st_size for path in tmp_path.rglob("*model_states.pt"))
        assert saved < sum(4 * p.numel() for p in load_policy(config.model.policy, config).parameters())
    assert [outcome[2:] for outcome in both] == [(True, 4), (True, 4)]
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())
    assert resumed.metrics == whole.metrics[2:]


# What is not finite


@pytest.mark.parametrize("stage", OUTER_STAGES)
def test_a_step_that_is_not_finite_is_named_with_its_groups_before_it_moves_anything(config, ranks, stage):
    config = sharded(config, stage)
    batches = steps(2) | {2: batch_of(2, rewards_of_first=1e38)}
    ours, good = ranks.learn(config, batches), ranks.learn(config, steps(2))
    assert ours.error.startswith("step 2 (groups [8, 9, 10, 11]): the gradient norm is ")
    assert all(torch.equal(ours.weights[name], tensor) for name, tensor in good.weights.items())


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.cross), 2]
)  # stage 3 adds its norm up in float64, where this one is finite
def test_in_bfloat16_too_nothing_moves_where_a_gradient_is_not_finite(config, ranks, stage):
    config = sharded(config.model(dtype="bfloat16"), stage, on_nonfinite="skip")
    bad = {0: batch_of(0), 1: batch_of(1, rewards_of_first=1e38)}
    ours = ranks.learn(config.objective(num_minibatches=1, epochs=1), bad)
    good = ranks.learn(config.objective(num_minibatches=1, epochs=1), steps(1))
    assert [metrics["policy/skipped_updates"] for metrics in ours.metrics] == [0.0, 1.0]
    assert all(torch.equal(ours.weights[name], tensor) for name, tensor in good.weights.items())


@pytest.mark.parametrize("stage", OUTER_STAGES)
def test_a_step_that_is_not_finite_is_skipped_where_the_config_says_so(config, ranks, stage):
    config = sharded(config, stage, on_nonfinite="skip")
    batches = steps(4) | {2: batch_of(2, rewards_of_first=1e38)}
    theirs, ours = with_torch(config, batches), ranks.learn(config, batches)
    skipped = [metrics["policy/skipped_updates"] for metrics in ours.metrics]
    assert skipped == [metrics["policy/skipped_updates"] for metrics in theirs.metrics]
    assert skipped[2] > 0 and skipped[:2] == [0.0, 0.0] and skipped[3] == 0
    assert all(tensor.isfinite().all() for tensor in ours.weights.values())
    for name, tensor in theirs.weights.items():
        assert (ours.weights[name] - tensor).abs().max() < 1e-5, name


@pytest.mark.parametrize(
    ("stage", "dtype"), [*((stage, "float32") for stage in STAGES), (1, "bfloat16"), (3, "bfloat16")]
)
def test_weights_that_an_update_made_infinite_end_the_run_on_every_rank(config, ranks, stage, dtype):
    """By a decay that overflows; skipping could not undo it."""
    config = sharded(config.model(dtype=dtype), stage, on_nonfinite="skip").learner(
        lr=1e30, weight_decay=1e37, warmup=0
    )
    ours = ranks.learn(config, steps(1))
    assert ours.error.startswith(
        "step 0 (groups [0, 1, 2, 3]): the policy's weights are not finite after an update whose gradient"
    )


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.cross), 3])
def test_a_step_with_a_reward_that_is_not_finite_is_left_out_on_every_rank(config, ranks, stage):
    config = sharded(config, stage, on_nonfinite="skip")
    batches = steps(3) | {1: batch_of(1, rewards_of_first=float("nan"))}
    theirs, ours = with_torch(config, batches), ranks.learn(config, batches)
    assert [metrics["policy/skipped_updates"] for metrics in ours.metrics] == [0.0, 4.0, 0.0]
    for name, tensor in theirs.weights.items():
        assert (ours.weights[name] - tensor).abs().max() < 1e-5, name
    ours = ranks.learn(sharded(config, stage, on_nonfinite="stop"), batches)
    assert ours.error == "step 1, group 4, response 0: its reward is nan"


# The ring


def test_a_ring_with_two_ranks_trains_is_saved_resumed_and_ends_by_the_name_of_the_rank_that_died(
    tiny_config, tmp_path
):
    config = sharded(tiny_config, 2).rollouts(prompts_per_step=3).run(num_steps=4)
    config = config.scheduling(max_policy_age=1, max_head_age=1)
    with Ring.of(config) as ring:
        for step in range(2):
            metrics = ring.step()
            assert metrics["step"] == step + 1
            assert metrics["age/policy_max"] <= 1 and metrics["age/head"] <= 1
            assert metrics["policy/grad_norm"] > 0
        ring.save(tmp_path / "checkpoint")
        os.kill(ring.process_ids()["policy-learner"][1], signal.SIGKILL)
        with pytest.raises(StageLost, match="policy-learner-1 was lost"):
            while True:
                ring.step()
    with Ring.of(config, resume=tmp_path / "checkpoint") as ring:
        assert [ring.step()["step"] for _ in range(2)] == [3, 4]
        ring.drain()
        assert ring.controller.schedule.head_ledger.trained == 12, "the counts of a resumed run go on"


def test_a_ring_with_a_critic_on_two_ranks_is_resumed_on_one(tiny_config, tmp_path):
    config = sharded(tiny_config, 2).run(num_steps=4).rollouts(prompts_per_step=3)
    config = config.advantage(name="gae").objective(ratio="token", epochs=1).critic(lr=1e-3)
    with Ring.of(config) as ring:
        for _ in range(2):
            assert ring.step()["critic/grad_norm"] > 0
        ring.save(tmp_path / "checkpoint")
        expected = ring.step()
    with Ring.of(config.learner(num_ranks=1), resume=tmp_path / "checkpoint") as ring:
        resumed = ring.step()
    assert resumed["step"] == 3
    for name in ("critic/value_mean", "critic/explained_variance", "critic/loss"):
        assert resumed[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-2), name


def test_with_stage_3_and_adapters_an_older_policy_samples_and_nothing_runs_beside_the_gathering(tiny_config):
    config = sharded(tiny_config, 3).model(lora={"rank": 4}).scheduling(max_policy_age=1, max_head_age=1)
    with Ring.of(config.run(num_steps=5)) as ring:
        steps = [ring.step() for _ in range(5)]
        ring.drain()
        trace = ring.controller.metrics.trace
    assert max(metrics["age/policy_max"] for metrics in steps) <= 1
    at_work = sorted((one.start, one.end) for one in trace if one.stage == "policy-learner")
    assert sum(one.method == "weights" for one in trace) == 6
    assert all(end <= start + 1e-6 for (_, end), (start, _) in zip(at_work, at_work[1:], strict=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"lora": {"targets": ["nope"]}}}, r"^model.lora.targets is \('nope',\): Target modules"),
        ({"learner": {"zero_options": {"overlapcomm": True}}}, "^learner.zero_options is .*overlapcomm"),
    ],
)
def test_a_mistake_that_only_the_learners_process_can_see_is_told_as_one(tiny_config, changes, message):
    config = sharded(tiny_config, 1)
    for section, keys in changes.items():
        config = getattr(config, section)(**keys)
    with pytest.raises(ConfigError, match=message):
        Ring.of(config)


@pytest.mark.parametrize(("key", "own"), [("stage", "zero_stage"), ("offload_param", "offload")])
def test_what_has_a_key_of_its_own_is_refused_among_deepspeeds(tiny_config, key, own):
    with pytest.raises(ConfigError, match=f"learner.zero_options has '{key}', and learner.{own} is"):
        tiny_config.learner(backend="deepspeed", zero_stage=1, zero_options={key: 0})


def test_a_ring_on_deepspeed_needs_processes(tiny_config):
    with pytest.raises(ConfigError, match="learner.backend is 'deepspeed' and all stages run in one process"):
        Ring.of(sharded(tiny_config, 1), in_process=True)
