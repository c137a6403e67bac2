"""The context: what it finds in routes that have a law, that it finds none elsewhere, and what it is kept as."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgert.experts import context as contexts
from edgert.experts.context import Context, as_document, fit_context, from_document
from edgert.experts.policies import make_policy
from edgert.experts.replay import replay_policy
from edgert.experts.trace import Trace

N_LAYERS, N_EXPERT, TOP_K = 3, 12, 2
SIZES = np.full((N_LAYERS, N_EXPERT), 4096)
FLAT = np.full((N_LAYERS, N_EXPERT), TOP_K / N_EXPERT, np.float32)


def topical(n_tokens: int, seed: int, n_kinds: int = 3) -> np.ndarray:
    """Routes (n_layers, n_tokens, top_k) of a text that changes its subject now and then, to one of n_kinds sets of
    experts. The first layer says at once which it is."""
    draw = np.random.default_rng(seed)
    ids = np.zeros((N_LAYERS, n_tokens, TOP_K), np.uint8)
    subject, own = 0, N_EXPERT // n_kinds
    for token in range(n_tokens):
        if token % 40 == 0:
            subject = int(draw.integers(n_kinds))
        for layer in range(N_LAYERS):
            ids[layer, token] = subject * own + draw.choice(own, TOP_K, replace=False)
    return ids


def trace_of(ids: np.ndarray) -> Trace:
    return Trace.without_scores("made", SIZES, ids, np.ones(ids.shape, np.float16))


def missed(name: str, ids: np.ndarray, share: float = 0.4, **known: object) -> int:
    return replay_policy(trace_of(ids), make_policy(name, SIZES, **known), int(share * SIZES.sum())).n_missed


def test_a_change_of_subject_is_seen_in_all_layers() -> None:
    found = fit_context([topical(700, 1), topical(700, 2)], FLAT)
    assert found is not None
    policy = make_policy("context", SIZES, FLAT, found)
    for token in range(40):
        for layer in range(N_LAYERS):
            policy.used(layer, np.array([token % 4, (token + 1) % 4]))
        policy.next_token()
    before = policy.worth(np.arange(SIZES.size), 0).reshape(SIZES.shape).copy()
    policy.used(0, np.array([5, 6]))  # of another subject, in the first layer alone
    policy.used(1, np.array([5, 6]))
    after = policy.worth(np.arange(SIZES.size), 1).reshape(SIZES.shape)
    assert (before[1, :4].min() > before[1, 4:].max()) and (after[1, [4, 7]] > 2 * after[1, 8:].max()).all()


def test_the_map_keeps_more_than_own_shares_do() -> None:
    found = fit_context([topical(1500, 1), topical(1500, 2)], FLAT)
    unseen = topical(1000, 3)
    assert missed("context", unseen, profile=FLAT, context=found) < 0.93 * missed("context", unseen, profile=FLAT)
    assert missed("context", unseen, profile=FLAT, context=found) < 0.93 * missed("cost", unseen)


def test_where_routes_have_no_law_the_map_does_little_harm() -> None:
    draw = np.random.default_rng(0)
    ids = np.argsort(draw.random((N_LAYERS, 3000, N_EXPERT)), axis=2)[:, :, :TOP_K].astype(np.uint8)
    found = fit_context([ids[:, :2000]], FLAT)
    assert missed("context", ids[:, 2000:], context=found) < 1.03 * missed("context", ids[:, 2000:])


def test_both_forms_of_the_regression_are_one() -> None:
    draw = np.random.default_rng(0)
    inputs, targets = draw.normal(size=(30, 8)).astype(np.float32), draw.normal(size=(30, 8)).astype(np.float32)
    found = contexts._ridge(inputs, targets, 3.0)
    wide = contexts._ridge(inputs[:5], targets[:5], 3.0)
    for rows, ours in ((30, found), (5, wide)):
        x, y = inputs[:rows].astype(float), targets[:rows]
        assert np.allclose(ours, np.linalg.inv(x.T @ x + 3 * np.eye(8)) @ x.T @ y, atol=1e-5)
    reads, writes = contexts._through_topics(inputs, targets, 3.0, 8)
    assert np.allclose(reads @ writes.T, found, atol=1e-5)
    reads, writes = contexts._through_topics(inputs[:5], targets[:5], 3.0, 5)
    assert np.allclose(inputs[:5] @ reads @ writes.T, inputs[:5] @ wide, atol=1e-4)


def test_layers_without_experts_and_large_models_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = FLAT.copy()
    prior[1] = 0
    ids = topical(600, 1)
    ids[1] = 255  # means nothing
    monkeypatch.setattr(contexts, "_MOST_NUMBERS", 30 * SIZES.size)  # fewer tokens than experts
    found = fit_context([ids, ids[:, :40]], prior)
    assert found is not None and np.isfinite(found.reads).all()
    assert all(np.allclose(array[1], 0, atol=1e-2) for array in (found.reads, found.offset, found.writes))


def test_little_text_is_not_fitted() -> None:
    assert (
        fit_context([topical(200, 1)], FLAT) is None and fit_context([topical(30, s) for s in range(99)], FLAT) is None
    )


def test_a_document_says_all_that_half_floats_can() -> None:
    found = fit_context([topical(700, 1)], FLAT)
    assert found is not None
    again = from_document(json.loads(json.dumps(as_document(found))), FLAT.shape)
    for name in ("own", "offset", "reads", "writes"):
        ours, theirs = getattr(found, name), getattr(again, name)
        assert ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    assert as_document(again) == as_document(found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("topics", 0),
        ("topics", 10**9),
        ("topics", "8"),
        ("topics", True),
        ("own", ""),
        ("own", "AAAA"),
        ("offset", "!" * 96),
        ("reads", None),
        ("writes", "/" * 10),
        ("offset", "AHwA" * 24),  # infinite, not a number
    ],
)
def test_a_damaged_document_is_refused(key: str, value: object) -> None:
    document = as_document(Context.unknown(N_LAYERS, N_EXPERT))
    assert from_document(document, FLAT.shape).reads.shape == (N_LAYERS, N_EXPERT, 1)
    with pytest.raises((ValueError, TypeError)):
        from_document({**document, key: value}, FLAT.shape)
