"""What a profile lets a runtime start with: the policy by residency, maps of topics, what predictors know; one file.

Policies are replayed over text that the maps, for this, were not fitted to: the second half of each kind of text.
Nothing is measured here; the routes are the profile's, the sizes of the records those of the bundle.
"""

from __future__ import annotations

import numpy as np

from edgert.experts.choice import Found, as_bytes
from edgert.experts.policies import POLICIES, make_policy
from edgert.experts.predictors import DEFAULT, PREDICTORS, path_table, table_bytes
from edgert.experts.profile import Profile
from edgert.experts.replay import Report, replay_policy
from edgert.experts.topics import FAR, NEAR, Routes, fit_all, topic_bytes
from edgert.experts.trace import Trace
from edgert.types import Ids

_RESIDENCIES = (0.125, 0.25, 0.5, 0.75)
_MOST_STEPS = 9_600  # layers times tokens that are replayed for one policy at one residency
_WARM = 0.3  # of them


def bundle_choice(profile: Profile, record_bytes: Ids) -> bytes:
    """The file choice.json of a bundle with records of these sizes, (n_layers, n_expert), packed with a profile."""
    texts, shares = [domain.ids for domain in profile.domains], profile.frequency()
    report = _replayed(profile, record_bytes)
    known = set(profile.recall) >= {" + ".join(names) for names in (DEFAULT, PREDICTORS)}
    found = Found(
        report.best_policies(),
        report.best_predictors() if known else DEFAULT,
        shares,
        profile.n_tokens,
        fit_all(texts, shares),
        path_table(texts, record_bytes > 0),
    )
    return as_bytes(profile.model, found)


def choice_bytes(record_bytes: Ids) -> int:
    """What the file takes at most."""
    n_layers, n_expert = record_bytes.shape
    halves = len((NEAR, FAR)) * topic_bytes(n_layers, n_expert) // 2  # as base 64, which makes four bytes of three
    return 4 * (halves + table_bytes(n_layers, n_expert) // 4) // 3 + 6 * record_bytes.size + (8 << 10)


def _replayed(profile: Profile, record_bytes: Ids) -> Report:
    """Every policy at every residency that can be, over the second halves of the texts."""
    first = [domain.ids[:, : domain.ids.shape[1] // 2] for domain in profile.domains]
    shares = profile.frequency()
    topics, trace = fit_all(first, shares), _sample(profile, record_bytes)
    total, least = int(record_bytes.sum()), (profile.top_k + 1) * int(record_bytes.max())
    residencies = [share for share in _RESIDENCIES if share * total >= least] or [1.0]
    n_warm = int(_WARM * trace.n_tokens)
    policies = {
        name: [
            replay_policy(trace, make_policy(name, record_bytes, shares, topics), int(share * total), n_warm)
            for share in residencies
        ]
        for name in POLICIES
    }
    return Report(trace, residencies, policies, {name: list(recall) for name, recall in profile.recall.items()})


def _sample(profile: Profile, record_bytes: Ids) -> Trace:
    """Runs of tokens from the second half of each text, as long as its share asks for."""
    n_tokens = _MOST_STEPS // max(1, len(profile.layers))
    parts: list[tuple[Routes, Routes]] = []
    for domain in profile.domains:
        half = domain.ids.shape[1] // 2
        part = slice(half, half + max(1, int(profile.shares[domain.name] * n_tokens)))
        parts.append((domain.ids[:, part], domain.weights[:, part]))
    ids, weights = (np.concatenate(rows, axis=1) for rows in zip(*parts, strict=True))
    return Trace.without_scores(profile.model, record_bytes, ids, weights)
