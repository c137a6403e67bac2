"""Models split into NAME-00001-of-0000N.gguf: opened by the first part, or refused naming the culprit."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from edgert.errors import ModelFileError
from edgert.storage.gguf_file import GgufFile


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Three parts of two tensors each, as gguf's writer splits a model."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for index in range(6):
        writer.add_tensor(f"t{index}", np.full((2, 3), index, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("*.gguf"))


def patch(path: Path, key: str, value: int) -> None:
    """Overwrite an integer key in place."""
    raw = bytearray(path.read_bytes())
    at = raw.index(key.encode()) + len(key)
    kind = int.from_bytes(raw[at : at + 4], "little")
    size = {2: 2, 5: 4}[kind]
    raw[at + 4 : at + 4 + size] = value.to_bytes(size, "little")
    path.write_bytes(raw)


def refused(path: Path, *said: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        GgufFile.open(path)
    for text in said:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_first_part_finds_the_others(parts: list[Path]) -> None:
    assert [path.name for path in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    with GgufFile.open(parts[0]) as file:
        assert file.parts == tuple(parts)
        assert file.n_bytes == sum(path.stat().st_size for path in parts)
        assert list(file.tensors) == [f"t{index}" for index in range(6)]
        assert [info.part for info in file.tensors.values()] == [0, 0, 1, 1, 2, 2]
        for index in range(6):
            assert file.read(f"t{index}").view(np.float32).tolist() == [index] * 6
        assert file.metadata["split.count"] == 3


def test_a_later_part_names_the_first(parts: list[Path]) -> None:
    refused(parts[1], str(parts[1]), "part 2 of 3", parts[0].name)


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[2].unlink()
    refused(parts[0], str(parts[2]), "missing", "3 parts")


def test_an_unreadable_part_is_named(parts: list[Path]) -> None:
    parts[2].unlink()
    parts[2].mkdir()
    refused(parts[0], str(parts[2]), "a directory")


def test_a_damaged_part_is_named(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-10])
    refused(parts[0], str(parts[1]), "truncated")


def test_a_renamed_part_is_refused(parts: list[Path]) -> None:
    renamed = parts[0].with_name("model.gguf")
    parts[0].rename(renamed)
    refused(renamed, str(renamed), "-00001-of-00003.gguf")


def test_parts_in_each_others_place(parts: list[Path]) -> None:
    second, third = parts[1].read_bytes(), parts[2].read_bytes()
    parts[1].write_bytes(third)
    parts[2].write_bytes(second)
    refused(parts[0], str(parts[1]), "'split.no' is 2", "1")


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        (0, "split.no", 7, "'split.no' is 7, not one of 3 parts"),
        (0, "split.count", 4, "does not end in -00001-of-00004.gguf"),
        (1, "split.count", 4, "'split.count' is 4, but"),
        (0, "split.tensors.count", 9, "'split.tensors.count' is 9, but the 3 parts hold 6 tensors"),
    ],
)
def test_keys_that_disagree(parts: list[Path], part: int, key: str, value: int, said: str) -> None:
    patch(parts[part], key, value)
    refused(parts[0], str(parts[part]), said)


def test_a_tensor_in_two_parts(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes().replace(b"t2", b"t1"))
    refused(parts[0], str(parts[1]), "'t1' is in an earlier part too")


def test_one_part_of_one_needs_no_special_name(parts: list[Path]) -> None:
    patch(parts[0], "split.count", 1)
    alone = parts[0].with_name("alone.gguf")
    parts[0].rename(alone)
    with GgufFile.open(alone) as file:
        assert file.parts == (alone,) and len(file.tensors) == 2


def test_a_refused_model_leaves_no_file_open(parts: list[Path]) -> None:
    parts[2].unlink()
    before = len(list(Path("/proc/self/fd").iterdir()))
    refused(parts[0], "missing")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
