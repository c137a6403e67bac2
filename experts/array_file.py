"""Files of plain arrays (.npz): written aside and renamed, and taken for hostile when they are read.

A table says of each array its kind of numbers and its shape; sizes that have a name must agree over all arrays. What
the numbers mean, and whether they make sense, is their owner's.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgert.errors import ModelFileError
from edgert.storage.aside import written_aside


class Layout(NamedTuple):
    """kinds: of numpy's dtype.kind. shape: extents, each a number or a name."""

    kinds: str
    shape: tuple[int | str, ...] = ()


Check = Callable[[dict[str, Any], dict[str, int]], None]  # gets the arrays and the extents by name; raises ValueError


def read_arrays(
    path: Path,
    table: Mapping[str, Layout],
    check: Check,
    *,
    what: str,
    remedy: str,
    most_bytes: int,
    optional: Sequence[frozenset[str]] = (),
) -> dict[str, Any]:
    """The arrays of a file, all of `table`, those of each set in `optional` together or not at all.

    ModelFileError, which says that it is not `what` and gives the remedy, for a file that is none or lies about itself.
    """
    try:
        arrays = _read(path, table, optional, most_bytes)
        check(arrays, _fit(arrays, table))
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}; {remedy}") from error
    except Exception as error:  # what zipfile, zlib and numpy raise for hostile bytes is an open list
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelFileError(f"{path} is not {what} ({line}); {remedy}") from error
    return arrays


def _read(
    path: Path, table: Mapping[str, Layout], optional: Sequence[frozenset[str]], most_bytes: int
) -> dict[str, Any]:
    """The arrays, if they are those of the table and no larger than they may be."""
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    names = [name for name in table if f"{name}.npy" in sizes]
    missing = set(table) - set(names)
    missing -= {name for group in optional if group <= missing for name in group}
    if missing or set(sizes) != {f"{name}.npy" for name in names}:
        raise ValueError(f"it holds {', '.join(sorted(sizes)[:10]) or 'nothing'}")
    if sum(sizes.values()) > most_bytes:
        raise ValueError(f"it is {sum(sizes.values()):,} bytes unpacked, at most {most_bytes:,} are read")
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in names}


def _fit(arrays: Mapping[str, Any], table: Mapping[str, Layout]) -> dict[str, int]:
    """The extents by name; ValueError unless kinds and shapes are the table's and fit together."""
    extents: dict[str, int] = {}
    for name, array in arrays.items():
        kinds, shape = table[name]
        if array.dtype.kind not in kinds or array.ndim != len(shape):
            raise ValueError(f"{name} has type {array.dtype} and {array.ndim} dimensions")
        for size, expected in zip(array.shape, shape, strict=True):
            if size != (extents.setdefault(expected, size) if isinstance(expected, str) else expected):
                raise ValueError(f"{name} has shape {array.shape}, which does not fit the others")
    return extents


def write_arrays(path: Path, arrays: Mapping[str, Any], *, compress: bool = True) -> None:
    """Write the file aside and put it in its place. Raises OSError."""
    with written_aside(path) as aside, open(aside, "wb") as file:
        (np.savez_compressed if compress else np.savez)(file, **arrays)
        file.flush()
        os.fsync(file.fileno())


def compressed_size(arrays: Mapping[str, Any]) -> int:
    """Bytes of the file that write_arrays writes of them."""
    with io.BytesIO() as file:
        np.savez_compressed(file, **arrays)
        return file.getbuffer().nbytes


def check_record_bytes(sizes: Any) -> None:
    """ValueError unless these are sizes of expert records (n_layers, n_expert), 0 in layers without experts."""
    if sizes.min() < 0 or sizes.max() > 1 << 40 or not sizes.any() or ((sizes > 0).any(1) != (sizes > 0).all(1)).any():
        raise ValueError("record_bytes has sizes that no record has")


def check_ids(ids: Any, n_expert: int) -> None:
    """ValueError unless ids (n_layers, n_tokens, top_k) are different experts for each token."""
    for layer in ids:
        ordered = np.sort(layer, axis=1)
        if ordered.size and (ordered.max() >= n_expert or (ordered[:, 1:] == ordered[:, :-1]).any()):
            raise ValueError(f"ids are not {layer.shape[1]} different ones below {n_expert}")
