"""Bad GGUF files: each is refused in one line that names the file, what is wrong with it and what to do."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from edgert.errors import EdgertError, ModelFileError, UnsupportedError
from edgert.storage import gguf_header
from edgert.storage.gguf_file import GgufFile

U8, U32, BOOL, STRING, ARRAY = 0, 4, 7, 8, 9
F32, Q4_0 = 0, 2


def text(value: bytes | str, length: int | None = None) -> bytes:
    """A GGUF string, whose length may lie."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key(name: bytes | str, kind: int = U32, value: bytes = bytes(4)) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(
    name: bytes | str = "w",
    dims: tuple[int, ...] = (32, 2),
    kind: int = F32,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    form = f"<I{len(dims)}QIQ"
    return text(name) + struct.pack(form, len(dims) if n_dims is None else n_dims, *dims, kind, offset)


def model(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    data: int = 256,
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """A file of these parts with `data` bytes of tensor data; the counts may lie."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    header = struct.pack("<4sIQQ", b"GGUF", version, *counts) + b"".join(keys + tensors)
    return header + bytes(-len(header) % 32 + data)


def refusal(path: Path, kind: type[EdgertError]) -> str:
    """The message of the refusal: one line that begins with the file's path and ends with a remedy."""
    with pytest.raises(EdgertError) as caught:
        GgufFile.open(path)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert message.startswith(f"{path}: ") and "\n" not in message and message.isprintable()
    assert "; " in message and len(message) - len(str(path)) < 300
    return message


BIG = 1 << 63
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "short": (b"GGUF\3\0", "the version runs to byte 8, but the file has 6 bytes"),
    "no counts": (b"GGUF\3\0\0\0", "the header runs to byte 24"),
    "text": (b"hello, this is no model at all", "not a GGUF file (it starts with b'hell'"),
    "one byte": (b"G", "not a GGUF file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "run `git lfs pull`"),
    "version 0": (model(version=0), "version is 0"),
    "keys": (model(n_keys=BIG), "says 9,223,372,036,854,775,808 keys"),
    "more keys than bytes": (model(n_keys=60_000), "60,000 keys, more than 288 bytes can hold"),
    "tensors": (model(n_tensors=BIG), "says 9,223,372,036,854,775,808 tensors"),
    "more tensors than bytes": (model(n_tensors=90_000), "90,000 tensors, more than 288 bytes can hold"),
    "one key too many": (model((key("a"),), n_keys=2), "the name of key 1 is not text"),
    "key length": (model((text("a", BIG),)), "key 0 runs to byte 9,223,372,036,854,775,840"),
    "key not text": (model((key(b"a\xff"),)), "the name of key 0 is not text: b'a\\xff'"),
    "key with escape": (model((key(b"a\x1b[2J"),)), "the name of key 0 is not text"),
    "key twice": (model((key("a.b"), key("a.b"))), "key 'a.b' is there twice"),
    "value type": (model((key("a.b", 99),)), "key 'a.b' has the unknown value type 99"),
    "string length": (model((key("a.b", STRING, text("x", 1 << 40)),)), "key 'a.b' runs to byte 1,099,511,627,8"),
    "array type": (model((key("a.b", ARRAY, array(77, 1)),)), "key 'a.b' is an array of the unknown value type 77"),
    "array length": (model((key("a.b", ARRAY, array(U32, BIG)),)), "key 'a.b' (9,223,372,036,854,775,808 values)"),
    "few strings": (model((key("a.b", ARRAY, array(STRING, 99)),)), "key 'a.b' says 99 strings, more than 320 byt"),
    "few inner arrays": (model((key("a.b", ARRAY, array(ARRAY, 99)),)), "'a.b' says 99 inner arrays, more than 320"),
    "strings": (model((key("a.b", ARRAY, array(STRING, BIG)),)), "key 'a.b' says 9,223,372,036,854,775,808 strings"),
    "string in array": (
        model((key("a.b", ARRAY, array(STRING, 3, text("x") + text("y", 1 << 50))),)),
        "key 'a.b', item 2 of 3, runs to byte 1,125,899,906,8",
    ),
    "last string": (
        model((key("a.b", ARRAY, array(STRING, 2, text("x") + text("y", (1 << 64) - 1))),)),
        "key 'a.b', item 2 of 2, runs to byte 18,446,744,073,709,5",
    ),
    "arrays too deep": (model((key("a.b", ARRAY, array(ARRAY, 1) * 9),)), "key 'a.b' has arrays in arrays, more tha"),
    "inner arrays": (
        model((key("a.b", ARRAY, array(ARRAY, 1 << 30)),)),
        "key 'a.b' says 1,073,741,824 inner arrays, 16,384 ",
    ),
    "alignment": (model((key("general.alignment", U32, b"\x18\0\0\0"),)), "'general.alignment' is 24, not a power"),
    "alignment 0": (model((key("general.alignment"),)), "'general.alignment' is 0, not a power"),
    "alignment bool": (model((key("general.alignment", BOOL, b"\1"),)), "'general.alignment' is True, not a power"),
    "alignment text": (model((key("general.alignment", STRING, text("32")),)), "'general.alignment' is '32', not a"),
    "parts": (model((key("split.count", U32, b"\0\0\0\1"),)), "key 'split.count' is 16777216, not a number of parts"),
    "parts in words": (model((key("split.count", STRING, text("3")),)), "key 'split.count' is '3', not a number"),
    "tensor name": (model((), (tensor(b"\xc3"),)), "the name of tensor 0 is not text: b'\\xc3'"),
    "tensor without name": (model((), (tensor(b""),)), "the name of tensor 0 is not text"),
    "tensor twice": (model((), (tensor(), tensor(offset=256)), data=512), "tensor 'w' is there twice"),
    "dimensions": (model((), (tensor(n_dims=5),)), "tensor 'w' has 5 dimensions, at most 4"),
    "dimension 0": (model((), (tensor(dims=(32, 0)),)), "tensor 'w' has the impossible shape (0, 32)"),
    "overflow": (model((), (tensor(dims=(1 << 32, 1 << 32)),)), "impossible shape (4294967296, 4294967296)"),
    "wrapped to 0": (model((), (tensor(dims=(1 << 62, 1 << 62, 4)),)), "tensor 'w' has the impossible shape"),
    "type": (model((), (tensor(kind=70_000),)), "tensor 'w' has the unknown ggml type 70000"),
    "block": (model((), (tensor(dims=(33, 32), kind=Q4_0),)), "(32, 33), but Q4_0 needs a last dimension that is a"),
    "unaligned": (model((), (tensor(offset=8),)), "'w' is at offset 8, not a multiple of the alignment 32"),
    "overlap": (model((), (tensor("a"), tensor("b", offset=224)), data=480), "tensor 'b' at byte 352 overlaps tens"),
    "same place": (model((), (tensor("a"), tensor("b")), data=512), "overlaps tensor"),
    "offset": (model((), (tensor(offset=1 << 62),)), "4,611,686,018,427,387,904 bytes are missing (tensor 'w'"),
    "truncated": (model((), (tensor(),), data=156), "truncated: 100 bytes are missing (tensor 'w' ends at byte 352"),
    "no data": (model((), (tensor(),), data=0), "truncated: 256 bytes are missing"),
    "long name": (model((key("k" * 200, 99),)), "kkk... has the unknown value type 99"),
}
UNSUPPORTED: dict[str, tuple[bytes, str]] = {
    "version 1": (model(version=1), "GGUF version 1; edgert reads versions 2 and 3"),
    "version 4": (model(version=4), "GGUF version 4; edgert reads versions 2 and 3"),
    "big endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "a big-endian GGUF file"),
    "dropped type": (model((), (tensor(kind=31),)), "tensor 'w' has the ggml type 31 (Q4_0_4_4)"),
    "newer type": (model((), (tensor(kind=200),)), "tensor 'w' has the ggml type 200, which the installed gguf"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(DAMAGED[case][0])
    assert DAMAGED[case][1] in refusal(path, ModelFileError)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_an_unsupported_file_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "new.gguf"
    path.write_bytes(UNSUPPORTED[case][0])
    assert UNSUPPORTED[case][1] in refusal(path, UnsupportedError)


def test_the_builder_of_these_files_builds_sound_ones(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    keys = (key("a.b"), key("a.none", ARRAY, array(U32, 0)), key("a.no", ARRAY, array(STRING, 0)))
    path.write_bytes(model(keys, (tensor("a"), tensor("b", (64, 3), Q4_0, 256), tensor("c", (), offset=384)), data=388))
    with GgufFile.open(path) as file:
        assert [info.shape for info in file.tensors.values()] == [(2, 32), (3, 64), ()]
        assert file.metadata["a.none"].tolist() == [] and file.metadata["a.no"] == []
        assert file.read_rows("c", 0, 1).shape == (1, 4)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    keys = (key("general.alignment", U32, b"\x20\0\0\0"), key("a.b", ARRAY, array(STRING, 1, text("xyz"))))
    whole = model(keys, (tensor("a", (2, 2)), tensor("b", (2, 2), offset=32)), data=48)
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole)
    GgufFile.open(path).close()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refusal(path, ModelFileError)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.gguf", ModelFileError)
    assert "a directory" in refusal(tmp_path, ModelFileError)
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "not a regular file" in refusal(tmp_path / "pipe.gguf", ModelFileError)
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "x.gguf", tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(ModelFileError, match=r"cannot be opened: .*; check the path"):
            GgufFile.open(path)


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # chmod would not stop a test that runs as root
    assert "no permission to read it" in refusal(tmp_path / "secret.gguf", ModelFileError)


# Claims that a sparse file of 1 TiB can meet, which costs its maker nothing.
SPARSE: dict[str, tuple[bytes, str]] = {
    "string": (model((key("a.b", STRING, text("x", 1 << 36)),), data=0), "a header may have 268,435,456"),
    "key": (model((text("a", 1 << 36),), data=0), "a header may have 268,435,456"),
    "numbers": (model((key("a.b", ARRAY, array(U8, 1 << 36)),), data=0), "a header may have 268,435,456"),
    "strings": (
        model((key("a.b", ARRAY, array(STRING, 1 << 30)),), data=0),
        "says 1,073,741,824 strings, 4,194,304 are allowed",
    ),
    "inner arrays": (model((key("a.b", ARRAY, array(ARRAY, 1 << 23)),), data=0), "8,388,608 inner arrays, 16,384"),
    "keys": (model(n_keys=1 << 30, data=0), "says 1,073,741,824 keys, at most 65,536"),
    "tensors": (model(n_tensors=1 << 30, data=0), "says 1,073,741,824 tensors, at most 262,144"),
}


@pytest.mark.parametrize("case", SPARSE)
def test_a_sparse_file_takes_no_memory(case: str, tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(SPARSE[case][0])
    os.truncate(path, 1 << 40)
    tracemalloc.start()
    try:
        assert SPARSE[case][1] in refusal(path, ModelFileError)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_strings_are_counted_over_all_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_STRINGS", 5)
    path = tmp_path / "many.gguf"
    keys = tuple(key(f"a.{i}", ARRAY, array(STRING, 3, text("x") * 3)) for i in range(2))
    path.write_bytes(model(keys))
    assert "key 'a.1' says 3 strings, 2 are allowed here" in refusal(path, ModelFileError)


def test_the_dearest_header_that_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "dear.gguf"
    inner = array(ARRAY, gguf_header.MAX_INNER_ARRAYS, array(U32, 0) * gguf_header.MAX_INNER_ARRAYS)
    path.write_bytes(model((key("a.b", ARRAY, inner),)))
    tracemalloc.start()
    try:
        with GgufFile.open(path) as file:
            assert len(file.metadata["a.b"]) == gguf_header.MAX_INNER_ARRAYS
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20  # an empty array costs 12 bytes in the file and 0.5 KB here
