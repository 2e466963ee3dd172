"""The critic: which states its values are of, what it learns, how it starts, is checkpointed, refused and reported."""

import pytest
import torch
from groups import groups_of, trajectories, trajectory
from rings import CONFIGS, reduced
from tiny import WORDS, save_tiny_model

from learners.critic import Critic
from learners.policy_learner import PolicyLearner
from learners.torch_backend import TorchBackend
from r2m_async import reference
from r2m_async.advantages import get_advantage
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, FunctionFailed, NonFiniteStep
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import resolve
from r2m_async.models.adapters import TrainedPart
from r2m_async.models.critic import load_critic, proximal_values, response_values
from r2m_async.models.loading import load_policy
from r2m_async.models.policy import response_mask
from r2m_async.models.reward import save_classifier, two_layer_head
from r2m_async.models.weights import load_weights, named_weights

pytestmark = pytest.mark.models

FAMILIES = ["llama", "qwen2", "gpt_neox"]
SIZES = [[(3, 4), (3, 2), (3, 5)], [(2, 5), (2, 1)], [(4, 3), (4, 6), (4, 6)]]


@pytest.fixture
def config(tiny_config) -> R2MConfig:
    config = tiny_config.advantage(name="gae").objective(ratio="token", epochs=1).critic(lr=1e-3)
    return config.rollouts(prompts_per_step=3)


def loud_critic(path: str, config: R2MConfig):
    """With a head that is not zero."""
    critic = load_critic(path, config)
    with torch.no_grad():
        critic.classifier.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    return critic


def learner_of(config: R2MConfig) -> PolicyLearner:
    model, reference_model = (load_policy(config.model.policy, config) for _ in range(2))
    critic = Critic(TorchBackend(load_critic(config.model.policy, config), None, config), config)
    backend = TorchBackend(model, None if config.model.lora else reference_model, config)
    return PolicyLearner(backend, get_advantage("gae"), config, critic)


def learn(learner: PolicyLearner, steps: range, sizes=SIZES) -> list[dict[str, float]]:
    told = []
    for step in steps:
        groups, rewards = groups_of(sizes)
        learner.proximal(step, groups)
        told.append(learner.train(step, rewards)[0].metrics)
    return told


def critic_weights(learner: PolicyLearner) -> dict[str, torch.Tensor]:
    return named_weights(learner.critic.backend.policy, 0).tensors


# Values


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokens_value_is_of_the_prefix_before_it_and_no_other_trajectorys(tiny, tiny_config, family, packed):
    """The bits up to the changed token's own value stay, all values after it change."""
    critic, batch, changed_at = loud_critic(tiny(family, False), tiny_config), trajectories([(3, 5), (2, 6), (4, 5)]), 2
    tokens = batch[1].token_ids.clone()
    tokens[batch[1].prompt_len + changed_at] += 1
    changed = [batch[0], trajectory(2, 6, 1), batch[2]]
    changed[1].token_ids.copy_(tokens)
    with torch.no_grad():
        before, after = (response_values(critic, one, packed) for one in (batch, changed))
    same = before == after
    assert same[1].tolist() == [True] * (changed_at + 1) + [False] * (5 - changed_at)
    assert same[0].all() and same[2].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_is_the_heads_of_the_decoders_state_at_the_token_before(tiny, tiny_config, family):
    from transformers import AutoModelForCausalLM

    critic = loud_critic(tiny(family, False), tiny_config)
    states = AutoModelForCausalLM.from_pretrained(tiny(family, False)).eval().base_model
    for packed in (False, True):
        with torch.no_grad():
            values = response_values(critic, trajectories(), packed)
        assert values.shape == (5, 7) and not values[~response_mask(trajectories())].any()
        for row, one in zip(values, trajectories(), strict=True):
            with torch.no_grad():
                state_SD = states(input_ids=one.token_ids[None]).last_hidden_state[0]
            for token in range(one.num_response_tokens):
                expected = critic.classifier.score.weight[0] @ state_SD[one.prompt_len + token - 1]
                assert row[token] == pytest.approx(expected.item(), abs=1e-4)


def test_microbatches_do_not_change_values(tiny, tiny_config):
    critic = loud_critic(tiny("qwen2", False), tiny_config)
    whole = proximal_values(critic, trajectories(), tiny_config)
    for learner in ({"tokens_per_microbatch": 10}, {"tokens_per_microbatch": 10, "packing": True}):
        parts = proximal_values(critic, trajectories(), tiny_config.learner(**learner))
        assert parts.shape == whole.shape and (parts - whole).abs().max() < 1e-5


# Where it starts


def test_from_a_policy_all_values_are_zero_and_the_decoder_is_the_policys(tiny, tiny_config):
    critic, policy = load_critic(tiny("qwen2", False), tiny_config), load_policy(tiny("qwen2", False), tiny_config)
    assert not proximal_values(critic, trajectories(), tiny_config).any()
    for name, parameter in policy.base_model.named_parameters():
        assert torch.equal(critic.classifier.base_model.get_parameter(name), parameter)


def test_a_head_of_one_label_is_kept_and_one_of_several_is_not(tiny, tiny_config, tmp_path):
    from transformers import AutoModelForSequenceClassification

    rewards = AutoModelForSequenceClassification.from_pretrained(tiny("llama", True))
    assert torch.equal(load_critic(tiny("llama", True), tiny_config).classifier.score.weight, rewards.score.weight)
    AutoModelForSequenceClassification.from_pretrained(
        tiny("llama", True), num_labels=3, ignore_mismatched_sizes=True
    ).save_pretrained(tmp_path)
    assert not load_critic(str(tmp_path), tiny_config).classifier.score.weight.any()


def test_under_lora_the_critics_adapters_and_head_train_and_its_decoder_stays(config):
    config = config.model(lora={"rank": 4})
    learner = learner_of(config)
    before = critic_weights(learner)
    learn(learner, range(3))
    after = critic_weights(learner)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name, _ in TrainedPart(learner.critic.backend.policy).named_parameters()}
    assert moved == trained and {name.split(".")[-3] for name in moved} == {"lora_A", "lora_B", "classifier"}


# What it learns


def test_of_the_same_returns_it_explains_more_and_more(config):
    """The policy stays, so that returns do: the rewards of a fixed batch, without a KL."""
    config = config.learner(lr=0.0).critic(lr=3e-3, clip=None).objective(kl_coef=0.0)
    config = config.advantage(name="gae", options={"lam": 1.0})
    told = learn(learner_of(config.run(num_steps=60)), range(60))
    explained = [metrics["critic/explained_variance"] for metrics in told]
    assert explained[0] == 0 and explained[-1] > 0.9
    assert told[-1]["critic/loss"] < 0.1 * told[0]["critic/loss"]


def test_metrics_are_what_the_hand_computes(config):
    """At lambda 1 without a KL every return is the response's reward; the first critic's values are 0."""
    config = config.objective(kl_coef=0.0).advantage(name="gae", options={"lam": 1.0})
    groups, rewards = groups_of(SIZES)
    returns = torch.cat(
        [
            one.rewards[index].repeat(t.num_response_tokens)
            for group, one in zip(groups, rewards, strict=True)
            for index, t in enumerate(group.trajectories)
        ]
    )
    (told,) = learn(learner_of(config), range(1))
    assert told["critic/loss"] == pytest.approx(0.5 * returns.square().mean().item(), rel=1e-5)
    assert (told["critic/value_mean"], told["critic/explained_variance"], told["critic/clip_share"]) == (0, 0, 0)
    assert told["critic/grad_norm"] > 0 and told["critic/lr"] == 1e-3 and told["critic/skipped_updates"] == 0


def test_in_later_epochs_values_beyond_the_clip_get_no_push(config):
    """After one epoch at such a rate every value is further from 0 than the clip, towards its return or past it."""
    config = config.objective(epochs=2, kl_coef=0.0)
    clipped, free = (
        learn(learner_of(config.critic(lr=1e-2, clip=clip)), range(1))[0]["critic/clip_share"] for clip in (1e-6, None)
    )
    assert 0.1 < clipped <= 0.5 and free == 0


def without_amplification(learner: PolicyLearner) -> PolicyLearner:
    """Its AdamW divides by |gradient| + 1e-4: what rounds in a gradient near 0 becomes no whole step."""
    for backend in (learner.backend, learner.critic.backend):
        for group in backend._optimizer.param_groups:
            group["eps"] = 1e-4
    return learner


@pytest.mark.parametrize("learner", [{"tokens_per_microbatch": 1}, {"tokens_per_microbatch": 20, "packing": True}])
def test_neither_microbatches_nor_packing_change_what_it_learns(config, learner):
    config = config.objective(num_minibatches=2, epochs=2).learner(max_grad_norm=1e9).critic(lr=1e-4)
    whole, parts = (without_amplification(learner_of(one)) for one in (config, config.learner(**learner)))
    start = {name: tensor.clone() for name, tensor in critic_weights(whole).items()}
    told, told_of_parts = learn(whole, range(3)), learn(parts, range(3))
    for ours, theirs in zip(told_of_parts, told, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert max((tensor - start[name]).abs().max() for name, tensor in critic_weights(whole).items()) > 1e-3
    for name, tensor in critic_weights(whole).items():
        assert (critic_weights(parts)[name] - tensor).abs().max() < 2e-5, name


def test_checkpointed_activations_are_computed_again_to_the_same_bits(config):
    plain, checkpointed = (learner_of(config.learner(activation_checkpointing=on)) for on in (False, True))
    passes = []
    layer = next(m for name, m in checkpointed.critic.backend.policy.named_modules() if name.endswith("layers.0.mlp"))
    layer.register_forward_pre_hook(lambda *_: passes.append(1))
    assert learn(plain, range(1)) == learn(checkpointed, range(1))
    assert len(passes) == 3, "the proximal pass and one epoch, the latter again in backward"
    for name, tensor in critic_weights(plain).items():
        assert torch.equal(critic_weights(checkpointed)[name], tensor), name


def test_its_learning_rate_has_the_shape_of_the_policys(config):
    config = config.run(num_steps=4).learner(warmup=1, schedule="linear").critic(lr=4e-3)
    told = learn(learner_of(config), range(4))
    assert [metrics["critic/lr"] for metrics in told] == pytest.approx([2e-3, 4e-3, 8e-3 / 3, 4e-3 / 3])
    for metrics in told:
        assert metrics["critic/lr"] / 4e-3 == pytest.approx(metrics["policy/lr"] / config.learner.lr)


# In the ring


def run_ring(config: R2MConfig, **how):
    with Ring.of(config, in_process=True, **how) as ring:
        steps = []
        while not ring.finished:
            steps.append(ring.step())
        ring.drain()
        return steps, ring.learner_state("policy")


def test_the_critic_moves_and_with_it_what_the_policy_learns(config):
    steps, state = run_ring(config.run(num_steps=4))
    assert all(metrics["critic/grad_norm"] > 0 for metrics in steps)
    assert steps[0]["critic/value_mean"] == 0 != steps[-1]["critic/value_mean"]
    start = named_weights(load_critic(config.model.policy, config), 0).tensors
    moved = [
        name for name, tensor in start.items() if not torch.equal(tensor, state["critic"]["weights"].tensors[name])
    ]
    assert len(moved) == len(start)
    _, of_zeros = run_ring(config.run(num_steps=4).critic(lr=0.0))
    assert any(
        not torch.equal(tensor, of_zeros["weights"].tensors[name]) for name, tensor in state["weights"].tensors.items()
    )


def test_the_quickstart_of_ppo_runs_at_reduced_size(tiny, prompts_file):
    path = CONFIGS / "quickstart_ppo.yaml"
    steps, _ = run_ring(reduced(path, tiny("qwen2", False), tiny("llama", True), prompts_file, num_steps=2))
    assert all(torch.tensor(list(metrics.values())).isfinite().all() for metrics in steps)
    assert all(metrics["critic/grad_norm"] > 0 and metrics["policy/grad_norm"] > 0 for metrics in steps)
    assert all(metrics["policy/ratio_max"] > 1 for metrics in steps)  # later minibatches are off pi_old: clips can act


@pytest.mark.parametrize("ages", [(0, 0), (1, 1)])
def test_a_resumed_run_ends_with_the_same_policy_and_critic_bit_for_bit(config, tmp_path, ages):
    config = config.run(num_steps=5).objective(epochs=2, num_minibatches=2)
    config = config.scheduling(max_policy_age=ages[0], max_head_age=ages[1], lag="exact")
    with Ring.of(config, in_process=True) as ring:
        for _ in range(2):
            ring.step()
        ring.save(tmp_path / "checkpoint")
    _, state = run_ring(config, resume=tmp_path / "checkpoint")
    expected = reference.train(config)
    for ours, theirs in ((state["weights"], expected.policy), (state["critic"]["weights"], expected.critic)):
        assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in theirs.tensors.items())


@pytest.mark.parametrize(("then", "now"), [("gae", "rloo"), ("rloo", "gae")])
def test_a_checkpoint_with_a_critic_is_for_an_estimator_that_needs_one_and_the_reverse(
    tiny_config, tmp_path, then, now
):
    config = tiny_config.objective(ratio="token")
    with Ring.of(config.advantage(name=then), in_process=True) as ring:
        ring.step()
        ring.save(tmp_path / "checkpoint")
    message = rf"was saved with advantage\.name = {then}, and the config has {now}: resume with the same"
    with pytest.raises(ConfigError, match=message):
        Ring.of(config.advantage(name=now), in_process=True, resume=tmp_path / "checkpoint")


@pytest.mark.parametrize("off_policy", ["none", "full", "clamp", "mask"])
def test_off_policy_modes_train_on_old_data(config, off_policy):
    config = config.run(num_steps=4).rollouts(num_actors=2).objective(off_policy=off_policy)
    steps, _ = run_ring(config.scheduling(max_policy_age=2, max_head_age=1))
    assert max(metrics["age/policy_max"] for metrics in steps) > 0
    assert all(torch.tensor(list(metrics.values())).isfinite().all() for metrics in steps)


OWN = """
def td(inputs, *, scale=1.0):
    returns = inputs.rewards[..., None] * inputs.response_mask
    return scale * (returns - inputs.values), returns

td.needs_values = True

def bare(inputs):
    return inputs.rewards[..., None] - inputs.values

bare.needs_values = True

def per_response(inputs):
    return inputs.rewards[..., None] - inputs.values, inputs.rewards

per_response.needs_values = True
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_values.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_an_estimator_of_the_users_own_gets_values_and_says_what_the_critic_learns(config, own):
    steps, state = run_ring(config.advantage(name="own_values:td", options={"scale": 2.0}).run(num_steps=3))
    expected = reference.train(config.advantage(name="own_values:td", options={"scale": 2.0}).run(num_steps=3))
    for ours, theirs in ((state["weights"], expected.policy), (state["critic"]["weights"], expected.critic)):
        assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in theirs.tensors.items())
    assert all(metrics["critic/grad_norm"] > 0 for metrics in steps)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "bare",
            r"own_values:bare needs values, so it must return \(advantages, returns\), got torch.float32 \[3, 3, ",
        ),
        ("per_response", r"must return a tensor \[n, K, T\] = \[3, 3, \d+\] as returns, got torch.float32 \[3, 3\]"),
    ],
)
def test_what_it_returns_instead_of_both_is_refused_in_its_name(config, own, name, message):
    with pytest.raises(FunctionFailed, match=r"^step 0 \(groups \[.*" + message):
        run_ring(config.advantage(name=f"own_values:{name}"))


# What is not finite, what is refused


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_gradient_of_the_critic_that_is_not_finite_ends_the_run_or_is_skipped_as_the_policys(config, on_nonfinite):
    learner = learner_of(config.learner(on_nonfinite=on_nonfinite))
    learner.critic.backend.policy.classifier.score.weight.register_hook(lambda gradient: gradient * torch.nan)
    before = critic_weights(learner)
    if on_nonfinite == "stop":
        with pytest.raises(
            NonFiniteStep, match=r"^step 0 \(groups \[0, 1, 2\]\): the norm of the critic's gradient is nan$"
        ):
            learn(learner, range(1))
    else:
        (told,) = learn(learner, range(1))
        assert (told["critic/skipped_updates"], told["policy/skipped_updates"], told["critic/grad_norm"]) == (1, 0, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in critic_weights(learner).items())


@pytest.mark.parametrize(("key", "value"), [("model", "somewhere"), ("lr", 1e-3), ("clip", None)])
def test_keys_of_a_critic_are_refused_where_none_is_trained(tiny_config, key, value):
    message = (
        rf"^critic\.{key} is {value!r} and advantage\.name is 'rloo', which needs no values: .* leave it out, or use"
    )
    with pytest.raises(ConfigError, match=message):
        resolve(tiny_config.critic(**{key: value}))


def test_a_critic_with_another_tokenizer_or_none_is_refused(config, tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"^critic\.model is .* their tokenizers differ; name a model with the same"):
        resolve(config.critic(model=tiny("llama", True)))
    with pytest.raises(ConfigError, match=r"^critic\.model: 'nowhere' cannot be loaded"):
        resolve(config.critic(model="nowhere"))
    other = save_tiny_model(tmp_path / "other", "gpt_neox", True, [*WORDS[::-1], "many", "words", "more"], seed=9)
    smaller = save_tiny_model(tmp_path / "smaller", "gpt_neox", True, WORDS, seed=9)
    resolve(config.critic(model=smaller))
    critic = load_critic(smaller, config).classifier
    critic.resize_token_embeddings(200)
    critic.save_pretrained(smaller)
    for model in (other, smaller):
        with pytest.raises(ConfigError, match="their tokenizers differ"):
            resolve(config.critic(model=model))
    without = save_tiny_model(tmp_path / "without", "mistral", True, WORDS, seed=9)
    for path in (tmp_path / "without").glob("*token*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"^critic\.model: .* has no tokenizer that can be loaded"):
        resolve(config.critic(model=without))


def test_a_critic_with_a_head_of_two_layers_is_refused_and_not_silently_given_zeros(config, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    policy = config.model.policy
    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    model.score = two_layer_head(model.config.hidden_size, 8)
    save_classifier(model, tmp_path)
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path)
    message = r"^critic\.model is .*: its head has two layers, and a critic's is linear; name a reward model .* leave"
    with pytest.raises(ConfigError, match=message):
        load_critic(str(tmp_path), config)
    with pytest.raises(ConfigError, match=message):
        resolve(config.critic(model=str(tmp_path)))


def test_values_that_are_not_finite_are_named_and_not_the_rewards(config):
    learner = learner_of(config)
    with torch.no_grad():
        learner.critic.backend.policy.classifier.score.weight.fill_(torch.nan)
    named = r"^step 0, group 0, response 0: its value by the critic is nan, first at response token 0: "
    with pytest.raises(NonFiniteStep, match=named):
        learn(learner, range(1))


def test_a_critic_of_another_architecture_with_the_policys_tokenizer_trains(config, tmp_path):
    own = save_tiny_model(tmp_path / "critic", "gpt_neox", True, WORDS, seed=9, width=16)
    steps, state = run_ring(config.critic(model=own).run(num_steps=2))
    assert steps[0]["critic/value_mean"] != 0, "its head was kept"
    start = load_critic(own, config)
    load_weights(start, state["critic"]["weights"])  # which has its names and shapes
    with pytest.raises(ConfigError, match="is loaded as a BertForSequenceClassification"):
        run_ring(config.critic(model=encoder(tmp_path / "encoder", own)))


def encoder(directory, tokenizer: str) -> str:
    from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig

    tokens = AutoTokenizer.from_pretrained(tokenizer)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    AutoModelForMaskedLM.from_config(BertConfig(vocab_size=len(tokens), **sizes)).save_pretrained(directory)
    tokens.save_pretrained(directory)
    return str(directory)
