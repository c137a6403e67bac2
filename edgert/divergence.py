"""How far one model's predictions lie from another's on the same text: perplexity, divergence, best token.

Texts come as chunks and are scored as edgert.perplexity scores them: each from an empty context, its second half. Both
models run in lockstep, and a position's distributions are gone when the next one's are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.errors import ContextLengthError, OptionError
from edgert.types import Floats

if TYPE_CHECKING:
    from edgert.loading import Parts
    from edgert.model import Model

SHORTEST = 4  # tokens of a chunk


class Rise(NamedTuple):
    """How much higher perplexity is, as a share of what it was, from the chunks' paired differences."""

    increase: float
    standard_error: float


@dataclass(frozen=True)
class Comparison:
    """What a candidate loses against a reference on some chunks of text."""

    n_chunks: int
    n_tokens: int  # scored
    perplexity_before: float  # of the reference
    perplexity_after: float  # of the candidate
    increase: float  # perplexity_after / perplexity_before - 1
    standard_error: float  # of the increase, from the chunks' paired differences
    kl: float  # mean Kullback-Leibler divergence from the reference, nats a token
    kl_99: float  # 99 % of the tokens lie below
    top1: float  # share of the tokens of which both have the same most probable one


@dataclass(frozen=True)
class ChunkScores:
    """Of each scored token of one chunk: negative log-likelihoods in nats, divergence, whether the best one agrees."""

    before: Floats  # (n_tokens,)
    after: Floats  # (n_tokens,)
    kl: Floats  # (n_tokens,)
    same: npt.NDArray[np.bool_]  # (n_tokens,)


def compare(
    reference: Model,
    candidate: Model,
    chunks: Sequence[Sequence[int]],
    progress: Callable[[float, float], None] | None = None,
) -> Comparison:
    """What the candidate loses against the reference; progress(fraction, increase so far).

    chunks: token ids, at least two (a standard error is wanted) of at least 4 tokens. Raises OptionError for models of
    different vocabularies and for bad chunks, ContextLengthError for a chunk longer than a model's context.
    """
    return summary(score_chunks(reference, candidate, chunks, progress))


def score_chunks(
    reference: Model,
    candidate: Model,
    chunks: Sequence[Sequence[int]],
    progress: Callable[[float, float], None] | None = None,
) -> list[ChunkScores]:
    """Every scored token of every chunk; see compare."""
    sizes = reference.config.n_vocab, candidate.config.n_vocab
    if sizes[0] != sizes[1]:
        raise OptionError(f"the models have vocabularies of {sizes[0]} and {sizes[1]}; compare models of the same one")
    found: list[ChunkScores] = []
    with reference.held() as before, candidate.held() as after:
        for parts in (before, after):
            check_chunks(chunks, sizes[0], parts.session.cache.n_context)
        for done, chunk in enumerate(chunks, start=1):
            found.append(_score(before, after, list(chunk)))
            if progress:
                progress(done / len(chunks), _increase(found))
    return found


def check_chunks(chunks: Sequence[Sequence[int]], n_vocab: int, n_context: int) -> None:
    """OptionError, or ContextLengthError, for chunks that cannot be scored."""
    if not chunks:
        raise OptionError("there is no chunk of text to measure on; give more text")
    shortest, longest = min(map(len, chunks)), max(map(len, chunks))
    if shortest < SHORTEST:
        raise OptionError(f"a chunk has {shortest} tokens; it takes at least {SHORTEST}")
    if longest > n_context:
        raise ContextLengthError(
            f"a chunk has {longest} tokens, the context holds {n_context}; load the model with a larger context"
        )
    outside = next((token for chunk in chunks for token in chunk if not 0 <= token < n_vocab), None)
    if outside is not None:
        raise OptionError(f"token {outside} is outside the vocabulary of {n_vocab}")


def scored_rows(parts: Parts, chunk: Sequence[int]) -> Iterator[Floats]:
    """Logits (n_vocab,) of each position of a chunk that is scored; each valid until the next."""
    ids = list(chunk[:-1])  # nothing follows the last token
    for _, rows in parts.engine.read(ids, parts.session, len(chunk) // 2):
        yield from rows


def log_softmax_into(logits: Floats, out: Floats, work: Floats) -> None:
    """Natural logarithms of the probabilities into `out`; all three (n_vocab,). Errors below 1e-5 nats."""
    np.subtract(logits, logits.max(), out=out)
    np.exp(out, out=work)
    out -= np.float32(math.log(float(work.sum())))


def _score(before: Parts, after: Parts, chunk: list[int]) -> ChunkScores:
    """The scored tokens of one chunk."""
    targets = chunk[len(chunk) // 2 + 1 :]
    n, n_vocab = len(targets), before.engine.config.n_vocab
    losses, kl, same = np.empty((2, n), np.float32), np.empty(n, np.float32), np.empty(n, np.bool_)
    p, q, work = np.empty((3, n_vocab), np.float32)
    rows = zip(scored_rows(before, chunk), scored_rows(after, chunk), strict=True)
    for i, (ours, theirs) in enumerate(rows):
        same[i] = ours.argmax() == theirs.argmax()
        log_softmax_into(theirs, q, work)
        log_softmax_into(ours, p, work)
        losses[:, i] = -p[targets[i]], -q[targets[i]]
        np.subtract(p, q, out=q)
        np.exp(p, out=work)
        kl[i] = max(0.0, float(np.dot(work, q)))
    return ChunkScores(losses[0], losses[1], kl, same)


def _increase(scores: Sequence[ChunkScores]) -> float:
    """Ratio of the perplexities, less 1."""
    gone = sum(float((s.after.astype(np.float64) - s.before).sum()) for s in scores)
    return math.expm1(gone / sum(len(s.kl) for s in scores))


def token_losses(
    model: Model, chunks: Sequence[Sequence[int]], progress: Callable[[float], None] | None = None
) -> list[Floats]:
    """Negative log-likelihoods in nats of the scored tokens of each chunk, (n_tokens,); raises as compare does."""
    found: list[Floats] = []
    with model.held() as parts:
        n_vocab = parts.engine.config.n_vocab
        check_chunks(chunks, n_vocab, parts.session.cache.n_context)
        row, work = np.empty((2, n_vocab), np.float32)
        for chunk in chunks:
            targets = chunk[len(chunk) // 2 + 1 :]
            losses = np.empty(len(targets), np.float32)
            for i, logits in enumerate(scored_rows(parts, chunk)):
                log_softmax_into(logits, row, work)
                losses[i] = -row[targets[i]]
            found.append(losses)
            if progress:
                progress(len(found) / len(chunks))
    return found


def rise(before: Sequence[Floats], after: Sequence[Floats]) -> Rise:
    """The rise of perplexity between token_losses of two models on the same chunks.

    The log of the increase is the ratio of the chunks' summed differences to their summed lengths; its variance is that
    of a ratio estimator (Cochran, Sampling Techniques, 3rd ed., section 6.4), and the increase's follows to first
    order. OptionError for a single chunk, which has no standard error.
    """
    if (n := len(before)) < 2:
        raise OptionError(f"{n} chunk of text gives no standard error; take at least 2")
    lengths = np.array([len(losses) for losses in before], np.float64)
    gone = np.array([float((a.astype(np.float64) - b).sum()) for b, a in zip(before, after, strict=True)])  # nats
    mean = gone.sum() / lengths.sum()
    spread = math.sqrt(float(np.square(gone - mean * lengths).sum()) * n / (n - 1)) / float(lengths.sum())
    return Rise(math.expm1(mean), math.exp(mean) * spread)


def summary(scores: Sequence[ChunkScores]) -> Comparison:
    """The scores of some chunks in one line; raises as rise does."""

    def joined(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(s, name) for s in scores])

    before, kl = (joined(name).astype(np.float64) for name in ("before", "kl"))
    risen = rise([s.before for s in scores], [s.after for s in scores])
    return Comparison(
        n_chunks=len(scores),
        n_tokens=len(kl),
        perplexity_before=math.exp(before.mean()),
        perplexity_after=math.exp(joined("after").astype(np.float64).mean()),
        increase=risen.increase,
        standard_error=risen.standard_error,
        kl=float(kl.mean()),
        kl_99=float(np.quantile(kl, 0.99)),
        top1=float(joined("same").mean()),
    )
