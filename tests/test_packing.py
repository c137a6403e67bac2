"""Packing from a file's rows, slab by slab: byte for byte what the slow NumPy version writes, in all formats."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import UnsupportedError
from edgert.quant import ggml, packing
from edgert.quant.formats import BF16, F16, F32, INT4, INT4_MIN, INT8, Matrix
from edgert.quant.packing import StoredMatrix

FORMATS = {
    Type.Q4_0: INT4,
    Type.Q4_1: INT4_MIN,
    Type.Q8_0: INT8,
    Type.F16: F16,
    Type.BF16: BF16,
    Type.F32: F32,
    Type.Q5_0: F16,  # decoded
    Type.Q6_K: F16,
}


def stored(raw: Any, kind: Type, shape: tuple[int, int], *, decode_to_f32: bool = False) -> StoredMatrix:
    """A matrix over rows in memory."""
    format = ggml.format_for(kind, decode_to_f32=decode_to_f32)
    return StoredMatrix("m.gguf: the tensor w", kind, shape, format, lambda first, n: raw[first : first + n].copy())


def random_rows(kind: Type, n_out: int, n_in: int, seed: int) -> Any:
    """Blocks of any bytes, with scales below 1: uint8 (n_out, row_bytes)."""
    random = np.random.default_rng(seed)
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (n_out, n_in // block, n_bytes), np.uint8)
    scale_at = n_bytes - 2 if kind == Type.Q6_K else 0
    if kind in (Type.Q5_0, Type.Q6_K):
        blocks[..., scale_at + 1] &= 0x9F
    return blocks.reshape(n_out, -1)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@settings(max_examples=15, deadline=None)
@given(n_out=st.integers(1, 70), groups=st.integers(1, 5), slab=st.sampled_from([1, 1 << 14]), seed=st.integers(0, 99))
def test_tiles_equal_the_slow_version(kind: Type, n_out: int, groups: int, slab: int, seed: int) -> None:
    block = gguf.GGML_QUANT_SIZES[kind][0]
    n_in = block * groups if block > 1 else 32 * groups - seed % 5
    raw = random_rows(kind, n_out, n_in, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SLAB_BYTES", slab)
        source = stored(raw, kind, (n_out, n_in))
        assert source.format is FORMATS[kind]
        ours, slow = (np.full(source.format.matrix_bytes(n_out, n_in), fill, np.uint8) for fill in (0xAA, 0x55))
        source.pack(ours)
        whole = source.whole()
        whole.pack(slow)
        assert (ours == slow).all()
        patch.setattr(packing, "JIT_ENABLED", False)
        ours[:] = 0xAA
        source.pack(ours)
        assert (ours == slow).all()
    if kind in (Type.Q5_0, Type.Q6_K):
        halves = gguf.quants.dequantize(raw, kind).astype(np.float16)
        assert (whole.to_float() == halves).all()


def test_slabs_are_read_once_in_order_and_are_small() -> None:
    n_out, n_in = 5000, 2048
    raw = random_rows(Type.Q8_0, n_out, n_in, 1)
    asked: list[tuple[int, int]] = []

    def read(first: int, count: int) -> Any:
        asked.append((first, count))
        return raw[first : first + count]

    source = StoredMatrix("w", Type.Q8_0, (n_out, n_in), INT8, read)
    source.pack(np.empty(INT8.matrix_bytes(n_out, n_in), np.uint8))
    assert sum(count for _, count in asked) == n_out and len(asked) == 10
    assert all(first == 512 * i and count <= 512 for i, (first, count) in enumerate(asked))
    assert packing.packing_bytes(Type.Q8_0, n_out, n_in) == raw[:512].nbytes


@pytest.mark.parametrize("kind", [Type.Q5_0, Type.Q6_K, Type.IQ4_XS, Type.MXFP4, Type.Q2_K], ids=lambda kind: kind.name)
def test_other_types_are_decoded_to_f32_and_to_f16_where_it_holds_them(kind: Type) -> None:
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(1).integers(0, 100, (8, 512 // block * n_bytes), np.uint8)
    weights = gguf.quants.dequantize(raw, kind)
    exact = stored(raw, kind, (8, 512), decode_to_f32=True).whole()
    assert exact.format is F32 and (exact.to_float() == weights).all()
    source = stored(raw, kind, (8, 512))
    out = np.empty(F16.matrix_bytes(8, 512), np.uint8)
    if np.abs(weights).max() > 65504:
        for call in (source.whole, lambda: source.pack(out)):
            with pytest.raises(UnsupportedError, match=r"m.gguf: the tensor w is .* beyond 65504.*activations='f32'"):
                call()
    else:
        half: Matrix = source.whole()
        assert half.format is F16 and (half.to_float() == weights.astype(np.float16)).all()
