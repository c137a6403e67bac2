"""What the experts of the last tokens let expect of all others: a linear map, fitted to recorded routes.

Text about one thing goes through the same experts, in all layers, for a while. The map goes through a few topics, so
that it stays small: what each expert's recent use adds to each topic, and what each topic adds to the chance of each
expert. Nothing here knows of buffers; what is done with the chances is the policy's.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.types import Floats

Routes = npt.NDArray[Any]  # ids (n_layers, n_tokens, top_k) of a text

HALF_LIVES = (1.0, 8.0, 128.0, 2.0)  # in tokens: of an expert's own shares, and last of those that the topics see
AHEAD = 4  # tokens whose use is to be expected
_OWN = (0.09, 0.24, 0.65, 0.0)  # weights of the shares where nothing was fitted: those of the embedded model
_MOST_TOPICS, _MOST_PRODUCTS = (
    64,
    8192,
)  # the second: topics times experts of a layer, which each layer of a token costs
_LEAST_TOKENS = 256  # to fit anything to
_SKIPPED = 16  # tokens of a text before its shares mean much
_MOST_ROWS, _MOST_NUMBERS = 8192, 16 << 20  # of a matrix of the fit: tokens, which tell much the same as the next one
_PENALTIES = (300.0, 1000.0, 3000.0, 10000.0)  # of the map's squares, to choose from; 10000 leaves little of it
_MOST_VALUE = 1e4  # of a number of the map: half floats hold it, and hostile files no more


def n_topics(n_layers: int, n_expert: int) -> int:
    """Topics of a model's map."""
    return max(1, min(_MOST_TOPICS, _MOST_PRODUCTS // max(n_expert, 1), n_layers * n_expert))


def context_bytes(n_layers: int, n_expert: int) -> int:
    """What a context and its state take in RAM."""
    topics = n_topics(n_layers, n_expert)
    return 4 * n_layers * (n_expert * (2 * topics + 2 + len(HALF_LIVES)) + topics)


@dataclass(frozen=True)
class Context:
    """The map; chances are those of a use by a token, the mean over the next AHEAD of them.

    own: (4,), weights of an expert's own shares, by half-life. offset: (n_layers, n_expert), added to that. reads:
    (n_layers, n_expert, n_topics), what the topics take from each expert's share. writes: likewise, what the topics add
    to each expert's chance.
    """

    own: Floats
    offset: Floats
    reads: Floats
    writes: Floats

    @classmethod
    def unknown(cls, n_layers: int, n_expert: int) -> Context:
        """Experts' own shares alone."""
        nothing = np.zeros((n_layers, n_expert, 1), np.float32)
        return cls(np.array(_OWN, np.float32), nothing[..., 0], nothing, nothing)


def keeps() -> Floats:
    """What a token leaves of each kind of share, (4, 1)."""
    return np.array([[0.5 ** (1.0 / half_life)] for half_life in HALF_LIVES], np.float32)


# ---- fitting ---------------------------------------------------------------------------------------------------------
def fit_context(texts: Sequence[Routes], prior: Floats) -> Context | None:
    """The context of texts, each ids (n_layers, n_tokens, top_k); None where they are too short.

    prior: shares of tokens that use each expert, (n_layers, n_expert); 0 in layers without experts. The penalty is the
    one with which the first half of each text says most about the second.
    """
    n_layers, n_expert = prior.shape
    if sum(max(0, ids.shape[1] - 2 * (_SKIPPED + AHEAD)) for ids in texts) < _LEAST_TOKENS:
        return None
    own = _fit_own(texts, prior)
    inputs, rest, step = _rows(texts, prior, own)
    mean, mean_rest = inputs.mean(axis=0), rest.mean(axis=0)
    penalty = _penalty(texts, prior, own) / step
    reads, writes = _through_topics(inputs - mean, rest - mean_rest, penalty, n_topics(n_layers, n_expert))
    offset = mean_rest - (mean @ reads) @ writes.T
    shape = n_layers, n_expert, -1
    return Context(own, offset.reshape(n_layers, n_expert), reads.reshape(shape), writes.reshape(shape))


def _moments(ids: Routes, prior: Floats, step: int) -> Iterator[tuple[Floats, Floats]]:
    """Shares (4, n_keys) before every `step`-th token of a text, valid until the next, and use (n_keys,) after it."""
    keep, n_expert, n_tokens = keeps(), prior.shape[1], ids.shape[1]
    layers = np.flatnonzero(prior.any(axis=1))
    keys = (ids[layers].astype(np.int64) + n_expert * layers[:, None, None]).transpose(1, 0, 2).reshape(n_tokens, -1)
    shares = np.tile(prior.reshape(-1), (len(HALF_LIVES), 1)).astype(np.float32)
    for token in range(n_tokens - AHEAD):
        if token >= _SKIPPED and token % step == 0:
            used = np.bincount(keys[token : token + AHEAD].reshape(-1), minlength=prior.size) / np.float32(AHEAD)
            yield shares, used.astype(np.float32)
        shares *= keep
        shares[:, keys[token]] += 1.0 - keep


def _step(texts: Sequence[Routes], n_rows: int) -> int:
    """How manieth token to take, so that they are not more than n_rows."""
    return max(1, -(-sum(ids.shape[1] for ids in texts) // max(min(n_rows, _MOST_ROWS), 1)))


def _fit_own(texts: Sequence[Routes], prior: Floats) -> Floats:
    """Weights of experts' own shares, (4,), that come nearest to what follows; the topics' share has none."""
    n, step = len(HALF_LIVES) - 1, _step(texts, _MOST_NUMBERS // prior.size // 4)
    products = np.zeros((n, n + 1))
    for ids in texts:
        for shares, used in _moments(ids, prior, step):
            products += shares[:n] @ np.column_stack((shares[:n].T, used))
    return np.array([*np.linalg.lstsq(products[:, :n], products[:, n], rcond=None)[0], 0.0], np.float32)


def _rows(texts: Sequence[Routes], prior: Floats, own: Floats) -> tuple[Floats, Floats, int]:
    """What the topics see before some tokens, use after them beyond what own shares explain; every how manieth."""
    step = _step(texts, _MOST_NUMBERS // prior.size)
    rows = [(shares[-1].copy(), used - own @ shares) for ids in texts for shares, used in _moments(ids, prior, step)]
    seen, rest = (np.array(part, np.float32) for part in zip(*rows, strict=True))
    return seen, rest, step


def _penalty(texts: Sequence[Routes], prior: Floats, own: Floats) -> float:
    """The best of _PENALTIES: fitted to the first half of each text, judged by the second."""
    first, second = (
        _rows([ids[:, : ids.shape[1] // 2] if early else ids[:, ids.shape[1] // 2 :] for ids in texts], prior, own)
        for early in (True, False)
    )
    mean, mean_rest = first[0].mean(axis=0), first[1].mean(axis=0)
    errors = []
    for penalty in _PENALTIES:
        found = _ridge(first[0] - mean, first[1] - mean_rest, penalty / first[2])
        errors.append(float(np.square(second[1] - mean_rest - (second[0] - mean) @ found).mean()))
    return _PENALTIES[int(np.argmin(errors))]


def _ridge(inputs: Floats, targets: Floats, penalty: float) -> Floats:
    """The ridge regression of targets (n_rows, n) on inputs (n_rows, n): (n, n), by the smaller of its two forms."""
    n_rows, n = inputs.shape
    unit = penalty * np.eye(min(n_rows, n), dtype=np.float32)
    if n_rows > n:
        found: Floats = np.linalg.solve(inputs.T @ inputs + unit, inputs.T @ targets)
    else:
        found = inputs.T @ np.linalg.solve(inputs @ inputs.T + unit, targets)
    return found


def _through_topics(inputs: Floats, targets: Floats, penalty: float, n_topics: int) -> tuple[Floats, Floats]:
    """The ridge regression of few topics, reads and writes (n, n_topics): reduced rank regression of what it fits."""
    whole = _ridge(inputs, targets, penalty)
    fitted = inputs @ whole
    if len(fitted) > fitted.shape[1]:
        writes = np.linalg.eigh(fitted.T @ fitted)[1][:, -n_topics:]
    else:
        writes = np.linalg.qr(fitted.T @ np.linalg.eigh(fitted @ fitted.T)[1][:, -n_topics:])[0]
    reads = whole @ writes
    scale = np.sqrt(
        np.maximum(np.abs(reads).max(axis=0), 1e-6)
    )  # both sides of like size: they are kept as half floats
    return (reads / scale).astype(np.float32), (writes * scale).astype(np.float32)


# ---- as a document ---------------------------------------------------------------------------------------------------
def as_document(context: Context) -> dict[str, Any]:
    """Plain values, the arrays as half floats in base 64."""
    arrays = {name: getattr(context, name) for name in ("own", "offset", "reads", "writes")}
    text = {name: base64.b64encode(_halves(array).tobytes()).decode() for name, array in arrays.items()}
    return {"topics": context.reads.shape[2], **text}


def from_document(document: Mapping[str, Any], shape: tuple[int, int]) -> Context:
    """A context of (n_layers, n_expert) experts; raises what a document of another form makes it raise."""
    topics = document["topics"]
    if type(topics) is not int or not 0 < topics <= _MOST_TOPICS:
        raise ValueError(f"{topics} topics")
    shapes = {"own": (len(HALF_LIVES),), "offset": shape, "reads": (*shape, topics), "writes": (*shape, topics)}
    arrays = {}
    for name, expected in shapes.items():
        halves = np.frombuffer(base64.b64decode(document[name], validate=True), "<f2").reshape(expected)
        if not (np.abs(halves) <= _MOST_VALUE).all():
            raise ValueError(f"{name} has values that no context has")
        arrays[name] = halves.astype(np.float32)
    return Context(**arrays)


def _halves(array: Floats) -> npt.NDArray[np.float16]:
    return np.clip(array, -_MOST_VALUE, _MOST_VALUE).astype("<f2")
