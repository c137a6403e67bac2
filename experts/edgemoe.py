"""Two widths by EdgeMoE's procedure (arXiv 2308.14352, section 4.2): the reference that the allocation has to beat.

Experts are ranked by what is lost with each alone at the low width; then as many of the least sensitive ones as the
tolerance allows get it. It knows nothing of how losses are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from edgert.errors import OptionError
from edgert.experts.allocation import Mask, Numbers


class LowExperts(NamedTuple):
    """Which experts get the low width (n_layers, n_expert), the loss measured with them, and all that was measured:
    how many had it, and the loss."""

    low: Mask
    loss: float
    measured: tuple[tuple[int, float], ...]


def choose_low(
    alone: Numbers, measure: Callable[[Mask], float], most_loss: float, most: int | None = None
) -> LowExperts:
    """The low width for as many of the least sensitive experts as keep the loss within `most_loss`.

    alone: (n_layers, n_expert) the loss with that expert alone at the low width, and not a number for experts that
    keep the base width; of equal ones the first is lowered first. measure: the loss of a choice (n_layers, n_expert).
    It is taken to grow with the number of lowered experts, which is found by halving: log2(n) + 2 measurements. most:
    so many at most are lowered. OptionError where the base width itself loses more.
    """
    order = np.argsort(alone.reshape(-1), kind="stable")[: np.count_nonzero(np.isfinite(alone))][:most]
    measured = list[tuple[int, float]]()

    def lowered(count: int) -> Mask:
        low = np.zeros(alone.size, np.bool_)
        low[order[:count]] = True
        return low.reshape(alone.shape)

    def keeps(count: int) -> bool:
        measured.append((count, float(measure(lowered(count)))))
        return measured[-1][1] <= most_loss

    if not keeps(0):
        raise OptionError(
            f"with all experts at the base width the loss is {measured[0][1]:.2%}, above {most_loss:.2%}; allow more, "
            "or take another method"
        )
    most, beyond = 0, len(order) + 1
    count = len(order)  # all of them first: often that is what the tolerance allows, or what it misses by far
    while beyond - most > 1:
        if keeps(count):
            most = count
        else:
            beyond = count
        count = (most + beyond) // 2
    return LowExperts(lowered(most), dict(measured)[most], tuple(measured))
