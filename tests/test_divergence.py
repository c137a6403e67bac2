"""Two models compared: against the formulas written out, and what cannot be compared."""

from __future__ import annotations

import math

import numpy as np
import pytest
from models import golden_path

import edgert
from edgert.divergence import ChunkScores, compare, rise, score_chunks, summary, token_losses
from edgert.errors import BusyError, ContextLengthError, OptionError

TOKENS = np.random.default_rng(5).integers(0, 300, 200).tolist()


def test_a_comparison_is_what_the_logits_say() -> None:
    chunks = [TOKENS[:40], TOKENS[40:73], TOKENS[100:104]]
    seen: list[tuple[float, float]] = []
    path = golden_path("olmoe-q8_0")
    with edgert.load(path, context=64) as ours, edgert.load(path, context=64, activations="f32") as theirs:
        found = compare(ours, theirs, chunks, lambda fraction, increase: seen.append((fraction, increase)))
        losses, kl, same = [], [], []
        for chunk in chunks:
            half = len(chunk) // 2
            log_p, log_q = (logarithms(model.logits(chunk)[half:-1]) for model in (ours, theirs))
            targets = (np.arange(len(log_p)), chunk[half + 1 :])
            losses.append((-log_p[targets], -log_q[targets]))
            kl += (np.exp(log_p) * (log_p - log_q)).sum(axis=1).tolist()
            same += (log_p.argmax(axis=1) == log_q.argmax(axis=1)).tolist()
        with pytest.raises(BusyError):
            compare(ours, ours, chunks)
        alone = rise(token_losses(ours, chunks), token_losses(theirs, chunks))  # one model after the other
        exact = [float(np.exp(np.concatenate([pair[i] for pair in losses]).mean())) for i in (0, 1)]
        value = ours.perplexity("hello world, hello", chunk=6)
    assert (found.n_chunks, found.n_tokens) == (3, 19 + 16 + 1)
    assert found.perplexity_before == pytest.approx(exact[0], rel=1e-5)
    assert found.perplexity_after == pytest.approx(exact[1], rel=1e-5)
    assert found.increase == pytest.approx(exact[1] / exact[0] - 1, abs=1e-5)
    assert alone == (found.increase, found.standard_error)
    assert found.kl == pytest.approx(np.mean(kl), abs=1e-5) and found.top1 == np.mean(same)
    assert found.kl_99 == pytest.approx(np.quantile(kl, 0.99), abs=1e-5) and found.kl_99 >= found.kl > 0
    assert [fraction for fraction, _ in seen] == pytest.approx([1 / 3, 2 / 3, 1])
    assert seen[-1][1] == pytest.approx(found.increase) and value.n_chunks > 0


def logarithms(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))


def scores(differences: list[float], n: int = 10) -> list[ChunkScores]:
    """Chunks of n tokens, each with the same difference for all its tokens."""
    ones = np.ones(n, np.float32)
    return [ChunkScores(ones, ones * np.float32(1 + d), ones * 0, ones > 0) for d in differences]


def test_the_standard_error_is_that_of_the_paired_differences() -> None:
    differences = [0.01, 0.03, 0.02, -0.01, 0.05]
    found = summary(scores(differences))
    spread = np.std(differences, ddof=1) / math.sqrt(5)
    assert found.increase == pytest.approx(math.exp(0.02) - 1, rel=1e-4)
    assert found.standard_error == pytest.approx(math.exp(0.02) * spread, rel=1e-4)
    assert summary(scores([0.0, 0.0])).standard_error == 0
    longer = summary([*scores([0.0], 10), *scores([0.03], 20)])
    assert longer.increase == pytest.approx(math.exp(0.02) - 1, rel=1e-4)


def test_the_standard_error_covers_the_truth_as_often_as_it_should() -> None:
    random, hits = np.random.default_rng(0), 0
    for _ in range(400):
        found = summary(scores((0.02 + 0.01 * random.standard_normal(25)).tolist()))
        hits += abs(math.log1p(found.increase) - 0.02) < 1.96 * found.standard_error
    assert 0.90 < hits / 400 < 0.98


def test_what_cannot_be_compared_is_refused() -> None:
    with edgert.load(golden_path("olmoe-q8_0"), context=32) as ours, edgert.load(context=64) as theirs:
        with pytest.raises(OptionError, match="vocabularies of 300 and 49152"):
            compare(ours, theirs, [TOKENS[:8]] * 2)
        with edgert.load(golden_path("olmoe-q4_0"), context=64) as other:
            with pytest.raises(OptionError, match="at least 2"):
                compare(ours, other, [TOKENS[:8]])
            with pytest.raises(ContextLengthError, match="the context holds 32"):
                score_chunks(other, ours, [TOKENS[:40]])
