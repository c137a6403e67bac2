"""Weight formats: what one matrix holds, and its layout in memory, the same for every instruction set.

A matrix (n_out, n_in) lies in tiles of 16 rows. Within a tile, groups of 32 columns follow each other; a group holds
the rows' integers, 4 consecutive columns of each of the 16 rows side by side (64 bytes), then the 16 scales, then the
16 minima. Float formats hold the 16 rows of one column side by side. Rows beyond n_out are zero. The slow obvious
reading of every format stands here too (`Matrix.to_float`): tests hold the kernels against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

TILE_ROWS = 16
GROUP = 32


@dataclass(frozen=True)
class Format:
    """One way to store weights. An integer format's weight is scale * (integer - offset) + minimum."""

    code: int  # what the kernels switch on
    name: str
    bits: int
    offset: int = 0
    has_minimum: bool = False

    @property
    def is_integer(self) -> bool:
        """Whether integer kernels (with int8 activations) serve this format."""
        return self.name.startswith("int")

    def tile_bytes(self, n_in: int) -> int:
        """Bytes of one tile of 16 rows with `n_in` columns."""
        if not self.is_integer:
            return n_in * TILE_ROWS * self.bits // 8
        scales = 2 * TILE_ROWS * (2 if self.has_minimum else 1)
        return n_in // GROUP * (GROUP * TILE_ROWS * self.bits // 8 + scales)

    def matrix_bytes(self, n_out: int, n_in: int) -> int:
        """Bytes of a packed matrix, its padding rows included."""
        return -(-n_out // TILE_ROWS) * self.tile_bytes(n_in)


INT4 = Format(0, "int4", bits=4, offset=8)
INT4_MIN = Format(1, "int4-min", bits=4, has_minimum=True)
INT8 = Format(2, "int8", bits=8, offset=128)
F16 = Format(3, "f16", bits=16)
BF16 = Format(4, "bf16", bits=16)
F32 = Format(5, "f32", bits=32)
FORMATS = {format.name: format for format in (INT4, INT4_MIN, INT8, F16, BF16, F32)}


class MatrixSource(Protocol):
    """What a device takes for a matrix: it may still lie in a file, and be read only when it is packed."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n_out, n_in)."""

    @property
    def format(self) -> Format:
        """The format that it packs to."""

    def pack(self, out: npt.NDArray[np.uint8]) -> None:
        """Write the tiles into `out`, uint8 (format.matrix_bytes(*shape),)."""

    def whole(self) -> Matrix:
        """All of the matrix, unpacked."""


@dataclass(frozen=True)
class Matrix:
    """A matrix before packing: (n_out, n_in) in one format.

    Integer formats: `values` uint8 (n_out, n_in), `scales` and `minima` float16 (n_out, n_in / 32).
    Float formats: `values` float16, float32, or uint16 holding bfloat16's bits; no scales.
    """

    format: Format
    values: npt.NDArray[np.generic]
    scales: npt.NDArray[np.float16] | None = None
    minima: npt.NDArray[np.float16] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n_out, n_in)."""
        return self.values.shape[0], self.values.shape[1]

    def whole(self) -> Matrix:
        """Itself; see MatrixSource."""
        return self

    def to_float(self) -> npt.NDArray[np.float32]:
        """The weights, float32 (n_out, n_in), each rounded once."""
        if self.format is BF16:
            return (self.values.astype(np.uint32) << 16).view(np.float32)
        if self.scales is None:
            return self.values.astype(np.float32)
        scales = np.repeat(self.scales.astype(np.float64), GROUP, axis=1)
        weights = scales * (self.values.astype(np.float64) - self.format.offset)  # exact: 11 + 8 bits
        if self.minima is not None:
            weights += np.repeat(self.minima.astype(np.float64), GROUP, axis=1)
        return weights.astype(np.float32)

    def pack(self, out: npt.NDArray[np.uint8]) -> None:
        """Write the tiles into `out`, uint8 (format.matrix_bytes(*shape),)."""
        n_out, n_in = self.shape
        n_tiles = -(-n_out // TILE_ROWS)
        values = _pad_rows(self.values, n_tiles)
        tiles = out.reshape(n_tiles, -1)
        if self.scales is None:
            columns = values.reshape(n_tiles, TILE_ROWS, n_in).transpose(0, 2, 1)
            tiles[:] = np.ascontiguousarray(columns).view(np.uint8).reshape(n_tiles, -1)
            return
        n_groups = n_in // GROUP
        groups = tiles.reshape(n_tiles, n_groups, -1)
        # (tile, row, group, vector of 4 columns, column) -> (tile, group, vector, row, column)
        vectors = values.reshape(n_tiles, TILE_ROWS, n_groups, GROUP // 4, 4).transpose(0, 2, 3, 1, 4)
        if self.format.bits == 4:
            vectors = vectors[:, :, 0::2] | (vectors[:, :, 1::2] << 4)
        n_values = GROUP * TILE_ROWS * self.format.bits // 8
        groups[:, :, :n_values] = vectors.reshape(n_tiles, n_groups, n_values)
        for index, table in enumerate((self.scales, self.minima)):
            if table is not None:
                lanes = _pad_rows(table, n_tiles).reshape(n_tiles, TILE_ROWS, n_groups).transpose(0, 2, 1)
                start = n_values + 2 * TILE_ROWS * index
                groups[:, :, start : start + 2 * TILE_ROWS] = np.ascontiguousarray(lanes).view(np.uint8)


def _pad_rows(values: npt.NDArray[np.generic], n_tiles: int) -> npt.NDArray[np.generic]:
    """`values` with zero rows added up to whole tiles."""
    missing = n_tiles * TILE_ROWS - values.shape[0]
    return np.pad(values, ((0, missing), (0, 0))) if missing else values
