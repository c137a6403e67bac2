"""Compiled functions over vectors and rows: exp, activations, RMS norm, quantisation of activations.

Each follows `edgert.quant.reference` operation by operation. Rows are given by address; a row's buffer is readable up
to the next multiple of 32 values, and holds zeros there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.quant import reference
from edgert.quant.jit import inner
from edgert.quant.simd import (
    absolute,
    fma,
    max_lanes,
    maximum,
    round_i32,
    saturate_exp,
    scale_by_power,
    splat,
    sum_lanes,
    sum_lanes_i32,
    to_f32,
)
from edgert.quant.simd_memory import load_f32, store_f32, store_float, store_i8, store_int
from edgert.quant.tile_kernels import GROUP_BYTES

_LOG2_E, _LN2_HIGH, _LN2_LOW = reference.LOG2_E, -reference.LN2_HIGH, -reference.LN2_LOW
_LOWEST, _HIGHEST = reference.EXP_LOWEST, reference.EXP_HIGHEST
_P5, _P4, _P3, _P2, _P1, _P0 = reference.EXP_COEFFICIENTS
_L7, _L6, _L5, _L4, _L3, _L2, _L1, _L0 = reference.LOG_COEFFICIENTS
_LOG_BASE = np.float32(2)
_TINY = reference.SMALLEST_GROUP
_SILU, _GELU, _ = range(len(reference.ACTIVATIONS))
_GELU_CUBE, _GELU_SCALE = reference.GELU_CUBE, reference.GELU_SCALE
_OSS_LIMIT, _OSS_ALPHA = reference.OSS_LIMIT, reference.OSS_ALPHA
_ZERO, _ONE, _127 = np.float32(0), np.float32(1), np.float32(127)


@inner
def exp(x: Any) -> Any:
    """e**x of 16 lanes; see reference.exp."""
    low = splat(_LOWEST)
    clamped = maximum(x, low)
    clamped = splat(_ZERO) - maximum(splat(_ZERO) - clamped, splat(-_HIGHEST))  # the smaller of the two
    exponent = round_i32(clamped * splat(_LOG2_E))
    n = to_f32(exponent)
    r = fma(n, splat(_LN2_LOW), fma(n, splat(_LN2_HIGH), clamped))
    p = fma(splat(_P5), r, splat(_P4))
    p = fma(p, r, splat(_P3))
    p = fma(p, r, splat(_P2))
    p = fma(p, r, splat(_P1))
    p = fma(p, r, splat(_P0))
    y = fma(p, r * r, r) + splat(_ONE)
    return saturate_exp(scale_by_power(y, exponent), x, low, splat(_HIGHEST))


@inner
def silu(x: Any) -> Any:
    """x / (1 + e**-x) of 16 lanes."""
    return x / (splat(_ONE) + exp(splat(_ZERO) - x))


@inner
def sigmoid(x: Any) -> Any:
    """1 / (1 + e**-x) of 16 lanes."""
    return splat(_ONE) / (splat(_ONE) + exp(splat(_ZERO) - x))


@inner
def activate(gate: Any, up: Any, activation: int) -> Any:
    """A gated unit of 16 lanes, by number in ACTIVATIONS; see reference.activate."""
    if activation == _SILU:
        return silu(gate) * up
    if activation == _GELU:
        inner = gate * fma(gate * gate, splat(_GELU_CUBE), splat(_ONE))
        return (gate * sigmoid(inner * splat(_GELU_SCALE))) * up
    limit = splat(_OSS_LIMIT)
    gate = splat(_ZERO) - maximum(splat(_ZERO) - gate, splat(_ZERO) - limit)  # the smaller of the two
    up = splat(_ZERO) - maximum(splat(_ZERO) - maximum(up, splat(_ZERO) - limit), splat(_ZERO) - limit)
    return (gate * sigmoid(gate * splat(_OSS_ALPHA))) * (up + splat(_ONE))


@inner
def softplus(x: Any) -> Any:
    """log(1 + e**x) of 16 lanes; see reference.softplus."""
    u = exp(splat(_ZERO) - absolute(x))
    f = u / (u + splat(_LOG_BASE))
    square = f * f
    p = fma(splat(_L7), square, splat(_L6))
    p = fma(p, square, splat(_L5))
    p = fma(p, square, splat(_L4))
    p = fma(p, square, splat(_L3))
    p = fma(p, square, splat(_L2))
    p = fma(p, square, splat(_L1))
    p = fma(p, square, splat(_L0))
    twice = f + f
    return maximum(x, splat(_ZERO)) + fma(p, square * twice, twice)


@inner
def sum_of_squares(x: int, n: int) -> float:
    """Of n floats at an address; see reference.sum_of_squares."""
    lanes = splat(_ZERO)
    for i in range(0, 4 * n, 64):
        part = load_f32(x + i)
        lanes = fma(part, part, lanes)
    return sum_lanes(lanes)


@inner
def add_row(out: int, added: int, n: int) -> None:
    """Add n floats at an address to those at `out`."""
    for i in range(0, 4 * n, 64):
        store_f32(out + i, load_f32(out + i) + load_f32(added + i))


@inner
def unit_norm(x: int, n: int, eps: float, factor: float) -> None:
    """Divide n floats by their length, then multiply with a factor, in place; see reference.unit_norm."""
    scale = splat(_ONE / np.float32(np.sqrt(np.float32(sum_of_squares(x, n) + np.float32(eps)))))
    for i in range(0, 4 * n, 64):
        store_f32(x + i, (load_f32(x + i) * scale) * splat(np.float32(factor)))


@inner
def rms_norm(x: int, weight: int, out: int, n: int, eps: float) -> None:
    """Norm one row of n floats at address `x` into `out`; see reference.rms_norm."""
    mean = sum_of_squares(x, n) / np.float32(n)
    scale = splat(_ONE / np.float32(np.sqrt(np.float32(mean + np.float32(eps)))))
    for i in range(0, 4 * n, 64):
        store_f32(out + i, (load_f32(x + i) * scale) * load_f32(weight + i))


@inner
def quantise_group(low: Any, high: Any, out: int) -> None:
    """A group of 32 floats as int8: 32 integers, their float32 scale and the int32 sums of both halves, 44 bytes."""
    largest = max_lanes(maximum(absolute(low), absolute(high)))
    inverse = _ZERO
    if largest > _TINY:
        inverse = _127 / largest
    first, second = round_i32(low * splat(inverse)), round_i32(high * splat(inverse))
    store_i8(out, first)
    store_i8(out + 16, second)
    store_float(out + 32, largest / _127)
    store_int(out + 36, sum_lanes_i32(first))
    store_int(out + 40, sum_lanes_i32(second))


@inner
def quantise_row(x: int, n: int, groups: int) -> None:
    """Quantise the n floats at `x` in groups of 32."""
    for group in range((n + 31) // 32):
        quantise_group(load_f32(x + 128 * group), load_f32(x + 128 * group + 64), groups + GROUP_BYTES * group)
