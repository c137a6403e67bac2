"""A resident model whose experts can be exchanged, to measure what it loses with others in their place.

The predictions that are compared with, the untouched model's unless told otherwise, are kept as half floats, as many as
there is room for, so that a measurement costs one run of the text. Nothing here knows how weights were quantised, or
what a measurement is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.devices.base import Table
from edgert.devices.buffers import aligned, round_up
from edgert.divergence import check_chunks, log_softmax_into, scored_rows
from edgert.errors import OptionError, UnsupportedError
from edgert.experts.residency import AllResident
from edgert.quant.formats import Format, MatrixSource, PackedPart
from edgert.types import Floats

if TYPE_CHECKING:
    from edgert.loading import Parts
    from edgert.model import Model

KEPT_BYTES = 1 << 30  # most that the untouched model's predictions take, by default
Projections = tuple[MatrixSource, MatrixSource, MatrixSource]  # gate, up, down


class Measured(NamedTuple):
    """A model with some experts exchanged, against the reference: the untouched one, or as Trial.compare_with_this."""

    losses: npt.NDArray[np.float64]  # (n_chunks,): mean negative log-likelihood of a chunk's scored tokens, nats
    kl: float  # mean Kullback-Leibler divergence from the reference, nats a token
    top1: float  # share of the tokens of which both have the same most probable one


@dataclass(frozen=True)
class _Reference:
    """What is compared with: predictions of one chunk."""

    log_p: npt.NDArray[Any]  # float16 or float32 (n_tokens, n_vocab)
    best: npt.NDArray[np.int64]  # (n_tokens,)
    loss: float


class Trial:
    """Exchanges experts of a model whose experts are all in RAM; as a context manager it puts them back at the end.

    most_bytes: of the untouched model's predictions that are kept; those of further chunks are computed each time anew.
    Raises OptionError for a model without experts, or one that reads them from flash.
    """

    def __init__(self, model: Model, *, most_bytes: int = KEPT_BYTES) -> None:
        self._model, self._room = model, most_bytes
        with model.held() as parts:
            if parts.engine.config.router is None:
                raise OptionError(f"{parts.path} has no experts that could be exchanged")
            if not isinstance(parts.engine.residency, AllResident):
                raise OptionError(
                    f"{parts.path}: {parts.memory.residency:.0%} of its experts are in RAM, and only those of a model "
                    "that has all of them there can be exchanged; give more --memory"
                )
            self._float_down = _has_float_down(parts)
        self._originals: dict[tuple[int, int], Table] = {}  # rows of tables, as they were
        self._records: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}  # what exchanged rows point to
        self._free: list[npt.NDArray[np.uint8]] = []  # records no longer pointed to
        self._parts_of: dict[tuple[Format, ...], tuple[PackedPart, ...]] = {}
        self._references: dict[tuple[int, ...], _Reference] = {}
        self._instead: dict[tuple[int, ...], _Reference] = {}  # of the untouched model's, of some chunks

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore_all()

    # ---- exchanging --------------------------------------------------------------------------------------------------
    def swap(self, layer: int, expert: int, matrices: Projections) -> None:
        """Put gate, up (d_expert, d_model) and down (d_model, d_expert) in the place of an expert.

        Compiles kernels of formats that were not used before. Raises OptionError for an expert or a shape that the
        model has not, UnsupportedError for a format that it cannot run.
        """
        with self._model.held() as parts:
            table, place = self._table(parts, layer, expert), (layer, expert)
            described = self._describe(parts, matrices)
            record = self._take(described[-1].offset + described[-1].n_bytes, self._records.get(place))
            for part, matrix in zip(described, matrices, strict=True):
                matrix.pack(record[part.offset : part.offset + part.n_bytes])
            original = table[expert : expert + 1].copy()
            parts.engine.device.place_expert(table, expert, described, record)
            self._originals.setdefault(place, original)
            self._records[place] = record
            parts.session.tokens.clear()  # made with other weights

    def restore(self, layer: int, expert: int) -> None:
        """Put an expert back as the model has it; nothing happens to one that was not exchanged."""
        with self._model.held() as parts:
            table, place = self._table(parts, layer, expert), (layer, expert)
            if place in self._originals:
                table[expert : expert + 1] = self._originals.pop(place)
                self._free.append(self._records.pop(place))
                parts.session.tokens.clear()

    def restore_all(self) -> None:
        """Put all experts back."""
        for layer, expert in list(self._originals):
            self.restore(layer, expert)

    def _table(self, parts: Parts, layer: int, expert: int) -> Table:
        """The table that an expert is in."""
        config, tables = parts.engine.config, parts.engine.residency.tables
        assert config.router is not None
        if not (0 <= layer < config.n_layers and 0 <= expert < config.router.n_expert):
            raise OptionError(
                f"expert {expert} of layer {layer} is none of this model's {config.router.n_expert} experts of "
                f"{config.n_layers} layers"
            )
        table = tables[layer]
        assert table is not None
        return table

    def _describe(self, parts: Parts, matrices: Projections) -> tuple[PackedPart, ...]:
        """Where the projections lie in a record; the same object for the same formats, which devices go by."""
        config = parts.engine.config
        wide, narrow = (config.d_expert, config.d_model), (config.d_model, config.d_expert)
        for name, matrix, shape in zip(("gate", "up", "down"), matrices, (wide, wide, narrow), strict=True):
            if matrix.shape != shape:
                raise OptionError(f"{name} is {matrix.shape}, and this model's experts have {shape} there")
        formats = tuple(matrix.format for matrix in matrices)
        if not formats[2].is_integer and not self._float_down:
            raise UnsupportedError(
                f"down is {formats[2].name}, but this model has no room for rows of floats, since none of its experts "
                "has such a down projection; exchange it for one of integers"
            )
        if formats not in self._parts_of:
            described, offset = [], 0
            for matrix in matrices:
                described.append(PackedPart(matrix.format, matrix.shape, offset))
                offset += round_up(described[-1].n_bytes, 64)
            self._parts_of[formats] = tuple(described)
        return self._parts_of[formats]

    def _take(self, n_bytes: int, present: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.uint8]:
        """A buffer for a record: the one in use, or one that is free, if it is large enough, else a new one."""
        if present is not None and len(present) >= n_bytes:
            return present
        if present is not None:
            self._free.append(present)
        for i, record in enumerate(self._free):
            if len(record) >= n_bytes and record is not present:
                return self._free.pop(i)
        return aligned(n_bytes)

    # ---- measuring ---------------------------------------------------------------------------------------------------
    def compare_with_this(self, chunks: Sequence[Sequence[int]]) -> None:
        """Hold these chunks against the model as it is now, and not against the untouched one, from here on.

        What one exchange more does is told far better so: against the untouched model, the product of its errors with
        those of all the others comes in, which is a matter of chance. Predictions are kept as floats, and the
        divergence is exact to about 1e-9 nats; where these take too much room as half floats, and to 1e-6.
        """
        with self._model.held() as parts:
            n_vocab = parts.engine.config.n_vocab
            check_chunks(chunks, n_vocab, parts.session.cache.n_context)
            n_values = sum(len(chunk) - len(chunk) // 2 - 1 for chunk in chunks) * n_vocab
            kind = np.float32 if 4 * n_values <= self._room else np.float16
            for chunk in chunks:
                self._instead[tuple(chunk)] = made = _predict(parts, list(chunk), kind)
                self._room -= made.log_p.nbytes

    def measure(self, chunks: Sequence[Sequence[int]]) -> Measured:
        """What the model makes of chunks of token ids, against what the reference makes of them.

        A chunk's reference is computed when it is first asked for. It is kept as half floats: the divergence is exact
        to about 1e-6 nats, and exactly 0 where nothing is exchanged. Raises as edgert.divergence.compare does.
        """
        with self._model.held() as parts:
            check_chunks(chunks, parts.engine.config.n_vocab, parts.session.cache.n_context)
            found = [self._measure(parts, list(chunk)) for chunk in chunks]
        losses, kls, same = zip(*found, strict=True)
        n_tokens = sum(map(len, kls))
        kl, agreed = sum(float(k.sum()) for k in kls), sum(int(s.sum()) for s in same)
        return Measured(np.array(losses), kl / n_tokens, agreed / n_tokens)

    def _measure(self, parts: Parts, chunk: list[int]) -> tuple[float, npt.NDArray[Any], npt.NDArray[Any]]:
        """Mean loss of one chunk, and of each scored token the divergence and whether the best one agrees."""
        reference, targets = self._reference(parts, chunk), chunk[len(chunk) // 2 + 1 :]
        n = len(targets)
        if not self._originals and tuple(chunk) not in self._instead:
            return reference.loss, np.zeros(n), np.ones(n, np.bool_)
        losses, kl, best = np.empty(n), np.empty(n), np.empty(n, np.int64)
        p, q, work = np.empty((3, parts.engine.config.n_vocab), np.float32)
        for i, logits in enumerate(scored_rows(parts, chunk)):
            best[i] = logits.argmax()
            log_softmax_into(logits, q, work)
            losses[i] = -q[targets[i]]
            p[:] = reference.log_p[i]
            kl[i] = _divergence(p, q, work)
        return float(losses.mean()), kl, best == reference.best

    def _reference(self, parts: Parts, chunk: list[int]) -> _Reference:
        """The predictions of a chunk to compare with, computed or kept."""
        key = tuple(chunk)
        if found := self._instead.get(key) or self._references.get(key):
            return found
        with self._untouched(parts):
            made = _predict(parts, chunk)
        if made.log_p.nbytes <= self._room:
            self._room -= made.log_p.nbytes
            self._references[key] = made
        return made

    @contextmanager
    def _untouched(self, parts: Parts) -> Iterator[None]:
        """The model as it was, for a while."""
        kept = [(parts.engine.residency.tables[layer], expert, (layer, expert)) for layer, expert in self._originals]

        def exchange() -> None:
            for table, expert, place in kept:
                assert table is not None
                row = table[expert : expert + 1].copy()
                table[expert : expert + 1], self._originals[place] = self._originals[place], row
            parts.session.tokens.clear()

        exchange()
        try:
            yield
        finally:
            exchange()


def _divergence(log_p: Floats, log_q: Floats, work: Floats) -> float:
    """sum of p log(p / q) - p + q over (n_vocab,) values; log_q is overwritten.

    The two last terms take away what rounding, p's to half floats above all, would otherwise add to first order.
    """
    np.exp(log_q, out=work)
    rest = float(work.sum(dtype=np.float64))
    np.subtract(log_p, log_q, out=log_q)
    np.exp(log_p, out=work)
    return max(0.0, float(np.dot(work, log_q)) + rest - float(work.sum(dtype=np.float64)))


def _predict(parts: Parts, chunk: list[int], dtype: type[np.floating[Any]] = np.float16) -> _Reference:
    """What a model predicts of a chunk's scored tokens."""
    targets = chunk[len(chunk) // 2 + 1 :]
    n, n_vocab = len(targets), parts.engine.config.n_vocab
    log_p, best, losses = np.empty((n, n_vocab), dtype), np.empty(n, np.int64), np.empty(n)
    row, work = np.empty((2, n_vocab), np.float32)
    for i, logits in enumerate(scored_rows(parts, chunk)):
        best[i] = logits.argmax()
        log_softmax_into(logits, row, work)
        losses[i] = -row[targets[i]]
        np.maximum(row, np.finfo(dtype).min, out=row)
        log_p[i] = row
    return _Reference(log_p, best, float(losses.mean()))


def _has_float_down(parts: Parts) -> bool:
    """Whether the device keeps float rows for down projections, because some expert's takes them."""
    names = [name for name in parts.weights.shapes if name.endswith("ffn_down_exps.weight")]
    return any(not format.is_integer for name in names for format in parts.weights.sizes_of(name))
