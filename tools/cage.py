"""Runs a command under a memory limit that counts the page cache, and says what it took: a cgroup of its own.

For Linux with writable cgroups, version 1 or 2, as root. Used by capped_peer.py and by tests.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_MIB = 1 << 20


class CageError(Exception):
    """There are no writable memory cgroups here."""


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and what it took."""

    status: int
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int  # page cache and kernel memory included
    limit_hits: int  # times that memory was asked for at the limit
    kills: int  # processes that the kernel ended for want of memory


def run(
    command: Sequence[str], limit: int, *, timeout_s: float = 3600, env: Mapping[str, str] | None = None
) -> Outcome:
    """Run `command` with at most `limit` bytes. CageError; subprocess.TimeoutExpired, the command ended."""
    files = _Files()
    group = files.parent / f"edgert-cage-{os.getpid()}-{time.monotonic_ns()}"
    try:
        group.mkdir()
    except OSError as problem:
        raise CageError(f"{group} cannot be made: {problem.strerror}") from problem
    try:
        _write(group / files.limit, str(limit))
        # the shell joins the group and becomes the command, so that all of it is counted
        joined = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]
        began = time.perf_counter()
        with _ended_by_sigterm():
            done = subprocess.run(joined, capture_output=True, text=True, timeout=timeout_s, env=env)
        seconds = time.perf_counter() - began
        kills = _count(group / files.kills, "oom_kill")
        hits = _count(group / files.hits, "max") if files.version == 2 else int((group / files.hits).read_text())
        peak = int((group / files.peak).read_text())
        return Outcome(done.returncode, done.stdout, done.stderr, seconds, peak, hits, kills)
    finally:
        _remove(group)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, and not this program alone."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: the command is on its way out
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def drop_page_cache() -> None:
    """Drop all files from the page cache of the machine: what is read next comes from the disk."""
    os.sync()
    _write(Path("/proc/sys/vm/drop_caches"), "3")


def why_not() -> str:
    """Why no command can be run here, or nothing if it can."""
    try:
        run(["/bin/true"], 64 * _MIB)
    except (CageError, OSError) as problem:
        return str(problem)
    return ""


class _Files:
    """Names of the files of a memory cgroup, by version."""

    def __init__(self) -> None:
        first = ROOT / "memory" / "memory.limit_in_bytes"
        if first.exists():
            self.version, self.parent = 1, first.parent
            self.limit = first.name  # not that of memory and swap too: hits would be counted there alone
            self.peak, self.hits, self.kills = "memory.max_usage_in_bytes", "memory.failcnt", "memory.oom_control"
        else:
            self.version, self.parent = 2, ROOT
            self.limit = "memory.max"
            self.peak, self.hits, self.kills = "memory.peak", "memory.events", "memory.events"
            with contextlib.suppress(CageError):  # it may be on already
                _write(ROOT / "cgroup.subtree_control", "+memory")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as problem:
        raise CageError(f"{path} cannot be written: {problem.strerror}") from problem


def _count(path: Path, name: str) -> int:
    """One of the counts that a file lists by name."""
    counts = dict(line.split() for line in path.read_text().splitlines())
    return int(counts.get(name, 0))


def _remove(group: Path) -> None:
    """Remove a group; its last process may still be on its way out."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)
