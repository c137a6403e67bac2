"""Packing from a file's rows, slab by slab: byte for byte what the slow NumPy version writes, in all formats."""

from __future__ import annotations

import ctypes
import mmap
import re
import shutil
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.architectures import read_config
from edgert.errors import ModelFileError, UnsupportedError
from edgert.quant import ggml, packing
from edgert.quant.formats import BF16, F16, F32, FORMATS, INT8, Matrix
from edgert.quant.packing import StoredMatrix
from edgert.storage.gguf_file import GgufFile
from edgert.weights import Weights

FLOATS = [Type.F16, Type.BF16, Type.F32]
DECODED = [Type.IQ2_XXS, Type.IQ3_S, Type.TQ2_0]  # to F16
# Where the half floats of a block stand, of which some bits must not all be set.
HALVES = {
    Type.Q4_0: (0,),
    Type.Q4_1: (0, 2),
    Type.Q5_0: (0,),
    Type.Q5_1: (0, 2),
    Type.Q8_0: (0,),
    Type.IQ4_NL: (0,),
    Type.MXFP4: (),
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.IQ4_XS: (0,),
    Type.IQ2_XXS: (0,),
    Type.IQ3_S: (0,),
    Type.TQ2_0: (64,),
}


def name_of(kind: Type) -> str:
    return kind.name


def stored(raw: Any, kind: Type, shape: tuple[int, int], *, decode_to_f32: bool = False) -> StoredMatrix:
    """A matrix over rows in memory."""
    format = ggml.format_for(kind, decode_to_f32=decode_to_f32)
    return StoredMatrix("m.gguf: the tensor w", kind, shape, format, lambda first, n: raw[first : first + n].copy())


def random_rows(kind: Type, n_out: int, n_in: int, seed: int) -> Any:
    """Blocks of any bytes, but with finite scales: uint8 (n_out, row_bytes)."""
    random = np.random.default_rng(seed)
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (n_out, n_in // block, n_bytes), np.uint8)
    for at in HALVES.get(kind, ()):
        blocks[..., at + 1] &= 0x9F if kind in DECODED else 0xBF
    if kind == Type.MXFP4:
        blocks[..., 0] %= 253
    if kind in FLOATS:
        blocks[..., -1] &= 0xBF
    return blocks.reshape(n_out, -1)


@pytest.mark.parametrize("kind", [*HALVES, *FLOATS], ids=name_of)
@settings(max_examples=15, deadline=None)
@given(n_out=st.integers(1, 70), groups=st.integers(1, 5), slab=st.sampled_from([1, 1 << 14]), seed=st.integers(0, 99))
def test_tiles_equal_the_slow_version(kind: Type, n_out: int, groups: int, slab: int, seed: int) -> None:
    block = gguf.GGML_QUANT_SIZES[kind][0]
    n_in = block * groups if block > 1 else 32 * groups - seed % 5
    raw = random_rows(kind, n_out, n_in, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SLAB_BYTES", slab)
        source = stored(raw, kind, (n_out, n_in))
        assert source.format is (F16 if kind in DECODED else ggml.format_for(kind))
        size = source.format.matrix_bytes(n_out, n_in)
        ours, slow = np.full(size + 128, 0xAA, np.uint8), np.full(size, 0x55, np.uint8)
        source.pack(ours[64:-64])
        whole = source.whole()
        whole.pack(slow)
        assert (ours[64:-64] == slow).all()
        assert (ours[:64] == 0xAA).all() and (ours[-64:] == 0xAA).all()
        patch.setattr(packing, "JIT_ENABLED", False)
        ours[:] = 0xAA
        source.pack(ours[64:-64])
        assert (ours[64:-64] == slow).all()
    if kind in DECODED:
        halves = gguf.quants.dequantize(raw, kind).astype(np.float16)
        assert (whole.to_float() == halves).all()


@pytest.mark.parametrize("kind", [*ggml.LAYOUTS, *FLOATS], ids=name_of)
def test_rows_end_where_the_memory_ends(kind: Type, tmp_path: Any) -> None:
    """Rows at the very end of a mapping, before a page that may not be read."""
    block = gguf.GGML_QUANT_SIZES[kind][0]
    raw = random_rows(kind, 21, max(block, 8), 3)
    page = mmap.PAGESIZE
    n_pages = -(-raw.size // page)
    memory = mmap.mmap(-1, (n_pages + 1) * page)
    guarded = np.frombuffer(memory, np.uint8)
    assert protect(guarded.ctypes.data + n_pages * page, page) == 0
    rows = guarded[n_pages * page - raw.size : n_pages * page].reshape(raw.shape)
    rows[:] = raw
    format = ggml.format_for(kind)
    ours, slow = (np.zeros(format.matrix_bytes(21, max(block, 8)), np.uint8) for _ in range(2))
    assert packing.pack_rows(rows, kind, format, max(block, 8), ours) == -1
    ggml.matrix(raw.reshape(-1), kind, (21, max(block, 8)), format).pack(slow)
    assert (ours == slow).all()


def protect(address: int, size: int) -> int:
    """Forbid all access to a page; 0 where that worked."""
    return int(ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0))


def not_finite_rows(kind: Type, raw: Any, row: int) -> None:
    """Make the last block or number of a row not finite."""
    n_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    last = raw[row].reshape(-1, n_bytes)[-1]
    if kind == Type.MXFP4:
        last[0] = 253
    elif kind in FLOATS:
        bits = {Type.F16: 0xFC00, Type.BF16: 0x7F81, Type.F32: 0xFF800000}[kind]
        last[:] = np.frombuffer(bits.to_bytes(n_bytes, "little"), np.uint8)
    else:
        at = HALVES[kind][-1]
        last[at : at + 2] = [1, 0x7C] if row % 2 else [0, 0xFC]


@pytest.mark.parametrize("kind", [*HALVES, *FLOATS], ids=name_of)
@pytest.mark.parametrize("row", [0, 15, 16, 39])
def test_weights_that_are_not_finite_are_refused_by_tensor_and_row(
    kind: Type, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_in = 512
    raw = random_rows(kind, 40, n_in, 7)
    not_finite_rows(kind, raw, row)
    not_finite_rows(kind, raw, 39)
    monkeypatch.setattr(packing, "SLAB_BYTES", 1)
    source = stored(raw, kind, (40, n_in))
    out = np.empty(source.format.matrix_bytes(40, n_in), np.uint8)
    message = re.escape(f"m.gguf: the tensor w, row {row}, holds a weight that is infinite or not a number")
    for jit_enabled in (packing.JIT_ENABLED, False):
        monkeypatch.setattr(packing, "JIT_ENABLED", jit_enabled)
        for call in (source.whole, lambda: source.pack(out)):
            with pytest.raises(ModelFileError, match=message):
                call()


@contextmanager
def spoilt(path: Path, name: str, row: int) -> Iterator[Weights]:
    """The weights of a float32 model, one of them made infinite in a copy of the file."""
    shutil.copy(Path(__file__).parent / "golden" / "olmoe-f32.gguf", path)
    with GgufFile.open(path) as file, path.open("r+b") as stream:
        info = file.tensors[name]
        stream.seek(info.offset + 4 * (row * info.shape[-1] + 3))
        stream.write(np.float32(np.inf).tobytes())
    with GgufFile.open(path) as file:
        yield Weights(file, read_config(file.metadata, str(path)))


def test_a_spoilt_model_is_refused_by_tensor_expert_and_row(tmp_path: Path) -> None:
    path, name = tmp_path / "spoilt.gguf", "blk.1.ffn_up_exps.weight"
    with spoilt(path, "blk.0.attn_norm.weight", 0) as weights:
        with pytest.raises(
            ModelFileError, match=r"spoilt\.gguf: the tensor blk\.0\.attn_norm\.weight holds a weight that"
        ):
            weights.layer(0)
    with spoilt(path, "blk.1.attn_k.weight", 5) as weights:
        with pytest.raises(ModelFileError, match=r"the tensor blk\.1\.attn_k\.weight, row 5, holds a weight that"):
            weights.layer(1).mixer.key.matrix.whole()
    with spoilt(path, name, 2 * weights.config.d_expert + 1) as weights:
        experts = [expert.up for expert in weights.experts(1)]
        out = np.empty(experts[0].format.matrix_bytes(*experts[0].shape), np.uint8)
        for expert in (0, 1, 3):
            experts[expert].pack(out)
        with pytest.raises(
            ModelFileError, match=rf"the tensor {re.escape(name)}, expert 2, row 1, holds a weight that"
        ):
            experts[2].pack(out)


def test_rows_of_a_width_that_a_format_cannot_take_are_refused() -> None:
    message = r"the tensor w is Q4_K with rows of 288, which is not a multiple of 256"
    with pytest.raises(UnsupportedError, match=message):
        stored(np.zeros((1, 162), np.uint8), Type.Q4_K, (1, 288))


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
    assert packing.packing_bytes(Type.Q8_0, n_out, n_in) == raw[: 512 + 16].nbytes


@pytest.mark.skipif(not packing.JIT_ENABLED, reason="without the compiler rows are unpacked whole")
@pytest.mark.parametrize("kind", [Type.Q6_K, Type.MXFP4, Type.IQ3_S], ids=name_of)
def test_packing_takes_no_more_memory_than_planned(kind: Type) -> None:
    n_out, n_in = 2000, 2048
    raw = random_rows(kind, n_out, n_in, 1)
    source = stored(raw, kind, (n_out, n_in))
    out = np.empty(source.format.matrix_bytes(n_out, n_in), np.uint8)
    source.pack(out)  # compiles
    tracemalloc.start()
    source.pack(out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= packing.packing_bytes(kind, n_out, n_in) + 100_000


@pytest.mark.parametrize("kind", [Type.IQ2_XXS, Type.IQ3_S, Type.TQ1_0], ids=name_of)
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


def test_every_type_with_a_layout_is_tested_here() -> None:
    assert set(HALVES) - set(DECODED) == set(ggml.LAYOUTS)
    assert {ggml.format_for(kind) for kind in FLOATS} == {F16, BF16, F32}
    assert all(FORMATS[layout.format.name] is layout.format for layout in ggml.LAYOUTS.values())
