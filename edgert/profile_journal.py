"""What of a profile has been run so far, kept beside where it will be: a run that was killed goes on from there.

One file, replaced as a whole now and then. It names what it is about; of another model or text, or damaged, it counts
for nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgert.errors import ModelFileError, StorageError
from edgert.experts.array_file import Layout, read_arrays, write_arrays
from edgert.experts.moments import Moments

_MOST_BYTES = 8 << 30
_LEAST_S, _SHARE = 2.0, 0.05  # between two saves; and of the time that saving may take
_TABLE = {
    "about": Layout("U"),
    "own_text": Layout("i", ("n_written", "chunk")),
    "inputs": Layout("f", ("n_layers", "n_expert", "d_model")),
    "hidden": Layout("f", ("n_layers", "n_expert", "d_expert")),
    "counts": Layout("i", ("n_layers", "n_expert")),
    "ids": Layout("u", ("n_layers", "n_tokens", "top_k")),
    "weights": Layout("f", ("n_layers", "n_tokens", "top_k")),
}


class ProfileJournal:
    """The journal at `path` of a run that `about` describes (anything JSON can say).

    chunk: tokens of one. own_text: chunks that the model has written. ids, weights: routes of the chunks that were run,
    each (n_layers, chunk, top_k). moments: sums over those. What an earlier run left is there from the start.
    """

    def __init__(self, path: Path, about: Any, moments: Moments, *, chunk: int, top_k: int) -> None:
        self.path, self.moments, self.chunk, self._top_k = path, moments, chunk, top_k
        self.own_text: list[list[int]] = []
        self.ids: list[Any] = []
        self.weights: list[Any] = []
        self._about = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self._saved_at, self._took, self._is_new = time.monotonic(), 0.0, False
        self._whole = True
        self._restore()

    def _restore(self) -> None:
        """Take what an earlier run left."""
        try:
            arrays = read_arrays(self.path, _TABLE, self._check, what="", remedy="", most_bytes=_MOST_BYTES)
        except ModelFileError:  # there is none, or none for this run
            return
        n_chunks = arrays["ids"].shape[1] // self.chunk
        self.own_text = arrays["own_text"].tolist()
        self.ids = np.split(arrays["ids"], n_chunks, axis=1) if n_chunks else []
        self.weights = np.split(arrays["weights"], n_chunks, axis=1) if n_chunks else []
        self.moments.inputs[:], self.moments.hidden[:] = arrays["inputs"], arrays["hidden"]
        self.moments.counts[:] = arrays["counts"]

    def _check(self, arrays: dict[str, Any], extents: dict[str, int]) -> None:
        """ValueError for the journal of another run."""
        n_tokens, mine = extents["n_tokens"], (self.chunk, self._top_k)
        moments = self.moments
        same = str(arrays["about"]) == self._about and (extents["chunk"], extents["top_k"]) == mine
        for name, sums in (("inputs", moments.inputs), ("hidden", moments.hidden), ("counts", moments.counts)):
            same = same and arrays[name].shape == sums.shape and arrays[name].dtype == sums.dtype
        if not same or n_tokens % self.chunk:
            raise ValueError("of another run")

    def begin(self) -> None:
        """The moments of a chunk begin to be summed: until it is added, nothing is saved."""
        self._whole = False

    def add(self, *, own_text: list[int] | None = None, routes: tuple[Any, Any] | None = None) -> None:
        """A chunk more was written, or run; saves now and then."""
        if own_text is not None:
            self.own_text.append(own_text)
        if routes is not None:
            self.ids.append(routes[0])
            self.weights.append(routes[1])
        self._is_new = self._whole = True
        if time.monotonic() - self._saved_at >= max(_LEAST_S, self._took / _SHARE):
            self.save()

    def save(self) -> None:
        """Write what is new, if that is whole chunks. StorageError where that is impossible."""
        if not (self._is_new and self._whole):
            return
        started, n_layers = time.monotonic(), len(self.moments.counts)
        nothing = np.zeros((n_layers, 0, self._top_k), np.uint16)
        arrays = {
            "about": np.array(self._about),
            "own_text": np.array(self.own_text, np.int32).reshape(len(self.own_text), self.chunk),
            "inputs": self.moments.inputs,
            "hidden": self.moments.hidden,
            "counts": self.moments.counts,
            "ids": np.concatenate(self.ids, axis=1) if self.ids else nothing,
            "weights": np.concatenate(self.weights, axis=1) if self.weights else nothing.astype(np.float16),
        }
        try:
            write_arrays(self.path, arrays, compress=False)
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written ({error.strerror}), and what was run not be kept; make room, or name "
                "another file with --out"
            ) from error
        self._saved_at, self._is_new = time.monotonic(), False
        self._took = self._saved_at - started

    def remove(self) -> None:
        """The profile is written: this is no longer needed."""
        with contextlib.suppress(OSError):
            self.path.unlink()
