"""Second moments of what the experts of a model multiply, summed token after token.

The order of the sums is part of what they are: each expert's tokens in the order of the text, in float64, whatever
number of them comes at a time. So the same text gives the same bits however it was cut into steps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgert.devices.base import Routed
from edgert.types import Floats, Ids

Sums = npt.NDArray[np.float64]


class Moments:
    """Sums of squares for each expert: of the rows it was given, and of the rows it made for its down projection.

    inputs: (n_layers, n_expert, d_model). hidden: (n_layers, n_expert, d_expert). counts: (n_layers, n_expert).
    """

    def __init__(self, n_layers: int, n_expert: int, d_model: int, d_expert: int) -> None:
        self.inputs: Sums = np.zeros((n_layers, n_expert, d_model))
        self.hidden: Sums = np.zeros((n_layers, n_expert, d_expert))
        self.counts: Ids = np.zeros((n_layers, n_expert), np.int64)

    @staticmethod
    def n_bytes(n_layers: int, n_expert: int, d_model: int, d_expert: int) -> int:
        """What the sums take."""
        return 8 * n_layers * n_expert * (d_model + d_expert + 1)

    def add(self, layer: int, routed: Routed, inputs: Floats, hidden: Floats) -> None:
        """Rows of one step: inputs (n_tokens, d_model) by token, hidden (n_pairs, d_expert) by pair."""
        given, made = np.square(inputs, dtype=np.float64), np.square(hidden, dtype=np.float64)
        for expert in np.flatnonzero(np.diff(routed.first)).tolist():
            first, last = routed.first[expert], routed.first[expert + 1]
            _add_rows(self.inputs[layer, expert], given[routed.tokens[first:last]])
            _add_rows(self.hidden[layer, expert], made[first:last])
            self.counts[layer, expert] += last - first

    def means(self) -> tuple[Floats, Floats]:
        """Mean squares of inputs and of hidden rows, float32; 0 for experts without tokens."""
        counts = np.maximum(self.counts, 1)[..., None]
        return (self.inputs / counts).astype(np.float32), (self.hidden / counts).astype(np.float32)


def _add_rows(total: Sums, rows: Sums) -> None:
    """Add rows one by one: np.sum promises no order."""
    for row in rows:
        total += row
