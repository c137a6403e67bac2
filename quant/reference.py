"""The arithmetic of edgert in NumPy: slow, obvious, and equal to the compiled kernels bit for bit.

This file is the definition of the order of operations. Sums over columns are fused multiply-adds with ascending column
(or, with int8 activations, ascending group of 32, exact int32 inside); sums over a vector go through 16 lanes and one
fixed tree; exp is one polynomial.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgert.quant.formats import GROUP, Matrix

Array = npt.NDArray[np.float32]

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693359375)  # Cody and Waite: n * LN2_HIGH is exact for |n| < 2**13
LN2_LOW = np.float32(-2.12194440e-4)
EXP_LOWEST = np.float32(-87.0)  # below: exactly 0
EXP_HIGHEST = np.float32(88.0)  # above: infinite
SMALLEST_GROUP = np.float32(2.0**-100)  # a group of activations below is zero: 127 / x would overflow
# exp(r) = 1 + r + r**2 * p(r) for |r| <= ln(2) / 2; p of degree 5 fitted at Chebyshev nodes, highest power first
EXP_COEFFICIENTS = tuple(
    np.float32(c)
    for c in (1.989928714e-04, 1.393365208e-03, 8.333298378e-03, 4.166646674e-02, 1.666666716e-01, 5.000000000e-01)
)


def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> Array:
    """a * b + c in float32 with one rounding.

    The product is exact in float64; the float64 sum is rounded to odd, so that rounding it again to float32 is right
    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product = np.multiply(a, b, dtype=np.float64)
    c = np.asarray(c, np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)  # two-sum: total + error is the exact sum
    bits = np.atleast_1d(total).view(np.int64)
    odd_already = (bits & 1) == 1
    away = (np.atleast_1d(error) > 0) == (np.atleast_1d(total) > 0)
    inexact = (np.atleast_1d(error) != 0) & np.isfinite(np.atleast_1d(total)) & ~odd_already
    bits = np.where(inexact, np.where(away, bits + 1, bits - 1), bits)
    return bits.view(np.float64).astype(np.float32).reshape(total.shape)


def sum_lanes(values: Array) -> Array:
    """Sum over the last axis, 16 long: halves added to halves."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def exp(x: Array) -> Array:
    """e**x, float32, relative error below 2e-7; 0 below -87, infinite above 88."""
    clamped = np.minimum(np.maximum(x, EXP_LOWEST), EXP_HIGHEST)
    n = np.rint(clamped * LOG2_E)
    r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, clamped))
    p = np.full_like(r, EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        p = fma(p, r, coefficient)
    y = fma(p, r * r, r) + np.float32(1.0)
    with np.errstate(invalid="ignore"):  # not a number stays one, through y
        scale = ((n.astype(np.int32) + 127) << 23).view(np.float32)
    return np.where(x < EXP_LOWEST, np.float32(0.0), np.where(x > EXP_HIGHEST, np.float32(np.inf), y * scale))


def sigmoid(x: Array) -> Array:
    """1 / (1 + e**-x)."""
    return np.float32(1.0) / (np.float32(1.0) + exp(-x))


def silu(x: Array) -> Array:
    """x / (1 + e**-x)."""
    return x / (np.float32(1.0) + exp(-x))


# log(1 + u) = 2 f (1 + f**2 / 3 + f**4 / 5 + ...) with f = u / (2 + u), at most 1/3 for u up to 1; highest power first
LOG_COEFFICIENTS = tuple(np.float32(1.0 / n) for n in (17, 15, 13, 11, 9, 7, 5, 3))


def softplus(x: Array) -> Array:
    """log(1 + e**x), float32, relative error below 1e-6: the larger of x and 0, and log(1 + e**-|x|)."""
    u = exp(-np.abs(x))
    f = u / (u + np.float32(2.0))
    square = f * f
    p = np.full_like(square, LOG_COEFFICIENTS[0])
    for coefficient in LOG_COEFFICIENTS[1:]:
        p = fma(p, square, coefficient)
    twice = f + f
    return np.maximum(x, np.float32(0.0)) + fma(p, square * twice, twice)


ACTIVATIONS = ("silu", "gelu", "swiglu-oss")
GELU_CUBE, GELU_SCALE = np.float32(0.044715), np.float32(1.5957691216)  # the second is 2 * sqrt(2 / pi)
OSS_LIMIT, OSS_ALPHA = np.float32(7.0), np.float32(1.702)


def activate(gate: Array, up: Array, activation: str) -> Array:
    """A gated unit, float32, element by element.

    silu: gate sigmoid(gate) up (Shazeer 2020, arXiv 2002.05202). gelu: the tanh form of Hendrycks and Gimpel 2016
    (arXiv 1606.08415), by tanh(z) = 2 sigmoid(2 z) - 1. swiglu-oss: both clamped to 7, sigmoid(1.702 gate), up + 1.
    """
    if activation == "silu":
        return silu(gate) * up
    if activation == "gelu":
        inner = gate * fma(gate * gate, GELU_CUBE, np.float32(1.0))
        return (gate * sigmoid(inner * GELU_SCALE)) * up
    gate = np.minimum(gate, OSS_LIMIT)
    up = np.clip(up, -OSS_LIMIT, OSS_LIMIT)
    return (gate * sigmoid(gate * OSS_ALPHA)) * (up + np.float32(1.0))


def sum_of_squares(x: Array) -> Array:
    """Over the last axis of (n, d), in 16 lanes."""
    n, d = x.shape
    padded = np.zeros((n, -(-d // 16) * 16), np.float32)
    padded[:, :d] = x
    lanes = np.zeros((n, 16), np.float32)
    for start in range(0, d, 16):
        part = padded[:, start : start + 16]
        lanes = fma(part, part, lanes)
    return sum_lanes(lanes)


def rms_norm(x: Array, weight: Array, eps: float, bias: Array | None = None) -> Array:
    """(x / sqrt(mean(x**2) + eps)) * weight over the last axis of (n, d), plus a bias if there is one."""
    mean = sum_of_squares(x) / np.float32(x.shape[1])
    scale = np.float32(1.0) / np.sqrt(mean + np.float32(eps))
    normed = (x * scale[:, None]) * weight
    return normed if bias is None else normed + bias


def unit_norm(x: Array, eps: float) -> Array:
    """x / sqrt(sum(x**2) + eps) over the last axis of (n, d)."""
    return x * (np.float32(1.0) / np.sqrt(sum_of_squares(x) + np.float32(eps)))[:, None]


def quantise_activations(x: Array) -> tuple[npt.NDArray[np.int8], Array]:
    """Integers int8 (n, d) and scales float32 (n, d / 32) with x ~ integer * scale; d is a multiple of 32."""
    groups = x.reshape(x.shape[0], -1, GROUP)
    largest = np.abs(groups).max(axis=2)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest > SMALLEST_GROUP, np.float32(127.0) / largest, np.float32(0.0))
    integers = np.rint(groups * inverse[:, :, None]).astype(np.int8)
    return integers.reshape(x.shape), largest / np.float32(127.0)


def matmul(matrix: Matrix, x: Array, *, int8_activations: bool) -> Array:
    """x @ matrix.T: (n, n_in) -> (n, n_out), in the order of operations of the kernels.

    With int8 activations and an integer format, for each 32 columns (16 where groups are that short), ascending: the
    dot product is exact; total = fma(dot, weight scale * activation scale, total); then, where the format has minima,
    total = fma(minimum, activation scale * sum of the activations' integers, total). Otherwise one fma per column.
    """
    total = np.zeros((x.shape[0], matrix.shape[0]), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # weights may be of any finite size
        if int8_activations and matrix.format.is_integer:
            return _integer_matmul(matrix, x, total)
        weights = matrix.to_float()
        for column in range(weights.shape[1]):
            total = fma(weights[None, :, column], x[:, column, None], total)
        return total


def _integer_matmul(matrix: Matrix, x: Array, total: Array) -> Array:
    integers, x_scales = quantise_activations(x)
    width = min(matrix.format.group, GROUP)
    n_parts, repeats = x.shape[1] // width, matrix.format.group // width
    activations = integers.reshape(-1, n_parts, width).astype(np.float32)
    quants = matrix.integers().reshape(-1, n_parts, width).astype(np.float32)
    # exact in whatever order: all sums are integers below 32 * 128 * 127 < 2**24
    dots = np.matmul(activations.transpose(1, 0, 2), quants.transpose(1, 2, 0))  # (n_parts, n, n_out)
    x_scales = np.repeat(x_scales, GROUP // width, axis=1)
    scaled_sums = x_scales * activations.sum(axis=2)
    scales, minima = matrix.float_scales(), matrix.float_minima()
    for part in range(n_parts):
        group = part // repeats
        total = fma(dots[part], scales[None, :, group] * x_scales[:, part, None], total)
        if minima is not None:
            total = fma(minima[None, :, group], scaled_sums[:, part, None], total)
    return total
