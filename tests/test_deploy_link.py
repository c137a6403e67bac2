"""The link to a board, over a real sshd on loopback: commands end with it, and copies go on where they were."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import board_server
import pytest
from board_server import Line, Server
from small_drive import mounted

pytest.importorskip("fabric", reason="fabric is not installed: pip install edgert[deploy]")
if reason := board_server.why_not():
    pytest.skip(reason, allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from deploy_board import DeployError
from deploy_bundle import CHUNK, local_file
from deploy_copy import copy_files
from deploy_link import Link, LostConnectionError


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with board_server.serve(tmp_path) as server:
        yield server


def test_what_runs_on_the_board_ends_with_the_connection(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(server.client))
    line = Line(server.port)
    server.connect_by(line.port)
    with Link("board") as link:
        link.hold(str(server.home / "held"))
        with Link("board") as other, pytest.raises(DeployError, match="another deployment is at work"):
            other.hold(str(server.home / "held"))
        command = ["sh", "-c", f"echo $$ > {server.home}/pid; sleep 600"]
        threading.Timer(1.0, line.cut).start()
        with pytest.raises(LostConnectionError, match="the connection was lost"):
            link.run_watched(command, timeout=600)
    pid = int((server.home / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
    server.connect_by(server.port)
    with Link("board") as link:
        link.hold(str(server.home / "held"))


def test_much_output_is_read_to_its_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(server.client))
    much = (
        "import sys; [(f.write('x' * 12_000_000 + 'last'), f.flush()) for f in (sys.stdout, sys.stderr)]; sys.exit(3)"
    )
    with Link("board") as link:
        ran = link.run(["python3", "-c", much])
        assert ran.status == 3 and len(ran.output) == len(ran.errors) == 4 << 20
        assert ran.output.endswith("xlast") and ran.errors.endswith("xlast")
        began = time.monotonic()
        with pytest.raises(LostConnectionError, match="no longer answers"):  # it closes both and goes on
            link.run(["sh", "-c", "echo $$; exec >&- 2>&-; exec sleep 30"], timeout=1.5)
        assert time.monotonic() - began < 10 and link.run(["echo", "there"]).output == "there\n"


def test_a_line_that_breaks_ends_a_command_that_writes_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(server.client))
    line = Line(server.port)
    server.connect_by(line.port)
    with Link("board") as link, pytest.raises(LostConnectionError, match="the connection was lost"):
        threading.Timer(0.5, line.cut).start()
        link.run(["yes"], timeout=600)
    line.close()


# ---- copying ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def link(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    monkeypatch.setenv("HOME", str(server.client))
    with Link("board") as link:
        yield link


def test_a_copy_goes_on_where_it_was_and_checks_what_is_there(link: Link, tmp_path: Path) -> None:
    content = random.Random(2).randbytes(2 * CHUNK + 777)
    (tmp_path / "file").write_bytes(content)
    file, target = local_file(tmp_path / "file", "file"), tmp_path / "there/file"
    target.parent.mkdir()
    part = Path(f"{target}.part")
    part.write_bytes(content[: CHUNK + 99])
    assert copy_files(link, [file], str(target.parent)).kept == CHUNK and target.read_bytes() == content
    assert copy_files(link, [file], str(target.parent)).sent == 0
    part.write_bytes(content)  # all of it, but not yet its name
    target.unlink()
    assert copy_files(link, [file], str(target.parent)).sent == 0 and target.read_bytes() == content
    target.unlink()
    part.write_bytes(content[:CHUNK] + b"x" + content[CHUNK + 1 :] + b"longer than the file")
    assert copy_files(link, [file], str(target.parent)).sent == CHUNK + 777 and target.read_bytes() == content
    assert not part.exists()
    target.write_bytes(b"another version")
    assert copy_files(link, [file], str(target.parent)).kept == 0 and target.read_bytes() == content


def test_questions_may_be_longer_than_a_word_of_a_command(link: Link, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"wheel-{place:04}-{'x' * 200}.whl") for place in range(2000)]
    assert sum(map(len, paths)) > 3 * (128 << 10)  # the kernel's limit for one word
    assert {one["size"] for one in link.ask("digests", paths=paths, chunk=CHUNK)} == {0}
    assert link.run_watched(["wc", "-c"], timeout=30).output.strip() == "0"  # none of it is the program's input
    (tmp_path / "said").write_text("a\x1b[2J\x9b\n")
    assert link.ask("read", path=str(tmp_path / "said")) == "a[2J\n"
    assert link.run(["sh", "-c", r"printf '\033[2Jno\n' >&2; exit 1"]).last_words == "[2Jno"
    link.python = "python9"
    with pytest.raises(DeployError, match=r"python9 failed at digests: .*not found"):
        link.ask("digests", paths=paths, chunk=CHUNK)


def test_a_file_that_changes_while_it_is_copied_gets_no_name(link: Link, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")
    file = local_file(tmp_path / "file", "file")
    (tmp_path / "file").write_bytes(b"behind")
    with pytest.raises(DeployError, match="arrived damaged and was removed"):
        copy_files(link, [file], str(tmp_path / "there"))
    assert not list((tmp_path / "there").iterdir())


@pytest.fixture
def small_drive(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "drive") as folder:
        yield folder


def test_a_drive_that_fills_while_copying(link: Link, small_drive: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(random.Random(3).randbytes(40 << 20))
    file = local_file(tmp_path / "file", "experts.bin")
    with pytest.raises(
        DeployError, match=r"the drive is full: .* experts.bin needed .* more; its half copy was removed"
    ):
        copy_files(link, [file], str(small_drive / "coming"))
    assert not list(small_drive.rglob("*.bin*"))
