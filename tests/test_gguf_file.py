"""Sound GGUF files: what is read equals what was written, and what gguf's own reader finds."""

from __future__ import annotations

import errno
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from edgert.errors import MemoryLimitError, ModelFileError
from edgert.storage import gguf_header
from edgert.storage.gguf_file import GgufFile

SHARED = Path(__file__).resolve().parents[1].parent / "shared"

METADATA: dict[str, Any] = {
    "t.u8": (200, "uint8"),
    "t.i8": (-100, "int8"),
    "t.u16": (60_000, "uint16"),
    "t.i16": (-30_000, "int16"),
    "t.u32": (4_000_000_000, "uint32"),
    "t.i32": (-2_000_000_000, "int32"),
    "t.u64": (1 << 63, "uint64"),
    "t.i64": (-(1 << 62), "int64"),
    "t.f32": (0.5, "float32"),
    "t.f64": (0.1, "float64"),
    "t.bool": (True, "bool"),
    "t.text": ("größer 🙂", "string"),
}


def dequantisable() -> list[Type]:
    """The types that gguf can decode."""

    def decodes(kind: Type) -> bool:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    return [kind for kind in gguf.GGML_QUANT_SIZES if decodes(kind)]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with every scalar type, several arrays and a tensor of every type that gguf can decode."""
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, (value, kind) in METADATA.items():
        getattr(writer, f"add_{kind}")(key, value)
    writer.add_array("t.strings", ["a", "", "żółw", "x" * 300])
    writer.add_array("t.ints", [1, -2, 3])
    writer.add_array("t.floats", [0.25, -1.5])
    writer.add_array("t.bools", [True, False, True])
    writer.add_array("t.nested", [[1, 2], [3, 4, 5]])
    random = np.random.default_rng(0)
    writer.add_tensor("vector", random.standard_normal(7).astype(np.float32))
    writer.add_tensor("half", random.standard_normal((3, 2, 8)).astype(np.float16))
    for kind in dequantisable():
        if kind not in (Type.F32, Type.F16):
            raw = random.integers(
                0, 60, (2, 3, 256 // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8
            )
            writer.add_tensor(f"w.{kind.name}", raw, raw_dtype=kind)
    write(writer)
    return path


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def flat(value: Any) -> list[Any]:
    """A value as gguf's reader gives it: arrays in arrays are put end to end."""
    if isinstance(value, list | np.ndarray):
        return [item for part in value for item in flat(part)]
    return [value.item() if isinstance(value, np.generic) else value]


def equals_reference(path: Path) -> None:
    """Compare everything with gguf's own reader."""
    reference = gguf.GGUFReader(path)
    with GgufFile.open(path) as file:
        assert list(file.metadata) == [key for key in reference.fields if not key.startswith("GGUF.")]
        for key, value in file.metadata.items():
            assert flat(value) == flat(reference.fields[key].contents()), key
        assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
        for tensor in reference.tensors:
            info = file.tensors[tensor.name]
            assert info.name == tensor.name
            assert info.shape == tuple(reversed(tensor.shape.tolist()))
            assert (info.type, info.n_bytes, info.offset, info.part) == (
                tensor.tensor_type,
                tensor.n_bytes,
                tensor.data_offset,
                0,
            )
            assert file.read(info.name).tobytes() == tensor.data.tobytes()
        assert file.n_bytes == path.stat().st_size


def test_every_value_comes_back(sample: Path) -> None:
    with GgufFile.open(sample) as file:
        for key, (value, _) in METADATA.items():
            found = file.metadata[key]
            assert found == value and type(found) is type(value), key
        assert file.metadata["t.strings"] == ["a", "", "żółw", "x" * 300]
        assert file.metadata["t.floats"].tolist() == [0.25, -1.5]
        assert file.metadata["t.ints"].tolist() == [1, -2, 3]
        assert file.metadata["t.bools"].tolist() == [True, False, True]
        assert (file.metadata["t.ints"].dtype, file.metadata["t.bools"].dtype) == (np.int32, np.bool_)
        assert [row.tolist() for row in file.metadata["t.nested"]] == [[1, 2], [3, 4, 5]]
        assert "t.none" not in file.metadata and file.metadata.get("t.none") is None
        assert len(file.metadata) == len(list(file.metadata)) == len(METADATA) + 6  # the architecture too
        assert file.path == sample and file.parts == (sample,)


def test_a_generated_file_reads_as_in_gguf(sample: Path) -> None:
    equals_reference(sample)


def test_every_decodable_type_holds_the_bytes_that_gguf_reads(sample: Path) -> None:
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(sample).tensors}
    assert {tensor.tensor_type for tensor in reference.values()} == set(dequantisable())
    with GgufFile.open(sample) as file:
        for name, tensor in reference.items():
            info = file.tensors[name]
            assert info.type == tensor.tensor_type and math.prod(info.shape) == tensor.n_elements
            np.testing.assert_array_equal(file.read(name), tensor.data.view(np.uint8).reshape(-1), err_msg=name)


def test_golden_files_read_as_in_gguf() -> None:
    paths = sorted((SHARED / "golden" / "open").glob("*.gguf"))
    if not paths:
        pytest.skip("needs ../shared/golden/open")
    for path in paths:
        equals_reference(path)


def test_rows_are_those_of_the_whole_tensor(sample: Path) -> None:
    with GgufFile.open(sample) as file:
        for name in ("w.Q4_K", "half", "vector"):
            info = file.tensors[name]
            whole = file.read(name).reshape(info.n_rows, info.row_bytes)
            for first in range(info.n_rows + 1):
                for count in range(info.n_rows - first + 1):
                    rows = file.read_rows(name, first, count)
                    assert rows.shape == (count, info.row_bytes) and rows.dtype == np.uint8
                    np.testing.assert_array_equal(rows, whole[first : first + count])
        for first, count in ((0, 7), (6, 1), (-1, 1), (2, -1)):
            with pytest.raises(IndexError, match="of 'half', which has 6"):
                file.read_rows("half", first, count)


def test_integers_open(tmp_path: Path) -> None:
    path = tmp_path / "ints.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("table", np.arange(6, dtype=np.int32).reshape(2, 3))
    write(writer)
    with GgufFile.open(path) as file:
        assert file.tensors["table"].type == Type.I32
        assert file.read("table").view(np.int32).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_file_without_tensors_and_other_alignments(tmp_path: Path) -> None:
    for alignment in (8, 4096):
        path = tmp_path / f"a{alignment}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_custom_alignment(alignment)
        for index in range(3):
            writer.add_tensor(f"t{index}", np.full(5, index, np.float32))
        write(writer)
        equals_reference(path)
    path = tmp_path / "none.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    write(writer)
    with GgufFile.open(path) as file:
        assert file.tensors == {} and file.metadata["general.architecture"] == "llama"


def test_version_2_reads_as_version_3(sample: Path, tmp_path: Path) -> None:
    raw = bytearray(sample.read_bytes())
    raw[4:8] = struct.pack("<I", 2)
    path = tmp_path / "v2.gguf"
    path.write_bytes(raw)
    with GgufFile.open(path) as old, GgufFile.open(sample) as new:
        assert old.tensors == new.tensors and list(old.metadata) == list(new.metadata)


def test_tokens_that_are_not_utf_8_keep_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    tokens = [b"ok", b"\xff\xfe", b"caf\xe9", "é".encode()]
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_string("general.name", "cafX")
    write(writer)
    path.write_bytes(path.read_bytes().replace(b"cafX", b"caf\xe9"))
    with GgufFile.open(path) as file:
        found = file.metadata["tokenizer.ggml.tokens"]
        assert [token.encode("utf-8", "surrogateescape") for token in found] == tokens
        assert file.metadata["general.name"] == "caf\ufffd"


def test_opening_reads_no_tensor_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", np.zeros((4096, 1024), np.float32))
    write(writer)
    ends = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: ends.append(at + n) or pread(fd, n, at))
    with GgufFile.open(path) as file:
        assert file.tensors["w"].n_bytes == 16 << 20
    assert 0 < max(ends) <= gguf_header.CHUNK


def test_a_large_vocabulary_opens_quickly(tmp_path: Path) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    path, key, n_tensors = tmp_path / "vocabulary.gguf", "tokenizer.ggml.tokens", 6_000
    tokens = [f"token {index} é" for index in range(150_000)]
    array = struct.pack("<IIQ", 9, 8, len(tokens)) + b"".join(map(text, tokens))
    table = [text(f"blk.{i}.weight") + struct.pack("<IQQIQ", 2, 4, 2, 0, 32 * i) for i in range(n_tensors)]
    header = struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, 1) + text(key) + array + b"".join(table)
    path.write_bytes(header + bytes(-len(header) % 32 + 32 * n_tensors))
    started = time.process_time()
    with GgufFile.open(path) as file:
        spent = time.process_time() - started
        assert len(file.tensors) == n_tensors
        assert file.metadata[key] == tokens
    assert spent < 1.0  # about 0.06 s; gguf.GGUFReader needs 4 s


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    code = "import edgert.storage.gguf_file, sys; print({'numba', 'onnxruntime'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.strip() == "set()"


def test_a_read_in_pieces_is_put_together(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GgufFile.open(sample) as file:
        whole = file.read("half")
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:5]], at))
        np.testing.assert_array_equal(file.read("half"), whole)


def test_a_failing_disk_is_named(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with GgufFile.open(sample) as file:
        monkeypatch.setattr(os, "preadv", fail)
        at = f"{file.tensors['half'].offset:,}"
        with pytest.raises(ModelFileError, match=f"sample.gguf: reading tensor 'half' at byte {at} failed"):
            file.read("half")
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ModelFileError, match=r"sample\.gguf: reading the header at byte 0 failed: Input"):
        GgufFile.open(sample)


def test_a_file_that_shrinks_while_opened(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", lambda fd, n, at: b"GGUF"[at:])
    with pytest.raises(ModelFileError, match=r"sample\.gguf: the file was .* bytes and now ends at byte 4;"):
        GgufFile.open(sample)


def test_a_file_that_shrinks_after_opening(sample: Path, tmp_path: Path) -> None:
    path = tmp_path / "shrinks.gguf"
    path.write_bytes(sample.read_bytes())
    with GgufFile.open(path) as file:
        info = file.tensors["half"]
        os.truncate(path, info.offset + 10)
        with pytest.raises(ModelFileError, match=f"'half': the file now ends at .*, {info.n_bytes - 10} "):
            file.read("half")


def test_a_closed_file_and_a_missing_tensor(sample: Path) -> None:
    file = GgufFile.open(sample)
    with pytest.raises(ModelFileError, match=r"sample\.gguf: tensor 'blk.9.x' is missing"):
        file.read("blk.9.x")
    file.close()
    file.close()
    with pytest.raises(ModelFileError, match="after the file was closed"):
        file.read("half")


def test_a_tensor_larger_than_memory(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    size = 1 << 43
    header = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0)
    path.write_bytes(header + struct.pack("<Q1sIQQIQ", 1, b"w", 2, size // 8, 2, 0, 0))
    try:
        os.truncate(path, size + 4096)
    except OSError:
        pytest.skip("this file system has no files of 8 TiB")
    with GgufFile.open(path) as file:
        assert file.tensors["w"].n_bytes == size
        with pytest.raises(MemoryLimitError, match=r"sparse\.gguf: reading tensor 'w' needs 8,796,093,022,"):
            file.read("w")
        assert file.read_rows("w", 0, 0).shape == (0, size // 2)
