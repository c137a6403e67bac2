"""Copying files to a board: what is there already stays, chunks are checked, and only a whole file gets its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy_board import DeployError, plain, size
from deploy_bundle import CHUNK, LocalFile, chunk_digest
from deploy_link import Link

_BLOCK = 256 << 10


@dataclass
class Copied:
    """What a copy sent, and what it found there."""

    sent: int = 0
    kept: int = 0


def copy_files(
    link: Link, files: Sequence[LocalFile], folder: str, told: Callable[[str, int], None] = lambda name, n_bytes: None
) -> Copied:
    """Bring files into a folder, going on where an earlier copy ended.

    told: called with a name and the bytes of each step. DeployError: the drive is full (what was copied of the file at
    hand is removed), a copy differs from its file, or the connection was lost (what was copied stays).
    """
    targets = {f"{folder}/{file.name}": file for file in files}
    there = link.ask("digests", paths=[*targets, *(f"{target}.part" for target in targets)], chunk=CHUNK)
    kept, done = {}, Copied()
    for place, (target, file) in enumerate(targets.items()):
        whole = there[place]["sha256"] == file.sha256
        found = file.size if whole else good_bytes(file, there[len(targets) + place])
        done.kept += found
        if found:
            told(file.name, found)
        if not whole:
            kept[target] = found
    link.ask("cut", sizes={f"{target}.part": found for target, found in kept.items()})
    for target, found in kept.items():
        file = targets[target]
        try:
            _send(link, file, f"{target}.part", found, told)
        except OSError as problem:  # SFTP says "Failure" for a full drive too
            raise _broken(link, file, f"{target}.part", problem) from problem
        done.sent += file.size - found
    damaged = link.ask("seal", coming=[(f"{target}.part", target, targets[target].sha256) for target in kept])
    if damaged:
        names = ", ".join(targets[target].name for target in damaged)
        raise DeployError(f"{link.host}: {names} arrived damaged and was removed; run the same command again")
    return done


def good_bytes(file: LocalFile, there: Mapping[str, Any]) -> int:
    """How much of a half-copied file equals the file: all of it, or whole chunks."""
    if there["sha256"] == file.sha256:
        return file.size
    for index, digest in enumerate(there["chunks"]):
        if (index + 1) * CHUNK > file.size or chunk_digest(file.path, index) != digest:
            return index * CHUNK
    return len(there["chunks"]) * CHUNK


def _send(link: Link, file: LocalFile, part: str, first: int, told: Callable[[str, int], None]) -> None:
    """Append what is missing. OSError: the board's, from its drive."""
    with link.mapped(), file.path.open("rb") as source, link.sftp.open(part, "r+") as there:
        there.set_pipelined(True)  # many writes on their way at once; what goes wrong is told by a later one
        source.seek(first)
        there.seek(first)
        while block := source.read(_BLOCK):
            there.write(block)
            told(file.name, len(block))
        there.set_pipelined(False)
        if there.stat().st_size != file.size:
            raise OSError("not all of it was written")


def _broken(link: Link, file: LocalFile, part: str, problem: OSError) -> DeployError:
    """Why a copy ended, with the drive as it was before."""
    left = file.size - int(link.ask("digest", path=part, chunk=CHUNK)["size"])
    free = int(link.ask("free", path=part))
    if free >= left:
        return DeployError(f"{link.host}: {part} cannot be written: {plain(str(problem))}")
    link.ask("remove", paths=[part])
    return DeployError(
        f"{link.host}: the drive is full: {size(free)} were left, {file.name} needed {size(left)} more; its half copy "
        f"was removed, nothing else changed: free {size(file.size)} or name a --folder on another drive"
    )
