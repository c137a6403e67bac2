"""What the experts of the last tokens let expect of all others: a linear map, fitted to recorded routes.

Text about one thing goes through the same experts, in all layers, for a while. The map goes through a few topics, so
that it stays small: what each expert's recent use adds to each topic, and what each topic adds to the chance of each
expert. Nothing here knows of buffers; what is done with the chances is the policy's.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.types import Floats

Routes = npt.NDArray[Any]  # ids (n_layers, n_tokens, top_k) of a text

HALF_LIVES = (1.0, 8.0, 128.0, 2.0)  # in tokens: of an expert's own shares, and last of those that the topics see
NEAR, FAR = 4, 16  # tokens whose use is to be expected: for a buffer that keeps an expert for few tokens, or for many
_MOST_TOPICS = 64
_MOST_PRODUCTS = 8192  # topics times experts of a layer: multiplications for each layer of a token
_LEAST_TOKENS = 256  # to fit anything to
_SKIPPED = 16  # tokens of a text before its shares mean much
_MOST_ROWS, _MOST_NUMBERS = 8192, 16 << 20  # of a matrix of the fit: tokens, which tell much the same as the next one
_MOST_JUDGES = 1024  # tokens of a text that a fit is judged by
_PENALTIES = (300.0, 1000.0, 3000.0, 10000.0)  # of the map's squares, to choose from; 10000 leaves little of it
_MOST_VALUE = 1e4  # of a number of the map: half floats hold it, and hostile files no more


def n_topics(n_layers: int, n_expert: int) -> int:
    """Topics of a model's map."""
    return min(_MOST_TOPICS, _MOST_PRODUCTS // max(n_expert, 1), n_layers * n_expert)


def topic_bytes(n_layers: int, n_expert: int) -> int:
    """What a map of a model and its state take in RAM."""
    topics = n_topics(n_layers, n_expert)
    return 4 * n_layers * (n_expert * (2 * topics + 2 + len(HALF_LIVES)) + topics)


@dataclass(frozen=True)
class TopicMap:
    """The map; chances are those of a use by a token, the mean over the tokens that it was fitted for.

    own: (4,), weights of an expert's own shares, by half-life. offset: (n_layers, n_expert), added to that. reads:
    (n_layers, n_expert, n_topics), what the topics take from each expert's share. writes: likewise, what the topics add
    to each expert's chance.
    """

    own: Floats
    offset: Floats
    reads: Floats
    writes: Floats


def keeps() -> Floats:
    """What a token leaves of each kind of share, (4, 1)."""
    return np.array([[0.5 ** (1.0 / half_life)] for half_life in HALF_LIVES], np.float32)


# ---- fitting ---------------------------------------------------------------------------------------------------------
def fit_topics(texts: Sequence[Routes], prior: Floats, ahead: int) -> TopicMap | None:
    """The map that says most about the next `ahead` tokens of texts, each ids (n_layers, n_tokens, top_k).

    None where they are too short. prior: shares of tokens that use each expert, (n_layers, n_expert); 0 in layers
    without experts.
    """
    n_layers, n_expert = prior.shape
    if sum(max(0, ids.shape[1] - 2 * (_SKIPPED + ahead)) for ids in texts) < _LEAST_TOKENS:
        return None
    own = _fit_own(texts, prior, ahead)
    inputs, rest, step = _rows(texts, prior, own, ahead)
    mean, mean_rest = inputs.mean(axis=0), rest.mean(axis=0)
    penalty = _penalty(texts, prior, own, ahead) / step
    reads, writes = _through_topics(inputs - mean, rest - mean_rest, penalty, n_topics(n_layers, n_expert))
    offset = mean_rest - (mean @ reads) @ writes.T
    shape = n_layers, n_expert, -1
    return TopicMap(own, offset.reshape(n_layers, n_expert), reads.reshape(shape), writes.reshape(shape))


def fit_all(texts: Sequence[Routes], prior: Floats) -> dict[int, TopicMap]:
    """The maps of texts by the tokens that they look ahead; none where the texts are too short."""
    found = {ahead: fit_topics(texts, prior, ahead) for ahead in (NEAR, FAR)}
    return {ahead: one for ahead, one in found.items() if one is not None}


def _moments(ids: Routes, prior: Floats, step: int, ahead: int) -> Iterator[tuple[Floats, Floats]]:
    """Shares (4, n_keys) before every `step`-th token of a text, valid until the next, and use (n_keys,) after it."""
    keep, n_expert, n_tokens = keeps(), prior.shape[1], ids.shape[1]
    layers = np.flatnonzero(prior.any(axis=1))
    keys = (ids[layers].astype(np.int64) + n_expert * layers[:, None, None]).transpose(1, 0, 2).reshape(n_tokens, -1)
    shares = np.tile(prior.reshape(-1), (len(HALF_LIVES), 1)).astype(np.float32)
    for token in range(n_tokens - ahead):
        if token >= _SKIPPED and token % step == 0:
            used = np.bincount(keys[token : token + ahead].reshape(-1), minlength=prior.size) / np.float32(ahead)
            yield shares, used.astype(np.float32)
        shares *= keep
        shares[:, keys[token]] += 1.0 - keep


def _step(texts: Sequence[Routes], n_rows: int) -> int:
    """How manieth token to take, so that they are about n_rows at most."""
    return max(1, -(-sum(ids.shape[1] for ids in texts) // max(n_rows, 1)))


def _fit_own(texts: Sequence[Routes], prior: Floats, ahead: int) -> Floats:
    """Weights of experts' own shares, (4,), that come nearest to what follows; the topics' share has none."""
    n, step = len(HALF_LIVES) - 1, _step(texts, _MOST_NUMBERS // prior.size // 4)
    products = np.zeros((n, n + 1))
    for ids in texts:
        for shares, used in _moments(ids, prior, step, ahead):
            products += shares[:n] @ np.column_stack((shares[:n].T, used))
    return np.array([*np.linalg.lstsq(products[:, :n], products[:, n], rcond=None)[0], 0.0], np.float32)


def _rows(
    texts: Sequence[Routes], prior: Floats, own: Floats, ahead: int, n_rows: int = _MOST_ROWS
) -> tuple[Floats, Floats, int]:
    """What the topics see before some tokens, use after them beyond what own shares explain; every how manieth."""
    step = _step(texts, min(n_rows, _MOST_NUMBERS // prior.size))
    rows = [
        (shares[-1].copy(), used - own @ shares) for ids in texts for shares, used in _moments(ids, prior, step, ahead)
    ]
    seen, rest = (np.array([row[part] for row in rows], np.float32).reshape(-1, prior.size) for part in (0, 1))
    return seen, rest, step


def _penalty(texts: Sequence[Routes], prior: Floats, own: Floats, ahead: int) -> float:
    """The best of _PENALTIES: fitted to the first half of all texts, judged by the second half of each.

    Each text counts the same, however much of its use can be foreseen: what suits the most regular one alone would
    foresee in others what does not come.
    """
    seen, rest, step = _rows([ids[:, : ids.shape[1] // 2] for ids in texts], prior, own, ahead)
    mean, mean_rest = seen.mean(axis=0), rest.mean(axis=0)
    judges = [_rows([ids[:, ids.shape[1] // 2 :]], prior, own, ahead, _MOST_JUDGES) for ids in texts]
    gains = np.zeros((len(_PENALTIES), len(texts)))
    for row, found in zip(gains, _ridges(seen - mean, rest - mean_rest, [p / step for p in _PENALTIES]), strict=True):
        for place, (others, after, _) in enumerate(judges):
            if len(others):
                wrong = after - mean_rest - found.applied(others - mean)
                most = max(float(np.square(after - mean_rest).mean()), 1e-30)  # none: one word again and again
                row[place] = 1.0 - float(np.square(wrong).mean()) / most
    return _PENALTIES[int((gains / np.maximum(np.abs(gains).max(axis=0), 1e-9)).sum(axis=1).argmax())]


class _Linear(NamedTuple):
    """A map of rows (n_rows, n) to (n_rows, n): times left, and then, if there is one, times right."""

    left: Floats
    right: Floats | None = None

    def applied(self, rows: Floats) -> Floats:
        """What becomes of rows."""
        found: Floats = rows @ self.left
        return found if self.right is None else np.matmul(found, self.right)

    def onto(self, columns: Floats) -> Floats:
        """The product of the map and columns (n, any)."""
        return np.matmul(self.left, columns if self.right is None else self.right @ columns)


def _ridges(inputs: Floats, targets: Floats, penalties: Sequence[float]) -> Iterator[_Linear]:
    """Ridge regressions of targets (n_rows, n) on inputs (n_rows, n), by the smaller of their two forms."""
    n_rows, n = inputs.shape
    unit = np.eye(min(n_rows, n), dtype=np.float32)
    products = inputs.T @ inputs if n_rows > n else inputs @ inputs.T
    onto = inputs.T @ targets if n_rows > n else targets
    for penalty in penalties:
        solved = np.linalg.solve(products + penalty * unit, onto)
        yield _Linear(solved) if n_rows > n else _Linear(inputs.T, solved)


def _through_topics(inputs: Floats, targets: Floats, penalty: float, n_topics: int) -> tuple[Floats, Floats]:
    """The ridge regression of few topics, reads and writes (n, n_topics): reduced rank regression of what it fits."""
    (whole,) = _ridges(inputs, targets, [penalty])
    fitted = whole.applied(inputs)
    if len(fitted) > fitted.shape[1]:
        writes = np.linalg.eigh(fitted.T @ fitted)[1][:, -n_topics:]
    else:
        writes = np.linalg.qr(fitted.T @ np.linalg.eigh(fitted @ fitted.T)[1][:, -n_topics:])[0]
    reads = whole.onto(writes)
    scale = np.sqrt(
        np.maximum(np.abs(reads).max(axis=0), 1e-6)
    )  # both sides of like size: they are kept as half floats
    return (reads / scale).astype(np.float32), (writes * scale).astype(np.float32)


# ---- as a document ---------------------------------------------------------------------------------------------------
def as_document(found: TopicMap) -> dict[str, Any]:
    """Plain values, the arrays as half floats in base 64."""
    arrays = {name: getattr(found, name) for name in ("own", "offset", "reads", "writes")}
    text = {name: base64.b64encode(_halves(array).tobytes()).decode() for name, array in arrays.items()}
    return {"topics": found.reads.shape[2], **text}


def from_document(document: Mapping[str, Any], shape: tuple[int, int]) -> TopicMap:
    """A map of (n_layers, n_expert) experts; raises what a document of another form makes it raise."""
    topics = document["topics"]
    if type(topics) is not int or not 0 < topics <= _MOST_TOPICS:
        raise ValueError(f"{topics} topics")
    shapes = {"own": (len(HALF_LIVES),), "offset": shape, "reads": (*shape, topics), "writes": (*shape, topics)}
    arrays = {}
    for name, expected in shapes.items():
        halves = np.frombuffer(base64.b64decode(document[name], validate=True), "<f2").reshape(expected)
        if not (np.abs(halves) <= _MOST_VALUE).all():
            raise ValueError(f"{name} has values that no map has")
        arrays[name] = halves.astype(np.float32)
    return TopicMap(**arrays)


def _halves(array: Floats) -> npt.NDArray[np.float16]:
    return np.clip(array, -_MOST_VALUE, _MOST_VALUE).astype("<f2")
