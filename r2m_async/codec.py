"""How objects cross process boundaries and reach the disk: msgpack for the tree, raw buffers for the tensors.

    magic "R2MC" | schema u32 | header length u64 | msgpack header | 64-byte aligned little-endian tensor data

The header is `[packed tree, [[dtype, shape, offset], ...]]`; in the tree a tensor is its index, a tuple and a record
(one of the dataclasses of `trajectories`) are msgpack extension types. `decode` checks every size against the buffer
before it makes anything and returns tensors that share the buffer's memory; nothing is ever unpickled.
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

SCHEMA = 3
"""Raise it with any change of layout or of a record's fields: readers refuse what they do not know."""

_MAGIC = b"R2MC"
_PREFIX = struct.Struct("<4sIQ")
_ALIGNMENT = 64
_TUPLE, _TENSOR, _RECORD = 1, 2, 3
_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
_RECORDS = {name: record for name, record in vars(trajectories).items() if dataclasses.is_dataclass(record)}

if sys.byteorder != "little":
    raise ImportError("r2m_async.codec writes tensors as they lie in memory and needs a little-endian machine")


def encode(obj: Any) -> memoryview:
    """Writes None, bool, int, float, str, bytes, list, tuple, dict, tensors and the records of `trajectories`.

    Tensors are written contiguous and from the CPU. Raises `CodecError` naming the type that cannot be written.
    """
    import numpy as np

    header, arrays, start, size = _layout(obj)
    buffer = np.empty(size, np.uint8)
    view = memoryview(buffer)
    _PREFIX.pack_into(view, 0, _MAGIC, SCHEMA, len(header))
    view[_PREFIX.size : _PREFIX.size + len(header)] = header
    end = _PREFIX.size + len(header)
    for offset, array in arrays:
        buffer[end : start + offset] = 0
        end = start + offset + len(array)
        buffer[start + offset : end] = array
    buffer[end:] = 0
    return view


def encoded_size(obj: Any) -> int:
    """Bytes that `encode(obj)` takes, without writing them."""
    return _layout(obj)[-1]


def decode(buffer: Any) -> Any:
    """Reads what `encode` wrote. Tensors share `buffer`'s memory: treat them as read-only.

    Raises `CodecError` for anything else, whole or cut off, before allocating for it.
    """
    view = memoryview(buffer).cast("B")
    if len(view) < _PREFIX.size:
        raise CodecError(f"{len(view)} bytes are too few for a header of {_PREFIX.size}")
    magic, schema, header_len = _PREFIX.unpack_from(view)
    if magic != _MAGIC:
        raise CodecError(f"starts with {bytes(magic)!r}, not {_MAGIC!r}: not written by r2m_async.codec")
    if schema != SCHEMA:
        raise CodecError(f"has schema {schema}; this version reads {SCHEMA}: use the same r2m-async on both sides")
    if header_len > len(view) - _PREFIX.size:
        raise CodecError(f"announces a header of {header_len} bytes and has {len(view) - _PREFIX.size}: cut off")
    try:
        tree, specs = msgpack.unpackb(view[_PREFIX.size : _PREFIX.size + header_len])
        start = _aligned(_PREFIX.size + header_len)
        tensors = [_tensor(view, start, *spec) for spec in specs]
        return _unpack(msgpack.unpackb(tree, strict_map_key=False), tensors)
    except CodecError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, msgpack.UnpackException) as error:
        raise CodecError(f"has a header that cannot be read: {error}") from error


def _layout(obj: Any) -> tuple[bytes, list[tuple[int, Any]], int, int]:
    """(header, [(offset, tensor bytes)], start of the tensor data, size of all)."""
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
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _pack(obj: Any, tensors: list) -> bytes:
    def extend(value: Any) -> msgpack.ExtType:
        if isinstance(value, tuple):
            return msgpack.ExtType(_TUPLE, _pack(list(value), tensors))
        if type(value) is _RECORDS.get(type(value).__name__):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return msgpack.ExtType(_RECORD, _pack([type(value).__name__, fields], tensors))
        if str(getattr(value, "dtype", "")).removeprefix("torch.") in _DTYPES and hasattr(value, "detach"):
            tensors.append(value)
            return msgpack.ExtType(_TENSOR, msgpack.packb(len(tensors) - 1))
        raise CodecError(f"cannot write a {type(value).__module__}.{type(value).__qualname__}")

    try:
        return msgpack.packb(obj, default=extend, strict_types=True)
    except (OverflowError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, CodecError):
            raise
        raise CodecError(f"cannot write {type(obj).__qualname__}: {error}") from error


def _unpack(tree: Any, tensors: list) -> Any:
    """Puts tuples, tensors and records back in the places of their extension types."""
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
    if set(fields) != expected:
        raise CodecError(f"has a {name} with fields {sorted(fields)}; expected {sorted(expected)}")
    values = _unpack(fields, tensors)
    try:
        return record(**values)
    except (AttributeError, RuntimeError) as error:  # its own checks met a value of another type
        raise CodecError(f"has a {name} of wrong values: {error}") from error


def _bytes_of(tensor: Any) -> Any:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else flat.to(torch.uint8).numpy()


def _tensor(view: memoryview, start: int, dtype: str, shape: list[int], offset: int) -> Any:
    import torch

    if dtype not in _DTYPES:
        raise CodecError(f"has a tensor of dtype {dtype!r}; known are {', '.join(_DTYPES)}")
    if not all(type(size) is int and size >= 0 for size in (*shape, offset)):
        raise CodecError(f"has a tensor of shape {shape} at offset {offset}")
    span = 1
    for size in shape:  # torch counts strides so, also where another dimension is 0
        span *= max(size, 1)
        if span >= 2**63:
            raise CodecError(f"has a tensor of shape {shape[:8]}, {len(shape)} dimensions: no tensor can be so large")
    torch_dtype = getattr(torch, dtype)
    count = math.prod(shape)
    begin, num_bytes = start + offset, count * torch_dtype.itemsize
    if begin + num_bytes > len(view):
        size = f"{dtype}{shape} of {num_bytes} bytes at {begin}"
        raise CodecError(f"has a tensor {size} and ends at {len(view)}: cut off")
    if count == 0:
        return torch.empty(shape, dtype=torch_dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(view, dtype=torch_dtype, count=count, offset=begin).reshape(shape)
