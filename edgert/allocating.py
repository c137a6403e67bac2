"""From what quantising costs to formats for every expert: sizes and losses of a model as a problem, and its solutions.

Each projection of each expert is an item, each format that fits it an option. Experts that calibration never reached
stay at four bits: nothing is known of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.bits import PROJECTIONS, Bits, expert_shapes
from edgert.errors import OptionError
from edgert.experts.allocation import Allocation, Numbers, allocate
from edgert.experts.profile import Sensitivity
from edgert.experts.speed_allocation import Options, Tier, allocate_for_speed
from edgert.experts.trace import Trace
from edgert.quant.formats import FORMATS, Format
from edgert.storage.bundle_manifest import place_parts, record_size
from edgert.tier import READ_S
from edgert.types import Ids, ModelConfig
from edgert.weights import Progress

BASE = "int4"  # of experts that were never routed to
_MOST_FORMATS = 8  # in one bundle: each has kernels that are compiled when it is first run


@dataclass(frozen=True)
class Solution:
    """Formats for all experts. loss: expected, in nats of KL divergence a token; bound: no choice loses less."""

    bits: Bits
    n_bytes: int  # of the experts' weights, scales counted
    loss: float
    bound: float


class Problem:
    """Sizes and expected losses of every option of a model."""

    def __init__(self, sensitivity: Sensitivity, config: ModelConfig, hot: Format | None = None) -> None:
        assert config.router is not None
        self._sensitivity, self._hot = sensitivity, hot
        self._formats = tuple(FORMATS[name] for name in sensitivity.formats)
        self.shapes = expert_shapes(config)
        n_layers, n_expert, _, n_formats = sensitivity.errors.shape
        fits = np.array([[shape[1] % format.block == 0 for format in self._formats] for shape in self.shapes])
        if not fits.any(axis=1).all():
            raise OptionError(
                f"rows of {config.d_model} and {config.d_expert} columns fit none of the formats, which take multiples "
                "of 32; experts of this model stay as they are"
            )
        sizes = np.array([[format.matrix_bytes(*shape) for format in self._formats] for shape in self.shapes])
        self._shape = (n_layers, n_expert, len(PROJECTIONS))
        full = (*self._shape, n_formats)
        self.routed = sensitivity.rows > 0  # (n_layers, n_expert)
        allowed = np.broadcast_to(fits, full) & (
            self.routed[..., None, None] | (np.array(self._formats) == FORMATS[BASE])
        )
        self.allowed = np.ascontiguousarray(allowed).reshape(-1, n_formats)
        self.sizes: Ids = np.ascontiguousarray(np.broadcast_to(sizes, full)).reshape(-1, n_formats).astype(np.int64)
        self.losses: Numbers = np.where(self.allowed, sensitivity.loss().reshape(-1, n_formats), 0.0).astype(np.float64)

    @property
    def n_weights(self) -> int:
        """Weights of all experts."""
        n_layers, n_expert, n_projections = self._shape
        return n_layers * n_expert * n_projections * self.shapes[0][0] * self.shapes[0][1]

    @property
    def never_routed(self) -> list[tuple[int, int]]:
        """Layer and number of each expert that calibration never reached."""
        return [(layer, expert) for layer, expert in np.argwhere(~self.routed).tolist()]

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
        shape = (*self._shape, len(self._formats))
        sizes: Ids = self.sizes.reshape(shape)
        use_s: Numbers = sizes.astype(np.float64) * READ_S
        options = Options(sizes, self.losses.reshape(shape), use_s, self.allowed.reshape(shape))
        return self.solution(allocate_for_speed(trace, options, tier, loss, progress).allocation)

    def within_records(self, n_bytes: int) -> Solution:
        """The least loss whose records, with their padding, take at most so many bytes."""
        least = self.smallest()
        if record_bytes(self.shapes, least.bits) > n_bytes:
            raise OptionError(
                f"the experts need {record_bytes(self.shapes, least.bits):,} bytes at least, and {n_bytes:,} are left "
                "for them; give a larger --size"
            )
        low, high, best = least.n_bytes, min(n_bytes, self.most_bytes), least
        while high - low > 1 << 12:
            middle = (low + high) // 2
            found = self.within_bytes(middle)
            if record_bytes(self.shapes, found.bits) <= n_bytes:
                best, low = found, middle
            else:
                high = middle
        return best

    def _solve(self, most_bytes: int | None = None, most_loss: float | None = None) -> Solution:
        """Solve, then once more with the formats that hold most of it: each takes time to compile."""
        allowed = self.allowed
        while True:
            found = allocate(self.sizes, self.losses, most_bytes=most_bytes, most_loss=most_loss, allowed=allowed)
            used = np.bincount(found.choice, minlength=len(self._formats))
            if np.count_nonzero(used) <= _MOST_FORMATS:
                return self.solution(found)
            allowed = self._without(allowed, used)

    def _without(self, allowed: npt.NDArray[np.bool_], used: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """What is allowed without the format that is used least, wherever there is another as large or larger."""
        for place in np.argsort(np.where(used > 0, used, 1 << 60), kind="stable"):
            fewer = allowed.copy()
            fewer[:, place] = False
            spared = fewer.any(axis=1)
            fewer[~spared] = allowed[~spared]
            if not np.array_equal(fewer, allowed):
                return fewer
        return allowed

    def solution(self, found: Allocation) -> Solution:
        """An allocation of this problem's items as formats."""
        bits = Bits(self._formats, found.choice.reshape(self._shape), self._hot, self._sensitivity.quantiser)
        return Solution(bits, found.n_bytes, found.loss, found.bound)


def record_bytes(shapes: tuple[tuple[int, int], ...], bits: Bits) -> int:
    """Bytes of all experts' records, each padded to whole pages."""
    total, sizes = 0, dict[tuple[Format | None, ...], int]()
    for layer, expert in np.ndindex(*bits.choice.shape[:2]):
        formats = bits.of(layer, expert)
        if formats not in sizes:
            pairs = [(shape, format) for shape, format in zip(shapes, formats, strict=True) if format is not None]
            sizes[formats] = record_size(place_parts(pairs))
        total += sizes[formats]
    return total
