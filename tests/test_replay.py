"""Replay: Belady is the optimum, the order of things on a real model's routes, and the choice that loading finds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from test_topics import empty_map
from typer.testing import CliRunner

from edgert.cli.app import app
from edgert.errors import OptionError
from edgert.experts import choice, replay
from edgert.experts.policies import POLICIES, make_policy
from edgert.experts.predictors import path_table
from edgert.experts.replay import COMBINED, Belady, replay_policy
from edgert.experts.trace import Trace, TraceWriter

REAL = Path(__file__).parent / "golden" / "smollm2-moe-trace.npz"  # 160 tokens of a dialogue, the embedded model


def made(ids: np.ndarray, sizes: np.ndarray) -> Trace:
    """A trace of ids (n_layers, n_tokens, top_k) alone."""
    n_layers, n_tokens, _ = ids.shape
    ahead = np.full((n_layers, n_tokens, 2, sizes.shape[1]), -128, np.int8)
    return Trace(
        "made", sizes, ids.astype(np.uint8), np.ones(ids.shape, np.float16), ahead, np.ones(n_tokens, np.int64)
    )


def fewest_misses(trace: Trace, n_slots: int) -> int:
    """Misses in the counted half of the best of all ways to evict, by trying all; every miss takes a slot."""
    best = {frozenset[int](): (0, 0)}  # what is resident: (misses in all, of those counted)
    for token, layer in itertools.product(range(trace.n_tokens), range(trace.n_layers)):
        needed = frozenset((trace.ids[layer, token] + layer * trace.n_expert).tolist())
        after: dict[frozenset[int], tuple[int, int]] = {}
        for resident, (misses, counted) in best.items():
            n = len(needed - resident)
            cost = misses + n, counted + n * (token >= trace.n_tokens // 2)
            others = sorted(resident - needed)
            for kept in itertools.combinations(others, min(len(others), n_slots - len(needed))):
                state = needed | frozenset(kept)
                after[state] = min(after.get(state, cost), cost)
        best = after
    return min(misses for misses, _ in best.values())


def all_misses(trace: Trace, policy: object, n_slots: int) -> int:
    """Misses of a policy from the first token on."""
    doubled = made(np.concatenate((trace.ids[:, :0], trace.ids), axis=1), trace.record_bytes)
    buffer = replay._Buffer(doubled, n_slots * 4096, policy, shared_out=False)
    misses = 0
    for token, layer in itertools.product(range(trace.n_tokens), range(trace.n_layers)):
        ids = trace.ids[layer, token].astype(np.int64)
        policy.used(layer, ids)
        misses += len(buffer.take(layer, ids + layer * trace.n_expert))
        if layer == trace.n_layers - 1:
            policy.next_token()
    return misses


@pytest.mark.parametrize("n_slots", [3, 4, 6])
def test_belady_misses_as_little_as_is_possible(n_slots: int) -> None:
    draw, sizes = np.random.default_rng(n_slots), np.full((2, 4), 4096)
    for _ in range(6):
        trace = made(np.argsort(draw.random((2, 8, 4)), axis=2)[:, :, :2], sizes)
        best = fewest_misses(trace, n_slots)
        assert all_misses(trace, Belady(trace), n_slots) == best
        for name in POLICIES:
            assert all_misses(trace, make_policy(name, sizes), n_slots) >= best


def test_on_real_routes_belady_leads_and_the_default_policy_beats_lru_in_a_cramped_buffer() -> None:
    found = replay.compare_policies(Trace.load(REAL), [0.1, 0.25])
    for place in range(2):
        rates = {name: hits[place].rate for name, hits in found.items()}
        assert max(rates, key=rates.__getitem__) == "belady" and rates["belady"] > rates["cost"] + 0.1
        assert rates["cost"] > rates["lru"] and hits_are_sound(found["cost"][place])
    assert found["lru"][0].rate > 0.03  # below one working set the buffer is shared out: LRU over all would have none


def hits_are_sound(hits: replay.Hits) -> bool:
    """Counts and bytes of records of one size agree."""
    return hits.n_asked == 80 * 30 * 2 and abs(hits.rate - hits.byte_rate) < 1e-9


def test_on_real_routes_predictors_find_what_they_should() -> None:
    found = replay.compare_predictors(Trace.load(REAL))
    mean = {name: float(np.nanmean(recall[0])) for name, recall in found.items()}
    assert mean["router"] > 0.6 > mean["path"] > mean["previous"] > 2 / 16 + 0.1
    assert mean[COMBINED] > mean["router"] and found[COMBINED][0][0] > 2 * 2 / 16
    assert np.isnan(found["router"][0][0]) and np.isnan(found["router"][1][:2]).all()
    assert np.isfinite(found[COMBINED][1]).all()


def test_records_of_different_sizes_are_counted_in_bytes() -> None:
    draw, sizes = np.random.default_rng(0), np.tile([4096, 8192, 12288, 4096], (2, 1))
    trace = made(np.argsort(draw.random((2, 40, 4)), axis=2)[:, :, :2], sizes)
    hits = replay_policy(trace, make_policy("lfu", sizes), 7 * 4096)
    asked = sum(int(sizes[i, trace.ids[i, t]].sum()) for i in range(2) for t in range(20, 40))
    assert hits.bytes_asked == asked and 0 < hits.bytes_missed < asked


def test_residencies_that_cannot_be_are_refused() -> None:
    for share in (0.001, 1.5):
        with pytest.raises(OptionError, match="--residency"):
            replay.compare_policies(Trace.load(REAL), [share])


# ---- the choice ------------------------------------------------------------------------------------------------------
@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_what_was_chosen_is_found_for_the_nearest_residency(cache: Path) -> None:
    profile = np.random.default_rng(0).random((3, 5)).astype(np.float32)
    choice.save_choice("m", choice.Found({0.1: "lru", 0.4: "pinned"}, ("router",), profile, 10))
    near, far = choice.choice_for("m", 0.15, (3, 5)), choice.choice_for("m", 0.9, (3, 5))
    assert near is not None and far is not None
    assert (near.policy, far.policy, near.predictors) == ("lru", "pinned", ("router",))
    assert near.profile is not None and np.abs(near.profile - profile).max() < 1e-4
    assert choice.choice_for("another", 0.1, (3, 5)) is None and choice.choice_for("m", 0.1, (3, 6)) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 9),
        ("model", "x"),
        ("policies", []),
        ("policies", [[0, "lru"]]),
        ("policies", [["a", "lru"]]),
        ("policies", [[10**400, "lru"]]),
        ("policies", [[0.1, "none"]]),
        ("predictors", []),
        ("predictors", ["none"]),
        ("predictors", [[1]]),
        ("profile", [[2, 3]]),
        ("profile", [[-1] * 5] * 3),
        ("profile", "x"),
        ("profile", None),
        ("topics", 1),
        ("topics", []),
        ("topics", {"4": {"topics": 1}}),
        ("paths", 1),
        ("paths", "AAAA"),
        ("paths", "eJztwTEBAAAAwqD1T20JT6AAAHgaJxAAAQ=="),
    ],
)
def test_a_damaged_choice_counts_as_none(key: str, value: object, cache: Path) -> None:
    topics, paths = {4: empty_map((3, 5))}, path_table([], np.ones((3, 5), np.bool_))
    found = choice.Found({0.1: "lru"}, ("router",), np.zeros((3, 5), np.float32), 10, topics, paths)
    path = choice.save_choice("m", found)
    sound = choice.choice_for("m", 0.1, (3, 5))
    assert sound is not None and set(sound.topics) == {4} and sound.primed is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert choice.choice_for("m", 0.1, (3, 5)) is None
    path.write_bytes(b"\xff{[" * 100)
    assert choice.choice_for("m", 0.1, (3, 5)) is None


def test_the_default_is_left_only_for_what_is_clearly_better() -> None:
    def hits(rate: float) -> replay.Hits:
        return replay.Hits(1, 1000, round(1000 * (1 - rate)), 1000, round(1000 * (1 - rate)))

    rates = {"belady": (0.9, 0.9), "cost": (0.5, 0.5), "lru": (0.503, 0.6), "lfu": (0.4, 0.55)}
    policies = {name: [hits(rate) for rate in found] for name, found in rates.items()}
    recall = {name: [np.full(3, 0.5, np.float32)] * 2 for name in (COMBINED, replay._EVERYTHING)}
    report = replay.Report(Trace.load(REAL), [0.1, 0.2], policies, recall)
    assert report.best_policies() == {0.1: "cost", 0.2: "lru"} and report.best_predictors() == replay.DEFAULT
    assert report.regret("lfu", 1) == pytest.approx(0.35)


def test_the_command_prints_tables_and_keeps_the_choice(cache: Path) -> None:
    result = CliRunner().invoke(app, ["replay", str(REAL), "--residency", "25%", "--tokens", "60"])
    assert result.exit_code == 0, result.output
    for word in ("belady", "lru", "25%", "recall", "router + path + frequency", "kept for this model in"):
        assert word in result.output
    trace = Trace.load(REAL)
    assert choice.choice_for(trace.model, 0.25, trace.record_bytes.shape) is not None
    result = CliRunner().invoke(
        app, ["replay", str(REAL), "--residency", "0.5", "--tokens", "20", "--no-save", "--json"]
    )
    document = json.loads(result.stdout)
    assert document["policies"]["belady"]["regret"] == [0] and document["choice"]["path"] is None
    assert document["predictors"]["router"][0][0] is None and len(document["predictors"]["path"][0]) == 30


def test_results_that_cannot_be_kept_are_shown_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = CliRunner().invoke(app, ["replay", str(REAL), "--residency", "0.5", "--tokens", "20", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["choice"]["path"] is None
    assert "the choice is not kept" in result.stderr


@pytest.mark.parametrize("residency", ["", "x", "0", "200%", "-1%", "1e400"])
def test_shares_that_are_none_are_refused(residency: str) -> None:
    result = CliRunner().invoke(app, ["replay", str(REAL), "--residency", residency])
    assert result.exit_code == 2


def test_a_trace_that_was_written_replays(tmp_path: Path) -> None:
    sizes = np.full((2, 4), 4096)
    draw = np.random.default_rng(0)
    with TraceWriter(tmp_path / "t.npz", "m", sizes, 2) as writer:
        ids = np.argsort(draw.random((2, 30, 4)), axis=2)[:, :, :2]
        writer.add(ids, np.ones(ids.shape, np.float32))
    report = replay.replay(Trace.load(tmp_path / "t.npz"), [0.5, 1.0])
    assert all(hits[1].rate == 1.0 for hits in report.policies.values())
    assert np.isnan(report.predictors["router"][0]).all() and np.isfinite(report.predictors[COMBINED][0]).all()
