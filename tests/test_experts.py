"""Routing against its slow version, residency with the null device at sizes that no machine here could hold."""

from __future__ import annotations

import numpy as np
import pytest
from compiled import choose_row
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.devices import routing
from edgert.devices.null import NullDevice
from edgert.devices.routing import choose_reference
from edgert.engine import Engine, Session
from edgert.errors import ContextLengthError
from edgert.experts.residency import AllResident
from edgert.types import ExpertCounts, Floats, ModelConfig, RopeConfig, RouterConfig, Routes


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n_expert=st.integers(1, 70),
    top_k=st.integers(1, 9),
    n_tokens=st.integers(1, 5),
    gating=st.sampled_from(["softmax", "sigmoid"]),
    normalise=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    late=st.booleans(),
    biased=st.booleans(),
    groups=st.sampled_from([(1, 1), (1, 1), (2, 1), (4, 2), (8, 3), (8, 8)]),
)
def test_routing_equals_the_slow_version(
    seed: int,
    n_expert: int,
    top_k: int,
    n_tokens: int,
    gating: str,
    normalise: bool,
    scale: float,
    late: bool,
    biased: bool,
    groups: tuple[int, int],
) -> None:
    n_expert = -(-n_expert // groups[0]) * groups[0]
    top_k = min(top_k, n_expert // groups[0] * groups[1])
    random = np.random.default_rng(seed)
    scores = np.round(random.standard_normal((n_tokens, n_expert + 3)) * 3, seed % 3).astype(np.float32)  # many ties
    config = RouterConfig(n_expert, top_k, gating, normalise, scale, *groups, late=late)  # type: ignore[arg-type]
    bias = np.round(random.standard_normal(n_expert), seed % 3).astype(np.float32) if biased else None
    ours = chosen(scores, config, bias)
    slow = choose_reference(scores[:, :n_expert], config, bias)
    for name in ("ids", "weights", "order"):
        assert (getattr(ours, name) == getattr(slow, name)).all(), name
    assert (np.diff(np.take_along_axis(ours.ids, ours.order, axis=1), axis=1) > 0).all()
    if normalise and not late:
        assert np.allclose(ours.weights.sum(axis=1), scale, rtol=1e-6)


def chosen(scores: Floats, config: RouterConfig, bias: Floats | None = None) -> Routes:
    """The compiled choice."""
    shape = len(scores), config.top_k
    routes = Routes(np.empty(shape, np.int64), np.empty(shape, np.float32), np.empty(shape, np.int64))
    work, router = np.empty(3 * config.n_expert, np.float32), routing.router_record(config)
    biases = 0 if bias is None else bias.ctypes.data
    for t in range(len(scores)):
        choose_row(scores[t], router.ctypes.data, biases, work, routes.ids[t], routes.weights[t], routes.order[t])
    return routes


def test_ties_go_to_the_lower_id_and_not_a_number_does_not_crash() -> None:
    router = RouterConfig(4, 2)
    assert chosen(np.zeros((1, 4), np.float32), router).ids.tolist() == [[0, 1]]
    ids = chosen(np.full((1, 4), np.nan, np.float32), router).ids
    assert sorted(set(ids[0].tolist())) == sorted(ids[0].tolist()) and (0 <= ids).all() and (ids < 4).all()


@given(seed=st.integers(0, 2**31), n_expert=st.integers(2, 40), n_tokens=st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_pairs_are_sorted_by_expert_then_token(seed: int, n_expert: int, n_tokens: int) -> None:
    random = np.random.default_rng(seed)
    ids = np.array([random.permutation(n_expert)[:2] for _ in range(n_tokens)], np.int64)
    first, tokens, slots = np.empty(n_expert + 1, np.int64), np.empty(ids.size, np.int64), np.empty(ids.size, np.int64)
    routing.sort_pairs(ids, first, tokens, slots)
    expected = sorted((int(ids[t, k]), t, t * 2 + k) for t in range(n_tokens) for k in range(2))
    found = [(e, int(tokens[p]), int(slots[p])) for e in range(n_expert) for p in range(first[e], first[e + 1])]
    assert found == expected
    for ours, slow in zip((first, tokens, slots), routing.pairs_reference(ids, n_expert), strict=True):
        assert (ours == slow).all()


def giant(n_layers: int = 60, router: RouterConfig | None = None) -> tuple[Engine, Session, NullDevice]:
    """A model of DeepSeek-V3's size on the null device."""
    router = router or RouterConfig(256, 8)
    rope = RopeConfig("norm", 64)
    config = ModelConfig("llama", n_layers, 7168, 128, 128, 192, 128, 129280, 4096, 1e-6, rope, router, d_expert=2048)
    device = NullDevice(config, 4096)
    tables = [device.new_table(router.n_expert) for _ in range(n_layers)]
    for table in tables:
        table[:] = 3 * 7168 * 2048 * 9 // 16
    residency = AllResident(device, tables)

    def embed(ids: list[int]) -> Floats:
        return np.zeros((len(ids), 7168), np.float32)

    return Engine(config, device, residency, embed), Session(device.new_cache(4096, "f16")), device


def test_every_pair_is_computed_once_per_layer() -> None:
    engine, session, device = giant()
    seen: list[int] = []
    engine.trace = lambda device: seen.extend(len(np.unique(device.chosen(layer)[0])) for layer in range(60))
    assert list(engine.prefill(list(range(600)), session)) == [512, 88]  # NullDevice.combine checks the pairs
    assert device.calls["experts"] == device.calls["combine"] == 120
    assert engine.residency.counts == ExpertCounts(expert_hits=sum(seen))
    assert device.expert_bytes == sum(seen) * (3 * 7168 * 2048 * 9 // 16)
    assert session.tokens == list(range(600)) and not session.check() and not engine.residency.check()


def test_a_full_context_is_refused_with_the_numbers() -> None:
    engine, session, _ = giant(n_layers=1)
    list(engine.prefill([1] * 4000, session))
    with pytest.raises(ContextLengthError, match="4097 tokens do not fit the context of 4096"):
        list(engine.prefill([1] * 97, session))
    assert session.room == 96


def test_trim_keeps_the_common_prefix_but_leaves_one_token_to_compute() -> None:
    _, session, _ = giant(n_layers=1)
    session.tokens = [1, 2, 3, 4]
    assert session.trim([1, 2, 9, 4]) == 2 and session.tokens == [1, 2]
    assert session.trim([1, 2]) == 1 and session.tokens == [1]
    assert session.trim([5, 6]) == 0 and session.tokens == []
