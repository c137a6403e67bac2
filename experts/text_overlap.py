"""Text that is in two places: runs of 13 tokens that one chunk shares with others, as text that was copied does.

What a chat template writes around every message is no text, and is taken out first. The rule is that by which test text
is cleaned of training text: windows of 13 (Brown et al. 2020, arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

WINDOW = 13  # tokens
MOST_SHARED = 0.1  # of a chunk's windows: with more it counts as a copy
_FACTOR = 0x9E3779B97F4A7C15  # odd: windows are polynomials in it, modulo 2**64
_POWERS = np.array([pow(_FACTOR, place, 1 << 64) for place in range(WINDOW)], np.uint64)

Words = Sequence[Sequence[int]]


def copies(
    chunks: Iterable[Sequence[int]], others: Iterable[Sequence[int]], words: Words = ()
) -> npt.NDArray[np.bool_]:
    """Whether each of `chunks` (n,) shares more than MOST_SHARED of its windows with any of `others`.

    words: runs of tokens that a template writes, which do not count.
    """
    known = np.sort(np.concatenate([np.zeros(1, np.uint64), *(_windows(other, words) for other in others)]))
    shares = []
    for chunk in chunks:
        runs = _windows(chunk, words)
        found = known[np.searchsorted(known, runs, side="right") - 1] == runs
        shares.append(float(found.mean()) if len(found) else 0.0)
    return np.array(shares) > MOST_SHARED


def _windows(chunk: Sequence[int], words: Words) -> npt.NDArray[np.uint64]:
    """A number for each run of WINDOW tokens: the same for the same tokens."""
    ids = np.array(_without(chunk, words), np.int64).astype(np.uint64)
    if len(ids) < WINDOW:
        return np.zeros(0, np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(ids + np.uint64(1), WINDOW)
    found: npt.NDArray[np.uint64] = (runs * _POWERS).sum(axis=1, dtype=np.uint64)
    return found


def _without(chunk: Sequence[int], words: Words) -> list[int]:
    """A chunk without what a template writes, the longest runs first; also what a chunk's ends cut off of them."""
    by_first = dict[int, list[list[int]]]()
    for word in sorted(map(list, words), key=len, reverse=True):
        by_first.setdefault(word[0], []).append(word)
    tokens, kept = list(chunk), list[int]()
    place, end = _ends(tokens, words)
    while place < end:
        fitting = (word for word in by_first.get(tokens[place], ()) if tokens[place : place + len(word)] == word)
        if word := next(fitting, []):
            place += len(word)
        else:
            kept.append(tokens[place])
            place += 1
    return kept


def _ends(tokens: list[int], words: Words) -> tuple[int, int]:
    """Where a chunk begins and ends without the rest of a run at its begin, maybe behind a start token, and at its end.

    The longest count.
    """
    first, last = 0, len(tokens)
    for word in map(list, words):
        for n in range(1, min(len(word), len(tokens) - 1)):
            for begin in (0, 1):
                if tokens[begin : begin + n] == word[-n:]:
                    first = max(first, begin + n)
            if tokens[-n:] == word[:n]:
                last = min(last, len(tokens) - n)
    return first, last
