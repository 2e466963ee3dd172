"""vLLM engines with tiny policies, and what transformers computes in their place.

Engines in this process end before the next begins: closing one takes down the process groups of all.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import torch
from tiny import WORDS, save_tiny_model

from r2m_async.config import R2MConfig
from r2m_async.data.seeds import sampling_seed
from r2m_async.models.policy import group_feedback, token_logprobs
from r2m_async.models.weights import named_weights
from r2m_async.trajectories import Prompt, Ticket

WIDTH = 64
"""Two heads of 32, the least that vLLM's attention on a CPU has."""
BLOCK = 32
"""Tokens of one block of the prefix cache."""
CACHE_BLOCK_BYTES = 2 * 2 * BLOCK * 32 * 4
"""Keys and values of 2 layers, one key-value head of 32, float32."""


def save_policy(directory, family, tied, spread, ends, endless):
    """Saves a random policy, whose weights are 4 times the usual ones; the arguments are those of `checkpoint`."""
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


def generate_at_once(engine, tickets, num_threads):
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(engine.generate, tickets))


@torch.no_grad()
def perturbed(model, scale=0.05):
    """A copy with every parameter moved, norms and biases too."""
    other, generator = deepcopy(model), torch.Generator().manual_seed(7)
    for parameter in other.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return other


def with_flipped_bit(weights, name):
    """The lowest of the parameter's last number, after the digests were taken."""
    weights.tensors[name].view(torch.int32).view(-1)[-1] ^= 1
    return weights


def logprob_error(model, trajectories, config, where=slice(None)):
    """Largest distance of behaviour log-probs from transformers', over `where` of the policy's tokens."""
    expected = token_logprobs(model, trajectories, config)
    worst = 0.0
    for row, trajectory in zip(expected, trajectories, strict=True):
        ours = trajectory.of_policy(trajectory.behaviour_logprobs)
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


# What is looked at inside of an engine, and nowhere else in the tests


def slab_of(engine):
    """The memory in which the engine's processes hand over hidden states."""
    return engine._slab


def driver_of(engine):
    """What calls vLLM, in this process or across."""
    return engine._driver


def vllm_of(engine):
    """vLLM's own engine; of one in a process of its own, what stands for it in this process."""
    return engine._driver._engine


def num_free_blocks(engine):
    """How many groups could begin now."""
    return engine._blocks.qsize()


def clear_slab(engine):
    """So that only groups that begin from here on show in `written`; none may be running."""
    slab = slab_of(engine)
    for block in range(slab.shape.num_blocks):
        slab.clear(block)


def scheduled(engine, mark=None, reached=None):
    """Listens to vLLM's scheduler: the plan of every step from here on. Of an engine in this process.

    Sets the event `reached` with the `mark`-th step after the last `clear` of the list.
    """
    scheduler = vllm_of(engine).engine_core.engine_core.scheduler
    plans, schedule = [], scheduler.schedule

    def listen(*args, **kwargs):
        plans.append(schedule(*args, **kwargs))
        if len(plans) == mark:
            reached.set()
        return plans[-1]

    scheduler.schedule = listen
    return plans
