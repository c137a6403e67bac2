"""The sampler against a slow obvious version, exact distributions and bad options."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert import sampling as module
from edgert.errors import EdgertError, OptionError
from edgert.sampling import Sampler, Sampling, apply_penalties, filtered, log_softmax, top_logprobs

steady = settings(deadline=None, derandomize=True, max_examples=60)  # a loaded machine changes nothing

# a coarse grid gives ties; -inf gives tokens that a model bans by itself
LOGIT = st.one_of(st.integers(-8, 8).map(lambda i: i / 4), st.floats(-30, 30, width=32), st.just(-math.inf))
LOGITS = st.lists(LOGIT, min_size=1, max_size=300).filter(lambda v: max(v) > -math.inf)
UNIT = st.floats(0.01, 1)


def softmax(values: dict[int, float]) -> dict[int, float]:
    largest = max(values.values())
    weights = {i: math.exp(v - largest) for i, v in values.items()}
    total = math.fsum(weights.values())
    return {i: w / total for i, w in weights.items()}


def cut(order: list[int], share: dict[int, float], enough) -> set[int]:
    kept, total = set(), 0.0
    for i in order:
        kept.add(i)
        total += share[i]
        if enough(total):
            break
    return kept


def slow_filters(logits: list[float], options: Sampling) -> set[int]:
    """What `filtered` keeps, written with dictionaries and whole sorts."""
    left = {i: v for i, v in enumerate(logits) if v > -math.inf}

    def keep(ids: set[int]) -> None:
        for i in set(left) - ids:
            del left[i]

    if options.top_k:
        keep(set(sorted(left, key=lambda i: (-left[i], i))[: options.top_k]))
    if options.typical_p < 1:
        share = softmax(left)
        entropy = -math.fsum(p * math.log(p) for p in share.values() if p)
        order = sorted(left, key=lambda i: (abs(-math.log(max(share[i], 1e-300)) - entropy), i))
        keep(cut(order, share, lambda total: total > options.typical_p))
    if options.top_p < 1:
        order = sorted(left, key=lambda i: (-left[i], i))
        keep(cut(order, softmax(left), lambda total: total >= options.top_p))
    if options.min_p > 0:
        best = max(left.values())
        keep({i for i, v in left.items() if v >= best + math.log(options.min_p)})
    return set(left)


def agree(logits: list[float], options: Sampling) -> None:
    """The same set as the slow version, where no rounding decides: a hair's change of p gives one set."""
    hair = 1e-9
    slow = slow_filters(logits, options)
    for sign in (-1, 1):
        names = ("top_p", "typical_p", "min_p")
        near = options.changed(**{name: nudged(getattr(options, name), sign * hair) for name in names})
        if slow_filters(logits, near) != slow:
            return
    ids, values = filtered(np.array(logits), options)
    assert set(ids.tolist()) == slow
    assert ids.tolist() == sorted(ids.tolist())
    assert values.tolist() == [logits[i] for i in ids]


def nudged(p: float, by: float) -> float:
    return p if p in (0.0, 1.0) else min(max(p + by, 0.0), 1.0)


@steady
@given(LOGITS, st.integers(1, 310))
def test_top_k(logits, k):
    agree(logits, Sampling(top_k=k))


@steady
@given(LOGITS, UNIT)
def test_top_p(logits, p):
    agree(logits, Sampling(top_p=p))


@steady
@given(LOGITS, UNIT)
def test_min_p(logits, p):
    agree(logits, Sampling(min_p=p))


@steady
@given(LOGITS.filter(lambda v: len(set(v)) == len(v)), UNIT)
def test_typical(logits, p):
    agree(logits, Sampling(typical_p=p))


@steady
@given(LOGITS.filter(lambda v: len(set(v)) == len(v)), st.integers(0, 40), UNIT, UNIT, st.floats(0, 1))
def test_the_whole_chain(logits, k, typical_p, p, minimum):
    agree(logits, Sampling(top_k=k, typical_p=typical_p, top_p=p, min_p=minimum))


def test_what_reaches_p_exactly():
    """Top-p stops where p is reached, typical where it is exceeded, as llama.cpp does."""
    assert filtered(np.zeros(2), Sampling(top_p=0.5))[0].tolist() == [0]
    assert filtered(np.zeros(2), Sampling(typical_p=0.5))[0].tolist() == [0, 1]


def test_the_prefix_grows_as_far_as_it_must(monkeypatch):
    """A flat distribution needs more candidates than are sorted at first."""
    logits = np.random.default_rng(1).normal(size=30_000) * 0.1
    ids, _ = filtered(logits, Sampling(top_p=0.5))
    monkeypatch.setattr(module, "FIRST_PREFIX", 10**6)
    whole, _ = filtered(logits, Sampling(top_p=0.5))
    assert ids.size > 10_000 and np.array_equal(ids, whole)


def test_the_order_of_the_chain_is_llama_cpps():
    """Top-k comes before top-p, which sees what is left renormalised; temperature comes last."""
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert filtered(logits, Sampling(top_k=2, top_p=0.55))[0].tolist() == [0]  # 0.4 / 0.7 > 0.55
    assert filtered(logits, Sampling(top_p=0.55))[0].tolist() == [0, 1]
    hot = Sampler(Sampling(temperature=100, top_p=0.65, seed=1))
    assert {hot.choose(logits.astype(np.float32)) for _ in range(200)} == {0, 1}


@steady
@given(
    st.lists(st.integers(-9, 9).map(lambda i: i / 4), min_size=8, max_size=8),
    st.lists(st.integers(0, 7), max_size=30),
    st.floats(0.5, 2),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.integers(0, 20),
)
def test_penalties(logits, history, repetition, frequency, presence, window):
    options = Sampling(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence, repetition_window=window
    )
    values = np.array(logits)
    apply_penalties(values, history, options)
    counts = Counter(history[len(history) - min(window, len(history)) :])
    for token, logit in enumerate(logits):
        if counts[token]:
            logit = logit / repetition if logit > 0 else logit * repetition
            logit -= counts[token] * frequency + presence
        assert values[token] == pytest.approx(logit, rel=1e-12, abs=1e-12)


def test_greedy_takes_the_first_largest_after_bias_and_penalties():
    logits = np.array([1, 3, 3, 2], np.float32)
    assert Sampler(Sampling()).choose(logits) == 1
    assert Sampler(Sampling(logit_bias={1: -math.inf})).choose(logits) == 2
    assert Sampler(Sampling(logit_bias={0: 2.5})).choose(logits) == 0
    assert Sampler(Sampling(repetition_penalty=1.1)).choose(logits, [0, 1]) == 2
    assert Sampler(Sampling(presence_penalty=2)).choose(logits, [1, 2, 0]) == 3
    assert logits.tolist() == [1, 3, 3, 2]


CHAINS = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.5, top_k=5),
    Sampling(temperature=0.9, top_p=0.8),
    Sampling(temperature=1, min_p=0.2),
    Sampling(temperature=1, typical_p=0.7),
    Sampling(temperature=0.8, repetition_penalty=1.3, logit_bias={2: -math.inf, 4: 1.0}),
]


@pytest.mark.parametrize("options", CHAINS)
def test_frequencies_follow_the_exact_distribution(options):
    """Pearson's chi-squared over 20,000 draws; the seed is fixed, so the outcome is too."""
    logits = np.random.default_rng(7).normal(scale=1.5, size=20).astype(np.float32)
    history = [0, 3, 3, 9]
    values = logits.astype(np.float64)
    for token, amount in options.logit_bias.items():
        values[token] += amount
    apply_penalties(values, history, options)
    kept = slow_filters(values.tolist(), options)
    exact = softmax({i: values[i] / options.temperature for i in kept})
    sampler, n = Sampler(options.changed(seed=5)), 20_000
    counts = Counter(sampler.choose(logits, history) for _ in range(n))
    assert set(counts) <= kept
    chi_squared = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in exact.items())
    freedom = len(kept) - 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)


def test_a_token_without_probability_is_never_drawn(monkeypatch):
    sampler = Sampler(Sampling(temperature=1))
    for lowest, token in ((0.0, 1), (np.nextafter(1, 0), 2)):
        monkeypatch.setattr(sampler, "_random", SimpleNamespace(random=lambda u=lowest: u))
        assert sampler.choose(np.array([-9e9, 0, 0, -9e9], np.float32)) == token


def test_the_same_seed_draws_the_same_tokens():
    logits = np.zeros(1000, np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1, seed=seed))
        return [sampler.choose(logits) for _ in range(20)]

    assert draw(3) == draw(3) != draw(4)
    assert draw(None) != draw(None)
    assert draw(2**64 - 1)


@steady
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=50), st.integers(0, 60))
def test_log_probabilities(logits, n):
    array = np.array(logits, np.float32)
    exact = log_softmax(array)
    total = math.fsum(math.exp(v - max(logits)) for v in logits)
    assert exact == pytest.approx([v - max(logits) - math.log(total) for v in logits], abs=1e-9)
    best = top_logprobs(array, n)
    assert best == [(i, exact[i]) for i in sorted(range(len(logits)), key=lambda i: (-exact[i], i))[:n]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [Sampling(), Sampling(temperature=1), Sampling(logit_bias={0: 1.0})])
def test_logits_that_are_no_numbers_are_an_error(bad, options):
    with pytest.raises(EdgertError, match="logit"):
        Sampler(options).choose(np.array([0, bad, 1], np.float32))
    with pytest.raises(EdgertError, match="logit"):
        Sampler(options).choose(np.full(3, -math.inf, np.float32))


def test_extreme_temperatures_draw_without_a_warning():
    logits = np.array([-3e38, 0, 3e38], np.float32)
    assert Sampler(Sampling(temperature=1e-320, seed=0)).choose(logits) == 2
    assert Sampler(Sampling(temperature=1e-320, seed=0, top_p=0.9)).choose(logits) == 2
    assert Sampler(Sampling(temperature=1e308, seed=0)).choose(logits) in (0, 1, 2)
    assert Sampler(Sampling(temperature=1, top_p=0)).choose(logits) == 2


@steady
@given(LOGITS, st.integers(0, 2**32))
def test_a_draw_is_always_a_token_that_may_be_drawn(logits, seed):
    options = Sampling(temperature=0.8, top_p=0.9, min_p=0.05, seed=seed)
    assert Sampler(options).choose(np.array(logits, np.float32)) in slow_filters(logits, Sampling())


def test_biases_that_cannot_be_met():
    with pytest.raises(OptionError, match="token 3"):
        Sampler(Sampling(logit_bias={3: 1.0})).choose(np.zeros(3, np.float32))
    with pytest.raises(OptionError, match="every token"):
        Sampler(Sampling(logit_bias={0: -math.inf, 1: -math.inf})).choose(np.zeros(2, np.float32))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", -0.1, "from 0 up"),
        ("temperature", math.nan, "finite"),
        ("temperature", math.inf, "finite"),
        ("temperature", "hot", "number"),
        ("temperature", True, "number"),
        ("top_k", -1, "from 0 up"),
        ("top_k", 1.5, "whole number"),
        ("top_p", 1.1, "from 0 to 1"),
        ("min_p", -0.5, "from 0 to 1"),
        ("typical_p", 2, "from 0 to 1"),
        ("repetition_penalty", 0, "above 0"),
        ("repetition_penalty", -1, "from 0 up"),
        ("repetition_window", -1, "from 0 up"),
        ("frequency_penalty", math.inf, "finite"),
        ("presence_penalty", None, "number"),
        ("seed", -1, "from 0"),
        ("seed", 2**64, "to 18446744073709551615"),
        ("seed", 1.0, "whole number"),
        ("logit_bias", [1], "mapping"),
        ("logit_bias", {-1: 1.0}, "from 0 up"),
        ("logit_bias", {"a": 1.0}, "token ids"),
        ("logit_bias", {5: math.inf}, "-inf"),
        ("logit_bias", {5: math.nan}, "-inf"),
        ("warmth", 1, "top_k"),
    ],
)
def test_a_bad_option_is_named_with_its_value_and_range(name, value, allowed):
    with pytest.raises(OptionError) as caught:
        Sampling().changed(**{name: value})
    message = str(caught.value)
    shown = repr(next(iter(value))) if isinstance(value, dict) else repr(value)
    assert name in message and shown in message and allowed in message
    assert "\n" not in message


def test_numpy_numbers_are_numbers():
    bias = {np.int32(1): np.float64(2)}
    options = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), logit_bias=bias)
    assert options == Sampling(temperature=0.5, top_k=3, logit_bias={1: 2.0})


def test_sampling_loads_no_compiler():
    code = "import sys, edgert.sampling; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
