"""Tiles of experts that were quantised before, kept until they are packed: a file for each matrix and format.

A second attempt at an allocation, or a pack that goes on after a kill, makes only what is missing; small arrays that
took long to measure are kept likewise. A matrix that depends on what others got is kept under a name that says so. A
folder made under another `header` is emptied.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import StorageError
from edgert.requantised import Place

_HEADER = "header.json"


class TileStore:
    """A folder of tiles; `header` says what they were made from and how. Raises OSError."""

    def __init__(self, folder: Path, header: Any) -> None:
        self.folder, self.header = folder, json.dumps(header, sort_keys=True)
        found = folder / _HEADER
        if folder.exists() and not (found.exists() and found.read_text() == self.header):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(found, self.header.encode())

    def has(self, place: Place, name: str) -> bool:
        """Whether the tiles of a place were made under a name: that of their format, and more."""
        return self._path(place, name).exists()

    def put(self, place: Place, name: str, tiles: npt.NDArray[np.uint8]) -> None:
        """Keep tiles, uint8 (n_bytes,)."""
        write_aside(self._path(place, name), tiles.tobytes())

    def read(self, place: Place, name: str, first: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes of the tiles from `first` on. StorageError if they are not there."""
        path = self._path(place, name)
        found = np.fromfile(path, np.uint8, n_bytes, offset=first)
        if len(found) != n_bytes:
            raise StorageError(f"{path}: {first + n_bytes:,} bytes were kept and are gone; remove it and pack again")
        return found

    def array(self, name: str) -> npt.NDArray[Any] | None:
        """An array that was kept under a name; None where there is none, or a damaged one."""
        try:
            found: npt.NDArray[Any] = np.load(self.folder / f"{name}.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return found

    def put_array(self, name: str, array: npt.NDArray[Any]) -> None:
        """Keep an array."""
        buffer = io.BytesIO()
        np.save(buffer, array)
        write_aside(self.folder / f"{name}.npy", buffer.getvalue())

    def remove(self) -> None:
        """Remove the folder, as far as that is possible."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, place: Place, name: str) -> Path:
        layer, expert, projection = place
        return self.folder / f"{layer}-{expert}-{projection}-{name}"


def write_aside(path: Path, content: bytes) -> None:
    """A file that is there as a whole or not at all."""
    aside = path.with_name(f"{path.name}.part")
    aside.write_bytes(content)
    os.replace(aside, path)
