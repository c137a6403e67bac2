"""A real sshd on loopback that stands for a board, with keys and a home folder of its own, and a line that can break.

The session's HOME is a folder of the test; everything else is this machine.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "deploy_jetson.py"
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
_SERVERS = [Path("/usr/lib/openssh/sftp-server"), Path("/usr/libexec/sftp-server")]
SFTP = next((str(path) for path in _SERVERS if path.exists()), "internal-sftp")


def why_not() -> str:
    """Why no sshd can be started here, or nothing."""
    if not SSHD or not shutil.which("ssh-keygen"):
        return "there is no sshd: apt-get install openssh-server"
    if shutil.which("python3") is None:
        return "there is no python3 for sessions over SSH"
    return ""


@dataclass
class Server:
    """The board: folders, port, and what to connect with."""

    folder: Path
    port: int

    @property
    def home(self) -> Path:
        """The board's."""
        return self.folder / "board"

    @property
    def client(self) -> Path:
        """The home folder of who deploys."""
        return self.folder / "client"

    def connect_by(self, port: int, key: str = "key") -> None:
        """Let `board` stand for this sshd, by way of a port."""
        ssh = self.client / ".ssh"
        (ssh / "config").write_text(
            f"Host board\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n"
            f"  IdentityFile {self.folder / key}\n  IdentitiesOnly yes\n"
        )
        known = (self.folder / "host.pub").read_text().split()[:2]
        (ssh / "known_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(known)}\n")

    def deploy(self, *words: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run the tool as a person does."""
        return subprocess.run(self.command(*words), capture_output=True, text=True, timeout=timeout, env=self.env)

    def command(self, *words: str | Path) -> list[str]:
        """The tool's, with this board as its host."""
        return [sys.executable, str(TOOL), "board", *map(str, words)]

    @property
    def env(self) -> dict[str, str]:
        """Of who deploys: another home, and no agent that holds other keys."""
        env = {**os.environ, "HOME": str(self.client), "PYTHONPATH": str(ROOT)}
        env.pop("SSH_AUTH_SOCK", None)
        return env


@contextmanager
def serve(
    folder: Path, more: str = "", *, env: Mapping[str, str] | None = None, within: Sequence[str] = ()
) -> Iterator[Server]:
    """Start an sshd with two keys, of which it knows one.

    more: lines of its configuration; env: of its sessions; within: a command that starts it.
    """
    port = free_port()
    server = Server(folder, port)
    for path in (server.home, server.client / ".ssh"):
        path.mkdir(parents=True, mode=0o700)
    for name in ("host", "key", "stranger"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    shutil.copy(folder / "key.pub", folder / "authorized")
    if env is None:  # of the tests: kernels compiled before are there
        names = ("XDG_CACHE_HOME", "XDG_STATE_HOME")
        env = {"HOME": str(server.home), **{name: os.environ[name] for name in names if name in os.environ}}
    (folder / "sshd_config").write_text(
        f"""
        Port {port}
        ListenAddress 127.0.0.1
        HostKey {folder}/host
        PidFile none
        AuthorizedKeysFile {folder}/authorized
        PasswordAuthentication no
        KbdInteractiveAuthentication no
        UsePAM no
        StrictModes no
        PermitRootLogin prohibit-password
        Subsystem sftp {"internal-sftp" if "Chroot" in more else SFTP}
        SetEnv {" ".join(f"{name}={value}" for name, value in env.items())}
        MaxStartups 50
        {more}
        """
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    assert SSHD
    log = (folder / "sshd.log").open("w")
    command = [*within, SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
    daemon = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)
    try:
        wait_for(port, daemon, folder / "sshd.log")
        server.connect_by(port)
        yield server
    finally:
        daemon.terminate()
        daemon.wait(10)
        log.close()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, daemon: subprocess.Popen[bytes], log: Path) -> None:
    """Until it listens; AssertionError with its last words."""
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert daemon.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


class Line:
    """A line to a port that breaks after so many bytes on their way there, or when told."""

    def __init__(self, port: int, most_bytes: int | None = None) -> None:
        self._left, self._there = most_bytes, port
        self.passed = 0
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._there))
            except OSError:
                return
            self._sockets += [here, there]
            for one, other, counts in ((here, there, True), (there, here, False)):
                thread = threading.Thread(target=self._pump, args=(one, other, counts), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, one: socket.socket, other: socket.socket, counts: bool) -> None:
        while True:
            try:
                data = one.recv(1 << 16)
                if data:
                    other.sendall(data)
            except OSError:
                data = b""
            if counts:
                self.passed += len(data)
            if self._left is not None and self.passed > self._left:
                return self.cut()
            if not data:
                return _shut(one, other)

    def cut(self) -> None:
        """Break it, for good."""
        _shut(self._listener, *self._sockets)

    def close(self) -> None:
        """Break it and wait."""
        self.cut()
        for thread in self._threads:
            thread.join(10)


def _shut(*sockets: socket.socket) -> None:
    """Close, waking who waits for them."""
    for one in sockets:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()


def write_wheel(folder: Path, name: str, tag: str, files: dict[str, bytes], requires: str = "") -> Path:
    """A wheel of a few files."""
    stem = f"{name}-1.0"
    path = folder / f"{stem}-{tag}.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{requires}"
    kind = f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
    whole = {**files, f"{stem}.dist-info/METADATA": metadata.encode(), f"{stem}.dist-info/WHEEL": kind.encode()}
    record = "".join(f"{entry},,\n" for entry in [*whole, f"{stem}.dist-info/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in {**whole, f"{stem}.dist-info/RECORD": record.encode()}.items():
            archive.writestr(zipfile.ZipInfo(entry, (2020, 1, 1, 0, 0, 0)), content)
    return path


def write_wheels(folder: Path) -> Path:
    """Wheels for a board that is this machine: pip's, and one that lets it use the edgert under test as it lies here.

    So all that edgert does there is real, and no wheel of a library has to be there.
    """
    import ensurepip

    folder.mkdir()
    bundled = Path(ensurepip.__file__).parent / "_bundled"
    for path in [*bundled.glob("pip-*.whl"), *Path("/usr/share/python-wheels").glob("pip-*.whl")][:1]:
        shutil.copy(path, folder)
    paths = [str(ROOT), *(path for path in sys.path if path.endswith("-packages"))]
    scripts = b"[console_scripts]\nedgert = edgert.cli.main:main\n"
    files = {"edgert_here.pth": "\n".join(paths).encode() + b"\n", "edgert-1.0.dist-info/entry_points.txt": scripts}
    write_wheel(folder, "edgert", "py3-none-any", files)
    return folder
