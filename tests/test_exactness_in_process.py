"""The ring in one process against the reference: every claim of exactness that needs no Ray, in seconds."""

import dataclasses

import pytest
import torch
from transformers import AutoTokenizer

from actors import reward_annotator
from learners.policy_learner import PolicyLearner
from r2m_async import reference
from r2m_async.errors import ConfigError
from r2m_async.launch.ring import Ring
from r2m_async.models.reward import embed_group, load_classifier, save_classifier, two_layer_head

pytestmark = pytest.mark.models


def run_in_process(config):
    """(final policy, head and critic weights, the critic's None without one, rewards by step) of a ring without Ray."""
    with Ring.of(config, in_process=True) as ring:
        rewards = record_rewards(ring)
        while not ring.finished:
            ring.step()
        ring.drain()
        policy, head = ring.policy_weights(), ring.head_weights()
        critic = ring.learner_state("policy").get("critic")
    return policy, head, critic and critic["weights"], rewards


def test_a_ring_in_one_process_computes_with_one_thread_and_then_gives_the_others_back(tiny_config, monkeypatch):
    seen, train, before = [], PolicyLearner.train, torch.get_num_threads()

    def watched(self, *arguments):
        seen.append(torch.get_num_threads())
        return train(self, *arguments)

    monkeypatch.setattr(PolicyLearner, "train", watched)
    try:
        torch.set_num_threads(2)
        with Ring.of(tiny_config, in_process=True) as ring:
            ring.step()
        assert seen == [1] and torch.get_num_threads() == 2
        with pytest.raises(ConfigError, match="learner.backend is 'deepspeed'"):
            Ring.of(tiny_config.learner(backend="deepspeed"), in_process=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def record_rewards(ring):
    """Listens to what the annotator binds, by step."""
    annotator, rewards = ring.controller.stages.annotators[0], {}
    call = annotator.carrier.call

    async def listen(method, *args):
        result = await call(method, *args)
        if method.name == "score":
            rewards[args[0]] = [reward for group in result[1] for reward in group.rewards.tolist()]
        return result

    annotator.carrier.call = listen
    return rewards


def assert_same_bits(config):
    policy, head, critic, rewards = run_in_process(config)
    expected = reference.train(config)
    assert list(rewards.values()) == expected.rewards
    assert (critic is None) == (expected.critic is None)
    trained = [(policy, expected.policy), (head, expected.head), *([(critic, expected.critic)] if critic else [])]
    for ours, theirs in trained:
        assert ours.version == theirs.version == config.run.num_steps
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name in ours.tensors:
            assert torch.equal(ours.tensors[name], theirs.tensors[name]), name


def test_with_both_bounds_zero_the_ring_is_algorithm_1_bit_for_bit(tiny_config):
    assert_same_bits(tiny_config.run(num_steps=5))


@pytest.mark.parametrize("variant", ["vanilla", "r2m_no_train", "r2m_noise", "iterative_head", "iterative_model"])
def test_every_variant_is_the_references_bit_for_bit(tiny_config, variant):
    assert_same_bits(tiny_config.head(variant=variant))


@pytest.mark.parametrize("hold", ["divergence", "bsr", "agreement", "average"])
def test_every_way_to_hold_the_head_is_the_references_bit_for_bit_and_not_the_papers(tiny_config, hold):
    free = tiny_config.head(omega_floor=0.0, omega_horizon=1)  # the frozen model's rewards have no part in the head's
    held = free.head(hold=hold)
    assert_same_bits(held)
    theirs, ours = (reference.train(config).head.tensors for config in (free, held))
    assert any(not torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_steps_whose_groups_all_disagree_leave_the_head_as_it_is(tiny_config, monkeypatch):
    def tied_after_the_first_step(model, tokenizer, group, config, *how):
        embeddings = embed_group(model, tokenizer, group, config, *how)
        first = group.ticket.group_id < config.rollouts.prompts_per_step
        frozen = torch.zeros_like(embeddings.frozen_rewards)
        return embeddings if first else dataclasses.replace(embeddings, frozen_rewards=frozen)

    for module in (reference, reward_annotator):
        monkeypatch.setattr(module, "embed_group", tied_after_the_first_step)
    config = tiny_config.head(hold="agreement", pair_source="frozen", omega_horizon=3)
    assert_same_bits(config)
    after = [
        reference.train(config.run(num_steps=steps).head(lr=lr)).head.tensors
        for steps, lr in ((1, 1e-3), (3, 1e-3), (1, 2e-3))
    ]
    assert all(torch.equal(after[0][name], tensor) for name, tensor in after[1].items())
    assert any(not torch.equal(after[1][name], tensor) for name, tensor in after[2].items())


@pytest.mark.parametrize("pair_source", ["annotated", "frozen"])
def test_pairs_chosen_by_other_rewards_are_the_references_bit_for_bit(tiny_config, pair_source):
    assert_same_bits(tiny_config.head(pair_source=pair_source))


@pytest.mark.parametrize("variant", ["r2m", "iterative_head"])
def test_the_steering_penalty_is_the_references_bit_for_bit_and_counts(tiny_config, variant):
    config = tiny_config.head(omega_floor=0.0, omega_horizon=2, variant=variant, steering=0.3)
    assert_same_bits(config)
    assert reference.train(config.head(steering=0.0)).rewards[0] != reference.train(config).rewards[0]


def test_an_ensemble_of_heads_and_a_whole_model_with_a_twin_are_the_references_bit_for_bit(tiny_config):
    config = tiny_config.head(omega_horizon=1, omega_floor=0.0, ensemble=3, pessimism=0.7, hold="bsr")
    assert_same_bits(config)
    mean, pessimistic = (reference.train(config.head(pessimism=kappa)).rewards for kappa in (0.0, 0.7))
    assert all(
        low <= high
        for one, other in zip(pessimistic[:1], mean[:1], strict=True)
        for low, high in zip(one, other, strict=True)
    )
    assert mean[0] != pessimistic[0]
    assert_same_bits(tiny_config.head(variant="iterative_model").advantage(name="remax"))


@pytest.fixture
def labelled(tiny_config):
    """A ring whose head learns from labels: of the longer text, in some pairs of no preference."""
    head = tiny_config.head(omega_horizon=2, omega_floor=0.0)
    return head.labels(source="labelled:longer", budget=2, wait=True)


ASYNCHRONOUS = {"max_policy_age": 2, "max_head_age": 1, "lag": "exact"}


@pytest.mark.parametrize(
    ("variant", "max_age", "scheduling"),
    [("r2m", 0, {}), ("r2m", 2, {}), ("r2m", 1, ASYNCHRONOUS), ("iterative_model", 1, ASYNCHRONOUS)],
)
def test_labels_that_come_late_are_the_references_with_the_same_delay_bit_for_bit(
    labelled, variant, max_age, scheduling
):
    config = labelled.run(num_steps=4).head(variant=variant).labels(max_age=max_age).scheduling(**scheduling)
    assert_same_bits(config)
    theirs, ours = (reference.train(one).head.tensors for one in (config.labels(max_age=3 - max_age), config))
    assert any(not torch.equal(theirs[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("labels", "head"),
    [
        ({"pairs": "uncertain", "self_weight": 0.0, "replay": 3, "replay_from": 4}, {"alpha": 0.0}),
        ({"pairs": "random", "self_weight": 0.5, "noise": 0.4, "budget": 1}, {"hold": "bsr", "variant": "r2m_noise"}),
        ({"states": "refreshed", "replay": 2, "max_age": 2}, {}),
        ({"pairs": "uncertain"}, {"variant": "iterative_head", "ensemble": 2, "pessimism": 1.0}),
    ],
    ids=["uncertain and replayed", "random and noisy", "refreshed", "an ensemble"],
)
def test_every_choice_of_pairs_replays_and_noise_are_the_references_bit_for_bit(labelled, labels, head):
    config = labelled.run(num_steps=5).labels(**{"max_age": 1} | labels).head(**head)
    assert_same_bits(config)
    if "states" in labels:
        kept, refreshed = (reference.train(one).head.tensors for one in (config.labels(states="kept"), config))
        assert any(not torch.equal(kept[name], tensor) for name, tensor in refreshed.items())


@pytest.mark.parametrize("variant", ["r2m", "iterative_head"])
def test_weighted_pairs_of_a_data_set_are_the_references_bit_for_bit_with_labels_and_without(
    labelled, tiny_config, pairs_file, variant
):
    offline = {"offline": str(pairs_file), "offline_pairs": 3, "offline_temper": 0.5}
    alone = tiny_config.rollouts(max_new_tokens=12).head(variant=variant, alpha=0.0)
    config = alone.labels(**offline, self_weight=0.0).scheduling(max_policy_age=1, max_head_age=1, lag="exact")
    assert_same_bits(config)
    whole, flat = (reference.train(config.labels(offline_temper=temper)).head.tensors for temper in (0.5, 0.0))
    assert any(not torch.equal(whole[name], tensor) for name, tensor in flat.items()), "the weights count"
    both = labelled.rollouts(max_new_tokens=12).head(variant=variant).labels(**offline, max_age=1)
    assert_same_bits(both.labels(states="refreshed") if variant == "r2m" else both)


@pytest.mark.parametrize("ages", [(1, 0), (0, 2), (3, 2)])
def test_exact_lag_is_the_reference_with_the_same_delays(tiny_config, ages):
    policy_age, head_age = ages
    config = tiny_config.run(num_steps=6).rollouts(num_actors=3)
    assert_same_bits(config.scheduling(max_policy_age=policy_age, max_head_age=head_age, lag="exact"))


@pytest.mark.parametrize(
    ("estimator", "ratio"),
    [("grpo", "token"), ("remax", "sequence_mean"), ("reinforce_pp", "token"), ("reinforce_pp_baseline", "token")],
)
def test_every_estimator_is_the_references_bit_for_bit(tiny_config, estimator, ratio):
    assert_same_bits(tiny_config.advantage(name=estimator).objective(ratio=ratio, num_minibatches=2))


def test_a_probes_baseline_is_the_references_bit_for_bit_with_one_response_a_prompt_too(tiny_config):
    config = tiny_config.run(num_steps=4).advantage(name="probe", options={"decay": 0.5})
    assert_same_bits(config.scheduling(max_policy_age=1, lag="exact").feedback(source="learner"))
    assert_same_bits(config.head(variant="vanilla").rollouts(group_size=1, prompts_per_step=4))


def test_the_kl_in_rloos_reward_and_whitening_are_the_references_bit_for_bit(tiny_config):
    assert_same_bits(tiny_config.advantage(name="rloo_kl", whiten="responses").objective(num_minibatches=2))


@pytest.mark.parametrize(
    "objective",
    [
        {"loss": "cispo", "ratio": "token", "off_policy": "ignore", "entropy_coef": 0.01, "aggregation": "token_sum"},
        {"loss": "gmpo", "ratio": "gspo", "off_policy_mask": {"low": 0.99, "high": 1.01}, "kl_estimator": "k2"},
        {"loss": "sapo", "ratio": "token", "off_policy_low": 0.9, "aggregation": "sequence_sum_norm", "kl_cap": 1.0},
        {"loss": "dual_clip", "loss_options": {"c": 1.1}, "off_policy_level": "token", "entropy_coef": 0.1},
    ],
    ids=lambda objective: objective["loss"],
)
def test_every_loss_is_the_references_bit_for_bit_on_old_data(tiny_config, objective):
    assert_same_bits(tiny_config.scheduling(max_policy_age=1, lag="exact").objective(**objective))


def test_an_adapted_coefficient_and_a_moving_reference_are_the_references_bit_for_bit(tiny_config):
    config = tiny_config.run(num_steps=3).objective(kl_target=0.01, kl_gain=1.0)
    assert_same_bits(config.advantage(name="rloo_kl").model(reference_every=2))
    soft = config.model(reference_every=1, reference_mix=0.3, dtype="bfloat16")
    assert_same_bits(soft)
    ours = reference.train(soft).policy.tensors
    for other in (soft.model(reference_mix=1.0), soft.objective(kl_target=None, kl_gain=0.1)):
        theirs = reference.train(other).policy.tensors
        assert any(not torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_the_learners_feedback_costs_no_pass_but_its_twins(tiny_config, monkeypatch):
    """The proximal pass yields log-probabilities and states at once, within the token budget."""
    from learners import passes

    sizes = []
    real = passes.policy_pass
    monkeypatch.setattr(passes, "policy_pass", lambda *a: sizes.append(len(a[1])) or real(*a))
    config = tiny_config.feedback(source="learner").learner(tokens_per_microbatch=30).objective(epochs=1)
    with Ring.of(config, in_process=True) as ring:
        ring.step()
    num_passes = len(sizes) // 3  # the proximal pass, pi_ref's and one epoch's
    assert sizes == sizes[:num_passes] * 3 and sum(sizes[:num_passes]) == 6 and max(sizes) < 6


def test_feedback_from_the_learner_and_small_microbatches_are_the_references_bit_for_bit(tiny_config):
    config = tiny_config.feedback(source="learner").learner(tokens_per_microbatch=30, schedule="cosine", warmup=1)
    assert_same_bits(config.scheduling(max_policy_age=1, lag="exact"))
    assert_same_bits(config.advantage(name="remax").learner(packing=True))


@pytest.mark.parametrize("off_policy", ["none", "full", "clamp", "mask"])
def test_every_off_policy_mode_is_the_references_bit_for_bit_on_old_data_packed_too(tiny_config, off_policy):
    config = tiny_config.run(num_steps=4).scheduling(max_policy_age=2, lag="exact").learner(packing=True)
    assert_same_bits(config.objective(off_policy=off_policy, off_policy_cap=1.05, ratio="token"))


@pytest.fixture
def ppo(tiny_config):
    """With a critic that moves, its clip, and a value per token; as hard on exactness as the rest of the options."""
    config = tiny_config.advantage(name="gae", options={"lam": 0.9}).objective(
        ratio="token", num_minibatches=2, epochs=2
    )
    return config.critic(lr=1e-3, clip=0.05).learner(tokens_per_microbatch=30, weight_decay=0.1)


def test_ppo_and_its_critic_are_the_references_bit_for_bit_packed_too(ppo):
    assert_same_bits(ppo)
    assert_same_bits(ppo.learner(packing=True).feedback(source="learner").critic(clip=None))


@pytest.mark.parametrize("ages", [(1, 0), (3, 2)])
def test_with_exact_lag_ppo_and_its_critic_are_the_references_with_the_same_delays(ppo, ages):
    policy_age, head_age = ages
    config = ppo.run(num_steps=5).rollouts(num_actors=3)
    assert_same_bits(config.scheduling(max_policy_age=policy_age, max_head_age=head_age, lag="exact"))


def test_in_bfloat16_the_critic_is_the_references_bit_for_bit_too(ppo):
    assert_same_bits(ppo.model(dtype="bfloat16"))


@pytest.mark.parametrize("variant", ["r2m", "vanilla"])
def test_a_reward_model_with_a_head_of_two_layers_is_a_start_as_any_other(tiny_config, tmp_path, variant):
    model = load_classifier(tiny_config.reward.model)
    torch.manual_seed(0)
    model.score = two_layer_head(model.config.hidden_size, 24)
    save_classifier(model, tmp_path / "grm")
    AutoTokenizer.from_pretrained(tiny_config.reward.model).save_pretrained(tmp_path / "grm")
    assert_same_bits(tiny_config.reward(model=str(tmp_path / "grm")).head(variant=variant))


def test_another_seed_gives_other_weights(tiny_config):
    first, second = (reference.train(tiny_config.run(seed=seed)) for seed in (1, 2))
    assert first.tokens != second.tokens
    assert any(
        not torch.equal(first.policy.tensors[name], second.policy.tensors[name]) for name in first.policy.tensors
    )


@pytest.mark.parametrize(
    ("ages", "hold", "mix"),
    [
        *[((0, 0), "none", None), ((1, 1), "none", None), ((2, 0), "none", 1.0), ((0, 0), "average", 0.3)],
    ],
)
def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_bits(tiny_config, tmp_path, ages, hold, mix):
    policy_age, head_age = ages
    config = tiny_config.run(num_steps=5).scheduling(max_policy_age=policy_age, max_head_age=head_age, lag="exact")
    config = config.head(hold=hold)
    if mix is not None:
        config = config.model(reference_every=1, reference_mix=mix).objective(kl_target=0.01, kl_gain=1.0)
    with reference.one_thread():
        with Ring.of(config, in_process=True) as ring:
            for _ in range(2):
                ring.step()
            ring.save(tmp_path / "checkpoint")
            ring.step()
        with Ring.of(config, in_process=True, resume=tmp_path / "checkpoint") as ring:
            assert ring.step()["step"] == 3
            while not ring.finished:
                ring.step()
            policy = ring.policy_weights()
    expected = reference.train(config).policy
    assert all(torch.equal(policy.tensors[name], tensor) for name, tensor in expected.tensors.items())
