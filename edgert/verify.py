"""Reading a bundle from end to end: is every byte that a model computes with the one that was packed?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.errors import EdgertError
from edgert.pack_meter import Meter
from edgert.quant.checksum import Checksum
from edgert.storage.bundle import Bundle, damage
from edgert.storage.bundle_manifest import HotTensor, RowTable
from edgert.storage.flash import FlashFile, aligned_buffer
from edgert.storage.read_ahead import read_ahead
from edgert.weights import Progress

_PIECE_BYTES = 4 << 20


class _Sealed(NamedTuple):
    """Bytes with a checksum."""

    file: FlashFile
    path: Path
    what: str
    offset: int
    n_bytes: int
    checksum: int


def verify(path: Path, progress: Progress) -> list[str]:
    """What is wrong with a bundle, a line for each thing; nothing, if it is sound.

    progress is called with what is going on (with MB/s and the time left) and a fraction; it may raise.
    """
    try:
        with Bundle.open(path) as bundle:
            sealed = list(_sealed(bundle))
            meter = Meter(progress, f"verifying {bundle.path.name}", sum(item.n_bytes for item in sealed))
            return list(_problems(sealed, meter))
    except EdgertError as error:
        return [str(error)]


def _sealed(bundle: Bundle) -> Iterator[_Sealed]:
    """All that has a checksum."""
    hot: list[HotTensor | RowTable] = [*bundle.tensors.values(), bundle.table]
    for part in hot:
        what = f"tensor {part.name}"
        yield _Sealed(bundle.hot, bundle.hot_path, what, part.offset, part.n_bytes, part.checksum)
    for layer, expert in np.argwhere(bundle.record_bytes > 0).tolist():
        place, size = int(bundle.record_offset[layer, expert]), int(bundle.record_bytes[layer, expert])
        kept = int(bundle.record_checksum[layer, expert])
        yield _Sealed(bundle.experts, bundle.experts_path, f"layer {layer}, expert {expert}", place, size, kept)


def _problems(sealed: list[_Sealed], meter: Meter) -> Iterator[str]:
    """Read all of it, and tell what is not as it was packed, or cannot be read."""
    pieces = read_ahead(
        partial(_read, item, first, min(_PIECE_BYTES, item.n_bytes - first))
        for item in sealed
        for first in range(0, item.n_bytes, _PIECE_BYTES)
    )
    for item in sealed:
        found, problem = Checksum(), ""
        for _ in range(0, item.n_bytes, _PIECE_BYTES):
            piece = next(pieces)
            if isinstance(piece, str):
                problem = piece
            else:
                found.update(piece)
                meter.add(len(piece), "experts" if item.what.startswith("layer") else "hot weights")
        if problem:
            yield f"{problem} ({item.what})"
        elif found.value() != item.checksum:
            yield damage(item.path, item.what, item.offset, found.value(), item.checksum)


def _read(item: _Sealed, first: int, n_bytes: int) -> npt.NDArray[np.uint8] | str:
    """Some of the bytes, or why they cannot be read."""
    piece = aligned_buffer(-(-n_bytes // 4096) * 4096)[:n_bytes]
    try:
        item.file.read(item.offset + first, piece)
    except EdgertError as error:
        return str(error)
    return piece
