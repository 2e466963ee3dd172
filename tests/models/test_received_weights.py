"""Weights that are broadcast over gloo arrive as they were sent, in memory that is used again, in as few messages as fit."""

import threading
from datetime import timedelta

import pytest
import torch

from r2m_async.models import weights
from r2m_async.models.weights import Buckets, ReceivedWeights, broadcast, messages


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


def in_buckets(tensors):
    """Copies of tensors in buckets, as a learner stages them."""
    buckets = Buckets()
    return [buckets.place(one.dtype, one.shape).copy_(one) for one in tensors]


@pytest.mark.parametrize("bucket", [64, 256, 1 << 20])
def test_every_parameter_arrives_as_it_was_sent_and_the_next_version_takes_the_same_memory(monkeypatch, bucket):
    monkeypatch.setattr(weights, "_BUCKET", bucket)
    sender, receiver = groups()
    receive = ReceivedWeights(receiver)
    places = []
    for version in range(3):
        generator = torch.Generator().manual_seed(version)
        sent = {
            "none": torch.empty(4, 0),
            "odd": torch.randn(3, 7, generator=generator),
            "scalar": torch.tensor(float(version)),
            "short": torch.randn(7, generator=generator).bfloat16(),
            "bytes": torch.arange(33 + version, 64 + version).to(torch.int8),
            "after an odd size": torch.randn(2, 3, generator=generator).double(),
            "flags": torch.rand(5, generator=generator) < 0.5,
            "empty": torch.empty(0, 4),
            "transposed": torch.randn(5, 11, generator=generator).T,
            "large": torch.randn(1000, 300, generator=generator),
            "counts": torch.arange(9) + version,
            "last": torch.randn(1, generator=generator),
        }
        sent = dict(list(sent.items())[: 12 - 2 * (version == 1)])  # once a version that is smaller
        works = broadcast(sender, messages(in_buckets(sent.values())).values())
        names = [str(one.dtype).removeprefix("torch.") for one in sent.values()]
        for (name, expected), (got_name, got) in zip(
            sent.items(), receive(list(sent), names, [list(one.shape) for one in sent.values()]), strict=True
        ):
            assert name == got_name and got.dtype == expected.dtype and torch.equal(got, expected)
            places.append((name, got.data_ptr()))
        for work in works:
            work.wait()
    assert len(set(places)) == 12, "a parameter took other memory in another version"


def test_parameters_share_messages_up_to_the_size_of_a_bucket_and_a_larger_one_has_its_own(monkeypatch):
    monkeypatch.setattr(weights, "_BUCKET", 256)
    sizes = [64, 1, 100, 64, 65, 1000, 0, 256, 4]  # each begins at a multiple of 64
    placed = in_buckets([torch.zeros(size, dtype=torch.uint8) for size in sizes])
    assert [len(one) for one in messages(placed).values()] == [64 + 64 + 100, 64 + 65, 1000, 256, 4]
    assert not messages([])


def test_a_staged_version_is_sent_from_where_it_lies():
    [first, second] = in_buckets([torch.ones(3), torch.ones(70)])
    [message] = messages([first, second]).values()
    assert message.data_ptr() == first.data_ptr() and len(message) == 64 + second.nbytes
