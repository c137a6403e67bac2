"""What packing and loading need of a model's file, whatever its format: metadata, a table of tensors, their rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType


class TensorEntry(Protocol):
    """One tensor. Rows run along the last dimension and are counted over all others."""

    @property
    def name(self) -> str:
        """Its name, as GGUF has it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Slowest dimension first."""

    @property
    def type(self) -> GGMLQuantizationType:
        """How its weights are stored."""

    @property
    def n_bytes(self) -> int:
        """Bytes as stored."""

    @property
    def n_rows(self) -> int:
        """The product of all dimensions but the last."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""


class TensorFile(Protocol):
    """An open model: a GgufFile, or another format that looks like one. Errors are ModelFileError."""

    @property
    def path(self) -> Path:
        """The file or folder that was opened."""

    @property
    def parts(self) -> tuple[Path, ...]:
        """All files that the model is read from: if one of them changes, so does the model."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """GGUF's keys: int, float, bool, str, numpy array, or list[str]."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """By name."""

    @property
    def n_bytes(self) -> int:
        """Size of all files."""

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a whole tensor: uint8 (n_bytes,)."""

    def read_rows(self, name: str, first_row: int, n_rows: int) -> npt.NDArray[np.uint8]:
        """The bytes of some rows of a tensor: uint8 (n_rows, row_bytes)."""

    def close(self) -> None:
        """Close all files."""
