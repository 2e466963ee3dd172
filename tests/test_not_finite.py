"""NaN and infinity are named where they arise, by what gave them, and are never trained on, published or checkpointed."""

import copy
import dataclasses
import json
import math
import re

import pytest
import torch
from groups import groups_of
from labelled import groups_of_texts
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from actors.reward_annotator import RewardAnnotator
from actors.rollout_actor import RolloutActor
from actors.transformers_engine import TransformersEngine
from learners.critic import Critic
from learners.head_learner import HeadLearner
from learners.policy_learner import PolicyLearner
from learners.torch_backend import TorchBackend
from r2m_async import reference
from r2m_async.advantages import get_advantage
from r2m_async.config import LARGEST, R2MConfig
from r2m_async.data.seeds import sampling_seed
from r2m_async.errors import ConfigError, NonFiniteStep
from r2m_async.evaluation.text_scorer import TextScorer
from r2m_async.export import export
from r2m_async.finite import all_finite, check_weights
from r2m_async.launch.ring import Ring
from r2m_async.models.critic import load_critic
from r2m_async.models.heads import build_head, score_group
from r2m_async.models.loading import load_policy
from r2m_async.models.reward import load_reward_model, scoring_head
from r2m_async.models.weights import named_weights
from r2m_async.reward_head import noise_like
from r2m_async.reward_models.config import RewardModelConfig
from r2m_async.reward_models.ensemble import RewardEnsemble
from r2m_async.reward_models.trainer import RewardTrainer
from r2m_async.runs.checkpoints import seal
from r2m_async.trajectories import GroupRewards, LabelBatch, PolicyFeedback, Prompt, Ticket, TrajectoryGroup

pytestmark = pytest.mark.models

NAN, INF = math.nan, math.inf


def spoilt(path: str, out, value: float = NAN) -> str:
    """A copy of a model directory with one number of one parameter changed, on disk."""
    import shutil

    shutil.copytree(path, out)
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in sorted(tensors) if "layers" in name)
    tensors[name].view(-1)[3] = value
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return str(out)


def state_of(ring: Ring, stage: str) -> dict:
    return ring.learner_state(stage)


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# One pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_number_that_is_not_finite_is_found_wherever_it_lies(dtype, value):
    tensors = [torch.ones(3, 2, dtype=dtype), torch.empty(0, dtype=dtype), torch.ones(5, dtype=dtype), torch.arange(3)]
    assert all_finite(tensors) and all_finite([])
    tensors[2][4] = value
    assert not all_finite(tensors)


def test_large_numbers_whose_squares_overflow_are_finite():
    assert all_finite([torch.full((4,), 3e38), torch.full((4,), -3e38, dtype=torch.bfloat16)])


# Loading


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    ("key", "family", "classifier", "change"),
    [
        ("model.policy", "qwen2", False, {"model": "policy"}),
        ("model.reference", "qwen2", False, {"model": "reference"}),
        ("reward.model", "llama", True, {"reward": "model"}),
        ("critic.model", "qwen2", False, {"critic": "model"}),
    ],
)
def test_weights_that_are_not_finite_are_refused_as_they_are_loaded(
    tiny, tiny_config, tmp_path, key, family, classifier, change, value
):
    broken = spoilt(tiny(family, classifier), tmp_path / "broken", value)
    config = tiny_config
    if key == "critic.model":
        config = config.advantage(name="gae").objective(ratio="token")
    tree = config.to_dict()
    for section, field in change.items():
        tree[section][field] = broken
    config = R2MConfig.from_dict(tree)
    named = rf"^{re.escape(key)} is '{broken}': its parameter \S+ has 1 numbers of \d+ that are NaN or infinite; "
    for start in (lambda: Ring.of(config, in_process=True), lambda: reference.train(config)):
        with pytest.raises(ConfigError, match=named):
            start()


def test_a_reward_models_start_that_is_not_finite_is_refused(tiny, reward_model_config, tmp_path):
    broken = spoilt(tiny("llama", False), tmp_path / "broken")
    with pytest.raises(ConfigError, match=rf"^model\.start is '{broken}': its parameter classifier\."):
        trainer_of(reward_model_config.model(start=broken))


def test_whole_models_pass(tiny, tiny_config):
    check_weights(load_policy(tiny("qwen2", False), tiny_config), "model.policy", "here")


# Rewards


def ticket_of(group_id: int = 5, due_step: int = 2) -> Ticket:
    prompt = Prompt(prompt_id="p.jsonl:7", content="the river", text="the river", token_ids=(3, 5, 7))
    return Ticket(group_id=group_id, due_step=due_step, seed=0, attempt=0, prompt=prompt)


def group_of(ticket: Ticket, twin: bool = True) -> TrajectoryGroup:
    (group,), _ = groups_of([[(3, 4), (3, 2), (3, 5), (3, 3)]])
    *rest, last = group.trajectories
    return TrajectoryGroup(ticket=ticket, trajectories=tuple(rest), greedy=last if twin else None)


class Bench:
    """An annotator with what it is given for one group of three and its greedy twin."""

    def __init__(self, config: R2MConfig) -> None:
        self.config = config
        self.model = load_reward_model(config.reward.model, config)
        self.tokenizer = AutoTokenizer.from_pretrained(config.reward.model)
        self.head = build_head(scoring_head(self.model), 48, 32, config)
        self.annotator = RewardAnnotator(self.model, self.tokenizer, copy.deepcopy(self.head), config)
        self.group = group_of(ticket_of())
        _, self.embeddings = self.annotator.embed(self.group)
        states = [torch.randn(len(one.token_ids) - 1, 32) for one in (*self.group.trajectories, self.group.greedy)]
        self.feedback = PolicyFeedback(group_id=5, hidden_states=tuple(states[:3]), greedy=states[3], policy_version=1)

    def spoil(self, what: str) -> None:
        with torch.no_grad():
            if what == "rte":
                self.embeddings.rte[1, 3] = NAN
            elif what == "greedy rte":
                self.embeddings.greedy_rte[3] = INF
            elif what == "states":
                self.feedback.hidden_states[1][0, 5] = INF
            elif what == "greedy states":
                self.feedback.greedy[0, 5] = NAN
            elif what == "bonus":
                self.embeddings.bonus[1] = -INF
            elif what == "head":
                self.head.value[3, 2] = NAN
            else:
                self.head.query.mul_(1e30)
                self.head.key.mul_(1e30)

    def score(self):
        return self.annotator.score(2, named_weights(self.head, 1), [self.embeddings], [self.feedback])


SOURCES = {
    "rte": ("response 1", r"the response's embedding by reward\.model '.*' is not finite"),
    "greedy rte": ("the greedy response", r"the response's embedding by reward\.model '.*' is not finite"),
    "states": ("response 1", r"the states of the policy \(model\.policy, version 1\) on it are not finite"),
    "greedy states": ("the greedy response", r"the states of the policy \(model\.policy, version 1\) on it are not"),
    "bonus": ("response 1", r"reward\.functions and the penalties of the reward section add -inf"),
    "head": ("response 0", r"the weights of the head \(version 1\) are not finite, first value"),
    "overflow": (
        "response 0",
        r"the head \(version 1\) overflows: what it reads is finite, and so are its weights, of which",
    ),
}


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("what", SOURCES)
def test_a_reward_that_is_not_finite_is_named_with_what_made_it_so(tiny_config, what, clip):
    bench = Bench(tiny_config.reward(clip=clip))
    assert all_finite(bench.score()[1][0].rewards[None])
    bench.spoil(what)
    response, source = SOURCES[what]
    with pytest.raises(NonFiniteStep, match=f"^step 2, group 5, {response}: its reward is not finite: {source}"):
        bench.score()


@pytest.mark.parametrize("what", SOURCES)
def test_under_skip_such_a_reward_is_counted_and_stays_what_it_is(tiny_config, what):
    bench = Bench(tiny_config.learner(on_nonfinite="skip").reward(clip=2.0))
    bench.spoil(what)
    report, (rewards,) = bench.score()
    bad = ~rewards.rewards.isfinite()
    assert report.metrics["reward/nonfinite"] == int(bad.sum())
    if what.startswith("greedy"):
        assert not bad.any() and not rewards.greedy_reward.isfinite()
    else:
        assert bad.any()


def test_the_reference_names_the_same(tiny_config):
    bench = Bench(tiny_config)
    bench.spoil("states")
    with pytest.raises(NonFiniteStep) as theirs:
        score_group(bench.head, bench.embeddings, bench.feedback, 2, 1, tiny_config)
    with pytest.raises(NonFiniteStep) as ours:
        bench.score()
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("part", "said"),
    [("backbone", "the response's embedding by reward.model '"), ("head", "its reward by reward.model '")],
)
def test_a_reward_model_that_overflows_is_named_as_it_embeds(tiny_config, part, said):
    bench = Bench(tiny_config)
    with torch.no_grad():
        (bench.model.model.norm.weight if part == "backbone" else bench.model.score.weight).mul_(1e38 * 100)
    with pytest.raises(NonFiniteStep) as caught:
        bench.annotator.embed(bench.group)
    assert str(caught.value).startswith(f"step 2, group 5 (prompt 'p.jsonl:7'), response 0: {said}")


def test_a_bonus_that_overflows_by_penalties_is_named(tiny_config):
    bench = Bench(tiny_config)
    config = tiny_config.reward(length_penalty=LARGEST, missing_eos_penalty=LARGEST)
    long = dataclasses.replace(bench.group.trajectories[0], finish_reason="length")
    group = TrajectoryGroup(ticket=ticket_of(), trajectories=(long,) * 3, greedy=None)
    tokens = torch.cat([long.token_ids, torch.full((60,), 5)])
    long = dataclasses.replace(
        long,
        token_ids=tokens,
        behaviour_logprobs=torch.zeros(len(tokens)),
        policy_versions=torch.zeros(len(tokens), dtype=torch.int32),
    )
    group = TrajectoryGroup(ticket=ticket_of(), trajectories=(long,) * 3, greedy=None)
    annotator = RewardAnnotator(bench.model, bench.tokenizer, bench.head, config)
    with pytest.raises(
        NonFiniteStep, match=r"response 0: reward\.functions, reward\.length_penalty 1e\+37 and .* add -6"
    ):
        annotator.embed(group)


SOMETIMES = """
import math
asked = 0
def f(prompt, response):
    global asked
    asked += 1
    return VALUE if asked == 8 else 0.0
"""


@pytest.fixture
def sometimes(tmp_path, monkeypatch):
    """A module of the user's whose function gives such a value for the second response of the second step's first group."""
    import sys

    def write(value: str) -> None:
        (tmp_path / "sometimes.py").write_text(SOMETIMES.replace("VALUE", value))
        monkeypatch.syspath_prepend(str(tmp_path))
        forget()

    def forget() -> None:
        monkeypatch.delitem(sys.modules, "sometimes", raising=False)

    write.forget = forget
    return write


@pytest.mark.parametrize("value", ["math.nan", "-math.inf", "1e308"])
@pytest.mark.parametrize("variant", ["r2m", "iterative_head", "vanilla"])
def test_under_skip_the_step_of_such_a_reward_leaves_everything_as_it_was_and_the_run_goes_on(
    tiny_config, sometimes, value, variant
):
    sometimes(value)
    config = tiny_config.learner(on_nonfinite="skip").reward(functions=["sometimes:f"]).head(variant=variant)
    config = config.objective(epochs=2, num_minibatches=2)
    kept, metrics = [], []
    with Ring.of(config, in_process=True) as ring:
        while not ring.finished:
            metrics.append(ring.step())
            ring.drain()
            kept.append((state_of(ring, "policy"), state_of(ring, "head")))
    assert [one["policy/skipped_updates"] for one in metrics] == [0, 4, 0]
    assert [one["reward/nonfinite"] for one in metrics] == [0, 1, 0]
    assert "policy/loss" not in metrics[1]
    (policy, head), (same_policy, same_head), (next_policy, next_head) = kept
    assert same(policy["weights"].tensors, same_policy["weights"].tensors)
    assert all(same(policy["optimizer"][i], same_policy["optimizer"][i]) for i in policy["optimizer"])
    assert same(head["weights"].tensors, same_head["weights"].tensors)
    assert all(same(head["optimizer"][i], same_head["optimizer"][i]) for i in head["optimizer"])
    assert (same_policy["version"], same_head["weights"].version) == (2, 2)
    assert not same(policy["weights"].tensors, next_policy["weights"].tensors)
    assert same(head["weights"].tensors, next_head["weights"].tensors) == (variant == "vanilla")
    sometimes.forget()
    expected = reference.train(config)
    assert same(next_policy["weights"].tensors, expected.policy.tensors)
    assert same(next_head["scoring"].tensors, expected.head.tensors)


def test_under_skip_gold_that_is_not_finite_is_not_known(tiny_config, sometimes):
    sometimes("math.nan")
    with open(_path_of("sometimes"), "a") as file:
        file.write("\ndef gold(prompt, response, finished):\n    return f(prompt, response)\n")
    config = tiny_config.learner(on_nonfinite="skip").evaluation(gold="sometimes:gold", every=3, num_prompts=2)
    with Ring.of(config, in_process=True) as ring:
        steps = []
        while not ring.finished:
            steps.append(ring.step())
        evaluations = ring.drain()
    known = [value for one in steps for value in [one.get("reward/gold", NAN)]] + [one["gold"] for one in evaluations]
    assert sum(map(math.isnan, known)) == 1 and len(known) == 5
    assert all(one["policy/skipped_updates"] == 0 for one in steps)


def _path_of(module: str) -> str:
    import importlib.util

    return importlib.util.find_spec(module).origin


# The head's update


def head_learner(config: R2MConfig) -> tuple[HeadLearner, list]:
    """A learner that has taken a step, and what its next step is given."""
    bench = Bench(config)
    learner = HeadLearner(bench.head, config)
    learner.start(named_weights(bench.head, 0))
    given = []
    for group_id in (4, 5):
        states = tuple(torch.randn(6, 32) for _ in range(3))
        feedback = PolicyFeedback(group_id=group_id, hidden_states=states, greedy=None, policy_version=2)
        embeddings = dataclasses.replace(
            bench.embeddings,
            group_id=group_id,
            rte=torch.randn(3, 48),
            frozen_rewards=torch.randn(3),
        )
        annotated = GroupRewards(
            group_id=group_id,
            rewards=torch.randn(3),
            model_rewards=torch.randn(3),
            greedy_reward=None,
            head_version=0,
            omega=0.6,
        )
        given.append((embeddings, feedback, annotated))
    return learner, [list(column) for column in zip(*given, strict=True)]


UPDATES = {
    "states": (
        {},
        r"^step 2, group 5, response 1: the loss of the head's update is nan: the states of the policy \(.*2\)",
    ),
    "rte": ({}, r"^step 2, group 5, response 1: the loss of .* is nan: the response's embedding by reward\.model '"),
    "frozen": (
        {"pair_source": "frozen", "hold": "divergence"},
        r"^step 2, group 5, response 1: the loss of the .*: the reward by reward\.model '.*' is (nan|inf)",
    ),
    "lr": (
        {"lr": 1e30},
        r"^step 2, group 4, response 0: the head is not finite once it is updated with head\.lr 1e\+30: ",
    ),
    "lr 1e19": (
        {"lr": 1e19},
        r"^step 2, group 4, .* the head \(version 3\) overflows: .* the largest is 1e\+19; lower head\.lr",
    ),
    "average": ({"lr": 1e30, "hold": "average"}, r"^step 2, group 4, .* once it is updated with head\.lr 1e\+30: "),
}


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("what", UPDATES)
def test_a_head_whose_update_is_not_finite_is_named_or_stays_as_it_was(tiny_config, what, on_nonfinite):
    options, named = UPDATES[what]
    config = tiny_config.learner(on_nonfinite=on_nonfinite)
    if what not in ("lr", "lr 1e19", "average"):
        config = config.head(**options)
    learner, (embeddings, feedback, annotated) = head_learner(config)
    learner.update(1, embeddings, feedback, annotated)
    if what in ("lr", "lr 1e19", "average"):  # from here on
        state = learner.state()[1]
        learner, _ = head_learner(config.head(**options))
        learner.restore(state)
    if what == "states":
        feedback[1].hidden_states[1][2, 3] = NAN
    elif what == "rte":
        embeddings[1].rte[1, 3] = INF
    elif what == "frozen":
        embeddings[1].frozen_rewards[1] = NAN
    before = copy.deepcopy(learner.state()[1])
    if on_nonfinite == "stop":
        with pytest.raises(NonFiniteStep, match=named):
            learner.update(2, embeddings, feedback, annotated)
        return
    report, published = learner.update(2, embeddings, feedback, annotated)
    assert (report.metrics, report.version) == ({"head/skipped_updates": 1.0}, 2)
    after = learner.state()[1]
    assert same(before["weights"].tensors, after["weights"].tensors)
    assert same(before["scoring"].tensors, published.tensors)
    assert all(same(before["optimizer"][i], after["optimizer"][i]) for i in before["optimizer"])
    assert all_finite([*after["weights"].tensors.values(), *published.tensors.values()])


@pytest.mark.parametrize("lr", [1e19, 1e30])
def test_a_run_whose_head_diverges_ends_in_the_step_where_it_does_and_keeps_no_such_head(tiny_config, tmp_path, lr):
    config = tiny_config.head(lr=lr).scheduling(lag="exact", max_policy_age=1, max_head_age=1)
    diverged = pytest.raises(NonFiniteStep, match=r"^step 0, group 0, .* once it is updated with head\.lr 1e\+")
    with Ring.of(config, in_process=True) as ring, diverged:
        while not ring.finished:
            ring.step()
            ring.save(tmp_path / str(ring.controller.schedule.policy_version))
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")], "no checkpoint has it"
    with pytest.raises(NonFiniteStep, match=r"^step 0, group 0, .* once it is updated with head\.lr 1e\+"):
        reference.train(config)


def test_under_skip_a_head_that_diverges_is_left_as_it_was_in_ring_and_reference_alike(tiny_config):
    config = tiny_config.head(lr=1e30).learner(on_nonfinite="skip")
    with Ring.of(config, in_process=True) as ring:
        before = state_of(ring, "head")["weights"].tensors
        metrics = []
        while not ring.finished:
            metrics.append(ring.step())
            ring.drain()
        head, policy = state_of(ring, "head"), state_of(ring, "policy")["weights"].tensors
    assert same(before, head["weights"].tensors) and head["weights"].version == 3
    assert [one.get("head/skipped_updates") for one in metrics[1:]] == [1.0, 1.0]
    expected = reference.train(config)
    assert same(policy, expected.policy.tensors) and same(head["scoring"].tensors, expected.head.tensors)


# The policy


def poke(model, value: float = NAN) -> None:
    with torch.no_grad():
        next(iter(model.parameters())).fill_(value)


def test_a_policy_that_cannot_sample_is_named_with_its_version(tiny_config):
    model = load_policy(tiny_config.model.policy, tiny_config)
    tokenizer = AutoTokenizer.from_pretrained(tiny_config.model.policy)
    actor = RolloutActor(TransformersEngine(model, tokenizer, tiny_config, False), 0)
    weights = named_weights(model, 7)
    poke(model)
    spoilt_weights = named_weights(model, 8)
    actor.load_weights(weights, {})
    actor.generate(ticket_of())
    actor.load_weights(spoilt_weights, {})
    named = r"^step 2, group 5 \(prompt 'p\.jsonl:7'\), response 0: the policy \(version 8\) gives no finite probability at "
    with pytest.raises(NonFiniteStep, match=named + "response token 0: "):
        actor.generate(ticket_of())


@pytest.mark.parametrize(("row", "response"), [(1, "response 1"), (3, "the greedy response")])
@pytest.mark.parametrize("value", [NAN, -INF])
def test_a_group_with_a_log_probability_that_is_not_finite_is_named_whatever_engine_made_it(row, response, value):
    group = group_of(ticket_of())
    one = (*group.trajectories, group.greedy)[row]
    one.behaviour_logprobs[one.prompt_len + 1] = value
    one.policy_versions[one.prompt_len + 1] = 9

    class Engine:
        def generate(self, ticket):
            return group, None

    named = rf"^step 2, group 5 \(.*\), {response}: the policy \(version 9\) gives no finite probability at response token 1: "
    with pytest.raises(NonFiniteStep, match=named):
        RolloutActor(Engine(), 0).generate(ticket_of())


def learner_of(config: R2MConfig) -> PolicyLearner:
    models = [load_policy(config.model.policy, config) for _ in range(2)]
    critic = None
    if config.advantage.name == "gae":
        critic = Critic(TorchBackend(load_critic(config.model.policy, config), None, config), config)
    return PolicyLearner(TorchBackend(*models, config), get_advantage(config.advantage.name), config, critic)


def step_of() -> tuple:
    """Groups of two and three responses, with rewards, due in step 0."""
    return groups_of([[(3, 4), (3, 2)], [(2, 5), (2, 1)]])


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("policy", "its log-probability by the policy is nan"),
        ("reference", r"its log-probability by the reference \(model\.policy as it began\) is nan"),
        ("critic", "its value by the critic is nan"),
    ],
)
def test_a_first_pass_that_is_not_finite_names_the_model_or_leaves_the_step_out(tiny_config, which, said, on_nonfinite):
    config = tiny_config.advantage(name="gae").objective(ratio="token").learner(on_nonfinite=on_nonfinite)
    learner = learner_of(config)
    backend = learner.backend
    poke({"policy": backend.policy, "reference": backend._reference, "critic": learner.critic.backend.policy}[which])
    groups, rewards = step_of()
    if on_nonfinite == "stop":
        with pytest.raises(NonFiniteStep, match=rf"^step 0, group 0, response 0: {said}, first at response token 0"):
            learner.proximal(0, groups)
        return
    learner.proximal(0, groups)
    report, refreshed = learner.train(0, rewards)
    assert (report.version, refreshed) == (1, ())
    assert report.metrics == {"policy/skipped_updates": 2.0, "critic/skipped_updates": 2.0}


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["policy", "critic"])
def test_weights_that_an_update_made_infinite_end_the_run_before_they_are_a_version(
    tiny_config, model, dtype, on_nonfinite
):
    """By a decay that overflows: the gradient is finite, and the optimizer takes the step."""
    config = tiny_config.advantage(name="gae").objective(ratio="token", epochs=1).model(dtype=dtype)
    rates = {"policy": (1e30, 0.0), "critic": (0.0, 1e30)}[model]
    config = config.learner(lr=rates[0], weight_decay=1e37, on_nonfinite=on_nonfinite).critic(lr=rates[1])
    learner = learner_of(config)
    groups, rewards = step_of()
    learner.proximal(0, groups)
    key = {"policy": "learner.lr", "critic": "critic.lr"}[model]
    named = (
        rf"^step 0 \(groups \[0, 1\]\): the {model}'s weights are not finite after .* learning rate 1e\+30 \({key}\)"
    )
    with pytest.raises(NonFiniteStep, match=named):
        learner.train(0, rewards)
    assert learner._version == 0, "it is no version"


def test_a_version_that_a_probe_finds_not_finite_is_not_published_for_an_engine_to_be_blamed(tiny_config):
    learner = learner_of(tiny_config.rollouts(engine="vllm").weights(transport="object_store"))
    learner.weights()
    with torch.no_grad():
        for parameter in learner.backend.policy.parameters():
            parameter.mul_(1e15)
    with pytest.raises(
        NonFiniteStep, match=r"^policy version 0: its log-probabilities of the probe text are not finite"
    ):
        learner.weights()


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_learning_rate_far_too_high_ends_ring_and_reference_by_a_name(tiny_config, on_nonfinite):
    config = tiny_config.learner(lr=1e30, on_nonfinite=on_nonfinite)
    named = {
        "stop": r"^step 0 \(groups \[0, 1\]\): the gradient norm is nan",
        "skip": r"^step 1, group 2 \(.*\), response 0: the policy \(version 1\) gives no finite probability at response",
    }[on_nonfinite]
    with Ring.of(config, in_process=True) as ring, pytest.raises(NonFiniteStep, match=named):
        while not ring.finished:
            ring.step()
    with pytest.raises(NonFiniteStep, match=named):
        reference.train(config)


# Checkpoints of before


def test_a_checkpoint_whose_weights_are_not_finite_is_not_resumed_nor_exported(tiny_config, tmp_path):
    from r2m_async.codec import decode, encode

    with Ring.of(tiny_config, in_process=True) as ring:
        ring.step()
        ring.save(tmp_path / "good")
    for part in ("policy", "head"):
        bad = tmp_path / part
        bad.mkdir()
        for path in (tmp_path / "good").iterdir():
            (bad / path.name).write_bytes(path.read_bytes())
        for name in (f"{part}_learner", f"{part}_weights_1"):
            state = decode((bad / f"{name}.msgpack").read_bytes())
            weights = state["weights"] if "learner" in name else state
            first = next(iter(weights.tensors))
            weights.tensors[first] = weights.tensors[first] * NAN
            (bad / f"{name}.msgpack").write_bytes(encode(state))
        seal(bad)
        with pytest.raises(ConfigError, match=rf"^the checkpoint's {part} \(version 1\) .* NaN or infinite: "):
            Ring.of(tiny_config, in_process=True, resume=bad)
        with pytest.raises(
            ConfigError, match=rf"{part}: its {part} has weights that are NaN or infinite; export another"
        ):
            export(bad, tmp_path / "out")


# Noise (`r2m_noise`)


def test_every_evaluation_group_has_noise_of_its_own_and_training_groups_keep_theirs(tiny_config):
    from r2m_async.models.heads import _states

    config = tiny_config.head(variant="r2m_noise")
    states = tuple(torch.randn(9, 32) for _ in range(3))

    def noise(group_id: int) -> list[torch.Tensor]:
        feedback = PolicyFeedback(group_id=group_id, hidden_states=states, greedy=states[0], policy_version=0)
        sampled, greedy = _states(feedback, 2, config)
        return [*sampled, *greedy]

    for group_id in (0, 1, 12):
        first = sampling_seed(config.run.seed, group_id, 2)
        expected = [noise_like(rows, first ^ index) for index, rows in enumerate((*states, states[0]))]
        assert all(map(torch.equal, noise(group_id), expected))
    drawn = [rows for group_id in (-3, -2, -1, 0, 1) for rows in noise(group_id)]
    for index, rows in enumerate(drawn):
        assert not any(torch.equal(rows, other) for other in drawn[:index])
    assert all(map(torch.equal, noise(-2), noise(-2)))


# The config


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("objective", "clip_high", 1e300),
        ("objective", "kl_coef", 1e300),
        ("learner", "lr", 1e300),
        ("learner", "max_grad_norm", 1e38),
        ("critic", "clip", 1e300),
        ("head", "hold_weight", 1e300),
        ("reward", "length_penalty", 1e39),
        ("rollouts", "temperature", 1e300),
    ],
)
def test_numbers_beyond_float32_are_refused_by_their_key(section, key, value):
    named = rf"^{section}\.{key}: beyond the 1e\+37 that float32 can still compute with; use a smaller number; got "
    with pytest.raises(ConfigError, match=named + re.escape(str(value))):
        R2MConfig.from_dict({section: {key: value}})


DEADLINES = {
    "scheduling": ("stall_after", "overage_after"),
    "rollouts": ("hang_after", "function_timeout"),
    "weights": ("timeout",),
    "cluster": ("wait",),
    "labels": ("timeout",),
}


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, keys in DEADLINES.items() for key in keys])
@pytest.mark.parametrize("value", [0, -1, INF, NAN, 1e10])
def test_a_deadline_that_no_clock_can_wait_for_is_refused_by_its_key(section, key, value):
    """A lock fails on more than 9.2e9 seconds, and so does a collective. Infinity would be no deadline."""
    with pytest.raises(ConfigError, match=rf"^{section}\.{key}: input should be "):
        R2MConfig.from_dict({section: {key: value}})


def test_a_reward_functions_deadline_is_one_that_a_clock_can_wait_for():
    with pytest.raises(ConfigError, match=r"timeout: input should be less than or equal to"):
        R2MConfig.from_dict({"reward": {"functions": {"own": {"function": "m:f", "timeout": 1e10}}}})


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_pair_of_a_data_set_without_a_finite_log_probability_is_named(on_nonfinite, caplog):
    """Its weight would be NaN, and with it those of all other pairs."""
    learner = object.__new__(PolicyLearner)
    learner._config = R2MConfig().labels(offline="pairs.jsonl").learner(on_nonfinite=on_nonfinite)
    labels = LabelBatch(step=3, asked=(), new=(), replayed=(), offline=tuple(groups_of_texts(3, ["a", "b"], 2)))
    learner._check_offline(3, labels, torch.zeros(4))
    named = (
        "step 3: labels.offline 'pairs.jsonl', b, the other response: its log-probability by the policy less that by"
    )
    if on_nonfinite == "stop":
        with pytest.raises(NonFiniteStep, match=named):
            learner._check_offline(3, labels, torch.tensor([0.0, 0.0, 0.0, NAN]))
        return
    learner._check_offline(3, labels, torch.tensor([0.0, 0.0, 0.0, NAN]))
    assert named in caplog.text


def test_the_largest_numbers_that_are_taken_can_be_computed_with(tiny_config):
    config = tiny_config.objective(clip_high=LARGEST, off_policy_cap=LARGEST).run(num_steps=1)
    with Ring.of(config, in_process=True) as ring:
        assert math.isfinite(ring.step()["policy/loss"])


def test_a_reward_model_that_reads_one_token_is_refused():
    with pytest.raises(ConfigError, match=r"^reward\.max_tokens: input should be greater than 1; got 1$"):
        R2MConfig.from_dict({"reward": {"max_tokens": 1}})
    with pytest.raises(ConfigError, match=r"^optimizer\.lr: beyond the 1e\+37"):
        RewardModelConfig.from_dict({"optimizer": {"lr": 1e38}})


# Training and asking reward models


def trainer_of(config: RewardModelConfig) -> RewardTrainer:
    from r2m_async.reward_models.preferences import load_preference_data

    return RewardTrainer(config, load_preference_data(config), config.model.start)


def test_a_pair_whose_reward_is_not_finite_is_named_by_file_and_line(reward_model_config, pairs_file):
    trainer = trainer_of(reward_model_config)
    index = trainer.batch(0)[2]
    pair = trainer.pairs[index]
    lines = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    assert re.fullmatch(rf"{pairs_file}, line \d+", pair.place)
    line = int(pair.place.rsplit(" ", 1)[1])
    forward = trainer.model.forward

    def broken(texts, *how):
        rewards, logprobs = forward(texts, *how)
        return torch.where(torch.tensor([text is pair.rejected for text in texts]), NAN, rewards), logprobs

    trainer.model.forward = broken
    named = (
        rf"^step 1: the gradient's norm is nan at .*: the reward of the rejected response of {pair.place} is nan; lower"
    )
    with pytest.raises(NonFiniteStep, match=named):
        trainer.step()
    assert 1 <= line <= len(lines)


def test_a_reward_model_whose_weights_overflow_is_told_in_that_step(reward_model_config):
    trainer = trainer_of(reward_model_config.optimizer(lr=1e30, weight_decay=1e37, warmup=0.0))
    with pytest.raises(
        NonFiniteStep, match=r"^step 1: the weights are not finite after an update with learning rate 1e\+30"
    ):
        trainer.step()


def test_an_evaluation_that_is_not_finite_names_the_pair(reward_model_config, pairs_file):
    trainer = trainer_of(reward_model_config)
    trainer.evaluate()
    poke(trainer.model.classifier.score)
    with pytest.raises(
        NonFiniteStep, match=rf"^evaluation after step 0: the reward of the chosen response of {pairs_file}, "
    ):
        trainer.evaluate()


def test_texts_whose_reward_is_not_finite_are_named_with_the_model(tiny):
    ensemble = RewardEnsemble(tiny("llama", True))
    scorer = TextScorer(ensemble)
    texts = [("the river :", " warm", True), ("a stone :", " cold", True)]
    assert all(map(math.isfinite, scorer.rewards(texts)))
    poke(ensemble.models[0].score)
    named = rf"^{tiny('llama', True)}: its reward for the response ' warm' to 'the river :' is nan, and so are 2 of 2: "
    with pytest.raises(ConfigError, match=named):
        scorer.rewards(texts)
