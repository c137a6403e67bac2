"""The table of bits: the hull that mixed allocations are held against, and what is said of them beside it."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tools")]  # it is no package
from bits_table import Row, compare, hull  # noqa: E402

SOURCE = 20.0


def row(name: str, bits: float, nats: float) -> Row:
    """A setting that loses so many nats a token."""
    return Row(name, "gptq", bits, 0, SOURCE * math.exp(nats), math.expm1(nats), 0.0, nats, 1.0)


def test_the_hull_is_the_lowest_of_all_mixtures_of_settings() -> None:
    points = {
        2.5: 0.4,
        3.0: 0.3,
        3.5: 0.1,
        4.0: 0.09,
        4.5: 0.02,
        5.5: 0.05,
    }  # above the hull: 3.0 and 4.0; 5.5 is worse
    found = hull([row(f"int{bits}", bits, nats) for bits, nats in points.items()])
    assert [bits for bits, _ in found] == [2.5, 3.5, 4.5]
    assert [nats - math.log(SOURCE) for _, nats in found] == pytest.approx([0.4, 0.1, 0.02])


def test_mixed_settings_are_compared_at_their_own_size_and_make_no_hull() -> None:
    rows = [row("int2", 2.5, 0.4), row("int3", 3.5, 0.1), row("mixed 3", 2.9, 0.14), row("mixed 2.75", 2.75, 0.325)]
    better, level = compare(rows, SOURCE)
    assert better["bpw"] == 2.9 and better["uniform"] == pytest.approx(math.expm1(0.28))
    assert better["ratio"] == pytest.approx(math.expm1(0.14) / math.expm1(0.28))
    assert level["ratio"] == pytest.approx(1.0)


def test_no_ratio_is_said_where_the_hull_loses_nothing() -> None:
    (found,) = compare([row("int8", 8.5, -0.001), row("mixed 8", 8.5, 0.001)], SOURCE)
    assert math.isnan(found["ratio"])


def test_without_uniform_settings_there_is_no_hull() -> None:
    assert compare([row("mixed 3", 3.0, 0.1)], SOURCE) == []
