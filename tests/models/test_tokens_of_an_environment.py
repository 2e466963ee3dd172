"""Tokens that an environment wrote into a response: read like a prompt, and never trained.

The tensors with a dimension T hold the policy's tokens alone. They are compared with a literal layout, in which every
token of the response has its place and the environment's are masked.
"""

import base64
import dataclasses
import itertools
import zlib

import pytest
import torch
from groups import SIZES, groups_of, learned, trajectories, trajectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.rollout_actor import RolloutActor
from learners.step_batch import StepBatch
from learners.step_statistics import batch_metrics
from r2m_async.advantages import AdvantageInputs, advantages_and_returns, get_advantage
from r2m_async.codec import SCHEMA, decode, encode
from r2m_async.config import R2MConfig
from r2m_async.errors import WeightMismatch
from r2m_async.models.critic import load_critic, proximal_values
from r2m_async.models.loading import load_policy
from r2m_async.models.policy import behaviour_logprobs, logprobs_and_states, policy_pass, response_mask
from r2m_async.models.reward import overlong_penalty
from r2m_async.objectives import AGGREGATIONS, RATIOS, kl_loss, policy_loss, value_loss
from r2m_async.policy_losses import get_loss
from r2m_async.rewards.arguments import known_arguments
from r2m_async.trajectories import Prompt, Trajectory, TrajectoryGroup

HOLES = ["1111", "0111", "1110", "1001", "0110", "0000", "0101", "1"]
"""Who wrote each token of a response: 1 the policy, 0 an environment."""


def with_holes(one: Trajectory, holes: str) -> Trajectory:
    """The same tokens; those of the response that `holes` has 0 for, over and over, are an environment's."""
    length, start = len(one.token_ids), one.prompt_len
    written = torch.zeros(length, dtype=torch.bool)
    pattern = itertools.islice(itertools.cycle(holes), length - start)
    written[start:] = torch.tensor([mark == "1" for mark in pattern], dtype=torch.bool)
    versions = torch.where(written, one.policy_versions, -1)
    logprobs = torch.where(written, one.behaviour_logprobs, 0.0)
    return dataclasses.replace(
        one, written=written, behaviour_logprobs=logprobs, policy_versions=versions, info={"tools": 1}
    )


def holed(sizes=SIZES) -> list[Trajectory]:
    return [with_holes(one, holes) for one, holes in zip(trajectories(sizes), HOLES, strict=False)]


def with_holes_in(groups: list[TrajectoryGroup], holes=HOLES) -> list[TrajectoryGroup]:
    patterns = itertools.cycle(holes)
    return [
        dataclasses.replace(group, trajectories=tuple(with_holes(one, next(patterns)) for one in group.trajectories))
        for group in groups
    ]


def test_a_trajectory_knows_its_turns_its_tokens_and_their_oldest_version():
    one = dataclasses.replace(
        with_holes(trajectory(2, 8, 0), "11001011"),
        policy_versions=torch.tensor([-1, -1, 7, 7, -1, -1, 5, -1, 6, 6], dtype=torch.int32),
    )
    assert (one.num_response_tokens, one.num_policy_tokens, one.num_turns, one.oldest_version) == (8, 5, 3, 5)
    assert one.of_policy(one.token_ids).tolist() == [one.token_ids[place].item() for place in (2, 3, 6, 8, 9)]
    nothing = with_holes(trajectory(2, 3, 0), "0")
    assert (nothing.num_policy_tokens, nothing.num_turns, nothing.oldest_version) == (0, 0, 2**31 - 1)
    plain = trajectory(2, 3, 0)
    assert (plain.num_policy_tokens, plain.num_turns) == (3, 1) and trajectory(2, 0, 0).num_turns == 0


@pytest.mark.parametrize(
    ("written", "why"),
    [
        (torch.tensor([False, True, True]), "must be bool .4."),
        (torch.tensor([0, 0, 1, 1]), "must be bool .4."),
        (torch.tensor([False, True, True, True]), "within the prompt of 2 tokens"),
    ],
)
def test_a_mask_that_cannot_be_one_is_refused(written, why):
    with pytest.raises(ValueError, match=why):
        dataclasses.replace(trajectory(2, 2, 0), written=written)


def test_a_mask_and_what_a_function_noted_cross_the_codec():
    one = with_holes(trajectory(2, 5, 0), "110")
    back = decode(encode(one))
    assert torch.equal(back.written, one.written) and back.info == {"tools": 1}


SCHEMA_6 = (
    "eNoLMvJ1ZmNgYJjIAAGTjuQcz2SetCqkKDErNbkkv6iybWVJfnZqXnxmSvEVJoZVBUX5uQUl8TmpeUybklIzEssy80uL4nPy04ESSUAVjOsL8nMykyvjy1K"
    "LijPz84BCTGvTMvMyizPii1ITi/PzlhSX5BcsKUmtKFlYMnny0sy8EjOTicwMk5en5eQnlhgbTWR2AIuCWGcaGPADZijNAqVZGcgG+8nR9B8KQPYDAIgMR+I="
)
"""The bytes of a response as they were before there was a mask, compressed: `encode` at schema 6."""


def test_buffers_of_before_there_was_a_mask_are_read_and_an_ordinary_response_is_written_as_it_was():
    before = zlib.decompress(base64.b64decode(SCHEMA_6))
    back = decode(before)
    assert back.token_ids.tolist() == [3, 4, 5] and back.behaviour_logprobs.tolist() == [0.0, 0.0, -0.5]
    assert (back.written, back.info, back.text, back.num_policy_tokens) == (None, None, "t", 1)
    now = bytes(encode(back))
    assert (before[4], now[4]) == (6, SCHEMA) and before[:4] + before[5:] == now[:4] + now[5:]


def literal_logprobs(model, one: Trajectory, temperature: float) -> dict[int, torch.Tensor]:
    """The log-probability of each token that the policy wrote, by its place, from the whole forward pass."""
    logits = model(input_ids=one.token_ids[None]).logits[0].float() / temperature
    return {
        place: logits[place - 1].log_softmax(-1)[one.token_ids[place]]
        for place in range(one.prompt_len, len(one.token_ids))
        if one.written is None or one.written[place]
    }


@pytest.mark.models
@pytest.mark.parametrize("packed", [False, True])
def test_log_probs_are_those_of_the_policys_tokens_and_states_those_of_all(tiny, tiny_config, packed):
    model, batch = load_policy(tiny("llama", False), tiny_config), holed()
    with torch.no_grad():
        logprobs, states, entropies = policy_pass(model, batch, 0.7, packed, entropy=True)
        plain_states = logprobs_and_states(model, trajectories(), 0.7, packed)[1]
        mask = response_mask(batch)
        assert logprobs.shape == entropies.shape == mask.shape == behaviour_logprobs(batch).shape
        for row, one in enumerate(batch):
            expected = literal_logprobs(model, one, 0.7)
            assert logprobs[row, mask[row]].tolist() == pytest.approx([v.item() for v in expected.values()], abs=1e-5)
            own = [one.behaviour_logprobs[place].item() for place in expected]
            assert behaviour_logprobs(batch)[row, mask[row]].tolist() == own
            # The environment's tokens are inputs as all others: their states are there, the same as without a mask.
            assert states[row].shape == (len(one.token_ids) - 1, 32)
            assert torch.equal(states[row], plain_states[row])
    assert not logprobs[~mask].any() and not entropies[~mask].any()


@pytest.mark.models
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_has_the_gradient_of_the_policys_tokens_alone(tiny_config, packed):
    config = tiny_config.objective(ratio="token", off_policy="ignore", kl_coef=0.0, epochs=1, entropy_coef=0.0)
    config = config.advantage(name="rloo").learner(packing=packed, tokens_per_microbatch=20)
    groups, rewards = groups_of([[(4, 6), (4, 3), (4, 9)], [(2, 5), (2, 2)]])
    groups = with_holes_in(groups, ["1101", "0", "1001", "01", "10"])
    gradients, metrics, refreshed = learned(config, groups, rewards)
    model = load_policy(config.model.policy, config)
    count, loss = 0, 0.0
    for group, of_group in zip(groups, rewards, strict=True):
        total, k = of_group.rewards.sum(), len(of_group.rewards)
        for one, reward in zip(group.trajectories, of_group.rewards, strict=True):
            advantage = reward - (total - reward) / (k - 1)
            own = literal_logprobs(model, one, config.rollouts.temperature)
            count += len(own)
            # The ratio to pi_old is 1 and has the gradient of the log-probability.
            loss = loss - sum(advantage * (logprob - logprob.detach()).exp() for logprob in own.values())
    (loss / count).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert metrics["length/trained_tokens"] == count and metrics["length/mean"] == pytest.approx(count / 5)
    assert metrics["length/environment"] == (6 + 3 + 9 + 5 + 2 - count) / 5
    assert metrics["length/turns"] == (2 + 0 + 3 + 2 + 1) / 5
    states = [rows for one in refreshed for rows in one.hidden_states]
    assert [len(rows) for rows in states] == [len(t.token_ids) - 1 for g in groups for t in g.trajectories]


@pytest.mark.models
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_in_which_the_policy_wrote_nothing_moves_nothing_and_is_told_in_numbers(tiny_config, packed):
    config = tiny_config.learner(packing=packed).objective(entropy_coef=0.1)
    groups, rewards = groups_of([[(4, 3), (4, 2)], [(2, 5), (2, 0)]])
    gradients, metrics, refreshed = learned(config, with_holes_in(groups, ["0"]), rewards)
    assert all(not gradient.any() for gradient in gradients.values())
    assert all(value == value for value in metrics.values()), metrics
    assert metrics["length/turns"] == 0 and metrics["length/environment"] == 2.5
    assert [len(rows) for one in refreshed for rows in one.hidden_states] == [6, 5, 6, 1]


def test_ordinary_responses_have_no_metric_of_an_environment():
    batch = trajectories()
    mask = response_mask(batch)
    zeros = torch.zeros(mask.shape)
    metrics = batch_metrics(mask, zeros, zeros, zeros, torch.zeros(5), batch)
    assert not {"length/environment", "length/turns"} & metrics.keys()


# The layout without holes against the literal one, with a masked place for each token of the environment

masks = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=4, max_size=4)


def both_layouts(rows: list[list[bool]], seed: int, num: int):
    """(mask with holes, its tensors), (mask without, its tensors): the second has the policy's tokens moved together."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.tensor(rows)
    tensors = [torch.randn(full.shape, generator=generator) * 0.3 for _ in range(num)]
    counts = full.sum(1)
    compact = torch.arange(int(counts.max())) < counts[:, None]
    moved = [torch.zeros(compact.shape).masked_scatter(compact, one[full]) for one in tensors]
    return (full, tensors), (compact, moved)


@given(masks, st.integers(0, 99))
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
def test_every_loss_is_that_of_the_literal_layout_with_its_gradient(rows, seed):
    (full, (logprobs, behaviour, old, per_token)), (compact, moved) = both_layouts(rows, seed, 4)
    of_response = torch.randn(4, generator=torch.Generator().manual_seed(seed))
    names = ("clip", "dual_clip", "cispo", "gmpo", "sapo")
    for name, ratio, aggregation in itertools.product(names, RATIOS, AGGREGATIONS):
        loss = get_loss(name)
        if ratio not in loss.ratios or aggregation == "sequence_sum_norm":
            continue
        how = {"ratio": ratio, "loss": loss, "aggregation": aggregation, "off_policy": "clamp"}
        for advantages in [(of_response, of_response), *([(per_token, moved[3])] if ratio == "token" else [])]:
            theirs, ours = logprobs.clone().requires_grad_(), moved[0].clone().requires_grad_()
            literal = policy_loss(theirs, behaviour, advantages[0], full, old_logprobs=old, **how).loss
            own = policy_loss(ours, moved[1], advantages[1], compact, old_logprobs=moved[2], **how).loss
            literal = literal + kl_loss(theirs, old, full, aggregation=aggregation)
            own = own + kl_loss(ours, moved[2], compact, aggregation=aggregation)
            torch.testing.assert_close(own, literal, rtol=1e-5, atol=1e-6)
            literal.backward()
            own.backward()
            assert not theirs.grad[~full].any() and not ours.grad[~compact].any()
            torch.testing.assert_close(ours.grad[compact], theirs.grad[full], rtol=1e-4, atol=1e-6)
    literal = value_loss(logprobs, old, behaviour, full, clip=0.1).loss
    torch.testing.assert_close(value_loss(moved[0], moved[2], moved[1], compact, clip=0.1).loss, literal)


ESTIMATORS = ["rloo", "rloo_kl", "grpo", "grpo_batch", "dr_grpo", "opo", "gdpo", "reinforce_pp"]
ESTIMATORS += ["reinforce_pp_baseline", "gae", "remax"]


@given(masks, st.integers(0, 99))
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
def test_every_estimator_is_that_of_the_literal_layout(rows, seed):
    (full, theirs), (compact, ours) = both_layouts(rows, seed, 3)
    rewards = torch.randn(2, 2, generator=torch.Generator().manual_seed(seed))

    def inputs(mask, tensors):
        logprobs, reference, values = (one.view(2, 2, -1) for one in tensors)
        return AdvantageInputs(
            rewards=rewards,
            response_mask=mask.view(2, 2, -1),
            logprobs=logprobs,
            ref_logprobs=reference,
            values=values,
            greedy_rewards=rewards[:, 0],
        )

    for name in ESTIMATORS:
        estimator = get_advantage(name)
        literal = advantages_and_returns(estimator, inputs(full, theirs), {})
        for one, other in zip(advantages_and_returns(estimator, inputs(compact, ours), {}), literal, strict=True):
            if one is not None and one.ndim == 3:
                one, other = one.view(4, -1)[compact], other.view(4, -1)[full]
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.models
def test_gae_skips_what_an_environment_wrote_as_a_literal_transcription_does(tiny_config):
    """From trajectories with holes to advantages, by the critic's own values; token by token in Python beside it."""
    from r2m_async.models.policy_objective import step_advantages
    from r2m_async.trajectories import ScoredGroup

    config = tiny_config.advantage(name="gae", options={"lam": 0.8, "gamma": 0.9, "beta": 0.1})
    config = config.objective(ratio="token")
    groups, rewards = groups_of([[(4, 6), (4, 3)], [(2, 5), (2, 4)]])
    groups = with_holes_in(groups, ["1101", "011", "10010", "0"])
    batch = [one for group in groups for one in group.trajectories]
    critic = load_critic(config.model.policy, config)
    torch.nn.init.normal_(critic.classifier.score.weight, generator=torch.Generator().manual_seed(0))
    values = proximal_values(critic, batch, config)
    mask = response_mask(batch)
    old, ref = (torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    scored = [ScoredGroup(group=g, rewards=r) for g, r in zip(groups, rewards, strict=True)]
    advantages, returns = step_advantages(get_advantage("gae"), scored, old, ref, config, values)

    raw, targets = [], []
    for row, (one, reward) in enumerate(zip(batch, torch.cat([r.rewards for r in rewards]).tolist(), strict=True)):
        outputs = critic.classifier.base_model(input_ids=one.token_ids[None, :-1]).last_hidden_state[0]
        places = one.written.nonzero().flatten().tolist()
        v = [critic.classifier.score(outputs[place - 1]).item() for place in places]
        assert values[row, : len(v)].tolist() == pytest.approx(v, abs=1e-4)
        r = [-0.1 * (old[row, t] - ref[row, t]).item() for t in range(len(v))]
        if r:
            r[-1] += reward
        deltas = [r[t] + 0.9 * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(v))]
        own = [sum((0.9 * 0.8) ** (s - t) * deltas[s] for s in range(t, len(v))) for t in range(len(v))]
        raw += own
        targets += [a + b for a, b in zip(own, v, strict=True)]
    raw = torch.tensor(raw)
    assert advantages[mask].tolist() == pytest.approx(((raw - raw.mean()) / raw.std(correction=0)).tolist(), abs=1e-3)
    assert returns[mask].tolist() == pytest.approx(targets, abs=1e-3)


@pytest.mark.models
def test_learner_and_engine_are_compared_on_the_policys_tokens_alone(tiny_config):
    one = with_holes(
        dataclasses.replace(trajectory(2, 4, 0), policy_versions=torch.zeros(6, dtype=torch.int32)), "1001"
    )
    groups, _ = groups_of([[(2, 4)]])
    group = dataclasses.replace(groups[0], trajectories=(one,))
    mask, behaviour = response_mask([one]), behaviour_logprobs([one])
    assert mask.tolist() == [[True, True]]

    def batch(old):
        given = {
            "step": 0,
            "groups": (group,),
            "trajectories": (one,),
            "rows": (range(1),),
            "values": None,
            "prompts": None,
        }
        return StepBatch(**given, mask=mask, behaviour=behaviour, old=old, reference=old)

    assert batch(behaviour.clone()).compared_with_sampler(0, tiny_config)
    assert not batch(behaviour.clone()).compared_with_sampler(1, tiny_config)
    with pytest.raises(WeightMismatch, match="the 2 tokens that version 0 sampled differ by 0.5 nats"):
        batch(behaviour + 0.5).compared_with_sampler(0, tiny_config)


def test_penalties_lengths_and_what_functions_count_are_of_the_policys_tokens():
    from r2m_async.models.reward import _penalty

    one = with_holes(trajectory(2, 10, 0), "11000")
    config = R2MConfig().reward(length_penalty=0.5, overlong={"start": 2, "end": 6, "penalty": 1.0})
    assert _penalty(one, config) == (2.0, 0.0, 0.5) and overlong_penalty(10, config) == 1.0
    known = known_arguments(Prompt(prompt_id="", content="", text="", token_ids=(2,)), one)
    assert known["tokens"] == one.token_ids[one.written].tolist()
    group = groups_of([[(2, 10)]])[0][0]
    report, _, _ = RolloutActor(None, 7)._reported(group.ticket, dataclasses.replace(group, trajectories=(one,)), None)
    assert report.num_tokens == 4
    plain = RolloutActor(None, 0)._reported(group.ticket, dataclasses.replace(group, trajectories=(one,)), None)[0]
    assert report.num_bytes - plain.num_bytes == 2 * 7 * 11, "each token but the last has a state, whoever wrote it"


@pytest.mark.models
def test_a_response_without_a_token_of_the_policy_trains_nothing_and_still_counts_in_its_group(tiny_config):
    groups, rewards = groups_of([[(4, 3), (4, 3)]])
    holes = with_holes_in(groups, ["1", "0"])
    gradients, _, _ = learned(tiny_config, holes, rewards)
    without = [dataclasses.replace(holes[0], trajectories=(holes[0].trajectories[0], trajectory(4, 0, 5)))]
    expected, _, _ = learned(tiny_config, without, rewards)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert any(gradient.any() for gradient in gradients.values())
