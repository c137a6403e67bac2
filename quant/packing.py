"""From the rows of a ggml tensor, some at a time, to the tiles of edgert.quant.formats.

The compiled functions go straight from ggml's blocks to tiles. `Matrix.pack` says the same slowly: tests compare the
bytes, and without the compiler it does the work. Where the rows come from is not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from edgert.errors import UnsupportedError
from edgert.quant import ggml
from edgert.quant.formats import GROUP, INT8, TILE_ROWS, Format, Matrix
from edgert.quant.jit import JIT_ENABLED, kernel

SLAB_BYTES = 4 << 20  # what the rows that are read at a time would take as floats
_LINE = 32  # columns that are turned at a time: rows a power of two apart would drive each other out of the cache


@kernel
def _pack_nibbles(blocks: Any, tiles: Any, n_scales: int) -> None:
    """Q4_0 (n_scales 1) or Q4_1 (2): blocks uint16 (n_rows, n_groups, n_scales + 8), tiles (n_tiles, n_groups, ...).

    A block's byte k holds column k below and column k + 16 above; a tile's byte holds columns k below and k + 4 above.
    """
    for tile in range(tiles.shape[0]):
        n_lanes = min(TILE_ROWS, blocks.shape[0] - TILE_ROWS * tile)
        if n_lanes < TILE_ROWS:
            tiles[tile] = 0
        for group in range(tiles.shape[1]):
            out = tiles[tile, group]
            for lane in range(n_lanes):
                block = blocks[TILE_ROWS * tile + lane, group]
                for j in range(2):
                    for half in range(2):
                        first, second = block[n_scales + 4 * j + half], block[n_scales + 4 * j + 2 + half]
                        at = 32 * j + 2 * lane + half
                        out[at] = (first & 0x0F0F) | ((second & 0x0F0F) << 4)
                        out[at + 64] = ((first >> 4) & 0x0F0F) | (second & 0xF0F0)
                for scale in range(n_scales):
                    out[128 + TILE_ROWS * scale + lane] = block[scale]


@kernel
def _pack_bytes(blocks: Any, tiles: Any) -> None:
    """Q8_0: blocks uint16 (n_rows, n_groups, 17), tiles uint16 (n_tiles, n_groups, 272)."""
    for tile in range(tiles.shape[0]):
        n_lanes = min(TILE_ROWS, blocks.shape[0] - TILE_ROWS * tile)
        if n_lanes < TILE_ROWS:
            tiles[tile] = 0
        for group in range(tiles.shape[1]):
            out = tiles[tile, group]
            for lane in range(n_lanes):
                block = blocks[TILE_ROWS * tile + lane, group]
                for j in range(8):
                    out[32 * j + 2 * lane] = block[1 + 2 * j] ^ 0x8080
                    out[32 * j + 2 * lane + 1] = block[2 + 2 * j] ^ 0x8080
                out[256 + lane] = block[0]


@kernel
def _pack_floats(rows: Any, tiles: Any) -> None:
    """Floats as unsigned integers of their size: rows (n_rows, n_in), tiles (n_tiles, n_in, 16)."""
    n_in = rows.shape[1]
    for tile in range(tiles.shape[0]):
        n_lanes = min(TILE_ROWS, rows.shape[0] - TILE_ROWS * tile)
        if n_lanes < TILE_ROWS:
            tiles[tile] = 0
        for start in range(0, n_in, _LINE):
            for lane in range(n_lanes):
                row = rows[TILE_ROWS * tile + lane]
                for column in range(start, min(start + _LINE, n_in)):
                    tiles[tile, column, lane] = row[column]


def pack_rows(raw: npt.NDArray[np.uint8], kind: Type, format: Format, n_in: int, out: npt.NDArray[np.uint8]) -> None:
    """Write rows of a ggml tensor, uint8 (n_rows, row_bytes), as tiles into `out`, uint8 (matrix_bytes(n_rows, n_in),).

    Raises OverflowError where the format is F16 and a weight is beyond it.
    """
    n_rows, n_tiles = len(raw), -(-len(raw) // TILE_ROWS)
    assert out.size == format.matrix_bytes(n_rows, n_in) and raw.flags.c_contiguous and out.flags.c_contiguous
    if not JIT_ENABLED:
        ggml.matrix(raw.reshape(-1), kind, (n_rows, n_in), format).pack(out)
    elif not format.is_integer:
        values = ggml.matrix(raw.reshape(-1), kind, (n_rows, n_in), format).values
        bits = np.dtype(f"u{format.bits // 8}")
        _pack_floats(values.view(bits), out.view(bits).reshape(n_tiles, n_in, TILE_ROWS))
    else:
        blocks = raw.view(np.uint16).reshape(n_rows, n_in // GROUP, -1)
        tiles = out.view(np.uint16).reshape(n_tiles, n_in // GROUP, -1)
        if format is INT8:
            _pack_bytes(blocks, tiles)
        else:
            _pack_nibbles(blocks, tiles, 2 if format.has_minimum else 1)


def slab_rows(n_in: int) -> int:
    """Rows of `n_in` columns that are read at a time: whole tiles."""
    return max(1, SLAB_BYTES // (4 * n_in * TILE_ROWS)) * TILE_ROWS


def packing_bytes(kind: Type, n_out: int, n_in: int) -> int:
    """Bytes that packing a matrix takes at its peak beside the packed one: the rows, and their weights if decoded."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = min(n_out, slab_rows(n_in))
    decoded = 0 if ggml.is_exact(kind) else (rows + 2 * TILE_ROWS) * n_in * 12  # float32, their half, `gguf` at work
    return rows * (n_in // block * block_bytes) + decoded


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix (n_out, n_in) that still lies in a file; see formats.MatrixSource.

    read_rows(first, count) gives rows of the ggml tensor, uint8 (count, row_bytes). `name` is for messages.
    """

    name: str
    kind: Type
    shape: tuple[int, int]
    format: Format
    read_rows: Callable[[int, int], npt.NDArray[np.uint8]]

    def pack(self, out: npt.NDArray[np.uint8]) -> None:
        """Read the rows and write their tiles into `out`, uint8 (format.matrix_bytes(*shape),), slab by slab."""
        n_out, n_in = self.shape
        step, done = slab_rows(n_in), 0
        for first in range(0, n_out, step):
            n_rows = min(step, n_out - first)
            size = self.format.matrix_bytes(n_rows, n_in)
            try:
                pack_rows(self.read_rows(first, n_rows), self.kind, self.format, n_in, out[done : done + size])
            except OverflowError as error:
                raise self._beyond_half() from error
            done += size

    def whole(self) -> Matrix:
        """All of the matrix, unpacked."""
        try:
            return ggml.matrix(self.read_rows(0, self.shape[0]).reshape(-1), self.kind, self.shape, self.format)
        except OverflowError as error:
            raise self._beyond_half() from error

    def _beyond_half(self) -> UnsupportedError:
        return UnsupportedError(
            f"{self.name} is {self.kind.name} and holds weights beyond 65504, the largest half-precision number; "
            "load it with activations='f32', or convert the model to another type"
        )
