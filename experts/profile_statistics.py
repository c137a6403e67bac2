"""What the routes of a profile say of caches and predictors: skew, co-activation, paths, and when experts come back.

Functions of one domain or of several: shares weigh them as Profile.frequency has it, None means the profile's own.
Tokens of a chunk follow each other, those of two chunks do not; nothing is counted across.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.experts.profile import Domain, Profile, normalised
from edgert.types import Floats, Ids

Shares = Mapping[str, float] | None


class Skew(NamedTuple):
    """How unevenly the experts of each layer are used.

    shares: (n_layers, n_expert), each expert's share of the routes, the largest first; rows of 0 without experts.
    entropy: (n_layers,), of those shares in bits, log2(n_expert) where all are used alike; NaN without experts.
    """

    shares: Floats
    entropy: Floats


def skew(profile: Profile, shares: Shares = None) -> Skew:
    """How unevenly the experts of each layer are used."""
    frequency = profile.frequency(shares).astype(np.float64) / profile.top_k
    ordered = -np.sort(-frequency, axis=1)
    logs = np.log2(ordered, out=np.zeros_like(ordered), where=ordered > 0)
    entropy = -(ordered * logs).sum(axis=1)
    entropy[~profile.record_bytes.any(axis=1)] = np.nan
    return Skew(ordered.astype(np.float32), entropy.astype(np.float32))


def co_activation(profile: Profile, layer: int, shares: Shares = None) -> Floats:
    """The share of tokens that use both experts of a pair in a layer, (n_expert, n_expert); used at all: diagonal."""

    def measure(domain: Domain) -> npt.NDArray[np.float64]:
        used = _used(domain, layer, profile.n_expert).astype(np.float64)
        return np.asarray(used.T @ used / len(used))

    return _weighted(profile, shares, measure)


def previous_token_reuse(profile: Profile, shares: Shares = None) -> Floats:
    """The share of a token's experts that the token before used in the same layer, (n_layers,); NaN without experts."""

    def measure(domain: Domain) -> npt.NDArray[np.float64]:
        found = np.full(profile.n_layers, np.nan)
        for layer in profile.layers:
            used = _used(domain, layer, profile.n_expert)
            again = (used[1:] & used[:-1])[_follows(profile, domain)[1:]]
            found[layer] = again.sum() / max(len(again) * profile.top_k, 1)
        return found

    return _weighted(profile, shares, measure)


class Paths(NamedTuple):
    """What the experts of the two layers before say of a layer's: each (n_layers,), NaN where nothing can be said.

    recall: share of the experts used that are among the top_k likeliest by the table of paths, learnt on the first half
    of the chunks and counted on the rest. entropy: bits that are left of each expert's use, in the mean over experts,
    once the path is known; beside unknown, without the path.
    """

    recall: Floats
    entropy: Floats
    unknown: Floats


def paths(profile: Profile, shares: Shares = None) -> Paths:
    """Recall and entropy of EdgeMoE's path table (arXiv 2308.14352), in which each pair of experts votes.

    A path is a pair of an expert of the layer two before and one of the layer before; of all pairs that a token took,
    the counts are added.
    """

    def measure(domain: Domain) -> npt.NDArray[np.float64]:
        found = np.full((3, profile.n_layers), np.nan)
        before = list(zip(profile.layers, profile.layers[1:], profile.layers[2:], strict=False))
        half = len(domain.tokens) // profile.chunk // 2 * profile.chunk
        for first, second, layer in before if half else ():
            found[:, layer] = _path(domain, (first, second, layer), half, profile.n_expert)
        return found

    return Paths(*_weighted(profile, shares, measure))


def _path(domain: Domain, layers: tuple[int, int, int], half: int, n_expert: int) -> tuple[float, float, float]:
    """Recall, entropy given the path, and entropy without, of one layer."""
    first, second, now = (domain.ids[layer].astype(np.int64) for layer in layers)
    keys = (first[:, :, None] * n_expert + second[:, None, :]).reshape(len(now), -1)  # (n_tokens, top_k ** 2)
    used = _used(domain, layers[2], n_expert).astype(np.float32)
    found, places = np.unique(keys, return_inverse=True)
    places = places.reshape(keys.shape)
    table, seen = np.zeros((len(found), n_expert), np.float32), np.zeros(len(found), np.float32)
    for column in places[:half].T:
        np.add.at(table, column, used[:half])
        np.add.at(seen, column, 1)
    votes = table[places[half:]].sum(axis=1)  # (n_tokens, n_expert)
    voters = seen[places[half:]].sum(axis=1, keepdims=True)
    base = used[:half].mean(axis=0)
    chance = (votes + base) / (voters + 1)  # what is known of no path counts as one more
    top_k = now.shape[1]
    best = np.argpartition(-chance, top_k - 1, axis=1)[:, :top_k]
    hits = np.take_along_axis(used[half:], best, axis=1).mean()
    return float(hits), _cross_entropy(chance, used[half:]), _cross_entropy(base[None], used[half:])


def _cross_entropy(chance: Floats, used: Floats) -> float:
    """Bits of each expert's use by tokens, of which it was thought so likely; the mean over both."""
    sure = np.clip(chance.astype(np.float64), 1e-4, 1 - 1e-4)
    return float(-(used * np.log2(sure) + (1 - used) * np.log2(1 - sure)).mean())


class Reuse(NamedTuple):
    """When an expert that was used is used again, within its chunk.

    distinct: (n_layers, n_expert), the share of uses before which so many other experts of the layer were used since, 0
    and more, those of the same token not counted: an LRU cache of d + top_k experts a layer hits those up to d.
    tokens: (n_layers, chunk), the share with so many tokens from one to the other, 0 and more.
    never: (n_layers,), the share that are the first of their chunk.
    """

    distinct: Floats
    tokens: Floats
    never: Floats


def reuse(profile: Profile, shares: Shares = None) -> Reuse:
    """When experts are used again."""
    n_layers, n_expert, chunk = profile.n_layers, profile.n_expert, profile.chunk

    def measure(domain: Domain) -> npt.NDArray[np.float64]:
        ids = domain.ids[profile.layers].astype(np.int64)
        found = np.zeros((n_layers, n_expert + chunk + 1))
        for start in range(0, len(domain.tokens), chunk):
            found[profile.layers] += _distances(ids[:, start : start + chunk], n_expert)
        return found / ids[0].size

    counts = _weighted(profile, shares, measure)
    return Reuse(counts[:, :n_expert], counts[:, n_expert:-1], counts[:, -1])


def _distances(ids: Ids, n_expert: int) -> npt.NDArray[np.float64]:
    """Counts of uses, in one row for each layer: by distinct experts and by tokens since the last use, and the rest.

    ids: (n_layers, n_tokens, top_k), of one chunk. A token's experts are used at once: none lies between the others.
    """
    n_layers, chunk, _ = ids.shape
    counts = np.zeros((n_layers, n_expert + chunk + 1))
    last, rows = np.full((n_layers, n_expert), -1), np.arange(n_layers)[:, None]
    for token in range(chunk):
        times = last[rows, ids[:, token]]  # (n_layers, top_k)
        distinct = (last[:, None, :] > times[:, :, None]).sum(axis=2)
        again = times >= 0
        np.add.at(counts, (rows, np.where(again, distinct, n_expert + chunk)), 1)
        np.add.at(counts, (rows, np.where(again, n_expert + token - times, n_expert + chunk)), again)
        last[rows, ids[:, token]] = token
    return counts


# ---- parts -----------------------------------------------------------------------------------------------------------
def _used(domain: Domain, layer: int, n_expert: int) -> npt.NDArray[np.bool_]:
    """Which experts of a layer each token uses, (n_tokens, n_expert)."""
    used = np.zeros((len(domain.tokens), n_expert), np.bool_)
    np.put_along_axis(used, domain.ids[layer].astype(np.int64), True, axis=1)
    return used


def _follows(profile: Profile, domain: Domain) -> npt.NDArray[np.bool_]:
    """Which tokens follow another in their chunk, (n_tokens,)."""
    return np.arange(len(domain.tokens)) % profile.chunk > 0


def _weighted(profile: Profile, shares: Shares, measure: Callable[[Domain], npt.NDArray[np.float64]]) -> Floats:
    """The mean of a measure over domains, by their shares."""
    parts = normalised(profile.shares if shares is None else shares)
    total = sum(share * measure(profile.domain(name)) for name, share in parts.items() if share)
    return np.asarray(total, np.float32)
