"""The header of one GGUF file: its metadata and its table of tensors, never their data.

The file is hostile until it has proved sound: every count, length and offset is checked against the bytes
that the file has, and against a cap, before anything is allocated for it. gguf.GGUFReader takes 7 s for a
vocabulary of 150,000 tokens where this takes 0.05 s, so only gguf's constants are used here.
"""

from __future__ import annotations

import io
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from edgert.errors import ModelFileError, UnsupportedError
from edgert.storage.gguf_values import Metadata, Strings, TensorInfo

# Caps on what a header may ask for, each far above any real model (6,000 tensors, 300,000 tokens, 50 keys).
# They bound time and memory for a sparse file, whose size on paper costs its maker nothing.
MAX_HEADER_BYTES = 256 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_STRINGS = 1 << 22  # in arrays, all keys together
MAX_INNER_ARRAYS = 1 << 14  # all keys together; no model is known that has any
MAX_DEPTH = 4  # of arrays in arrays
MAX_DIMS = 4
CHUNK = 64 << 10  # bytes of the smallest read: what opening may read past the header

DOWNLOAD = "the file is damaged: download it again"

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_COUNTS = struct.Struct("<QQ")
_ARRAY_HEAD = struct.Struct("<IQ")
_DIMS_TYPE_OFFSET = [struct.Struct(f"<{n}QIQ") for n in range(MAX_DIMS + 1)]
_SMALLEST_KEY = 8 + 1 + 4 + 1  # bytes: name length, name, type, value
_SMALLEST_TENSOR = 8 + 1 + 4 + 4 + 8  # bytes: name length, name, n_dims, type, offset

_SCALARS: dict[int, tuple[struct.Struct, np.dtype[Any]]] = {
    int(kind): (struct.Struct("<" + code), np.dtype("<" + dtype))
    for kind, code, dtype in (
        (GGUFValueType.BOOL, "?", "u1"),
        (GGUFValueType.UINT8, "B", "u1"),
        (GGUFValueType.INT8, "b", "i1"),
        (GGUFValueType.UINT16, "H", "u2"),
        (GGUFValueType.INT16, "h", "i2"),
        (GGUFValueType.UINT32, "I", "u4"),
        (GGUFValueType.INT32, "i", "i4"),
        (GGUFValueType.UINT64, "Q", "u8"),
        (GGUFValueType.INT64, "q", "i8"),
        (GGUFValueType.FLOAT32, "f", "f4"),
        (GGUFValueType.FLOAT64, "d", "f8"),
    )
}
_BOOL, _STRING, _ARRAY = int(GGUFValueType.BOOL), int(GGUFValueType.STRING), int(GGUFValueType.ARRAY)

_TENSOR_TYPES: dict[int, tuple[GGMLQuantizationType, int, int]] = {  # id: type, elements, bytes of a block
    int(kind): (kind, block, size) for kind, (block, size) in GGML_QUANT_SIZES.items()
}
_RETIRED_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
_LAST_PLAUSIBLE_TYPE = 255  # ggml counts its types upwards from 0: a higher id is damage, not a newer ggml


class HeaderReader:
    """Parses the header of one open file: `HeaderReader(file, path, part).parse()`.

    header_only: the file may be the beginning of one, and end anywhere behind the header.
    """

    def __init__(self, file: io.FileIO, path: Path, part: int = 0, *, header_only: bool = False) -> None:
        self._file = file
        self._path = path
        self._part = part
        self._header_only = header_only
        self._size = os.fstat(file.fileno()).st_size
        self._data = bytearray()  # the file's first bytes, as far as they were needed
        self._position = 0
        self._left = {"strings": MAX_STRINGS, "inner arrays": MAX_INNER_ARRAYS}

    def parse(self) -> tuple[Metadata, dict[str, TensorInfo]]:
        """Return the metadata and the tensors, in the order of the file.

        Raises ModelFileError for a file that is not GGUF, truncated or inconsistent, UnsupportedError for a
        version, byte order or tensor type that edgert does not read.
        """
        self._check_magic()
        self._check_version()
        n_tensors, n_keys = self._take(_COUNTS, "the header")
        self._check_count("keys", n_keys, MAX_KEYS, _SMALLEST_KEY)
        self._check_count("tensors", n_tensors, MAX_TENSORS, _SMALLEST_TENSOR)
        metadata = Metadata(self._read_keys(n_keys))
        tensors = self._read_tensors(n_tensors)
        return metadata, self._place(tensors, self._alignment(metadata))

    # -- magic, version, counts

    def _check_magic(self) -> None:
        if self._size == 0:
            raise ModelFileError(f"{self._path}: the file is empty; download it again")
        self._need(min(self._size, 24), "the header")
        start = bytes(self._data[:24])
        if start.startswith(b"version https://git-lfs"):
            raise ModelFileError(f"{self._path}: a Git LFS pointer, not the model itself; run `git lfs pull`")
        if not start.startswith(b"GGUF"):
            raise ModelFileError(
                f"{self._path}: not a GGUF file (it starts with {start[:4]!r} instead of b'GGUF'); name a .gguf file"
            )
        self._position = 4

    def _check_version(self) -> None:
        (version,) = self._take(_U32, "the version")
        if version in (2, 3):
            return
        if version == 0:
            raise self._damaged("the GGUF version is 0")
        if version & 0xFFFF == 0:
            raise UnsupportedError(
                f"{self._path}: a big-endian GGUF file (version field {version:#010x});"
                " convert the model again as little-endian"
            )
        raise UnsupportedError(
            f"{self._path}: GGUF version {version}; edgert reads versions 2 and 3: convert the model again"
        )

    def _check_count(self, what: str, count: int, most: int, smallest: int) -> None:
        if count > most:
            raise self._damaged(f"the header says {count:,} {what}, at most {most:,} are read")
        if count * smallest > self._size - self._position:
            raise self._too_long(f"the header says {count:,} {what}, more than {self._size:,} bytes can hold")

    # -- bytes

    def _damaged(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: {what}; {DOWNLOAD}")

    def _too_long(self, what: str) -> ModelFileError:
        """The header is longer than the file."""
        if not self._header_only:
            return self._damaged(what)
        return ModelFileError(
            f"{self._path}: the header goes on behind these {self._size:,} bytes ({what}); take more of the model's "
            "file: its first 16 MB hold the header of any model known"
        )

    def _need(self, end: int, what: str) -> None:
        """Have the bytes before `end`; `what` is read there and is named when the file ends before."""
        have = len(self._data)
        if end <= have:
            return
        if end > self._size:
            raise self._too_long(f"{what} runs to byte {end:,}, but the file has {self._size:,} bytes")
        if end > MAX_HEADER_BYTES:
            raise self._damaged(f"{what} runs to byte {end:,}, a header may have {MAX_HEADER_BYTES:,}")
        target = min(self._size, max(end, have + max(CHUNK, have // 8)))
        while have < target:
            try:
                piece = os.pread(self._file.fileno(), target - have, have)
            except OSError as error:
                raise ModelFileError(
                    f"{self._path}: reading the header at byte {have:,} failed:"
                    f" {error.strerror}; check the disk, or copy the file again"
                ) from error
            if not piece:
                raise self._damaged(f"the file was {self._size:,} bytes and now ends at byte {have:,}")
            self._data += piece
            have += len(piece)

    def _take(self, form: struct.Struct, what: str) -> tuple[Any, ...]:
        start = self._position
        end = start + form.size
        if end > len(self._data):
            self._need(end, what)
        self._position = end
        return form.unpack_from(self._data, start)

    def _take_bytes(self, count: int, what: str) -> bytearray:
        start = self._position
        end = start + count
        if end > len(self._data):
            self._need(end, what)
        self._position = end
        return self._data[start:end]

    def _take_name(self, what: str) -> str:
        """The name of a key or tensor: UTF-8 and printable, so that it can be shown."""
        raw = self._take_bytes(self._take(_U64, what)[0], what)
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            name = ""
        if not name or not name.isprintable():
            raise self._damaged(f"the name of {what} is not text: {bytes(raw[:40])!r}")
        return name

    # -- keys and values

    def _read_keys(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for index in range(count):
            key = self._take_name(f"key {index}")
            if key in values:
                raise self._damaged(f"key {_short(key)} is there twice")
            what = f"key {_short(key)}"
            (kind,) = self._take(_U32, what)
            values[key] = self._value(kind, what)
        return values

    def _value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self._take(_SCALARS[kind][0], what)[0]
        if kind == _STRING:
            return self._take_bytes(self._take(_U64, what)[0], what).decode("utf-8", "replace")
        if kind == _ARRAY:
            return self._array(what, 1)
        raise self._damaged(f"{what} has the unknown value type {kind}")

    def _array(self, what: str, depth: int) -> Any:
        kind, count = self._take(_ARRAY_HEAD, what)
        if kind in _SCALARS:
            dtype = _SCALARS[kind][1]
            raw = self._take_bytes(count * dtype.itemsize, f"{what} ({count:,} values)")
            values = np.frombuffer(raw, dtype)
            return values != 0 if kind == _BOOL else values
        if kind == _STRING:
            strings = self._walk_strings(count, what)
            return strings if depth == 1 else strings.decode()
        if kind != _ARRAY:
            raise self._damaged(f"{what} is an array of the unknown value type {kind}")
        if depth == MAX_DEPTH:
            raise self._damaged(f"{what} has arrays in arrays, more than {MAX_DEPTH} deep")
        self._spend("inner arrays", count, _ARRAY_HEAD.size, what)
        return [self._array(what, depth + 1) for _ in range(count)]

    def _spend(self, kind: str, count: int, smallest: int, what: str) -> None:
        """Take `count` items off what a header may have of them; each has `smallest` bytes or more."""
        if count > self._left[kind]:
            raise self._damaged(f"{what} says {count:,} {kind}, {self._left[kind]:,} are allowed here")
        if count * smallest > self._size - self._position:
            raise self._too_long(f"{what} says {count:,} {kind}, more than {self._size:,} bytes can hold")
        self._left[kind] -= count

    def _walk_strings(self, count: int, what: str) -> Strings:
        """Step over `count` strings: only the lengths are looked at."""
        self._spend("strings", count, 8, what)
        data, unpack = self._data, _U64.unpack_from
        start = position = self._position
        done = 0
        while done < count:
            self._need(position + 8, f"{what}, item {done:,} of {count:,},")
            safe = len(data) - 8
            while position <= safe and done < count:
                position += 8 + unpack(data, position)[0]
                done += 1
        self._need(position, f"{what}, item {count:,} of {count:,},")
        self._position = position
        return Strings(data[start:position], count)

    # -- tensors

    def _read_tensors(self, count: int) -> dict[str, TensorInfo]:
        """The table as it stands: offsets count from the start of the tensor data, which is not known yet."""
        tensors: dict[str, TensorInfo] = {}
        for index in range(count):
            name = self._take_name(f"tensor {index}")
            what = f"tensor {_short(name)}"
            if name in tensors:
                raise self._damaged(f"{what} is there twice")
            (n_dims,) = self._take(_U32, what)
            if n_dims > MAX_DIMS:
                raise self._damaged(f"{what} has {n_dims} dimensions, at most {MAX_DIMS} are possible")
            *dims, kind, offset = self._take(_DIMS_TYPE_OFFSET[n_dims], what)
            if kind not in _TENSOR_TYPES:
                raise self._unknown_type(what, kind)
            ggml_type, block, block_bytes = _TENSOR_TYPES[kind]
            shape = tuple(reversed(dims))
            n_elements = math.prod(dims)
            if n_elements == 0 or n_elements >= 1 << 63:
                raise self._damaged(f"{what} has the impossible shape {shape}")
            if (dims[0] if dims else 1) % block:
                raise self._damaged(
                    f"{what} has shape {shape}, but {ggml_type.name} needs a last dimension"
                    f" that is a multiple of {block}"
                )
            n_bytes = n_elements // block * block_bytes
            tensors[name] = TensorInfo(name, shape, ggml_type, self._part, offset, n_bytes)
        return tensors

    def _unknown_type(self, what: str, kind: int) -> Exception:
        if kind in _RETIRED_TYPES:
            return UnsupportedError(
                f"{self._path}: {what} has the ggml type {kind} ({_RETIRED_TYPES[kind]}),"
                " which ggml itself has dropped; convert the model again, e.g. to Q4_0"
            )
        if kind <= _LAST_PLAUSIBLE_TYPE:
            return UnsupportedError(
                f"{self._path}: {what} has the ggml type {kind}, which the installed gguf"
                " package does not know; upgrade gguf, or take another quantisation"
            )
        return self._damaged(f"{what} has the unknown ggml type {kind}")

    def _alignment(self, metadata: Metadata) -> int:
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self._damaged(f"key 'general.alignment' is {_short(alignment)}, not a power of two")
        return alignment

    def _place(self, tensors: dict[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """Make the offsets absolute, and check that the tensors are aligned, apart and inside the file."""
        start = -(-self._position // alignment) * alignment
        placed: dict[str, TensorInfo] = {}
        for name, t in tensors.items():
            if t.offset % alignment:
                raise self._damaged(
                    f"tensor {_short(name)} is at offset {t.offset:,}, not a multiple of the alignment {alignment:,}"
                )
            placed[name] = TensorInfo(name, t.shape, t.type, t.part, start + t.offset, t.n_bytes)
        before: TensorInfo | None = None
        end = 0
        for t in sorted(placed.values(), key=lambda tensor: tensor.offset):
            if before is not None and t.offset < end:
                raise self._damaged(
                    f"tensor {_short(t.name)} at byte {t.offset:,} overlaps tensor"
                    f" {_short(before.name)}, which ends at byte {end:,}"
                )
            before, end = t, t.offset + t.n_bytes
        if before is not None and end > self._size and not self._header_only:
            raise ModelFileError(
                f"{self._path}: truncated: {end - self._size:,} bytes are missing (tensor"
                f" {_short(before.name)} ends at byte {end:,}, the file has {self._size:,});"
                " download it again"
            )
        return placed


def _short(value: object) -> str:
    """A value for a message: on one line and not endless, whatever the file holds."""
    text = ascii(value).replace("\n", " ")
    return text if len(text) <= 80 else f"{text[:77]}..."
