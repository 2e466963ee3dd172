"""Every random stream of a run: its number, and the seeds drawn from it."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np

_PERMUTATION, _SAMPLING = 1, 2
"""Keep the two kinds of random numbers apart. Last in the key and never 0: numpy ignores trailing zeros."""


class Stream(IntEnum):
    """Users of a run's seed, each with random numbers of its own. A number must never change: old runs would."""

    ROLLOUTS = 0
    HEAD = 1
    SAMPLED_NOISE = 2
    REFRESHED_NOISE = 3
    EVALUATION = 4
    EVALUATION_NOISE = 5


def sampling_seed(seed: int, group_id: int, stream: int = Stream.ROLLOUTS) -> int:
    """In [0, 2**63): 63 hashed bits, so two of a run's first million groups share one with odds of 1 in 10**7.

    `stream` is a `Stream`, or the turn of a conversation that `r2m eval generate` answers.
    """
    entropy = np.random.SeedSequence([seed, group_id, _SAMPLING, int(stream)])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


@lru_cache(maxsize=4)
def prompt_order(seed: int, epoch: int, num_prompts: int) -> np.ndarray:
    """[num_prompts] int64: the places of the prompts in the order in which an epoch deals them."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, _PERMUTATION])).permutation(num_prompts)
