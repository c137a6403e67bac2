"""Compiled functions and matrix products against their NumPy reference: equal to the last bit, in all formats."""

from __future__ import annotations

from typing import Any

import compiled
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.devices.buffers import Rows, aligned
from edgert.errors import UnsupportedError
from edgert.quant import functions, ggml, matmul, reference
from edgert.quant.formats import FORMATS, Format, Matrix
from edgert.quant.jit import kernel
from edgert.quant.simd_memory import load_f32, store_f32
from edgert.quant.tile_kernels import GROUP_BYTES


@kernel
def over_rows(x: Any, out: Any) -> None:
    """exp, silu and sigmoid of each row of 16."""
    for row in range(len(x)):
        part = load_f32(x[row:].ctypes.data)
        store_f32(out[0, row:].ctypes.data, functions.exp(part))
        store_f32(out[1, row:].ctypes.data, functions.silu(part))
        store_f32(out[2, row:].ctypes.data, functions.sigmoid(part))


def test_exp_and_its_kin_equal_the_reference_and_are_accurate() -> None:
    x = np.concatenate([np.linspace(-100, 100, 4000), [0, -0.0, 1e-30, -1e-30, 88.5, -87.5, 3e38, -3e38]])
    x = np.resize(x, (251, 16)).astype(np.float32)
    out = np.empty((3, *x.shape), np.float32)
    over_rows(x, out)
    for ours, slow in zip(out, (reference.exp, reference.silu, reference.sigmoid), strict=True):
        assert (ours == slow(x)).all()
    middle = np.abs(x) < 87
    exact = np.exp(x[middle].astype(np.float64))
    assert np.abs(out[0][middle] / exact - 1).max() < 1.2e-7


@given(st.integers(0, 2**31), st.sampled_from([1.0, 1e-20, 1e15]))
def test_fma_rounds_once(seed: int, scale: float) -> None:
    from fractions import Fraction

    a, b, c = (np.random.default_rng(seed).standard_normal((3, 50)) * scale).astype(np.float32)
    c = np.where(np.arange(50) % 3 == 0, -(a * b), c).astype(np.float32)  # near cancellation
    for x, y, z, got in zip(a, b, c, reference.fma(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = [np.nextafter(got, np.float32(-np.inf)), got, np.nextafter(got, np.float32(np.inf))]
        errors = [abs(Fraction(float(value)) - exact) for value in near]
        assert errors[1] == min(errors)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 100, 576])
def test_rms_norm_equals_the_reference(n: int) -> None:
    random = np.random.default_rng(n)
    x, weight, out = (aligned(4 * 1024).view(np.float32) for _ in range(3))
    x[:n], weight[:n] = random.standard_normal(n), random.standard_normal(n)
    compiled.rms_norm(x.ctypes.data, weight.ctypes.data, out.ctypes.data, n, 1e-5)
    assert (out[:n] == reference.rms_norm(x[None, :n], weight[:n], 1e-5)[0]).all()
    assert not out[n:].any()


def test_quantised_activations_equal_the_reference() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((6, 96)).astype(np.float32) * np.float32([[1], [1e-30], [1e30], [0], [5], [1]])
    x[4, ::2] = 0.5  # ties: 63.5 rounds to even
    integers, scales = reference.quantise_activations(x)
    for row in range(len(x)):
        values = aligned(512).view(np.float32)
        values[:96] = x[row]
        groups = aligned(3 * GROUP_BYTES).reshape(3, GROUP_BYTES)
        compiled.quantise_row(values.ctypes.data, 96, groups.ctypes.data)
        ours, numbers = groups[:, :32].reshape(-1).view(np.int8), groups[:, 32:].copy()
        assert (ours == integers[row]).all() and (numbers[:, :4].copy().view(np.float32)[:, 0] == scales[row]).all()
        sums = integers[row].astype(np.int32).reshape(3, 2, 16).sum(axis=2)
        assert (numbers[:, 4:].copy().view(np.int32) == sums).all()
    assert np.abs(integers.astype(int)).max() == 127


def random_matrix(format: Format, n_out: int, n_in: int, seed: int) -> Matrix:
    """Any integers and scales of a format, weights of about 1."""
    random = np.random.default_rng(seed)
    if not format.is_integer:
        weights = random.standard_normal((n_out, n_in)).astype(np.float32)
        if format.name == "bf16":
            return Matrix(format, (weights.view(np.uint32) >> 16).astype(np.uint16))
        return Matrix(format, weights.astype(np.float16 if format.name == "f16" else np.float32))
    values = random.integers(0, 1 << format.bits, (n_out, n_in), np.uint8)
    shape, size = (n_out, n_in // format.group), 1 / (1 << format.bits)

    def halves(shape: tuple[int, int], size: float) -> Any:
        return (random.standard_normal(shape) * size).astype(np.float16)

    if format.is_e8m0:
        return Matrix(format, values, random.integers(118, 126, shape, np.uint8))
    if not format.scale_bits:
        return Matrix(format, values, halves(shape, size), halves(shape, 1.0) if format.has_minimum else None)
    above = n_out, n_in // 256

    def integers() -> Any:
        return random.integers(0, 1 << format.scale_bits, shape, np.uint8)

    size /= 1 << format.scale_bits
    if not format.has_minimum:
        return Matrix(format, values, integers(), None, halves(above, size))
    return Matrix(format, values, integers(), integers(), halves(above, size), halves(above, 0.02))


def rows_of(x: Any, *, quantised: bool) -> Rows:
    """Rows of activations for the kernels."""
    rows = Rows(len(x), x.shape[1], quantised=quantised)
    rows.floats[: len(x), : x.shape[1]] = x
    if quantised:
        record = rows.record[0]
        for row in range(len(x)):
            groups = record["groups"] + row * record["group_stride"]
            compiled.quantise_row(rows.floats[row].ctypes.data, x.shape[1], groups)
    return rows


def product(matrix: Matrix, x: Any, *, quantised: bool, bias: Any = None) -> Any:
    """x @ matrix.T + bias by the kernels, three threads' columns one after the other."""
    buffer = aligned(matrix.format.matrix_bytes(*matrix.shape))
    matrix.pack(buffer)
    address = 0 if bias is None else bias.ctypes.data
    described = matmul.matrix_record(matrix, buffer.ctypes.data, quantised=quantised, bias=address)
    rows, out = rows_of(x, quantised=quantised), Rows(len(x), matrix.shape[0])
    scratch, n_tiles = aligned(matmul.scratch_bytes(matrix.shape[1])), -(-matrix.shape[0] // 16)
    for thread in range(3):
        tile, last = n_tiles * thread // 3, n_tiles * (thread + 1) // 3
        compiled.multiply(
            described.ctypes.data, rows.record.ctypes.data, 0, len(x), tile, last - tile,
            out.address, out.stride, scratch.ctypes.data,
        )  # fmt: skip
    return out.floats[: len(x), : matrix.shape[0]]


FROM_GGML = sorted({ggml.format_for(kind).name for kind in ggml.Type if ggml.is_exact(kind)})
OURS = ["int2-g16-min", "int3-g64", "int6-g128-min", "int8-g16"]
WITH_FLOATS = {"bf16", "f16", "f32", "int3-g64", "int4", "int4-min", "int5-k", "int6-k", "int8", "mxfp4"}


@pytest.mark.parametrize("name", FROM_GGML + OURS)
@settings(max_examples=6, deadline=None)
@given(n_out=st.integers(1, 70), blocks=st.integers(1, 3), n_rows=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_products_equal_the_reference(name: str, n_out: int, blocks: int, n_rows: int, seed: int) -> None:
    format = FORMATS[name]
    n_in = format.block * blocks if format.is_integer else 32 * blocks - seed % 5
    matrix = random_matrix(format, n_out, n_in, seed)
    x = np.random.default_rng(seed + 1).standard_normal((n_rows, n_in)).astype(np.float32)
    bias = aligned(4 * 128).view(np.float32)
    bias[:n_out] = 1.5
    for quantised in (True, False) if name in WITH_FLOATS else (True,):
        expected = reference.matmul(matrix, x, int8_activations=quantised)
        assert (product(matrix, x, quantised=quantised) == expected).all()
        assert (product(matrix, x, quantised=quantised, bias=bias) == expected + np.float32(1.5)).all()
        weights = matrix.to_float().astype(np.float64)
        length = np.linalg.norm(weights, axis=1).max()
        assert np.abs(expected - x @ weights.T).max() < (0.08 if quantised else 1e-5) * length


@pytest.mark.parametrize(("name", "n_in"), [("int4", 48), ("int4-k", 128), ("int6-g128-min", 64)])
def test_a_shape_that_kernels_cannot_take_is_refused(name: str, n_in: int) -> None:
    matrix = Matrix(FORMATS[name], np.zeros((16, n_in), np.uint8))
    with pytest.raises(UnsupportedError, match=f"16 x {n_in} in {name}: columns must be a multiple of"):
        matmul.matrix_record(matrix, 0, quantised=True)


def test_a_format_without_kernels_is_refused() -> None:
    unknown = Format("int7", 7)
    with pytest.raises(UnsupportedError, match="int7"):
        matmul.matrix_record(Matrix(unknown, np.zeros((16, 32), np.uint8)), 0, quantised=True)


def test_a_format_says_its_size() -> None:
    assert FORMATS["int4"].matrix_bytes(17, 64) == 2 * 2 * (256 + 32)
    assert FORMATS["int4-min"].matrix_bytes(16, 32) == 256 + 64
    assert FORMATS["int8"].matrix_bytes(16, 32) == 512 + 32
    assert FORMATS["bf16"].matrix_bytes(1, 5) == 16 * 5 * 2
