"""Cheap guesses at how much each expert's loss rises at a lower width, and how well their order is the measured one.

A guess is an array (n_layers, n_expert) of which the order matters. Frequency and router mass are a profile's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgert.experts.allocation import Numbers
from edgert.types import Floats


def output_errors(errors: Floats, share: Numbers | Floats, low: int, base: int) -> Numbers:
    """The rise of experts' output errors, weighted by the router, from one format to another: (n_layers, n_expert).

    errors: (n_layers, n_expert, 3, n_formats) of an expert's own tokens, of gate, up and down. share: of all tokens
    that an expert has. low, base: places of the formats.
    """
    rise: Numbers = (errors[..., low].astype(np.float64) - errors[..., base]).sum(axis=2) * share
    return rise


def second_order(errors: Floats, share: Numbers | Floats, gains: Floats, low: int, base: int) -> Numbers:
    """The same in nats: times the gain of each layer (n_layers,), which is half of the loss's curvature there."""
    rise: Numbers = output_errors(errors, share, low, base) * gains.astype(np.float64)[:, None]
    return rise


def wanda_score(matrices: Sequence[Floats], moments: Sequence[Floats], n_rows: int) -> float:
    """The weights of an expert, each times the norm of what it is multiplied with, summed (arXiv 2306.11695).

    matrices: gate, up and down, (n_out, n_in) each; moments: of each the mean squares of its inputs (n_in,) over the
    expert's n_rows tokens.
    """
    norms = [np.sqrt(n_rows * moment.astype(np.float64)) for moment in moments]
    return float(sum((np.abs(w).astype(np.float64) @ norm).sum() for w, norm in zip(matrices, norms, strict=True)))


def rank_correlation(guess: Numbers | Floats, exact: Numbers | Floats) -> float:
    """Spearman's: of the ranks, equal figures having the mean of theirs; 1 for the same order, -1 for the reverse.

    Pairs with a figure that is not a number are left out. Not a number for fewer than two different figures.
    """
    known = np.isfinite(guess) & np.isfinite(exact)
    ranks = [_ranks(one[known].astype(np.float64)) for one in (guess, exact)]
    a, b = (rank - rank.mean() if len(rank) else rank for rank in ranks)
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread else float("nan")


def _ranks(numbers: Numbers) -> Numbers:
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    ranks: Numbers = (np.cumsum(counts) - (counts - 1) / 2)[inverse.reshape(-1)]
    return ranks
