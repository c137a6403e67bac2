"""Deploying to a real sshd on loopback: brought up, left alone, taken back, and all that goes wrong on the way."""

from __future__ import annotations

import getpass
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import board_server
import pytest
import tiny_moe
from board_server import Line, Server
from small_drive import mounted

pytest.importorskip("fabric", reason="fabric is not installed: pip install edgert[deploy]")
if reason := board_server.why_not():
    pytest.skip(reason, allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import deploy_jetson  # found through the line above
from deploy_bundle import CHUNK
from deploy_install import Installer

from edgert.pack import pack

USUAL = ("--any-board", "--service", "none")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, with as much beside it as makes copying take a while."""
    folder = tmp_path_factory.mktemp("bundle")
    made = pack(tiny_moe.write(folder / "tiny.gguf"), folder / "tiny.edge", progress=lambda stage, fraction: None)
    (made / "beside.bin").write_bytes(random.Random(1).randbytes(3 * CHUNK + 12345))
    return made


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return board_server.write_wheels(tmp_path_factory.mktemp("wheels") / "wheels")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with board_server.serve(tmp_path) as server:
        yield server


@dataclass
class Told:
    """How the tool ended."""

    status: int
    out: str
    err: str


class Deploy:
    """Runs the tool in this process, as who has another home."""

    def __init__(self, server: Server, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.server, self._capsys, self._patch = server, capsys, patch
        for name in ("HOME", "SSH_AUTH_SOCK"):
            patch.setenv(name, server.env.get(name, ""))
        patch.delenv("SSH_AUTH_SOCK")

    def __call__(self, *words: str | Path, host: str = "board") -> Told:
        self._patch.setattr(sys, "argv", ["deploy_jetson.py", host, *map(str, words)])
        self._capsys.readouterr()
        status = deploy_jetson.main()
        told = self._capsys.readouterr()
        return Told(status, told.out, told.err)


@pytest.fixture
def deploy(server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Deploy:
    return Deploy(server, capsys, monkeypatch)


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without verify, doctor, warm-up and bench: one test shows them, and they take most of the time."""
    monkeypatch.setattr(Installer, "prove", lambda self: None)


def everything(folder: Path) -> dict[str, tuple[int, int, int]]:
    """All that lies in a folder, by what changes when somebody writes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        found[str(path)] = (about.st_ino, about.st_mtime_ns, about.st_size)
    return found


def nothing_half_installed(home: Path) -> None:
    """No release, no link, no bundle and no environment that is not whole."""
    root = home / "edgert-board"
    assert not (root / "current").is_symlink() and not (root / "previous").is_symlink()
    for kind in ("releases", "models"):
        assert not list((root / kind).glob("*"))
    assert all((env / "complete.json").exists() for env in (root / "envs").glob("*"))


# ---- brought up ------------------------------------------------------------------------------------------------------
def test_up_again_on_and_back(deploy: Deploy, bundle: Path, wheels: Path, request: pytest.FixtureRequest) -> None:
    home, scope = deploy.server.home, "user" if services_are_harmless() else "none"
    words = (bundle, "--any-board", "--wheels", wheels, "--service", scope, "--cpus", "1")
    units, root = home / ".config/systemd/user", home / "edgert-board"
    dry = deploy(*words, "--dry-run")
    assert dry.status == 0, dry.err
    for step in ("make the environment", "of the bundle tiny-", "compile the kernels", "in use"):
        assert step in dry.out
    assert not root.exists() and not units.exists()

    first = deploy(*words)
    assert first.status == 0, first.err
    release = (root / "current").resolve()
    proofs = json.loads((release / "release.json").read_text())["proofs"]
    assert proofs["verify"]["sound"] and proofs["doctor"]["settings"]["lanes"] and len(proofs["bench"]["tests"]) == 2
    for line in (
        "verify        sound",
        "doctor        flash reads",
        "kernels compiled",
        "bench         tokens a second",
    ):
        assert line in first.out
    assert f"edgert chat {root}/current/model.edge" in first.out
    answer = [root / "current/env/bin/edgert", "inspect", root / "current/model.edge", "--json"]
    assert json.loads(subprocess.run(answer, capture_output=True, text=True, check=True).stdout)["layers"] == 2
    assert not list((root / "incoming").iterdir())
    if scope == "user":
        unit = (units / "edgert.service").read_text()
        assert "MemoryMax=" in unit and "CPUQuota=100%" in unit and f"{root}/current/env/bin/edgert" in unit
        assert "enabled, not started: systemd does not run there" in first.out

    before = everything(home)
    again = deploy(*words)
    assert again.status == 0 and "nothing to do: the board is as it should be" in again.out
    assert "verify        sound" in again.out and everything(home) == before
    assert deploy("--rollback").err.startswith("error: board: there is no release before")
    assert everything(home) == before

    request.getfixturevalue("unproven")
    if scope == "user":  # somebody turned the service off
        (units / "default.target.wants/edgert.service").unlink()
        assert deploy(*words).status == 0 and (units / "default.target.wants/edgert.service").is_symlink()
    more = deploy(bundle, *USUAL, "--wheels", wheels, "--memory", "400MiB")
    assert more.status == 0 and "copied" not in more.out and not (units / "edgert.service").exists()
    second = (root / "current").resolve()
    assert (root / "previous").resolve() == release != second
    would = deploy("--rollback", "--dry-run")
    assert f"would put {release.name} in use instead of {second.name}" in would.out
    assert (root / "current").resolve() == second
    back = deploy("--rollback")
    assert back.status == 0 and f"release {release.name} is in use again" in back.out
    assert (root / "current").resolve() == release and (root / "previous").resolve() == second
    assert scope == "none" or (units / "edgert.service").read_text() == unit

    with (release / "model.edge" / "hot.bin").open("r+b") as file:  # it rots on the drive
        file.write(b"\xff" * 64)
    rotten = deploy(*words)
    assert rotten.status == 2 and "the bundle in use is damaged" in rotten.err


def services_are_harmless() -> bool:
    """Whether a unit can be installed, and no systemd is there that would start it."""
    return shutil.which("systemctl") is not None and not Path(f"/run/user/{os.getuid()}/systemd/private").exists()


# ---- refused ---------------------------------------------------------------------------------------------------------
def test_a_refused_key_says_how_to_be_let_in(deploy: Deploy, bundle: Path) -> None:
    deploy.server.connect_by(deploy.server.port, "stranger")
    told = deploy(bundle, *USUAL)
    assert told.status == 2 and "refuses the key" in told.err and "ssh-copy-id -p" in told.err
    assert not (deploy.server.home / "edgert-board").exists()


def test_host_keys_are_not_taken_on_trust(deploy: Deploy, bundle: Path) -> None:
    known = deploy.server.client / ".ssh/known_hosts"
    line = known.read_text()
    known.write_text("")
    told = deploy(bundle, *USUAL)
    assert told.status == 2 and "has a host key that is not known" in told.err
    other = (deploy.server.folder / "stranger.pub").read_text().split()[:2]
    known.write_text(f"{line.split()[0]} {' '.join(other)}\n")
    told = deploy(bundle, *USUAL)
    assert told.status == 2 and "shows another host key" in told.err and "ssh-keygen -R" in told.err


def test_a_jump_host_s_key_is_not_taken_on_trust(deploy: Deploy, bundle: Path) -> None:
    ssh, port = deploy.server.client / ".ssh", deploy.server.port
    config, known = (ssh / "config").read_text(), (ssh / "known_hosts").read_text()
    key = (deploy.server.folder / "key", getpass.getuser(), port)
    jump = "Host jump\n  HostName localhost\n  IdentityFile {}\n  User {}\n  Port {}\n".format(*key)
    (ssh / "config").write_text(f"{config}  ProxyJump jump\n{jump}")
    told = deploy(bundle, *USUAL)
    assert told.status == 2 and "jump, on the way there, has a host key that is not known" in told.err
    assert "@localhost\n" in told.err
    (ssh / "known_hosts").write_text(known + known.replace("127.0.0.1", "localhost"))
    told = deploy(bundle)
    assert told.status == 2 and "it is no Jetson" in told.err


def test_a_jump_host_called_none_is_no_jump_host(deploy: Deploy, bundle: Path) -> None:
    config = deploy.server.client / ".ssh/config"
    told = config.read_text()
    config.write_text(f"{told}  ProxyJump none\nHost *\n  ProxyJump nowhere.invalid\n")
    answer = deploy(bundle)
    assert answer.status == 2 and "it is no Jetson" in answer.err
    config.write_text(f"{told}  ProxyJump None\n")
    assert "it is no Jetson" in deploy(bundle).err


def test_nobody_there_is_said(deploy: Deploy, bundle: Path) -> None:
    deploy.server.connect_by(board_server.free_port())
    told = deploy(bundle, *USUAL)
    assert told.status == 2 and told.err.count("\n") == 1
    assert "no connection (Connection refused); is sshd running there?" in told.err


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("", "HOST '' names no host"),
        ("user@:22", "HOST 'user@:22' names no host"),
        ("127.0.0.1:abc", "'abc' is no port"),
        ("127.0.0.1:", "'' is no port"),
        ("127.0.0.1:99999", "'99999' is no port; write one of 1 to 65535"),
        ("127.0.0.1:0", "'0' is no port"),
        ("a..b", "a..b"),
        ("far", "~/.ssh/config gives far port 99999"),
        ("odd", "what ~/.ssh/config says of it cannot be used"),
    ],
)
def test_a_host_that_cannot_be_is_said_in_a_line(deploy: Deploy, bundle: Path, host: str, said: str) -> None:
    with (deploy.server.client / ".ssh/config").open("a") as config:
        config.write("Host far\n  Port 99999\nHost odd\n  Port abc\n")
    told = deploy(bundle, host=host)
    assert told.status == 2 and said in told.err and told.err.count("\n") == 1


def test_what_is_no_jetson_needs_a_word(deploy: Deploy, bundle: Path) -> None:
    told = deploy(bundle)
    assert told.status == 2 and "it is no Jetson" in told.err and "--any-board" in told.err


def test_a_board_that_lacks_memory_is_refused(deploy: Deploy, bundle: Path, wheels: Path) -> None:
    told = deploy(bundle, *USUAL, "--wheels", wheels, "--memory", "4TiB")
    assert told.status == 2 and "--memory is 4096.0 GiB; use less" in told.err
    told = deploy(bundle, *USUAL, "--wheels", wheels, "--memory", "90MiB")
    assert told.status == 2 and "below this model's floor" in told.err
    assert "write for example 5GiB" in deploy(bundle, *USUAL, "--memory", "50%").err
    assert not (deploy.server.home / "edgert-board").exists()


def test_a_wheel_for_another_processor_is_refused(deploy: Deploy, bundle: Path, wheels: Path, tmp_path: Path) -> None:
    version = "cp{}{}".format(*sys.version_info[:2])
    system = subprocess.run(
        ["python3", "-c", "import sys; print('cp%d%d' % sys.version_info[:2])"], capture_output=True
    )
    if system.stdout.decode().strip() != version:
        version = system.stdout.decode().strip()
    for tag, files in (
        (f"{version}-{version}-linux_riscv64", {}),
        (
            f"{version}-{version}-linux_{os.uname().machine}",
            {"a/b.so": b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\0\xf3\0"},
        ),
    ):
        wheel = board_server.write_wheel(tmp_path, "onnxruntime_gpu", tag, files)
        told = deploy(bundle, *USUAL, "--wheels", wheels, "--ort-wheel", wheel)
        assert told.status == 2 and "riscv64" in told.err and "take the wheel for that" in told.err
    assert not (deploy.server.home / "edgert-board").exists()


def test_a_folder_that_holds_something_else_is_left_alone(deploy: Deploy, bundle: Path, wheels: Path) -> None:
    other = deploy.server.home / "edgert-board"
    other.mkdir()
    (other / "letters.txt").write_text("mine")
    told = deploy(bundle, *USUAL, "--wheels", wheels)
    assert told.status == 2 and "holds something else" in told.err
    assert [path.name for path in other.iterdir()] == ["letters.txt"]


def test_an_edgert_that_does_not_start_is_not_installed(
    deploy: Deploy, bundle: Path, wheels: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copy(next(wheels.glob("pip-*")), broken)
    board_server.write_wheel(broken, "edgert", "py3-none-any", {"edgert/__init__.py": b"1 / 0\n"})
    told = deploy(bundle, *USUAL, "--wheels", broken)
    assert told.status == 2 and "importing edgert failed: ZeroDivisionError" in told.err
    nothing_half_installed(deploy.server.home)
    assert not list((deploy.server.home / "edgert-board/envs").iterdir())


def test_a_damaged_bundle_is_not_sent(deploy: Deploy, bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy.edge")
    with (copy / "experts.bin").open("r+b") as file:
        file.write(b"\xff" * 4096)
    told = deploy(copy, *USUAL)
    assert told.status == 2 and "is damaged here" in told.err


# ---- broken off ------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("unproven")
def test_a_line_that_breaks_while_copying_and_the_rest_afterwards(deploy: Deploy, bundle: Path, wheels: Path) -> None:
    line = Line(deploy.server.port, most_bytes=30_000_000)
    deploy.server.connect_by(line.port)
    told = deploy(bundle, *USUAL, "--wheels", wheels)
    line.close()
    assert told.status == 2 and told.err.splitlines()[-1].startswith("error: board: the connection was lost")
    assert "run the same command again, it goes on where it was" in told.err
    nothing_half_installed(deploy.server.home)

    deploy.server.connect_by(deploy.server.port)
    dry = deploy(bundle, *USUAL, "--wheels", wheels, "--dry-run")
    assert "(the rest of" in dry.out
    told = deploy(bundle, *USUAL, "--wheels", wheels)
    assert told.status == 0, told.err
    assert "copied" in told.out and "16 MiB were there" in told.out
    there = deploy.server.home / "edgert-board/current/model.edge/beside.bin"
    assert there.read_bytes() == (bundle / "beside.bin").read_bytes()


def test_a_tool_that_is_killed_while_copying(server: Server, bundle: Path, wheels: Path) -> None:
    line = Line(server.port)
    server.connect_by(line.port)
    tool = subprocess.Popen(server.command(bundle, *USUAL, "--wheels", wheels), env=server.env, stderr=subprocess.PIPE)
    parts = server.home / "edgert-board/incoming"
    for _ in range(1200):
        if line.passed > 12_000_000 or tool.poll() is not None:
            break
        time.sleep(0.05)
    tool.send_signal(signal.SIGKILL)
    _, err = tool.communicate(timeout=30)
    assert tool.returncode == -signal.SIGKILL, err
    assert list(parts.rglob("*.part"))
    nothing_half_installed(server.home)
    line.close()


# ---- small drives ----------------------------------------------------------------------------------------------------
@pytest.fixture
def small_drive(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "drive") as folder:
        yield folder


def test_a_small_drive_is_refused_before_anything_is_copied(
    deploy: Deploy, bundle: Path, wheels: Path, small_drive: Path
) -> None:
    told = deploy(bundle, *USUAL, "--wheels", wheels, "--folder", small_drive / "edgert")
    assert told.status == 2 and "the flash has 24 MiB free, but" in told.err and "name a --folder" in told.err
    assert not list(small_drive.iterdir())


def test_an_environment_that_does_not_fit_is_removed(
    deploy: Deploy, bundle: Path, wheels: Path, small_drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy_jetson, "room_needed", lambda todo: (0, ""))  # others fill the drive afterwards
    (small_drive / "others").write_bytes(bytes(16 << 20))
    told = deploy(bundle, *USUAL, "--wheels", wheels, "--folder", small_drive / "edgert")
    assert told.status == 2 and "the drive is full" in told.err
    assert not list((small_drive / "edgert/envs").iterdir()) and not (small_drive / "edgert/current").is_symlink()
