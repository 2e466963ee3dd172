"""The format in which objects are sent to other processes and written to disk.

An object becomes one buffer. Its structure is stored as msgpack, and its tensors as raw bytes:

    magic "R2MC" | schema u32 | header length u64 | msgpack header | 64-byte aligned little-endian tensor data

The header is `[packed tree, [[dtype, shape, offset], ...]]`. In the tree, a tensor is an index into that list. Tensors,
tuples and records are msgpack extension types. A record is a dataclass of `trajectories`. A field that is None, as it is
by default, is left out.

`decode` checks the size of every tensor against the buffer before it makes the tensor. The tensors share the memory of
the buffer. Nothing is ever unpickled, so a buffer cannot run code.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import sys
import warnings
from typing import Any

import msgpack

from r2m_async import trajectories
from r2m_async.errors import CodecError

SCHEMA = 10
"""The version of the format. Increase it with any change of the layout or of a record's fields."""
READABLE = (6, 7, 8, 9, SCHEMA)
"""The schemas that `decode` reads. It refuses all others.

Schema 6 had all fields but those that `trajectories` has had a default of None for since. Schema 7 had all but
`GroupReport.newest_version`, which no file of that time holds. Schema 8 had no labels. In schema 9 labelled pairs had no
`weight`: `decode` refuses those alone, by name.
"""

_MAGIC = b"R2MC"
_PREFIX = struct.Struct("<4sIQ")
_ALIGNMENT = 64
_TUPLE, _TENSOR, _RECORD = 1, 2, 3
_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
_RECORDS: dict[str, Any] = {name: one for name, one in vars(trajectories).items() if dataclasses.is_dataclass(one)}

if sys.byteorder != "little":
    raise ImportError("r2m_async.codec writes tensors as they lie in memory and needs a little-endian machine")


def encode(obj: Any) -> memoryview:
    """Writes an object into a new buffer, which `decode` reads.

    The object may be or contain None, bool, int, float, str, bytes, list, tuple, dict, tensors, and the records of
    `trajectories`. Tensors are written in contiguous layout; those on a GPU are first copied to the CPU.

    Raises CodecError, naming the type, for anything else.
    """
    import numpy as np

    header, arrays, start, size = _layout(obj)
    buffer = np.empty(size, np.uint8)
    view = buffer.data
    _PREFIX.pack_into(view, 0, _MAGIC, SCHEMA, len(header))
    view[_PREFIX.size : _PREFIX.size + len(header)] = header
    end = _PREFIX.size + len(header)
    for offset, array in arrays:
        # The gaps between tensors are written too: `np.empty` leaves old memory in them, which must not be sent, and
        # equal objects must give equal bytes.
        buffer[end : start + offset] = 0
        end = start + offset + len(array)
        buffer[start + offset : end] = array
    buffer[end:] = 0
    return view


def encoded_size(obj: Any) -> int:
    """The number of bytes of `encode(obj)`, without writing them. Raises CodecError as `encode` does."""
    return _layout(obj)[-1]


def decode(buffer: Any) -> Any:
    """Reads the object that `encode` wrote into `buffer`, a bytes-like object.

    The tensors share the memory of `buffer`: treat them as read-only.

    Raises CodecError for a buffer that `encode` did not write, or that is cut off. Sizes in the header are checked
    first, so a damaged header cannot make it allocate memory.
    """
    view = memoryview(buffer).cast("B")
    if len(view) < _PREFIX.size:
        raise CodecError(f"{len(view)} bytes are too few for a header of {_PREFIX.size}")
    magic, schema, header_len = _PREFIX.unpack_from(view)
    if magic != _MAGIC:
        raise CodecError(f"starts with {bytes(magic)!r}, not {_MAGIC!r}: not written by r2m_async.codec")
    if schema not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise CodecError(f"has schema {schema}; this version reads {known}: use the same r2m-async on both sides")
    if header_len > len(view) - _PREFIX.size:
        raise CodecError(f"announces a header of {header_len} bytes and has {len(view) - _PREFIX.size}: cut off")
    try:
        # The tree lies in the header as bytes of its own. It is unpacked only after all tensors have been checked.
        tree, specs = msgpack.unpackb(view[_PREFIX.size : _PREFIX.size + header_len])
        start = _aligned(_PREFIX.size + header_len)
        tensors = [_tensor(view, start, *spec) for spec in specs]
        return _unpack(msgpack.unpackb(tree, strict_map_key=False), tensors)
    except CodecError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, msgpack.UnpackException) as error:
        raise CodecError(f"has a header that cannot be read: {error}") from error


def _layout(obj: Any) -> tuple[bytes, list[tuple[int, Any]], int, int]:
    """Plans a buffer: (header, [(offset, bytes of a tensor), ...], start of the tensor data, size of the buffer).

    Offsets count from the start of the tensor data.
    """
    tensors: list[Any] = []
    tree = _pack(obj, tensors)
    specs, arrays, end = [], [], 0
    for tensor in tensors:
        array = _bytes_of(tensor)
        offset = _aligned(end)
        specs.append([str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset])
        arrays.append((offset, array))
        end = offset + len(array)
    header = msgpack.packb([tree, specs])
    start = _aligned(_PREFIX.size + len(header))
    return header, arrays, start, start + end


def _aligned(offset: int) -> int:
    """The next multiple of 64 bytes, or `offset` itself if it is one."""
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _pack(obj: Any, tensors: list) -> bytes:
    """The msgpack tree of an object. The tensors found in it are appended to `tensors`. Raises CodecError."""

    def extend(value: Any) -> msgpack.ExtType:
        if isinstance(value, tuple):
            return msgpack.ExtType(_TUPLE, _pack(list(value), tensors))
        if type(value) is _RECORDS.get(type(value).__name__):
            fields = {
                field.name: own
                for field in dataclasses.fields(value)
                if (own := getattr(value, field.name)) is not None or field.default is not None
            }
            return msgpack.ExtType(_RECORD, _pack([type(value).__name__, fields], tensors))
        if str(getattr(value, "dtype", "")).removeprefix("torch.") in _DTYPES and hasattr(value, "detach"):
            tensors.append(value)
            return msgpack.ExtType(_TENSOR, msgpack.packb(len(tensors) - 1))
        raise CodecError(f"cannot write a {type(value).__module__}.{type(value).__qualname__}")

    try:
        # With `strict_types`, msgpack hands tuples and subclasses of its own types to `extend`. Otherwise it would
        # write a tuple as a list, and it would come back as a list.
        return msgpack.packb(obj, default=extend, strict_types=True)
    except (OverflowError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, CodecError):
            raise
        raise CodecError(f"cannot write {type(obj).__qualname__}: {error}") from error


def _unpack(tree: Any, tensors: list) -> Any:
    """Replaces the extension types in a msgpack tree by the tuples, tensors and records that they stand for.

    Raises CodecError for an extension type, a tensor's index or a record that it does not know.
    """
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    if isinstance(tree, dict):
        return {key: _unpack(item, tensors) for key, item in tree.items()}
    if not isinstance(tree, msgpack.ExtType):
        return tree
    inner = msgpack.unpackb(tree.data, strict_map_key=False)
    if tree.code == _TENSOR:
        if type(inner) is not int or not 0 <= inner < len(tensors):
            raise CodecError(f"has a tensor {inner!r} of {len(tensors)}")
        return tensors[inner]
    if tree.code == _TUPLE:
        return tuple(_unpack(inner, tensors))
    if tree.code != _RECORD:
        raise CodecError(f"has an extension type {tree.code} that schema {SCHEMA} does not know")
    name, fields = inner
    record = _RECORDS.get(name)
    if record is None:
        raise CodecError(f"has a record {name!r}; known are {', '.join(sorted(_RECORDS))}")
    expected = {field.name for field in dataclasses.fields(record)}
    needed = {field.name for field in dataclasses.fields(record) if field.default is not None}
    if not needed <= set(fields) <= expected:
        raise CodecError(f"has a {name} with fields {sorted(fields)}; expected {sorted(expected)}")
    values = _unpack(fields, tensors)
    try:
        return record(**values)
    except (AttributeError, RuntimeError) as error:  # the record's own checks met a value of the wrong type
        raise CodecError(f"has a {name} of wrong values: {error}") from error


def _bytes_of(tensor: Any) -> Any:
    """The bytes of a tensor as a numpy array of uint8."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else flat.to(torch.uint8).numpy()


def _tensor(view: memoryview, start: int, dtype: str, shape: list[int], offset: int) -> Any:
    """A tensor on the memory of `view`, `offset` bytes after `start`. Raises CodecError unless it fits into `view`."""
    import torch

    if dtype not in _DTYPES:
        raise CodecError(f"has a tensor of dtype {dtype!r}; known are {', '.join(_DTYPES)}")
    if not all(type(size) is int and size >= 0 for size in (*shape, offset)):
        raise CodecError(f"has a tensor of shape {shape} at offset {offset}")
    span = 1
    for size in shape:  # torch computes strides with these products, even if another dimension is 0
        span *= max(size, 1)
        if span >= 2**63:
            raise CodecError(f"has a tensor of shape {shape[:8]}, {len(shape)} dimensions: no tensor can be so large")
    torch_dtype = getattr(torch, dtype)
    count = math.prod(shape)
    begin, num_bytes = start + offset, count * torch_dtype.itemsize
    if begin + num_bytes > len(view):
        told = f"{dtype}{shape} of {num_bytes} bytes at {begin}"
        raise CodecError(f"has a tensor {told} and ends at {len(view)}: cut off")
    if count == 0:
        return torch.empty(shape, dtype=torch_dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(view, dtype=torch_dtype, count=count, offset=begin).reshape(shape)
