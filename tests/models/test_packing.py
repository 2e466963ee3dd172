"""Passes over several trajectories, padded or packed into one row: nothing leaks, nothing changes the gradient."""

import pytest
import torch
from groups import SIZES, groups_of, learned, trajectories, trajectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r2m_async.models.loading import load_policy
from r2m_async.models.padding import MOST_PADDING
from r2m_async.models.policy import logprobs_and_states, microbatches

pytestmark = pytest.mark.models

FAMILIES = ["llama", "qwen2", "gpt_neox"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_as_padded_is_as_alone(tiny, tiny_config, family, attention):
    model = load_policy(tiny(family, False), tiny_config.model(attention=attention))
    padded, padded_states = logprobs_and_states(model, trajectories(), 0.7)
    packed, packed_states = logprobs_and_states(model, trajectories(), 0.7, packed=True)
    assert padded.shape == packed.shape == (5, 7)
    assert (padded - packed).abs().max() < 1e-5
    for row, one in enumerate(trajectories()):
        alone, (states,) = logprobs_and_states(model, [one], 0.7)
        assert packed[row, : one.num_response_tokens].tolist() == pytest.approx(alone[0].tolist(), abs=1e-5)
        assert packed_states[row].shape == padded_states[row].shape == (len(one.token_ids) - 1, 32)
        assert (packed_states[row] - padded_states[row]).abs().sum() < 1e-3
        assert (packed_states[row] - states).abs().sum() < 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_packed_row_no_trajectory_sees_another(tiny, tiny_config, family, attention):
    """Not a bit of the others changes with one, and no gradient flows from one to another."""
    model = load_policy(tiny(family, False), tiny_config.model(attention=attention))
    batch = trajectories()
    with torch.no_grad():
        before, states = logprobs_and_states(model, batch, 1.0, packed=True)
        changed = [*batch[:2], trajectory(*SIZES[2], seed=99), *batch[3:]]
        after, other_states = logprobs_and_states(model, changed, 1.0, packed=True)
    assert not torch.equal(before[2], after[2])
    for row in (0, 1, 3, 4):
        assert torch.equal(before[row], after[row]) and torch.equal(states[row], other_states[row])

    inputs = []
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, __, output: inputs.append(output) or output)
    logprobs, _ = logprobs_and_states(model, batch, 1.0, packed=True)
    hook.remove()
    (gradient,) = torch.autograd.grad(logprobs[2].sum(), inputs[0])
    starts = torch.tensor([0, *(len(one.token_ids) - 1 for one in batch)]).cumsum(0)
    own = slice(int(starts[2]), int(starts[3]))
    assert gradient[0, own].abs().sum(-1).gt(0).all()
    gradient[0, own] = 0
    assert not gradient.any()


def test_a_packed_microbatch_counts_tokens_and_a_padded_one_their_rectangle():
    batch = trajectories([(4, 4), (1, 1), (1, 1), (1, 1), (4, 4)])
    assert microbatches(batch, 16) == [[1, 2, 3], [0, 4]]
    assert microbatches(batch, 24) == [[1, 2, 3], [0, 4]]
    assert microbatches(batch, 32) == [[1, 2, 3, 0], [4]]
    assert microbatches(batch, 16, packed=True) == [[1, 2, 3, 0], [4]]
    assert microbatches(batch, 1, packed=True) == [[1], [2], [3], [0], [4]]
    assert microbatches([], 16, packed=True) == []


@given(st.lists(st.integers(2, 400), min_size=1, max_size=40), st.integers(1, 5000))
def test_a_padded_microbatch_holds_similar_lengths_and_little_padding(lengths, max_tokens):
    batch = trajectories([(1, length - 1) for length in lengths])
    parts = microbatches(batch, max_tokens)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        own = [lengths[row] for row in part]
        assert own == sorted(own)
        padded = max(own) * len(own)
        assert padded <= max_tokens or len(own) == 1
        assert padded - sum(own) <= MOST_PADDING


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_neither_microbatches_nor_packing_change_the_gradient(tiny, tiny_config, data):
    size = st.tuples(st.integers(1, 6), st.integers(1, 8))
    groups, rewards = groups_of(data.draw(st.lists(st.lists(size, min_size=2, max_size=4), min_size=1, max_size=4)))
    family = data.draw(st.sampled_from(FAMILIES))
    config = tiny_config.model(policy=tiny(family, False)).objective(
        epochs=1,
        ratio=data.draw(st.sampled_from(["sequence", "token", "sequence_mean"])),
        off_policy=data.draw(st.sampled_from(["none", "full", "clamp", "mask"])),
    )
    whole, told, states = learned(config.learner(tokens_per_microbatch=10**6), groups, rewards)
    learner = {"tokens_per_microbatch": data.draw(st.integers(1, 60)), "packing": data.draw(st.booleans())}
    parts, told_of_parts, states_of_parts = learned(config.learner(**learner), groups, rewards)
    scale = max(float(gradient.abs().max()) for gradient in whole.values())
    assert parts.keys() == whole.keys()
    for name, gradient in whole.items():
        assert (parts[name] - gradient).abs().max() <= 1e-5 * max(scale, 1.0), name
    assert told_of_parts == pytest.approx(told, rel=1e-4, abs=1e-5)
    for own, their in zip(states_of_parts, states, strict=True):
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(own.hidden_states, their.hidden_states, strict=True))
