"""Which resident expert to give up: small classes that put a worth on experts, the lowest of which goes first.

A policy sees which experts were used and knows nothing of slots, budgets, files or predictions. Keys are
`layer * n_expert + expert`. Time is counted in tokens and layers, so a prompt that runs layer by layer leaves the same
recency behind as if its tokens had come one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edgert.errors import OptionError
from edgert.experts.topics import FAR, NEAR, TopicMap, keeps
from edgert.types import Floats, Ids

_Numbers = npt.NDArray[np.float64]
_OVERFLOW = 1e100  # an increment of decayed counts beyond this is scaled back


class Known(NamedTuple):
    """What is known before anything runs.

    shares: of tokens that use each expert, (n_layers, n_expert). topics: maps by the tokens that they look ahead.
    """

    shares: Floats | None = None
    topics: Mapping[int, TopicMap] = MappingProxyType({})


class Policy(Protocol):
    """What the residency asks when it needs room."""

    name: str

    def used(self, layer: int, ids: Ids) -> None:
        """Experts of a layer that were just computed: ids (n,) of one token, or (n_tokens, top_k), oldest first."""

    def next_token(self, n_tokens: int = 1) -> None:
        """All layers have run for `n_tokens` tokens."""

    def worth(self, keys: Ids, layer: int) -> Floats:
        """What each of the resident `keys` (n,) is worth while `layer` runs: (n,), valid until the next call."""


class _Clock:
    """Time in tokens and layers, and the work space of `worth`."""

    def __init__(self, n_layers: int, n_expert: int) -> None:
        self.n_layers, self.n_expert, self.n_keys = n_layers, n_expert, n_layers * n_expert
        self.token = 0  # tokens that have gone through all layers
        self._out = np.empty(self.n_keys, np.float32)
        self._work = np.empty((3, self.n_keys), np.float64)

    def next_token(self, n_tokens: int = 1) -> None:
        self.token += n_tokens

    def rows(self, ids: Ids) -> Ids:
        """Which token of a chunk each id belongs to, to be broadcast against `ids`."""
        return np.arange(len(ids))[:, None] if ids.ndim == 2 else np.zeros(1, np.int64)


class _Recency:
    """When each key was used last, in layers since the start."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._last = np.full(clock.n_keys, -1_000_000 * clock.n_layers, np.int64)  # long before the first token

    def used(self, layer: int, ids: Ids) -> None:
        clock = self._clock  # of equal ids the last one counts, which is the newest
        self._last[ids + layer * clock.n_expert] = (clock.token + clock.rows(ids)) * clock.n_layers + layer

    def ages(self, keys: Ids, layer: int, out: _Numbers) -> _Numbers:
        """Layers since each key was used: 0 for the present one, less for later tokens of a chunk under way."""
        np.take(self._last, keys, out=out.view(np.int64), mode="clip")  # "raise" would go through a buffer
        return np.subtract(self._clock.token * self._clock.n_layers + layer, out.view(np.int64), out=out)


class _Frequency:
    """How often each key is used, older uses counting less: uses a token, as shares from 0 to 1.

    Not the counts decay, which would touch them all at each token: the increment grows.
    """

    def __init__(self, clock: _Clock, half_life: float, profile: Floats | None) -> None:
        self._clock, self._growth = clock, 0.5 ** (-1.0 / half_life)
        self._most = int(math.log(_OVERFLOW) / math.log(self._growth))  # tokens after which nothing is left
        self._increment, self._token = 1.0, clock.token
        self._counts = np.zeros(clock.n_keys)
        if profile is not None:  # as if the counts had come to rest at the profile's shares
            self._counts += profile.reshape(-1) / self._per_token
        self._shares = self._per_token

    @property
    def _per_token(self) -> float:
        return 1.0 - 1.0 / self._growth

    def used(self, layer: int, ids: Ids) -> None:
        if self._token != self._clock.token:
            self._advance()
        first = layer * self._clock.n_expert
        if ids.ndim == 1:
            self._counts[ids + first] += self._increment  # of one token: no id comes twice
            return
        weights = np.broadcast_to(self._increment * self._growth ** self._clock.rows(ids), ids.shape)
        self._counts[first : first + self._clock.n_expert] += np.bincount(
            ids.reshape(-1), weights.reshape(-1), self._clock.n_expert
        )

    def _advance(self) -> None:
        self._increment *= self._growth ** min(self._clock.token - self._token, self._most)
        self._token = self._clock.token
        if self._increment > _OVERFLOW:
            self._counts /= self._increment
            self._increment = 1.0
        self._shares = self._per_token / self._increment

    def shares(self, keys: Ids, out: _Numbers, weight: float = 1.0) -> _Numbers:
        """Uses a token of each key, times `weight`."""
        if self._token != self._clock.token:
            self._advance()
        np.take(self._counts, keys, out=out, mode="clip")
        return np.multiply(out, self._shares * weight, out=out)


class _Distance:
    """Layers until each key's layer comes again: 1 for the next layer, n_layers for the present one.

    (i - I) mod S of EdgeMoE (arXiv 2308.14352, where the printed formula has I and i the other way round), but the
    present layer's experts, when not in use now, are S away and not 0.
    """

    def __init__(self, clock: _Clock) -> None:
        self._n_expert, self._n_keys = clock.n_expert, clock.n_keys
        once = np.repeat(np.arange(1.0, clock.n_layers + 1), clock.n_expert)
        self._twice = np.concatenate((once, once))  # from the next layer's first key on, whichever that is

    def layers(self, keys: Ids, layer: int, out: _Numbers) -> _Numbers:
        """Distance of each key."""
        start = self._n_keys - (layer + 1) * self._n_expert
        return np.take(self._twice[start:], keys, out=out, mode="clip")


class Lru(_Clock):
    """Gives up what was used longest ago. Below one token's working set it never hits."""

    name = "lru"

    def __init__(self, record_bytes: Ids, known: Known) -> None:
        super().__init__(*record_bytes.shape)
        self._recency = _Recency(self)

    def used(self, layer: int, ids: Ids) -> None:
        """See Policy."""
        self._recency.used(layer, ids)

    def worth(self, keys: Ids, layer: int) -> Floats:
        """Minus the age."""
        out = self._out[: len(keys)]
        np.negative(self._recency.ages(keys, layer, self._work[0, : len(keys)]), out=out, casting="same_kind")
        return out


class Lfu(_Clock):
    """Gives up what is used least often, uses of `half_life` tokens ago counting half."""

    name = "lfu"

    def __init__(self, record_bytes: Ids, known: Known, half_life: float = 64.0) -> None:
        super().__init__(*record_bytes.shape)
        self._frequency = _Frequency(self, half_life, known.shares)

    def used(self, layer: int, ids: Ids) -> None:
        """See Policy."""
        self._frequency.used(layer, ids)

    def worth(self, keys: Ids, layer: int) -> Floats:
        """The share of tokens that use it."""
        out = self._out[: len(keys)]
        out[:] = self._frequency.shares(keys, self._work[0, : len(keys)])
        return out


class Pinned(_Clock):
    """Keeps the experts that a profile names most frequent, whatever happens; without one, those of the run so far."""

    name = "pinned"

    def __init__(self, record_bytes: Ids, known: Known) -> None:
        super().__init__(*record_bytes.shape)
        self._fixed = known.shares is not None
        self._counts = np.zeros(self.n_keys) if known.shares is None else known.shares.reshape(-1).astype(np.float64)

    def used(self, layer: int, ids: Ids) -> None:
        """See Policy."""
        if not self._fixed:
            np.add.at(self._counts, ids.reshape(-1) + layer * self.n_expert, 1.0)

    def worth(self, keys: Ids, layer: int) -> Floats:
        """The frequency in the profile."""
        out = self._out[: len(keys)]
        out[:] = np.take(self._counts, keys, out=self._work[0, : len(keys)], mode="clip")
        return out


class Lfru(_Clock):
    """Frequency over age: gives up what is neither used often nor lately."""

    name = "lfru"

    def __init__(self, record_bytes: Ids, known: Known, half_life: float = 64.0) -> None:
        super().__init__(*record_bytes.shape)
        self._recency, self._frequency = _Recency(self), _Frequency(self, half_life, known.shares)

    def used(self, layer: int, ids: Ids) -> None:
        """See Policy."""
        self._recency.used(layer, ids)
        self._frequency.used(layer, ids)

    def worth(self, keys: Ids, layer: int) -> Floats:
        """The share of tokens that use it over the layers since it was used, counted from one token on."""
        n, out = len(keys), self._out[: len(keys)]
        ages = self._recency.ages(keys, layer, self._work[1, :n])
        ages += self.n_layers
        np.maximum(ages, 1.0, out=ages)  # of a chunk under way
        np.divide(self._frequency.shares(keys, self._work[0, :n]), ages, out=out, casting="same_kind")
        return out


class EdgeMoe(_Clock):
    """Frequency over the layers until an expert's layer comes again (EdgeMoE, arXiv 2308.14352, section 5)."""

    name = "edgemoe"
    _half_life = 100_000.0  # the paper's frequencies are those of all tokens: practically no decay

    def __init__(self, record_bytes: Ids, known: Known) -> None:
        super().__init__(*record_bytes.shape)
        self._frequency, self._distance = _Frequency(self, self._half_life, known.shares), _Distance(self)

    def used(self, layer: int, ids: Ids) -> None:
        """See Policy."""
        self._frequency.used(layer, ids)

    def worth(self, keys: Ids, layer: int) -> Floats:
        """The share of tokens that use it over the distance."""
        n, out = len(keys), self._out[: len(keys)]
        distance = self._distance.layers(keys, layer, self._work[1, :n])
        np.divide(self._frequency.shares(keys, self._work[0, :n]), distance, out=out, casting="same_kind")
        return out


class Cost(_Clock):
    """Cost of a miss for each byte of room, times the chance of the next use, over the time until then.

    The chance that a token uses an expert is a mean of its shares of the last tokens, by several half-lives. What may
    be used soon is worth its room until then even if the chance is small; it can go after that. A record's cost grows
    with its size and so does its room: only the latency, which each read has once, makes small records dearer to lose
    for a byte.
    """

    name = "cost"
    _LATENCY_BYTES = 64 << 10  # what a flash drive could have read while it seeks: about 0.1 ms
    _AT_LEAST = 0.4  # tokens that are added to the time: found by trying, as the weights were, on two models
    _LEAST = 1e-3  # chance of what is not expected at all
    _WEIGHTS = (0.08, 0.27, 0.65, 0.0)  # of the shares, which sum up to a chance

    def __init__(self, record_bytes: Ids, known: Known) -> None:
        super().__init__(*record_bytes.shape)
        self._keeps, self._adds = keeps(), 1.0 - keeps()
        self._weights = np.array(self._WEIGHTS, np.float32)
        prior = np.zeros(record_bytes.shape) if known.shares is None else known.shares
        self._shares = np.repeat(prior[:, None].astype(np.float32), len(self._keeps), axis=1)  # by layer, kind, expert
        self._chances: Floats = prior.astype(np.float32)
        self._distance = _Distance(self)
        sizes = np.maximum(record_bytes.reshape(-1), 1).astype(np.float64)
        self._cost = (sizes + self._LATENCY_BYTES) / sizes

    def used(self, layer: int, ids: Ids) -> None:
        """See Policy."""
        shares = self._shares[layer]
        if ids.ndim == 1:
            shares *= self._keeps
            shares[:, ids] += self._adds
        else:
            ages = np.arange(len(ids))[::-1]
            chosen = np.zeros((len(ids), self.n_expert), np.float32)
            np.put_along_axis(chosen, ids, 1.0, axis=1)
            shares *= self._keeps ** len(ids)
            shares += (self._adds * self._keeps**ages) @ chosen
        np.dot(self._weights, shares, out=self._chances[layer])

    def worth(self, keys: Ids, layer: int) -> Floats:
        """Cost times chance over time."""
        n, out = len(keys), self._out[: len(keys)]
        time, cost = self._work[:2, :n]
        self._distance.layers(keys, layer, time)
        time += self._AT_LEAST * self.n_layers
        np.take(self._cost, keys, out=cost, mode="clip")
        cost /= time
        np.take(self._chances, keys, out=out, mode="clip")
        np.maximum(out, self._LEAST, out=out)
        return np.multiply(out, cost, out=out, casting="same_kind")


class Topics(Cost):
    """As `cost`, but the chance comes from a map, in which all experts' recent use speaks for each: see topics.py.

    A layer's chances are found anew when its routes are known. Without a map they are those of `cost`.
    """

    name = "topics"
    _AHEAD = NEAR

    def __init__(self, record_bytes: Ids, known: Known) -> None:
        super().__init__(record_bytes, known)
        nothing = np.zeros((*record_bytes.shape, 1), np.float32)
        self._map = known.topics.get(self._AHEAD) or TopicMap(self._weights, nothing[..., 0], nothing, nothing)
        self._weights = self._map.own
        self._parts = np.einsum("le,let->lt", self._shares[:, -1], self._map.reads)  # what each layer adds to a topic
        self._topics: Floats = self._parts.sum(axis=0)
        self._expect_all()

    def used(self, layer: int, ids: Ids) -> None:
        """See Policy."""
        super().used(layer, ids)
        part = self._parts[layer]
        self._topics -= part
        np.dot(self._shares[layer, -1], self._map.reads[layer], out=part)
        self._topics += part
        self._expect(layer)

    def _expect(self, layer: int) -> None:
        """Add what the topics let expect to the chances of a layer's own shares."""
        chances = self._chances[layer]
        chances += self._map.offset[layer]
        chances += self._map.writes[layer] @ self._topics

    def _expect_all(self) -> None:
        np.einsum("h,lhe->le", self._weights, self._shares, out=self._chances)
        for layer in range(self.n_layers):
            self._expect(layer)

    def next_token(self, n_tokens: int = 1) -> None:
        """See Policy."""
        self._topics = self._parts.sum(axis=0)  # so that what was rounded does not add up
        if n_tokens > 1:
            self._expect_all()


class FarTopics(Topics):
    """As `topics`, but with a map for more tokens: for a buffer that keeps experts for long."""

    name = "far-topics"
    _AHEAD = FAR


POLICIES: dict[str, Callable[[Ids, Known], Policy]] = {
    policy.name: policy for policy in (Lru, Lfu, Lfru, EdgeMoe, Cost, Topics, FarTopics, Pinned)
}


def make_policy(
    name: str,
    record_bytes: Ids,
    profile: Floats | None = None,
    topics: Mapping[int, TopicMap] = MappingProxyType({}),
) -> Policy:
    """A policy by name, for records of `record_bytes` (n_layers, n_expert).

    profile: the share of tokens that use each expert, (n_layers, n_expert). topics: maps of the same experts, by the
    tokens that they look ahead. OptionError for an unknown name.
    """
    if name not in POLICIES:
        raise OptionError(f"policy={name!r} is not known; use one of {', '.join(POLICIES)}")
    if profile is not None and profile.shape != record_bytes.shape:
        raise OptionError(f"the profile is of {profile.shape} experts, the model has {record_bytes.shape}")
    return POLICIES[name](record_bytes, Known(profile, topics))
