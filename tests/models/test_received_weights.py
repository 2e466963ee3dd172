"""Weights that are broadcast over gloo arrive as they were sent, parameter by parameter, in memory that is used again."""

import threading
from datetime import timedelta

import torch

from r2m_async.models.weights import ReceivedWeights, broadcast


def groups():
    """A sender and a receiver in this process: the group of rank 0 and that of rank 1."""
    store, made = torch.distributed.HashStore(), {}

    def join(rank):
        made[rank] = torch.distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=30))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return made[0], made[1]


def test_every_parameter_arrives_as_it_was_sent_and_the_next_version_takes_the_same_memory():
    sender, receiver = groups()
    receive = ReceivedWeights(receiver)
    places = []
    for version in range(3):
        generator = torch.Generator().manual_seed(version)
        sent = {
            "odd": torch.randn(3, 5, generator=generator),
            "scalar": torch.tensor(float(version)),
            "short": torch.randn(7, generator=generator).bfloat16(),
            "empty": torch.empty(0, 4),
            "counts": torch.arange(9) + version,
            "large": torch.randn(1000, 300, generator=generator),
        }
        sent = dict(list(sent.items())[: 6 - (version == 1)])  # once a version that is smaller
        works = broadcast(sender, sent.values())
        names = [str(one.dtype).removeprefix("torch.") for one in sent.values()]
        for (name, expected), (got_name, got) in zip(
            sent.items(), receive(list(sent), names, [list(one.shape) for one in sent.values()]), strict=True
        ):
            assert name == got_name and got.dtype == expected.dtype and torch.equal(got, expected)
            places.append((name, got.data_ptr()))
        for work in works:
            work.wait()
    assert len(set(places)) == 6, "a parameter took other memory in another version"
