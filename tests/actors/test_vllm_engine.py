"""The vLLM engine against transformers: what it samples, the log-probabilities and states it reports, the weights it has.

Engines in this process end before the next begins: closing one takes down the process groups of all.
"""

import asyncio
import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import left_of, word_of
from tiny import WORDS, save_tiny_model

import actors.state_slab
from actors.state_slab import UNWRITTEN, SlabShape, StateSlab, create_slab_file
from r2m_async.config import R2MConfig
from r2m_async.data.seeds import sampling_seed
from r2m_async.errors import ConfigError, WeightMismatch
from r2m_async.models.loading import load_policy
from r2m_async.models.policy import group_feedback, token_logprobs
from r2m_async.models.weights import named_weights
from r2m_async.trajectories import Prompt, Ticket

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 64
"""Two heads of 32, the least that vLLM's attention on a CPU has."""
BLOCK = 32
"""Tokens of one block of the prefix cache."""
CACHE_BLOCK_BYTES = 2 * 2 * BLOCK * 32 * 4
"""Keys and values of 2 layers, one key-value head of 32, float32."""


# What the tests are made of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(family, ...)`: the directory of a tiny policy, made once.

    `spread` multiplies its logits. `ends` are its end-of-text tokens; an `endless` one writes them once in a million.
    """
    made = {}

    def make(family="qwen2", tied=False, spread=1.0, ends=(1,), endless=False):
        key = (family, tied, spread, ends, endless)
        if key not in made:
            made[key] = _save(tmp_path_factory.mktemp(family), *key)
        return made[key]

    return make


def _save(directory, family, tied, spread, ends, endless):
    from transformers import AutoConfig, AutoModelForCausalLM

    save_tiny_model(directory, family, False, WORDS, seed=1, width=WIDTH)
    shape = AutoConfig.from_pretrained(directory)
    shape.tie_word_embeddings, shape.max_position_embeddings = tied, 4096
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
        head = model.get_output_embeddings().weight
        head.mul_(spread)
        if endless:
            head[list(ends)] = 0
    model.generation_config.eos_token_id = list(ends)
    model.save_pretrained(directory)
    return str(directory)


def config_of(path, age=0, **rollouts):
    """Of an engine in this process; with `age` of one in processes of its own."""
    usual = {"engine": "vllm", "group_size": 3, "max_prompt_tokens": 12, "max_new_tokens": 20, "temperature": 0.7}
    return R2MConfig.from_dict(
        {
            "run": {"device": "cpu"},
            "model": {"policy": path},
            "rollouts": usual | rollouts,
            "scheduling": {"max_policy_age": age},
        }
    )


def engine_of(config, twin=True):
    from transformers import AutoTokenizer

    from actors.vllm_engine import VLLMEngine

    return VLLMEngine(config.model.policy, AutoTokenizer.from_pretrained(config.model.policy), WIDTH, config, twin)


@contextmanager
def running(config, twin=True, model=None, version=0):
    """A running engine; with `model` it has these weights."""
    engine = engine_of(config, twin)
    try:
        if model is not None:
            engine.load(named_weights(model, version, probe=True))
        yield engine
    finally:
        engine.close()


def ticket_of(group_id, prompt_tokens=5, attempt=0, seed=None):
    tokens = tuple(np.random.default_rng(group_id).integers(10, 300, prompt_tokens).tolist())
    prompt = Prompt(prompt_id=str(group_id), content="", text="", token_ids=tokens)
    seed = sampling_seed(0, group_id) if seed is None else seed
    return Ticket(group_id=group_id, due_step=0, seed=seed, attempt=attempt, prompt=prompt)


@torch.no_grad()
def perturbed(model, scale=0.05):
    """A copy with every parameter moved, norms and biases too."""
    other, generator = deepcopy(model), torch.Generator().manual_seed(7)
    for parameter in other.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return other


def logprob_error(model, trajectories, config, where=slice(None)):
    """Largest distance of behaviour log-probs from transformers', over `where` of the responses."""
    expected = token_logprobs(model, trajectories, config)
    worst = 0.0
    for row, trajectory in zip(expected, trajectories, strict=True):
        ours = trajectory.behaviour_logprobs[trajectory.prompt_len :]
        difference = (ours - row[: len(ours)])[where]
        worst = max(worst, difference.abs().max().item() if len(difference) else 0.0)
    return worst


def state_error(model, whole, feedback, config):
    """Largest distance of the feedback from transformers'; every response and the twin must be there at full length."""
    group = whole.finished()
    expected = group_feedback(model, group, config, 0)
    assert (feedback.greedy is None) == (group.greedy is None)
    ours = [*feedback.hidden_states, *([] if feedback.greedy is None else [feedback.greedy])]
    theirs = [*expected.hidden_states, *([] if expected.greedy is None else [expected.greedy])]
    assert [states.shape for states in ours] == [states.shape for states in theirs]
    return max((one - other).abs().max().item() for one, other in zip(ours, theirs, strict=True))


def assert_exact(model, result, config, tolerance=1e-4):
    """A whole group, its log-probs and states transformers'."""
    whole, feedback = result
    assert len(whole.finished().trajectories) == config.rollouts.group_size
    assert logprob_error(model, whole.trajectories, config) < tolerance
    assert state_error(model, whole, feedback, config) < tolerance


def step_until(condition, engine, *groups):
    """Returns between two steps of the engine, after the first that makes the condition true of the running groups."""
    while True:
        ended = any(group.done() for group in groups)
        if condition():
            return
        assert not ended, "a group ended first"
        engine._driver.rpc("r2m_settle")


def clear_slab(engine):
    """So that only groups that begin from here on show in `written`; none may be running."""
    for block in range(engine._slab.shape.num_blocks):
        engine._slab.clear(block)


def written(engine):
    """[blocks, sequences]: states that the engine has written so far."""
    return (engine._slab.versions != UNWRITTEN).sum(-1)


def all_have(engine, num_rows):
    return lambda: bool((written(engine).min(1).values >= num_rows).any())


def one_has_ended(engine):
    """Some sequence of a group stands still while another goes on."""

    def condition():
        rows = written(engine)
        busy = rows[rows.max(1).values.argmax()]
        return bool(busy.min() > 0 and busy.max() - busy.min() >= 20)

    return condition


def token_that_ends_one(whole):
    """A token that stands in the middle of one response and in no other before its end; the last such response's."""
    responses = [one.token_ids[one.prompt_len :].tolist() for one in whole.trajectories]
    for response in reversed(responses):
        for token in response[50:300]:
            holders = [other for other in responses if token in other[:600]]
            if len(holders) == 1 and holders[0].index(token) >= 50:
                return token
    raise AssertionError("all responses draw the same tokens")


def scheduled(engine, mark=None, reached=None):
    """Listens to vLLM's scheduler: the plan of every step from here on. Of an engine in this process.

    Sets the event `reached` with the `mark`-th step after the last `clear` of the list.
    """
    scheduler = engine._driver._engine.engine_core.engine_core.scheduler
    plans, schedule = [], scheduler.schedule

    def listen(*args, **kwargs):
        plans.append(schedule(*args, **kwargs))
        if len(plans) == mark:
            reached.set()
        return plans[-1]

    scheduler.schedule = listen
    return plans


def groups_of(plan):
    """Group ids whose requests take part in a step; vLLM names them `[child_]group.attempt[.greedy]-random`."""
    return {name.partition("-")[0].split("_")[-1].split(".")[0] for name in plan.num_scheduled_tokens}


# What is sampled


@torch.no_grad()
def pair_probabilities(model, tokens, ends, temperature):
    """[V, V + 1] float64: of the first two tokens; in the last column of those that end with the first."""
    prompt = torch.tensor([tokens])
    first = (model(prompt).logits[0, -1].double() / temperature).softmax(-1)
    both = torch.cat([prompt.repeat(len(first), 1), torch.arange(len(first))[:, None]], 1)
    second = (model(both).logits[:, -1].double() / temperature).softmax(-1)
    table = torch.cat([first[:, None] * second, torch.zeros(len(first), 1)], 1)
    for end in ends:
        table[end] = 0
        table[end, -1] = first[end]
    return table


def p_value(counts, probabilities):
    """Of chi-square; cells that expect fewer than 5 draws count as one."""
    from scipy.stats import chisquare

    expected, observed = (probabilities * counts.sum()).flatten(), counts.flatten().double()
    expected, order = expected.sort(descending=True)
    observed = observed[order]
    cells = int((expected >= 5).sum())
    assert cells >= 2, "too few draws to tell anything"
    expected, observed = (torch.cat([x[:cells], x[cells:].sum()[None]]).numpy() for x in (expected, observed))
    if expected[-1] < 5:
        expected, observed = (np.append(x[:-2], x[-2:].sum()) for x in (expected, observed))
    return chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


@pytest.mark.ring
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.3])
def test_tokens_are_drawn_from_the_distribution_whose_log_probs_are_reported(checkpoint, temperature):
    ends = (1, 40)
    config = config_of(
        checkpoint(spread=3.0, ends=ends), group_size=128, max_new_tokens=2, temperature=temperature
    ).rollouts(concurrent_groups=2)
    model, prompt = load_policy(config.model.policy, config), ticket_of(0).prompt
    table = pair_probabilities(model, prompt.token_ids, ends, temperature)
    counts = torch.zeros_like(table)
    with running(config, model=model) as engine:
        for group_id in range(40):
            whole, _ = engine.generate(dataclasses.replace(ticket_of(group_id), prompt=prompt))
            for trajectory in whole.trajectories:
                first, second = [*trajectory.token_ids[5:].tolist(), -1][:2]
                counts[first, second] += 1
                reported = trajectory.behaviour_logprobs[5:].double().sum().item()
                assert reported == pytest.approx(table[first, second].log().item(), abs=1e-4)
    assert counts.sum() == 40 * 128
    for merge in (lambda x: x.sum(1), lambda x: x.sum(0), lambda x: x):
        assert p_value(merge(counts), merge(table)) > 1e-4
    warmer = pair_probabilities(model, prompt.token_ids, ends, 1.3 * temperature)
    for merge in (lambda x: x.sum(1), lambda x: x):  # these draws would have told
        assert p_value(merge(counts), merge(warmer)) < 1e-9


@pytest.mark.ring
def test_log_probs_are_transformers_and_responses_end_where_they_say(checkpoint):
    ends = (1, 40, 90, 170, 230)
    config = config_of(checkpoint(ends=ends), group_size=8, max_new_tokens=40, temperature=1.3)
    model, reasons, num_ends = load_policy(config.model.policy, config), Counter(), Counter()
    with running(config, model=model) as engine:
        for group_id in range(4):
            whole, _ = engine.generate(ticket_of(group_id))
            assert whole.ticket == ticket_of(group_id)
            assert logprob_error(model, whole.trajectories, config) < 1e-5
            for one in (*whole.trajectories, whole.greedy):
                response = one.token_ids[one.prompt_len :].tolist()
                assert tuple(one.token_ids[: one.prompt_len].tolist()) == whole.ticket.prompt.token_ids
                assert not set(response[:-1]) & set(ends)
                assert one.finish_reason == ("stop" if response[-1] in ends else "length")
                assert one.finish_reason == "stop" or len(response) == 40
                assert one.text == engine._tokenizer.decode(response, skip_special_tokens=True)
                assert one.behaviour_logprobs[: one.prompt_len].eq(0).all()
                reasons[one.finish_reason] += 1
                num_ends[response[-1]] += response[-1] in ends
            assert len({tuple(one.token_ids.tolist()) for one in whole.trajectories}) == 8, "siblings drew the same"
    assert reasons["stop"] > 3 and reasons["length"] > 3
    assert sum(count > 0 for count in num_ends.values()) > 2, "every end-of-text token counts, not only the first"


@pytest.mark.ring
def test_the_twin_takes_the_likeliest_token_every_time(checkpoint):
    config = config_of(checkpoint())
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        whole, _ = engine.generate(ticket_of(0))
    with torch.no_grad():
        logits = model(whole.greedy.token_ids[None]).logits[0, 4:-1]
    assert torch.equal(logits.argmax(-1), whole.greedy.token_ids[5:])
    assert not torch.equal(whole.greedy.token_ids, whole.trajectories[0].token_ids)


@pytest.mark.ring
def test_a_checkpoints_own_sampling_settings_change_nothing(checkpoint, tmp_path):
    plain = checkpoint()
    spiced = tmp_path / "spiced"
    spiced.mkdir()
    for file in Path(plain).iterdir():
        (spiced / file.name).write_bytes(file.read_bytes())
    settings = {"repetition_penalty": 5.0, "top_k": 2, "top_p": 0.5, "temperature": 0.1, "do_sample": True}
    own = json.loads((spiced / "generation_config.json").read_text())
    (spiced / "generation_config.json").write_text(json.dumps(own | settings))
    drawn = []
    for path in (plain, str(spiced)):
        config = config_of(path)
        model = load_policy(path, config)
        with running(config, model=model) as engine:
            whole, _ = engine.generate(ticket_of(0))
        assert logprob_error(model, whole.trajectories, config) < 1e-5
        drawn.append([one.token_ids.tolist() for one in (*whole.trajectories, whole.greedy)])
    assert drawn[0] == drawn[1]


@pytest.mark.ring
def test_the_same_tickets_give_the_same_bits_whatever_came_before(checkpoint):
    config = config_of(checkpoint(), group_size=4)
    model = load_policy(config.model.policy, config)

    def bits(group_ids):
        with running(config, model=model) as engine:
            found = {group_id: engine.generate(ticket_of(group_id, 3 + group_id)) for group_id in group_ids}
        return {
            group_id: [
                *(one.token_ids for one in (*whole.trajectories, whole.greedy)),
                *(one.behaviour_logprobs for one in (*whole.trajectories, whole.greedy)),
                *(*feedback.hidden_states, feedback.greedy),
            ]
            for group_id, (whole, feedback) in found.items()
        }

    first = bits([0, 1, 2, 3])
    for other in (bits([0, 1, 2, 3]), bits([3, 1]), bits([2])):
        for group_id, tensors in other.items():
            assert len(tensors) == len(first[group_id]) == 15
            assert all(torch.equal(one, two) for one, two in zip(tensors, first[group_id], strict=True)), group_id
    assert not torch.equal(first[0][0][3:], first[1][0][4:])


# Weights


@pytest.mark.ring
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_new_weights_are_what_every_family_computes_with(checkpoint, family, tied):
    config = config_of(checkpoint(family, tied))
    old = load_policy(config.model.policy, config)
    assert ("tied" if tied else "untied") == ("untied" if len(_heads(old)) == 2 else "tied")
    new = perturbed(old)
    with running(config, model=old, version=1) as engine:
        assert_exact(old, engine.generate(ticket_of(0)), config)
        for version, model in ((2, new), (3, old), (4, new)):
            engine.load(named_weights(model, version, probe=True))
            result = engine.generate(ticket_of(0, attempt=version))
            assert_exact(model, result, config)
            assert result[1].policy_version == version
            for one in (*result[0].trajectories, result[0].greedy):
                assert one.policy_versions.tolist() == [-1] * 5 + [version] * one.num_response_tokens
        assert logprob_error(old, result[0].trajectories, config) > 0.1, "the new weights are not new enough to tell"


def _heads(model):
    """Embedding and head, one where they are tied."""
    return {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}


@pytest.mark.ring
def test_before_any_weights_come_the_checkpoint_is_version_0(checkpoint):
    config = config_of(checkpoint())
    with running(config) as engine:
        result = engine.generate(ticket_of(0))
    assert_exact(load_policy(config.model.policy, config), result, config)
    assert result[1].policy_version == 0
    assert result[0].trajectories[0].policy_versions.tolist()[5:] == [0] * result[0].trajectories[0].num_response_tokens


@pytest.mark.ring
def test_one_flipped_bit_is_refused_by_the_name_of_its_parameter(checkpoint):
    config = config_of(checkpoint())
    model = load_policy(config.model.policy, config)
    with running(config) as engine:
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
            with pytest.raises(WeightMismatch, match=rf"version 7\b.*{name} did not arrive"):
                engine.load(with_flipped_bit(named_weights(model, 7, probe=True), name))
        engine.load(named_weights(model, 8, probe=True))
        assert_exact(model, engine.generate(ticket_of(0)), config)


def with_flipped_bit(weights, name):
    """The lowest of the parameter's last number, after the digests were taken."""
    weights.tensors[name].view(torch.int32).view(-1)[-1] ^= 1
    return weights


@pytest.mark.ring
def test_an_engine_that_computes_with_other_weights_than_it_was_sent_is_refused(checkpoint):
    config = config_of(checkpoint())
    model = load_policy(config.model.policy, config)
    weights = named_weights(model, 9, probe=True)
    with running(config) as engine:
        engine.load(weights)
        for tensors, logprobs in (
            (weights.tensors, weights.probe.logprobs + torch.eye(11)[4] * 3e-4),
            (weights.tensors, weights.probe.logprobs * torch.nan),
            (named_weights(perturbed(model, 0.001), 9).tensors, weights.probe.logprobs),
        ):
            probe = dataclasses.replace(weights.probe, logprobs=logprobs, digests={})
            with pytest.raises(WeightMismatch, match="version 9: every parameter arrived"):
                engine.load(dataclasses.replace(weights, tensors=tensors, probe=probe))
        engine.load(weights)
        assert_exact(model, engine.generate(ticket_of(0)), config)


@pytest.mark.ring
def test_a_parameter_that_was_not_sent_is_noticed(checkpoint):
    config = config_of(checkpoint())
    model = load_policy(config.model.policy, config)
    for name in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        with running(config, model=model) as engine:
            weights = named_weights(perturbed(model), 2, probe=True)
            del weights.tensors[name]
            with pytest.raises(WeightMismatch, match=f"version 2: {name} did not arrive as it was sent: not at all"):
                engine.load(weights)


@pytest.mark.ring
def test_a_window_shorter_than_the_probe_still_loads(checkpoint):
    config = config_of(checkpoint(), max_prompt_tokens=4, max_new_tokens=4)
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        assert_exact(model, engine.generate(ticket_of(0, prompt_tokens=4)), config)


# States


def test_the_slabs_size_is_what_its_formula_says(tmp_path, monkeypatch):
    monkeypatch.setattr(actors.state_slab, "DIRECTORY", str(tmp_path))
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        shape = SlabShape(num_blocks=3, num_sequences=5, num_rows=7, hidden_size=11, dtype=dtype)
        assert shape.num_bytes == 3 * 5 * 7 * (11 * itemsize + 4)
        path = create_slab_file(shape)
        assert os.path.getsize(path) == shape.num_bytes
        slab = StateSlab(path, shape)
        rows = torch.arange(3 * 5 * 7)
        slab.write(rows, torch.full((len(rows), 11), 2.0), 1)
        assert slab.states.eq(2).all() and slab.versions.eq(1).all()


@pytest.fixture
def small_slab(tmp_path, monkeypatch):
    """Two sides of a slab of 2 blocks x 3 sequences x 6 rows whose file is unlinked."""
    monkeypatch.setattr(actors.state_slab, "DIRECTORY", str(tmp_path))
    shape = SlabShape(num_blocks=2, num_sequences=3, num_rows=6, hidden_size=2, dtype="float32")
    path = create_slab_file(shape)
    ours, theirs = StateSlab(path, shape), StateSlab(path, shape)
    os.unlink(path)
    return ours, theirs


def _write(slab, block, sequence, positions, version):
    """The state at a position is (100 block + 10 sequence + position, version)."""
    positions = torch.tensor(positions)
    states = torch.stack([100.0 * block + 10 * sequence + positions, torch.full((len(positions),), float(version))], 1)
    slab.write((block * 3 + sequence) * 6 + positions, states, version)


def test_rows_written_on_one_side_are_read_on_the_other_each_from_its_place(small_slab):
    ours, theirs = small_slab
    for block in (0, 1):
        ours.clear(block)
        for sequence in range(3):
            _write(theirs, block, sequence, range(6), version=5)
    states, oldest = ours.read(1, {0: 4, 2: 6}, prompt_len=2)
    assert [part[:, 0].tolist() for part in states] == [[100, 101, 102], [120, 121, 122, 123, 124]]
    assert oldest == 5


def test_prompt_rows_that_the_cache_had_come_from_a_sibling_and_response_rows_never_do(small_slab):
    ours, theirs = small_slab
    ours.clear(0)
    _write(theirs, 0, 0, range(5), version=3)
    _write(theirs, 0, 1, range(2, 5), version=4)
    states, oldest = ours.read(0, {0: 6, 1: 6}, prompt_len=3)
    assert states[1][:, 0].tolist() == [0, 1, 12, 13, 14]
    assert oldest == 3
    with pytest.raises(RuntimeError, match=r"tokens \[0, 1\] of sequence 1"):
        ours.read(0, {1: 6}, prompt_len=0)


def test_a_missing_row_is_an_error_and_clearing_makes_all_rows_missing(small_slab):
    ours, theirs = small_slab
    ours.clear(0)
    for sequence in range(3):
        _write(theirs, 0, sequence, [0, 1, 3], version=1)
    with pytest.raises(RuntimeError, match=r"lacks the states of tokens \[2\] of sequence 1"):
        ours.read(0, {1: 5}, prompt_len=2)
    assert ours.read(0, {1: 3}, prompt_len=2)[1] == 1
    ours.clear(0)
    with pytest.raises(RuntimeError, match=r"tokens \[0, 1\] of sequence 2"):
        ours.read(0, {2: 3}, prompt_len=2)


def test_the_oldest_version_counts_the_rows_that_are_read_and_no_others(small_slab):
    ours, theirs = small_slab
    ours.clear(0)
    _write(theirs, 0, 0, range(6), version=8)
    _write(theirs, 0, 1, range(6), version=9)
    _write(theirs, 0, 1, [4], version=2)
    assert ours.read(0, {0: 6}, prompt_len=1)[1] == 8
    assert ours.read(0, {1: 5}, prompt_len=1)[1] == 9
    assert ours.read(0, {0: 6, 1: 6}, prompt_len=1)[1] == 2


def test_states_read_are_copies_that_the_next_group_does_not_change(small_slab):
    ours, theirs = small_slab
    _write(theirs, 0, 0, range(6), version=1)
    (states,), _ = ours.read(0, {0: 6}, prompt_len=2)
    before = states.clone()
    _write(theirs, 0, 0, range(6), version=2)
    assert torch.equal(states, before)


def test_too_little_shared_memory_is_an_error_with_both_sizes_and_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    usage = shutil.disk_usage(tmp_path)._replace(free=1234)
    monkeypatch.setattr(actors.state_slab, "DIRECTORY", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(os, "posix_fallocate", full)
    shape = SlabShape(num_blocks=2, num_sequences=9, num_rows=1024, hidden_size=896, dtype="bfloat16")
    with pytest.raises(OSError, match=rf"1234 bytes free .*need {shape.num_bytes} ") as raised:
        create_slab_file(shape)
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ring
def test_a_running_engine_leaves_no_file_in_shared_memory(checkpoint, tmp_path, monkeypatch):
    import actors.vllm_engine

    monkeypatch.setattr(actors.state_slab, "DIRECTORY", str(tmp_path))
    monkeypatch.setattr(actors.vllm_engine, "DIRECTORY", str(tmp_path))
    config = config_of(checkpoint())
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        assert list(tmp_path.iterdir()) == []
        assert_exact(model, engine.generate(ticket_of(0)), config)
        with pytest.raises(WeightMismatch):
            engine.load(_with_wrong_digest(named_weights(model, 1, probe=True)))
    assert list(tmp_path.iterdir()) == []


def _with_wrong_digest(weights):
    digests = dict.fromkeys(weights.probe.digests, "0" * 32)
    return dataclasses.replace(weights, probe=dataclasses.replace(weights.probe, digests=digests))


@pytest.mark.ring
def test_states_are_exact_when_long_prompts_are_prefilled_in_chunks(checkpoint):
    options = {"enable_chunked_prefill": True, "max_num_batched_tokens": 16, "enable_prefix_caching": False}
    config = config_of(checkpoint(), max_prompt_tokens=80, engine_options=options)
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        plans = scheduled(engine)
        result = engine.generate(ticket_of(0, prompt_tokens=75))
    assert max(plan.total_num_scheduled_tokens for plan in plans) == 16, "no prompt was cut in chunks"
    assert_exact(model, result, config)
    with running(config.rollouts(engine_options={}), model=model) as engine:
        whole, _ = engine.generate(ticket_of(0, prompt_tokens=75))
    for one, other in zip(result[0].trajectories, whole.trajectories, strict=True):
        assert torch.equal(one.token_ids, other.token_ids), "chunks took random numbers from the responses"


@pytest.mark.ring
def test_states_are_exact_when_requests_are_preempted_for_want_of_cache(checkpoint):
    config = config_of(
        checkpoint(endless=True, spread=6.0),
        group_size=4,
        max_new_tokens=150,
        engine_options={"kv_cache_memory_bytes": 10 * CACHE_BLOCK_BYTES},
    )
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        plans = scheduled(engine)
        result = engine.generate(ticket_of(0))
    preempted = sum(len(plan.preempted_req_ids or ()) for plan in plans)
    assert preempted > 0, "the cache was large enough"
    assert_exact(model, result, config)
    with running(config.rollouts(engine_options={}), model=model) as engine:
        whole, _ = engine.generate(ticket_of(0))
    for one, other in zip(result[0].trajectories, whole.trajectories, strict=True):
        assert torch.equal(one.token_ids, other.token_ids), "preemption took random numbers from the responses"


@pytest.mark.ring
@pytest.mark.parametrize("prompt_tokens", [BLOCK, 2 * BLOCK + 6])
def test_states_are_exact_where_the_prefix_cache_spared_siblings_the_prompt(checkpoint, prompt_tokens):
    config = config_of(checkpoint(), max_prompt_tokens=80)
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        clear_slab(engine)
        result = engine.generate(ticket_of(0, prompt_tokens=prompt_tokens))
        spared = (engine._slab.versions[0, :, :prompt_tokens] == UNWRITTEN).sum(-1)
    cached = (prompt_tokens - 1) // BLOCK * BLOCK  # the last prompt token is always computed
    assert sorted(spared.tolist()) == [0, cached, cached, cached]
    assert_exact(model, result, config)


@pytest.mark.ring
def test_states_travel_in_the_dtype_that_the_feedback_asks_for(checkpoint):
    config = config_of(checkpoint()).feedback(dtype="bfloat16")
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        whole, feedback = engine.generate(ticket_of(0))
    exact = group_feedback(model, whole, config.feedback(dtype="float32"), 0)
    for ours, theirs in zip(feedback.hidden_states, exact.hidden_states, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-8, atol=1e-4)


@pytest.mark.ring
def test_an_engine_whose_states_nobody_reads_keeps_none(checkpoint):
    config = config_of(checkpoint()).feedback(source="learner")
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        whole, feedback = engine.generate(ticket_of(0))
        assert feedback is None and engine._slab is None
    assert logprob_error(model, whole.trajectories, config) < 1e-5


# Several groups at once


def generate_at_once(engine, tickets, num_threads):
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(engine.generate, tickets))


@pytest.mark.ring
def test_concurrent_groups_share_steps_and_each_gets_its_own_states(checkpoint):
    """Chunks, cached prefixes, preemption and prompts of different length, all at once; more groups than blocks."""
    options = {
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 24,
        "kv_cache_memory_bytes": 20 * CACHE_BLOCK_BYTES,
    }
    config = config_of(
        checkpoint(), max_prompt_tokens=80, max_new_tokens=60, concurrent_groups=3, engine_options=options
    )
    model = load_policy(config.model.policy, config)
    tickets = [ticket_of(group_id, (5, 70, 33, 64)[group_id % 4]) for group_id in range(12)]
    with running(config, model=model) as engine:
        plans = scheduled(engine)
        results = generate_at_once(engine, tickets, num_threads=4)
        assert engine._blocks.qsize() == 3, "blocks were not returned"
        engine.generate(ticket_of(99))
        worker = engine._driver._engine.model_executor.driver_worker.worker
        assert len(worker._sequences) <= 4, "requests that ended long ago are not forgotten"
    for ticket, result in zip(tickets, results, strict=True):
        assert result[0].ticket == ticket
        assert result[1].group_id == ticket.group_id
        assert_exact(model, result, config)
    mixed = [len(groups_of(plan)) for plan in plans]
    assert max(mixed) == 3, "groups were generated one after the other"
    assert sum(count >= 2 for count in mixed) > len(mixed) / 4


class Barging:
    """A lock as unfair as Python's may be: whoever waits looks again only now and then."""

    def __init__(self, lock):
        self._lock = lock

    def acquire(self):
        while not self._lock.acquire(blocking=False):
            time.sleep(0.02)

    def release(self):
        self._lock.release()

    def __enter__(self):
        self.acquire()

    def __exit__(self, *_):
        self.release()


@pytest.mark.ring
def test_an_engine_in_this_process_serves_others_between_the_steps_of_a_group(checkpoint, monkeypatch):
    """Aborts and weights get their turn within some steps, not when the group that steps has ended."""
    import actors.vllm_drivers

    config = config_of(
        checkpoint(endless=True, spread=6.0), max_new_tokens=600, concurrent_groups=2, in_flight_updates=True
    )
    weights, reached = named_weights(load_policy(config.model.policy, config), 1), threading.Event()
    unfair = {"Lock": lambda: Barging(threading.Lock()), "RLock": lambda: Barging(threading.RLock())}
    monkeypatch.setattr(actors.vllm_drivers, "threading", SimpleNamespace(**(vars(threading) | unfair)))
    with running(config) as engine, ThreadPoolExecutor(1) as pool:
        plans = scheduled(engine, 30, reached)
        for group_id in range(4):
            plans.clear()
            reached.clear()
            group = pool.submit(engine.generate, ticket_of(group_id))
            assert reached.wait(60)
            before = len(plans)
            engine.abort(group_id, 0) if group_id % 2 else engine.load(weights)
            assert len(plans) - before < 100
            engine.abort(group_id, 0)
            group.result()


@pytest.mark.ring
def test_a_failed_group_gives_its_block_back_and_the_engine_goes_on(checkpoint):
    config = config_of(checkpoint())
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        with pytest.raises(Exception, match="maximum context length is 32 tokens"):
            engine.generate(ticket_of(0, prompt_tokens=200))
        assert engine._blocks.qsize() == 1
        assert_exact(model, engine.generate(ticket_of(1)), config)


# An engine in a process of its own: new weights while requests wait


@pytest.fixture(scope="module")
def flying(checkpoint):
    """(engine, its first model, config): one engine in its own process, for all tests that need one."""
    config = config_of(
        checkpoint("llama", endless=True, spread=6.0),
        1,
        max_prompt_tokens=80,
        max_new_tokens=900,
        concurrent_groups=3,
        in_flight_updates=True,
    )
    with running(config, twin=False) as engine:
        yield engine, load_policy(config.model.policy, config), config


def generate_across_an_update(engine, old, new):
    """A group of version 1 that version 2 overtakes; its prompt is long enough for siblings to share."""
    engine.load(named_weights(old, 1, probe=True))
    clear_slab(engine)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(engine.generate, ticket_of(0, prompt_tokens=70))
        step_until(all_have(engine, 270), engine, future)
        engine.load(named_weights(new, 2, probe=True))
        assert not future.done(), "the update was too late to be in flight"
        return future.result()


def assert_updated_in_flight(whole, feedback, old, new, config):
    for one in whole.trajectories:
        versions = one.policy_versions[one.prompt_len :]
        boundary = int((versions == 1).sum())
        assert 0 < boundary < len(versions)
        assert versions.tolist() == [1] * boundary + [2] * (len(versions) - boundary)
        assert logprob_error(old, [one], config, slice(0, boundary)) < 1e-4
        assert logprob_error(new, [one], config, slice(boundary, None)) < 1e-4
        assert logprob_error(old, [one], config, slice(boundary, None)) > 0.1
    assert whole.oldest_version == 1
    assert state_error(new, whole, feedback, config) < 1e-4
    assert feedback.policy_version == 2


@pytest.mark.ring
def test_in_flight_weights_recompute_the_caches_and_every_token_knows_who_sampled_it(flying):
    engine, old, config = flying
    new = perturbed(old)
    assert_updated_in_flight(*generate_across_an_update(engine, old, new), old, new, config)


@pytest.mark.ring
def test_a_stale_cache_is_kept_where_asked_for_and_the_states_are_labelled_old(flying, monkeypatch):
    engine, old, config = flying
    new = perturbed(old)
    monkeypatch.setattr(engine, "_config", config.rollouts(keep_stale_cache=True))
    whole, feedback = generate_across_an_update(engine, old, new)
    theirs = group_feedback(old, whole, config, 1)
    for one, states, olds in zip(whole.trajectories, feedback.hidden_states, theirs.hidden_states, strict=True):
        boundary = int((one.policy_versions == 1).sum())
        assert 0 < boundary < one.num_response_tokens
        assert logprob_error(old, [one], config, slice(0, boundary)) < 1e-4
        assert logprob_error(new, [one], config, slice(boundary, None)) > 0.01
        last = one.prompt_len + boundary - 1  # its state chose the first token of the new policy
        assert (states[:last] - olds[:last]).abs().max() < 1e-4
        assert (states[last:] - olds[last:]).abs().max() > 0.1
    assert feedback.policy_version == 1


@pytest.mark.ring
def test_an_engine_in_its_own_process_refuses_corrupted_weights_and_takes_good_ones_after(flying):
    engine, model, config = flying
    weights = with_flipped_bit(named_weights(model, 5, probe=True), "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(WeightMismatch, match=r"version 5\b.*model.layers.1.mlp.down_proj.weight did not arrive"):
        engine.load(weights)
    engine.load(named_weights(model, 6, probe=True))
    assert_exact(model, engine.generate(ticket_of(10)), config)


@pytest.mark.ring
def test_concurrent_groups_of_an_engine_in_its_own_process_do_not_mix(flying):
    engine, model, config = flying
    engine.load(named_weights(model, 3, probe=True))
    tickets = [ticket_of(group_id, 3 + group_id % 9) for group_id in range(20, 27)]
    results = generate_at_once(engine, tickets, num_threads=4)
    for ticket, result in zip(tickets, results, strict=True):
        assert result[0].ticket == ticket
        assert_exact(model, result, config)
        assert result[1].policy_version == 3
    assert engine._blocks.qsize() == 3


# Aborts


@pytest.fixture(params=["in this process", "in its own"])
def either(request, checkpoint):
    """(engine, model, config) of both kinds of driver, endless responses."""
    if request.param == "in its own":
        engine, model, config = request.getfixturevalue("flying")
        engine.load(named_weights(model, 4, probe=True))
        yield engine, model, config
        return
    config = config_of(checkpoint("llama", endless=True, spread=6.0), max_new_tokens=900, concurrent_groups=3)
    model = load_policy(config.model.policy, config)
    with running(config, twin=False, model=model, version=4) as engine:
        yield engine, model, config


@pytest.mark.ring
def test_an_abort_ends_the_group_and_keeps_what_had_ended_by_itself(either, monkeypatch):
    engine, model, config = either
    end = token_that_ends_one(engine.generate(ticket_of(40, attempt=9))[0])
    monkeypatch.setattr(engine, "_eos_ids", [end])
    clear_slab(engine)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(engine.generate, ticket_of(40))
        step_until(one_has_ended(engine), engine, future)
        engine.abort(40, 0)
        whole, feedback = future.result()
    reasons = Counter(one.finish_reason for one in whole.trajectories)
    assert set(reasons) == {"stop", "abort"}
    for one in whole.trajectories:
        assert (one.token_ids[-1] == end) == (one.finish_reason == "stop")
        assert one.policy_versions[one.prompt_len :].eq(4).all()
        assert 0 < one.num_response_tokens < 900
    assert logprob_error(model, whole.trajectories, config) < 1e-4
    assert len(feedback.hidden_states) == reasons["stop"]
    assert state_error(model, whole, feedback, config) < 1e-4
    monkeypatch.undo()
    assert_exact(model, engine.generate(ticket_of(40, attempt=1)), config)
    assert engine._blocks.qsize() == 3


@pytest.mark.ring
def test_an_abort_of_one_group_leaves_the_others_running(either):
    engine, model, config = either
    clear_slab(engine)
    with ThreadPoolExecutor(2) as pool:
        doomed, other = (pool.submit(engine.generate, ticket_of(group_id)) for group_id in (50, 51))
        step_until(lambda: bool((written(engine).min(1).values > 30).sum() == 2), engine, doomed, other)
        engine.abort(50, 0)
        whole, feedback = doomed.result()
        assert not other.done()
        assert {one.finish_reason for one in whole.trajectories} == {"abort"}
        assert feedback is None
        assert_exact(model, other.result(), config)


@pytest.mark.ring
def test_an_abort_that_comes_before_generate_is_honoured_for_that_attempt_only(either):
    engine, model, config = either
    engine.abort(60, 0)
    whole, feedback = engine.generate(ticket_of(60))
    assert {one.finish_reason for one in whole.trajectories} == {"abort"}
    assert whole.finished().trajectories == () and feedback is None
    assert_exact(model, engine.generate(ticket_of(60, attempt=1)), config)


@pytest.mark.ring
def test_aborts_are_forgotten_with_their_requests_and_of_those_that_never_come_the_newest_are_kept(either, monkeypatch):
    engine, model, config = either
    driver = engine._driver
    driver._aborted.forget([f"{group_id}.0" for group_id in range(1000)])
    before = len(driver._aborted)
    for group_id in range(200, 206):
        engine.abort(group_id, 0)
    for group_id in range(200, 206):
        engine.generate(ticket_of(group_id))
    with ThreadPoolExecutor(1) as pool:
        clear_slab(engine)
        running = pool.submit(engine.generate, ticket_of(206))
        step_until(all_have(engine, 6), engine, running)
        engine.abort(206, 0)
        running.result()
    left = [name for name in (f"{group_id}.0" for group_id in range(200, 207)) if name in driver._aborted]
    assert left == []
    monkeypatch.setattr(driver._aborted, "LIMIT", before + 20)
    for attempt in range(50):  # of groups that are over, or whose attempt was lost on its way
        engine.abort(206, attempt)
    assert len(driver._aborted) == before + 20
    whole, _ = engine.generate(ticket_of(206, attempt=49))
    assert {one.finish_reason for one in whole.trajectories} == {"abort"}
    driver._aborted.forget([f"206.{attempt}{twin}" for attempt in range(50) for twin in ("", ".greedy")])
    assert_exact(model, engine.generate(ticket_of(206)), config)


@pytest.mark.ring
def test_an_abort_that_comes_while_generate_is_starting_is_honoured(either, monkeypatch):
    engine, _, _ = either
    generate = engine._driver.generate

    def overtaken(*args, **kwargs):
        engine.abort(70, 0)
        return generate(*args, **kwargs)

    monkeypatch.setattr(engine._driver, "generate", overtaken)
    whole, feedback = engine.generate(ticket_of(70))
    assert {one.finish_reason for one in whole.trajectories} == {"abort"}
    assert feedback is None


@pytest.mark.ring
def test_an_abort_that_comes_while_vllm_takes_the_request_in_is_honoured(flying, monkeypatch):
    engine, _, _ = flying
    processor = engine._driver._engine.input_processor
    take_in = processor.process_inputs_async

    async def overtaken(*args, **kwargs):
        abort = asyncio.ensure_future(asyncio.to_thread(engine.abort, 71, 0))
        await asyncio.wait([abort], timeout=1)  # it may wait for the request to end
        return await take_in(*args, **kwargs)

    monkeypatch.setattr(processor, "process_inputs_async", overtaken)
    whole, feedback = engine.generate(ticket_of(71))
    assert {one.finish_reason for one in whole.trajectories} == {"abort"}
    assert feedback is None


@pytest.mark.ring
def test_nothing_is_written_into_a_block_once_its_aborted_group_is_back(flying):
    """Else the next group of the block could find its prompt's states written, by another group."""
    engine, model, _ = flying
    engine.load(named_weights(model, 4, probe=True))
    (core,) = (child for child in multiprocessing.active_children() if child.name.startswith("EngineCore"))
    for group_id in range(80, 88):
        clear_slab(engine)
        with ThreadPoolExecutor(2) as pool:
            future = pool.submit(engine.generate, ticket_of(group_id))
            step_until(all_have(engine, 20), engine, future)
            os.kill(core.pid, signal.SIGSTOP)  # most likely in the middle of a step
            try:
                pool.submit(engine.abort, group_id, 0)
                wait([future], timeout=0.2)  # must not be back, or must have left no step unfinished
                before = written(engine)
            finally:
                os.kill(core.pid, signal.SIGCONT)
            came_back = future.done()
            future.result()
        if not came_back:
            before = written(engine)
        engine._driver.set_weight_version("4")  # comes between two steps
        assert torch.equal(before, written(engine)), f"in round {group_id - 80}"


@pytest.mark.ring
def test_a_group_whose_twin_was_aborted_has_no_feedback(checkpoint):
    config = config_of(checkpoint("llama", endless=True, spread=6.0), max_new_tokens=900)
    model = load_policy(config.model.policy, config)
    with running(config, model=model) as engine:
        engine._eos_ids = [token_that_ends_one(engine.generate(ticket_of(40, attempt=9))[0])]
        clear_slab(engine)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(engine.generate, ticket_of(40))
            step_until(one_has_ended(engine), engine, future)
            engine.abort(40, 0)
            whole, feedback = future.result()
    assert "stop" in {one.finish_reason for one in whole.trajectories}
    assert whole.greedy.finish_reason == "abort"
    assert whole.finished().trajectories == () and feedback is None


# Options


@pytest.mark.ring
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_model_len": 99}, "rollouts.engine_options: max_model_len"),
        ({"block_size": 16, "dtype": "float16"}, "rollouts.engine_options: dtype"),
        ({"logprobs_mode": "raw_logprobs"}, "rollouts.engine_options: logprobs_mode"),
        ({"gpu_memory_utilisation": 0.5}, "gpu_memory_utilisation"),
    ],
)
def test_an_option_that_the_config_owns_or_that_does_not_exist_is_refused(
    checkpoint, tmp_path, monkeypatch, options, said
):
    monkeypatch.setattr(actors.state_slab, "DIRECTORY", str(tmp_path))
    with pytest.raises(ConfigError, match=said):
        engine_of(config_of(checkpoint(), engine_options=options))


@pytest.mark.ring
@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"nonsense": 1}, {"max_num_batched_tokens": 1}])
def test_an_engine_that_did_not_start_leaves_no_file(checkpoint, tmp_path, monkeypatch, options):
    monkeypatch.setattr(actors.state_slab, "DIRECTORY", str(tmp_path))
    with pytest.raises(ValueError):
        engine_of(config_of(checkpoint(), engine_options=options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ring
def test_an_option_that_nothing_else_sets_reaches_vllm_over_our_default(checkpoint):
    config = config_of(checkpoint(), engine_options={"block_size": 64, "enable_prefix_caching": False})
    with running(config) as engine:
        cache = engine._driver._engine.vllm_config.cache_config
        assert (cache.block_size, cache.enable_prefix_caching) == (64, False)


# The end of the process that has an engine

OWNERS = """
# The imports take most of the time and are made once. Each owner is then a process of its own, forked, that runs to the
# end of this file as a program does. This process tells their numbers, waits for them, and tells how they ended.
import json, os, sys

import psutil
from transformers import AutoTokenizer

import actors.state_slab
from actors.vllm_engine import VLLMEngine
from r2m_async.config import R2MConfig

root, config, owners = sys.argv[1], R2MConfig.from_dict(json.loads(sys.argv[2])), json.loads(sys.argv[3])


def own(how):
    actors.state_slab.DIRECTORY = os.path.join(root, how)
    engine = VLLMEngine(config.model.policy, AutoTokenizer.from_pretrained(config.model.policy), 64, config, False)
    children = {child.pid: child.cmdline() for child in psutil.Process().children(recursive=True)}
    told, go = owners[how]
    os.write(told, json.dumps(children).encode())
    os.read(go, 1)
    if how == "exit":
        os._exit(0)
    raise RuntimeError("a bug")


if __name__ == "__main__":
    pids = {}
    for how in owners:
        pid = os.fork()
        if not pid:
            os.dup2(2, 1)  # the pipe to the test is the first process's alone
            own(how)
        pids[pid] = how
    print(json.dumps({how: pid for pid, how in pids.items()}), flush=True)
    ends = {}
    for _ in owners:
        pid, status = os.wait()
        ends[pids[pid]] = os.waitstatus_to_exitcode(status)
    print(json.dumps(ends), flush=True)
"""
ENDS = {"kill": -signal.SIGKILL, "terminate": -signal.SIGTERM, "exit": 0, "exception": 1}


@pytest.mark.ring
def test_an_engines_processes_and_memory_go_with_whoever_started_it_however_it_ends(checkpoint, tmp_path):
    import psutil

    root, config = tmp_path / "shared", config_of(checkpoint(), 1).to_dict()
    (tmp_path / "owners.py").write_text(OWNERS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    told, go, theirs, engines, owners = {}, {}, {}, {}, {}
    for how in ENDS:
        (root / how).mkdir(parents=True)
        (told[how], telling), (going, go[how]) = os.pipe(), os.pipe()
        theirs[how] = telling, going
    inherited = [end for ends in theirs.values() for end in ends]
    command = [sys.executable, str(tmp_path / "owners.py"), str(root), json.dumps(config), json.dumps(theirs)]
    with open(tmp_path / "log", "w") as log:  # a pipe would be held open by what is left
        first = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, pass_fds=inherited
        )
    for end in inherited:
        os.close(end)
    try:
        owners = {how: psutil.Process(pid) for how, pid in json.loads(first.stdout.readline() or "{}").items()}
        assert owners.keys() == ENDS.keys(), (tmp_path / "log").read_text()[-3000:]
        for how, pipe in told.items():
            word = word_of(pipe, seconds=150)
            assert word, f"{how}: no engine: {(tmp_path / 'log').read_text()[-3000:]}"
            children = json.loads(word)
            assert any("spawn_main" in part or "EngineCore" in part for line in children.values() for part in line)
            engines[how] = [psutil.Process(int(pid)) for pid in children]
        for how, owner in owners.items():
            if how in ("kill", "terminate"):
                owner.send_signal(-ENDS[how])
            else:
                os.write(go[how], b"1")
        assert json.loads(first.communicate(timeout=60)[0]) == ENDS
        assert {how: left for how, one in engines.items() if (left := left_of(one))} == {}
        assert [str(file) for how in ENDS for file in (root / how).iterdir()] == []
    finally:
        for pipe in (*told.values(), *go.values()):
            os.close(pipe)
        for process in (*owners.values(), *(one for of_owner in engines.values() for one in of_owner)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        first.kill()
        first.wait()
