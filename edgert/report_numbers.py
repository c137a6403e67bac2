"""Numbers of a report that a profile's statistics do not have: hot sets, chance, and a replay that takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from edgert.experts.policies import POLICIES, Policy, make_policy
from edgert.experts.profile import Domain, Profile
from edgert.experts.profile_statistics import co_activation
from edgert.experts.replay import Belady, Hits, Report, replay_policy
from edgert.experts.topics import fit_all
from edgert.experts.trace import Trace
from edgert.types import Floats, Ids

Progress = Callable[[str, float], None]
Numbers = npt.NDArray[np.float64]

RESIDENCIES = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.75)  # shares of the experts' bytes in RAM that are replayed
_LEAST_TOKENS, _MOST_TOKENS = 200, 4_000  # of a replay, within the time that all policies at all residencies may take:
_REPLAY_S, _STEP_S, _EXPERT_S = 45.0, 10e-6, 20e-9  # in all, of each layer of a token, and for each expert there is
_WARM = 3  # the part of a replay that fills the buffer, and is not counted: one in so many


def concentration(frequency: Floats) -> Numbers:
    """What part of all uses falls on the 1, 2, ... most used experts: (n,), ascending to 1."""
    ordered = np.sort(frequency.reshape(-1).astype(np.float64))[::-1]
    return np.cumsum(ordered) / ordered.sum()


def hot_share(frequency: Floats, part: float) -> float:
    """What part of all uses falls on the most used `part` of the experts, at least one."""
    return float(concentration(frequency)[hot_count(frequency.size, part) - 1])


def hot_count(n: int, part: float) -> int:
    """How many of n experts a part is, at least one."""
    return max(1, round(part * n))


def served(hot: Floats, used: Floats, part: float) -> float:
    """What part of the uses in `used` falls on the most used `part` of experts in `hot`; both (n_layers, n_expert)."""
    best = np.argsort(-hot.reshape(-1), kind="stable")[: hot_count(hot.size, part)]
    return float(used.reshape(-1)[best].sum(dtype=np.float64) / used.sum(dtype=np.float64))


# ---- which together --------------------------------------------------------------------------------------------------
def together(profile: Profile, layer: int) -> tuple[Numbers, Numbers]:
    """The share of tokens that use both experts, and that over what chance would give: both (n_expert, n_expert).

    Chance is that of choices which keep each expert's frequency and nothing else, scaled so that a token chooses as
    many pairs as it does. NaN on the diagonal, and where an expert was never used.
    """
    both, top_k = co_activation(profile, layer).astype(np.float64), profile.top_k
    share = both.diagonal().copy()
    chance = np.outer(share, share) * top_k * (top_k - 1) / (top_k**2 - (share**2).sum())
    np.fill_diagonal(both, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        return both, both / chance


# ---- found in RAM ----------------------------------------------------------------------------------------------------
def replayed(profile: Profile, record_bytes: Ids, progress: Progress) -> Report:
    """All policies, and Belady, over a sample of the profile's routes at shares of the experts' bytes in RAM.

    As a bundle's runtime does, policies begin with what the profile says; here with what the first half of each kind of
    text says, while the sample is of the second halves. The first third of it fills the buffer, the rest is counted.
    """
    progress("fitting what the policies begin with", 0.0)
    first, _ = halves(profile)
    shares, trace = first.frequency(), sampled(profile, record_bytes)
    topics = fit_all([domain.ids for domain in first.domains], shares)
    makers: dict[str, Callable[[], Policy | Belady]] = {Belady.name: lambda: Belady(trace)}
    makers |= {name: partial(make_policy, name, record_bytes, shares, topics) for name in POLICIES}
    found, levels, total = dict[str, list[Hits]](), residencies(trace), int(record_bytes.sum())
    for step, (name, make) in enumerate(makers.items()):
        progress(f"replaying {name}", step / len(makers))
        found[name] = [replay_policy(trace, make(), int(level * total), warm_tokens(trace)) for level in levels]
    return Report(trace, levels, found, {})


def warm_tokens(trace: Trace) -> int:
    """Tokens that fill the buffer."""
    return trace.n_tokens // _WARM


def halves(profile: Profile) -> tuple[Profile, Profile]:
    """The profile of the first halves of all texts, and that of the second; of one token, both are of that."""
    found = []
    for second in (False, True):
        parts = (
            slice(len(one.tokens) // 2, None) if second else slice(0, max(1, len(one.tokens) // 2))
            for one in profile.domains
        )
        domains = tuple(_part(domain, part) for domain, part in zip(profile.domains, parts, strict=True))
        found.append(replace(profile, domains=domains))
    return found[0], found[1]


def _part(domain: Domain, part: slice) -> Domain:
    """Some tokens of a domain."""
    return replace(domain, tokens=domain.tokens[part], ids=domain.ids[:, part], weights=domain.weights[:, part])


def sampled(profile: Profile, record_bytes: Ids) -> Trace:
    """Stretches of the second halves of all domains in turn, with the records that will be read."""
    rest = halves(profile)[1].domains
    token_s = len(profile.layers) * (_STEP_S + _EXPERT_S * record_bytes.size)
    there = sum(len(domain.tokens) for domain in rest)
    replay_s = _REPLAY_S / ((len(POLICIES) + 1) * len(RESIDENCIES))
    most = min(max(_LEAST_TOKENS, int(replay_s / token_s)), _MOST_TOKENS, there)
    stretch = max(1, min(profile.chunk, most // (4 * len(rest))))  # two of each in both halves of the sample
    parts, taken = list[Domain](), 0
    for start in range(0, profile.n_tokens, stretch):
        for domain in rest:
            parts.append(_part(domain, slice(start, min(start + stretch, start + most - taken))))
            taken += len(parts[-1].tokens)
    ids, weights = (np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("ids", "weights"))
    return Trace.without_scores(profile.model, record_bytes, ids, weights)


def residencies(trace: Trace) -> list[float]:
    """The shares to replay: those that hold at least one layer's experts of a token, and one more."""
    least = (trace.top_k + 1) * int(trace.record_bytes.max()) / int(trace.record_bytes.sum())
    return [share for share in RESIDENCIES if share >= least] or [min(1.0, least * 1.001)]
