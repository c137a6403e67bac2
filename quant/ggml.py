"""From ggml's tensor types to edgert's formats.

The types in LAYOUTS and the floats carry over exactly: the same integers, the same scales, the same size. Every other
type that the `gguf` package can decode becomes F16, or F32 where exactness to the last bit is asked for. Where the
integers lie in ggml's blocks is data here, from which both this slow reading and the compiled packing work.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from edgert.quant.formats import BF16, F16, F32, FORMATS, GROUP, Format, Matrix, planes

# Where some integers' bits lie: for each (byte, shift), the byte of the block and the bits in it that come before.
Fields = list[tuple[int, int]]


@dataclass(frozen=True)
class Layout:
    """How a block of a ggml type holds the integers and scales of a format.

    integers and scales: for each plane of bits (see formats.planes) the fields of the block's columns or groups.
    Minima that are integers have the same planes as the scales. half_scale and half_minimum are the bytes of the
    half-float scale and minimum, or super-scale and super-minimum; -1: there is none.
    """

    format: Format
    n_bytes: int
    integers: tuple[Fields, ...]
    scales: tuple[Fields, ...] = ()
    minima: tuple[Fields, ...] = ()
    half_scale: int = -1
    half_minimum: int = -1
    integers_flip: int = 0  # exclusive-or on integers, and
    scales_flip: int = 0  # on integer scales: turns ggml's signed bytes into unsigned ones with an offset of 128
    subtracts: bool = False  # the super-minimum is subtracted by ggml, and added here


def _bytes(at: int) -> Fields:
    """A byte for each of 32 columns."""
    return [(at + column, 0) for column in range(GROUP)]


def _halved(at: int) -> Fields:
    """16 bytes: columns 0 to 15 of 32 in the low nibbles, 16 to 31 in the high ones."""
    return [(at + column % 16, 4 * (column // 16)) for column in range(GROUP)]


def _bits(at: int) -> Fields:
    """4 bytes, of which bit i belongs to column i of 32."""
    return [(at + column // 8, column % 8) for column in range(GROUP)]


def _strided(at: int, width: int, stride: int) -> Fields:
    """Parts of 256 columns: each run of `stride` bytes holds them `width` bits at a time, first the lowest bits."""
    run = stride * 8 // width
    return [(at + stride * (c // run) + c % stride, width * (c % run // stride)) for c in range(256)]


# The 12 bytes of Q4_K's and Q5_K's 6-bit scales and minima: groups 0 to 3 lie whole in bytes 0 to 3 (scales) and 4 to 7
# (minima); groups 4 to 7 have their low nibbles in bytes 8 to 11 and their high bits above those of groups 0 to 3.
_K_SCALES = ([(g, 0) for g in range(4)] + [(8 + g, 0) for g in range(4)], [(g, s) for s in (4, 6) for g in range(4)])
_K_MINIMA = ([(4 + g, 0) for g in range(4)] + [(8 + g, 4) for g in range(4)], [(4 + b, s) for b, s in _K_SCALES[1]])


def _shifted(fields: tuple[Fields, ...], at: int) -> tuple[Fields, ...]:
    return tuple([(at + byte, shift) for byte, shift in plane] for plane in fields)


def _layout(name: str, n_bytes: int, *integers: Fields, **further: Any) -> Layout:
    return Layout(FORMATS[name], n_bytes, integers, **further)


LAYOUTS = {
    Type.Q4_0: _layout("int4", 18, _halved(2), half_scale=0),
    Type.Q4_1: _layout("int4-min", 20, _halved(4), half_scale=0, half_minimum=2),
    Type.Q5_0: _layout("int5", 22, _halved(6), _bits(2), half_scale=0),
    Type.Q5_1: _layout("int5-min", 24, _halved(8), _bits(4), half_scale=0, half_minimum=2),
    Type.Q8_0: _layout("int8", 34, _bytes(2), half_scale=0, integers_flip=0x80),
    Type.IQ4_NL: _layout("iq4-nl", 18, _halved(2), half_scale=0),
    Type.MXFP4: _layout("mxfp4", 17, _halved(1), scales=([(0, 0)],)),
    Type.Q2_K: _layout(
        "int2-k",
        84,
        _strided(16, 2, 32),
        scales=([(g, 0) for g in range(16)],),
        minima=([(g, 4) for g in range(16)],),
        half_scale=80,
        half_minimum=82,
        subtracts=True,
    ),
    Type.Q3_K: _layout(
        "int3-k",
        110,
        _strided(32, 2, 32),
        _strided(0, 1, 32),
        scales=([(96 + g % 8, 4 * (g // 8)) for g in range(16)], [(104 + g % 4, 2 * (g // 4)) for g in range(16)]),
        half_scale=108,
    ),
    Type.Q4_K: _layout(
        "int4-k",
        144,
        _strided(16, 4, 32),
        scales=_shifted(_K_SCALES, 4),
        minima=_shifted(_K_MINIMA, 4),
        half_scale=0,
        half_minimum=2,
        subtracts=True,
    ),
    Type.Q5_K: _layout(
        "int5-k",
        176,
        _strided(48, 4, 32),
        _strided(16, 1, 32),
        scales=_shifted(_K_SCALES, 4),
        minima=_shifted(_K_MINIMA, 4),
        half_scale=0,
        half_minimum=2,
        subtracts=True,
    ),
    Type.Q6_K: _layout(
        "int6-k",
        210,
        _strided(0, 4, 64),
        _strided(128, 2, 32),
        scales=([(192 + g, 0) for g in range(16)],),
        half_scale=208,
        scales_flip=0x80,
    ),
    Type.IQ4_XS: _layout(
        "iq4-xs",
        136,
        [field for chunk in range(8) for field in _halved(8 + 16 * chunk)],
        scales=([(4 + g // 2, 4 * (g % 2)) for g in range(8)], [(2 + g // 4, 2 * (g % 4)) for g in range(8)]),
        half_scale=0,
    ),
}
_FLOATS = {Type.F16: F16, Type.BF16: BF16, Type.F32: F32}
_EXACT = {kind: layout.format for kind, layout in LAYOUTS.items()} | _FLOATS


def format_for(kind: Type, *, decode_to_f32: bool = False) -> Format:
    """The format that tensors of ggml type `kind` are kept in."""
    return _EXACT.get(kind, F32 if decode_to_f32 else F16)


def is_exact(kind: Type) -> bool:
    """Whether tensors of ggml type `kind` carry over as they are."""
    return kind in _EXACT


@functools.cache
def is_decodable(kind: Type) -> bool:
    """Whether `gguf` knows how to turn `kind` into floats."""
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def matrix(raw: npt.NDArray[np.uint8], kind: Type, shape: tuple[int, int], format: Format) -> Matrix:
    """The matrix (n_out, n_in) that the bytes of a ggml tensor hold, in the format that `format_for` gave.

    raw: uint8 (n_bytes,), the whole tensor or whole rows of it. Raises OverflowError where the format is F16 and a
    decoded weight is finite but beyond it.
    """
    if kind in _FLOATS:
        types = {Type.F16: np.float16, Type.F32: np.float32, Type.BF16: np.uint16}
        return Matrix(_FLOATS[kind], raw.view(types[kind]).reshape(shape))
    if kind not in LAYOUTS:
        return _decoded(raw, kind, shape, format)
    layout = LAYOUTS[kind]
    blocks = raw.reshape(shape[0], -1, layout.n_bytes)
    values = _read(blocks, layout.integers, format.bits) ^ np.uint8(layout.integers_flip)
    halves = [_half(blocks, at) for at in (layout.half_scale, layout.half_minimum)]
    if not layout.scales:
        return Matrix(format, values, halves[0], halves[1])
    scales = _read(blocks, layout.scales, format.scale_bits or 8) ^ np.uint8(layout.scales_flip)
    minima = _read(blocks, layout.minima, format.scale_bits) if layout.minima else None
    if layout.subtracts and halves[1] is not None:
        halves[1] = (halves[1].view(np.uint16) ^ np.uint16(0x8000)).view(np.float16)
    return Matrix(format, values, scales, minima, halves[0], halves[1])


def _read(blocks: npt.NDArray[np.uint8], fields: tuple[Fields, ...], bits: int) -> npt.NDArray[np.uint8]:
    """The integers of blocks, uint8 (n_out, n_blocks, n_bytes): uint8 (n_out, n_blocks * fields of a plane)."""
    found = np.zeros((*blocks.shape[:2], len(fields[0])), np.uint8)
    low = 0
    for plane, width in zip(fields, planes(bits), strict=True):
        at, shift = np.array(plane, np.uint8).T
        found |= ((blocks[:, :, at] >> shift) & np.uint8((1 << width) - 1)) << np.uint8(low)
        low += width
    return found.reshape(blocks.shape[0], -1)


def _half(blocks: npt.NDArray[np.uint8], at: int) -> npt.NDArray[np.float16] | None:
    """The half float at a byte of each block, (n_out, n_blocks); None where there is none."""
    return None if at < 0 else np.ascontiguousarray(blocks[:, :, at : at + 2]).view(np.float16)[:, :, 0]


def _decoded(raw: npt.NDArray[np.uint8], kind: Type, shape: tuple[int, int], format: Format) -> Matrix:
    weights = to_float(raw, kind, shape)
    if format is F32:
        return Matrix(F32, weights)
    with np.errstate(over="ignore"):
        halves = weights.astype(np.float16)
    if (np.isinf(halves) & np.isfinite(weights)).any():
        raise OverflowError("weights beyond half precision")
    return Matrix(F16, halves)


def to_float(raw: npt.NDArray[np.uint8], kind: Type, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The weights as `gguf` decodes them, float32, in `shape`."""
    if kind == Type.F32:
        return raw.view(np.float32).reshape(shape)
    rows = raw.reshape(int(np.prod(shape[:-1])), -1)
    with np.errstate(over="ignore", invalid="ignore"):  # damaged scales; who packs finds them in the weights
        decoded: npt.NDArray[np.float32] = gguf.quants.dequantize(rows, kind).reshape(shape)
    return decoded
