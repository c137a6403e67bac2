"""The checksum of bundles: compiled as defined, in pieces as at once, and no flipped bit escapes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.quant import checksum as module
from edgert.quant.checksum import Checksum, checksum, checksum_rows


def some_bytes(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n, np.uint8)


def defined(data: np.ndarray) -> int:
    """The definition in Python's integers."""
    rows = np.frombuffer(data.tobytes() + bytes(-len(data) % 64), "<u8").reshape(-1, 8)
    most, total = 2**64 - 1, 0
    for first in range(0, len(rows), 64):
        for lane in range(8):
            h = int(module._SEEDS[lane]) ^ ((first // 64 + 1) * 0x9E3779B97F4A7C15 & most)
            for word in rows[first : first + 64, lane]:
                h ^= int(word)
                h = ((h << 29 | h >> 35) & most) * 0x9E3779B185EBCA87 & most
            total += (h ^ h >> 32) * int(module._ODD[lane])
    return total & most


def test_the_constants_stay() -> None:
    """Bundles on disk hold sums made with them."""
    assert checksum(np.arange(256, dtype=np.uint8)) == 10989683602555819734
    assert (module._ODD & np.uint64(1) == 1).all()


@given(n=st.integers(0, 20000), seed=st.integers(0, 99))
def test_compiled_slow_and_defined_agree(n: int, seed: int) -> None:
    data = some_bytes(n, seed)
    expected = defined(data)
    assert checksum(data) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "JIT_ENABLED", False)
        patch.setattr(module, "_SLOW_PAGES", 2)
        assert checksum(data) == expected


@given(cuts=st.lists(st.integers(0, 5), max_size=5), n=st.integers(0, 20000))
def test_in_pieces(cuts: list[int], n: int) -> None:
    data, found = some_bytes(n), Checksum()
    places = [0, *sorted(min(4096 * cut, n // 4096 * 4096) for cut in cuts), n]
    for first, end in itertools.pairwise(places):
        found.update(data[first:end])
    assert found.value() == checksum(data)


@pytest.mark.parametrize("n", [1, 64, 200, 4096])
def test_every_flipped_bit_is_seen(n: int) -> None:
    data = some_bytes(n)
    expected = checksum(data)
    for bit in range(8 * n):
        data[bit // 8] ^= 1 << bit % 8
        assert checksum(data) != expected
        data[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("bit", range(64))
def test_a_broken_line_is_seen(bit: int) -> None:
    """One bit of many words, an even number of them."""
    data = some_bytes(4096)
    for step in (1, 2, 8, 64):
        damaged = data.view(np.uint64).copy()
        damaged[::step] ^= np.uint64(1) << np.uint64(bit)
        assert checksum(damaged.view(np.uint8)) != checksum(data)


def test_order_counts() -> None:
    data = some_bytes(4096)
    for block in (8, 64, 512, 2048):
        moved = np.roll(data, block)
        assert checksum(moved) != checksum(data)


def test_unaligned_bytes() -> None:
    data = some_bytes(1000)
    for shift in range(8):
        assert checksum(np.concatenate([np.zeros(shift, np.uint8), data])[shift:]) == checksum(data)


def test_rows() -> None:
    for width in (64, 192, 4096, 4160, 9984):
        rows = some_bytes(5 * width).reshape(5, width)
        assert checksum_rows(rows).tolist() == [checksum(row) for row in rows]
