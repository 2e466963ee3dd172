"""Names the random streams of a run, and derives from the run's seed every seed that is needed.

Every number is a function of the run's seed and of what it is for. So it does not matter in which order, or in which
process, the seeds are asked for.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np

_PERMUTATION, _SAMPLING, _TURNS = 1, 2, 3
"""Three marks, of which every key holds one: for orders of prompts, for seeds of groups, and for seeds of turns.

They must not be 0, because numpy takes a key that ends with zeros for the key without them.
"""


class Stream(IntEnum):
    """What a seed is for. Each stream has random numbers of its own.

    The numbers must never change: a run with an old config would then give other results.
    """

    ROLLOUTS = 0
    HEAD = 1
    SAMPLED_NOISE = 2
    REFRESHED_NOISE = 3
    EVALUATION = 4
    EVALUATION_NOISE = 5
    HEAD_DROPOUT = 6
    REFILLS = 7
    REFILL_PROMPTS = 8
    LABEL_PAIRS = 9
    LABEL_NOISE = 10
    LABEL_REPLAY = 11
    HEAD_BOOTSTRAP = 12
    OFFLINE_PAIRS = 13


def sampling_seed(seed: int, group_id: int, stream: int = Stream.ROLLOUTS) -> int:
    """Returns the seed of one group in one stream, a number in [0, 2**63).

    seed: the run's seed. group_id: the group's number, 0 or above.
    stream: a `Stream`, or the number of a conversation's turn for `r2m eval generate`.

    A seed has 63 hashed bits. The odds that two of a run's first million groups share one are 1 in 10**7.
    """
    entropy = np.random.SeedSequence([seed, group_id, _SAMPLING, int(stream)])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


ENVIRONMENT = 2**32 - 1
"""In the place of a turn's number: the seed is for the environment, and not for the policy."""


def turn_seed(group_seed: int, response: int, turn: int) -> int:
    """Returns the seed of one turn of a response that a user's rollout function drives, a number in [0, 2**63).

    group_seed: the seed of the group, `Ticket.seed`. response: its index in the group. turn: counted from 0, or
    `ENVIRONMENT`.
    """
    entropy = np.random.SeedSequence([group_seed, response, _TURNS, turn])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


@lru_cache(maxsize=4)
def prompt_order(seed: int, epoch: int, num_prompts: int) -> np.ndarray:
    """Returns [num_prompts] int64: the indices of the prompts in the order in which one pass deals them.

    epoch: the number of the pass over the prompts, from 0.
    """
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, _PERMUTATION])).permutation(num_prompts)
