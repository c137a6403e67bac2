"""Bits with the cache in mind: faster on the routes they were chosen for and on others, within the loss."""

from __future__ import annotations

import numpy as np
import pytest

from edgert.errors import OptionError
from edgert.experts.policies import make_policy
from edgert.experts.profile import Domain, Profile
from edgert.experts.replay import replay_policy
from edgert.experts.speed_allocation import Options, Replayed, Tier, allocate_for_speed, routes_to_replay
from edgert.experts.trace import Trace

BITS = np.array([2.25, 3.25, 4.25, 5.25, 8.5])
SHAPE = (3, 48, 3)  # layers, experts, projections


def routes(seed: int, n_tokens: int = 500) -> Trace:
    """Routes of skewed experts, a few of which have half of the tokens; the second layer has no experts."""
    random = np.random.default_rng(seed)
    popularity = -1.3 * np.log(1.0 + np.arange(SHAPE[1]))
    order = np.random.default_rng(1).permuted(np.tile(popularity, (SHAPE[0], 1)), axis=1)
    noise = random.gumbel(size=(SHAPE[0], n_tokens, SHAPE[1]))
    ids = np.argsort(-(order[:, None] + noise), axis=2)[..., :4].astype(np.uint8)
    sizes = np.full(SHAPE[:2], 4096)
    sizes[1] = 0
    return Trace.without_scores("made", sizes, ids, np.ones(ids.shape, np.float16))


@pytest.fixture(scope="module")
def options() -> Options:
    """Losses that grow with the use of an expert; formats of 100,000 weights."""
    trace, random = routes(0), np.random.default_rng(2)
    used = np.array([np.bincount(ids.reshape(-1), minlength=SHAPE[1]) for ids in trace.ids]) / trace.n_tokens
    losses = used[..., None, None] * np.exp(random.normal(0, 0.5, (*SHAPE, 1))) * 4.0**-BITS
    sizes = np.broadcast_to((BITS * 100_000 / 8).astype(np.int64), losses.shape).copy()
    sizes[1], losses[1] = 0, 0.0
    return Options(sizes, losses, sizes / 20e9, np.ones(losses.shape, np.bool_), len(BITS))


def test_it_is_faster_than_the_smallest_choice_also_on_other_routes(options: Options) -> None:
    most_loss = float(options.losses[..., 2].sum())
    size = int(options.sizes[..., 2].sum())
    found = allocate_for_speed(routes(0), options, tier := Tier(size // 4, 1e9), most_loss)
    assert found.allocation.loss <= most_loss and found.smallest.loss <= most_loss
    assert found.allocation.n_bytes > found.smallest.n_bytes
    assert found.speed.total_s < 0.96 * found.smallest_speed.total_s
    others = Replayed(routes(7), options, tier)
    (new, _), (old, _) = (others.price(one.choice) for one in (found.allocation, found.smallest))
    assert new.total_s < 0.97 * old.total_s and new.hit_rate > old.hit_rate
    again = allocate_for_speed(routes(0), options, tier, most_loss)
    assert np.array_equal(again.allocation.choice, found.allocation.choice)


def test_where_everything_fits_only_arithmetic_counts(options: Options) -> None:
    most_loss = float(options.losses[..., 2].sum())
    found = allocate_for_speed(routes(0, 200), options, Tier(1 << 40, 1e9), most_loss)
    assert found.speed.arithmetic_s < found.smallest_speed.arithmetic_s
    assert found.speed.hit_rate > 0.95  # of experts that came up for the first time after the warm-up


def test_expected_time_is_that_of_the_replayed_misses(options: Options) -> None:
    trace, tier = routes(0, 200), Tier(int(options.sizes[..., 2].sum()) // 4, 1e9, 1e-3)
    choice = np.full(int(np.prod(SHAPE)), 2)
    speed, prices = Replayed(trace, options, tier).price(choice)
    records = options.record_bytes(choice)
    assert set(records[0].tolist()) == {-(-3 * int(-(-options.sizes[0, 0, 0, 2] // 64) * 64) // 4096) * 4096}
    assert not records[1].any() and not prices[1].any()
    sized = Trace.without_scores("made", records, trace.ids, trace.weights)
    hits = replay_policy(sized, make_policy("cost", records, None), tier.buffer_bytes)
    assert speed.flash_s == pytest.approx((hits.bytes_missed / 1e9 + hits.n_missed * 1e-3) / hits.n_tokens, rel=0.1)
    assert hits.missed.sum() == hits.n_missed and (hits.held <= hits.n_tokens).all() and hits.held.any()
    assert speed.arithmetic_s == pytest.approx(2 * 4 * 3 * options.use_s[0, 0, 0, 2])


def test_routes_of_all_domains_are_replayed_in_both_halves() -> None:
    def domain(name: str, n_tokens: int, first: int) -> Domain:
        ids = np.broadcast_to(np.arange(first, first + n_tokens, dtype=np.uint8)[None, :, None], (2, n_tokens, 1))
        return Domain(name, np.zeros(n_tokens, np.int32), np.zeros(0, np.int32), ids, np.ones(ids.shape, np.float16))

    domains = (domain("books", 40, 0), domain("code", 8, 100), domain("unused", 8, 200))
    shares = {"books": 0.25, "code": 0.75, "unused": 0.0}
    sizes, moments = np.full((2, 256), 4096), np.zeros((2, 256, 4), np.float32)
    profile = Profile("made", "", 4, sizes, domains, shares, False, moments, moments, {})
    trace = routes_to_replay(profile, 16)  # of code there are no more than 4 in each half
    assert trace.ids[1, :, 0].tolist() == [0, 1, 100, 101, 102, 103, 2, 3, 104, 105, 106, 107]
    assert trace.ids.shape == trace.weights.shape == (2, 12, 1)


def test_a_loss_that_nothing_keeps_is_refused(options: Options) -> None:
    with pytest.raises(OptionError, match="a loss of 0 is below"):
        allocate_for_speed(routes(0, 20), options, Tier(1 << 20, 1e9), 0.0)
