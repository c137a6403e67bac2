"""Vector operations by themselves: half floats without the instruction, not-a-number, rounding, lanes."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from models import engine_of, golden_path, run

from edgert.devices.cpu import aligned
from edgert.quant import functions, isa, reference, simd


def convert(halves: Any, floats: Any, out_floats: Any, out_halves: Any) -> None:
    """Widen 16 halves at a time, narrow 16 floats at a time."""
    for i in range(0, len(halves), 16):
        simd.store_f32(out_floats[i:].ctypes.data, simd.load_f16(halves[i:].ctypes.data))
    for i in range(0, len(floats), 16):
        simd.store_f16(out_halves[i:].ctypes.data, simd.load_f32(floats[i:].ctypes.data))
    for i in range(16):
        simd.store_half(out_halves[i:].ctypes.data, floats[i])


@pytest.mark.parametrize("instruction", [True, False])
def test_half_floats(instruction: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if instruction and not isa.has_half_floats():
        pytest.skip("this CPU has no instruction for half floats")
    monkeypatch.setattr(isa, "has_half_floats", lambda: instruction)
    halves = np.arange(1 << 16, dtype=np.uint16)
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    low = halves[:31744].view(np.float16).astype(np.float64)  # finite and positive, ascending
    ties = (low[:-1] + low[1:]) / 2
    edges = [
        65504,
        65519.996,
        65520,
        65536,
        1e38,
        np.inf,
        -np.inf,
        0,
        -0.0,
        2**-24,
        2**-25,
        2**-25 * 1.001,
        2**-14,
        1e-40,
        6e-5,
        7e-8,
    ]
    floats = np.concatenate(
        [bits.view(np.float32), ties.astype(np.float32), -ties.astype(np.float32), np.float32(edges)]
    )
    floats = floats[np.isfinite(floats) | np.isinf(floats)]
    floats = floats[: len(floats) // 16 * 16].copy()
    out_floats, out_halves = np.empty(len(halves), np.float32), np.empty(len(floats), np.uint16)
    numba.njit(convert)(halves, floats, out_floats, out_halves)
    expected = halves.view(np.float16).astype(np.float32)
    number = ~np.isnan(expected)
    assert (out_floats[number] == expected[number]).all() and np.isnan(out_floats[~number]).all()
    assert (np.signbit(out_floats) == np.signbit(expected)).all()
    with np.errstate(over="ignore"):
        assert (out_halves == floats.astype(np.float16).view(np.uint16)).all()
    out_halves = np.empty(16, np.uint16)
    numba.njit(convert)(halves[:0], np.full(16, np.nan, np.float32), out_floats, out_halves)
    assert np.isnan(out_halves.view(np.float16)).all()


def test_not_a_number_is_never_laundered() -> None:
    for place in (0, 5, 17, 31):
        x = aligned(128).view(np.float32)
        x[:] = 1.0
        x[place] = np.nan
        integers, scales, sums = aligned(32), aligned(4).view(np.float32), aligned(4)
        functions.quantise_row(x.ctypes.data, 32, integers.ctypes.data, scales.ctypes.data, sums.ctypes.data)
        assert np.isnan(scales[0])
        functions.rms_norm(x.ctypes.data, x.ctypes.data, x.ctypes.data, 32, 1e-5)
        assert np.isnan(x).all()
    assert np.isnan(reference.exp(np.float32([np.nan]))).all()


@pytest.mark.parametrize("name", ["attn_q", "attn_k", "attn_v", "ffn_gate_inp", "ffn_up_exps", "output"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_weights_show_in_the_logits(name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgert.storage.gguf_file import GgufFile

    original = GgufFile.read_rows

    def broken(self: Any, tensor: str, first_row: int, n_rows: int) -> Any:
        raw = original(self, tensor, first_row, n_rows).copy()
        if f".{name}." in f".{tensor}" and first_row == 0:
            raw.reshape(-1).view(np.float32)[: raw.shape[1] // 4] = value
        return raw

    monkeypatch.setattr(GgufFile, "read_rows", broken)
    read = GgufFile.read
    monkeypatch.setattr(
        GgufFile,
        "read",
        lambda self, tensor: (
            broken(self, tensor, 0, self.tensors[tensor].n_rows).reshape(-1)
            if tensor.endswith("weight")
            else read(self, tensor)
        ),
    )
    logits = run(*engine_of(golden_path("llama-f32")), list(range(40)))
    assert not np.isfinite(logits).all()


def dot(unsigned: Any, signed: Any, out: Any) -> None:
    """100 + each lane's four products."""
    total = simd.splat_i32(np.int32(100))
    total = simd.dot4(total, simd.load_i8(unsigned.ctypes.data), simd.load_i8(signed.ctypes.data))
    simd.store_f32(out.ctypes.data, simd.to_f32(total))


@pytest.mark.parametrize("path", isa.PATHS, ids=lambda path: path.name)
def test_dot_products_are_exact_at_the_extremes(path: isa.InstructionPath, monkeypatch: pytest.MonkeyPatch) -> None:
    if not set(path.needs) <= isa.cpu_features():
        pytest.skip(f"this CPU lacks one of {', '.join(path.needs)}")
    monkeypatch.setattr(isa, "choose", lambda: path)
    compiled = numba.njit(dot)
    random = np.random.default_rng(0)
    for extreme in (True, False):
        for _ in range(50):
            unsigned = random.choice([0, 255], 64) if extreme else random.integers(0, 256, 64)
            signed = random.choice([-128, 127], 64) if extreme else random.integers(-128, 128, 64)
            out = np.empty(16, np.float32)
            compiled(unsigned.astype(np.uint8), signed.astype(np.int8), out)
            assert (out == 100 + (unsigned * signed).reshape(16, 4).sum(axis=1)).all()
