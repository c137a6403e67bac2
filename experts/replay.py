"""What each policy and predictor would have done on a recorded run, and what the best possible one would have.

Tokens are replayed one by one, as decoding runs them, prompts too. The first half of a trace warms caches and tables
(and is what `pinned` and `topics` learn from), the second half is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgert.errors import OptionError
from edgert.experts.choice import DEFAULT_POLICY, Found, save_choice
from edgert.experts.policies import POLICIES, Policy, make_policy
from edgert.experts.predictors import AHEAD, DEFAULT, PREDICTORS, Combined
from edgert.experts.topics import fit_all
from edgert.experts.trace import Trace
from edgert.types import Floats, Ids

Progress = Callable[[str, float], None]
COMBINED = " + ".join(DEFAULT)
_EVERYTHING = " + ".join(PREDICTORS)
_CLEARLY = 0.005  # share of hits or of recall by which a choice has to be better than the default
_NEVER = np.iinfo(np.int64).max // 2


class Belady:
    """Gives up what is used farthest ahead: the most hits that are possible where all records are of one size.

    Where sizes differ it knows the future and is no bound: the best choice then is a knapsack, which nobody solves.
    """

    name = "belady"

    def __init__(self, trace: Trace) -> None:
        self._n_layers, self._n_expert, self._token = trace.n_layers, trace.n_expert, 0
        self._next = np.full((trace.n_layers, trace.n_expert), _NEVER)
        self._after = np.empty(trace.ids.shape, np.int64)  # when each expert used is used again
        for layer in trace.layers:
            following, routes = self._next[layer], trace.ids[layer]
            for token in range(trace.n_tokens - 1, -1, -1):
                self._after[layer, token] = following[routes[token]]
                following[routes[token]] = token * trace.n_layers + layer

    def used(self, layer: int, ids: Ids) -> None:
        """See Policy."""
        self._next[layer, ids] = self._after[layer, self._token]

    def next_token(self, n_tokens: int = 1) -> None:
        """See Policy."""
        self._token += n_tokens

    def worth(self, keys: Ids, layer: int) -> Floats:
        """Minus the layers until the next use, exact up to 2 ** 24 of them."""
        now = self._token * self._n_layers + layer
        return (now - self._next.reshape(-1)[keys]).astype(np.float32)


@dataclass
class Hits:
    """Experts asked for in the counted half, and bytes of those that were not there.

    missed, held: of each expert by its key, how often it was not there, and after how many tokens it was.
    """

    n_tokens: int = 0
    n_asked: int = 0
    n_missed: int = 0
    bytes_asked: int = 0
    bytes_missed: int = 0
    missed: Ids = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    held: Ids = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)

    @property
    def rate(self) -> float:
        """Share of experts that were there."""
        return 1.0 - self.n_missed / max(self.n_asked, 1)

    @property
    def byte_rate(self) -> float:
        """Share of bytes that were there."""
        return 1.0 - self.bytes_missed / max(self.bytes_asked, 1)


class _Buffer:
    """An expert buffer on paper, with the residency's rule for one that is smaller than a token's working set."""

    def __init__(self, trace: Trace, n_bytes: int, policy: Policy, *, shared_out: bool) -> None:
        self.free, self._policy, self._n_expert = n_bytes, policy, trace.n_expert
        self._sizes = trace.record_bytes.reshape(-1)
        self.here = np.zeros(len(self._sizes), np.bool_)
        self._layer_of = np.arange(len(self._sizes)) // trace.n_expert
        self._used = np.zeros(trace.n_layers, np.int64)
        window, working_set = trace.top_k * int(self._sizes.max()), working_set_bytes(trace)
        self._shares: npt.NDArray[np.float64] | None = None
        if shared_out and n_bytes < working_set:
            self._shares = max(n_bytes - window, 0) * trace.record_bytes.sum(axis=1) / self._sizes.sum()

    def take(self, layer: int, keys: Ids) -> Ids:
        """Make experts of a layer resident: those that were not."""
        missing = keys[~self.here[keys]]
        if len(missing):
            needed = int(self._sizes[missing].sum())
            if needed > self.free:
                self._make_room(needed, layer, keys)
            self.here[missing] = True
            self.free -= needed
            self._used[layer] += needed
        return missing

    def _make_room(self, n_bytes: int, layer: int, keep: Ids) -> None:
        self.here[keep], kept = False, self.here[keep]  # not to be chosen
        candidates = np.flatnonzero(self.here)
        self.here[keep] = kept
        order = candidates[np.argsort(self._policy.worth(candidates, layer), kind="stable")]
        while self.free < n_bytes:
            if not len(order):
                return  # less than one layer's experts: they pass through
            key, place = order[0], 0
            if self._shares is not None:
                over = (self._used > self._shares)[self._layer_of[order]]
                place = int(over.argmax())
                key = order[place]
            order = np.delete(order, place) if place else order[1:]
            self.here[key] = False
            self.free += int(self._sizes[key])
            self._used[self._layer_of[key]] -= self._sizes[key]


def working_set_bytes(trace: Trace) -> int:
    """Bytes of the experts that one token routes to, on average."""
    return int(trace.record_bytes.mean(axis=1).sum() * trace.top_k)


def replay_policy(trace: Trace, policy: Policy, n_bytes: int, n_warm: int | None = None) -> Hits:
    """What a policy hits with an expert buffer of `n_bytes` after `n_warm` tokens, by default half of them."""
    n_warm = trace.n_tokens // 2 if n_warm is None else n_warm
    buffer = _Buffer(trace, n_bytes, policy, shared_out=policy.name != Belady.name)
    sizes = trace.record_bytes.reshape(-1)
    missed, held = np.zeros((2, len(sizes)), np.int64)
    hits = Hits(trace.n_tokens - n_warm, missed=missed, held=held)
    for token in range(trace.n_tokens):
        counted = token >= n_warm
        for layer in trace.layers:
            ids = trace.ids[layer, token].astype(np.int64)
            keys = ids + layer * trace.n_expert
            policy.used(layer, ids)
            missing = buffer.take(layer, keys)
            if counted:
                hits.n_asked += len(keys)
                hits.n_missed += len(missing)
                hits.bytes_asked += int(sizes[keys].sum())
                hits.bytes_missed += int(sizes[missing].sum())
                missed[missing] += 1
        if counted:
            held += buffer.here
        policy.next_token()
    return hits


def profile_of(trace: Trace, n_tokens: int | None = None) -> Floats:
    """The share of tokens that use each expert: (n_layers, n_expert)."""
    ids = trace.ids[:, :n_tokens]
    shares = [np.bincount(layer.reshape(-1), minlength=trace.n_expert) / ids.shape[1] for layer in ids]
    return np.array(shares, np.float32) * (trace.record_bytes > 0)


def _with_policies(trace: Trace) -> Iterator[tuple[str, Callable[[], Policy]]]:
    """Names and makers of all that are compared, Belady first."""
    yield Belady.name, lambda: Belady(trace)
    half = max(1, trace.n_tokens // 2)
    profile = profile_of(trace, half)
    topics = fit_all([trace.ids[:, :half]], profile)
    for name in POLICIES:
        yield name, partial(make_policy, name, trace.record_bytes, profile if name == "pinned" else None, topics)


def compare_policies(
    trace: Trace, residencies: Sequence[float], progress: Progress = lambda stage, fraction: None
) -> dict[str, list[Hits]]:
    """Hits of every policy, and of Belady, at shares of all experts' bytes."""
    total, found = int(trace.record_bytes.sum()), dict[str, list[Hits]]()
    floor = (trace.top_k + 1) * int(trace.record_bytes.max())
    for share in residencies:
        if not floor <= share * total or share > 1:
            raise OptionError(
                f"--residency {share:.2%} must lie between {floor / total:.2%} (one layer's experts of a token, and "
                "one more) and 100%"
            )
    makers = dict(_with_policies(trace))
    for step, (name, make) in enumerate(makers.items()):
        found[name] = []
        for share in residencies:
            progress(f"replaying {name} at {share:.4g}", step / len(makers))
            found[name].append(replay_policy(trace, make(), int(share * total)))
    return found


# ---- predictors ------------------------------------------------------------------------------------------------------
def compare_predictors(
    trace: Trace, progress: Progress = lambda stage, fraction: None, n_warm: int | None = None
) -> dict[str, list[Floats]]:
    """Recall of every predictor and of combinations: for each distance (n_layers,), NaN where it has no guess.

    It is the share of the experts used that are among the top_k best guesses, with exactly as many guesses as uses,
    after `n_warm` tokens, by default half of them.
    """
    n_warm = trace.n_tokens // 2 if n_warm is None else n_warm
    everything = Combined(trace.n_layers, trace.n_expert, trace.top_k, PREDICTORS)
    default = Combined(trace.n_layers, trace.n_expert, trace.top_k)
    names = [*PREDICTORS, COMBINED, _EVERYTHING]
    hits, counts = np.zeros((2, len(names), AHEAD, trace.n_layers))
    guesses = np.zeros((AHEAD, trace.n_layers, len(names), trace.n_expert), np.float32)
    known = np.zeros((AHEAD, trace.n_layers, len(names)), np.bool_)
    for token in range(trace.n_tokens):
        if token % 16 == 0:
            progress("replaying predictors", token / trace.n_tokens)
        for layer in trace.layers:
            ids = trace.ids[layer, token].astype(np.int64)
            if token >= n_warm:
                for distance in range(AHEAD):
                    best = np.argpartition(-guesses[distance, layer], trace.top_k - 1)[:, : trace.top_k]
                    found = np.isin(best, ids).sum(axis=1)
                    hits[:, distance, layer] += found * known[distance, layer]
                    counts[:, distance, layer] += trace.top_k * known[distance, layer]
            lookahead = trace.lookahead(layer, token)
            for combined in (everything, default):
                combined.routed(layer, ids[None], lookahead)
            for distance in range(AHEAD):
                target = (layer + distance + 1) % trace.n_layers
                rows, there = guesses[distance, target], known[distance, target]
                rows[-2], rows[-1] = default.chances(target, distance + 1), everything.chances(target, distance + 1)
                rows[:-2], there[:-2] = everything.evidence(target, distance + 1)
                there[-2:] = True
    with np.errstate(invalid="ignore"):
        recall = (hits / counts).astype(np.float32)
    return {name: [recall[row, distance] for distance in range(AHEAD)] for row, name in enumerate(names)}


# ---- both ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Report:
    """What replay found: hits of each policy at each residency, and recall of each predictor."""

    trace: Trace
    residencies: Sequence[float]
    policies: dict[str, list[Hits]]
    predictors: dict[str, list[Floats]]

    def regret(self, policy: str, place: int) -> float:
        """Hits that Belady has above a policy, as a share of all experts used, at one of the residencies."""
        return self.policies[Belady.name][place].rate - self.policies[policy][place].rate

    def best_policies(self) -> dict[float, str]:
        """For each residency the policy that saves most bytes; the default one unless another is clearly better."""
        best = {}
        for place, share in enumerate(self.residencies):
            rates = {name: hits[place].byte_rate for name, hits in self.policies.items() if name != Belady.name}
            name = max(rates, key=rates.__getitem__)
            best[share] = name if rates[name] > rates[DEFAULT_POLICY] + _CLEARLY else DEFAULT_POLICY
        return best

    def best_predictors(self) -> tuple[str, ...]:
        """The predictors to combine: all of them if that is clearly better than the default ones."""
        default, everything = (float(np.nanmean(self.predictors[name][0])) for name in (COMBINED, _EVERYTHING))
        return PREDICTORS if everything > default + _CLEARLY else DEFAULT

    def save(self) -> Path:
        """Keep the choice for this model, where loading finds it. Raises OSError."""
        trace, profile = self.trace, profile_of(self.trace)
        topics = fit_all([trace.ids], profile)
        found = Found(self.best_policies(), self.best_predictors(), profile, trace.n_tokens, topics)
        return save_choice(trace.model, found)


def replay(trace: Trace, residencies: Sequence[float], progress: Progress = lambda stage, fraction: None) -> Report:
    """Replay a trace with all policies at these shares of all experts' bytes, and with all predictors."""
    return Report(
        trace, residencies, compare_policies(trace, residencies, progress), compare_predictors(trace, progress)
    )
