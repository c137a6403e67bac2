"""Blocks of ggml's low-bit types with random bits: what a random model's matrices are made of, drawn and not quantised.

Values have the standard deviation that is asked for and no mean: else every matrix would add the same vector to every
token, and after some layers all tokens would be routed alike. Layouts are those of ggml's quantised types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

Bytes = npt.NDArray[np.uint8]


def random_blocks(kind: Type, random: np.random.Generator, n: int, spread: float) -> Bytes:
    """`n` blocks (n, bytes of a block) of values with a standard deviation of `spread`. KeyError for other types."""
    return BLOCKS[kind](random, n, spread)


def _bits(random: np.random.Generator, n: int, n_bytes: int) -> Bytes:
    words = random.integers(0, 1 << 64, -(-n * n_bytes // 8), np.uint64)
    return words.view(np.uint8)[: n * n_bytes].reshape(n, n_bytes)


def _halves(numbers: Any) -> Bytes:
    return np.asarray(numbers, np.float16).reshape(-1, 1).view(np.uint8)


def _scales(random: np.random.Generator, n: int, mean: float) -> Any:
    return mean * (0.8 + 0.4 * random.random(n, np.float32))


def _mxfp4(random: np.random.Generator, n: int, spread: float) -> Bytes:
    """An exponent, then codes, which are as often negative; of two exponents as many each as make the spread."""
    blocks, power = _bits(random, n, 17), np.log2(spread / np.sqrt(34.25 / 4))
    larger = random.random(n) < (4.0 ** (power % 1) - 1) / 3
    blocks[:, 0] = 127 + int(np.floor(power)) + larger
    return blocks


def _q8_0(random: np.random.Generator, n: int, spread: float) -> Bytes:
    """A scale, then -127 to 127."""
    blocks = _bits(random, n, 34)
    blocks[:, 2:][blocks[:, 2:] == 0x80] = 0
    blocks[:, :2] = _halves(_scales(random, n, spread / 73.5))
    return blocks


def _q5_0(random: np.random.Generator, n: int, spread: float) -> Bytes:
    """A scale, then -16 to 15: their mean of -0.5 goes with the sign of the scale, which either may be."""
    blocks = _bits(random, n, 22)
    signs = 1.0 - 2.0 * random.integers(0, 2, n)
    blocks[:, :2] = _halves(_scales(random, n, spread / 9.25) * signs)
    return blocks


def _q4_k(random: np.random.Generator, n: int, spread: float) -> Bytes:
    """A scale of scales and one of minima, eight of both, then 0 to 15; a minimum is 7.5 times its scale, exactly.

    The eight are 48 to 63, so that all the bits that the last four have elsewhere are ones.
    """
    blocks = _bits(random, n, 144)
    fractions, powers = np.frexp(_scales(random, n, spread / (55.7 * 4.61)))
    scales = np.ldexp(np.round(fractions * 128) / 128, powers)  # seven bits: 7.5 times it is a half float, too
    blocks[:, :2], blocks[:, 2:4] = _halves(scales), _halves(7.5 * scales)
    blocks[:, 4:8] |= 0xF0
    blocks[:, 8:12] = blocks[:, 4:8]
    last = blocks[:, 12:16] & 0x0F
    blocks[:, 12:16] = last | last << 4
    return blocks


def _q6_k(random: np.random.Generator, n: int, spread: float) -> Bytes:
    """0 to 63, less 32; sixteen scales of 48 to 79 and either sign; their scale."""
    blocks = _bits(random, n, 210)
    drawn = blocks[:, 192:208]
    sizes = (48 + drawn % 32).astype(np.int8)
    drawn[:] = np.where(drawn < 128, sizes, -sizes).view(np.uint8)
    blocks[:, 208:] = _halves(_scales(random, n, spread / (64.2 * 18.5)))
    return blocks


BLOCKS: dict[Type, Callable[[np.random.Generator, int, float], Bytes]] = {
    Type.MXFP4: _mxfp4,
    Type.Q8_0: _q8_0,
    Type.Q5_0: _q5_0,
    Type.Q4_K: _q4_k,
    Type.Q6_K: _q6_k,
}
