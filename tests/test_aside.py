"""Files that are there as a whole or not at all: what is left behind, and by whom it is removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgert.storage.aside import check_writable, written_aside

_KILLED = """
import os, signal, sys
from pathlib import Path
from edgert.storage.aside import written_aside
with written_aside(Path(sys.argv[1])) as aside:
    aside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", ["a[1].json", 250 * "a", 125 * "\u00e4"])
def test_a_file_takes_its_place_when_it_is_whole(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("old")
    with written_aside(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old" and aside.parent == tmp_path
    assert path.read_text() == "new" and os.listdir(tmp_path) == [path.name]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyError), written_aside(path) as aside:
        aside.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]


def test_two_threads_may_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with written_aside(path) as first:
        first.write_text("first")
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_write, path, "second").result()
        assert path.read_text() == "second"
    assert path.read_text() == "first" and os.listdir(tmp_path) == [path.name]


def _write(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text)


def test_what_a_killed_process_left_goes_when_the_file_is_written_again_and_is_old(tmp_path: Path) -> None:
    path, others = tmp_path / "a*", {".ab.1.part", ".a*.json.1.part"}
    long_ago = time.time() - 7200
    for other in others:
        (tmp_path / other).write_text("of another file")
        os.utime(tmp_path / other, (long_ago, long_ago))
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(path)], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (left,) = set(os.listdir(tmp_path)) - others
    for age, there in ((time.time(), {left}), (long_ago, set())):  # another process may be at it
        os.utime(tmp_path / left, (age, age))
        with written_aside(path) as aside:
            aside.write_text("whole")
        assert set(os.listdir(tmp_path)) == {path.name} | others | there


def test_where_nothing_can_be_written_is_known_before(tmp_path: Path) -> None:
    check_writable(tmp_path / "a")
    assert not os.listdir(tmp_path)
    for path in (tmp_path, tmp_path / "none" / "a"):
        with pytest.raises(OSError):
            check_writable(path)
    with pytest.raises(OSError), written_aside(tmp_path / "none" / "a") as aside:
        aside.write_text("")
