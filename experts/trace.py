"""Routing traces: which experts each token went to, and what routers said ahead, in one file that replay reads.

A trace is an .npz of plain arrays. Router scores ahead are kept as integers of 1/16 standard deviation, which is what
predictors look at. Whoever reads a trace takes it for hostile: names, sizes, types and ranges are checked.
"""

from __future__ import annotations

import atexit
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.errors import OptionError
from edgert.experts.array_file import Layout, check_ids, check_record_bytes, read_arrays, write_arrays
from edgert.experts.predictors import AHEAD
from edgert.storage.aside import check_writable
from edgert.types import Floats, Ids

_VERSION = 1
_ABSENT = -128  # in place of scores that were not recorded
_SCALE = 16.0
_MOST_BYTES = 1 << 30  # of a trace that is read
_KEPT_BYTES = 8 << 20  # of a trace while it is recorded, within what a plan leaves to spare
_MOST_TOKENS = 100_000
_TABLE = {
    "version": Layout("iu"),
    "model": Layout("U"),
    "record_bytes": Layout("i", ("n_layers", "n_expert")),
    "ids": Layout("u", ("n_layers", "n_tokens", "top_k")),
    "weights": Layout("f", ("n_layers", "n_tokens", "top_k")),
    "ahead": Layout("i", ("n_layers", "n_tokens", AHEAD, "n_expert")),
    "steps": Layout("iu", ("n_steps",)),
}


class Trace:
    """A recorded run.

    model: its key, see choice.py. record_bytes: (n_layers, n_expert), 0 where a layer has no experts. ids, weights:
    (n_layers, n_tokens, top_k); ids of layers without experts mean nothing. steps: (n_steps,) tokens of each step, more
    than one for chunks of prompts.
    """

    def __init__(
        self,
        model: str,
        record_bytes: Ids,
        ids: npt.NDArray[np.unsignedinteger[Any]],
        weights: npt.NDArray[np.float16],
        ahead: npt.NDArray[np.int8],
        steps: Ids,
    ) -> None:
        self.model, self.record_bytes, self.ids, self.weights = model, record_bytes, ids, weights
        self.steps, self._ahead = steps, ahead
        self.n_layers, self.n_tokens, self.top_k = ids.shape
        self.n_expert = record_bytes.shape[1]
        self.layers = np.flatnonzero(record_bytes.any(axis=1)).tolist()  # those that have experts

    def lookahead(self, layer: int, token: int) -> list[Floats]:
        """Scores (n_expert,) that the routers of the next layers gave in `layer`, standardised; maybe none."""
        there = min(AHEAD, self.n_layers - 1 - layer)
        rows = self._ahead[layer, token, :there]
        return [row / np.float32(_SCALE) for row in rows if row[0] != _ABSENT]

    def last(self, n_tokens: int) -> Trace:
        """The last tokens alone, as many as there are up to `n_tokens`, each a step of its own."""
        part = slice(max(0, self.n_tokens - n_tokens), None)
        ids = self.ids[:, part]
        steps = np.ones(ids.shape[1], np.int64)
        return Trace(self.model, self.record_bytes, ids, self.weights[:, part], self._ahead[:, part], steps)

    def save(self, path: Path) -> None:
        """Write the trace, aside first. Raises OSError."""
        write_arrays(
            path,
            {
                "version": np.int64(_VERSION),
                "model": np.array(self.model),
                "record_bytes": self.record_bytes,
                "ids": self.ids,
                "weights": self.weights,
                "ahead": self._ahead,
                "steps": self.steps,
            },
        )

    @classmethod
    def without_scores(
        cls,
        model: str,
        record_bytes: Ids,
        ids: npt.NDArray[np.unsignedinteger[Any]],
        weights: npt.NDArray[np.float16],
    ) -> Trace:
        """A trace of routes alone, each token a step of its own."""
        n_layers, n_tokens, _ = ids.shape
        absent = np.broadcast_to(np.int8(_ABSENT), (n_layers, n_tokens, AHEAD, record_bytes.shape[1]))
        return cls(model, record_bytes, ids, weights, absent, np.ones(n_tokens, np.int64))

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read a trace; ModelFileError for a file that is none, or lies about itself."""
        arrays = read_arrays(
            path,
            _TABLE,
            _check,
            what="a routing trace",
            remedy="give a file made with --trace",
            most_bytes=_MOST_BYTES,
        )
        return cls(
            str(arrays["model"]),
            arrays["record_bytes"].astype(np.int64),
            arrays["ids"],
            arrays["weights"].astype(np.float16),
            arrays["ahead"],
            arrays["steps"].astype(np.int64),
        )


def _check(arrays: dict[str, Any], extents: dict[str, int]) -> None:
    """ValueError unless the values fit together."""
    n_tokens, n_expert, top_k = extents["n_tokens"], extents["n_expert"], extents["top_k"]
    if arrays["version"] != _VERSION:
        raise ValueError(f"version {arrays['version']}, only {_VERSION} is known")
    if not 0 < top_k <= n_expert or not n_tokens or arrays["ahead"].dtype != np.int8:
        raise ValueError(f"{n_tokens} tokens, {top_k} of {n_expert} experts")
    sizes = arrays["record_bytes"]
    check_record_bytes(sizes)
    check_ids(arrays["ids"][sizes.any(axis=1)], n_expert)
    if (arrays["steps"] < 1).any() or arrays["steps"].sum() != n_tokens:
        raise ValueError(f"its steps are not {n_tokens} tokens")


class _Step(NamedTuple):
    """Routes of one step; scores ahead are of its last token: (n_layers, AHEAD, n_expert)."""

    ids: npt.NDArray[Any]
    weights: npt.NDArray[np.float16]
    ahead: npt.NDArray[np.int8]


class Recorder:
    """Collects the routes of a run: of the newest tokens, as many as fit `most_bytes`."""

    def __init__(self, model: str, record_bytes: Ids, top_k: int, *, most_bytes: int = _KEPT_BYTES) -> None:
        self.n_tokens = 0
        self._model, self._record_bytes, self._top_k = model, record_bytes, top_k
        self._n_layers, self._n_expert = record_bytes.shape
        self._id_type = np.uint8 if self._n_expert <= 256 else np.uint16
        self._steps: deque[_Step] = deque()
        token_bytes = self._n_layers * (4 * top_k + AHEAD * self._n_expert)
        self._most = max(1, min(_MOST_TOKENS, most_bytes // token_bytes))

    def add(self, ids: Ids, weights: Floats, ahead: Sequence[Sequence[Floats]] | None = None) -> None:
        """Routes of one step, ids and weights (n_layers, n_tokens, top_k).

        ahead[layer][d]: scores (n_expert or more,) of the router of layer + 1 + d for the step's last token; may be
        empty. Ids of layers without experts may be anything.
        """
        assert ids.shape == weights.shape == (self._n_layers, ids.shape[1], self._top_k), ids.shape
        scores = np.full((self._n_layers, AHEAD, self._n_expert), _ABSENT, np.int8)
        for layer, rows in enumerate(ahead or ()):
            for distance, row in enumerate(rows[: min(AHEAD, self._n_layers - 1 - layer)]):
                scores[layer, distance] = _as_integers(row[: self._n_expert])
        self._steps.append(_Step(ids.astype(self._id_type), weights.astype(np.float16), scores))
        self.n_tokens += ids.shape[1]
        while (over := self.n_tokens - self._most) > 0:
            oldest = self._steps.popleft()
            n_tokens = oldest.ids.shape[1]
            if n_tokens > over:  # a part of a prompt's chunk
                rest = _Step(oldest.ids[:, over:].copy(), oldest.weights[:, over:].copy(), oldest.ahead)
                self._steps.appendleft(rest)
            self.n_tokens -= min(n_tokens, over)

    def trace(self) -> Trace:
        """What was recorded, at least one token."""
        counts = np.array([step.ids.shape[1] for step in self._steps])
        ahead = np.full((self._n_layers, int(counts.sum()), AHEAD, self._n_expert), _ABSENT, np.int8)
        for last, step in zip((np.cumsum(counts) - 1).tolist(), self._steps, strict=True):
            ahead[:, last] = step.ahead
        ids = np.concatenate([step.ids for step in self._steps], axis=1)
        weights = np.concatenate([step.weights for step in self._steps], axis=1)
        return Trace(self._model, self._record_bytes, ids, weights, ahead, counts)


class TraceWriter(Recorder):
    """Collects the routes of a run, and writes them when it is closed or Python ends; use as a context manager.

    OptionError for a path that cannot be written.
    """

    def __init__(self, path: Path, model: str, record_bytes: Ids, top_k: int) -> None:
        super().__init__(model, record_bytes, top_k, most_bytes=_KEPT_BYTES)
        self.path = Path(path)
        self._process = os.getpid()
        self._check_path()
        atexit.register(self.close)

    def _check_path(self) -> None:
        """Now, not after the run."""
        try:
            check_writable(self.path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OptionError(f"trace={str(self.path)!r} cannot be written ({reason}); name another file") from error

    def close(self) -> None:
        """Write the file, aside first; nothing if no token was recorded. A second call does nothing. Raises OSError."""
        atexit.unregister(self.close)
        if not self._steps or os.getpid() != self._process:  # a forked child's parent writes
            return
        trace = self.trace()
        self._steps.clear()
        trace.save(self.path)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_integers(scores: Floats) -> npt.NDArray[np.int8]:
    """Standardised scores in steps of 1/16, within 127 of them."""
    with np.errstate(all="ignore"):
        centred = scores - scores.mean()
        spread = max(float(np.sqrt((centred * centred).mean())), 1e-6)
        return np.nan_to_num(np.clip(np.rint(centred * (_SCALE / spread)), -127, 127)).astype(np.int8)
