"""A tensor of a Hugging Face folder as GGUF would have it: where its bytes lie, and how its rows are made of them.

Most tensors are runs of rows that lie in the files as they are wanted. Where a file deals them out otherwise, a form
says how some rows are made of some rows of the file; nothing is read here but through the reader that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

Bytes = npt.NDArray[np.uint8]


class Run(NamedTuple):
    """Rows that lie side by side: in which of the folder's files, and from which byte."""

    file: int
    offset: int


class Stored(NamedTuple):
    """Rows as the files have them. runs: equally long, in the order of the rows."""

    name: str  # for messages
    runs: tuple[Run, ...]
    n_bytes: int
    row_bytes: int


ReadRows = Callable[[Stored, int, int], Bytes]  # (which, first row, number of rows): uint8 (n_rows, row_bytes)


class Form(Protocol):
    """How rows of a tensor are made."""

    def rows(self, read: ReadRows, first: int, n: int) -> Bytes:
        """Some rows: uint8 (n, row_bytes)."""


@dataclass(frozen=True)
class FolderTensor:
    """A tensor as GGUF would have it, with shape from the slowest dimension to the fastest.

    runs: equally long, in the order of the rows. half_head: of a tensor whose heads' rows are put in turns, one of the
    first half of the head, one of the second, half as many as a head has; else 0. values: of a tensor that no file has.
    form: of a tensor whose rows are made, which has no runs.
    """

    name: str
    shape: tuple[int, ...]
    type: Type
    n_bytes: int
    runs: tuple[Run, ...] = field(repr=False)
    half_head: int = 0
    values: Bytes | None = field(default=None, repr=False)
    form: Form | None = field(default=None, repr=False)

    @property
    def n_rows(self) -> int:
        """Rows along the last dimension: the product of all others."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.n_bytes // self.n_rows


@dataclass(frozen=True)
class Turned:
    """Rows that are columns of the file's matrices, each of `n_in` rows: `first` and then every `step`-th."""

    stored: Stored
    n_in: int
    element_bytes: int
    first: int
    step: int

    def rows(self, read: ReadRows, first: int, n: int) -> Bytes:
        """See Form; reads whole matrices."""
        n_columns = self.stored.row_bytes // self.element_bytes // self.step  # of ours, in each matrix
        parts = [np.empty((0, self.n_in * self.element_bytes), np.uint8)]
        while n:
            matrix, inside = divmod(first, n_columns)
            amount = min(n_columns - inside, n)
            raw = read(self.stored, matrix * self.n_in, self.n_in)
            elements = raw.reshape(self.n_in, -1, self.element_bytes)[:, self.first :: self.step]
            parts.append(elements[:, inside : inside + amount].swapaxes(0, 1).reshape(amount, -1))
            first, n = first + amount, n - amount
        return np.concatenate(parts)


@dataclass(frozen=True)
class EveryOther:
    """Rows of which each has one in two numbers of the file's row."""

    stored: Stored
    element_bytes: int
    first: int

    def rows(self, read: ReadRows, first: int, n: int) -> Bytes:
        """See Form."""
        width = self.stored.row_bytes
        elements = read(self.stored, first, n).reshape(n, width // self.element_bytes, self.element_bytes)
        return elements[:, self.first :: 2].reshape(n, width // 2)


@dataclass(frozen=True)
class Mxfp4:
    """Rows of MXFP4 whose scales lie elsewhere: of the file's rows `first` and then every `step`-th.

    The file has two neighbours in a byte, the first of them in the low half; ggml a number and the one 16 further on.
    """

    blocks: Stored
    scales: Stored
    first: int
    step: int

    def rows(self, read: ReadRows, first: int, n: int) -> Bytes:
        """See Form."""
        picked, n_blocks = slice(self.first, None, self.step), self.scales.row_bytes
        blocks = read(self.blocks, first * self.step, n * self.step)[picked].reshape(n, n_blocks, 16)
        scales = read(self.scales, first * self.step, n * self.step)[picked]  # (n, n_blocks)
        numbers = np.stack((blocks & 15, blocks >> 4), axis=-1).reshape(n, n_blocks, 32)
        halves = numbers[..., :16] | numbers[..., 16:] << 4
        return np.concatenate((scales[..., None], halves), axis=-1).reshape(n, n_blocks * 17)
