import dataclasses
import hashlib
import random
import resource
import struct
from pathlib import Path

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r2m_async import codec
from r2m_async.codec import SCHEMA, decode, encode
from r2m_async.errors import CodecError
from r2m_async.trajectories import PolicyFeedback, Prompt, Ticket, Trajectory, TrajectoryGroup, Weights

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


TUPLE, TENSOR, RECORD = 1, 2, 3  # the codes of the extension types


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left == right and type(left) is type(right)


tensors = st.builds(
    lambda dtype, shape, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 5).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 99),
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | tensors
)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


def group() -> TrajectoryGroup:
    prompt = Prompt(prompt_id="posts:1", content=(("user", "hej"),), text="hej", token_ids=(1, 2))
    trajectory = Trajectory(
        token_ids=torch.tensor([1, 2, 3]),
        prompt_len=2,
        behaviour_logprobs=torch.tensor([0.0, 0.0, -0.5]),
        policy_versions=torch.tensor([-1, -1, 4], dtype=torch.int32),
        finish_reason="stop",
        text="då",
    )
    return TrajectoryGroup(
        ticket=Ticket(group_id=7, due_step=3, seed=2**62, attempt=1, prompt=prompt),
        trajectories=(trajectory,),
        greedy=None,
    )


@given(trees)
@settings(deadline=None)
def test_whatever_is_encoded_decodes_to_the_same(tree):
    assert same(decode(encode(tree)), tree)


def test_a_trajectory_group_crosses_whole_with_its_types():
    back = decode(bytes(encode([group()])))[0]
    original = group()
    assert type(back) is TrajectoryGroup and back.ticket == original.ticket
    assert same(back.trajectories[0].token_ids, original.trajectories[0].token_ids)
    assert back.trajectories[0].oldest_version == 4 and back.greedy is None


def test_decoded_tensors_share_the_buffers_memory_and_are_aligned():
    buffer = encode({"a": torch.zeros(3), "b": torch.arange(5.0)})
    tensor = decode(buffer)["b"]
    buffer[-20:-16] = struct.pack("<f", 42.0)
    assert tensor[0] == 42.0
    assert tensor.data_ptr() % 64 == decode(buffer)["a"].data_ptr() % 64


def test_bfloat16_keeps_its_bits():
    bits = torch.randint(-(2**15), 2**15, (1000,), dtype=torch.int16)
    assert torch.equal(decode(encode(bits.view(torch.bfloat16))).view(torch.int16), bits)


def test_every_cut_of_a_buffer_is_refused():
    whole = bytes(encode(Weights(version=1, tensors={"w": torch.ones(4, 4)})))
    for length in range(len(whole)):
        with pytest.raises(CodecError):
            decode(whole[:length])


@given(st.binary(max_size=80), st.integers(0, 300))
@settings(deadline=None)
def test_damaged_buffers_never_raise_anything_but_codec_errors(noise, where):
    whole = bytearray(encode([group(), {"x": torch.ones(3)}, (1, 2)]))
    whole[where : where + len(noise)] = noise
    try:
        decode(whole)
    except CodecError:
        pass


def test_a_giant_announced_size_is_refused_without_allocating():
    header = msgpack.packb([None, [["float32", [2**40, 2**10], 0]]])
    with pytest.raises(CodecError, match="cut off"):
        decode(struct.pack("<4sIQ", b"R2MC", SCHEMA, len(header)) + header + b"\0" * 64)


def buffer_of(tree, specs, rest: bytes = bytes(64)) -> bytes:
    """As `encode` would lay it out."""
    header = msgpack.packb([msgpack.packb(tree), specs])
    return struct.pack("<4sIQ", b"R2MC", SCHEMA, len(header)) + header + rest


@pytest.mark.parametrize(
    "shape",
    [
        [2, 2, 2**62, 0],
        [0, 2, 2, 2**62],
        [2**63],
        [2**63, 0],
        [0, 2**63],
        [2**64 - 1, 0],
        [0] + [3] * 40,
        [2**32, 2**32, 0],
        [0, *[2**64 - 1] * 100_000],
    ],
    ids=lambda shape: str(shape)[:30],
)
@pytest.mark.parametrize("dtype", ["bool", "float64"])
def test_a_shape_that_no_tensor_can_have_is_refused_also_where_it_has_no_elements(shape, dtype):
    with pytest.raises(CodecError, match="has a tensor"):
        decode(buffer_of(None, [[dtype, shape, 0]]))


def test_the_largest_shape_without_elements_is_read():
    huge = torch.empty(2**61, 2, 0, 1)
    assert decode(encode(huge)).shape == huge.shape


def test_a_record_whose_fields_are_of_other_types_is_refused():
    def record(name, **fields):
        return msgpack.ExtType(RECORD, msgpack.packb([name, fields]))

    vector = msgpack.ExtType(TENSOR, msgpack.packb(0))
    ticket = dict(group=1, rewards=2)
    whole = dict(token_ids=vector, behaviour_logprobs=vector, policy_versions=vector, prompt_len=1, text="")
    for broken in (
        record("ScoredGroup", **ticket),
        record("ScoredGroup", group=None, rewards=vector),
        record("Trajectory", **whole, finish_reason=vector),
        record("Trajectory", **whole | {"prompt_len": vector}, finish_reason="stop"),
        record("Trajectory", **whole | {"token_ids": 3}, finish_reason="stop"),
        msgpack.ExtType(TENSOR, msgpack.packb(-1)),
        msgpack.ExtType(TENSOR, msgpack.packb(True)),
        msgpack.ExtType(TENSOR, msgpack.packb([0])),
    ):
        with pytest.raises(CodecError):
            decode(buffer_of(broken, [["float32", [2], 0]]))


def random_header(rng: random.Random) -> bytes:
    """Well-formed msgpack of the right outline, with numbers at and beyond every limit."""
    numbers = (0, 1, 2, 3, 7, 64, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, True, 1.5, None, "x", b"", [])

    def tree(depth: int = 0):
        kind = rng.randrange(8 if depth < 3 else 2)
        if kind == 0:
            return rng.choice(numbers)
        if kind == 1:
            return msgpack.ExtType(TENSOR, msgpack.packb(rng.choice((0, 0, 1, 5, -1))))
        if kind == 2:
            return msgpack.ExtType(TUPLE, msgpack.packb([tree(depth + 1)]))
        if kind == 3:
            return msgpack.ExtType(rng.randrange(6), rng.randbytes(rng.randrange(6)))
        if kind == 4:
            return {rng.choice(("a", "group_id")): tree(depth + 1)}
        if kind == 5:
            return [tree(depth + 1) for _ in range(rng.randrange(3))]
        fields = ("group_id", "rewards", "model_rewards", "greedy_reward", "head_version", "omega")
        name, fields = rng.choice((("GroupRewards", fields), ("ScoredGroup", ("group", "rewards")), ("Nothing", ())))
        return msgpack.ExtType(RECORD, msgpack.packb([name, {field: tree(depth + 1) for field in fields}]))

    dtypes = ("bool", "float32", "bfloat16", "int64", "float64", "complex64", "x", 3)
    specs = [
        [rng.choice(dtypes), [rng.choice(numbers) for _ in range(rng.randrange(5))], rng.choice(numbers)]
        for _ in range(rng.randrange(3))
    ]
    return buffer_of(tree(), specs, rng.randbytes(rng.choice((0, 64, 200))))


def damaged(rng: random.Random, whole: bytes) -> bytes:
    """With some bytes flipped, cut out, doubled or replaced by the msgpack codes of large things."""
    buffer = bytearray(whole)
    codes = (
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff",
        b"\xcf" + b"\xff" * 8,
    )
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(min(len(buffer), 400))
        length = rng.randrange(1, 9)
        change = rng.randrange(4)
        if change == 0:
            buffer[at] = rng.randrange(256)
        elif change == 1:
            buffer[at : at + length] = rng.choice((rng.randbytes(length), rng.choice(codes)))
        elif change == 2:
            del buffer[at : at + length]
        else:
            buffer[at:at] = buffer[at : at + length]
    return bytes(buffer)


def test_ten_thousand_damaged_buffers_are_refused_or_read_as_something_that_can_be_written_in_little_memory():
    rng = random.Random(15)
    sound = [
        bytes(encode(one))
        for one in (
            [group()],
            (1, {"x": torch.ones(3)}),
            Weights(version=1, tensors={"w": torch.ones(4, 4)}),
            torch.empty(0, 5),
        )
    ]
    refused = 0
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limits[1]))  # what allocates by an announced size fails
    try:
        for number in range(10_000):
            buffer = random_header(rng) if number % 2 else damaged(rng, rng.choice(sound))
            try:
                read = decode(buffer)
            except CodecError:
                refused += 1
                continue
            written = encode(read)
            assert bytes(encode(decode(written))) == bytes(written)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert 5_000 < refused < 9_500


def test_another_schema_is_refused_with_both_numbers():
    buffer = encode(1)
    buffer[4] = SCHEMA + 1
    with pytest.raises(CodecError, match=f"schema {SCHEMA + 1}; this version reads 6"):
        decode(buffer)


def test_what_cannot_be_written_is_named():
    with pytest.raises(CodecError, match="builtins.set"):
        encode({"x": {1, 2}})


def test_a_record_of_unknown_fields_is_refused():
    class Intruder:
        pass

    with pytest.raises(CodecError, match="Intruder"):
        encode(Intruder())
    feedback = PolicyFeedback(group_id=1, hidden_states=(torch.ones(2, 3),), greedy=None, policy_version=0)
    damaged = bytes(encode(feedback)).replace(b"policy_version", b"policy_virsion")
    with pytest.raises(CodecError, match="policy_virsion"):
        decode(damaged)


def test_the_same_object_is_always_the_same_bytes():
    tree = {"a": torch.ones(3), "b": torch.arange(5, dtype=torch.uint8), "c": group()}
    assert len({bytes(encode(tree)) for _ in range(20)}) == 1


def test_a_change_of_a_records_fields_needs_another_schema():
    """Readers of the old layout would fail somewhere else, or take one field for another: raise SCHEMA with these digits."""
    fields = {
        name: [(field.name, str(field.type)) for field in dataclasses.fields(record)]
        for name, record in sorted(codec._RECORDS.items())
    }
    assert (SCHEMA, hashlib.sha256(repr(fields).encode()).hexdigest()[:16]) == (10, "a6b251515e871be3")
