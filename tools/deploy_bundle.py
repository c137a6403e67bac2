"""The bundle that is to be deployed, as this machine has it: sound or not, its digest, the memory that it takes."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from deploy_board import DeployError

CHUNK = 16 << 20  # bytes of a copy that are checked by themselves when it goes on
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class LocalFile:
    """A file to copy. name: as it is called there."""

    path: Path
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class LocalBundle:
    """A bundle to deploy. floor, whole: the least memory that it runs in, and what it takes with all experts in RAM."""

    path: Path
    name: str
    files: tuple[LocalFile, ...]
    floor: int
    whole: int

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """Of names and contents: another bundle has another."""
        told = "".join(f"{file.name} {file.sha256}\n" for file in self.files)
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    @property
    def folder(self) -> str:
        """Its name on the board, its own for each content."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", self.path.resolve().name.removesuffix(".edge"))[:60]
        return f"{stem}-{self.digest}.edge"


def find_bundle(path: Path) -> None:
    """DeployError: there is no bundle."""
    if not path.exists():
        raise DeployError(f"{path}: no such bundle; make one with: edgert pack MODEL.gguf {shlex.quote(str(path))}")
    if not (path / "manifest.json").is_file():
        model = (path.is_file() and path.suffix == ".gguf") or (path / "config.json").is_file()  # Hugging Face's folder
        source = shlex.quote(str(path)) if model else "MODEL.gguf"
        raise DeployError(f"{path} is no bundle; make one with: edgert pack {source}, and deploy what it names")


def read_bundle(path: Path, context: int | None, cores: int, progress: Progress) -> LocalBundle:
    """Check every byte of a bundle, and count what it needs there. DeployError: it is none, or damaged.

    cores: of the board; this machine's, and the kernels that are compiled here, make no difference.
    """
    from edgert.errors import EdgertError
    from edgert.verify import verify

    find_bundle(path)
    if problems := verify(path, progress):
        raise DeployError(f"{path} is damaged here ({problems[0]}); pack the model again")
    try:
        name, floor, whole = _counted(path, context, cores)
    except EdgertError as problem:
        raise DeployError(str(problem)) from problem
    files = tuple(local_file(file, file.name) for file in sorted(path.iterdir()) if file.is_file())
    return LocalBundle(path, name, files, floor, whole)


def _counted(path: Path, context: int | None, cores: int) -> tuple[str, int, int]:
    """Name, and the bytes of the smallest budget that runs and of all in RAM, kernels compiled on the way."""
    from edgert.architectures import read_config
    from edgert.loading import context_of, name_of, open_model
    from edgert.memory import STARTING_BYTES
    from edgert.needs import needs
    from edgert.weights import Weights

    with contextlib.closing(open_model(path)) as file:
        config = read_config(file.metadata, str(path))
        needed = needs(Weights(file, config), context_of(context, config), "f16", max(cores, 1))
        needed = replace(needed, compiling=True)
        whole = needed.plan(max(needed.work)).total
        return (name_of(file), max(needed.floor().total, STARTING_BYTES), max(whole, STARTING_BYTES))


def local_file(path: Path, name: str) -> LocalFile:
    """A file and its digest."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            size += len(piece)
    return LocalFile(path, name, size, digest.hexdigest())


def chunk_digest(path: Path, index: int) -> str:
    """The digest of one chunk of a file."""
    with path.open("rb") as file:
        file.seek(index * CHUNK)
        return hashlib.sha256(file.read(CHUNK)).hexdigest()
