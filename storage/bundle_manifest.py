"""The manifest of a bundle: where every tensor and every expert record lies, with its format and checksum.

It is JSON, ends with the digest of all before it, and is hostile until it has proved sound: types, bounds and sizes are
checked, and tensors and records have to tile their files without gap or overlap.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from edgert.errors import ModelFileError, UnsupportedError
from edgert.quant.formats import FORMATS, Format, PackedPart
from edgert.storage import bundle_documents

FORMAT, VERSION = "edgert bundle", 1
PAGE = 4096  # offsets in the files are multiples of it: what direct reads want
PART_ALIGNMENT = 64  # of a projection within its record
MAX_BYTES = 256 << 20  # of the manifest, where a record takes 60, and of the metadata
_MAX_SIZE, _MAX_COUNT, _MAX_NAME = 1 << 50, 1 << 16, 256

Parts = tuple[PackedPart, PackedPart, PackedPart]  # gate, up, down


def round_up(n: int, multiple: int) -> int:
    """The next multiple of `multiple` that is not below n."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class HotTensor:
    """A tensor in hot.bin: tiles of a matrix (n_out, n_in), or the float32 numbers of a vector (n,)."""

    name: str
    shape: tuple[int, ...]
    format: Format
    offset: int
    n_bytes: int
    checksum: int = 0


@dataclass(frozen=True)
class RowTable:
    """The embedding table (n_rows, n_columns) at the end of hot.bin, row by row, in a ggml type.

    A row takes `stride` bytes: its own, zeros, and in the last 8 the checksum of all before.
    """

    name: str
    shape: tuple[int, int]
    type: Type
    offset: int
    stride: int
    checksum: int = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of all rows."""
        return self.shape[0] * self.stride

    @property
    def row_bytes(self) -> int:
        """Bytes of a row by itself."""
        return row_bytes(self.type, self.shape[1])


@dataclass(frozen=True)
class SourceFile:
    """A file that was packed, as it was then."""

    name: str
    n_bytes: int
    mtime_ns: int


@dataclass
class Manifest:
    """What manifest.json says. Arrays are (n_layers, n_expert); a layer without experts has zeros."""

    source: str  # path of what was packed
    files: tuple[SourceFile, ...]
    architecture: str
    inexact: dict[str, str]  # by tensor type: what its weights lost
    metadata_bytes: int
    metadata_digest: str  # SHA-256
    tensors: dict[str, HotTensor]
    table: RowTable
    kinds: list[Parts]  # the distinct forms of a record
    record_kind: npt.NDArray[np.int64]  # -1: no record
    record_offset: npt.NDArray[np.int64]
    record_bytes: npt.NDArray[np.int64]
    record_checksum: npt.NDArray[np.uint64]
    bits: Mapping[str, Any] = field(default_factory=dict)  # how the experts' formats were chosen; empty: as the source
    proof: Mapping[str, Any] = field(default_factory=dict)  # what was measured against the source; see edgert.proof
    model: Mapping[str, Any] = field(default_factory=dict)  # which model it is, for those who keep what they learnt
    digest: str = field(default="")

    @property
    def hot_bytes(self) -> int:
        """Size of hot.bin."""
        return round_up(self.table.offset + self.table.n_bytes, PAGE)

    @property
    def expert_bytes(self) -> int:
        """Size of experts.bin."""
        return int(self.record_bytes.sum())

    def content(self) -> str:
        """A digest of what the model is, wherever it came from: equal for equal metadata and weights."""
        return _digest([self.metadata_digest, _hot_document(self), _experts_document(self)])

    def as_text(self) -> str:
        """The document, with its digest."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "architecture": self.architecture,
            "source": {"path": self.source, "files": [[f.name, f.n_bytes, f.mtime_ns] for f in self.files]},
            "inexact": self.inexact,
            "metadata": {"bytes": self.metadata_bytes, "sha256": self.metadata_digest},
            "hot": _hot_document(self),
            "experts": _experts_document(self),
            **{
                name: text for name, text in (("bits", self.bits), ("proof", self.proof), ("model", self.model)) if text
            },
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items()]
        return "{\n" + ",\n".join([*lines, f'"digest": "{_digest(document)}"']) + "\n}\n"


def row_bytes(kind: Type, n_columns: int) -> int:
    """Bytes of a row of a ggml type."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return n_columns // block * size


def table_stride(kind: Type, n_columns: int) -> int:
    """Bytes that a row of an embedding table takes, with its checksum."""
    return round_up(row_bytes(kind, n_columns) + 8, 64)


def tensor_bytes(shape: Sequence[int], format: Format) -> int:
    """Bytes of a vector's numbers or a matrix' tiles."""
    return 4 * shape[0] if len(shape) == 1 else format.matrix_bytes(shape[0], shape[1])


def record_size(parts: Parts) -> int:
    """Bytes of a record, a multiple of 4,096."""
    return round_up(parts[2].offset + parts[2].n_bytes, PAGE)


def place_parts(shapes_and_formats: Sequence[tuple[tuple[int, int], Format]]) -> Parts:
    """The projections of a record one after the other, each on its own 64 bytes."""
    parts, end = [], 0
    for shape, format in shapes_and_formats:
        parts.append(PackedPart(format, shape, end))
        end = round_up(end + parts[-1].n_bytes, PART_ALIGNMENT)
    gate, up, down = parts
    return gate, up, down


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _hot_document(manifest: Manifest) -> dict[str, Any]:
    table = manifest.table
    tensors = [
        [t.name, list(t.shape), t.format.name, t.offset, t.n_bytes, f"{t.checksum:016x}"]
        for t in manifest.tensors.values()
    ]
    rows = [table.name, list(table.shape), table.type.name, table.offset, table.stride, f"{table.checksum:016x}"]
    return {"bytes": manifest.hot_bytes, "tensors": tensors, "table": rows}


def _experts_document(manifest: Manifest) -> dict[str, Any]:
    m = manifest
    kinds = [[[part.format.name, list(part.shape), part.offset] for part in parts] for parts in m.kinds]
    records = [  # the third number is the variant of an expert: there is one so far
        [layer, expert, 0, int(m.record_kind[layer, expert])]
        + [int(table[layer, expert]) for table in (m.record_offset, m.record_bytes)]
        + [f"{m.record_checksum[layer, expert]:016x}"]
        for layer, expert in np.argwhere(m.record_kind >= 0).tolist()
    ]
    n_layers, n_expert = m.record_kind.shape
    return {"bytes": m.expert_bytes, "layers": n_layers, "per_layer": n_expert, "kinds": kinds, "records": records}


# ---- reading ---------------------------------------------------------------------------------------------------------
class _Damaged(Exception):
    """What is wrong with the document."""


def parse(text: bytes, where: str) -> Manifest:
    """The manifest that a document describes; `where` names it in messages.

    Raises UnsupportedError for a newer format version, ModelFileError for anything else that is wrong.
    """
    try:
        document = json.loads(text)
        _check_version(document, where)
        given = document.pop("digest", None)
        if given != _digest(document):
            raise _Damaged("its digest does not fit its content")
        return _manifest(document, given)
    except (ValueError, RecursionError, _Damaged) as error:
        problem = error if isinstance(error, _Damaged) else "it is not JSON"
        raise ModelFileError(
            f"{where}: {problem}; the bundle is damaged: remove it and pack the model again"
        ) from error


def _check_version(document: Any, where: str) -> None:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _Damaged(f'it has no "format": "{FORMAT}"')
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise _Damaged(f"its format version is {version!r:.40}")
    if version > VERSION:
        raise UnsupportedError(
            f"{where}: the bundle has format version {version}, this edgert reads {VERSION}; upgrade edgert, or remove "
            "the bundle and pack the model again"
        )


def _manifest(document: dict[str, Any], digest: str) -> Manifest:
    source, metadata = _mapping(document, "source"), _mapping(document, "metadata")
    hot, experts = _mapping(document, "hot"), _mapping(document, "experts")
    tensors, table = _tensors(hot)
    kinds = [_kind(item) for item in _items(experts, "kinds")]
    found = Manifest(
        source=_text(source, "path", 1 << 16),
        files=tuple(_source_file(item) for item in _items(source, "files")),
        architecture=_text(document, "architecture"),
        inexact={str(key): str(value) for key, value in _mapping(document, "inexact").items()},
        metadata_bytes=_integer(metadata.get("bytes"), "metadata bytes"),
        metadata_digest=_text(metadata, "sha256"),
        tensors=tensors,
        table=table,
        kinds=kinds,
        digest=digest,
        bits=_document(document, "bits"),
        proof=_document(document, "proof"),
        model=_document(document, "model"),
        **_records(experts, kinds),
    )
    for what, given, right in (
        ("hot.bin", hot.get("bytes"), found.hot_bytes),
        ("experts.bin", experts.get("bytes"), found.expert_bytes),
    ):
        if given != right:
            raise _Damaged(f"{what} should have {right:,} bytes and is given {given!r:.40}")
    return found


def _tensors(hot: Mapping[str, Any]) -> tuple[dict[str, HotTensor], RowTable]:
    """The tensors of hot.bin, one after the other, and the table behind them."""
    tensors: dict[str, HotTensor] = {}
    end = 0
    for item in _items(hot, "tensors"):
        name, shape, format, offset, n_bytes, checksum = _row(item, 6, "a tensor")
        name, shape = _name(name), _shape(shape, (1, 2))
        format = _format(format, shape[-1])
        right = tensor_bytes(shape, format)
        if name in tensors or offset != end or n_bytes != right or (len(shape) == 1 and format.name != "f32"):
            raise _Damaged(f"tensor {name} does not fit: {right:,} bytes at byte {end:,} are expected")
        tensors[name] = HotTensor(name, shape, format, end, right, _checksum(checksum))
        end = round_up(end + right, PAGE)
    name, shape, kind, offset, stride, checksum = _row(hot.get("table"), 6, "the table")
    shape = _shape(shape, (2,))
    if kind not in Type.__members__ or shape[1] % gguf.GGML_QUANT_SIZES[Type[kind]][0]:
        raise _Damaged(f"the table's type is {kind!r:.40}")
    if offset != end or stride != table_stride(Type[kind], shape[1]):
        raise _Damaged(f"the table does not fit: it should begin at byte {end:,}")
    return tensors, RowTable(_name(name), (shape[0], shape[1]), Type[kind], end, stride, _checksum(checksum))


def _kind(item: Any) -> Parts:
    """The three projections of a form of records."""
    given = []
    for part in _row(item, 3, "a kind of record"):
        format, shape, _ = _row(part, 3, "a projection")
        shape = _shape(shape, (2,))
        given.append(((shape[0], shape[1]), _format(format, shape[1])))
    parts = place_parts(given)
    if [part[2] for part in item] != [part.offset for part in parts]:
        raise _Damaged("the projections of a record are not one after the other")
    return parts


def _records(experts: Mapping[str, Any], kinds: list[Parts]) -> dict[str, Any]:
    """The tables of records, which lie one after the other, by layer, then by expert."""
    shape = tuple(_integer(experts.get(key), key, _MAX_COUNT) for key in ("layers", "per_layer"))
    records = _items(experts, "records")
    if len(records) > math.prod(shape) or math.prod(shape) > 1 << 24:
        raise _Damaged(f"{len(records):,} records for {shape[0]:,} layers of {shape[1]:,} experts")
    kind, offset, size = np.full(shape, -1, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    checksums = np.zeros(shape, np.uint64)
    sizes = [record_size(parts) for parts in kinds]
    end, before = 0, (-1, -1)
    for item in records:
        layer, expert, variant, form, at, n_bytes, checksum = _row(item, 7, "a record")
        place = (_integer(layer, "a record's layer", shape[0] - 1), _integer(expert, "its expert", shape[1] - 1))
        form = _integer(form, "its kind", len(kinds) - 1)
        if place <= before or variant != 0 or at != end or n_bytes != sizes[form]:
            raise _Damaged(f"the record of layer {place[0]}, expert {place[1]} does not fit at byte {end:,}")
        kind[place], offset[place], size[place], checksums[place] = form, end, n_bytes, _checksum(checksum)
        end, before = end + n_bytes, place
        if end > _MAX_SIZE:
            raise _Damaged("the records are larger than any file")
    return {"record_kind": kind, "record_offset": offset, "record_bytes": size, "record_checksum": checksums}


def _source_file(item: Any) -> SourceFile:
    name, n_bytes, mtime = _row(item, 3, "a source file")
    if not isinstance(name, str) or type(mtime) is not int:
        raise _Damaged("a source file has no name or time")
    return SourceFile(name, _integer(n_bytes, "a source file's size"), mtime)


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key)
    if not isinstance(value, dict):
        raise _Damaged(f'it has no "{key}"')
    return value


def _document(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """One of the documents that others left; empty where it is absent."""
    found = document.get(key, {})
    if wrong := bundle_documents.problem(found):
        raise _Damaged(f'its "{key}" is damaged: {wrong}')
    return found


def _items(document: Mapping[str, Any], key: str) -> list[Any]:
    value = document.get(key)
    if not isinstance(value, list):
        raise _Damaged(f'it has no list "{key}"')
    return value


def _row(item: Any, length: int, what: str) -> list[Any]:
    if not isinstance(item, list) or len(item) != length:
        raise _Damaged(f"{what} is not a row of {length}")
    return item


def _integer(value: Any, what: str, most: int = _MAX_SIZE) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise _Damaged(f"{what} is {value!r:.40}, not a number from 0 to {most:,}")
    return value


def _text(document: Mapping[str, Any], key: str, longest: int = _MAX_NAME) -> str:
    value = document.get(key)
    if not isinstance(value, str) or len(value) > longest:
        raise _Damaged(f'"{key}" is not a text')
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME or not value.isprintable():
        raise _Damaged(f"the name {value!r:.40} is none")
    return value


def _shape(value: Any, dimensions: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) not in dimensions:
        raise _Damaged(f"the shape {value!r:.40} is none")
    shape = tuple(_integer(n, "a dimension", 1 << 31) for n in value)
    if not 0 < math.prod(shape) < _MAX_SIZE:
        raise _Damaged(f"the shape {value!r:.40} is impossible")
    return shape


def _format(value: Any, n_in: int) -> Format:
    format = FORMATS.get(value) if isinstance(value, str) else None
    if format is None or n_in % format.block:
        raise _Damaged(f"the format {value!r:.40} is unknown or not one for rows of {n_in:,}")
    return format


def _checksum(value: Any) -> int:
    if not isinstance(value, str) or len(value) != 16 or not set(value) <= set("0123456789abcdef"):
        raise _Damaged(f"{value!r:.40} is no checksum")
    return int(value, 16)
