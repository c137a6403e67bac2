"""Maps of topics: what they find in routes that have a law, that they find none elsewhere, and how they are kept."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from edgert.experts import topics as maps
from edgert.experts.policies import make_policy
from edgert.experts.replay import replay_policy
from edgert.experts.topics import FAR, NEAR, TopicMap, as_document, fit_all, fit_topics, from_document
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


def empty_map(shape: tuple[int, ...]) -> TopicMap:
    """Says nothing."""
    nothing = np.zeros((*shape, 1), np.float32)
    return TopicMap(np.zeros(4, np.float32), nothing[..., 0], nothing, nothing)


def missed(name: str, ids: np.ndarray, share: float = 0.4, **known: object) -> int:
    return replay_policy(trace_of(ids), make_policy(name, SIZES, **known), int(share * SIZES.sum())).n_missed


@pytest.fixture(scope="module")
def found() -> dict[int, TopicMap]:
    return fit_all([topical(1000, 1), topical(1000, 2)], FLAT)


@pytest.mark.parametrize("name", ["topics", "far-topics"])
def test_a_change_of_subject_is_seen_in_all_layers(name: str, found: dict[int, TopicMap]) -> None:
    policy = make_policy(name, SIZES, FLAT, found)
    for token in range(40):
        for layer in range(N_LAYERS):
            policy.used(layer, np.array([token % 4, (token + 1) % 4]))
        policy.next_token()
    before = policy.worth(np.arange(SIZES.size), 0).reshape(SIZES.shape).copy()
    for layer in range(N_LAYERS - 1):  # of another subject, and what was not used is seen too
        policy.used(layer, np.array([5, 6]))
    after = policy.worth(np.arange(SIZES.size), 1).reshape(SIZES.shape)
    assert before[1, :4].min() > before[1, 4:].max() and after[1, [4, 7]].min() > 2 * after[1, 8:].max()


def test_a_map_keeps_more_than_own_shares_do(found: dict[int, TopicMap]) -> None:
    unseen = topical(800, 3)
    assert missed("topics", unseen, profile=FLAT, topics=found) < 0.93 * missed("topics", unseen, profile=FLAT)
    assert missed("topics", unseen) == missed("cost", unseen)


def test_where_routes_have_no_law_a_map_does_little_harm() -> None:
    draw = np.random.default_rng(0)
    ids = np.argsort(draw.random((N_LAYERS, 2500, N_EXPERT)), axis=2)[:, :, :TOP_K].astype(np.uint8)
    found = fit_all([ids[:, :2000]], FLAT)
    assert missed("topics", ids[:, 2000:], topics=found) < 1.03 * missed("cost", ids[:, 2000:])


def test_a_chunk_leaves_what_its_tokens_would_have(found: dict[int, TopicMap]) -> None:
    ids, policies = topical(30, 5), [make_policy("topics", SIZES, FLAT, found) for _ in range(2)]
    for token, layer in itertools.product(range(30), range(N_LAYERS)):
        policies[0].used(layer, ids[layer, token].astype(np.int64))
        if layer == N_LAYERS - 1:
            policies[0].next_token()
    for layer in range(N_LAYERS):
        policies[1].used(layer, ids[layer].astype(np.int64))
    policies[1].next_token(30)
    ours, theirs = (policy.worth(np.arange(SIZES.size), N_LAYERS - 1).reshape(SIZES.shape)[-1] for policy in policies)
    assert np.allclose(ours, theirs, rtol=1e-3)  # of the last layer, whose chances were found when all was known


def test_both_forms_of_the_regression_are_one() -> None:
    draw = np.random.default_rng(0)
    inputs, targets = draw.normal(size=(30, 8)).astype(np.float32), draw.normal(size=(30, 8)).astype(np.float32)
    for n_rows in (30, 5):
        x, y = inputs[:n_rows].astype(np.float64), targets[:n_rows]
        expected = np.linalg.inv(x.T @ x + 3 * np.eye(8)) @ x.T @ y
        for found in maps._ridges(inputs[:n_rows], targets[:n_rows], [3.0]):
            assert np.allclose(found.onto(np.eye(8)), expected, atol=1e-5)
            assert np.allclose(found.applied(targets), targets @ expected, atol=1e-4)
        reads, writes = maps._through_topics(inputs[:n_rows], targets[:n_rows], 3.0, min(n_rows, 8))
        assert np.allclose(x @ reads @ writes.T, x @ expected, atol=1e-4)


def test_layers_without_experts_and_large_models_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = FLAT.copy()
    prior[1] = 0
    ids = topical(600, 1)
    ids[1] = 255  # means nothing
    monkeypatch.setattr(maps, "_MOST_NUMBERS", 30 * SIZES.size)  # fewer tokens than experts
    found = fit_topics([ids, ids[:, :40]], prior, NEAR)
    assert found is not None and np.isfinite(found.reads).all()
    assert all(np.allclose(array[1], 0, atol=1e-2) for array in (found.reads, found.offset, found.writes))


def test_little_text_is_not_fitted() -> None:
    assert fit_all([topical(200, 1)], FLAT) == {} and fit_all([topical(30, s) for s in range(50)], FLAT) == {}


def test_a_document_says_all_that_half_floats_can(found: dict[int, TopicMap]) -> None:
    one = found[FAR]
    again = from_document(json.loads(json.dumps(as_document(one))), FLAT.shape)
    for name in ("own", "offset", "reads", "writes"):
        ours, theirs = getattr(one, name), getattr(again, name)
        assert ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    assert as_document(again) == as_document(one)


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
    document = as_document(empty_map(SIZES.shape))
    assert from_document(document, FLAT.shape).reads.shape == (N_LAYERS, N_EXPERT, 1)
    with pytest.raises((ValueError, TypeError)):
        from_document({**document, key: value}, FLAT.shape)
