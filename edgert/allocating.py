"""From what quantising costs to formats for every expert: sizes and losses of a model as a problem, and its solutions.

Each projection of each expert is an item, each format that fits it an option; layers without experts have no items.
Experts that calibration never reached stay at four bits: nothing is known of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.bits import AS_SOURCE, PROJECTIONS, Bits, expert_shapes, kept_words
from edgert.errors import OptionError
from edgert.experts.allocation import Allocation, Numbers, allocate_few
from edgert.experts.profile import Sensitivity
from edgert.experts.speed_allocation import Options, Tier, allocate_for_speed
from edgert.experts.trace import Trace
from edgert.quant.formats import F32, FORMATS, Format
from edgert.storage.bundle_manifest import place_parts, record_size
from edgert.tier import READ_S
from edgert.types import Ids, ModelConfig
from edgert.weights import Progress

BASE = "int4"  # of experts that were never routed to
_MOST_FORMATS = 8  # in one bundle: each has kernels that are compiled when it is first run


@dataclass(frozen=True)
class Solution:
    """Formats for all experts. loss: expected, in nats of KL divergence a token.

    bound: what no choice of the formats in use can be below: of the loss where that was minimised, else of the bytes.
    seconds: expected of a token, where time was minimised; there is no bound on that.
    """

    bits: Bits
    n_bytes: int  # of the experts' weights, scales counted
    loss: float
    bound: float
    seconds: float | None = None


class Problem:
    """Sizes and expected losses of every option of a model.

    layers: those that have experts: in them every token was routed somewhere. sizes, losses, allowed: (n_items,
    n_formats), items by layer of these, expert and projection. Projections that no format fits are no items: they stay
    as the source has them, in the format `kept`.
    """

    def __init__(
        self, sensitivity: Sensitivity, config: ModelConfig, hot: Format | None = None, kept: Format = F32
    ) -> None:
        assert config.router is not None
        self._sensitivity, self._hot, self.kept = sensitivity, hot, kept
        self._formats = tuple(FORMATS[name] for name in sensitivity.formats)
        self.shapes = expert_shapes(config)
        self.layers: Ids = np.flatnonzero(sensitivity.rows.any(axis=1))
        if not len(self.layers):
            raise OptionError(
                "no token was routed to any expert when the profile was made; make it again, on more text"
            )
        n_expert, n_formats = sensitivity.rows.shape[1], len(self._formats)
        fits = np.array([[shape[1] % format.block == 0 for format in self._formats] for shape in self.shapes])
        kept_words(config)
        self.places: Ids = np.flatnonzero(fits.any(axis=1))
        sizes = np.array([[format.matrix_bytes(*shape) for format in self._formats] for shape in self.shapes])
        self._shape = (len(self.layers), n_expert, len(self.places), n_formats)
        routed = sensitivity.rows[self.layers] > 0  # (layers that have experts, n_expert)
        self.never_routed = [(int(self.layers[place]), expert) for place, expert in np.argwhere(~routed).tolist()]
        known = routed[..., None, None] | (np.array(self._formats) == FORMATS[BASE])
        self.allowed = self._items(fits[self.places] & known)
        self.sizes: Ids = self._items(sizes[self.places].astype(np.int64))
        losses = self._items(sensitivity.loss()[self.layers][:, :, self.places]).astype(np.float64)
        self.losses: Numbers = np.where(self.allowed, losses, 0.0)

    def _items(self, table: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A table that fits (layers that have experts, n_expert, n_projections, n_formats), by items."""
        return np.ascontiguousarray(np.broadcast_to(table, self._shape)).reshape(-1, self._shape[-1])

    @property
    def n_weights(self) -> int:
        """Weights of all experts that can be quantised."""
        return len(self.sizes) * self.shapes[0][0] * self.shapes[0][1]

    @property
    def most_bytes(self) -> int:
        """Bytes of the largest choice."""
        return int(np.where(self.allowed, self.sizes, 0).max(axis=1).sum())

    def smallest(self) -> Solution:
        """The choice of the fewest bytes."""
        return self.within_bytes(int(np.where(self.allowed, self.sizes, 1 << 60).min(axis=1).sum()))

    def largest(self) -> Solution:
        """The choice of the least loss whatever it takes."""
        return self.within_bytes(self.most_bytes)

    def within_bytes(self, n_bytes: int) -> Solution:
        """The least loss within so many bytes of weights. OptionError where even the smallest choice is larger."""
        return self._solve(most_bytes=n_bytes)

    def within_loss(self, loss: float) -> Solution:
        """The fewest bytes within an expected loss. OptionError where even the best choice loses more."""
        return self._solve(most_loss=loss)

    def fastest(self, trace: Trace, tier: Tier, loss: float, progress: Progress) -> Solution:
        """The least expected time a token within an expected loss, with experts on flash; see speed_allocation."""
        ids, weights = trace.ids[self.layers], trace.weights[self.layers]
        routes = Trace.without_scores(trace.model, trace.record_bytes[self.layers], ids, weights)
        sizes = self.sizes.reshape(self._shape).copy()
        sizes[:, :, 0] += sum(self.kept.matrix_bytes(*self.shapes[place]) for place in self._others)  # read with it
        losses, allowed = self.losses.reshape(self._shape), self.allowed.reshape(self._shape)
        options = Options(sizes, losses, sizes.astype(np.float64) * READ_S, allowed, _MOST_FORMATS)
        found = allocate_for_speed(routes, options, tier, loss, progress)
        return replace(self.solution(found.allocation), seconds=found.speed.total_s)

    def smallest_within(self, n_bytes: int, beside: int) -> Solution:
        """The choice of the fewest bytes; OptionError where its records and `beside` other bytes take more."""
        experts = self.record_bytes(found := self.smallest())
        if (needed := beside + experts) > n_bytes:
            raise OptionError(
                f"--size {n_bytes:,}B is too small: the bundle takes {needed:,} bytes at least, {experts:,} of them "
                f"experts; use --size {needed}B or more"
            )
        return found

    def within_records(self, n_bytes: int, beside: int) -> Solution:
        """The least loss whose records, with their padding, and `beside` other bytes take at most so many."""
        least, n_bytes = self.smallest_within(n_bytes, beside), n_bytes - beside
        low, high, best = least.n_bytes, min(n_bytes, self.most_bytes), least
        while high - low > 1 << 12:
            middle = (low + high) // 2
            found = self.within_bytes(middle)
            if self.record_bytes(found) <= n_bytes:
                best, low = found, middle
            else:
                high = middle
        return best

    @property
    def _others(self) -> list[int]:
        """Projections that stay as the source has them."""
        return [place for place in range(len(PROJECTIONS)) if place not in self.places]

    def record_bytes(self, found: Solution) -> int:
        """Bytes of all records of a solution, with what stays as the source has it."""
        return self._records(found.bits)

    def most_record_bytes(self) -> int:
        """Bytes of all records at the most that the formats take, with what stays as the source has it."""
        return self._records(self._bits(np.where(self.allowed, self.sizes, -1).argmax(axis=1)))

    def _records(self, bits: Bits) -> int:
        return record_bytes(self.shapes, bits, self.kept if self._others else None)

    def _solve(self, **limit: Any) -> Solution:
        return self.solution(
            allocate_few(self.sizes, self.losses, most_options=_MOST_FORMATS, allowed=self.allowed, **limit)
        )

    def solution(self, found: Allocation) -> Solution:
        """An allocation of this problem's items as formats."""
        return Solution(self._bits(found.choice), found.n_bytes, found.loss, found.bound)

    def _bits(self, chosen: Ids) -> Bits:
        """The formats of items (n_items,)."""
        choice = np.full((*self._sensitivity.rows.shape, len(PROJECTIONS)), AS_SOURCE, np.int64)
        choice[np.ix_(self.layers, np.arange(self._shape[1]), self.places)] = chosen.reshape(self._shape[:3])
        return Bits(self._formats, choice, self._hot, self._sensitivity.quantiser)


def record_bytes(shapes: tuple[tuple[int, int], ...], bits: Bits, kept: Format | None = None) -> int:
    """Bytes of all experts' records, each padded to whole pages; none where there are no experts.

    kept: the format of projections that stay as the source has them, if any do of experts that are quantised.
    """
    total, sizes = 0, dict[tuple[Format | None, ...], int]()
    for layer, expert in np.ndindex(*bits.choice.shape[:2]):
        formats = bits.of(layer, expert)
        if formats not in sizes:
            other = kept if any(formats) else None
            named = [(shape, format or other) for shape, format in zip(shapes, formats, strict=True)]
            pairs = [(shape, format) for shape, format in named if format is not None]
            sizes[formats] = record_size(place_parts(pairs)) if pairs else 0
        total += sizes[formats]
    return total
