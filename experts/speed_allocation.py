"""Bits with the cache in mind: the least time a token within a bound on the loss, where experts are read from flash.

An expert's bytes cost time twice: when it is missed and has to be read, and while it is kept, for the room that others
do not have. Both prices are found by replaying recorded routes through a buffer of the machine's size with the records
as they would be; the knapsack is solved with them; and so on in turn, for the prices depend on what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.experts.allocation import Allocation, Mask, Numbers, allocate_few
from edgert.experts.choice import DEFAULT_POLICY
from edgert.experts.policies import make_policy
from edgert.experts.profile import Domain, Profile, normalised
from edgert.experts.replay import Hits, profile_of, replay_policy
from edgert.experts.trace import Trace
from edgert.storage.bundle_manifest import PAGE, PART_ALIGNMENT
from edgert.types import Floats, Ids

Progress = Callable[[str, float], None]

_ROUNDS = 4
_LESS = 0.85  # the share of the buffer by which the worth of its last bytes is measured
_NEW = 0.6  # the share that a round's prices have in the next one's: they swing otherwise


@dataclass(frozen=True)
class Tier:
    """What experts on flash have to do with: bytes of the buffer for experts, the rate of flash at the size of a
    record, what each read takes besides, and the bytes of experts that all stay in RAM, with no reads at all."""

    buffer_bytes: int
    bytes_per_s: float
    latency_s: float = 1e-4
    whole_bytes: int = 0


class Speed(NamedTuple):
    """Expected seconds a token: of the experts' arithmetic, and of waiting for those that are not there."""

    arithmetic_s: float
    flash_s: float
    hit_rate: float

    @property
    def total_s(self) -> float:
        """Both one after the other: what is read ahead is not counted on."""
        return self.arithmetic_s + self.flash_s


@dataclass(frozen=True)
class FastAllocation:
    """What was chosen, what it is expected to make of a token, and what the choice of the fewest bytes would."""

    allocation: Allocation
    speed: Speed
    smallest: Allocation
    smallest_speed: Speed


@dataclass(frozen=True)
class Options:
    """What there is to choose from: sizes in bytes, losses, seconds of arithmetic at each use, and whether it is
    allowed; each (n_layers, n_expert, n_projections, n_options). most: how many options may be in use together."""

    sizes: Ids
    losses: Numbers
    use_s: Numbers
    allowed: Mask
    most: int

    def record_bytes(self, choice: Ids) -> Ids:
        """Bytes of the records (n_layers, n_expert) for a choice (n_items,), padding and all."""
        chosen = self._chosen(self.sizes, choice)
        parts = -(-chosen // PART_ALIGNMENT) * PART_ALIGNMENT
        return -(-parts.sum(axis=2) // PAGE) * PAGE

    def uses_s(self, choice: Ids) -> Numbers:
        """Seconds of arithmetic at each use of an expert, (n_layers, n_expert)."""
        seconds: Numbers = self._chosen(self.use_s, choice).sum(axis=2)
        return seconds

    def _chosen(self, table: npt.NDArray[Any], choice: Ids) -> npt.NDArray[Any]:
        return np.take_along_axis(table, choice.reshape(table.shape[:3])[..., None], axis=3)[..., 0]


def allocate_for_speed(
    trace: Trace,
    options: Options,
    tier: Tier,
    most_loss: float,
    progress: Progress = lambda stage, fraction: None,
) -> FastAllocation:
    """The option of each item with the least expected time a token, within a loss.

    trace: routes to replay; its record sizes do not matter, except that layers of size 0 have no experts. Never slower
    on it than the choice of the fewest bytes, from which it starts. OptionError where no choice keeps the loss.
    """
    replayed, seen = Replayed(trace, options, tier), set[bytes]()
    solve = partial(
        allocate_few,
        _items(options.sizes),
        _items(options.losses),
        most_options=options.most,
        most_loss=most_loss,
        allowed=_items(options.allowed),
    )
    smallest = found = solve()
    tried, prices = list[tuple[Speed, Allocation]](), None
    while len(tried) <= _ROUNDS and found.choice.tobytes() not in seen:
        progress("replaying routes with the bits chosen", len(tried) / (_ROUNDS + 1))
        speed, new = replayed.price(found.choice)
        tried.append((speed, found))
        seen.add(found.choice.tobytes())
        prices = new if prices is None else _NEW * new + (1.0 - _NEW) * prices
        costs = prices[..., None, None] * options.sizes + replayed.used[..., None, None] * options.use_s
        found = solve(costs=_items(costs))
    speed, best = min(tried, key=lambda one: one[0].total_s)
    return FastAllocation(best, speed, smallest, tried[0][0])


def _items(table: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(n_items, n_options): each projection of each expert is an item."""
    return table.reshape(-1, table.shape[-1])


def routes_to_replay(profile: Profile, n_tokens: int) -> Trace:
    """About `n_tokens` of a profile's routes, in each half a run of every domain, as long as its share says."""
    halves = list[list[tuple[Domain, slice]]]([[], []])
    for name, share in normalised(profile.shares).items():
        if not share:
            continue
        domain = profile.domain(name)
        count = min(max(round(share * n_tokens / 2), 1), len(domain.tokens) // 2)
        for half, parts in enumerate(halves):
            parts.append((domain, slice(half * count, (half + 1) * count)))
    parts = [*halves[0], *halves[1]]
    ids, weights = (
        np.concatenate([getattr(domain, table)[:, part] for domain, part in parts], axis=1)
        for table in ("ids", "weights")
    )
    return Trace.without_scores(profile.model, profile.record_bytes, ids, weights)


class Replayed:
    """Routes, replayed for one choice after the other. `used`: uses a token of each expert, (n_layers, n_expert)."""

    def __init__(self, trace: Trace, options: Options, tier: Tier) -> None:
        self._trace, self._options, self._tier = trace, options, tier
        self._n_warm = trace.n_tokens // 2
        self._profile: Floats = profile_of(trace)
        self.used = self._profile.astype(np.float64)  # uses a token of each expert

    def price(self, choice: Ids) -> tuple[Speed, Numbers]:
        """What a token takes, and seconds a token for each byte more of each expert, (n_layers, n_expert)."""
        sizes, tier = self._options.record_bytes(choice), self._tier
        hits, fewer = self._hits(sizes, 1.0), self._hits(sizes, _LESS)
        flash_s, more_s = (self._flash_s(h) for h in (hits, fewer))
        room = max(more_s - flash_s, 0.0) / ((1.0 - _LESS) * tier.buffer_bytes)  # seconds a token for a byte of buffer
        missed = hits.missed.reshape(sizes.shape) / hits.n_tokens
        held = hits.held.reshape(sizes.shape) / hits.n_tokens
        arithmetic_s = float((self.used * self._options.uses_s(choice)).sum())
        return Speed(arithmetic_s, flash_s, hits.rate), missed / tier.bytes_per_s + room * held

    def _hits(self, sizes: Ids, share: float) -> Hits:
        """With a share of the memory: all in RAM if they fit, else a buffer."""
        old, tier = self._trace, self._tier
        trace = Trace.without_scores(old.model, np.where(old.record_bytes > 0, sizes, 0), old.ids, old.weights)
        policy, total = make_policy(DEFAULT_POLICY, trace.record_bytes, self._profile), int(trace.record_bytes.sum())
        n_bytes = total if total <= share * tier.whole_bytes else int(share * tier.buffer_bytes)
        return replay_policy(trace, policy, n_bytes, self._n_warm)

    def _flash_s(self, hits: Hits) -> float:
        seconds = hits.bytes_missed / self._tier.bytes_per_s + hits.n_missed * self._tier.latency_s
        return seconds / hits.n_tokens
