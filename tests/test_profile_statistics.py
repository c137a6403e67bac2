"""Statistics of a profile against slow definitions written out, and merging against the mixture that it stands for."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_profile import (
    CHUNK,
    N_EXPERT,
    N_LAYERS,
    TOP_K,
    assert_same,
    make_domain,
    make_profile,
    make_sensitivity,
)

from edgert.errors import OptionError
from edgert.experts import profile_statistics as statistics
from edgert.experts.profile import Domain, Profile
from edgert.experts.profile_merge import Part, merge


def routed(rows: list[list[int]], weights: float = 0.5) -> Domain:
    """A domain whose layers all route like this."""
    ids = np.repeat(np.array([rows], np.uint8), N_LAYERS, axis=0)
    n = len(rows)
    nothing = np.zeros(0, np.int32)
    return Domain("made", np.arange(n, dtype=np.int32), nothing, ids, np.full(ids.shape, weights, np.float16))


def test_skew_orders_shares_and_counts_their_bits() -> None:
    even = routed([[0, 1], [2, 3], [4, 5], [6, 7]])
    found = statistics.skew(make_profile(even))
    assert np.array_equal(found.shares[1], np.full(N_EXPERT, 1 / 8, np.float32)) and found.entropy[1] == 3
    assert np.isnan(found.entropy[0]) and not found.shares[0].any(), "a dense layer"
    uneven = statistics.skew(make_profile(routed([[0, 1], [0, 2], [0, 1], [0, 2]])))
    np.testing.assert_allclose(uneven.shares[2, :4], [0.5, 0.25, 0.25, 0])
    assert uneven.entropy[2] == pytest.approx(1.5)


def test_co_activation_is_the_share_of_tokens_that_use_both() -> None:
    profile = make_profile()
    for shares in (None, {"books": 1.0, "code": 3.0}):
        found = statistics.co_activation(profile, 2, shares)
        expected = np.zeros((N_EXPERT, N_EXPERT))
        for name, weight in (shares or profile.shares).items():
            domain = profile.domain(name)
            for row in domain.ids[2]:
                for one in row:
                    for other in row:
                        expected[one, other] += weight / sum((shares or profile.shares).values()) / len(domain.tokens)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(np.diag(found), profile.frequency(shares)[2], atol=1e-6)


def test_reuse_by_the_token_before_does_not_look_over_the_edge_of_a_chunk() -> None:
    profile = make_profile(routed([[0, 1], [1, 0], [2, 3], [4, 2], [4, 2], [5, 6], [5, 6], [0, 7]]))
    found = statistics.previous_token_reuse(profile)
    assert np.isnan(found[0]) and found[1] == found[2] == pytest.approx((2 + 0 + 1 + 0 + 2 + 0) / 12)


def test_distances_of_reuse_are_those_of_a_stack() -> None:
    profile = make_profile(make_domain("one", 6, seed=4))
    found, domain = statistics.reuse(profile), profile.domains[0]
    for layer in (1, 2):
        distinct, tokens, never = np.zeros(N_EXPERT), np.zeros(CHUNK), 0
        for token, row in enumerate(domain.ids[layer]):
            if token % CHUNK == 0:
                stack: OrderedDict[int, int] = OrderedDict()  # of experts, the one used last at the end
            for expert in row.tolist():
                if expert in stack:
                    between = [other for other in stack if stack[other] > stack[expert]]
                    distinct[len(between)] += 1
                    tokens[token - stack[expert]] += 1
                else:
                    never += 1
            for expert in row.tolist():
                stack[expert] = token
        n_uses = domain.ids[layer].size
        np.testing.assert_allclose(found.distinct[layer], distinct / n_uses, atol=1e-6)
        np.testing.assert_allclose(found.tokens[layer], tokens / n_uses, atol=1e-6)
        assert found.never[layer] == pytest.approx(never / n_uses)
    assert found.tokens[1:, 0].sum() == 0, "nothing is used twice by one token"


def test_paths_foresee_what_follows_a_law_and_nothing_of_chance() -> None:
    draw, n_chunks = np.random.default_rng(0), 200
    ids = np.argsort(draw.random((N_LAYERS, n_chunks * CHUNK, N_EXPERT)), axis=2)[..., :TOP_K].astype(np.uint8)
    ids[2] = (ids[0] + ids[1, :, :1]) % N_EXPERT  # where the third layer goes is decided by the two before
    domain = replace(make_domain("one", n_chunks), ids=ids)
    sizes = np.full((N_LAYERS, N_EXPERT), 4096)
    found = statistics.paths(replace(make_profile(domain), record_bytes=sizes))
    assert np.isnan(found.recall[:2]).all() and found.recall[2] > 0.5 > 0.3 > TOP_K / N_EXPERT
    assert found.entropy[2] < found.unknown[2]
    ids[2] = ids[2, draw.permutation(n_chunks * CHUNK)]
    found = statistics.paths(replace(make_profile(domain), record_bytes=sizes))
    assert abs(found.recall[2] - TOP_K / N_EXPERT) < 0.05 and found.entropy[2] >= found.unknown[2] - 0.02
    assert np.isnan(statistics.paths(make_profile()).recall).all(), "of two layers there is no path to a third"


# ---- merging ---------------------------------------------------------------------------------------------------------
def summed(profile: Profile, squares: Any) -> Profile:
    """The profile with moments that a run over its domains would have found; squares: by token, layer and expert."""
    moments, count = np.zeros(profile.input_moments.shape), np.zeros(profile.record_bytes.shape)
    for domain in profile.domains:
        for layer in profile.layers:
            for token, row in zip(domain.tokens.tolist(), domain.ids[layer], strict=True):
                for expert in row.tolist():
                    moments[layer, expert] += squares(token, layer, expert)
                    count[layer, expert] += 1
    means = (moments / np.maximum(count, 1)[..., None]).astype(np.float32)
    return replace(profile, input_moments=means)


def squares(token: int, layer: int, expert: int) -> float:
    return token + 10 * layer + 3 * expert


def test_merging_by_length_is_profiling_both_texts() -> None:
    books, code = make_domain("books", 6, seed=1), make_domain("code", 3, seed=2)
    whole = summed(make_profile(books, code), squares)
    apart = [summed(make_profile(domain), squares) for domain in (books, code)]
    found = merge([Part("a", apart[0], 2.0), Part("b", apart[1], 1.0)])
    assert_same(found.domains, whole.domains)
    assert found.shares == pytest.approx(whole.shares) and found.n_tokens == whole.n_tokens
    np.testing.assert_allclose(found.input_moments, whole.input_moments, rtol=1e-6)
    np.testing.assert_allclose(found.frequency(), whole.frequency(), rtol=1e-6)
    assert found.sensitivity is None


def test_merging_is_associative_and_weighs_each_text() -> None:
    one, two, three = (summed(make_profile(make_domain(f"t{n}", 3 + n, seed=n)), squares) for n in range(3))
    at_once = merge([Part("a", one, 0.5), Part("b", two, 0.3), Part("c", three, 0.2)])
    in_turn = merge([Part("ab", merge([Part("a", one, 5), Part("b", two, 3)]), 0.8), Part("c", three, 0.2)])
    assert in_turn.shares == pytest.approx(at_once.shares) == {"t0": 0.5, "t1": 0.3, "t2": 0.2}
    np.testing.assert_allclose(in_turn.input_moments, at_once.input_moments, rtol=1e-5)
    np.testing.assert_allclose(at_once.frequency({"t1": 1.0}), two.frequency(), rtol=1e-6)


def test_a_merged_loss_is_the_mean_loss() -> None:
    one, two = make_profile(make_domain("a", 5)), make_profile(make_domain("b", 5))
    found = [make_sensitivity(20), replace(make_sensitivity(20), gains=np.float32([0.1, 0.2, 0.3]), n_tokens=40)]
    parts = [Part(n, p.with_sensitivity(s), w) for n, p, s, w in zip("xy", (one, two), found, (0.7, 0.3), strict=True)]
    merged = merge(parts).sensitivity
    assert merged is not None and merged.n_tokens == 60
    expected = 0.7 * found[0].loss() + 0.3 * found[1].loss()
    np.testing.assert_allclose(merged.loss(), expected, rtol=1e-5, atol=1e-7)
    for part in found:
        part.errors[..., 0, 0] = np.inf  # a format that does not fit
    only = merge([part._replace(weight=weight) for part, weight in zip(parts, (0, 1), strict=True)]).sensitivity
    assert only is not None and only.n_tokens == 40 and not np.isnan(only.errors).any()
    np.testing.assert_allclose(only.loss()[..., 1:], found[1].loss()[..., 1:], rtol=1e-5, atol=1e-7)
    parts[1] = parts[1]._replace(profile=two.with_sensitivity(replace(found[1], quantiser="rtn")))
    assert merge(parts).sensitivity is None


def test_losses_without_end_are_merged_also_with_no_weight(tmp_path: Path) -> None:
    found = make_sensitivity(20)
    found.errors[:, :, 2] = np.inf  # no format fits
    one, two = (make_profile(make_domain(name, 5)).with_sensitivity(found) for name in "ab")
    merge([Part("a", one, 1), Part("b", two, 0)]).save(tmp_path / "p.npz")
    merged = Profile.load(tmp_path / "p.npz").sensitivity
    assert merged is not None
    known = found.rows > 0
    np.testing.assert_allclose(merged.loss()[known], found.loss()[known], rtol=1e-5)


def test_two_texts_of_one_name_are_told_apart() -> None:
    one, two = make_profile(make_domain("a", 3)), make_profile(make_domain("a", 3, seed=9), make_domain("b", 1))
    assert list(merge([Part("x", one, 1), Part("y", two, 1)]).shares) == ["x: a", "y: a", "b"]


MISFITS = {
    "another model": ({"digest": "e"}, "b is a profile of another model than a"),
    "other sizes": ({"record_bytes": np.full((N_LAYERS, N_EXPERT), 8192)}, "of another model"),
    "other chunks": ({"chunk": 2}, "b is in chunks of 2 tokens, a of 4"),
    "other widths": ({"input_moments": np.zeros((N_LAYERS, N_EXPERT, 3), np.float32)}, "other shapes"),
}


def test_what_one_profile_kept_back_and_another_calibrated_on_is_dropped() -> None:
    chunk, draw = 64, np.random.default_rng(0)
    text = draw.integers(1000, size=(6, chunk)).astype(np.int32)
    text[5, ::8] = 7  # a template's word, in every chunk

    def part(name: str, tokens: Any, held_out: Any) -> Part:
        ids = np.zeros((3, tokens.size, 2), np.uint8) + np.array([0, 1], np.uint8)
        domain = Domain(name, tokens.reshape(-1), held_out.reshape(-1), ids, ids.astype(np.float16))
        profile = replace(make_profile(domain), chunk=chunk, settings={"template": [[7]]})
        return Part(name, profile, 1.0)

    shifted = np.roll(text[2], 5)
    quoted = np.concatenate([text[4, :16], text[3, 16:]])
    some = np.stack([text[1], text[3], shifted, quoted])
    merged = merge([part("a", text[:1], some), part("b", text[[2, 4]], text[:1])])
    kept = [domain.held_out.reshape(-1, chunk).tolist() for domain in merged.domains]
    assert kept == [[text[1].tolist(), text[3].tolist(), quoted.tolist()], []], "a few windows are no copy"
    assert merged.settings["template"] == [[7], [7]]


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_is_not_merged(what: str) -> None:
    change, message = MISFITS[what]
    profile = make_profile()
    with pytest.raises(OptionError, match=message):
        merge([Part("a", profile, 1), Part("b", replace(profile, **change), 1)])


def test_profiles_that_were_run_otherwise_are_not_merged() -> None:
    def part(name: str, *kinds: str | None) -> Part:
        profile = make_profile(make_domain(name, 3, seed=ord(name)))
        return Part(name, replace(profile, settings={"kinds": list(kinds)} if kinds else {}), 1)

    older, plain, exact = part("a"), part("b", None, None), part("c", None, "f32")
    assert merge([older, exact, exact._replace(name="d")]).settings["kinds"] == [None, "f32"]
    for parts in ([plain, exact], [older, plain, exact]):
        with pytest.raises(OptionError, match="c was run with --activations f32, b with defaults, which"):
            merge(parts)


def test_a_profile_is_merged_once_with_a_weight() -> None:
    profile = make_profile()
    with pytest.raises(OptionError, match="can be merged once"):
        merge([Part("a", profile, 1), Part("a", profile, 1)])
    with pytest.raises(OptionError, match="not negative"):
        merge([Part("a", profile, 1), Part("b", profile, -1)])
