"""Where weights come from: the tensors of a model's file, packed as they are read, or a bundle, packed long ago.

A source knows tensors by the names of tensor_table and experts by number; what a model makes of them is weights.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from edgert.architectures import tensor_names
from edgert.errors import ModelFileError
from edgert.quant import ggml, packing
from edgert.quant.formats import F32, Format, Matrix, MatrixSource, PackedPart
from edgert.quant.packing import StoredMatrix
from edgert.quant.unpacking import unpack
from edgert.storage.bundle import Bundle, part_of
from edgert.storage.tensor_file import TensorFile
from edgert.tensor_views import View, views
from edgert.types import Floats, ModelConfig

PROJECTIONS = ("gate", "up", "down")
_READ_BYTES = 2 << 20  # that FlashFile reads at a time on their way to unaligned memory
_SINGLE = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: np.uint16}  # types of weights that stand alone
KEPT_ROWS = 512  # of an embedding table on flash; a row takes 1 to 10 KiB


def add_sizes(sizes: Iterable[tuple[Format, int]]) -> dict[Format, int]:
    """The bytes of each format, added up."""
    total: dict[Format, int] = {}
    for format, n_bytes in sizes:
        total[format] = total.get(format, 0) + n_bytes
    return total


class WeightSource(Protocol):
    """What Weights asks for. Names and shapes are those of tensor_table."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor, by name

    def vector(self, name: str) -> Floats:
        """All numbers of a tensor. ModelFileError: not finite, or damaged."""

    def matrix(self, name: str) -> MatrixSource:
        """A tensor, read when it is packed."""

    def expert(self, layer: int, index: int) -> tuple[MatrixSource, MatrixSource, MatrixSource]:
        """Gate, up and down of an expert, read when they are packed."""

    def embedding(self, tokens: list[int]) -> Floats:
        """Rows (n_tokens, d_model) of token_embd.weight."""

    def table_type(self) -> Type:
        """The ggml type of the rows of token_embd.weight that a bundle has."""

    def sizes_of(self, name: str) -> Mapping[Format, int]:
        """Bytes that a tensor takes in RAM once packed, by format: experts may be of several."""

    def packing_bytes(self, name: str) -> int:
        """Bytes that packing a tensor takes at its peak, beside the packed one."""


class FileSource:
    """Tensors of a GGUF file, or of what looks like one, by our names and as we cut them: see tensor_views."""

    def __init__(self, file: TensorFile, config: ModelConfig, *, decode_to_f32: bool = False) -> None:
        self.path, self._file, self._decode_to_f32 = file.path, file, decode_to_f32
        stored = {name: info.shape for name, info in file.tensors.items()}
        self._views = views(config, stored, tensor_names(config.architecture))
        self.shapes: Mapping[str, tuple[int, ...]] = {name: view.shape for name, view in self._views.items()}

    def stored_name(self, name: str) -> str:
        """The file's name of the tensor that ours is, or is part of."""
        return self._views[name].name

    def stored_type(self, name: str) -> Type:
        """The ggml type that it is stored in."""
        return self._file.tensors[self._views[name].name].type

    def kind(self, name: str) -> Type:
        """The ggml type of the rows of a tensor of ours: where they are columns of the file's, of single weights."""
        stored = self.stored_type(name)
        return Type.F32 if self._views[name].turned and stored not in _SINGLE else stored

    def vector(self, name: str) -> Floats:
        """See WeightSource."""
        view = self._views[name]
        info = self._file.tensors[view.name]
        vector = ggml.to_float(self._file.read(view.name), info.type, (math.prod(info.shape),))
        vector = np.concatenate([vector[first : first + n] for first, n in view.between(0, view.shape[0])])
        if not np.isfinite(vector).all():
            raise packing.not_finite(f"{self.path}: the tensor {view.name}")
        return vector

    def matrix(self, name: str) -> StoredMatrix:
        """See WeightSource. A vector is a matrix of one row."""
        shape = self.shapes[name]
        return self._matrix(name, "", 0, math.prod(shape) // shape[-1])

    def _matrix(self, name: str, words: str, first_row: int, n_rows: int) -> StoredMatrix:
        """Some rows of one of our tensors."""
        view, n_in = self._views[name], self.shapes[name][-1]
        read = self._read_turned if view.turned else self._read_rows
        return StoredMatrix(
            name=f"{self.path}: the tensor {view.name}{words}",
            kind=self.kind(name),
            shape=(n_rows, n_in),
            format=self._format(name),
            read_rows=partial(read, view, first_row),
            first_row=0 if words else view.rows[0].first,
        )

    def _read_rows(self, view: View, start: int, first: int, count: int) -> npt.NDArray[np.uint8]:
        """Rows of a view, `first` after `start` on; of a vector, all of it as one row."""
        if len(view.shape) == 1:
            return self._file.read_rows(view.name, 0, 1)
        parts = [self._file.read_rows(view.name, *stretch) for stretch in view.between(start + first, count)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_turned(self, view: View, start: int, first: int, count: int) -> npt.NDArray[np.uint8]:
        """The same of a view that is turned, as single weights."""
        info, stretch, n_in = self._file.tensors[view.name], view.rows[0], view.shape[-1]
        n_out, first = info.shape[-1], start + first  # of one part, transposed
        parts = []
        for turn in range(first // n_out, -(-(first + count) // n_out)):
            raw = self._file.read_rows(view.name, stretch.first + turn * stretch.step, n_in)
            kind = _SINGLE.get(info.type)
            block = ggml.to_float(raw.reshape(-1), info.type, (n_in, n_out)) if kind is None else raw.view(kind)
            parts.append(np.ascontiguousarray(block.T))
        skipped = first // n_out * n_out
        return np.concatenate(parts)[first - skipped : first - skipped + count].view(np.uint8)

    def expert(self, layer: int, index: int) -> tuple[MatrixSource, MatrixSource, MatrixSource]:
        """See WeightSource."""
        made = []
        for part in PROJECTIONS:
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            n_rows = self.shapes[name][-2]
            made.append(self._matrix(name, f", expert {index}", index * n_rows, n_rows))
        return made[0], made[1], made[2]

    def embedding(self, tokens: list[int]) -> Floats:
        """See WeightSource."""
        info = self._file.tensors["token_embd.weight"]
        rows = np.concatenate([self._file.read_rows(info.name, token, 1) for token in tokens])
        return ggml.to_float(rows.reshape(-1), info.type, (len(tokens), info.shape[-1]))

    def table_type(self) -> Type:
        """See WeightSource."""
        return self._file.tensors["token_embd.weight"].type

    def _format(self, name: str) -> Format:
        """The format that a tensor's matrices are packed to."""
        return ggml.format_for(self.kind(name), decode_to_f32=self._decode_to_f32)

    def sizes_of(self, name: str) -> dict[Format, int]:
        """See WeightSource."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return {F32: 4 * shape[0]}
        n_out, n_in = shape[-2:]
        format = self._format(name)
        return {format: math.prod(shape[:-2]) * format.matrix_bytes(n_out, n_in)}

    def packing_bytes(self, name: str) -> int:
        """See WeightSource."""
        info, shape = self._file.tensors[self._views[name].name], self.shapes[name]
        if len(shape) == 1:
            return info.n_bytes + 4 * math.prod(info.shape)
        turned = 8 * shape[-1] * info.shape[-1] if self._views[name].turned else 0
        return packing.packing_bytes(self.kind(name), shape[-2], shape[-1]) + turned


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

    def matrix(self, name: str) -> BundledTensor:
        """See WeightSource."""
        tensor = self._bundle.tensors[name]
        if len(tensor.shape) != 2:
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

    def table_type(self) -> Type:
        """See WeightSource."""
        return self._bundle.table.type

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
