"""Predictors on routes whose law is known: each finds what it is made for, and the combination is calibrated."""

from __future__ import annotations

import numpy as np
import pytest

from edgert.experts import predictors
from edgert.experts.predictor_kernels import Knowledge
from edgert.experts.predictors import DEFAULT, PREDICTORS, Combined, predictor_bytes, table_bytes

N_LAYERS, N_EXPERT, TOP_K = 6, 12, 2


def recall(names: tuple[str, ...], n_tokens: int, law: str, distance: int = 1, truth: float = 0.0) -> np.ndarray:
    """Share of the used experts that are among the top_k guesses, by layer, over the second half of the tokens."""
    draw = np.random.default_rng(0)
    combined = Combined(N_LAYERS, N_EXPERT, TOP_K, names)
    follows = np.argsort(draw.random((N_LAYERS, N_EXPERT)), axis=1)
    favourites = np.argsort(draw.random((N_LAYERS, N_EXPERT)), axis=1)[:, :TOP_K]
    made, hits, n = np.zeros((n_tokens, N_LAYERS, TOP_K), np.int64), np.zeros(N_LAYERS), 0
    for token in range(n_tokens):
        for layer in range(N_LAYERS):
            made[token, layer] = draw.permutation(N_EXPERT)[:TOP_K]
            if law == "path" and layer:
                made[token, layer] = follows[layer, made[token, layer - 1]]
            if law == "previous" and token % 3:
                made[token, layer] = made[token - 1, layer]
            if law == "frequency" and draw.random() < 0.7:
                made[token, layer] = favourites[layer]
    for token in range(n_tokens):
        n += token >= n_tokens // 2
        for layer in range(N_LAYERS):
            scores = draw.normal(size=(2, N_EXPERT)).astype(np.float32)
            for d in range(2):
                if layer + 1 + d < N_LAYERS:
                    scores[d, made[token, layer + 1 + d]] += truth
            combined.routed(layer, made[token, layer][None], list(scores))
            target = (layer + distance) % N_LAYERS
            guesses = np.argsort(-combined.chances(target, distance))[:TOP_K]
            at = token + (target < layer)
            if token >= n_tokens // 2 and at < n_tokens:
                hits[target] += len(set(guesses.tolist()) & set(made[at, target].tolist()))
    return hits / (TOP_K * n)


def test_the_router_ahead_is_followed_and_reaches_to_the_last_layer_only() -> None:
    for distance in (1, 2):
        found = recall(("router",), 100, "none", distance, truth=6.0)
        assert (found[distance:] > 0.95).all() and (found[:distance] < 0.5).all()


@pytest.mark.parametrize("pairs", [True, False])
def test_the_path_table_learns_what_follows_what(pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pairs:
        monkeypatch.setattr(predictors, "_PAIRS_BYTES", 0)
    found = recall(("path",), 600, "path")
    assert (found[1:] > 0.9).all() and found[0] < 0.5


def test_a_path_table_that_would_be_large_is_left_out() -> None:
    for n_layers, n_expert in ((30, 16), (16, 64), (48, 128), (61, 256), (94, 512)):
        combined = Combined(n_layers, n_expert, 8, ("path",))
        assert table_bytes(n_layers, n_expert) == combined._knowledge.table.nbytes <= 8 << 20
        kept = sum(array.nbytes for array in combined._knowledge if array.dtype == np.float32 and array.ndim > 1)
        assert kept <= predictor_bytes(n_layers, n_expert) <= 1.3 * kept
    for layer in range(4):
        combined.routed(layer, np.arange(8)[None], ())
        combined.chances(layer + 1, 1)
        assert not combined.evidence(layer + 1, 1)[1].any()


def test_the_previous_token_is_remembered() -> None:
    assert (recall(("previous",), 200, "previous") > 0.6).all()


def test_frequent_experts_are_found() -> None:
    assert (recall(("frequency",), 300, "frequency", distance=2) > 0.65).all()


def test_the_combination_is_better_than_its_parts_and_covers_layer_0() -> None:
    parts = [recall((name,), 300, "frequency", truth=2.0) for name in DEFAULT]
    whole = recall(DEFAULT, 300, "frequency", truth=2.0)
    assert whole.mean() > max(part.mean() for part in parts) and whole[0] > 0.6


def test_probabilities_come_true_as_often_as_they_say() -> None:
    draw = np.random.default_rng(3)
    combined = Combined(2, 16, 2)
    said, came = [], []
    for _ in range(1500):
        chosen = draw.permutation(16)[:2]
        scores = draw.normal(size=16).astype(np.float32)
        scores[chosen] += 1.5
        combined.routed(0, draw.permutation(16)[None, :2], [scores])
        said.append(combined.chances(1, 1).copy())
        combined.routed(1, chosen[None], [])
        came.append(np.isin(np.arange(16), chosen))
    p, y = np.concatenate(said[500:]), np.concatenate(came[500:])
    for low in (0.0, 0.1, 0.3, 0.5, 0.7):
        inside = (p >= low) & (p < low + 0.2)
        assert abs(p[inside].mean() - y[inside].mean()) < 0.1


@pytest.mark.parametrize("name", PREDICTORS)
def test_chunks_of_a_prompt_are_learnt_too(name: str) -> None:
    combined = Combined(N_LAYERS, N_EXPERT, TOP_K, (name,))
    ids = np.tile([[3, 4]], (50, 1))
    for _ in range(3):
        for layer in range(N_LAYERS):
            combined.routed(layer, ids, [])
    chances = combined.chances(1, 1)
    assert chances.shape == (N_EXPERT,) and (0 < chances).all() and (chances < 1).all()
    if name != "router":
        assert set(np.argsort(-chances)[:2].tolist()) == {3, 4}


def test_scores_that_are_not_numbers_do_no_lasting_harm() -> None:
    combined = Combined(N_LAYERS, N_EXPERT, TOP_K)
    for bad in (np.nan, np.inf):
        scores = np.full(N_EXPERT, bad, np.float32)
        with np.errstate(all="ignore"):
            combined.routed(0, np.array([[1, 2]]), [scores, scores])
            assert np.isfinite(combined.chances(1, 1)).all()
        combined.routed(1, np.array([[1, 2]]), [])
    assert np.isfinite(combined.chances(2, 1)).all()


# ---- the kernels beside the obvious ----------------------------------------------------------------------------------
def plain_chances(knowledge: Knowledge, target: int, distance: int) -> np.ndarray:
    """What guess() should find, from what learn() has kept; all four kinds of evidence."""
    n_layers, n_expert = knowledge.recent.shape
    odds = np.full(n_expert, knowledge.weights[distance - 1, target, 0], np.float64)

    def log_odds(shares: np.ndarray) -> np.ndarray:
        shares = np.clip(shares, 1e-3, 1 - 1e-3)
        return np.log(shares / (1 - shares))

    def add(row: int, evidence: np.ndarray) -> None:
        odds[:] += knowledge.weights[distance - 1, target, 1 + row] * evidence

    if distance <= min(knowledge.n_scores[0], target):
        scores = knowledge.scores[distance - 1].astype(np.float64)
        chosen = np.sort(scores)[-knowledge.last.shape[1]]
        add(0, np.maximum((scores - chosen) / scores.std(), -4))
    before, last = knowledge.last[(target - 2) % n_layers], knowledge.last[(target - 1) % n_layers]
    if distance == 1 and knowledge.table.shape[1] and (before >= 0).all() and (last >= 0).all():
        pairs = knowledge.table.shape[1] == n_expert**2
        rows = (before[:, None] * n_expert + last).ravel() if pairs else np.concatenate((before, last + n_expert))
        uses = knowledge.table[target, rows].astype(np.float64).sum(axis=0)
        add(1, log_odds((uses[:-1] + 2 * knowledge.path_shares[target]) / (uses[-1] + 2)))
    add(2, knowledge.recent[target])
    add(3, log_odds(knowledge.shares[target].astype(np.float64)))
    return 1 / (1 + np.exp(-np.maximum(odds, -15)))


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize(("n_layers", "n_expert", "top_k"), [(1, 3, 1), (2, 5, 5), (3, 16, 4), (4, 33, 7)])
def test_kernels_find_what_the_obvious_finds(
    n_layers: int, n_expert: int, top_k: int, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pairs:
        monkeypatch.setattr(predictors, "_PAIRS_BYTES", 0)
    draw = np.random.default_rng(n_expert)
    combined = Combined(n_layers, n_expert, top_k, PREDICTORS)
    keys, found = np.zeros(2 * top_k, np.int64), np.zeros(2 * top_k, np.float32)
    state, has_experts = np.zeros(n_layers * n_expert, np.uint8), np.ones(n_layers, np.bool_)
    for token in range(80):
        for layer in range(n_layers):
            ids = np.argsort(draw.random((1 + 4 * (token % 9 == 0), n_expert)), axis=1)[:, :top_k].copy()
            scores = draw.normal(size=(2, n_expert + 3)).astype(np.float32)
            combined.routed(layer, ids, scores[: draw.integers(3)])
            state[:] = draw.integers(3, size=len(state)) // 2  # one in three is not absent
            n, listed = combined.list_absent(layer, state, has_experts, 0.05, keys, found), list[tuple[int, float]]()
            for distance in range(1, min(2, n_layers) + 1):
                target = (layer + distance) % n_layers
                expected = plain_chances(combined._knowledge, target, distance)
                np.testing.assert_allclose(combined.chances(target, distance), expected, rtol=2e-3, atol=1e-5)
                made = combined.chances(target, distance)
                best = [e for e in np.argsort(-made, kind="stable") if made[e] > 0.05]
                absent = [e for e in best if state[target * n_expert + e] == 0]
                listed += [(target * n_expert + e, made[e]) for e in absent[:top_k]]
            assert keys[:n].tolist() == [key for key, _ in listed]
            assert found[:n].tolist() == [chance for _, chance in listed]
