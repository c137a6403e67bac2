"""Where weights come from: the tensors of a model's file, packed as they are read, or a bundle, packed long ago.

A source knows tensors by GGUF's names and experts by number; what a model makes of them is weights.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgert.errors import ModelFileError
from edgert.quant import ggml, packing
from edgert.quant.formats import F32, Format, Matrix, MatrixSource, PackedPart
from edgert.quant.packing import StoredMatrix
from edgert.quant.unpacking import unpack
from edgert.storage.bundle import Bundle, part_of
from edgert.storage.tensor_file import TensorFile
from edgert.types import Floats

PROJECTIONS = ("gate", "up", "down")
_READ_BYTES = 2 << 20  # that FlashFile reads at a time on their way to unaligned memory
KEPT_ROWS = 512  # of an embedding table on flash; a row takes 1 to 10 KiB


def add_sizes(sizes: Iterable[tuple[Format, int]]) -> dict[Format, int]:
    """The bytes of each format, added up."""
    total: dict[Format, int] = {}
    for format, n_bytes in sizes:
        total[format] = total.get(format, 0) + n_bytes
    return total


class WeightSource(Protocol):
    """What Weights asks for. Shapes are those of GGUF, experts of a layer stacked: (n_expert, n_out, n_in)."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor, by name

    def vector(self, name: str) -> Floats:
        """All numbers of a tensor. ModelFileError: not finite, or damaged."""

    def matrix(self, name: str, first_row: int = 0, n_rows: int | None = None) -> MatrixSource:
        """Some rows of a tensor, by default all, read when they are packed."""

    def expert(self, layer: int, index: int) -> tuple[MatrixSource, MatrixSource, MatrixSource]:
        """Gate, up and down of an expert, read when they are packed."""

    def embedding(self, tokens: list[int]) -> Floats:
        """Rows (n_tokens, d_model) of token_embd.weight."""

    def sizes_of(self, name: str) -> Mapping[Format, int]:
        """Bytes that a tensor takes in RAM once packed, by format: experts may be of several."""

    def packing_bytes(self, name: str) -> int:
        """Bytes that packing a tensor takes at its peak, beside the packed one."""


class FileSource:
    """Tensors of a GGUF file, or of what looks like one."""

    def __init__(self, file: TensorFile, *, decode_to_f32: bool = False) -> None:
        self.path, self._file, self._decode_to_f32 = file.path, file, decode_to_f32
        self.shapes: Mapping[str, tuple[int, ...]] = {name: info.shape for name, info in file.tensors.items()}

    def vector(self, name: str) -> Floats:
        """See WeightSource."""
        info = self._file.tensors[name]
        vector = ggml.to_float(self._file.read(name), info.type, (math.prod(info.shape),))
        if not np.isfinite(vector).all():
            raise packing.not_finite(f"{self.path}: the tensor {name}")
        return vector

    def matrix(self, name: str, first_row: int = 0, n_rows: int | None = None) -> StoredMatrix:
        """See WeightSource."""
        n_in = self.shapes[name][-1]
        n_rows = math.prod(self.shapes[name]) // n_in if n_rows is None else n_rows
        return self._matrix(name, f"the tensor {name}", first_row, n_rows, first_row)

    def _matrix(self, name: str, words: str, first_row: int, n_rows: int, shown_row: int) -> StoredMatrix:
        info = self._file.tensors[name]
        return StoredMatrix(
            name=f"{self.path}: {words}",
            kind=info.type,
            shape=(n_rows, info.shape[-1]),
            format=self._format(name),
            read_rows=lambda first, count: self._file.read_rows(name, first_row + first, count),
            first_row=shown_row,
        )

    def expert(self, layer: int, index: int) -> tuple[StoredMatrix, StoredMatrix, StoredMatrix]:
        """See WeightSource."""
        made = []
        for part in PROJECTIONS:
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            n_rows = self.shapes[name][-2]
            made.append(self._matrix(name, f"the tensor {name}, expert {index}", index * n_rows, n_rows, 0))
        return made[0], made[1], made[2]

    def embedding(self, tokens: list[int]) -> Floats:
        """See WeightSource."""
        info = self._file.tensors["token_embd.weight"]
        rows = np.concatenate([self._file.read_rows(info.name, token, 1) for token in tokens])
        return ggml.to_float(rows.reshape(-1), info.type, (len(tokens), info.shape[-1]))

    def _format(self, name: str) -> Format:
        """The format that a tensor's matrices are packed to."""
        return ggml.format_for(self._file.tensors[name].type, decode_to_f32=self._decode_to_f32)

    def sizes_of(self, name: str) -> dict[Format, int]:
        """See WeightSource."""
        info = self._file.tensors[name]
        if len(info.shape) == 1 or name.endswith(".bias"):
            return {F32: 4 * math.prod(info.shape)}
        n_out, n_in = info.shape[-2:]
        format = self._format(name)
        return {format: math.prod(info.shape[:-2]) * format.matrix_bytes(n_out, n_in)}

    def packing_bytes(self, name: str) -> int:
        """See WeightSource."""
        info = self._file.tensors[name]
        if len(info.shape) == 1:
            return info.n_bytes + 4 * info.shape[0]
        return packing.packing_bytes(info.type, info.shape[-2], info.shape[-1])


@dataclass(frozen=True)
class BundledTensor:
    """A hot matrix of a bundle; a MatrixSource whose tiles are read straight to where they belong."""

    bundle: Bundle
    name: str
    shape: tuple[int, int]
    format: Format

    def pack(self, out: npt.NDArray[np.uint8]) -> None:
        """Read the tiles; ModelFileError if they are damaged."""
        self.bundle.read_tensor(self.name, out)

    def whole(self) -> Matrix:
        """All of the matrix, unpacked."""
        tiles = np.empty(self.format.matrix_bytes(*self.shape), np.uint8)
        self.pack(tiles)
        return unpack(tiles, self.format, self.shape)


class BundledRecord:
    """An expert's record, read as a whole (its checksum wants that) when the first of its projections is packed."""

    def __init__(self, bundle: Bundle, layer: int, index: int) -> None:
        self._bundle, self._place = bundle, (layer, index)
        self._bytes: npt.NDArray[np.uint8] | None = None

    def tiles(self, part: PackedPart) -> npt.NDArray[np.uint8]:
        """The tiles of one projection. ModelFileError if the record is damaged."""
        if self._bytes is None:
            record = np.empty(int(self._bundle.record_bytes[self._place]), np.uint8)
            self._bundle.read_record(*self._place, record)
            self._bytes = record
        return part_of(self._bytes, part)


@dataclass(frozen=True)
class BundledProjection:
    """One matrix of an expert's record; a MatrixSource."""

    record: BundledRecord
    part: PackedPart

    @property
    def shape(self) -> tuple[int, int]:
        """(n_out, n_in)."""
        return self.part.shape

    @property
    def format(self) -> Format:
        """Of its tiles."""
        return self.part.format

    def pack(self, out: npt.NDArray[np.uint8]) -> None:
        """Copy the tiles."""
        out[:] = self.record.tiles(self.part)

    def whole(self) -> Matrix:
        """All of the matrix, unpacked."""
        return unpack(self.record.tiles(self.part), self.format, self.shape)


class BundleSource:
    """Tensors of a bundle. Experts that differ in form are not described by name: ask Bundle.parts."""

    def __init__(self, bundle: Bundle) -> None:
        self.path, self._bundle = bundle.path, bundle
        self._rows: dict[int, npt.NDArray[np.uint8]] = {}  # of the embedding table, least lately used first
        shapes = {name: tensor.shape for name, tensor in bundle.tensors.items()}
        self._experts: dict[str, list[PackedPart]] = {}  # of each stacked tensor, the experts' parts
        for layer, sizes in enumerate(bundle.record_bytes):
            if sizes.any():
                self._add_experts(layer, np.flatnonzero(sizes).tolist(), len(sizes))
        shapes |= {name: (len(parts), *parts[0].shape) for name, parts in self._experts.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {**shapes, bundle.table.name: bundle.table.shape}

    def _add_experts(self, layer: int, experts: list[int], n_expert: int) -> None:
        parts = [self._bundle.parts(layer, expert) for expert in experts]
        for place, name in enumerate(PROJECTIONS):
            same = [of_expert[place] for of_expert in parts]
            if len(same) < n_expert or any(part.shape != same[0].shape for part in same):
                raise ModelFileError(f"{self.path}: layer {layer} lacks experts; remove the bundle and pack it again")
            self._experts[f"blk.{layer}.ffn_{name}_exps.weight"] = same

    def vector(self, name: str) -> Floats:
        """See WeightSource."""
        vector = np.empty(math.prod(self.shapes[name]), np.float32)
        self._bundle.read_tensor(name, vector.view(np.uint8))
        return vector

    def matrix(self, name: str, first_row: int = 0, n_rows: int | None = None) -> BundledTensor:
        """See WeightSource; only whole tensors are asked for, since attn_qkv was split when it was packed."""
        tensor = self._bundle.tensors[name]
        if len(tensor.shape) != 2 or first_row or n_rows not in (None, tensor.shape[0]):
            raise ModelFileError(f"{self.path}: the tensor {name} {tensor.shape} is no matrix; pack the model again")
        return BundledTensor(self._bundle, name, (tensor.shape[0], tensor.shape[1]), tensor.format)

    def expert(self, layer: int, index: int) -> tuple[BundledProjection, BundledProjection, BundledProjection]:
        """See WeightSource."""
        record = BundledRecord(self._bundle, layer, index)
        gate, up, down = (BundledProjection(record, part) for part in self._bundle.parts(layer, index))
        return gate, up, down

    def embedding(self, tokens: list[int]) -> Floats:
        """See WeightSource. Rows used lately are kept: texts repeat themselves."""
        kept, table = self._rows, self._bundle.table
        missing = sorted({token for token in tokens if token not in kept})
        if missing:
            rows = self._bundle.read_table_rows(missing)
            kept.update((token, row.copy()) for token, row in zip(missing, rows, strict=True))
        rows = np.concatenate([kept[token] for token in tokens])
        for token in tokens:
            kept[token] = kept.pop(token)  # to the end
        while len(kept) > KEPT_ROWS:
            del kept[next(iter(kept))]
        return ggml.to_float(rows, table.type, (len(tokens), table.shape[1]))

    def sizes_of(self, name: str) -> dict[Format, int]:
        """See WeightSource."""
        if name in self._experts:
            return add_sizes((part.format, part.n_bytes) for part in self._experts[name])
        table = self._bundle.table
        if name == table.name:
            return {ggml.format_for(table.type): table.n_bytes}
        return {self._bundle.tensors[name].format: self._bundle.tensors[name].n_bytes}

    def packing_bytes(self, name: str) -> int:
        """See WeightSource: hot tiles come in pieces, an expert's pass through its record."""
        if name not in self._experts:
            return _READ_BYTES
        return int(self._bundle.record_bytes[int(name.split(".")[1])].max())
