"""Metadata as a GGUF file without tensors: one safe reader (gguf_header.py) then serves models and bundles alike.

Values come back equal: integers as 64 bits, floats as doubles, arrays in their own type, strings byte for byte. Keys
that say how a model was split into files are left away.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gguf import GGUFValueType as Kind

_MAGIC, _VERSION = b"GGUF", 3
_SCALARS = {
    np.dtype(code): kind
    for code, kind in (
        ("?", Kind.BOOL),
        ("u1", Kind.UINT8),
        ("i1", Kind.INT8),
        ("u2", Kind.UINT16),
        ("i2", Kind.INT16),
        ("u4", Kind.UINT32),
        ("i4", Kind.INT32),
        ("u8", Kind.UINT64),
        ("i8", Kind.INT64),
        ("f4", Kind.FLOAT32),
        ("f8", Kind.FLOAT64),
    )
}


def as_gguf(metadata: Mapping[str, Any]) -> bytes:
    """A GGUF file that holds these keys and no tensor. TypeError for a value that GGUF cannot hold."""
    kept = [key for key in metadata if not key.startswith("split.")]
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, 0, len(kept))]
    for key in kept:
        parts += [_string(key), *_value(metadata[key])]
    return b"".join(parts)


def _string(text: str) -> bytes:
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a character, as JSON can spell it
        raw = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> Iterator[bytes]:
    """The type of a value, and the value."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        yield struct.pack("<I?", Kind.BOOL, value)
    elif isinstance(value, int):
        yield struct.pack("<Iq" if value < 0 else "<IQ", Kind.INT64 if value < 0 else Kind.UINT64, value)
    elif isinstance(value, float):
        yield struct.pack("<Id", Kind.FLOAT64, value)
    elif isinstance(value, str):
        yield struct.pack("<I", Kind.STRING) + _string(value)
    elif isinstance(value, (list, tuple, np.ndarray)):
        yield struct.pack("<I", Kind.ARRAY)
        yield from _array(value)
    else:
        raise TypeError(f"metadata of type {type(value).__name__}")


def _array(values: Any) -> Iterator[bytes]:
    """The type of an array's items, their number, and the items."""
    if isinstance(values, np.ndarray):
        dtype = values.dtype.newbyteorder("<")
        yield struct.pack("<IQ", _SCALARS[np.dtype(values.dtype.str[1:])], len(values)) + values.astype(dtype).tobytes()
    elif all(isinstance(value, str) for value in values):
        yield struct.pack("<IQ", Kind.STRING, len(values))
        yield from map(_string, values)
    elif all(isinstance(value, (list, tuple, np.ndarray)) for value in values):
        yield struct.pack("<IQ", Kind.ARRAY, len(values))
        for value in values:
            yield from _array(value)
    else:
        yield from _array(np.array(values))
