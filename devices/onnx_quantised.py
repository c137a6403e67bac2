"""Rounding in graphs whose products are of 8-bit integers: where values are rounded, and to which range.

A graph is built twice: watched, to learn the least and largest value of each place on a text, and then with a pair of
QuantizeLinear and DequantizeLinear at each of them. That form is what NPUs and fixed-point accelerators are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.types import Floats

_MARGIN = 1.1  # of a range beyond what was seen


@dataclass(frozen=True)
class Ranges:
    """Least and largest value of each place in each graph of a model, float32 (n_places, 2)."""

    attention: list[Floats]  # of each layer
    experts: list[Floats]  # of each layer, all of its experts together; empty where it has none
    head: Floats


class Rounding:
    """The places of one graph, in the order in which it comes to them: what goes into each product, and comes out.

    outputs: whether what comes out is rounded too, as QNN wants it, in 16 bits. In 8 bits it costs too much: of the
    embedded model's attention, 1.1 nats a token instead of 0.5 (and 0.014 in 16 bits). Moving what columns differ by
    into the weights (SmoothQuant) makes 0.3 of that, and golden models worse.
    """

    def __init__(self, ranges: Floats | None, dtype: str) -> None:
        """ranges: (n_places, 2); None: they are being watched. dtype: of the integers, as numpy calls it."""
        self.watching, self._ranges, self._dtype = ranges is None, iter(() if ranges is None else ranges), dtype
        self.outputs = np.iinfo(dtype).bits > 8
        self.watched: list[str] = []  # names of values

    def next(self) -> tuple[float, Any]:
        """Scale and zero point of the next place."""
        low, high = next(self._ranges) * np.float32(_MARGIN)
        return steps(float(low), float(high), self._dtype)


def steps(low: float, high: float, dtype: Any) -> tuple[float, Any]:
    """(scale, zero point) by which integers of a type stand for low to high; signed ones have zero in their middle."""
    most, kind = np.iinfo(dtype).max, np.dtype(dtype).type
    if np.iinfo(dtype).min < 0:
        return max(abs(low), abs(high), 1e-9) / most, kind(0)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-9) / most
    return scale, kind(min(round(-low / scale), most))


def int8_rows(weights: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """A matrix (n_out, n_in) as integers, and the scale of each row (n_out,)."""
    scales = np.abs(weights).max(axis=1, initial=0.0) / np.float32(127)
    scales = np.where(scales > 0, scales, np.float32(1)).astype(np.float32)
    return np.rint(weights / scales[:, None]).astype(np.int8), scales
