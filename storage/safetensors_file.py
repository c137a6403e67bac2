"""One safetensors file: its table of tensors, and their bytes by position.

The format is 8 bytes with the length of a JSON header, the header, then the bytes of all tensors without a gap. It is
read here and not through the `safetensors` library: that maps the file into memory or loads whole tensors, has no
NumPy type for BF16, and does not say where a tensor lies, so rows of one could not be read alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.errors import ModelFileError, UnsupportedError
from edgert.storage.flash import FlashFile
from edgert.storage.json_file import JsonObject, parse_json, short

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMS = 8

# Bytes of an element. Kinds that are not here (sub-byte ones, newer ones) are refused by name.
ELEMENT_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
_DAMAGED = "the file is damaged: download it again"


class StoredTensor(NamedTuple):
    """Where a tensor lies. offset and n_bytes count from the start of the file; rows run along the last dimension."""

    kind: str  # as the format names it: "BF16"
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class SafetensorsFile:
    """An open safetensors file; reads are positional, from any number of threads.

    Raises ModelFileError for a file that is absent, unreadable, truncated or inconsistent, UnsupportedError for kinds
    of numbers that edgert does not know.
    """

    path: Path
    n_bytes: int
    tensors: dict[str, StoredTensor]  # in the order of their bytes

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = FlashFile(path, direct=False)
        self.n_bytes = self._file.n_bytes
        try:
            self.tensors = self._read_table()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; later reads raise ModelFileError."""
        self._file.close()

    def read(self, offset: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out`, uint8 (n,), with the bytes from `offset` on. Raises ModelFileError."""
        self._file.read(offset, out)

    def _bytes(self, offset: int, n_bytes: int) -> bytes:
        raw = np.empty(n_bytes, np.uint8)
        self._file.read(offset, raw)
        return raw.tobytes()

    def _read_table(self) -> dict[str, StoredTensor]:
        if self.n_bytes < 8:
            raise ModelFileError(f"{self.path}: {self.n_bytes} bytes are no safetensors file; download it again")
        start = self._bytes(0, min(24, self.n_bytes))
        if start.startswith(b"version https://git-lfs"):
            raise ModelFileError(f"{self.path}: a Git LFS pointer, not the model itself; run `git lfs pull`")
        n_header = int.from_bytes(start[:8], "little")
        if not 2 <= n_header <= min(MAX_HEADER_BYTES, self.n_bytes - 8) or start[8:9] != b"{":
            raise ModelFileError(
                f"{self.path}: not a safetensors file, or a truncated one: its header would have {n_header:,} bytes, "
                f"the file has {self.n_bytes:,}; download it again"
            )
        header = parse_json(self._bytes(8, n_header), f"{self.path}: the header")
        names = [name for name in header.values if name != "__metadata__"]
        tensors = [(name, self._tensor(name, header.object(name), 8 + n_header)) for name in names]
        return self._checked(sorted(tensors, key=lambda item: item[1][2:]), 8 + n_header)

    def _tensor(self, name: str, entry: JsonObject, data_start: int) -> StoredTensor:
        kind, shape, offsets = entry.text("dtype"), entry.array("shape"), entry.array("data_offsets")
        if kind not in ELEMENT_BYTES:
            raise UnsupportedError(
                f"{self.path}: the tensor {short(name)} holds {short(kind)} numbers, which edgert cannot read; "
                "take the model in BF16, F16 or F32"
            )
        for values, key, length in ((shape, "shape", range(MAX_DIMS + 1)), (offsets, "data_offsets", (2,))):
            if len(values) not in length or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
                entry.wrong(key, values, "a short list of sizes")
        begin, end = offsets
        if end - begin != math.prod(shape) * ELEMENT_BYTES[kind]:
            raise ModelFileError(
                f"{self.path}: the tensor {short(name)} {tuple(shape)} of {kind} has {end - begin:,} bytes, "
                f"not {math.prod(shape) * ELEMENT_BYTES[kind]:,}; {_DAMAGED}"
            )
        return StoredTensor(kind, tuple(shape), data_start + begin, end - begin)

    def _checked(self, tensors: list[tuple[str, StoredTensor]], data_start: int) -> dict[str, StoredTensor]:
        """The table, once its tensors follow one another without overlap or gap up to the end of the file."""
        end = data_start
        for name, tensor in tensors:
            if tensor.offset != end:
                raise ModelFileError(
                    f"{self.path}: the tensor {short(name)} begins at byte {tensor.offset:,}, not at {end:,} where the "
                    f"one before ends; {_DAMAGED}"
                )
            end += tensor.n_bytes
        if end != self.n_bytes:
            raise ModelFileError(
                f"{self.path}: its tensors end at byte {end:,}, the file at {self.n_bytes:,}; "
                f"{'it is truncated: download it again' if end > self.n_bytes else _DAMAGED}"
            )
        return dict(tensors)
