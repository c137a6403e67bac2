"""From ggml's tensor types to edgert's formats.

Q4_0, Q4_1, Q8_0, F16, BF16 and F32 carry over exactly: the same integers, the same scales. Every other type that the
`gguf` package can decode becomes F16, or F32 where exactness to the last bit is asked for.
"""

from __future__ import annotations

import functools

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from edgert.quant.formats import BF16, F16, F32, GROUP, INT4, INT4_MIN, INT8, Format, Matrix

_EXACT = {Type.Q4_0: INT4, Type.Q4_1: INT4_MIN, Type.Q8_0: INT8, Type.F16: F16, Type.BF16: BF16, Type.F32: F32}


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
    decoded weight is beyond it.
    """
    n_out, n_in = shape
    if kind in (Type.F16, Type.F32):
        return Matrix(_EXACT[kind], raw.view(np.float16 if kind == Type.F16 else np.float32).reshape(shape))
    if kind == Type.BF16:
        return Matrix(BF16, raw.view(np.uint16).reshape(shape))
    if kind not in _EXACT:
        return _decoded(raw, kind, shape, format)
    blocks = raw.reshape(n_out, n_in // GROUP, -1)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0]
    if kind == Type.Q8_0:
        return Matrix(INT8, (blocks[:, :, 2:] ^ 0x80).reshape(shape), scales)
    quants = blocks[:, :, 2 if kind == Type.Q4_0 else 4 :]
    values = np.concatenate((quants & 15, quants >> 4), axis=2).reshape(shape)
    if kind == Type.Q4_0:
        return Matrix(INT4, values, scales)
    return Matrix(INT4_MIN, values, scales, np.ascontiguousarray(blocks[:, :, 2:4]).view(np.float16)[:, :, 0])


def _decoded(raw: npt.NDArray[np.uint8], kind: Type, shape: tuple[int, int], format: Format) -> Matrix:
    weights = to_float(raw, kind, shape)
    if format is F32:
        return Matrix(F32, weights)
    with np.errstate(over="ignore"):
        halves = weights.astype(np.float16)
    if np.isinf(halves).any():
        raise OverflowError("weights beyond half precision")
    return Matrix(F16, halves)


def to_float(raw: npt.NDArray[np.uint8], kind: Type, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The weights as `gguf` decodes them, float32, in `shape`."""
    if kind == Type.F32:
        return raw.view(np.float32).reshape(shape)
    rows = raw.reshape(int(np.prod(shape[:-1])), -1)
    decoded: npt.NDArray[np.float32] = gguf.quants.dequantize(rows, kind).reshape(shape)
    return decoded
