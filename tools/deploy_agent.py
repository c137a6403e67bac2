"""What deploy_jetson.py asks of a board, run there by the board's own Python: state, digests, publishing, switching.

The source of this file is sent with every question, so nothing of it stays on the board and it needs the standard
library alone. What standard input brings after the question is its end alone: that of the connection.

    ROOT/deployment.json     says that the folder is this tool's
    ROOT/incoming/           what is being copied; nothing in it is used
    ROOT/envs/ID/            a virtual environment; whole if complete.json is in it
    ROOT/models/NAME.edge/   a bundle; moved here when all of it is there
    ROOT/releases/ID/        links to an environment and a bundle, their service and report
    ROOT/current, previous   links to releases
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARK, COMPLETE, RELEASE = "deployment.json", "complete.json", "release.json"
KINDS = ("envs", "models", "releases")


# ---- asked -----------------------------------------------------------------------------------------------------------
def state(root: str) -> dict[str, Any]:
    """What earlier deployments left in a folder, and the room on its drive."""
    base = Path(root)
    there = _existing(base)
    releases = {}
    for folder in _folders(base / "releases"):
        with contextlib.suppress(OSError, ValueError):
            releases[folder.name] = json.loads((folder / RELEASE).read_text())
    incoming = base / "incoming"
    return {
        "ours": (base / MARK).exists(),
        "empty": not base.exists() or all(entry.name == "lock" for entry in base.iterdir()),
        "writable": os.access(there, os.W_OK | os.X_OK),
        "free": free(root),
        "envs": [folder.name for folder in _folders(base / "envs") if (folder / COMPLETE).exists()],
        "models": [folder.name for folder in _folders(base / "models")],
        "releases": releases,
        "incoming": {str(path.relative_to(incoming)): path.stat().st_size for path in _files(incoming)},
        "current": _target(base / "current"),
        "previous": _target(base / "previous"),
    }


def free(path: str) -> int:
    """Bytes that may be written where a path lies or would lie."""
    return shutil.disk_usage(_existing(Path(path))).free


def begin(root: str) -> None:
    """Make the folders, and remove what an interrupted deployment left half done."""
    base = Path(root)
    for kind in ("incoming", *KINDS):
        (base / kind).mkdir(mode=0o755, parents=True, exist_ok=True)
    write(str(base / MARK), json.dumps({"made by": "edgert, tools/deploy_jetson.py", "layout": 1}) + "\n")
    for folder in _folders(base / "envs"):
        if not (folder / COMPLETE).exists():
            shutil.rmtree(folder)
    for folder in _folders(base / "releases"):
        if not (folder / RELEASE).exists():
            shutil.rmtree(folder)


def digest(path: str, chunk: int) -> dict[str, Any]:
    """Size and SHA-256 of a file and of each whole chunk of it; size 0 where there is none."""
    whole, chunks, size = hashlib.sha256(), [], 0
    if os.path.exists(path):
        with open(path, "rb") as file:
            while piece := file.read(chunk):
                whole.update(piece)
                size += len(piece)
                if len(piece) == chunk:
                    chunks.append(hashlib.sha256(piece).hexdigest())
    return {"size": size, "sha256": whole.hexdigest(), "chunks": chunks}


def digests(paths: list[str], chunk: int) -> list[dict[str, Any]]:
    """Of several files."""
    return [digest(path, chunk) for path in paths]


def cut(sizes: dict[str, int]) -> None:
    """Keep the first bytes of files, made where there are none; and the folders above them."""
    for path, size in sizes.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.truncate(size)


def seal(coming: list[tuple[str, str, str]]) -> list[str]:
    """Give whole files their names, (half copy, name, digest) each; names of those whose digest is another, removed."""
    damaged = []
    for part, path, sha256 in coming:
        if digest(part, 1 << 22)["sha256"] == sha256:
            _flush(Path(part))
            os.replace(part, path)
        else:
            os.unlink(part)
            damaged.append(path)
    for folder in {os.path.dirname(path) for _, path, _ in coming}:
        _flush(Path(folder))
    return damaged


def publish(source: str, target: str) -> None:
    """Give a whole folder its name."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    _flush(Path(source))
    os.rename(source, target)
    _flush(Path(target).parent)


def write(path: str, text: str) -> None:
    """Write a file, whole or not at all."""
    beside = Path(f"{path}.new")
    beside.write_text(text)
    _flush(beside)
    os.replace(beside, path)


def read(path: str) -> str | None:
    """A file's text, or None."""
    try:
        return Path(path).read_text()
    except OSError:
        return None


def link(path: str, target: str | None) -> None:
    """Let a link point to something else, in one step; None: remove it."""
    if target is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    beside = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(beside)
    os.symlink(target, beside)
    os.replace(beside, path)
    _flush(Path(path).parent)


def remove(paths: list[str]) -> None:
    """Remove files and folders; those that are not there are passed over."""
    for path in map(Path, paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def network(url: str) -> str:
    """Nothing if an address answers, else why not."""
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=6):
            return ""
    except urllib.error.HTTPError:
        return ""  # it answers
    except (OSError, ValueError) as problem:
        return str(getattr(problem, "reason", problem))


# ---- what ends with the connection -----------------------------------------------------------------------------------
def hold(root: str, at_end: list[str]) -> None:
    """Keep other deployments away until the connection ends. Says "held", or who else is here.

    at_end: a command to run then, however it ended: what was stopped for a while starts again.
    """
    Path(root).mkdir(parents=True, exist_ok=True)
    with open(Path(root, "lock"), "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            print(json.dumps({"busy": lock.read().strip()}), flush=True)
            return
        lock.truncate(0)
        lock.write(time.strftime("since %Y-%m-%d %H:%M:%S"))
        lock.flush()
        print(json.dumps({"held": True}), flush=True)
        while os.read(0, 4096):
            pass
        if at_end:
            subprocess.run(at_end, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def watch(argv: list[str], env: dict[str, str], timeout: float) -> int:
    """Run a program that ends when the connection does, or when its time is over. Its status; 124: too long."""
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, env={**os.environ, **env}, start_new_session=True)
    ends = time.monotonic() + timeout
    while child.poll() is None:
        ready = select.select([0], [], [], 0.1)[0]
        if (ready and not os.read(0, 4096)) or time.monotonic() > ends:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
            return 124
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


# ---- within ----------------------------------------------------------------------------------------------------------
def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []


def _existing(path: Path) -> Path:
    """The path, or the first folder above it that is there."""
    while not path.exists():
        path = path.parent
    return path


def _files(path: Path) -> Iterator[Path]:
    return (entry for entry in path.rglob("*") if entry.is_file())


def _target(path: Path) -> str | None:
    """The name of what a link points to."""
    return os.path.basename(os.readlink(path)) if path.is_symlink() else None


def _flush(path: Path) -> None:
    """Have a file or folder written to the drive before what follows."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


ASKED = (state, free, begin, digest, digests, cut, seal, publish, write, read, link, remove, network)


def main(question: str, values: dict[str, Any]) -> int:
    """Answer one question with one line of JSON. The exit status."""
    if question == "hold":
        hold(**values)
        return 0
    if question == "watch":
        return watch(**values)
    asked = {function.__name__: function for function in ASKED}[question]
    try:
        answer = asked(**values)  # type: ignore[operator]
    except OSError as problem:
        print(json.dumps({"problem": problem.strerror, "errno": problem.errno, "path": problem.filename}))
        return 0
    print(json.dumps({"answer": answer}))
    return 0
