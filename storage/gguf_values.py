"""What the header of a GGUF file holds, once it has proved sound: values by key, and where each tensor lies.

Nothing here reads a file; gguf_header.py does, and checks.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGMLQuantizationType


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies and what it is.

    shape is in numpy's order, slowest dimension first (GGUF's dimensions reversed); offset is in bytes from
    the start of the file parts[part].
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    part: int
    offset: int
    n_bytes: int

    @property
    def n_rows(self) -> int:
        """Rows along the last dimension: the product of all others."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.n_bytes // self.n_rows


@dataclass(frozen=True, slots=True)
class Strings:
    """A string array as it lies in the file: lengths and bytes in turn, already checked."""

    raw: bytearray
    count: int

    def decode(self) -> list[str]:
        """The strings; bytes that are not UTF-8 as lone surrogates."""
        raw, unpack, end = self.raw, struct.Struct("<Q").unpack_from, 0
        strings = []
        for _ in range(self.count):
            start = end + 8
            end = start + unpack(raw, end)[0]
            strings.append(raw[start:end].decode("utf-8", "surrogateescape"))
        return strings


class Metadata(Mapping[str, Any]):
    """The metadata of a model by key: int, float, bool, str, numpy array, or list[str] for a string array.

    A string array is decoded when it is first asked for. Its bytes that are not UTF-8 become lone surrogates,
    so that `text.encode("utf-8", "surrogateescape")` gives a token's bytes back; in a plain string, which
    people read, they become U+FFFD.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, Strings):
            value = self._values[key] = value.decode()
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
