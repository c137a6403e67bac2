"""Bundles that edgert packs by itself when a model's file is run: kept in the user's cache folder, packed anew when the
file changes, listed and removed here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgert.errors import EdgertError, OptionError, StorageError
from edgert.pack import is_current, pack, stem
from edgert.pack_place import try_lock
from edgert.storage import bundle as bundles
from edgert.weights import Progress

_PART, _OLD = ".part", ".old"


@dataclass(frozen=True)
class CachedModel:
    """A bundle in the cache, or a half-packed one."""

    name: str
    path: Path
    source: str  # what it was packed from; empty: not known
    state: str  # current, changed (the source has), missing (the source is), damaged, unfinished
    n_bytes: int
    used: float  # when it was last asked for, in seconds since 1970


def cache_folder() -> Path:
    """Where packed models are kept: $XDG_CACHE_HOME/edgert/models, or ~/.cache/edgert/models."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "edgert" / "models"
    except RuntimeError as error:
        raise StorageError("there is no home folder to keep packed models in: set XDG_CACHE_HOME") from error


def cached_path(source: Path) -> Path:
    """Where the bundle of a model's file is kept."""
    place = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:8]
    return cache_folder() / f"{stem(source.absolute())[:80]}-{place}.edge"


def cached_bundle(source: Path, progress: Progress) -> Path:
    """The bundle of a model's file, packed now if it is not in the cache, or the file has changed.

    Raises StorageError where the cache cannot be written or the disk is full, and what opening the source raises.
    """
    out = cached_path(source)
    if is_current(out, source):
        with contextlib.suppress(OSError):
            os.utime(out)  # its last use, for `edgert cache list`
        return out
    try:
        out.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(out.parent, os.W_OK | os.X_OK)
        reason = "read-only"
    except OSError as error:
        writable, reason = False, error.strerror or str(error)
    if not writable:
        raise StorageError(
            f"{out.parent}: the cache cannot be written ({reason}); set XDG_CACHE_HOME to a folder that can, or run "
            f"`edgert pack {source} OUT.edge` and use OUT.edge"
        )
    try:
        return pack(source, out, progress=progress)
    except StorageError as error:
        hint = "`edgert cache list` shows what the cache holds, XDG_CACHE_HOME moves it"
        raise StorageError(f"{error}; {hint}") from error


def cached_models() -> list[CachedModel]:
    """All that is in the cache, what was used last first."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in cache_folder().iterdir():
            with contextlib.suppress(OSError):  # removed meanwhile
                found.append(_described(path))
    return sorted(found, key=lambda model: -model.used)


def _described(path: Path) -> CachedModel:
    name = path.name.removesuffix(_PART).removesuffix(_OLD).removesuffix(".edge")
    source, state = "", "damaged"
    if path.name.endswith((_PART, _OLD)):
        state = "unfinished"
    else:
        with contextlib.suppress(EdgertError):
            source = bundles.read_manifest(path).source
            state = "current" if is_current(path, Path(source)) else "changed"
            state = state if Path(source).exists() else "missing"
    return CachedModel(name, path, source, state, bundles.size(path), path.stat().st_mtime)


def remove(names: Sequence[str]) -> Iterator[CachedModel]:
    """Remove models from the cache, by name or by the file that they were packed from; gives each as it is gone.

    Raises OptionError for a name that is none, or of a model that another process packs just now.
    """
    models = cached_models()
    for name in names:
        wanted = [model for model in models if _is_meant(model, name)]
        if not wanted:
            there = ", ".join(dict.fromkeys(model.name for model in models)) or "nothing"
            raise OptionError(f"{name!r} is not in the cache, which holds {there}")
        for model in wanted:
            _remove(model)
            yield model


def _is_meant(model: CachedModel, name: str) -> bool:
    if name in (model.name, model.path.name, str(model.path)):
        return True
    return bool(model.source) and model.source == str(Path(name).resolve())


def _remove(model: CachedModel) -> None:
    """Remove the folder; its manifest goes first, so that a kill leaves nothing that looks whole."""
    try:
        folder = os.open(model.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # by another process
    try:
        if not try_lock(folder):
            raise OptionError(f"{model.path} is being packed by another process: stop that first")
        with contextlib.suppress(FileNotFoundError):
            (model.path / bundles.MANIFEST).unlink()
        shutil.rmtree(model.path)
    except OSError as error:
        raise StorageError(
            f"{model.path}: it cannot be removed ({error.strerror}); check the folder's owner"
        ) from error
    finally:
        os.close(folder)
