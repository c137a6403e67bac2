"""Compiled functions and matrix products against their NumPy reference: equal to the last bit, in all formats."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.devices.cpu import _pack, _Rows, aligned
from edgert.quant import functions, ggml, reference
from edgert.quant.formats import FORMATS, Matrix
from edgert.quant.jit import kernel
from edgert.quant.matmul import multiply
from edgert.quant.simd import load_f32, store_f32

EXACT = [Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.F16, Type.BF16, Type.F32]


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
    functions.rms_norm(x.ctypes.data, weight.ctypes.data, out.ctypes.data, n, 1e-5)
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
        ours, our_scales, sums = aligned(96).view(np.int8), aligned(12).view(np.float32), aligned(12).view(np.int32)
        functions.quantise_row(values.ctypes.data, 96, ours.ctypes.data, our_scales.ctypes.data, sums.ctypes.data)
        assert (ours == integers[row]).all() and (our_scales == scales[row]).all()
        assert (sums == integers[row].astype(int).reshape(3, 32).sum(axis=1)).all()
    assert np.abs(integers.astype(int)).max() == 127


def random_matrix(kind: Type, n_out: int, n_in: int, seed: int) -> tuple[Matrix, Any]:
    """A matrix in a ggml type, and the weights as `gguf` decodes them."""
    weights = np.random.default_rng(seed).standard_normal((n_out, n_in)).astype(np.float32)
    raw = np.ascontiguousarray(gguf.quants.quantize(weights, kind)).view(np.uint8)
    return ggml.matrix(raw.reshape(-1), kind, (n_out, n_in), ggml.format_for(kind)), gguf.quants.dequantize(raw, kind)


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
@settings(max_examples=12, deadline=None)
@given(n_out=st.integers(1, 70), groups=st.integers(1, 6), n_rows=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_products_equal_the_reference(kind: Type, n_out: int, groups: int, n_rows: int, seed: int) -> None:
    n_in = 32 * groups if ggml.format_for(kind).is_integer else 32 * groups - seed % 5
    matrix, weights = random_matrix(kind, n_out, n_in, seed)
    assert (matrix.to_float() == weights).all()
    x = np.random.default_rng(seed + 1).standard_normal((n_rows, n_in)).astype(np.float32)
    described = _pack(matrix, buffer := aligned(matrix.format.matrix_bytes(n_out, n_in)))
    bias = aligned(4 * 128).view(np.float32)
    bias[:n_out] = 1.5
    described["bias"] = bias.ctypes.data
    for quantised in (True, False):
        rows, out = _Rows(n_rows, n_in, quantised=quantised), _Rows(n_rows, n_out, quantised=False)
        rows.floats[:, :n_in] = x
        if quantised:
            for row in range(n_rows):
                at = rows.record[0]["stride"] * row
                r = rows.record[0]
                functions.quantise_row(
                    rows.floats[row].ctypes.data, n_in, r["integers"] + at, r["scales"] + at // 8, r["sums"] + at // 8
                )
        for thread in range(3):
            multiply(described[0], rows.record[0], n_rows, out.floats.ctypes.data, out.floats.shape[1], thread, 3)
        expected = reference.matmul(matrix, x, int8_activations=quantised) + np.float32(1.5)
        assert (out.floats[:, :n_out] == expected).all()
        exact = x.astype(np.float64) @ weights.T.astype(np.float64) + 1.5
        assert np.abs(expected - exact).max() < (0.12 if quantised else 1e-4) * np.sqrt(n_in)
    del buffer


def test_a_format_says_its_size() -> None:
    assert FORMATS["int4"].matrix_bytes(17, 64) == 2 * 2 * (256 + 32)
    assert FORMATS["int4-min"].matrix_bytes(16, 32) == 256 + 64
    assert FORMATS["int8"].matrix_bytes(16, 32) == 512 + 32
    assert FORMATS["bf16"].matrix_bytes(1, 5) == 16 * 5 * 2
