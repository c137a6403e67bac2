"""Weight formats: packing read back by an independent reading of the layout, ggml's types against `gguf`, the reference
product against one that is written out weight by weight.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.quant import ggml, reference, unpacking
from edgert.quant.formats import BF16, F16, F32, FORMATS, Format, Matrix

INTEGER_FORMATS = [name for name, format in FORMATS.items() if format.is_integer]


def random_matrix(format: Format, n_out: int, n_blocks: int, seed: int, size: float = 1.0) -> Matrix:
    """A matrix of any integers, with scales of about `size`; n_blocks blocks of columns (32 for a float format)."""
    random = np.random.default_rng(seed)
    n_in = format.block * n_blocks if format.is_integer else n_blocks

    def halves(n: int) -> Any:
        return (random.standard_normal((n_out, n)) * size).astype(np.float16)

    if format is BF16:
        return Matrix(format, random.integers(0, 0x7F80, (n_out, n_in)).astype(np.uint16))
    if not format.is_integer:
        return Matrix(format, halves(n_in) if format is F16 else halves(n_in).astype(np.float32) / 3)
    values = random.integers(0, 1 << format.bits, (n_out, n_in), np.uint8)
    n_groups = n_in // format.group
    if not format.scale_bits:
        scales = random.integers(100, 140, (n_out, n_groups), np.uint8) if format.is_e8m0 else halves(n_groups)
        return Matrix(format, values, scales, halves(n_groups) if format.has_minimum else None)
    tables = [random.integers(0, 1 << format.scale_bits, (n_out, n_groups), np.uint8) for _ in range(2)]
    minimum = (tables[1], halves(n_blocks)) if format.has_minimum else (None, None)
    return Matrix(format, values, tables[0], minimum[0], halves(n_blocks), minimum[1])


def read_field(block: Any, start: int, bits: int, vector: int, byte: int, n_vectors: int, width: int) -> int:
    """Integer `byte` of a vector of `width` in planes of a block: the wide plane's bits, then the narrow one's."""
    value, low = 0, 0
    for plane in (8, 4, 2, 1):
        if bits & plane:
            at = start + vector * plane // 8 * width + byte
            value |= (int(block[at]) >> (vector * plane % 8) & (1 << plane) - 1) << low
            low, start = low + plane, start + n_vectors * width * plane // 8
    return value


def unpack(format: Format, tiles: Any, n_out: int, n_in: int) -> tuple[Any, list[Any]]:
    """Integers (n_out, n_in), and the tables of scales, minima, super-scales, super-minima as they are stored."""
    blocks = tiles.reshape(-1, n_in // format.block, format.block_bytes)
    n_groups, n_chunks = format.block // format.group, format.block // 32
    values = np.zeros((len(blocks) * 16, n_in), np.uint8)
    scale_bits = 8 if format.is_e8m0 else format.scale_bits
    tables = []
    for column in range(n_in):
        of_block = blocks[:, column // format.block]
        chunk, rest = divmod(column % format.block, 32)
        start = chunk * 64 * format.bits
        for tile, lane in np.ndindex(len(blocks), 16):
            values[16 * tile + lane, column] = read_field(
                of_block[tile], start, format.bits, rest // 4, 4 * lane + rest % 4, 8, 64
            )
    at = n_chunks * 64 * format.bits
    for _ in range(2 if format.has_minimum else 1):
        kind = np.uint8 if scale_bits else np.uint16
        table = np.zeros((len(blocks) * 16, n_in // format.group), kind)
        for tile, block, group, lane in np.ndindex(len(blocks), blocks.shape[1], n_groups, 16):
            if scale_bits:
                found = read_field(blocks[tile, block], at, scale_bits, group, lane, n_groups, 16)
            else:
                low, high = blocks[tile, block, at + 32 * group + 2 * lane :][:2]
                found = int(low) + 256 * int(high)
            table[16 * tile + lane, block * n_groups + group] = found
        tables.append(table)
        at += n_groups * 2 * (scale_bits or 16)
    for _ in range((2 if format.has_minimum else 1) if format.scale_bits else 0):
        halves = np.ascontiguousarray(blocks[:, :, at : at + 32]).view(np.uint16)  # (tile, block, lane)
        tables.append(halves.transpose(0, 2, 1).reshape(-1, blocks.shape[1]))
        at += 32
    assert at == format.block_bytes
    return values, tables


@pytest.mark.parametrize("name", INTEGER_FORMATS)
@pytest.mark.parametrize("n_out", [1, 16, 18])
def test_packed_integers_read_back(name: str, n_out: int) -> None:
    matrix = random_matrix(FORMATS[name], n_out, 2, n_out)
    packed = np.full(matrix.format.matrix_bytes(*matrix.shape) + 32, 0xAA, np.uint8)
    matrix.pack(packed[16:-16])
    assert (packed[:16] == 0xAA).all() and (packed[-16:] == 0xAA).all()
    values, tables = unpack(matrix.format, packed[16:-16], *matrix.shape)
    given = [t for t in (matrix.scales, matrix.minima, matrix.super_scales, matrix.super_minima) if t is not None]
    for found, stored in zip([values, *tables], [matrix.values, *given], strict=True):
        stored = stored.view(np.uint16) if stored.dtype == np.float16 else stored
        assert (found[:n_out] == stored).all()
        assert not found[n_out:].any()


@pytest.mark.parametrize("format", [F16, BF16, F32], ids=lambda format: format.name)
@pytest.mark.parametrize("n_out", [1, 16, 35])
def test_packed_floats_read_back(format: Format, n_out: int) -> None:
    matrix = random_matrix(format, n_out, 37, n_out)
    packed = np.full(format.matrix_bytes(n_out, 37), 0xAA, np.uint8)
    matrix.pack(packed)
    rows = packed.view(matrix.values.dtype).reshape(-1, 37, 16).transpose(0, 2, 1).reshape(-1, 37)
    assert (rows[:n_out] == matrix.values).all() and not rows[n_out:].any()


@pytest.mark.parametrize("name", INTEGER_FORMATS)
def test_weights_are_what_the_definition_says_rounded_once(name: str) -> None:
    format = FORMATS[name]
    matrix = random_matrix(format, 3, 1, 5, size=300.0)
    weights = matrix.to_float()
    for row, column in np.ndindex(3, format.block):
        group = column // format.group
        integer = int(matrix.values[row, column])
        integer = format.table[integer] if format.table else integer - format.offset
        levels = []
        for stored, above, offset in (
            (matrix.scales, matrix.super_scales, format.scale_offset),
            (matrix.minima, matrix.super_minima, 0),
        ):
            if stored is None:
                levels.append(Fraction(0))
            elif format.is_e8m0:
                levels.append(Fraction(2) ** (int(stored[row, group]) - 128))
            elif above is None:
                levels.append(Fraction(float(stored[row, group])))
            else:
                levels.append((int(stored[row, group]) - offset) * Fraction(float(above[row, 0])))
        exact = integer * levels[0] + levels[1]
        got = weights[row, column]
        near = [np.nextafter(got, np.float32(side)) for side in (-np.inf, np.inf)]
        assert all(abs(Fraction(float(got)) - exact) <= abs(Fraction(float(other)) - exact) for other in near)


def halves_of(kind: Type) -> list[int]:
    """Bytes of a ggml block at which half floats stand."""
    return [at for at in (ggml.LAYOUTS[kind].half_scale, ggml.LAYOUTS[kind].half_minimum) if at >= 0]


def random_blocks(kind: Type, n_out: int, n_blocks: int, seed: int) -> Any:
    """Any bits, but scales that are finite; among them zero, denormal, negative and the largest ones."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (n_out, n_blocks, ggml.LAYOUTS[kind].n_bytes), np.uint8)
    special = np.array([0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x3C00], np.uint16)
    for at in halves_of(kind):
        bits = random.integers(0, 0x7C00, (n_out, n_blocks), np.uint16) | (random.integers(0, 2, raw.shape[:2]) << 15)
        bits = np.where(random.random(bits.shape) < 0.3, random.choice(special, bits.shape), bits).astype(np.uint16)
        raw[:, :, at : at + 2] = bits[..., None].view(np.uint8)
    if kind == Type.MXFP4:
        raw[:, :, 0] = random.choice(np.array([0, 1, 2, 3, 100, 127, 128, 251, 252], np.uint8), raw.shape[:2])
    return raw.reshape(n_out, -1)


@pytest.mark.parametrize("kind", ggml.LAYOUTS, ids=lambda kind: kind.name)
@settings(max_examples=30, deadline=None)
@given(n_out=st.integers(1, 20), n_blocks=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_types_carry_over_exactly(kind: Type, n_out: int, n_blocks: int, seed: int) -> None:
    """Equal to `gguf`'s own float32: its products are exact (at most 24 bits), so its one sum is the one rounding."""
    format = ggml.format_for(kind)
    raw = random_blocks(kind, n_out, n_blocks, seed)
    matrix = ggml.matrix(raw.reshape(-1), kind, (n_out, n_blocks * format.block), format)
    assert (matrix.to_float() == gguf.quants.dequantize(raw, kind)).all()
    assert matrix.not_finite() == -1
    if seed % 2:
        row, at = seed % n_out, (halves_of(kind) or [0])[-1]
        raw[row:, at : at + 2] = [253, 0] if kind == Type.MXFP4 else [0, 0x7C | seed & 0x83]
        matrix = ggml.matrix(raw.reshape(-1), kind, (n_out, n_blocks * format.block), format)
        assert matrix.not_finite() == row


@pytest.mark.parametrize("kind", ggml.LAYOUTS, ids=lambda kind: kind.name)
def test_types_keep_their_size(kind: Type) -> None:
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    format = ggml.format_for(kind)
    assert format.block == block and format.matrix_bytes(32, 3 * block) == 32 * 3 * n_bytes
    assert ggml.is_exact(kind)


@pytest.mark.parametrize("format", [F16, BF16, F32], ids=lambda format: format.name)
def test_a_float_that_is_not_finite_is_found(format: Format) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        values = np.ones((5, 7), np.float32)
        values[3, 6] = values[4, 0] = bad
        stored: Any = values.view(np.uint32) >> 16 if format is BF16 else values
        matrix = Matrix(format, stored.astype({F16: np.float16, BF16: np.uint16, F32: np.float32}[format]))
        assert matrix.not_finite() == 3
        assert Matrix(format, matrix.values[:3]).not_finite() == -1


def written_out(matrix: Matrix, integers: Any, x_scales: Any) -> Any:
    """One row of activations times a matrix, group by group, from the stored tables: the definition."""
    f32, format = np.float32, matrix.format
    width = min(format.group, 32)
    out = np.zeros(matrix.shape[0], f32)
    scales, minima, quants = matrix.float_scales(), matrix.float_minima(), matrix.integers()
    for row in range(matrix.shape[0]):
        total = f32(0)
        for start in range(0, matrix.shape[1], width):
            columns, group = slice(start, start + width), start // format.group
            dot = int(integers[columns].astype(int) @ quants[row, columns].astype(int))
            x_scale = x_scales[start // 32]
            total = reference.fma(f32(dot), scales[row, group] * x_scale, total)
            if minima is not None:
                total = reference.fma(minima[row, group], x_scale * f32(int(integers[columns].sum(dtype=int))), total)
        out[row] = np.asarray(total).reshape(())
    return out


@pytest.mark.parametrize("name", INTEGER_FORMATS)
def test_the_reference_product_is_its_definition(name: str) -> None:
    matrix = random_matrix(FORMATS[name], 5, 2, 1)
    x = np.random.default_rng(2).standard_normal((3, matrix.shape[1])).astype(np.float32)
    integers, scales = reference.quantise_activations(x)
    quantised = reference.matmul(matrix, x, int8_activations=True)
    for row in range(3):
        assert (quantised[row] == written_out(matrix, integers[row], scales[row])).all()
    floats = reference.matmul(matrix, x, int8_activations=False)
    exact = x.astype(np.float64) @ matrix.to_float().astype(np.float64).T
    size = np.abs(x).astype(np.float64) @ np.abs(matrix.to_float()).astype(np.float64).T
    assert (np.abs(floats - exact) <= 1e-5 * size).all()
    assert (np.abs(quantised - exact) <= 0.02 * size).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n_out", [1, 16, 21])
def test_unpacking_is_the_inverse_of_packing(name: str, n_out: int) -> None:
    matrix = random_matrix(FORMATS[name], n_out, 2, n_out)
    tiles = np.zeros(matrix.format.matrix_bytes(*matrix.shape), np.uint8)
    matrix.pack(tiles)
    again = unpacking.unpack(tiles, matrix.format, matrix.shape)
    for table in ("values", "scales", "minima", "super_scales", "super_minima"):
        ours, theirs = getattr(again, table), getattr(matrix, table)
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.dtype == theirs.dtype and np.array_equal(ours, theirs)), table
