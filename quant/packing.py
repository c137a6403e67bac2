"""From the rows of a ggml tensor, some at a time, to the tiles of edgert.quant.formats.

The compiled kernels go straight from ggml's blocks to tiles. `Matrix.pack` says the same slowly: tests compare the
bytes, and without the compiler it does the work. Weights that are not finite are refused here. Where the rows come from
is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from edgert.errors import ModelFileError, UnsupportedError
from edgert.quant import ggml, packing_kernels
from edgert.quant.formats import F32, TILE_ROWS, Format, Matrix
from edgert.quant.jit import JIT_ENABLED

SLAB_BYTES = 4 << 20  # what the rows that are read at a time would take as floats


def pack_rows(raw: npt.NDArray[np.uint8], kind: Type, format: Format, n_in: int, out: npt.NDArray[np.uint8]) -> int:
    """Write rows of a ggml tensor, uint8 (n_rows, row_bytes), as tiles into `out`, uint8 (matrix_bytes(n_rows, n_in),).

    Returns the first row that is not finite (see Matrix.not_finite), or -1. Raises OverflowError where the format is
    F16 and a weight is finite but beyond it.
    """
    n_rows = len(raw)
    assert out.size == format.matrix_bytes(n_rows, n_in) and raw.flags.c_contiguous and out.flags.c_contiguous
    if not ggml.is_exact(kind):
        raw = ggml.matrix(raw.reshape(-1), kind, (n_rows, n_in), format).values.view(np.uint8)
        kind = Type.F32 if format is F32 else Type.F16
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    assert raw.shape[1] == n_in // block * block_bytes and n_in % block == 0
    if JIT_ENABLED:
        return packing_kernels.pack(raw, kind, n_in, out)
    matrix = ggml.matrix(raw.reshape(-1), kind, (n_rows, n_in), format)
    matrix.pack(out)
    return matrix.not_finite()


def not_finite(where: str) -> ModelFileError:
    """The error about weights that are infinite or not numbers, as broken conversions leave them."""
    return ModelFileError(
        f"{where} holds a weight that is infinite or not a number, and would spoil all answers; the file is damaged or "
        "was converted wrongly: download it again, or take another quantisation of the model"
    )


def slab_rows(n_in: int) -> int:
    """Rows of `n_in` columns that are read at a time: whole tiles."""
    return max(1, SLAB_BYTES // (4 * n_in * TILE_ROWS)) * TILE_ROWS


def packing_bytes(kind: Type, n_out: int, n_in: int) -> int:
    """Bytes that packing a matrix takes at its peak beside the packed one: the rows, and their weights if decoded."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = min(n_out, slab_rows(n_in))
    padded = TILE_ROWS if n_out % TILE_ROWS else 0  # a copy of the last rows, with others up to a tile
    decoded = 0 if ggml.is_exact(kind) else (rows + 2 * TILE_ROWS) * n_in * 12  # float32, their half, `gguf` at work
    return (rows + padded) * (n_in // block * block_bytes) + decoded


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix (n_out, n_in) that still lies in a file; see formats.MatrixSource.

    read_rows(first, count) gives rows of the ggml tensor, uint8 (count, row_bytes). For messages: `name`, and
    `first_row`, the number that the matrix' first row has in what `name` names. Raises UnsupportedError where n_in is
    not a multiple of the format's block.
    """

    name: str
    kind: Type
    shape: tuple[int, int]
    format: Format
    read_rows: Callable[[int, int], npt.NDArray[np.uint8]]
    first_row: int = 0

    def __post_init__(self) -> None:
        if self.shape[1] % self.format.block:
            raise UnsupportedError(
                f"{self.name} is {self.kind.name} with rows of {self.shape[1]}, which is not a multiple of "
                f"{self.format.block}; take another quantisation of the model"
            )

    def pack(self, out: npt.NDArray[np.uint8]) -> None:
        """Read the rows and write their tiles into `out`, uint8 (format.matrix_bytes(*shape),), slab by slab.

        Raises ModelFileError where a weight is not finite, UnsupportedError where one is beyond half precision.
        """
        n_out, n_in = self.shape
        step, done = slab_rows(n_in), 0
        for first in range(0, n_out, step):
            n_rows = min(step, n_out - first)
            size = self.format.matrix_bytes(n_rows, n_in)
            # the rows have no name here, so that they are gone before the next ones are read
            self.pack_rows(self.read_rows(first, n_rows), first, out[done : done + size])
            done += size

    def pack_rows(self, raw: npt.NDArray[np.uint8], first: int, out: npt.NDArray[np.uint8]) -> None:
        """Likewise with rows that were read before, from row `first` on, a multiple of 16."""
        try:
            wrong = pack_rows(raw, self.kind, self.format, self.shape[1], out)
        except OverflowError as error:
            raise self._beyond_half() from error
        if wrong >= 0:
            raise self._not_finite(first + wrong)

    def whole(self) -> Matrix:
        """All of the matrix, unpacked; raises as pack does."""
        try:
            found = ggml.matrix(self.read_rows(0, self.shape[0]).reshape(-1), self.kind, self.shape, self.format)
        except OverflowError as error:
            raise self._beyond_half() from error
        if (wrong := found.not_finite()) >= 0:
            raise self._not_finite(wrong)
        return found

    def _not_finite(self, row: int) -> ModelFileError:
        return not_finite(f"{self.name}, row {self.first_row + row},")

    def _beyond_half(self) -> UnsupportedError:
        return UnsupportedError(
            f"{self.name} is {self.kind.name} and holds weights beyond 65504, the largest half-precision number; "
            "load it with activations='f32', or convert the model to another type"
        )
