"""Which model a file holds: a digest that is cheap to make and tells one set of weights from another.

It covers the metadata that matter, the table of tensors and a few rows of each tensor, not every byte: a profile is to
be refused for another model, not to prove that a file is whole.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from edgert.storage.bundle import Bundle
from edgert.storage.tensor_file import TensorFile

_ROW_BYTES = 4096  # of a row that count
_NAMES = ("split.", "general.")  # keys that say what a model is called and how it is cut into files, not what it does


def model_digest(file: TensorFile | Bundle) -> str:
    """The digest of a model, 32 hexadecimal digits; of a bundle that keeps its source's weights, that of the source.

    ModelFileError for a file that cannot be read.
    """
    if isinstance(file, Bundle):
        m = file.manifest
        return str(m.model.get("digest")) if m.model and not m.bits else m.content()[:32]
    digest = hashlib.sha256()
    for key in sorted(file.metadata):
        if not key.startswith(_NAMES):
            digest.update(key.encode() + b"\0" + _bytes_of(file.metadata[key]) + b"\0")
    for name in sorted(file.tensors):
        tensor = file.tensors[name]
        digest.update(f"{name} {tensor.shape} {tensor.type.name}".encode())
        for row in sorted({0, tensor.n_rows // 2, tensor.n_rows - 1}):
            digest.update(file.read_rows(name, row, 1)[:, :_ROW_BYTES].tobytes())
    return digest.hexdigest()[:32]


def _bytes_of(value: Any) -> bytes:
    """A metadata value as bytes: numbers, texts, arrays or lists of texts."""
    if isinstance(value, np.ndarray):
        return str(value.dtype).encode() + value.tobytes()
    if isinstance(value, list):
        return "\0".join(map(str, value)).encode("utf-8", "surrogatepass")
    return repr(value).encode("utf-8", "surrogatepass")
