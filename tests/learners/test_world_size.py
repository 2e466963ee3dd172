"""A DeepSpeed learner's checkpoint on another number of ranks, and in another ZeRO stage where that is possible."""

import dataclasses
import hashlib
import sys
from pathlib import Path

import pytest
import torch
from rings import SHARDED
from test_deepspeed_learner import (
    OUTER_STAGES,
    Outcome,
    Ranks,
    assert_close,
    config,
    learn,
    rank_learner,
    sharded,
    steps,
    with_torch,
)

from learners import deepspeed_backend
from r2m_async.codec import encode
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError
from r2m_async.launch.ring import Ring
from r2m_async.runs.checkpoints import read_checkpoint, write_parts

pytestmark = [pytest.mark.ring, pytest.mark.usefixtures("ray_session")]
__all__ = ["config"]

LAST_STEPS = {step: batch for step, batch in steps(4).items() if step >= 2}
BOTH_WAYS = [(2, 1), (1, 2)]


@pytest.fixture(scope="module")
def gangs(ray_session) -> dict[int, Ranks]:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    gangs = {num_ranks: Ranks(num_ranks) for num_ranks in (1, 2)}
    yield gangs
    for gang in gangs.values():
        gang.stop()


def save(config: R2MConfig, directory: str) -> tuple:
    """Two steps; the saved state, and the random numbers and everything in training that come after it."""
    torch.manual_seed(deepspeed_backend.dist.get_rank())
    learner = rank_learner(config)
    learn(learner, steps(2))
    _, state = learner.state(directory)
    return state, torch.rand(3), trained(learner)


def go_on(config: R2MConfig, state: dict, directory: str) -> tuple:
    """The same after a restart, with the outcome of two steps more."""
    learner = rank_learner(config)
    learner.restore(state, directory)
    return torch.rand(3), trained(learner), learn(learner, LAST_STEPS)


def learn_on(config: R2MConfig, state: dict, directory: str) -> Outcome:
    learner = rank_learner(config)
    learner.restore(state, directory)
    return learn(learner, LAST_STEPS)


def trained(learner) -> list[torch.Tensor]:
    """Every parameter's float32 master and moments, whole."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    parameters = [parameter for parameter in learner.backend._model.parameters() if parameter.requires_grad]
    if learner.backend._stage == 0:
        return [parameter.detach().clone() for parameter in parameters]
    return [
        part.clone()
        for parameter in parameters
        for part in (
            safe_get_full_fp32_param(parameter),
            *(safe_get_full_optimizer_state(parameter, name) for name in ("exp_avg", "exp_avg_sq")),
        )
    ]


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def resumed(gangs, before: R2MConfig, after: R2MConfig, directory: Path) -> Outcome:
    """Rank 0's two steps after a restart, with the refreshed states of all, if nothing got lost on the way."""
    (state, expected, saved), *_ = gangs[before.learner.num_ranks].run(save, before, str(directory))
    files = digests(directory)
    outcomes = gangs[after.learner.num_ranks].run(go_on, after, state, str(directory))
    for _, restored, _ in outcomes:
        assert all(torch.equal(own, their) for own, their in zip(restored, saved, strict=True))
    assert torch.equal(outcomes[0][0], expected), "rank 0 goes on with its random numbers"
    assert len({tuple(drawn.tolist()) for drawn, _, _ in outcomes}) == len(outcomes), "and no other draws the same"
    assert digests(directory) == files, "the checkpoint is as it was"
    refreshed = {group: states for *_, outcome in outcomes for group, states in outcome.refreshed.items()}
    return dataclasses.replace(outcomes[0][2], refreshed=refreshed)


def assert_goes_on(gangs, config: R2MConfig, before: R2MConfig, after: R2MConfig, directory: Path) -> None:
    theirs = with_torch(config, steps(4))
    assert_close(resumed(gangs, before, after, directory), dataclasses.replace(theirs, metrics=theirs.metrics[2:]))


@pytest.mark.parametrize("then, now", BOTH_WAYS)
@pytest.mark.parametrize("stage", OUTER_STAGES)
def test_on_another_number_of_ranks_training_goes_on_as_the_torch_learners_to_1e_5(
    config, gangs, stage, then, now, tmp_path
):
    config = sharded(config, stage)
    assert_goes_on(gangs, config, config.learner(num_ranks=then), config.learner(num_ranks=now), tmp_path)


@pytest.mark.parametrize("stage", OUTER_STAGES)
def test_a_critic_goes_on_with_another_number_of_ranks_too(config, gangs, stage, tmp_path):
    config = sharded(config, stage).advantage(name="gae").objective(ratio="token").critic(lr=1e-4)
    theirs = with_torch(config, steps(4))
    (state, *_), _ = gangs[2].run(save, config, str(tmp_path))
    (ours,) = gangs[1].run(learn_on, config.learner(num_ranks=1), state, str(tmp_path))
    assert_close(ours, dataclasses.replace(theirs, metrics=theirs.metrics[2:]))


@pytest.mark.parametrize("then, now", [(1, 2), (2, 1)])
@pytest.mark.parametrize("ranks_then, ranks_now", [(2, 1), pytest.param(2, 2, marks=pytest.mark.cross)])
def test_stages_1_and_2_take_over_from_each_other(config, gangs, ranks_then, ranks_now, then, now, tmp_path):
    before = sharded(config, then).learner(num_ranks=ranks_then)
    after = sharded(config, now).learner(num_ranks=ranks_now)
    assert_goes_on(gangs, config, before, after, tmp_path)


@pytest.mark.parametrize("then, now", [({}, SHARDED), (SHARDED, {"sub_group_size": 999})])
def test_the_ranks_may_share_out_otherwise_what_they_saved(config, gangs, then, now, tmp_path):
    before, after = (sharded(config, 3).learner(zero_options=options) for options in (then, now))
    assert_goes_on(gangs, config, before, after, tmp_path)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.cross), 3])
def test_adapters_go_on_with_another_number_of_ranks(config, gangs, stage, tmp_path):
    config = sharded(config, stage).model(lora={"rank": 4}).learner(lr=1e-3)
    theirs = with_torch(config, steps(4))
    (state, *_), _ = gangs[2].run(save, config, str(tmp_path))
    (ours,) = gangs[1].run(learn_on, config.learner(num_ranks=1), state, str(tmp_path))
    assert_close(ours, dataclasses.replace(theirs, metrics=theirs.metrics[2:]))


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.cross)])
@pytest.mark.parametrize("stage", OUTER_STAGES)
def test_what_the_config_says_now_counts_and_not_what_it_said_when_the_checkpoint_was_saved(
    config, gangs, stage, num_ranks, tmp_path
):
    """As on torch: rates of decay and the clip are the user's to change at a restart."""
    config = sharded(config, stage)
    changed = config.learner(num_ranks=num_ranks, weight_decay=5.0, max_grad_norm=1e-3)
    (state, *_), _ = gangs[2].run(save, config, str(tmp_path))
    ours, *_ = gangs[num_ranks].run(learn_on, changed, state, str(tmp_path))
    theirs = with_torch(config, steps(2), then=(changed, LAST_STEPS))
    for name, tensor in theirs.weights.items():
        assert (ours.weights[name] - tensor).abs().max() < 1e-5, name


def test_in_bfloat16_too_masters_and_moments_are_the_same_bits_on_another_number_of_ranks(config, gangs, tmp_path):
    config = sharded(config.model(dtype="bfloat16"), 2)
    ours = resumed(gangs, config, config.learner(num_ranks=1), tmp_path)
    theirs = gangs[2].learn(config, steps(4))
    for name, tensor in theirs.weights.items():
        assert (ours.weights[name] - tensor).abs().max() < 1e-2, name  # a few of its roundings


def go_on_without_converter(config: R2MConfig, state: dict, directory: str) -> tuple[str, bool]:
    def fail(saved: Path, universal: Path) -> None:
        universal.mkdir()
        raise OSError("no space left")

    real, deepspeed_backend._to_universal = deepspeed_backend._to_universal, fail
    learner = rank_learner(config)
    try:
        learner.restore(state, directory)
    except OSError as error:
        return str(error), learner.backend.policy.load_universal_checkpoint()
    finally:
        deepspeed_backend._to_universal = real


def test_a_conversion_that_fails_leaves_the_checkpoint_as_it_was(config, gangs, tmp_path):
    config = sharded(config, 1)
    (state, *_), _ = gangs[2].run(save, config, str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    failed = gangs[1].run(go_on_without_converter, config.learner(num_ranks=1), state, str(tmp_path))
    assert failed == [("no space left", False)]
    assert sorted(tmp_path.rglob("*")) == before


def saved_with(config: R2MConfig, directory: Path) -> Path:
    write_parts(directory, {"step": encode(1)}, config)
    return directory


@pytest.mark.parametrize("now", [{"lora": {"rank": 4, "alpha": 64}}, {"dtype": "bfloat16"}, {"policy": "another"}])
def test_another_policy_than_was_saved_is_refused(config, now, tmp_path):
    config = config.model(lora={"rank": 4, "alpha": 8})
    with pytest.raises(ConfigError, match=rf"was saved with model\.{next(iter(now))} = .*: resume with the same"):
        read_checkpoint(saved_with(config, tmp_path), config.model(**now))


@pytest.mark.parametrize("then, now", [(0, 1), (1, 0), (1, 3), (3, 1), (2, 3), (3, 0)])
def test_stages_that_cannot_take_over_are_refused(config, then, now, tmp_path):
    stages = "1 or 2" if then in (1, 2) else then
    reason = rf"learner\.zero_stage = {then}, and the config has {now}: .*; resume with {stages}"
    with pytest.raises(ConfigError, match=reason):
        read_checkpoint(saved_with(sharded(config, then), tmp_path), sharded(config, now).learner(num_ranks=1))


ROUND_ROBIN = {"round_robin_gradients": True}


@pytest.mark.parametrize("then, now", [(ROUND_ROBIN, ROUND_ROBIN), (ROUND_ROBIN, {}), ({}, ROUND_ROBIN)])
def test_what_deepspeed_would_mix_up_is_refused(config, then, now, tmp_path):
    """Its universal checkpoints name the parts of weights in another order than round robin has put them in."""
    then, now = (sharded(config, 2).learner(zero_options=options) for options in (then, now))
    directory = saved_with(then, tmp_path)
    with pytest.raises(ConfigError, match=r"learner\.zero_options.*round_robin_gradients.*resume with the same"):
        read_checkpoint(directory, now.learner(num_ranks=1))
    if then.learner == now.learner:
        assert read_checkpoint(directory, now)


def test_a_ring_is_resumed_with_more_ranks_in_another_stage(tiny_config, tmp_path):
    config = sharded(tiny_config, 1).learner(num_ranks=1).rollouts(prompts_per_step=3).run(num_steps=4)
    with Ring.of(config) as ring:
        for _ in range(2):
            ring.step()
        ring.save(tmp_path / "checkpoint")
        expected = ring.step()
    with Ring.of(config.learner(num_ranks=2, zero_stage=2), resume=tmp_path / "checkpoint") as ring:
        first, second = ring.step(), ring.step()
        assert [first["step"], second["step"]] == [3, 4]
        for name in ("policy/grad_norm", "reward/mean"):
            assert first[name] == pytest.approx(expected[name], rel=1e-4)
