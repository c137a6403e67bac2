"""What a profile lets a runtime start with: the policy by residency, the context, what predictors know; one file.

Policies are replayed over text that the context, for this, was not fitted to: the second half of each kind of text.
Nothing is measured here; the routes are the profile's, the sizes of the records those of the bundle.
"""

from __future__ import annotations

import numpy as np

from edgert.experts.choice import Found, as_bytes
from edgert.experts.context import Routes, fit_context
from edgert.experts.policies import POLICIES, make_policy
from edgert.experts.predictors import DEFAULT, path_table
from edgert.experts.profile import Profile
from edgert.experts.replay import Report, replay_policy
from edgert.experts.trace import Trace
from edgert.types import Ids

_RESIDENCIES = (0.125, 0.25, 0.5)
_MOST_STEPS = 14_400  # layers times tokens that are replayed for one policy at one residency
_WARM = 0.3  # of them


def bundle_choice(profile: Profile, record_bytes: Ids) -> bytes:
    """The file choice.json of a bundle with records of these sizes, (n_layers, n_expert), packed with a profile."""
    texts, shares = [domain.ids for domain in profile.domains], profile.frequency()
    report = _replayed(profile, record_bytes)
    known = set(profile.recall) >= {" + ".join(DEFAULT)}
    found = Found(
        report.best_policies(),
        report.best_predictors() if known else DEFAULT,
        shares,
        profile.n_tokens,
        fit_context(texts, shares),
        path_table(texts, record_bytes > 0),
    )
    return as_bytes(profile.model, found)


def _replayed(profile: Profile, record_bytes: Ids) -> Report:
    """Every policy at every residency that can be, over the second halves of the texts."""
    first = [domain.ids[:, : domain.ids.shape[1] // 2] for domain in profile.domains]
    shares = profile.frequency()
    context, trace = fit_context(first, shares), _sample(profile, record_bytes)
    total, least = int(record_bytes.sum()), (profile.top_k + 1) * int(record_bytes.max())
    residencies = [share for share in _RESIDENCIES if share * total >= least]
    n_warm = int(_WARM * trace.n_tokens)
    policies = {
        name: [
            replay_policy(trace, make_policy(name, record_bytes, shares, context), int(share * total), n_warm)
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
