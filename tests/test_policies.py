"""Which expert a policy gives up: by hand-made histories, and each against its definition written out slowly."""

from __future__ import annotations

import numpy as np
import pytest

from edgert.errors import OptionError
from edgert.experts.policies import POLICIES, make_policy

N_LAYERS, N_EXPERT, TOP_K = 4, 8, 2
SIZES = np.full((N_LAYERS, N_EXPERT), 4096)


def history(n_tokens: int, seed: int = 0) -> np.ndarray:
    """Routes (n_tokens, n_layers, top_k) in which low ids are more frequent."""
    draw = np.random.default_rng(seed)
    shares = 1.0 / np.arange(1, N_EXPERT + 1)
    rows = [draw.choice(N_EXPERT, TOP_K, replace=False, p=shares / shares.sum()) for _ in range(n_tokens * N_LAYERS)]
    return np.array(rows, np.int64).reshape(n_tokens, N_LAYERS, TOP_K)


def told(name: str, routes: np.ndarray, **more: np.ndarray) -> object:
    """A policy that saw these tokens, one by one."""
    policy = make_policy(name, SIZES, **more)
    for token in routes:
        for layer, ids in enumerate(token):
            policy.used(layer, ids)
        policy.next_token()
    return policy


def all_worth(policy: object, layer: int = 0) -> np.ndarray:
    """Of every key, layer by layer: (n_layers, n_expert)."""
    return policy.worth(np.arange(N_LAYERS * N_EXPERT), layer).reshape(N_LAYERS, N_EXPERT).copy()


@pytest.mark.parametrize("name", POLICIES)
def test_worth_is_finite_for_every_key_and_follows_the_order_asked_for(name: str) -> None:
    policy = told(name, history(50))
    keys = np.array([31, 0, 17, 5, 5])
    worth = policy.worth(keys, 2).copy()
    assert worth.dtype == np.float32 and worth.shape == (5,) and np.isfinite(worth).all()
    assert np.array_equal(worth, all_worth(policy, 2).reshape(-1)[keys])
    assert policy.worth(keys[:0], 2).shape == (0,)


@pytest.mark.parametrize("name", POLICIES)
def test_a_chunk_counts_as_its_tokens_one_after_the_other(name: str) -> None:
    routes = history(40)
    one_by_one, chunked = told(name, routes), make_policy(name, SIZES)
    for start in (0, 16):
        chunk = routes[start : start + (16 if start == 0 else 24)]
        for layer in range(N_LAYERS):
            chunked.used(layer, chunk[:, layer])
        chunked.next_token(len(chunk))
    assert np.allclose(all_worth(one_by_one), all_worth(chunked), rtol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_what_was_never_used_goes_before_what_is_used_by_every_token(name: str) -> None:
    policy = make_policy(name, SIZES)
    for _ in range(30):
        for layer in range(N_LAYERS):
            policy.used(layer, np.array([1, 2]))
        policy.next_token()
    worth = all_worth(policy)
    assert (worth[:, [1, 2]].min() > worth[:, [0, 3, 4, 5, 6, 7]]).all()


def test_lru_orders_by_the_last_use() -> None:
    routes = history(30)
    last = np.full((N_LAYERS, N_EXPERT), -1)
    for t, token in enumerate(routes):
        for layer, ids in enumerate(token):
            last[layer, ids] = t * N_LAYERS + layer
    seen = last >= 0
    assert np.array_equal(all_worth(told("lru", routes))[seen], last[seen] - 30 * N_LAYERS)


def test_lfu_counts_uses_a_half_life_ago_as_half() -> None:
    routes = history(200)
    policy = told("lfu", routes)
    shares = np.zeros((N_LAYERS, N_EXPERT))
    keep = 0.5 ** (1 / 64)
    for token in routes:
        shares *= keep
        for layer, ids in enumerate(token):
            shares[layer, ids] += 1 - keep
    assert np.allclose(all_worth(policy), shares * keep, rtol=1e-5)


def test_edgemoe_divides_by_the_layers_until_the_layer_comes_again() -> None:
    routes = history(100)
    policy = told("edgemoe", routes)
    frequency = np.array([np.bincount(routes[:, i].reshape(-1), minlength=N_EXPERT) for i in range(N_LAYERS)])
    for layer in range(N_LAYERS):
        distance = np.array([(i - layer) % N_LAYERS or N_LAYERS for i in range(N_LAYERS)])
        expected = frequency / distance[:, None]
        worth = all_worth(policy, layer)
        assert np.allclose(worth / worth.sum(), expected / expected.sum(), rtol=1e-2, atol=1e-6)


def test_cost_keeps_what_comes_soon_and_small_records() -> None:
    policy = make_policy("cost", SIZES)
    for _ in range(100):
        for layer in range(N_LAYERS):
            policy.used(layer, np.array([0, 1]))
        policy.next_token()
    certain = all_worth(policy, 1)[:, 0]  # used by each token: the nearest layer is worth most, the present one least
    assert certain[2] > certain[3] > certain[0] > certain[1]
    sizes = SIZES.copy()
    sizes[:, 1] *= 1000
    mixed = make_policy("cost", sizes)
    mixed.used(0, np.array([0, 1]))
    worth = all_worth(mixed)
    assert worth[0, 0] > worth[0, 1]


@pytest.mark.parametrize("name", ["lfu", "lfru", "edgemoe", "cost", "pinned"])
def test_a_profile_says_what_is_frequent_before_anything_ran(name: str) -> None:
    profile = np.tile(np.linspace(0.1, 0.8, N_EXPERT, dtype=np.float32), (N_LAYERS, 1))
    worth = all_worth(make_policy(name, SIZES, profile))
    assert (np.diff(worth, axis=1) > 0).all()


def test_pins_stay_whatever_is_used() -> None:
    profile = np.tile(np.linspace(0.8, 0.1, N_EXPERT, dtype=np.float32), (N_LAYERS, 1))
    policy = told("pinned", np.full((50, N_LAYERS, TOP_K), [6, 7]), profile=profile)
    assert np.array_equal(all_worth(policy), profile)


def test_decayed_counts_last_for_millions_of_tokens() -> None:
    policy = make_policy("lfu", SIZES)
    for _ in range(2000):
        policy.used(1, np.array([3]))
        policy.next_token(100_000)
    assert np.isfinite(all_worth(policy)).all()
    policy.used(1, np.array([5]))
    assert all_worth(policy)[1].argmax() == 5


def test_unknown_names_and_foreign_profiles_are_refused() -> None:
    with pytest.raises(OptionError, match="policy='belady' is not known; use one of lru, lfu"):
        make_policy("belady", SIZES)
    with pytest.raises(OptionError, match="profile"):
        make_policy("lfu", SIZES, np.zeros((2, 2), np.float32))
