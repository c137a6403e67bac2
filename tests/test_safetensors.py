"""Files of safetensors by themselves: hostile and damaged ones in one line each, and sound ones as they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgert.errors import ModelFileError
from edgert.storage.safetensors_file import SafetensorsFile


def stored(path: Path, entries: Any, data: bytes = b"", n_header: int | None = None) -> Path:
    """A safetensors file with any header."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes((len(header) if n_header is None else n_header).to_bytes(8, "little") + header + data)
    return path


def entry(kind: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": offsets}


DAMAGED_FILES: list[tuple[Any, bytes, int | None, str]] = [
    (b"", b"", 0, "its header would have 0 bytes"),
    (b"{}", b"", 1 << 63, "its header would have 9,223,372,036,854,775,808 bytes"),
    (b"{}", b"", 3, "its header would have 3 bytes, the file has 10"),
    (b"{}", bytes(1 << 20), 100_000_001, "its header would have 100,000,001 bytes"),
    (b"[]", b"", None, "not a safetensors file"),
    (b"{]", b"", None, "the header: no sound JSON"),
    (b'{"a":\xff}', b"", None, "the header: no sound JSON: .*utf-8"),
    (b'{"a":1,"a":1}', b"", None, "no sound JSON: the key 'a' is there twice"),
    (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", None, "no sound JSON: it is nested too deep"),
    (b'{"a":' + b"9" * 50 + b"}", b"", None, "no sound JSON: a number of 50 digits"),
    (b'{"a":NaN}', b"", None, "no sound JSON: NaN is no JSON number"),
    (b'{"a":"\\ud800"}', b"", None, "no sound JSON: .*surrogates not allowed"),
    ({"a": 5}, b"", None, "the key a is 5, not an object"),
    ({"a": {}}, b"", None, "the key dtype is missing"),
    ({"a": entry(kind=5)}, b"", None, "dtype is 5, not a string"),
    ({"a": entry(shape="2")}, b"", None, "shape is '2', not a list"),
    ({"a": entry(shape=[-2])}, b"", None, r"shape is \[-2\], not a short list of sizes"),
    ({"a": entry(shape=[2.0])}, b"", None, r"shape is \[2.0\], not a short list"),
    ({"a": entry(shape=[1] * 9)}, b"", None, "not a short list of sizes"),
    ({"a": entry(shape=[1 << 62, 1 << 62])}, b"", None, "not a short list of sizes"),
    ({"a": entry(offsets=[0])}, b"", None, r"data_offsets is \[0\], not a short list"),
    ({"a": entry(offsets=[8, 0])}, bytes(8), None, r"'a' \(2,\) of F32 has -8 bytes, not 8"),
    ({"a": entry(shape=[3])}, bytes(8), None, r"'a' \(3,\) of F32 has 8 bytes, not 12"),
    ({"a": entry(shape=[1 << 61, 1 << 61])}, bytes(8), None, "has 8 bytes, not"),
    ({"a": entry(offsets=[1, 9])}, bytes(9), None, "'a' begins at byte .*, not at .* where the one before ends"),
    ({"a": entry(), "b": entry()}, bytes(16), None, "'b' begins at byte"),
    ({"a": entry()}, bytes(7), None, "it is truncated: download it again"),
    ({"a": entry()}, bytes(9), None, "the file is damaged"),
]


@pytest.mark.parametrize(("entries", "data", "n_header", "message"), DAMAGED_FILES)
def test_damaged_safetensors(entries: Any, data: bytes, n_header: int | None, message: str, tmp_path: Path) -> None:
    path = stored(tmp_path / "model.safetensors", entries, data, n_header)
    with pytest.raises(ModelFileError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("make_file", "message"),
    [
        (lambda path: path.write_bytes(b""), "0 bytes are no safetensors file"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer"),
        (lambda path: path.mkdir(), "a directory; name the file itself"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to(path), "cannot be opened"),
    ],
)
def test_files_that_are_no_safetensors(make_file: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    make_file(tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=message):
        SafetensorsFile(tmp_path / "model.safetensors")


def test_sound_safetensors(tmp_path: Path) -> None:
    """Tensors without bytes, other kinds of numbers, metadata and padding are part of the format."""
    entries = {"__metadata__": {"a": "b"}, "b": entry("U8", [2, 3], [0, 6]), "e": entry("F32", [0], [6, 6])}
    path = stored(tmp_path / "a", json.dumps(entries).encode() + b"   ", b"abcdef")
    file = SafetensorsFile(path)
    assert {name: (t.kind, t.shape, t.n_bytes) for name, t in file.tensors.items()} == {
        "b": ("U8", (2, 3), 6),
        "e": ("F32", (0,), 0),
    }
    out = np.empty(3, np.uint8)
    file.read(file.tensors["b"].offset + 3, out)
    assert out.tobytes() == b"def"
