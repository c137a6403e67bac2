"""A tiny MoE with a real vocabulary, for tests that need a whole model and the time of none."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tools")]  # it is no package

import small_moe_file  # noqa: E402
from small_moe_file import Sizes, Vocabulary  # noqa: E402

SIZES = Sizes(n_layer=2, d_model=64, n_head=4, n_kv_head=2, d_head=32, n_expert=6, top_k=2, d_expert=64, n_vocab=300)
_WORDS = (
    "geese",
    "fly",
    "over",
    "the",
    "cold",
    "sea",
    "and",
    "nobody",
    "knows",
    "where",
    "they",
    "sleep",
    "at",
    "night",
)


def text(n_words: int, seed: int = 0) -> str:
    """Words in random order, some often and some seldom."""
    random = np.random.default_rng(seed)
    chances = 1.0 / np.arange(1, len(_WORDS) + 1)
    return " ".join(random.choice(_WORDS, n_words, p=chances / chances.sum()))


def write(path: Path, seed: int = 5, sizes: Sizes = SIZES) -> Path:
    """A model of random weights whose experts differ in what they add, as a file."""
    random, scale = np.random.default_rng(seed), 0.15 * (SIZES.d_model / sizes.d_model) ** 0.5
    weights = {}
    for name, shape in sizes.shapes().items():
        weights[name] = (random.standard_normal(shape) * scale + (len(shape) == 1)).astype(np.float32)
        if "down_exps" in name:
            weights[name] *= random.lognormal(0.0, 1.0, (shape[0], 1, 1)).astype(np.float32)
    vocabulary = Vocabulary.train([text(3000), " ".join(_WORDS).upper()], sizes.n_vocab)
    small_moe_file.write(path, sizes, vocabulary, weights, "made by a test")
    return path
