"""What is kept about each file system: found again, never trusted, and harmless when it is damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.storage import flash_settings as settings_module
from edgert.storage.flash_settings import FlashSettings, file_system, flash_settings, keep_settings, settings_path

RECORD = 3456 << 10


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def measured(record_bytes: int = RECORD, **changes: Any) -> FlashSettings:
    values = {"lanes": 8, "chunk_bytes": 1 << 20, "bytes_per_s": 2e9, "record_bytes": record_bytes, **changes}
    return FlashSettings(measured=True, date="2026-01-31", **values)


def test_defaults_where_nothing_was_measured(tmp_path: Path) -> None:
    assert flash_settings(tmp_path) == FlashSettings(lanes=4, chunk_bytes=512 << 10, bytes_per_s=None, measured=False)
    assert not settings_path().exists()


def test_what_was_measured_is_found_for_every_path_of_the_file_system(tmp_path: Path) -> None:
    assert keep_settings(tmp_path, measured()) == settings_path()
    for path in (tmp_path, tmp_path / "not" / "there.edge", settings_path()):
        assert flash_settings(path) == flash_settings(path, RECORD) == measured()
    assert flash_settings("/proc") == FlashSettings()
    assert [file.name for file in settings_path().parent.iterdir()] == ["flash.json"]  # nothing left aside


def test_a_setting_holds_for_records_of_about_its_size(tmp_path: Path) -> None:
    small = measured(64 << 10, lanes=2, bytes_per_s=5e8)
    keep_settings(tmp_path, measured(direct=False))
    keep_settings(tmp_path, small)
    assert flash_settings(tmp_path, RECORD // 2) == flash_settings(tmp_path, 2 * RECORD) == measured(direct=False)
    assert flash_settings(tmp_path, 40 << 10) == small
    assert flash_settings(tmp_path, 1 << 20) == FlashSettings(direct=False)  # that holds for any size
    assert flash_settings(tmp_path) == small  # the latest
    keep_settings(tmp_path, measured(bytes_per_s=1e9))
    assert flash_settings(tmp_path, RECORD) == flash_settings(tmp_path) == measured(bytes_per_s=1e9)


def test_only_the_newest_sizes_are_kept(tmp_path: Path) -> None:
    for power in range(12, 32):
        keep_settings(tmp_path, measured(1 << power))
    assert flash_settings(tmp_path, 1 << 31).record_bytes == 1 << 31
    assert flash_settings(tmp_path, 1 << 12) == FlashSettings()
    assert settings_path().stat().st_size < 10_000


DAMAGED = [
    b"",
    b"\xff\xfe",
    b"[]",
    b'{"version": 1}',
    b'{"version": 2, "file_systems": {}}',
    b'{"version": 1, "file_systems": []}',
    b'{"version": 1, "file_systems": {"KEY": []}}',
    b'{"version": 1, "file_systems": {"KEY": {"measured": {}}}}',
    b'{"version": 1, "file_systems": {"KEY": {"measured": [1, null, {}]}}}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_counts_as_none_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    settings_path().parent.mkdir(parents=True)
    settings_path().write_bytes(content.replace(b"KEY", file_system(tmp_path).key.encode()))
    assert flash_settings(tmp_path) == FlashSettings()
    keep_settings(tmp_path, measured())
    assert flash_settings(tmp_path) == measured()


def test_a_file_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    settings_path().mkdir(parents=True)  # a folder in its place: stronger than a mode, which root ignores
    assert flash_settings(tmp_path) == FlashSettings()
    with pytest.raises(OSError):
        keep_settings(tmp_path, measured())
    assert [file.name for file in settings_path().parent.iterdir()] == ["flash.json"]


ANYTHING = st.one_of(st.none(), st.booleans(), st.integers(-5, 1 << 70), st.floats(), st.text(max_size=3), st.just([]))


@given(
    row=st.dictionaries(st.sampled_from(["lanes", "chunk_bytes", "record_bytes", "bytes_per_s", "direct"]), ANYTHING)
)
def test_a_row_is_right_or_left_out(row: dict[str, Any]) -> None:
    good = {"lanes": 8, "chunk_bytes": 1 << 20, "bytes_per_s": 2e9, "record_bytes": RECORD, "direct": None}
    found = settings_module._parse({**good, **row})
    if found is not None:
        assert 1 <= found.lanes <= 64 and found.chunk_bytes % 4096 == 0 and 0 < found.chunk_bytes <= 64 << 20
        assert found.bytes_per_s is not None and 0 < found.bytes_per_s < 1e13 and found.direct in (None, True, False)


# ---- file systems ----------------------------------------------------------------------------------------------------
def test_the_file_system_of_this_folder(tmp_path: Path) -> None:
    here = file_system(tmp_path)
    assert here.key == file_system(tmp_path / "not" / "there").key != file_system("/proc").key
    if Path("/proc/self/mountinfo").exists():
        assert file_system("/proc").kind == "proc" and file_system("/proc").mount == "/proc"
        assert tmp_path.resolve().is_relative_to(here.mount) and here.kind in str(here)


def test_mounts_are_told_apart(tmp_path: Path) -> None:
    """A later mount covers an earlier one; blanks are escaped; without a list there is still a key."""
    number = tmp_path.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    place = tmp_path / "my models"
    place.mkdir()
    lines = [
        "1 0 0:1 / / rw - overlay overlay rw",
        f"2 1 {device} / {tmp_path} rw,noatime shared:1 - ext4 /dev/sda1 rw",
        f"3 2 {device} /sub {tmp_path}/my\\040models rw - btrfs /dev/sd\\040b rw",
        "4 1 0:9 / /elsewhere rw - tmpfs tmpfs rw",
        "nonsense",
    ]
    proc = tmp_path / "root" / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "mountinfo").write_text("\n".join(lines))
    found = file_system(place, tmp_path / "root")
    assert (found.kind, found.device, found.mount) == ("btrfs", "/dev/sd b", str(place))
    assert str(found) == f"btrfs on /dev/sd b, mounted at {place}"
    bare = file_system(place, tmp_path / "nothing")
    assert bare.key == found.key and bare.kind == "a file system"


def test_the_uuid_is_the_key_where_the_system_lists_it(tmp_path: Path) -> None:
    links = tmp_path / "dev" / "disk" / "by-uuid"
    links.mkdir(parents=True)
    (links / "dangling").symlink_to(tmp_path / "gone")
    (links / "ABCD-1234").symlink_to("/dev/null")  # a device with a number of its own
    number = os.stat("/dev/null").st_rdev
    assert list(settings_module._uuids(tmp_path)) == [("ABCD-1234", number)]
    assert not file_system(tmp_path, tmp_path).key.startswith("uuid-")  # this folder is on another


def test_json_that_people_can_read(tmp_path: Path) -> None:
    keep_settings(tmp_path, measured())
    (system,) = json.loads(settings_path().read_text())["file_systems"].values()
    assert system["description"] == str(file_system(tmp_path))
    assert system["measured"][0]["date"] == "2026-01-31" and "measured" not in system["measured"][0]
