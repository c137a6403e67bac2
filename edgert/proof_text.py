"""Which text a bundle is measured on: one part to choose bits by, another, which no choice has seen, to prove them on.

What nothing was fitted to is what a profile kept back, or a text that is given; whether that really is unseen is
checked here. It knows tokens, and nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.errors import OptionError
from edgert.experts.profile import Profile

_LEAST = 2  # chunks: fewer have no standard error
FEWEST = 2 * _LEAST  # chunks of which one half chooses, the other proves
_MOST = 128  # chunks: more take hours on a small machine, and tell little more
_WINDOW = 32  # tokens in a row that are not the same by chance
_MOST_KNOWN = 0.1  # of a text's windows that calibration may have seen: phrases that many texts share

Chunks = list[list[int]]


class ProofText(NamedTuple):
    """Chunks of token ids: what attempts are chosen by (empty where there is one only), and what proves the result."""

    select: Chunks
    prove: Chunks
    name: str  # of what proves


def proof_text(profile: Profile, given: Chunks | None, name: str, *, selects: bool) -> ProofText:
    """The text for a pack by a profile; given: chunks of a text called `name` to prove on instead of what it kept back.

    selects: whether there are attempts to choose from. OptionError for too little text, or text that was calibrated on.
    """
    kept, select, seen = held_out_chunks(profile), Chunks(), 0
    chooses = selects and len(kept) >= _LEAST  # what was kept back, where a text is given
    if given:
        unseen = _unseen(given, profile, kept if chooses else [], name)
        seen, given = len(given) - len(unseen), unseen
    prove = kept if given is None else given
    if given is not None and chooses:
        select = kept
    if selects and not select:
        select, prove = prove[::2], prove[1::2]
    halves = selects and (given is None or not chooses)
    least = FEWEST if halves else _LEAST
    if given is not None:
        check_length(name, len(given), profile.chunk, least)
    elif len(kept) < least:
        raise OptionError(
            f"the profile kept back {_chunks(len(kept))} of {profile.chunk} tokens, and it takes {least} "
            f"({_why(least)}); make it anew with more text, --tokens or --held-out, or give --proof FILE"
        )
    halved = ", the half that bits were not chosen by" if halves else ""
    capped = f", {_MOST} of {len(prove):,} chunks" if len(prove) > _MOST else ""
    dropped = f", without {_chunks(seen)} that bits were calibrated on or chosen by" if seen else ""
    words = f"{name if given is not None else 'text that the profile kept back'}{dropped}{halved}{capped}"
    return ProofText(_spread(select) if selects else [], _spread(prove), words)


def check_length(name: str, n: int, chunk: int, least: int = _LEAST) -> None:
    """OptionError for a text of fewer than the least number of chunks."""
    if n < least:
        raise OptionError(
            f"{name} has {_chunks(n)} of {chunk} tokens, and it takes {least} ({_why(least)}); give more text"
        )


def _why(least: int) -> str:
    return "half chooses, half proves" if least > _LEAST else "for a proof"


def _chunks(n: int) -> str:
    return f"{n:,} chunk" if n == 1 else f"{n:,} chunks"


def held_out_chunks(profile: Profile) -> Chunks:
    """What a profile kept back, in chunks."""
    return [chunk for domain in profile.domains for chunk in domain.held_out.reshape(-1, profile.chunk).tolist()]


def _spread(chunks: Chunks) -> Chunks:
    """At most so many of the chunks, evenly spread."""
    n = min(len(chunks), _MOST)
    return [chunks[i * len(chunks) // n] for i in range(n)]


def _unseen(chunks: Chunks, profile: Profile, chosen_by: Chunks, name: str) -> Chunks:
    """The chunks that neither calibration nor the choice has seen. OptionError where that is too little."""
    length = min(_WINDOW, profile.chunk - 1)
    texts = [domain.tokens for domain in profile.domains] + [np.array(chunk, np.int32) for chunk in chosen_by]
    seen = np.concatenate([_windows(text, length) for text in texts])
    asked = [_windows(chunk[1:], length)[::length] for chunk in chunks]  # BOS may be the first
    shares = [float(np.isin(windows, seen).mean()) for windows in asked]
    if (share := float(np.mean(shares))) > _MOST_KNOWN:
        raise OptionError(
            f"{name} proves nothing: {share:.0%} of it is in the text that bits are calibrated on or chosen by; give "
            "another --proof FILE"
        )
    return [chunk for chunk, share in zip(chunks, shares, strict=True) if share <= _MOST_KNOWN]


def _windows(tokens: Sequence[int] | npt.NDArray[np.int32], length: int) -> npt.NDArray[np.uint64]:
    """A hash of each run of so many tokens: a polynomial modulo 2**64."""
    ids = np.asarray(tokens, np.uint64)
    n = max(len(ids) - length + 1, 0)
    found = np.zeros(n, np.uint64)
    for place in range(length):
        found = found * np.uint64(6364136223846793005) + ids[place : place + n] + np.uint64(1)
    return found
