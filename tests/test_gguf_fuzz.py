"""Thousands of damaged headers: only edgert's own errors, little memory, no hang."""

from __future__ import annotations

import random
import signal
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import EdgertError
from edgert.storage import gguf_header
from edgert.storage.gguf_file import GgufFile

N_MUTANTS = 6_000
N_SPARSE = 1_500
MEMORY_CAP = 1 << 20  # bytes: the largest seed has 4 KiB, a chunk 64 KiB
INTERESTING = [
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    12,
    13,
    31,
    32,
    33,
    64,
    255,
    256,
    65_535,
    1 << 20,
    (1 << 28) - 1,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 40,
    (1 << 60) + 1,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 8,
    (1 << 64) - 1,
]


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Fail a test that is not done after a minute, where it hangs."""

    def fail(*arguments: object) -> None:
        raise TimeoutError("a header keeps the reader busy")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def seeds(folder: Path) -> list[bytes]:
    """Three sound files: of many keys, of many tensors, the first part of a split model."""
    keys = gguf.GGUFWriter(folder / "keys.gguf", "llama")
    keys.add_custom_alignment(64)
    keys.add_array("tokenizer.ggml.tokens", [f"token{index}" for index in range(40)])
    keys.add_array("tokenizer.ggml.scores", [float(index) for index in range(40)])
    keys.add_array("t.nested", [[1, 2], [3]])
    for kind, value in (("uint8", 1), ("int64", -1), ("float64", 0.5), ("bool", True), ("string", "text")):
        getattr(keys, f"add_{kind}")(f"t.{kind}", value)
    keys.add_tensor("w", np.zeros((2, 32), np.float32))
    tensors = gguf.GGUFWriter(folder / "tensors.gguf", "olmoe")
    blocks = np.zeros((2, 3, 18), np.uint8)
    for index in range(6):
        tensors.add_tensor(f"blk.{index}.w", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    split = gguf.GGUFWriter(folder / "split.gguf", "llama", split_max_tensors=1)
    for index in range(2):
        split.add_tensor(f"t{index}", np.zeros(8, np.float32))
    for writer in (keys, tensors, split):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    names = ("keys.gguf", "tensors.gguf", "split-00001-of-00002.gguf")
    return [(folder / name).read_bytes() for name in names]


def put(path: Path, data: bytes, size: int | None = None) -> None:
    """Write a file in place: ext4 flushes one that is emptied and written anew to the disk, each time."""
    path.touch()
    with path.open("r+b") as file:
        file.write(data)
        file.truncate(size)


def mutate(raw: bytes, chance: random.Random) -> bytes:
    """One to four changes: bits, bytes, integers that matter, blocks gone, doubled or moved, the end cut."""
    data = bytearray(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
        at = chance.randrange(len(data)) if chance.random() < 0.8 else chance.randrange(min(40, len(data)))
        size = chance.choice((1, 4, 8, 16, 64))
        match chance.randrange(7):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at] = chance.randrange(256)
            case 2 | 3:
                width = chance.choice((4, 8))
                value = chance.choice(INTERESTING) & ((1 << 8 * width) - 1)
                data[at : at + width] = value.to_bytes(width, "little")
            case 4:
                del data[at : at + size]
            case 5:
                data[at:at] = data[at : at + size]
            case 6:
                other = chance.randrange(len(data))
                data[at : at + size] = data[other : other + size]
        if chance.random() < 0.03:
            del data[chance.randrange(len(data) + 1) :]
        if not data:
            break
    return bytes(data)


def use(path: Path, *, read: bool) -> bool:
    """Open the file and use all that it offers; whether it was accepted."""
    try:
        with GgufFile.open(path) as file:
            for value in dict(file.metadata).values():
                assert isinstance(value, int | float | str | list | np.ndarray)
            for name, info in file.tensors.items():
                assert 0 < info.offset and info.offset + info.n_bytes <= file.n_bytes
                assert info.row_bytes * info.n_rows == info.n_bytes > 0
                if read:
                    assert file.read(name).nbytes == info.n_bytes
    except EdgertError as error:
        assert "\n" not in str(error) and str(path.parent) in str(error)
        return False
    return True


def test_mutants_are_read_or_refused(seeds: list[bytes], folder: Path) -> None:
    chance = random.Random(20240229)
    path = folder / "split-00001-of-00002.gguf"  # the name matters to the seed that is split
    accepted = 0
    tracemalloc.start()
    try:
        for index in range(N_MUTANTS):
            put(path, mutate(seeds[index % len(seeds)], chance))
            accepted += use(path, read=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        put(path, seeds[2])
    assert peak < MEMORY_CAP
    assert N_MUTANTS // 20 < accepted < N_MUTANTS // 2  # the mutations reach deep, and bite


def test_mutants_of_sparse_files(seeds: list[bytes], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 1 TiB holds whatever a header claims: only the caps stand between it and the memory."""
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 1 << 20)
    chance = random.Random(7)
    path = folder / "sparse.gguf"
    tracemalloc.start()
    try:
        for index in range(N_SPARSE):
            path.unlink(missing_ok=True)
            put(path, mutate(seeds[index % 2], chance), 1 << 40)
            use(path, read=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * MEMORY_CAP  # 1 MiB of header may become 15 MiB of short strings


@settings(max_examples=500, deadline=None, database=None)
@given(n_tensors=st.integers(0, 3), n_keys=st.integers(0, 3), rest=st.binary(max_size=200))
def test_any_bytes_after_the_counts(folder: Path, n_tensors: int, n_keys: int, rest: bytes) -> None:
    path = folder / "bytes.gguf"
    put(path, struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_keys) + rest)
    use(path, read=True)


names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
integers = st.integers(-(1 << 31), (1 << 31) - 1)
values = st.one_of(
    st.booleans(),
    integers,
    st.floats(width=32, allow_nan=False),
    st.text(min_size=1, max_size=50),
    st.lists(integers, min_size=1, max_size=20),
    st.lists(st.text(max_size=20), min_size=1, max_size=20),
)
sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None, database=None)
@given(metadata=st.dictionaries(names, values, max_size=8), shapes=st.dictionaries(names, sizes, max_size=6))
def test_what_gguf_writes_comes_back(folder: Path, metadata: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    path = folder / "round.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        kind = {bool: "bool", int: "int32", float: "float32", str: "string", list: "array"}[type(value)]
        getattr(writer, f"add_{kind}")(f"t.{key}", value)
    arrays = {name: np.arange(np.prod(size), dtype=np.float32).reshape(size) for name, size in shapes.items()}
    for name, data in arrays.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile.open(path) as file:
        for key, value in metadata.items():
            found = file.metadata[f"t.{key}"]
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == value
        assert set(file.tensors) == set(arrays)
        for name, data in arrays.items():
            np.testing.assert_array_equal(file.read(name), np.ascontiguousarray(data).reshape(-1).view(np.uint8))
