"""Compiled matrix products over packed tiles: 16 rows of a matrix times one row of activations, for every format.

Columns ascend; one fused multiply-add per column, or per group of 32 with int8 activations, whose dot products are
exact in int32. A row of a product over many tokens therefore equals the product of that row alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.quant import formats
from edgert.quant.jit import kernel
from edgert.quant.simd import (
    add_i32,
    broadcast4,
    dot4,
    fma,
    high_nibbles,
    load_bf16,
    load_f16,
    load_f32,
    load_float,
    load_i8,
    load_int,
    low_nibbles,
    splat,
    splat_i32,
    store_f32,
    to_f32,
    unsigned_byte,
)


def record(integers: str, floats: str = "") -> np.dtype[np.void]:
    """A record for kernels to read: int64 fields (sizes, flags, addresses), then float32 ones."""
    fields = [(name, np.int64) for name in integers.split()] + [(name, np.float32) for name in floats.split()]
    return np.dtype(fields, align=True)


# A packed matrix as the kernels see it. `bias` is the address of float32s, or 0.
MATRIX = record("address format n_out n_in tile_bytes bias")
# Rows of activations: floats, and (where `quantised` is not 0) the same as int8 with scales and sums per group of 32.
# Row t starts at floats + 4 t stride, integers + t stride, scales and sums + t stride / 8. stride is a multiple of 64.
ACTIVATIONS = record("floats stride integers scales sums quantised")

_INT4, _INT4_MIN, _INT8 = formats.INT4.code, formats.INT4_MIN.code, formats.INT8.code
_F16, _BF16 = formats.F16.code, formats.BF16.code
_ZERO = np.float32(0)


@kernel
def _int4(tile: int, n_groups: int, x: int, scales: int, sums: int, group_bytes: int, has_minimum: bool) -> Any:
    """One tile of 4-bit integers (offset 8, or none and a minimum) times int8 activations: 16 floats."""
    total = splat(_ZERO)
    for group in range(n_groups):
        at, activations = tile + group_bytes * group, x + 32 * group
        low, high = splat_i32(np.int32(0)), splat_i32(np.int32(0))
        if not has_minimum:
            low = splat_i32(np.int32(-8) * load_int(sums + 4 * group))
        for j in range(4):
            packed = load_i8(at + 64 * j)
            low = dot4(low, low_nibbles(packed), broadcast4(activations + 8 * j))
            high = dot4(high, high_nibbles(packed), broadcast4(activations + 8 * j + 4))
        scale = load_float(scales + 4 * group)
        total = fma(to_f32(add_i32(low, high)), load_f16(at + 256) * splat(scale), total)
        if has_minimum:
            total = fma(load_f16(at + 288), splat(scale * np.float32(load_int(sums + 4 * group))), total)
    return total


@kernel
def _int8(tile: int, n_groups: int, x: int, scales: int, sums: int) -> Any:
    """One tile of 8-bit integers (offset 128) times int8 activations: 16 floats."""
    total = splat(_ZERO)
    for group in range(n_groups):
        at, activations = tile + 544 * group, x + 32 * group
        dots = splat_i32(np.int32(-128) * load_int(sums + 4 * group))
        for j in range(8):
            dots = dot4(dots, load_i8(at + 64 * j), broadcast4(activations + 4 * j))
        total = fma(to_f32(dots), load_f16(at + 512) * splat(load_float(scales + 4 * group)), total)
    return total


@kernel
def _integers_floats(tile: int, code: int, n_groups: int, x: int, group_bytes: int) -> Any:
    """One tile of an integer format times float activations: 16 floats."""
    total, minimum = splat(_ZERO), splat(_ZERO)
    bits = 8 if code == _INT8 else 4
    offset = np.float32(0)
    if code == _INT4:
        offset = np.float32(8)
    elif code == _INT8:
        offset = np.float32(128)
    for group in range(n_groups):
        at = tile + group_bytes * group
        scale = load_f16(at + 64 * bits)
        if code == _INT4_MIN:
            minimum = load_f16(at + 64 * bits + 32)
        for j in range(8):
            if bits == 8:
                packed = load_i8(at + 64 * j)
            else:
                packed = load_i8(at + 64 * (j // 2))
                packed = high_nibbles(packed) if j % 2 else low_nibbles(packed)
            for byte in range(4):
                integer = to_f32(unsigned_byte(packed, np.int32(byte))) - splat(offset)
                weight = fma(integer, scale, minimum)
                total = fma(weight, splat(load_float(x + 128 * group + 16 * j + 4 * byte)), total)
    return total


@kernel
def _floats(tile: int, code: int, n_in: int, x: int) -> Any:
    """One tile of a float format times float activations: 16 floats."""
    total = splat(_ZERO)
    if code == _F16:
        for k in range(n_in):
            total = fma(load_f16(tile + 32 * k), splat(load_float(x + 4 * k)), total)
    elif code == _BF16:
        for k in range(n_in):
            total = fma(load_bf16(tile + 32 * k), splat(load_float(x + 4 * k)), total)
    else:
        for k in range(n_in):
            total = fma(load_f32(tile + 64 * k), splat(load_float(x + 4 * k)), total)
    return total


@kernel
def multiply_tile(matrix: Any, index: int, activations: Any, row: int) -> Any:
    """16 outputs of a matrix: its tile `index` times row `row` of the activations, plus the bias."""
    tile = matrix.address + index * matrix.tile_bytes
    code, n_groups = matrix.format, matrix.n_in // 32
    floats = activations.floats + 4 * row * activations.stride
    if code > _INT8:
        total = _floats(tile, code, matrix.n_in, floats)
    elif activations.quantised:
        integers = activations.integers + row * activations.stride
        scales = activations.scales + row * activations.stride // 8
        sums = activations.sums + row * activations.stride // 8
        if code == _INT4:
            total = _int4(tile, n_groups, integers, scales, sums, 288, False)
        elif code == _INT4_MIN:
            total = _int4(tile, n_groups, integers, scales, sums, 320, True)
        else:
            total = _int8(tile, n_groups, integers, scales, sums)
    else:
        total = _integers_floats(tile, code, n_groups, floats, matrix.tile_bytes // n_groups)
    if matrix.bias:
        total = total + load_f32(matrix.bias + 64 * index)
    return total


@kernel
def multiply(
    matrix: Any, activations: Any, n_rows: int, out: int, out_stride: int, thread: int, n_threads: int
) -> None:
    """This thread's tiles of activations @ matrix.T into floats at `out`, rows `out_stride` floats apart."""
    n_tiles = (matrix.n_out + 15) // 16
    for index in range(n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads):
        for row in range(n_rows):
            store_f32(out + 4 * (row * out_stride + 16 * index), multiply_tile(matrix, index, activations, row))
