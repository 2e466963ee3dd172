"""The paper's presets and the variants at reduced size: real steps of the whole ring on random models.

In one process with the torch backend against the reference, and as they are shipped: vLLM and DeepSpeed together on Ray.
"""

import json
import math

import pytest
import torch
from rings import CONFIGS, SHARDED, reduced
from tiny import WORDS, save_tiny_model

from r2m_async import reference
from r2m_async.config import R2MConfig
from r2m_async.launch.ring import Ring

pytestmark = pytest.mark.models

PRESETS = {  # (policy, reward model): the architectures of the paper's models
    "dialogue_qwen2.5_3b": ("qwen2", "llama"),
    "dialogue_llama3_8b": ("llama", "llama"),
    "tldr_pythia_2.8b": ("gpt_neox", "gpt_neox"),
}
SCORING_HEAD = "scoring_head."


@pytest.fixture(scope="module")
def turns_file(tmp_path_factory) -> str:
    """Prompts as the dialogue presets want them: turns."""
    path = tmp_path_factory.mktemp("turns") / "prompts.jsonl"
    lines = [
        json.dumps({"prompt": [{"role": "user", "content": f"the {noun} {verb}"}], "chosen": "the river"})
        for noun in ("river", "stone", "wind")
        for verb in ("sings", "falls")
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def without_engines(config: R2MConfig) -> R2MConfig:
    """For one process: transformers and plain PyTorch."""
    tree = config.to_dict()
    tree["rollouts"] |= {"engine": "transformers", "concurrent_groups": 1}
    tree["learner"] |= {"backend": "torch", "num_ranks": 1, "zero_stage": 0}
    return R2MConfig.from_dict(tree)


def preset(name: str, tiny, prompts_file: str, turns_file: str, dtype: str) -> R2MConfig:
    policy, reward_model = PRESETS[name]
    prompts = turns_file if name.startswith("dialogue") else prompts_file
    path = CONFIGS / "presets" / f"{name}.yaml"
    config = reduced(path, tiny(policy, False), tiny(reward_model, True), prompts, num_steps=2)
    return without_engines(config).model(dtype=dtype).reward(dtype=dtype)


def run_ring(config):
    """(weights before, weights after, head before, head after, metrics of every step)."""
    with Ring.of(config, in_process=True) as ring:
        policy, head = weights_of(ring)
        steps = []
        while not ring.finished:
            steps.append(ring.step())
        ring.drain()
        trained, updated = weights_of(ring)
    return policy, trained, head, updated, steps


def weights_of(ring):
    return ring.policy_weights(), ring.learner_state("head")["weights"]


def moved(before, after) -> set[str]:
    """Names of the parameters that are not the same bits."""
    assert before.tensors.keys() == after.tensors.keys()
    return {name for name, tensor in before.tensors.items() if not torch.equal(tensor, after.tensors[name])}


def assert_finite(steps, weights):
    assert all(math.isfinite(value) for metrics in steps for value in metrics.values())
    assert all(tensor.isfinite().all() for one in weights for tensor in one.tensors.values())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_in_float32_moves_policy_and_head_as_the_reference_does(name, tiny, prompts_file, turns_file):
    config = preset(name, tiny, prompts_file, turns_file, "float32")
    policy, trained, head, updated, steps = run_ring(config)
    assert len(steps) == 2
    assert_finite(steps, (trained, updated))
    assert moved(policy, trained) == set(policy.tensors)
    assert any(name.startswith(SCORING_HEAD) for name in moved(head, updated))
    assert any(not name.startswith(SCORING_HEAD) for name in moved(head, updated))
    expected = reference.train(config)
    for ours, theirs in ((trained, expected.policy), (updated, expected.head)):
        assert ours.version == theirs.version == 2
        assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_in_bfloat16_moves_policy_and_head(name, tiny, prompts_file, turns_file):
    config = preset(name, tiny, prompts_file, turns_file, "bfloat16")
    policy, trained, head, updated, steps = run_ring(config)
    assert_finite(steps, (trained, updated))
    assert {tensor.dtype for tensor in trained.tensors.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in updated.tensors.values()} == {torch.float32}
    assert moved(policy, trained)
    assert any(name.startswith(SCORING_HEAD) for name in moved(head, updated))
    assert steps[0]["policy/mismatch_max"] < 0.5


def test_in_bfloat16_updates_below_its_rounding_add_up(tiny, prompts_file, turns_file):
    """At |w| = 0.1 neighbours in bfloat16 are 5e-4 apart: an update of 3e-5 is lost unless something finer keeps it."""
    config = preset("dialogue_qwen2.5_3b", tiny, prompts_file, turns_file, "bfloat16")
    policy, trained, *_ = run_ring(config.run(num_steps=12).learner(lr=3e-5))
    differs = [(tensor != trained.tensors[name]).flatten() for name, tensor in policy.tensors.items()]
    assert torch.cat(differs).float().mean() > 0.3


@pytest.mark.parametrize("path", sorted((CONFIGS / "variants").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_variant_moves_the_policy_and_of_the_head_what_it_trains(path, tiny, prompts_file):
    config = reduced(path, tiny("qwen2", False), tiny("llama", True), prompts_file, num_steps=1)
    policy, trained, head, updated, steps = run_ring(config)
    assert_finite(steps, (trained, updated))
    assert moved(policy, trained)
    phi = {name for name in head.tensors if name.startswith(SCORING_HEAD)}
    attention = set(head.tensors) - phi
    of_the_head = {"vanilla": set(), "pretrained_rm": set(), "r2m_no_train": set(), "iterative_head": phi}
    assert moved(head, updated) == of_the_head.get(path.stem, phi | attention)
    assert bool(attention) == (path.stem not in ("vanilla", "pretrained_rm", "iterative_head"))


@pytest.mark.ring
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_on_vllm_and_deepspeed_together(name, tiny, tmp_path, ray_session, prompts_file, turns_file):
    """As shipped, bfloat16 included, but for sizes, numbers of processes and the CPU."""
    policy, reward_model = PRESETS[name]
    model = save_tiny_model(tmp_path, policy, False, WORDS, seed=0, width=64)
    path = CONFIGS / "presets" / f"{name}.yaml"
    prompts = turns_file if name.startswith("dialogue") else prompts_file
    config = reduced(path, model, tiny(reward_model, True), prompts, num_steps=5)
    config = config.learner(num_ranks=2, zero_options=SHARDED if config.learner.zero_stage == 3 else {}, lr=1e-3)
    assert (config.rollouts.engine, config.learner.backend, config.model.dtype) == ("vllm", "deepspeed", "bfloat16")
    with Ring.of(config) as ring:
        before = [one.tensors for one in weights_of_ring(ring)]
        steps = [ring.step() for _ in range(5)]
        ring.drain()
        after = [one.tensors for one in weights_of_ring(ring)]
        assert ring.finished
    for metrics in steps:
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["policy/skipped_updates"] == 0 and metrics["policy/mismatch_max"] < 0.5
        assert metrics["age/policy_max"] == metrics["age/head"] == 0 and metrics["memory/refreshed_states_bytes"] > 0
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys() and any(not torch.equal(old[key], new[key]) for key in old)


def weights_of_ring(ring):
    """Policy and head, out of their processes."""
    return list(weights_of(ring))
