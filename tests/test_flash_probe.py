"""Measuring a drive: the fast setting is found on files of known slowness, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest

from edgert.errors import ModelFileError, OptionError
from edgert.storage import flash_probe
from edgert.storage.flash import FlashFile
from edgert.storage.flash_probe import Candidate, FlashProbe, chunks_for, probe, temporary_file

RECORD = 256 << 10


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("probe") / "experts.bin"
    file.write_bytes(np.random.default_rng(0).integers(0, 256, 20 * RECORD + 5, dtype=np.uint8).tobytes())
    return file


def test_every_setting_has_its_turns(path: Path) -> None:
    stages: list[float] = []
    found = probe(path, RECORD - 100, seconds=0.05, progress=lambda stage, fraction: stages.append(fraction))
    assert found.record_bytes == RECORD and found.path == path
    ways = {(one.lanes, one.chunk_bytes) for one in found.candidates if one.direct == found.direct}
    assert ways >= {(lanes, chunk) for lanes in (1, 2, 4, 8) for chunk in (128 << 10, 256 << 10)}
    assert any(not one.direct for one in found.candidates)
    assert all(len(one.rates) >= 3 and one.bytes_per_s > 0 for one in found.candidates)
    assert stages == sorted(stages) and stages[-1] <= 1
    best = found.best()
    assert best.measured and best.bytes_per_s and best.record_bytes == RECORD and best.date == flash_probe.today()


def test_a_drive_that_wants_many_requests(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request takes its time, whatever its size, and any number at once: many lanes win."""

    class Distant(FlashFile):
        def _preadv(self, view: memoryview, offset: int) -> int:
            time.sleep(0.004)
            return super()._preadv(view, offset)

    monkeypatch.setattr(flash_probe, "FlashFile", Distant)
    assert probe(path, RECORD, seconds=0.1).best().lanes >= 4


def test_a_file_system_without_direct_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.storage.flash._O_DIRECT", 0)
    found = probe(path, RECORD, seconds=0.05)
    assert not found.direct and "no O_DIRECT" in found.reason
    assert not any(one.direct for one in found.candidates) and found.best().direct is None


def choice(*rows: tuple[int, int, bool, float]) -> tuple[int, int, bool | None]:
    """The lanes, chunk and direct chosen from (lanes, chunk in KiB, direct, rate)."""
    candidates = tuple(Candidate(lanes, chunk << 10, direct, [rate]) for lanes, chunk, direct, rate in rows)
    best = FlashProbe(Path("x"), RECORD, True, "", candidates).best()
    return best.lanes, best.chunk_bytes >> 10, best.direct


def test_the_choice() -> None:
    fast, same, slow = (8, 1024, True, 2.00e9), (2, 512, True, 1.95e9), (1, 128, True, 1.0e9)
    assert choice(fast, same, slow) == (2, 512, None)  # as fast, with less in flight
    assert choice(fast, slow) == (8, 1024, None)
    assert choice(fast, same, (4, 512, True, 1.85e9)) == (4, 512, None)  # the default is near
    assert choice(fast, same, (4, 512, True, 1.75e9)) == (2, 512, None)
    assert choice((4, 512, True, 30e6), (1, 128, True, 29.5e6)) == (1, 128, None)  # 70 ms in flight are long
    assert choice(fast, slow, (4, 512, False, 2.2e9)) == (8, 1024, None)  # not worth the page cache
    assert choice(fast, slow, (4, 512, False, 2.4e9)) == (4, 512, False)


def test_slow_settings_are_left_out_among_their_kind() -> None:
    rows = [(1, True, 2.0), (2, True, 1.4), (4, False, 1.0), (8, False, 0.9)]
    candidates = [Candidate(lanes, 1 << 20, direct, [rate]) for lanes, direct, rate in rows]
    assert [one.lanes for one in flash_probe._without_slow(candidates, 0.75)] == [1, 4, 8]


def test_chunk_sizes_end_with_the_whole_record() -> None:
    assert chunks_for(60_000) == (128 << 10,)
    assert chunks_for(RECORD) == (128 << 10, 256 << 10)
    assert chunks_for(3456 << 10)[-2:] == (2 << 20, 4 << 20)
    assert chunks_for(1 << 30)[-1] == 16 << 20


def test_a_file_that_is_too_small_or_shrinks(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelFileError, match="fewer than 8 records of 4,194,304; measure with a larger file"):
        probe(path, 4 << 20)

    class Shrinking(FlashFile):
        def _preadv(self, view: memoryview, offset: int) -> int:
            return 0

    monkeypatch.setattr(flash_probe, "FlashFile", Shrinking)
    with pytest.raises(ModelFileError, match=r"read [0-3]: .* gave too few"):
        probe(path, RECORD)


def test_a_temporary_file_goes_whatever_happens(tmp_path: Path) -> None:
    with temporary_file(tmp_path, 9 << 20) as file:
        assert file.parent == tmp_path and file.stat().st_size == 9 << 20
        content = file.read_bytes()
        assert content[: 4 << 20] != content[4 << 20 : 8 << 20]
    with pytest.raises(ZeroDivisionError), temporary_file(tmp_path, 4096):
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), temporary_file(tmp_path, 8 << 20, lambda stage, fraction: interrupt()):
        raise AssertionError("not reached")
    assert list(tmp_path.iterdir()) == []


def interrupt() -> None:
    raise KeyboardInterrupt


def test_no_room_for_a_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"MiB free, a measurement writes .* name a large file"):
        with temporary_file(tmp_path, 1 << 60):
            raise AssertionError("not reached")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OptionError, match="takes no file"), temporary_file(Path("/proc"), 0):
        raise AssertionError("not reached")


def test_settings_fields_are_what_loading_asks_for() -> None:
    names = [field.name for field in dataclasses.fields(flash_probe.FlashSettings)]
    assert names[:4] == ["lanes", "chunk_bytes", "bytes_per_s", "measured"]
