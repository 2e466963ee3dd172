"""Tiny policies that vLLM can run, made once per session."""

import pytest
from tiny import WORDS, save_tiny_model

pytest.register_assert_rewrite("engines")  # it has assertions, and test files import it


@pytest.fixture(scope="session")
def vllm_config(tmp_path_factory, tiny_config):
    """The tiny ring with a policy that vLLM can run."""
    policy = save_tiny_model(tmp_path_factory.mktemp("vllm-policy"), "qwen2", False, WORDS, seed=0, width=64)
    return tiny_config.model(policy=policy).rollouts(engine="vllm")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(family, ...)`: the directory of a tiny policy, made once.

    `spread` multiplies its logits. `ends` are its end-of-text tokens; an `endless` one writes them once in a million.
    """
    from engines import save_policy  # it imports torch, which --perturb-linear must come before

    made = {}

    def make(family="qwen2", tied=False, spread=1.0, ends=(1,), endless=False):
        key = (family, tied, spread, ends, endless)
        if key not in made:
            made[key] = save_policy(tmp_path_factory.mktemp(family), *key)
        return made[key]

    return make
