"""The options of a run, each in a real ring without Ray or on the stage that carries it out."""

import dataclasses
import json
import math
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from groups import SIZES, groups_of, learned
from transformers import AutoTokenizer

from actors.reward_annotator import RewardAnnotator
from actors.rollout_actor import RolloutActor
from actors.transformers_engine import TransformersEngine
from r2m_async import reference
from r2m_async.config import R2MConfig
from r2m_async.errors import ConfigError, DataError, FunctionFailed, GenerationFailed, NonFiniteStep
from r2m_async.launch.ring import Ring
from r2m_async.launch.workload import resolve
from r2m_async.models.heads import build_head, score_group
from r2m_async.models.loading import load_policy
from r2m_async.models.reward import embed_group, load_reward_model, scoring_head
from r2m_async.trajectories import Prompt, RewardEmbeddings, Ticket, Trajectory, TrajectoryGroup, Weights

pytestmark = pytest.mark.models

OWN_MODULE = """
def centred(inputs, *, scale=1.0):
    return scale * (inputs.rewards - inputs.rewards.mean(1, keepdim=True))

def every_token(inputs):
    return centred(inputs)[..., None] * inputs.response_mask

def above_greedy(inputs):
    return inputs.rewards - inputs.greedy_rewards[:, None]

above_greedy.needs_greedy = True

def first_group_only(inputs):
    return inputs.rewards[:1]

def num_words(prompt, response):
    return len(response.split())

def says_river(prompt, response):
    return 10.0 * ("river" in prompt)

def absurd(prompt, response):
    return 1e36 * (sum(map(ord, response)) % 97)

def gold(prompt, response, finished):
    return 1000.0 + len(response) + 0.5 * finished
"""


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch) -> None:
    """A module `own_functions` of the user's, on the search path."""
    (tmp_path / "own_functions.py").write_text(OWN_MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_functions", raising=False)


def run_ring(config: R2MConfig):
    """(final policy, final head, metrics of every step, evaluations, the ring's schedule)."""
    with Ring.of(config, in_process=True) as ring:
        steps = []
        while not ring.finished:
            steps.append(ring.step())
        evaluations = list(ring.drain())
        schedule, queue = ring.controller.schedule, ring.controller.stages.queue.carrier
        policy, head = (ring.learner_state(name)["weights"] for name in ("policy", "head"))
        assert queue.stage.free(()) == (0,), "a group was left in the queue"
    return policy, head, steps, evaluations, schedule


def same_bits(ours, theirs) -> bool:
    return all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)


# Estimators of the user's own


def test_an_estimator_named_module_attr_gets_its_options_and_trains_as_in_the_reference(tiny_config):
    config = tiny_config.advantage(name="own_functions:centred", options={"scale": 1.5})
    policy, head, *_ = run_ring(config)
    expected = reference.train(config)
    assert same_bits(policy, expected.policy)
    assert same_bits(head, expected.head)
    assert_same_gradients(config, tiny_config)  # K / (K - 1) = 1.5 times the centred reward is RLOO


def test_an_estimator_per_token_trains_with_the_token_ratio(tiny_config):
    config = tiny_config.objective(ratio="token").run(num_steps=2)
    per_token = config.advantage(name="own_functions:every_token")
    policy, *_ = run_ring(per_token)
    assert same_bits(policy, reference.train(per_token).policy)
    assert_same_gradients(per_token, config.advantage(name="own_functions:centred"))


def assert_same_gradients(config, other):
    """Of a batch's first update. After it AdamW would have made whole steps of what rounds in gradients near 0."""
    groups = groups_of([SIZES[:3], SIZES[2:]])
    ours, theirs = (learned(one.objective(epochs=1, num_minibatches=1), *groups)[0] for one in (config, other))
    scale = max(gradient.abs().max() for gradient in theirs.values())
    assert ours.keys() == theirs.keys() and scale > 0.01
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() < 1e-5 * scale, name


def test_an_estimator_that_asks_for_a_greedy_twin_gets_one(tiny_config):
    own, *_ = run_ring(tiny_config.advantage(name="own_functions:above_greedy"))
    remax, *_ = run_ring(tiny_config.advantage(name="remax"))
    assert same_bits(own, remax)


def test_an_estimator_that_returns_a_wrong_shape_ends_the_run_with_the_shapes_it_may_have(tiny_config):
    config = tiny_config.advantage(name="own_functions:first_group_only")
    with Ring.of(config, in_process=True) as ring, pytest.raises(FunctionFailed) as error:
        ring.step()
    assert "own_functions:first_group_only must return a tensor [n, K] = [2, 3] or [n, K, T] = [2, 3, " in str(
        error.value
    )
    assert str(error.value).startswith("step 0 (groups [0, 1]): advantage own_functions:first_group_only must")
    assert str(error.value).endswith("got torch.float32 [1, 3]")


def test_an_estimator_that_is_not_there_or_takes_no_such_option_is_refused_before_anything_is_built(tiny_config):
    with pytest.raises(ConfigError, match=r"no callable 'centered'; did you mean 'centred'\?"):
        resolve(tiny_config.advantage(name="own_functions:centered"))
    with pytest.raises(ConfigError, match=r"advantage\.options\.scales is unknown .* did you mean 'scale'\?"):
        resolve(tiny_config.advantage(name="own_functions:centred", options={"scales": 2}))


# Rewards


PROMPT_IDS = (3, 5, 7)


def group_of(*endings: tuple[str, int, str], twin: tuple[str, int, str] | None = None) -> TrajectoryGroup:
    """A group of (text, response tokens, finish reason)."""

    def trajectory(text: str, length: int, finish_reason: str) -> Trajectory:
        tokens = torch.arange(3, 3 + len(PROMPT_IDS) + length)
        return Trajectory(
            token_ids=tokens,
            prompt_len=len(PROMPT_IDS),
            behaviour_logprobs=torch.zeros(len(tokens)),
            policy_versions=torch.zeros(len(tokens), dtype=torch.int32),
            finish_reason=finish_reason,
            text=text,
        )

    prompt = Prompt(prompt_id="p", content="the river", text="the river", token_ids=PROMPT_IDS)
    ticket = Ticket(group_id=4, due_step=0, seed=0, attempt=0, prompt=prompt)
    greedy = None if twin is None else trajectory(*twin)
    return TrajectoryGroup(ticket=ticket, trajectories=tuple(trajectory(*one) for one in endings), greedy=greedy)


GROUP = group_of(
    (" warm wind .", 4, "stop"), (" cold", 6, "length"), (" or not one", 3, "stop"), twin=(" softly moves", 2, "length")
)


def rewards_of(config: R2MConfig, group: TrajectoryGroup = GROUP):
    """What embedding and scoring make of the group, with the reward model's own head."""
    config = config.head(variant="vanilla")
    model = load_reward_model(config.reward.model, config)
    head = build_head(scoring_head(model), 48, 32, config)
    embeddings = embed_group(model, AutoTokenizer.from_pretrained(config.reward.model), group, config)
    return score_group(head, embeddings, None, 0, 0, config)


def test_without_options_a_reward_is_the_models(tiny_config):
    rewards = rewards_of(tiny_config)
    assert torch.equal(rewards.rewards, rewards.model_rewards)
    assert len(set(rewards.model_rewards.tolist())) == 3


def test_reward_functions_and_penalties_add_what_the_hand_computes(tiny_config):
    plain = rewards_of(tiny_config)
    options = {
        "functions": ["own_functions:num_words", "own_functions:says_river"],
        "length_penalty": 0.25,
        "missing_eos_penalty": 4.0,
    }
    rewards = rewards_of(tiny_config.reward(**options))
    assert torch.equal(rewards.model_rewards, plain.model_rewards)
    added = torch.tensor([3 + 10 - 1.0, 1 + 10 - 1.5 - 4, 3 + 10 - 0.75])
    torch.testing.assert_close(rewards.rewards, plain.rewards + added)
    torch.testing.assert_close(rewards.greedy_reward, plain.greedy_reward + torch.tensor(2 + 10 - 0.5 - 4))


def test_the_clip_holds_for_the_models_reward_and_not_for_what_is_added(tiny_config):
    plain = rewards_of(tiny_config)
    clip = plain.model_rewards.abs().median().item()
    rewards = rewards_of(tiny_config.reward(clip=clip, functions=["own_functions:num_words"]))
    clipped = torch.tensor([max(-clip, min(clip, reward)) for reward in plain.model_rewards.tolist()])
    assert not torch.equal(clipped, plain.model_rewards)
    torch.testing.assert_close(rewards.rewards, clipped + torch.tensor([3.0, 1.0, 3.0]))
    assert torch.equal(rewards.model_rewards, plain.model_rewards)


def test_a_reward_function_that_is_not_there_is_refused_by_its_key_before_anything_starts(tiny_config):
    with pytest.raises(ConfigError, match=r"reward\.functions = 'own_functions:num_wrds'.*did you mean 'num_words'\?"):
        Ring.of(tiny_config.reward(functions=["own_functions:num_wrds"]), in_process=True)


def test_what_is_added_to_rewards_reaches_the_policy_and_its_metrics(tiny_config):
    config = tiny_config.run(num_steps=1)
    plain, _, plain_steps, *_ = run_ring(config)
    added, _, added_steps, *_ = run_ring(config.reward(functions=["own_functions:num_words"]))
    assert not same_bits(plain, added)
    assert plain_steps[0]["reward/mean"] == pytest.approx(plain_steps[0]["reward/model_mean"])
    assert added_steps[0]["reward/model_mean"] == plain_steps[0]["reward/model_mean"]
    assert added_steps[0]["reward/mean"] > plain_steps[0]["reward/mean"] + 0.5


# Ending early


def test_kl_stop_ends_a_run_early_and_everything_admitted_is_trained_or_voided(tiny_config):
    config = tiny_config.run(num_steps=12).learner(lr=3e-2).objective(kl_coef=0.0, kl_stop=0.05)
    policy, head, steps, _, schedule = run_ring(config.scheduling(max_policy_age=2, max_head_age=1))
    assert 1 < len(steps) < 12
    assert steps[-1]["kl/sequence"] > 0.05
    assert all(metrics["kl/sequence"] <= 0.05 for metrics in steps[:-1])
    assert [metrics.get("kl/stopped") for metrics in steps] == [*[None] * (len(steps) - 1), 1.0]
    assert policy.version == head.version == len(steps)
    ledger = schedule.policy_ledger
    assert ledger.trained == 2 * len(steps)
    assert ledger.voided.total() > 0
    assert ledger.admitted == ledger.trained + ledger.voided.total()
    assert (ledger.in_flight, ledger.queued, schedule.reserved_bytes) == (0, 0, 0)


# Evaluation


@pytest.mark.parametrize("lag", ["exact", "bounded"])
def test_evaluations_are_of_the_first_the_last_and_every_second_version(tiny_config, lag):
    config = tiny_config.run(num_steps=5).evaluation(every=2, num_prompts=3)
    config = config.scheduling(max_policy_age=1, max_head_age=1, lag=lag)
    _, _, steps, evaluations, _ = run_ring(config)
    assert [evaluation["step"] for evaluation in evaluations] == [0, 2, 4, 5]
    # Each is scored by the head that scored the step which made the policy.
    scored_by = {one["step"]: one["step"] - 1 - one["age/head"] for one in steps}
    assert [one["head_version"] for one in evaluations] == [0, *(scored_by[version] for version in (2, 4, 5))]
    assert all({"proxy", "frozen", "length", "frozen/0", "frozen/2"} <= one.keys() for one in evaluations)
    assert len({one["frozen"] for one in evaluations}) > 1


def test_the_same_weights_are_evaluated_to_the_same_numbers(tiny_config):
    config = tiny_config.run(num_steps=4).evaluation(every=1, num_prompts=3).learner(lr=0.0)
    _, _, _, evaluations, _ = run_ring(config.head(variant="vanilla"))
    assert [one.pop("step") for one in evaluations] == [0, 1, 2, 3, 4]
    for one in evaluations:
        del one["head_version"]
    assert evaluations == [evaluations[0]] * 5


def test_an_evaluation_scores_its_own_version_while_others_are_trained_beside_it(tiny_config):
    """Every evaluation asked for: its groups are all of the reported policy, scored by the reported head."""
    config = tiny_config.run(num_steps=6).rollouts(num_actors=2).evaluation(every=1, num_prompts=12)
    scored, moved_on = [], 0
    with Ring.of(config.scheduling(max_policy_age=3, max_head_age=3), in_process=True) as ring:
        annotator, schedule = ring.controller.stages.annotators[0], ring.controller.schedule
        call = annotator.carrier.call

        async def listen(method, *args):
            nonlocal moved_on
            if method.name == "evaluate":
                step, head, groups, *_ = args
                versions = {t.oldest_version for group in groups for t in group.trajectories}
                scored.append(({float(step)}, {float(one) for one in versions}, float(head.version)))
                moved_on += schedule.head_version > head.version and schedule.policy_version > step
            return await call(method, *args)

        annotator.carrier.call = listen
        while not ring.finished:
            ring.step()
        evaluations = ring.drain()
    assert scored == [({one["step"]}, {one["step"]}, one["head_version"]) for one in evaluations]
    assert [one["step"] for one in evaluations] == [0, 1, 2, 3, 4, 5, 6]
    assert moved_on > 0, "nothing was trained beside any evaluation"


def test_evaluation_prompts_are_held_back_from_training(tiny_config, prompts_file):
    workload = resolve(tiny_config.evaluation(every=1, num_prompts=5))
    everything = {json.loads(line)["prompt"] for line in Path(prompts_file).read_text().splitlines()}
    held, trained = ({prompt.text for prompt in prompts} for prompts in (workload.eval_prompts, workload.prompts))
    assert len(workload.eval_prompts) == 5
    assert not {prompt.prompt_id for prompt in workload.eval_prompts} & {one.prompt_id for one in workload.prompts}
    assert held | trained == everything
    assert not resolve(tiny_config.evaluation(every=None, num_prompts=5)).eval_prompts
    with pytest.raises(ConfigError, match=r"evaluation\.num_prompts is 42 and data\.prompts has 42 usable prompts"):
        resolve(tiny_config.evaluation(every=1, num_prompts=42))


def test_held_out_prompts_are_another_split_of_the_same_data_set(tiny_config, tmp_path):
    import datasets

    words = {"train": ["the river", "a stone"], "test": ["old wind", "warm wind"]}
    splits = {name: datasets.Dataset.from_dict({"prompt": prompts}) for name, prompts in words.items()}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "hf"))
    config = tiny_config.evaluation(every=1, num_prompts=2)
    workload = resolve(config.data(prompts=str(tmp_path / "hf"), eval=str(tmp_path / "hf"), eval_split="test"))
    assert [one.text for one in workload.prompts] == words["train"]
    assert [one.text for one in workload.eval_prompts] == words["test"]


def test_gold_is_reported_and_trains_nothing(tiny_config):
    config = tiny_config.evaluation(every=3, num_prompts=3)
    policy, head, steps, evaluations, _ = run_ring(config)
    watched_policy, watched_head, watched_steps, watched_evaluations, _ = run_ring(
        config.evaluation(gold="own_functions:gold")
    )
    assert same_bits(policy, watched_policy)
    assert same_bits(head, watched_head)
    for plain, watched in zip(steps, watched_steps, strict=True):
        assert "reward/gold" not in plain
        assert watched["reward/gold"] > 1000
        assert watched["reward/mean"] == plain["reward/mean"]
    for plain, watched in zip(evaluations, watched_evaluations, strict=True):
        assert watched.pop("gold") > 1000
        assert watched.pop("gold_se") > 0
        assert all(0 <= watched.pop(f"{name}_accuracy") <= 1 for name in ("proxy", "frozen"))
        assert watched == plain


def test_the_shares_of_pairs_ranked_as_gold_ranks_them_are_the_heads_and_the_frozen_models(tiny_config):
    """Of the three pairs of a group, and of two groups, by hand: gold falls with every response."""
    config = tiny_config.head(variant="iterative_head").evaluation(gold="own_functions:gold")
    head = torch.nn.Module()
    head.scoring_head = torch.nn.Linear(1, 1, bias=False)
    annotator = RewardAnnotator(SimpleNamespace(device=torch.device("cpu")), None, head, config)
    group = group_of(("four", 4, "stop"), ("two", 4, "stop"), ("", 4, "stop"))
    proxies, frozen = ([3.0, 2.0, 1.0], [1.0, 3.0, 2.0]), ([1.0, 2.0, 3.0], [0.0, 5.0, 1.0])
    embeddings = [
        RewardEmbeddings(
            group_id=4,
            rte=torch.tensor(proxy)[:, None],
            greedy_rte=None,
            bonus=torch.tensor([0.5, 0.0, 1.0]),
            greedy_bonus=None,
            frozen_rewards=torch.tensor(own),
        )
        for proxy, own in zip(proxies, frozen, strict=True)
    ]
    weights = Weights(version=3, tensors={"scoring_head.weight": torch.tensor([[1.0]])})
    (report,) = annotator.evaluate(3, weights, [group, group], embeddings, [None, None])
    told = report.metrics
    assert (told["proxy"], told["frozen"], told["gold"]) == (pytest.approx(2), 2, pytest.approx(1000.5 + 7 / 3))
    assert told["reward"] == pytest.approx(2.5)  # with what functions and penalties add
    first, second = report.samples
    for sample in (first, second):
        assert (sample.prompt, sample.response, sample.finished) == (group.ticket.prompt.content, "four", True)
    assert [(sample.reward, sample.gold) for sample in (first, second)] == [(1.5, 1004.5), (0.5, 1004.5)]
    assert told["proxy_accuracy"] == pytest.approx(4 / 6)
    assert told["frozen_accuracy"] == pytest.approx(1 / 6)


# Bad records, bad numbers


def test_bad_records_are_skipped_and_counted_or_end_the_run(tiny_config, tmp_path):
    lines = [
        json.dumps({"prompt": "the river"}),
        "{",
        json.dumps({"prompt": 3}),
        json.dumps({"prompt": "a b c d e f g h i"}),
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = tiny_config.data(prompts=str(tmp_path / "prompts.jsonl"), on_bad_record="skip").run(num_steps=1)
    with Ring.of(config, in_process=True) as ring:
        assert math.isfinite(ring.step()["policy/loss"])
        assert sum(ring.workload.skipped.values()) == 3
        assert all(count >= 1 for count in ring.workload.skipped.values())
        assert [prompt.text for prompt in ring.workload.prompts] == ["the river"]
    with pytest.raises(DataError, match=r"prompts\.jsonl, line 2"):
        Ring.of(config.data(on_bad_record="error"), in_process=True)


def test_a_gradient_that_is_not_finite_ends_the_run_with_its_step_and_groups(tiny_config):
    config = tiny_config.reward(functions=["own_functions:absurd"])
    named = r"^step 0 \(groups \[0, 1\]\): the gradient norm is (inf|nan)$"
    with Ring.of(config, in_process=True) as ring, pytest.raises(NonFiniteStep, match=named):
        ring.step()


def test_a_gradient_that_is_not_finite_is_skipped_and_counted_where_the_config_says_so(tiny_config):
    config = tiny_config.reward(functions=["own_functions:absurd"]).learner(on_nonfinite="skip")
    config = config.objective(num_minibatches=2, epochs=2)
    with Ring.of(config, in_process=True) as ring:
        before = ring.policy_weights()
    policy, head, steps, *_ = run_ring(config)
    assert same_bits(policy, before)
    assert (policy.version, head.version) == (3, 3)
    assert [metrics["policy/skipped_updates"] for metrics in steps] == [4.0, 4.0, 4.0]
    assert all(tensor.isfinite().all() for tensor in head.tensors.values())


# Aborted groups


def ticket_of(group_id: int) -> Ticket:
    prompt = Prompt(prompt_id="p", content="the river", text="the river", token_ids=PROMPT_IDS)
    return Ticket(group_id=group_id, due_step=0, seed=3, attempt=0, prompt=prompt)


def engine_of(config: R2MConfig) -> TransformersEngine:
    return TransformersEngine(
        load_policy(config.model.policy, config), AutoTokenizer.from_pretrained(config.model.policy), config, False
    )


def test_an_aborted_group_returns_at_once_with_its_finished_responses_alone(tiny_config):
    config = tiny_config.rollouts(group_size=16, max_new_tokens=200).head(variant="vanilla")
    ticket = ticket_of(7)
    whole, _ = engine_of(config).generate(ticket)
    finished = sorted(t.num_response_tokens for t in whole.trajectories if t.finish_reason == "stop")
    longest = max(t.num_response_tokens for t in whole.trajectories)
    cut = finished[2]
    assert longest > cut, "the seed must give responses that are still running when others have ended"

    engine, passes = engine_of(config), 0
    there, aborted = threading.Event(), threading.Event()

    def stop_here(*_) -> None:
        nonlocal passes
        passes += 1
        if passes == 1:
            engine.abort(8, 0)  # of another group: means nothing here
        if passes == cut:
            there.set()
            assert aborted.wait(300)

    def abort() -> None:
        assert there.wait(300)
        engine.abort(7, 0)
        aborted.set()

    hook = engine._model.register_forward_hook(stop_here)
    thread = threading.Thread(target=abort)
    thread.start()
    report, group, _ = RolloutActor(engine, 0).generate(ticket)
    thread.join()
    hook.remove()
    assert passes == cut
    expected = [t for t in whole.trajectories if t.finish_reason == "stop" and t.num_response_tokens <= cut]
    assert [t.token_ids.tolist() for t in group.trajectories] == [t.token_ids.tolist() for t in expected]
    assert {t.finish_reason for t in group.trajectories} == {"stop"}
    assert report.num_responses == len(expected) < 16
    assert report.num_tokens == sum(min(t.num_response_tokens, cut) for t in whole.trajectories)

    engine.abort(7, 0)  # too late: the next attempt is whole
    again, _ = engine.generate(dataclasses.replace(ticket, attempt=1))
    assert [t.token_ids.tolist() for t in again.trajectories] == [t.token_ids.tolist() for t in whole.trajectories]


def test_a_group_none_of_which_finished_is_reported_empty(tiny_config):
    config = tiny_config.rollouts(max_new_tokens=100).head(variant="vanilla")
    ticket = ticket_of(0)
    engine = engine_of(config)
    engine.abort(0, 0)  # before it starts
    report, group, feedback = RolloutActor(engine, 0).generate(ticket)
    assert (report.num_responses, group.trajectories, feedback) == (0, (), None)
    assert report.num_tokens == 0, "the abort was seen before a token was drawn"


def test_what_importance_sampling_does_is_told_by_policy_age(tiny_config):
    """Data of age 2, with a learning rate that moves the policy away from it."""
    config = tiny_config.run(num_steps=5).scheduling(max_policy_age=2, lag="exact")
    config = config.objective(ratio="token", off_policy="mask", off_policy_cap=1.2).learner(lr=1e-2)
    with Ring.of(config, in_process=True) as ring:
        steps = [ring.step() for _ in range(5)]
    for step, metrics in enumerate(steps):
        age = min(step, 2)
        ages = {name.partition("/")[0] for name in metrics if name.startswith("policy_age_")}
        assert ages == {f"policy_age_{age}"} and metrics[f"policy_age_{age}/responses"] == 6
        for name in ("effective_sample_size", "clip_share", "ratio_q05", "ratio_q95", "masked_share", "mismatch_mean"):
            assert metrics[f"policy_age_{age}/{name}"] == metrics[f"policy/{name}"]
    fresh, old = steps[0], steps[-1]
    assert fresh["policy/effective_sample_size"] == pytest.approx(1) and fresh["policy/mismatch_mean"] < 1e-6
    assert fresh["policy/masked_share"] == 0 < old["policy/masked_share"]
    assert old["policy/effective_sample_size"] < 0.999 and old["policy/mismatch_mean"] > 1e-3
    assert old["policy/ratio_q05"] < old["policy/ratio_median"] < old["policy/ratio_q95"] <= old["policy/ratio_max"]


def test_a_checkpoints_own_sampling_settings_do_not_bias_the_ratio(tiny_config, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(tiny_config.model.policy, policy)
    own = {"repetition_penalty": 1.5, "top_k": 5, "min_new_tokens": 4, "temperature": 0.3, "do_sample": True}
    (policy / "generation_config.json").write_text(json.dumps(own | {"eos_token_id": 1, "pad_token_id": 0}))
    _, _, steps, _, _ = run_ring(tiny_config.model(policy=str(policy)).run(num_steps=1))
    assert steps[0]["policy/mismatch_max"] < 1e-5


def test_a_group_with_long_columns_fits_into_what_the_queue_reserved_for_it(tiny_config, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "the river", "answer": "x" * 100_000}) + "\n")
    with Ring.of(tiny_config.data(prompts=str(path)).run(num_steps=1), in_process=True) as ring:
        ring.step()


def test_an_engine_that_fails_for_a_moment_changes_neither_training_nor_evaluation(tiny_config, monkeypatch):
    config = tiny_config.run(num_steps=2).evaluation(every=1, num_prompts=2)
    generate, left = RolloutActor.generate, [0, 1, 1, -1, -2]

    def fails(self, ticket):
        if ticket.group_id in left:
            left.remove(ticket.group_id)
            raise GenerationFailed("for a moment")
        return generate(self, ticket)

    def trained():
        with Ring.of(config, in_process=True) as ring:
            while not ring.finished:
                ring.step()
            return ring.drain(), ring.policy_weights().tensors, ring.controller.schedule.reissued

    evaluations, weights, _ = trained()
    monkeypatch.setattr(RolloutActor, "generate", fails)
    again, others, reissued = trained()
    assert not left and reissued["generation_failed"] == 3
    assert again == evaluations
    assert all(torch.equal(others[name], tensor) for name, tensor in weights.items())
