"""A Hugging Face folder (config.json, safetensors, tokenizer.json) as if it were an open GGUF file: the same keys, the
same names and shapes of tensors, rows in the same order.

Opening reads headers and JSON files only; tensor data are read on demand, at their position. What the folder asks for
and edgert does not do is refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import MemoryLimitError, ModelFileError
from edgert.huggingface_config import read_folder_config, sampling_keys
from edgert.huggingface_layout import FolderTensor, Stored
from edgert.huggingface_tensors import folder_tensors, row_order
from edgert.huggingface_tokenizer import tokenizer_keys
from edgert.storage.json_file import JsonObject, read_json, short
from edgert.storage.safetensors_file import SafetensorsFile, StoredTensor

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_SHARDS = 4096


def is_huggingface_folder(path: Path) -> bool:
    """Whether a path is a folder that holds a model in Hugging Face's form, sound or not."""
    return path.is_dir() and (path / "config.json").exists()


class HuggingFaceFolder:
    """An open model folder; use `HuggingFaceFolder.open(path)`, best in a `with` statement.

    Reads are positional, so one open folder may be read from several threads.
    """

    path: Path  # the folder
    parts: tuple[Path, ...]  # all files that were read: those with weights first, in order
    metadata: Mapping[str, Any]  # by GGUF's keys
    tensors: dict[str, FolderTensor]  # by GGUF's names
    n_bytes: int  # size of all files

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        config_path = self.path / "config.json"
        if not self.path.is_dir():
            raise ModelFileError(f"{self.path}: no such folder; check the path")
        config_file = read_json(config_path)
        config = read_folder_config(config_file)
        self._last: tuple[Stored, int, int, npt.NDArray[np.uint8]] | None = None  # see _read_for_form
        with ExitStack() as stack:
            self._files: list[SafetensorsFile] = []
            stored, index = self._open_shards(stack)
            self.tensors = folder_tensors(stored, config, str(self.path))
            generation, read = self._optional_json("generation_config.json")
            keys, words = tokenizer_keys(self.path, config.n_vocab, config_file, generation)
            self.metadata = {
                **config.metadata,
                "general.name": _name(self.path),
                **sampling_keys(generation),
                **keys,
            }
            self.parts = (*(file.path for file in self._files), *index, config_path, *read, *words)
            self.n_bytes = sum(part.stat().st_size for part in self.parts)
            self._stack = stack.pop_all()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> HuggingFaceFolder:
        """Open a folder, reading no tensor data.

        Raises ModelFileError for files that are absent, unreadable, truncated or inconsistent, TokenizerError for a
        vocabulary that contradicts itself, and UnsupportedError for a sound folder that asks for what edgert does not
        do.
        """
        return cls(path)

    def close(self) -> None:
        """Close all files; a second call does nothing."""
        self._last = None
        self._stack.close()

    def __enter__(self) -> HuggingFaceFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def info(self, name: str) -> FolderTensor:
        """The tensor of that name, or ModelFileError if the model has none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelFileError(
                f"{self.path}: tensor '{name}' is missing ({len(self.tensors)} others are"
                " there); the model is incomplete: download it again"
            ) from None

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a whole tensor: uint8 (n_bytes,)."""
        return self.read_rows(name, 0, self.info(name).n_rows).reshape(-1)

    def read_rows(self, name: str, first_row: int, n_rows: int) -> npt.NDArray[np.uint8]:
        """The bytes of some rows of a tensor: uint8 (n_rows, row_bytes).

        Rows run along the last dimension and are counted over all others: shape (8, 64, 32) has 512 rows.
        """
        info = self.info(name)
        if first_row < 0 or n_rows < 0 or first_row + n_rows > info.n_rows:
            raise IndexError(f"rows {first_row} to {first_row + n_rows} of '{name}', which has {info.n_rows}")
        if info.form is not None:
            return info.form.rows(self._read_for_form, first_row, n_rows)
        if not info.half_head:
            return self._rows(info, first_row, n_rows)
        if len(info.shape) == 1:  # a bias: its elements are what rows are elsewhere
            elements = self._rows(info, first_row, n_rows).reshape(-1, info.n_bytes // info.shape[0])
            elements = elements[: n_rows * info.shape[0]]
            return elements[row_order(range(len(elements)), info.half_head)].reshape(n_rows, info.row_bytes)
        head = 2 * info.half_head
        start, end = first_row // head * head, -(-(first_row + n_rows) // head) * head
        order = row_order(range(first_row, first_row + n_rows), info.half_head)
        return self._rows(info, start, end - start)[order - start]

    def _rows(self, info: FolderTensor, first_row: int, n_rows: int) -> npt.NDArray[np.uint8]:
        """Rows as the files have them, from as many runs as it takes."""
        if info.values is not None:
            first, last = first_row * info.row_bytes, (first_row + n_rows) * info.row_bytes
            return info.values[first:last].reshape(n_rows, info.row_bytes).copy()
        return self._stored(Stored(info.name, info.runs, info.n_bytes, info.row_bytes), first_row, n_rows)

    def _read_for_form(self, stored: Stored, first_row: int, n_rows: int) -> npt.NDArray[np.uint8]:
        """Rows that a form makes others of. The last ones are kept: they are asked for again, where gate and up are
        dealt out of the same, or some of a matrix need all of it."""
        last = self._last
        if last is None or last[0] is not stored or last[1:3] != (first_row, n_rows):
            self._last = last = (stored, first_row, n_rows, self._stored(stored, first_row, n_rows))
        return last[3]

    def _stored(self, stored: Stored, first_row: int, n_rows: int) -> npt.NDArray[np.uint8]:
        first, n_bytes = first_row * stored.row_bytes, n_rows * stored.row_bytes
        try:
            raw = np.empty(n_bytes, np.uint8)
        except MemoryError as error:
            raise MemoryLimitError(
                f"{self.path}: reading tensor '{stored.name}' needs {n_bytes:,} bytes of memory, which are not free;"
                " close other programs or take a smaller model"
            ) from error
        run_bytes, done = stored.n_bytes // len(stored.runs), 0
        while done < n_bytes:
            number, inside = divmod(first + done, run_bytes)
            amount = min(run_bytes - inside, n_bytes - done)
            run = stored.runs[number]
            self._files[run.file].read(run.offset + inside, raw[done : done + amount])
            done += amount
        return raw.reshape(n_rows, stored.row_bytes)

    def _open_shards(self, stack: ExitStack) -> tuple[dict[str, tuple[int, StoredTensor]], tuple[Path, ...]]:
        """Open all files with weights; their tensors by name with the number of the file, and the index if there is."""
        index_path = self.path / _INDEX
        weight_map: dict[str, Any] = {}
        names: list[str] = [_WEIGHTS]
        if not (self.path / _WEIGHTS).exists():  # as transformers looks for them
            if not index_path.exists():
                raise ModelFileError(
                    f"{self.path}: neither {_WEIGHTS} nor {_INDEX} is there; edgert reads weights as safetensors: "
                    "download or save the model in that form"
                )
            weight_map = read_json(index_path).object("weight_map").values
            names = _shard_names(weight_map, index_path)
        stored: dict[str, tuple[int, StoredTensor]] = {}
        for number, name in enumerate(names):
            file = SafetensorsFile(self.path / name)
            stack.callback(file.close)
            self._files.append(file)
            if twice := stored.keys() & file.tensors.keys():
                raise ModelFileError(
                    f"{file.path}: the tensor {short(min(twice))} is in an earlier file too; download the files again"
                )
            stored |= {tensor: (number, place) for tensor, place in file.tensors.items()}
        for tensor, name in weight_map.items():
            if tensor not in stored or names[stored[tensor][0]] != name:
                raise ModelFileError(
                    f"{index_path}: the tensor {short(tensor)} should be in {short(name)}, but is not; "
                    "download the files again"
                )
        return stored, (index_path,) if weight_map else ()

    def _optional_json(self, name: str) -> tuple[JsonObject, tuple[Path, ...]]:
        path = self.path / name
        return (read_json(path), (path,)) if path.exists() else (JsonObject({}, str(path)), ())


def _shard_names(weight_map: dict[str, Any], index: Path) -> list[str]:
    """The files that an index names, each a plain name in its own folder."""
    for name in weight_map.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or "/" in name or "\0" in name:
            raise ModelFileError(
                f"{index}: {short(name)} is not the name of a safetensors file beside it; download it again"
            )
    names = sorted(set(weight_map.values()))
    if not 1 <= len(names) <= _MAX_SHARDS:
        raise ModelFileError(
            f"{index}: it names {len(names):,} files, 1 to {_MAX_SHARDS:,} are read; download it again"
        )
    return names


def _name(path: Path) -> str:
    """What to call the model: the folder's name, or the repository's where the folder is a snapshot in the hub's cache
    (models--OWNER--NAME/snapshots/REVISION)."""
    path = Path(os.path.abspath(path))
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.rpartition("--")[2]
    return path.name
