"""Perplexity of a text, measured as llama.cpp's llama-perplexity does, so that figures can be compared.

The text is cut into chunks of equal length, each run from an empty context (with its first token replaced by BOS where
the model wants one); only the second half of a chunk is scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgert.errors import OptionError
from edgert.sampling import log_softmax
from edgert.types import Floats


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of the scored tokens, with its standard error."""

    value: float
    standard_error: float
    n_chunks: int
    n_tokens: int  # scored


def chunks(ids: Sequence[int], length: int, n_chunks: int | None, bos: int | None) -> list[list[int]]:
    """The first `n_chunks` (None: all) whole chunks of `ids`; `bos` takes the place of each one's first token."""
    if length < 4:
        raise OptionError(f"chunk={length} must be at least 4 tokens")
    if n_chunks is not None and n_chunks < 1:
        raise OptionError(f"chunks={n_chunks} must be at least 1")
    whole = len(ids) // length
    if not whole:
        raise OptionError(
            f"the text has {len(ids)} tokens, which is less than one chunk of {length}; "
            "give more text or a smaller chunk"
        )
    parts = [list(ids[i * length : (i + 1) * length]) for i in range(min(whole, n_chunks or whole))]
    return parts if bos is None else [[bos, *part[1:]] for part in parts]


def score(
    parts: Sequence[list[int]],
    logits: Callable[[list[int], int], Iterator[tuple[int, Floats]]],
    progress: Callable[[float, float], None] | None = None,
) -> Perplexity:
    """Perplexity of the chunks.

    logits(chunk, first) yields (position, logits (n, n_vocab)) of the positions from `first` on; progress is called
    with the fraction done and the value so far.
    """
    losses: list[float] = []
    for done, part in enumerate(parts, start=1):
        half = len(part) // 2
        for first, rows in logits(part, half):
            for position, row in enumerate(rows, start=first):
                if position < len(part) - 1:
                    losses.append(-float(log_softmax(row)[part[position + 1]]))
        if progress:
            progress(done / len(parts), math.exp(np.mean(losses)))
    mean, value = float(np.mean(losses)), math.exp(float(np.mean(losses)))
    spread = math.sqrt(max(float(np.mean(np.square(losses))) - mean**2, 0.0) / max(len(losses) - 1, 1))
    return Perplexity(value, value * spread, len(parts), len(losses))
