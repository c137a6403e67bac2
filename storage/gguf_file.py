"""A GGUF model as one table of tensors, over one file or all parts of a split model.

Opening reads the headers only (gguf_header.py); tensor data are read on demand, at their position, as raw
bytes. Which tensors a model must have, and what they mean, is not known here.
"""

from __future__ import annotations

import io
import mmap
import os
import re
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import EdgertError, MemoryLimitError, ModelFileError
from edgert.storage.flash import open_regular
from edgert.storage.gguf_header import HeaderReader
from edgert.storage.gguf_values import Metadata
from edgert.storage.gguf_values import TensorInfo as TensorInfo

_PAGE = mmap.PAGESIZE
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GgufFile:
    """An open GGUF model; use `GgufFile.open(path)`, best in a `with` statement.

    Reads are positional, so one open file may be read from several threads. Without `keep_pages` what was read is taken
    out of the page cache: for who reads all of a file once, under a memory limit that may count the cache. With
    `header_only` the files may be the beginnings of such, whose tensors nobody will read.
    """

    path: Path  # the file that was opened: of a split model the first part
    parts: tuple[Path, ...]  # all files, in order
    metadata: Metadata  # of the first part, where a split model has it
    tensors: dict[str, TensorInfo]  # of all parts, in the order of the files
    n_bytes: int  # size of all files

    def __init__(self, path: str | os.PathLike[str], *, keep_pages: bool = True, header_only: bool = False) -> None:
        self.path, self._keeps_pages, self._header_only = Path(path), True, header_only
        with ExitStack() as stack:
            self._files = [stack.enter_context(_open(self.path))]
            self.metadata, self.tensors = HeaderReader(self._files[0], self.path, header_only=header_only).parse()
            self.parts = _part_paths(self.path, self.metadata)
            for number in range(1, len(self.parts)):
                self._files.append(stack.enter_context(self._open_part(number)))
                self._add_part(number)
            if len(self.parts) > 1:
                self._check_total()
            self.n_bytes = sum(os.fstat(file.fileno()).st_size for file in self._files)
            if not keep_pages:
                self.keep_no_pages()
            self._stack = stack.pop_all()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, keep_pages: bool = True, header_only: bool = False) -> GgufFile:
        """Open a model, of a split model by its first part, reading no tensor data.

        Raises ModelFileError for a file that is absent, unreadable, not GGUF, truncated or inconsistent, and
        UnsupportedError for a sound one of a version, byte order or tensor type that edgert does not read.
        """
        return cls(path, keep_pages=keep_pages, header_only=header_only)

    def close(self) -> None:
        """Close all files; a second call does nothing."""
        self._stack.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def keep_no_pages(self) -> None:
        """From now on let what was read leave the page cache at once, where that can be asked for.

        Without reading ahead: that makes pages of megabytes, of which none goes before all of it is dropped.
        """
        if hasattr(os, "posix_fadvise"):
            self._keeps_pages = False
            for file in self._files:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def info(self, name: str) -> TensorInfo:
        """The tensor of that name, or ModelFileError if the model has none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelFileError(
                f"{self.path}: tensor '{name}' is missing ({len(self.tensors)} others are"
                " there); the model is incomplete: convert or download it again"
            ) from None

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a whole tensor: uint8 (n_bytes,)."""
        info = self.info(name)
        return self._read(info, info.offset, info.n_bytes)

    def read_rows(self, name: str, first_row: int, n_rows: int) -> npt.NDArray[np.uint8]:
        """The bytes of some rows of a tensor: uint8 (n_rows, row_bytes).

        Rows run along the last dimension and are counted over all others: shape (8, 64, 32) has 512 rows.
        """
        info = self.info(name)
        if first_row < 0 or n_rows < 0 or first_row + n_rows > info.n_rows:
            raise IndexError(f"rows {first_row} to {first_row + n_rows} of '{name}', which has {info.n_rows}")
        raw = self._read(info, info.offset + first_row * info.row_bytes, n_rows * info.row_bytes)
        return raw.reshape(n_rows, info.row_bytes)

    def _read(self, info: TensorInfo, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        where = f"{self.parts[info.part]}: reading tensor '{info.name}'"
        try:
            raw = np.empty(n_bytes, np.uint8)
        except MemoryError as error:
            raise MemoryLimitError(
                f"{where} needs {n_bytes:,} bytes of memory, which are not free;"
                " close other programs or take a smaller model"
            ) from error
        view, done = raw.data, 0
        while done < n_bytes:
            try:
                got = os.preadv(self._files[info.part].fileno(), [view[done:]], offset + done)
            except ValueError as error:
                raise ModelFileError(f"{where} after the file was closed; open it again") from error
            except OSError as error:
                raise ModelFileError(
                    f"{where} at byte {offset + done:,} failed: {error.strerror};"
                    " check the disk, or copy the file again"
                ) from error
            if got == 0:
                raise ModelFileError(
                    f"{where}: the file now ends at byte {offset + done:,},"
                    f" {n_bytes - done:,} bytes too early; download it again"
                )
            done += got
        if not self._keeps_pages:
            start, end = offset // _PAGE * _PAGE, -(-(offset + n_bytes) // _PAGE) * _PAGE
            os.posix_fadvise(self._files[info.part].fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
        return raw

    def _open_part(self, number: int) -> io.FileIO:
        try:
            return _open(self.parts[number])
        except ModelFileError as error:
            if self.parts[number].exists():
                raise
            raise ModelFileError(
                f"{self.parts[number]}: missing, the model has {len(self.parts)} parts;"
                " download this one into the same folder"
            ) from error

    def _add_part(self, number: int) -> None:
        path = self.parts[number]
        metadata, tensors = HeaderReader(self._files[number], path, number, header_only=self._header_only).parse()
        for key, expected in (("split.no", number), ("split.count", len(self.parts))):
            if _integer(metadata, key) != expected:
                raise _wrong_key(
                    path, metadata, key, f"but its name and the first part ask for {expected}; download the parts again"
                )
        twice = self.tensors.keys() & tensors.keys()
        if twice:
            raise ModelFileError(f"{path}: tensor '{min(twice)}' is in an earlier part too; download the parts again")
        self.tensors.update(tensors)

    def _check_total(self) -> None:
        if _integer(self.metadata, "split.tensors.count") != len(self.tensors):
            raise _wrong_key(
                self.path,
                self.metadata,
                "split.tensors.count",
                f"but the {len(self.parts)} parts hold {len(self.tensors)} tensors; download the parts again",
            )


def _open(path: Path) -> io.FileIO:
    return io.FileIO(open_regular(path, ".gguf "))


def _integer(metadata: Metadata, key: str) -> int | None:
    value = metadata.get(key)
    return value if type(value) is int else None


def _wrong_key(path: Path, metadata: Metadata, key: str, problem: str) -> EdgertError:
    value: Any = metadata.get(key, "absent")
    return ModelFileError(f"{path}: key '{key}' is {value!r:.60}, {problem}")


def _part_paths(path: Path, metadata: Metadata) -> tuple[Path, ...]:
    """All files of the model whose first part is `path`: only that one unless split.count says otherwise."""
    if "split.count" not in metadata:
        return (path,)
    count, number = _integer(metadata, "split.count"), _integer(metadata, "split.no")
    if count is None or not 0 <= count <= 99_999:
        raise _wrong_key(path, metadata, "split.count", "not a number of parts; download the file again")
    if count <= 1:
        return (path,)
    if number is None or not 0 <= number < count:
        raise _wrong_key(path, metadata, "split.no", f"not one of {count} parts; download the file again")
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count or int(match["number"]) != number + 1:
        raise ModelFileError(
            f"{path}: this is part {number + 1} of {count} (key 'split.count'), but its name"
            f" does not end in -{number + 1:05}-of-{count:05}.gguf; give it its name back"
        )
    paths = tuple(path.with_name(f"{match['stem']}-{i + 1:05}-of-{count:05}.gguf") for i in range(count))
    if number != 0:
        raise ModelFileError(
            f"{path}: this is part {number + 1} of {count} (key 'split.no'); open the first part, {paths[0].name}"
        )
    return paths
