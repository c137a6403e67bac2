"""Deploying to an emulated 64-bit ARM board, from nothing to a rollback, with all that can go wrong on the way.

python tools/deploy_emulated.py FOLDER     FOLDER keeps the board's Debian for the next time

For root on Debian or Ubuntu with openssh-server. debootstrap installs an arm64 Debian, qemu runs its programs, this
machine's sshd lets the tool into it over loopback. What makes it a Jetson (JetPack's files, device tree, power mode,
8 GB of memory) is simulated and named so; edgert, its wheels and what they compute are real.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import aarch64

TREE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TREE / "tests"))

import board_server  # noqa: E402   # found through the line above
import tiny_moe  # noqa: E402
from board_server import Line, Server  # noqa: E402

SUITE, PACKAGES = "bookworm", "python3,systemd"
RELEASE = "# R36 (release), REVISION: 4.3, GCID: 0, BOARD: simulated, EABI: aarch64, DATE: simulated\n"
MODEL = "NVIDIA Jetson Orin Nano Developer Kit (simulated)\0"
MODES = "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=0 >\n"
CPU = {"NUMBA_CPU_NAME": "cortex-a78", "NUMBA_CPU_FEATURES": "+neon,+dotprod"}
RAM_KB = 7802880
ROOT = "root/edgert-board"  # in the board


def main() -> int:
    """Make the board, run all scenes, and say how long each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the board's Debian is kept")
    folder = parser.parse_args().folder.resolve()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tool is to get it, whoever ignores it here
    aarch64.refuse_without_tools()
    if board_server.why_not():
        sys.exit(board_server.why_not())
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgert-emulated-")))
        stack.enter_context(aarch64.programs_for_arm())
        board = Board(install_debian(folder), scratch)
        bundle = make_bundle(scratch)
        server = stack.enter_context(board.serve())
        failed = [scene.__name__ for scene in SCENES if not passed(scene, Stage(board, server, bundle))]
    print(f"== FAILED: {', '.join(failed)}" if failed else "== all of it as it should be, on a simulated board")
    return 1 if failed else 0


def install_debian(folder: Path) -> Path:
    """The board's root folder, made where there is none, with what tells a Jetson; nothing deployed."""
    debian, partial = folder / "debian", folder / "debian.partial"
    if not debian.is_dir():
        with aarch64.step(f"arm64 Debian in {debian}"):
            shutil.rmtree(partial, ignore_errors=True)
            command = ["debootstrap", "--arch=arm64", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(partial)]
            with (folder / "debootstrap.log").open("w") as log:
                done = aarch64.apart(
                    'exec "$0" "$@"', *command, *aarch64.mirror(), stdout=log, stderr=log, env=aarch64.proxied()
                )
            if done.returncode:
                sys.exit(f"debootstrap failed: see {log.name}")
            partial.rename(debian)
    for path, text in (
        ("etc/nv_tegra_release", RELEASE),
        ("sys/firmware/devicetree/base/model", MODEL),
        ("etc/nvpmodel.conf", MODES),
        ("var/lib/nvpmodel/status", "pmode:0000 fmode:quiet\n"),
    ):
        (debian / path).parent.mkdir(parents=True, exist_ok=True)
        (debian / path).write_text(text)
    for path in (ROOT, "root/.cache", "mnt/small", "etc/systemd/system/edgert.service"):
        shutil.rmtree(debian / path, ignore_errors=True)
    (debian / "etc/systemd/system/edgert.service").unlink(missing_ok=True)
    (debian / "etc/systemd/system/multi-user.target.wants/edgert.service").unlink(missing_ok=True)
    (debian / "mnt/small").mkdir()
    return debian


def make_bundle(folder: Path) -> Path:
    """A tiny model, and beside it enough to interrupt the copying of."""
    from edgert.pack import pack

    bundle = pack(tiny_moe.write(folder / "tiny.gguf"), folder / "tiny.edge", progress=lambda stage, fraction: None)
    (bundle / "beside.bin").write_bytes(os.urandom(60 << 20))
    return bundle


class Board:
    """The emulated board: its root folder, and what its memory is said to be."""

    def __init__(self, debian: Path, scratch: Path) -> None:
        self.debian, self._scratch, self._meminfo = debian, scratch, scratch / "meminfo"
        self.set_memory(RAM_KB, RAM_KB - (1 << 20))

    def set_memory(self, total_kb: int, free_kb: int) -> None:
        """What /proc/meminfo says there, from now on."""
        lines = (f"MemTotal: {total_kb} kB", f"MemFree: {free_kb} kB", f"MemAvailable: {free_kb} kB")
        zeros = ("Buffers", "Cached", "SwapTotal", "SwapFree", "Shmem", "Active", "Inactive", "Slab")
        self._meminfo.write_text("\n".join((*lines, *(f"{name}: 0 kB" for name in zeros))) + "\n")

    def serve(self) -> contextlib.AbstractContextManager[Server]:
        """This machine's sshd, whose sessions live in the board; its mounts end with it.

        sshd changes only into a folder above which all folders are root's alone, so the board is mounted at one.
        """
        script = """
            mkdir -p /run/edgert-board; mount --bind "$0" /run/edgert-board; cd /run/edgert-board
            mount -t proc proc proc; mount --bind "$1" proc/meminfo; mount -t tmpfs -o size=400m none mnt/small
            cd /; shift; exec "$@"
        """
        apart = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script]
        within = [*apart, str(self.debian), str(self._meminfo)]
        env = {"HOME": "/root", "LANG": "C.UTF-8", **CPU}
        return board_server.serve(self._scratch / "server", "ChrootDirectory /run/edgert-board", env=env, within=within)

    def there(self, pattern: str) -> list[str]:
        """Names of what lies in the deployment's folder."""
        return sorted(path.name for path in (self.debian / ROOT).glob(pattern))


class Stage:
    """What scenes play on."""

    def __init__(self, board: Board, server: Server, bundle: Path) -> None:
        self.board, self.server, self.bundle = board, server, bundle

    def deploy(self, *words: str | Path, model: bool = True) -> str:
        """Run the tool, show what it says and return it."""
        given = [self.bundle] if model else []
        done = self.server.deploy(*given, "--offline", *words, timeout=7200)
        said = done.stdout + done.stderr + f"(exit status {done.returncode})"
        print("".join(f"    {line}\n" for line in said.splitlines()), end="", flush=True)
        return said

    def refused(self, said: str, *words: str) -> None:
        """One line says so, and nothing is half installed."""
        assert "(exit status 2)" in said and "Traceback" not in said, "it should have been refused"
        assert all(word in said.splitlines()[-2] for word in words), f"it should say {words}"
        assert (
            not self.board.there("current") and not self.board.there("releases/*") and not self.board.there("models/*")
        )
        assert not [env for env in self.board.there("envs/*") if not self.board.there(f"envs/{env}/complete.json")]


# ---- scenes ----------------------------------------------------------------------------------------------------------
def dry_run(stage: Stage) -> None:
    """Everything is said and nothing done."""
    said = stage.deploy("--dry-run")
    for words in ("JetPack 6.2 (L4T 36.4.3)", "Orin Nano Developer Kit (simulated)", "aarch64", "systemctl enable"):
        assert words in said, words
    assert "15W holds the clocks down" in said and "(exit status 0)" in said
    assert not (stage.board.debian / ROOT).exists()


def too_little_memory(stage: Stage) -> None:
    """A board of 256 MiB is refused."""
    stage.board.set_memory(262144, 200000)
    try:
        stage.refused(stage.deploy(), "256 MiB of memory", "needs at least")
    finally:
        stage.board.set_memory(RAM_KB, RAM_KB - (1 << 20))


def wheel_of_another_processor(stage: Stage) -> None:
    """An x86 wheel is refused by its name, and one that is renamed by what is in it."""
    with tempfile.TemporaryDirectory() as folder:
        x86 = {"onnxruntime/capi/provider.so": b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00"}
        for machine in ("x86_64", "aarch64"):
            tag = f"cp311-cp311-linux_{machine}"
            wheel = board_server.write_wheel(Path(folder), "onnxruntime_gpu", tag, x86)
            stage.refused(stage.deploy("--ort-wheel", wheel), "x86_64", "take the wheel for that")


def refused_key(stage: Stage) -> None:
    """A key that the board does not know."""
    stage.server.connect_by(stage.server.port, "stranger")
    try:
        stage.refused(stage.deploy(), "refuses the key", "ssh-copy-id")
    finally:
        stage.server.connect_by(stage.server.port)


def full_drive(stage: Stage) -> None:
    """A drive of 400 MB."""
    said = stage.deploy("--folder", "/mnt/small/edgert")
    stage.refused(said, "the flash has", "are needed", "name a --folder")


def lost_connection(stage: Stage) -> None:
    """The line breaks in the middle of edgert's wheel."""
    line = Line(stage.server.port, most_bytes=60_000_000)
    stage.server.connect_by(line.port)
    try:
        stage.refused(stage.deploy(), "the connection was lost", "run the same command again")
    finally:
        line.close()
        stage.server.connect_by(stage.server.port)
    assert stage.board.there("incoming/*/*.part")


def interrupted_copy(stage: Stage) -> None:
    """Ctrl-C in the middle of the same copy; it went on where the line had broken."""
    line = Line(stage.server.port)
    stage.server.connect_by(line.port)
    command = stage.server.command(stage.bundle, "--offline")
    tool = subprocess.Popen(command, env=stage.server.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(6000):
            if line.passed > 40_000_000 or tool.poll() is not None:
                break
            time.sleep(0.1)
        tool.send_signal(signal.SIGINT)
        said = tool.communicate(timeout=60)[0]
    finally:
        line.close()
        stage.server.connect_by(stage.server.port)
    print(f"    ... {said.splitlines()[-1]} (exit status {tool.returncode})")
    assert tool.returncode == 130 and "interrupted: what is in use on the board is as it was" in said
    assert not stage.board.there("current")


def deployment(stage: Stage) -> None:
    """All of it, from what was copied; edgert then answers there."""
    said = stage.deploy()
    assert "(exit status 0)" in said and "were there" in said
    for words in (
        "verify        sound",
        "doctor        flash",
        "kernels compiled",
        "tokens a second: ",
        "enabled, not started",
    ):
        assert words in said, words
    assert stage.board.there("current") and not stage.board.there("incoming/*")
    unit = (stage.board.debian / "etc/systemd/system/edgert.service").read_text()
    assert "MemoryMax=" in unit and "/root/edgert-board/current/env/bin/edgert" in unit
    assert (stage.board.debian / "etc/systemd/system/multi-user.target.wants/edgert.service").is_symlink()


def second_run(stage: Stage) -> None:
    """Nothing changes."""
    before = list(everything(stage.board.debian))
    said = stage.deploy()
    assert "nothing to do: the board is as it should be" in said
    changed = set(before) ^ set(everything(stage.board.debian))
    assert not changed, sorted(changed)[:5]


def another_and_back(stage: Stage) -> None:
    """A release with another budget, and the way back."""
    first = (stage.board.debian / ROOT / "current").readlink()
    assert "(exit status 0)" in stage.deploy("--memory", "600MiB")
    assert (stage.board.debian / ROOT / "current").readlink() != first
    unit = stage.board.debian / "etc/systemd/system/edgert.service"
    assert "MemoryMax=600M" in unit.read_text()
    assert "(exit status 0)" in stage.deploy("--rollback", model=False)
    assert (stage.board.debian / ROOT / "current").readlink() == first and "MemoryMax=600M" not in unit.read_text()


SCENES = (
    dry_run,
    too_little_memory,
    wheel_of_another_processor,
    refused_key,
    full_drive,
    lost_connection,
    interrupted_copy,
    deployment,
    second_run,
    another_and_back,
)


def everything(debian: Path) -> Iterator[tuple[str, int, int]]:
    """What lies in the folders that a deployment writes to; edgert's own cache marks when it was last used."""
    for folder in (ROOT, "etc/systemd"):
        for path in (debian / folder).rglob("*"):
            about = path.lstat()
            yield str(path), about.st_mtime_ns, about.st_size


def passed(scene: object, stage: Stage) -> bool:
    """Play one scene."""
    name, text = scene.__name__, (scene.__doc__ or "").strip()  # type: ignore[attr-defined]
    print(f"== {name.replace('_', ' ')}: {text}", flush=True)
    began = time.monotonic()
    try:
        scene(stage)  # type: ignore[operator]
    except (AssertionError, OSError) as problem:
        print(f"== {name}: FAILED: {problem}", flush=True)
        return False
    print(f"== {name}: {time.monotonic() - began:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
