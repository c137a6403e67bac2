"""A bundle on flash: the folder NAME.edge with one packed model.

    manifest.json   where everything lies, with checksums; see bundle_manifest.py
    metadata.gguf   GGUF's keys: configuration, tokenizer, chat template, sampling
    hot.bin         resident tensors in kernel layout, each at a multiple of 4,096; then the embedding table's rows
    experts.bin     expert records by layer, then expert: gate | up | down, each record at a multiple of 4,096

Opening reads the first two and checks the sizes of the others. Reads are positional, so any thread may read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import ModelFileError
from edgert.quant.checksum import checksum
from edgert.quant.formats import PackedPart
from edgert.storage import bundle_manifest as manifests
from edgert.storage.bundle_manifest import HotTensor, Manifest, Parts, RowTable
from edgert.storage.flash import FlashFile
from edgert.storage.gguf_file import GgufFile
from edgert.storage.read_ahead import read_ahead

Bytes = npt.NDArray[np.uint8]

MANIFEST, METADATA, HOT, EXPERTS = "manifest.json", "metadata.gguf", "hot.bin", "experts.bin"
PROFILE, CHOICE = "profile.npz", "choice.json"  # of a bundle whose bits were chosen: what they rest on, and defaults
FILES = (MANIFEST, METADATA, HOT, EXPERTS)
REMEDY = "the bundle is damaged: remove it and pack the model again"


class Bundle:
    """An open bundle; use `Bundle.open(path)`, best in a `with` statement."""

    path: Path
    manifest: Manifest
    metadata: Mapping[str, Any]  # GGUF's keys
    tensors: dict[str, HotTensor]  # of hot.bin, by GGUF's names; output.weight is always there, attn_qkv never
    table: RowTable  # token_embd.weight
    n_bytes: int  # of all files
    experts_path: Path
    hot_path: Path
    experts: FlashFile
    hot: FlashFile
    record_bytes: npt.NDArray[np.int64]  # (n_layers, n_expert), multiples of 4096; 0 in a layer without experts
    record_offset: npt.NDArray[np.int64]
    record_checksum: npt.NDArray[np.uint64]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.hot_path, self.experts_path = self.path / HOT, self.path / EXPERTS
        self.manifest = m = read_manifest(self.path)
        self.tensors, self.table = m.tensors, m.table
        self.record_bytes, self.record_offset, self.record_checksum = m.record_bytes, m.record_offset, m.record_checksum
        metadata = _read_file(self.path / METADATA, m.metadata_bytes)
        if hashlib.sha256(metadata).hexdigest() != m.metadata_digest:
            raise ModelFileError(f"{self.path / METADATA}: its digest is not the one in the manifest; {REMEDY}")
        with GgufFile.open(self.path / METADATA) as file:
            self.metadata = file.metadata
        self.hot = _open_sized(self.hot_path, m.hot_bytes)
        try:
            self.experts = _open_sized(self.experts_path, m.expert_bytes)
        except ModelFileError:
            self.hot.close()
            raise
        self.n_bytes = m.hot_bytes + m.expert_bytes + sum((self.path / n).stat().st_size for n in (MANIFEST, METADATA))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open a bundle, reading no weights.

        Raises ModelFileError for a folder that is no bundle, or a damaged one, UnsupportedError for one of a newer
        format version.
        """
        return cls(path)

    def parts(self, layer: int, expert: int) -> Parts:
        """Where gate, up and down lie within a record."""
        kind = int(self.manifest.record_kind[layer, expert])
        if kind < 0:
            raise IndexError(f"layer {layer} has no expert {expert}")
        return self.manifest.kinds[kind]

    def read_tensor(self, name: str, out: Bytes) -> None:
        """Read a hot tensor into uint8 (n_bytes,). ModelFileError if its checksum is wrong."""
        tensor = self.tensors[name]
        self.hot.read(tensor.offset, out)
        self._check(checksum(out), tensor.checksum, self.hot_path, f"tensor {name}", tensor.offset)

    def read_table_rows(self, rows: Sequence[int]) -> Bytes:
        """Rows of the embedding table in its ggml type: uint8 (n, row_bytes). ModelFileError: damaged ones."""
        jobs = [partial(self._read_table_row, row) for row in rows]
        read = read_ahead(jobs, n_threads=4, n_ahead=64) if len(jobs) > 4 else (job() for job in jobs)
        return np.stack(list(read))

    def _read_table_row(self, row: int) -> Bytes:
        table = self.table
        if not 0 <= row < table.shape[0]:
            raise IndexError(f"row {row} of {table.name}, which has {table.shape[0]}")
        raw, offset = np.empty(table.stride, np.uint8), table.offset + row * table.stride
        self.hot.read(offset, raw)
        kept = int(raw[-8:].view(np.uint64)[0])
        raw[-8:] = 0
        self._check(checksum(raw), kept, self.hot_path, f"row {row} of {table.name}", offset)
        return raw[: table.row_bytes]

    def read_record(self, layer: int, expert: int, out: Bytes) -> None:
        """Read a whole record into uint8 (record_bytes[layer, expert],). ModelFileError if its checksum is wrong."""
        self.experts.read(int(self.record_offset[layer, expert]), out)
        self.check_record(layer, expert, out)

    def check_record(self, layer: int, expert: int, record: Bytes) -> None:
        """Raise ModelFileError if the bytes of a record are not those that were packed."""
        offset, kept = int(self.record_offset[layer, expert]), int(self.record_checksum[layer, expert])
        self._check(checksum(record), kept, self.experts_path, f"layer {layer}, expert {expert}", offset)

    def _check(self, found: int, kept: int, path: Path, what: str, offset: int) -> None:
        if found != kept:
            raise ModelFileError(damage(path, what, offset, found, kept))

    def close(self) -> None:
        """Close all files; a second call does nothing."""
        self.hot.close()
        self.experts.close()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_bundle(path: Path) -> bool:
    """Whether a path looks like a bundle: a folder with a manifest."""
    return (path / MANIFEST).is_file()


def size(path: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in path.iterdir())


def read_manifest(path: Path) -> Manifest:
    """The manifest of the bundle in a folder; raises as Bundle.open does."""
    if not path.is_dir():
        raise ModelFileError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; name a bundle (.edge)")
    if not (path / MANIFEST).exists():
        raise ModelFileError(f"{path}: not a bundle, it holds no {MANIFEST}; name a folder that `edgert pack` made")
    return manifests.parse(_read_file(path / MANIFEST, None), str(path / MANIFEST))


def damage(path: Path, what: str, offset: int, found: int, kept: int) -> str:
    """The message about bytes that are not those that were packed."""
    return f"{path}: {what} at byte {offset:,} has checksum {found:016x}, not {kept:016x}; {REMEDY}"


def _read_file(path: Path, n_bytes: int | None) -> bytes:
    """A small file of a bundle as a whole; ModelFileError if it has not `n_bytes` or cannot be read."""
    with _open_sized(path, n_bytes) as file:
        if file.n_bytes > manifests.MAX_BYTES:
            raise ModelFileError(f"{path}: it has more than {manifests.MAX_BYTES:,} bytes; {REMEDY}")
        content = np.empty(file.n_bytes, np.uint8)
        file.read(0, content)
    return content.tobytes()


def _open_sized(path: Path, n_bytes: int | None) -> FlashFile:
    """Open a regular file, of that size."""
    file = FlashFile(path)
    if n_bytes not in (None, file.n_bytes):
        file.close()
        raise ModelFileError(f"{path}: it has {file.n_bytes:,} bytes, the manifest says {n_bytes:,}; {REMEDY}")
    return file


def part_of(record: Bytes, part: PackedPart) -> Bytes:
    """The tiles of one projection within a record: uint8 (part.n_bytes,)."""
    return record[part.offset : part.offset + part.n_bytes]
