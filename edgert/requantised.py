"""A model's file with other formats for some of its matrices: a WeightSource for packing.

Hot matrices are rounded to their new format as they are read. Experts' tiles were made before, from what the experts
multiply, and are fetched by place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from edgert.architectures import read_config
from edgert.bits import PROJECTIONS, Bits
from edgert.quant import ggml
from edgert.quant.formats import Format, Matrix, MatrixSource
from edgert.quant.packing import StoredMatrix
from edgert.quant.quantisers import quantise
from edgert.quant.unpacking import unpack
from edgert.storage.tensor_file import TensorFile
from edgert.weight_sources import FileSource, add_sizes

Bytes = npt.NDArray[np.uint8]
Place = tuple[int, int, int]  # layer, expert, projection
Read = Callable[[Place, int, int], Bytes]  # (place, first, n): those bytes of the tiles made for it, in any thread


@dataclass(frozen=True)
class RoundedMatrix(StoredMatrix):
    """A matrix of a file that is rounded to another format when it is packed, each row by itself."""

    def pack_rows(self, raw: Bytes, first: int, out: Bytes) -> None:
        """See StoredMatrix."""
        weights = ggml.to_float(np.ascontiguousarray(raw).reshape(-1), self.kind, (len(raw), self.shape[1]))
        if not np.isfinite(weights).all():
            raise self._not_finite(first + int(np.argmin(np.isfinite(weights).all(axis=1))))
        quantise(weights, self.format, "hqq").matrix.pack(out)

    def whole(self) -> Matrix:
        """See StoredMatrix."""
        tiles = np.empty(self.format.matrix_bytes(*self.shape), np.uint8)
        self.pack(tiles)
        return unpack(tiles, self.format, self.shape)


@dataclass(frozen=True)
class MadeMatrix:
    """A matrix whose tiles were made before; a MatrixSource."""

    shape: tuple[int, int]
    format: Format
    read: Callable[[int, int], Bytes]  # (first, n): those bytes of the tiles

    def pack(self, out: Bytes) -> None:
        """Copy the tiles."""
        out[:] = self.read(0, len(out))

    def whole(self) -> Matrix:
        """All of the matrix, unpacked."""
        return unpack(self.read(0, self.format.matrix_bytes(*self.shape)), self.format, self.shape)


class RequantisedSource(FileSource):
    """Tensors of a model's file in the formats that `bits` names."""

    def __init__(self, file: TensorFile, bits: Bits, read: Read) -> None:
        super().__init__(file, read_config(file.metadata, str(file.path)))
        self._bits, self._read = bits, read

    def expert(self, layer: int, index: int) -> tuple[MatrixSource, MatrixSource, MatrixSource]:
        """See WeightSource."""
        matrices: list[MatrixSource] = list(super().expert(layer, index))
        for place, format in enumerate(self._bits.of(layer, index)):
            if format is not None:
                read = partial(self._read, (layer, index, place))
                matrices[place] = MadeMatrix(matrices[place].shape, format, read)
        return matrices[0], matrices[1], matrices[2]

    def _matrix(self, name: str, words: str, first_row: int, n_rows: int) -> StoredMatrix:
        found = super()._matrix(name, words, first_row, n_rows)
        if found.format is ggml.format_for(found.kind):
            return found
        return RoundedMatrix(found.name, found.kind, found.shape, found.format, found.read_rows, found.first_row)

    def _format(self, name: str) -> Format:
        shape = self.shapes[name]
        if len(shape) != 2 or is_kept(name):
            return super()._format(name)
        return self._bits.hot_format(self.kind(name), shape[-1])

    def table_type(self) -> Type:
        """See WeightSource."""
        return self._bits.table_type(super().table_type(), self.shapes["token_embd.weight"][-1])

    def sizes_of(self, name: str) -> dict[Format, int]:
        """See WeightSource."""
        if not name.endswith("_exps.weight"):
            return super().sizes_of(name)
        layer, place = int(name.split(".")[1]), PROJECTIONS.index(name.split("_")[1])
        made = [self.expert(layer, index)[place] for index in range(self.shapes[name][0])]
        return add_sizes((matrix.format, matrix.format.matrix_bytes(*matrix.shape)) for matrix in made)


def is_kept(name: str) -> bool:
    """Whether a hot matrix stays as the source has it: routers and gates are small, and decide much."""
    return any(part in name for part in ("ffn_gate_inp", "ssm_alpha", "ssm_beta")) or name.endswith(".bias")
