"""What a bundle of a model will look like, known before a weight is read: tensors, records, and how each is made.

The items, in the order in which they lie in hot.bin and experts.bin, are what packing goes through and resumes at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

from edgert.model_digest import model_digest
from edgert.quant import ggml, packing
from edgert.quant.checksum import checksum_rows
from edgert.quant.formats import F32, TILE_ROWS, MatrixSource
from edgert.requantised import MadeMatrix
from edgert.storage import bundle_manifest as manifests
from edgert.storage.bundle_manifest import PAGE, HotTensor, Manifest, Parts, RowTable, SourceFile, round_up
from edgert.storage.bundle_metadata import as_gguf
from edgert.storage.tensor_file import TensorFile
from edgert.tensor_table import EMBEDDING, HEAD
from edgert.weights import Weights

Bytes = npt.NDArray[np.uint8]

_TABLE_BYTES = 2 << 20  # of the embedding table, at a time


class Step(NamedTuple):
    """Some bytes of an item: read() gets what they are made from, put(raw, out) makes them.

    read() may be called early and in any thread, put() is called in order.
    """

    n_bytes: int
    read: Callable[[], Bytes]
    put: Callable[[Bytes, Bytes], None]


@dataclass(frozen=True)
class Item:
    """A tensor or a record, `n_bytes` from `offset` of its file on, made step by step."""

    words: str  # for people
    is_hot: bool  # in hot.bin, else in experts.bin
    offset: int
    n_bytes: int
    steps: Callable[[], Iterator[Step]]


class Layout:
    """The manifest of a model yet to be packed, all checksums 0, and the items that will have them."""

    def __init__(self, file: TensorFile, weights: Weights) -> None:
        self._file, self._weights = file, weights
        self.metadata = as_gguf(file.metadata)
        tensors, end = {}, 0
        for hot in weights.hot():
            format = F32 if hot.matrix is None else hot.matrix.format
            n_bytes = manifests.tensor_bytes(hot.shape, format)
            tensors[hot.name] = HotTensor(hot.name, hot.shape, format, end, n_bytes)
            end = round_up(end + n_bytes, PAGE)
        embedding = file.tensors[EMBEDDING]
        shape, kind = (embedding.shape[0], embedding.shape[1]), weights.table_type()
        table = RowTable(EMBEDDING, shape, kind, end, manifests.table_stride(kind, shape[1]))
        self._kinds: list[Parts] = []
        self.manifest = Manifest(
            source=str(file.path.resolve()),
            files=source_files(file),
            architecture=weights.config.architecture,
            inexact=_inexact(file),
            metadata_bytes=len(self.metadata),
            metadata_digest=hashlib.sha256(self.metadata).hexdigest(),
            tensors=tensors,
            table=table,
            kinds=self._kinds,
            model={"digest": model_digest(file), "tied": HEAD not in file.tensors},
            **self._records(),
        )

    def _records(self) -> dict[str, Any]:
        """The tables of records, and with them the forms that they have."""
        config = self._weights.config
        shape = (config.n_layers, config.router.n_expert if config.router else 0)
        kind, sizes = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        places: dict[Parts, int] = {}
        for layer in config.expert_layers:
            for index, expert in enumerate(self._weights.experts(layer)):
                matrices = (expert.gate, expert.up, expert.down)
                parts = manifests.place_parts([(matrix.shape, matrix.format) for matrix in matrices])
                kind[layer, index] = places.setdefault(parts, len(places))
                sizes[layer, index] = manifests.record_size(parts)
        self._kinds += places
        ends = np.cumsum(sizes).reshape(shape)
        return {
            "record_kind": kind,
            "record_bytes": sizes,
            "record_offset": ends - sizes,
            "record_checksum": np.zeros(shape, np.uint64),
        }

    def items(self) -> Iterator[Item]:
        """All items, in order."""
        m, n_layers = self.manifest, self._weights.config.n_layers
        for hot in self._weights.hot():
            tensor = m.tensors[hot.name]
            steps = _matrix_steps(hot.matrix) if hot.vector is None else _vector_steps(hot.vector)
            yield Item("hot weights", True, tensor.offset, tensor.n_bytes, steps)
        yield Item("embedding table", True, m.table.offset, m.table.n_bytes, self._table_steps)
        for layer in self._weights.config.expert_layers:
            for index, expert in enumerate(self._weights.experts(layer)):
                parts = m.kinds[int(m.record_kind[layer, index])]
                steps = _record_steps((expert.gate, expert.up, expert.down), parts)
                place, size = int(m.record_offset[layer, index]), int(m.record_bytes[layer, index])
                yield Item(f"experts of layer {layer + 1} of {n_layers}", False, place, size, steps)

    def set_checksums(self, checksums: list[int]) -> None:
        """Note the checksums of all items, in order."""
        m, n_hot = self.manifest, len(self.manifest.tensors)
        for (name, tensor), value in zip(list(m.tensors.items()), checksums[:n_hot], strict=True):
            m.tensors[name] = HotTensor(name, tensor.shape, tensor.format, tensor.offset, tensor.n_bytes, value)
        table = m.table
        m.table = RowTable(table.name, table.shape, table.type, table.offset, table.stride, checksums[n_hot])
        m.record_checksum[m.record_kind >= 0] = checksums[n_hot + 1 :]

    def _table_steps(self) -> Iterator[Step]:
        """The rows of the embedding table, each with its checksum behind it."""
        table, stored = self.manifest.table, self._file.tensors[EMBEDDING].type

        def put(raw: Bytes, out: Bytes) -> None:
            rows = out.reshape(len(raw), table.stride)
            if table.type is not stored:
                numbers = ggml.to_float(raw.reshape(-1), stored, (len(raw), table.shape[1]))
                if not np.isfinite(numbers).all():
                    raise packing.not_finite(f"{self._file.path}: the tensor {table.name}")
                raw = gguf.quants.quantize(numbers, table.type)
            rows[:, : table.row_bytes] = raw
            rows[:, table.row_bytes :] = 0
            rows[:, -8:] = checksum_rows(rows).view(np.uint8).reshape(-1, 8)

        step = max(1, _TABLE_BYTES // table.stride)
        for first in range(0, table.shape[0], step):
            n = min(step, table.shape[0] - first)
            yield Step(n * table.stride, partial(self._file.read_rows, table.name, first, n), put)


def source_files(file: TensorFile) -> tuple[SourceFile, ...]:
    """The files that a model is read from, as they are now."""
    return tuple(source_file(part) for part in file.parts)


def source_file(path: Path) -> SourceFile:
    """One of them. OSError if it is gone."""
    found = path.stat()
    return SourceFile(path.name, found.st_size, found.st_mtime_ns)


def _inexact(file: TensorFile) -> dict[str, str]:
    """What is lost by tensor types that edgert has no format for."""
    kinds = {info.type.name for info in file.tensors.values() if len(info.shape) > 1 and not ggml.is_exact(info.type)}
    return {kind: "decoded to F16: each weight within 0.049 %, or 3e-8 where that is more" for kind in sorted(kinds)}


def _copy(raw: Bytes, out: Bytes) -> None:
    out[:] = raw


def _zeros(n_bytes: int) -> Step:
    return Step(n_bytes, lambda: np.zeros(n_bytes, np.uint8), _copy)


def _vector_steps(vector: Callable[[], npt.NDArray[np.float32]]) -> Callable[[], Iterator[Step]]:
    def steps() -> Iterator[Step]:
        values = np.ascontiguousarray(vector(), np.float32).view(np.uint8)
        yield Step(len(values), lambda: values, _copy)

    return steps


def _matrix_steps(matrix: MatrixSource | None) -> Callable[[], Iterator[Step]]:
    """The tiles of a matrix, some rows at a time: memory does not grow with the matrix."""
    if isinstance(matrix, MadeMatrix):
        return _made_steps(matrix)
    assert isinstance(matrix, packing.StoredMatrix)  # what is packed comes from a model's file
    n_out, n_in = matrix.shape

    def put(first: int, raw: Bytes, out: Bytes) -> None:
        if len(raw) % TILE_ROWS:
            out[:] = 0  # the rows that fill the last tile
        matrix.pack_rows(raw, first, out)

    def steps() -> Iterator[Step]:
        step = packing.slab_rows(n_in)
        for first in range(0, n_out, step):
            n_rows = min(step, n_out - first)
            n_bytes = matrix.format.matrix_bytes(n_rows, n_in)
            yield Step(n_bytes, partial(matrix.read_rows, first, n_rows), partial(put, first))

    return steps


def _made_steps(matrix: MadeMatrix) -> Callable[[], Iterator[Step]]:
    """Tiles that there are already."""
    total = matrix.format.matrix_bytes(*matrix.shape)

    def steps() -> Iterator[Step]:
        for first in range(0, total, packing.SLAB_BYTES):
            n_bytes = min(packing.SLAB_BYTES, total - first)
            yield Step(n_bytes, partial(matrix.read, first, n_bytes), _copy)

    return steps


def _record_steps(matrices: tuple[MatrixSource, ...], parts: Parts) -> Callable[[], Iterator[Step]]:
    """Gate, up and down at their places, and zeros up to a whole page."""

    def steps() -> Iterator[Step]:
        end = 0
        for matrix, part in zip(matrices, parts, strict=True):
            if part.offset > end:
                yield _zeros(part.offset - end)
            yield from _matrix_steps(matrix)()
            end = part.offset + part.n_bytes
        if manifests.record_size(parts) > end:
            yield _zeros(manifests.record_size(parts) - end)

    return steps
