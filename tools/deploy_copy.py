"""Copying a file to a board: what is there already stays, chunks are checked, and only a whole file gets its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deploy_board import DeployError, size
from deploy_bundle import CHUNK, LocalFile, chunk_digest
from deploy_link import Link

_BLOCK = 256 << 10


@dataclass
class Copied:
    """What a copy sent, and what it found there."""

    sent: int = 0
    kept: int = 0


def copy_file(link: Link, file: LocalFile, target: str, told: Callable[[int], None] = lambda n_bytes: None) -> Copied:
    """Bring a file to `target`, going on where an earlier copy ended.

    told: called with the bytes of each step. DeployError: the drive is full (what was copied of this file is removed),
    the copy differs from the file, or the connection was lost (what was copied stays).
    """
    part = f"{target}.part"
    if link.ask("digest", path=target, chunk=CHUNK)["sha256"] == file.sha256:
        told(file.size)
        return Copied(0, file.size)
    kept = good_bytes(link, file, part)
    link.ask("cut", path=part, size=kept)
    told(kept)
    try:
        _send(link, file, part, kept, told)
    except OSError as problem:  # SFTP says "Failure" for a full drive too
        raise _broken(link, file, part, problem) from problem
    if not link.ask("seal", part=part, path=target, sha256=file.sha256):
        raise DeployError(f"{file.name} arrived damaged and was removed; run the same command again")
    return Copied(file.size - kept, kept)


def good_bytes(link: Link, file: LocalFile, part: str) -> int:
    """How much of a half-copied file equals the file: whole chunks."""
    there = link.ask("digest", path=part, chunk=CHUNK)
    for index, digest in enumerate(there["chunks"]):
        if (index + 1) * CHUNK > file.size or chunk_digest(file.path, index) != digest:
            return index * CHUNK
    return len(there["chunks"]) * CHUNK


def _send(link: Link, file: LocalFile, part: str, first: int, told: Callable[[int], None]) -> None:
    """Append what is missing. OSError: the board's, from its drive."""
    with link.mapped(), file.path.open("rb") as source, link.sftp.open(part, "r+") as there:
        there.set_pipelined(True)  # many writes on their way at once; what goes wrong is told by a later one
        source.seek(first)
        there.seek(first)
        while block := source.read(_BLOCK):
            there.write(block)
            told(len(block))
        there.set_pipelined(False)
        if there.stat().st_size != file.size:
            raise OSError("not all of it was written")


def _broken(link: Link, file: LocalFile, part: str, problem: OSError) -> DeployError:
    """Why a copy ended, with the drive as it was before."""
    left = file.size - int(link.ask("digest", path=part, chunk=CHUNK)["size"])
    free = int(link.ask("free", path=part))
    if free >= left:
        return DeployError(f"{link.host}: {part} cannot be written: {problem}")
    link.ask("remove", paths=[part])
    return DeployError(
        f"{link.host}: the drive is full: {size(free)} were left, {file.name} needed {size(left)} more; its half copy "
        f"was removed, nothing else changed: free {size(file.size)} or name a --folder on another drive"
    )
