"""Packing: a model's file becomes a bundle, written aside, resumable after a kill, published by rename.

    NAME.edge.part/     locked by the process that packs; journal, hot.bin, experts.bin grow here
    NAME.edge/          the same folder under its own name, once all of it is durable

Memory does not grow with the model. Packing a model again gives the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgert.architectures import read_config
from edgert.chosen_bits import PROFILE, asked_words, profile_digest, same_goal
from edgert.errors import EdgertError, ModelFileError, OptionError, StorageError, UnsupportedError
from edgert.experts.profile import Profile
from edgert.huggingface import HuggingFaceFolder, is_huggingface_folder
from edgert.model_digest import model_digest
from edgert.pack_journal import Journal
from edgert.pack_layout import Bytes, Item, Layout, Step, source_file, source_files
from edgert.pack_meter import Meter
from edgert.pack_place import JOURNAL, Place, check_replaceable, part_of
from edgert.storage import bundle as bundles
from edgert.storage.bundle_manifest import PAGE, VERSION, Manifest, round_up
from edgert.storage.bundle_writer import SlabWriter
from edgert.storage.gguf_file import GgufFile
from edgert.storage.read_ahead import read_ahead
from edgert.storage.tensor_file import TensorFile
from edgert.tensor_views import skipped
from edgert.weight_sources import WeightSource
from edgert.weights import Progress, Weights

_SPARE_BYTES = 16 << 20  # left free on the disk
_SUFFIX = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Packed:
    """What a pack came to: bytes written by this run, and left by an earlier one; none of both where it was there."""

    path: Path
    n_bytes: int
    written: int
    resumed: int
    seconds: float
    inexact: dict[str, str]  # by tensor type: what its weights lost
    skipped: str  # what of the source is not run, and not in the bundle, in a line; mostly empty


def open_source(path: Path, *, keep_pages: bool = True) -> TensorFile:
    """Open what can be packed, by what the path is; without `keep_pages` what was read leaves the page cache."""
    if bundles.is_bundle(path):
        raise OptionError(f"{path} is a bundle already: name the model that it was packed from, or another")
    if is_huggingface_folder(path):
        return HuggingFaceFolder.open(path)
    return GgufFile.open(path, keep_pages=keep_pages)


def default_out(source: Path) -> Path:
    """Where a bundle goes by default: beside the source, under its name."""
    source = source.absolute()  # of a link, the folder that it lies in
    return source.with_name(f"{stem(source)}.edge")


def stem(source: Path) -> str:
    """The name of a model by its file or folder."""
    return source.name if source.is_dir() else _SUFFIX.sub("", source.name) or source.name


def pack(source: Path, out: Path | None = None, *, progress: Progress) -> Path:
    """Pack a model into the bundle `out`, by default beside it; see pack_model."""
    return pack_model(source, out, progress=progress).path


def pack_model(source: Path, out: Path | None = None, *, progress: Progress, profile: Profile | None = None) -> Packed:
    """Pack a model; a bundle that is there and current is left as it is, a half-packed one is gone on with.

    profile: what the runtime is to choose policies and predictions by; weights are as they are without it.
    progress is called with what is going on (with MB/s and the time left) and a fraction; it may raise, and what is
    done is kept. Raises StorageError where the disk is full or read-only, OptionError where `out` is something else,
    and what opening the source raises.
    """
    source = Path(source)
    out = default_out(source) if out is None else Path(out)
    started = time.perf_counter()
    with contextlib.closing(open_source(source, keep_pages=False)) as file, storage_errors(out):
        if profile is not None:
            check_profile(profile, file, source)
        packing, asked = Packing(file, progress), {PROFILE: profile_digest(profile)} if profile is not None else {}
        packing.manifest.model = {**packing.manifest.model, **asked}

        def run(place: Place) -> tuple[int, int]:
            written = packing.fill(place)
            if profile is not None:
                add_profile(place, profile, packing.manifest, progress)
            else:  # of a pack that was given up
                (place.path / bundles.PROFILE).unlink(missing_ok=True)
                (place.path / bundles.CHOICE).unlink(missing_ok=True)
            place.publish()
            return written

        written, resumed = pack_locked(file, source, out, asked, progress, run)
        seconds = time.perf_counter() - started
        return Packed(out, bundles.size(out), written, resumed, seconds, packing.inexact, packing.skipped)


def check_profile(profile: Profile, file: TensorFile, source: Path, found: Path | None = None) -> None:
    """OptionError for a profile of another model; found: where one lay that nobody gave."""
    if profile.digest != model_digest(file):
        which, remedy = "the profile", "make one of this model with `edgert profile`"
        if found is not None:
            which, remedy = f"{found}, taken as no profile was given,", "remove it, or give --profile FILE"
        known = profile.model.partition(" ModelConfig")[0]
        raise OptionError(f"{which} is of another model than {source} (it knows {known}): {remedy}")


def add_profile(place: Place, profile: Profile, manifest: Manifest, progress: Progress) -> None:
    """Put a profile into a bundle that is otherwise whole, and what the runtime chooses by it."""
    from edgert.experts.profiled_choice import bundle_choice  # numba comes with it

    progress("replaying the profile's routes", 1.0)
    profile.save(place.path / bundles.PROFILE)
    write_durably(place.path / bundles.CHOICE, bundle_choice(profile, manifest.record_bytes))


def check_goal(out: Path, asked: Mapping[str, Any]) -> None:
    """OptionError if something is at `out` that a pack with this goal must not replace."""
    check_replaceable(out)
    try:
        held = _asked_of(bundles.read_manifest(out)) if out.exists() else asked
    except EdgertError:  # damaged: it is packed anew
        return
    if not same_goal(held, asked):
        raise OptionError(
            f"{out} was packed with {asked_words(held)}, and this is {asked_words(asked)}: name another folder for it, "
            f"or remove {out.name}"
        )


def pack_locked(
    file: TensorFile,
    source: Path,
    out: Path,
    asked: Mapping[str, Any],
    progress: Progress,
    run: Callable[[Place], tuple[int, int]],
) -> tuple[int, int]:
    """Run what fills and publishes the locked place of `out`, unless that is current or another process does so.

    asked: what was asked for beside the source's own weights. Gives the bytes written, and those that were there.
    """
    check_goal(out, asked)
    why = _why_anew(out, source, file, asked)
    while not is_current(out, source, asked):
        with Place(out, lambda: progress(f"waiting: another process packs {out.name}", 0.0)) as place:
            if not place.is_mine:
                continue  # it was published, or given up
            if is_current(out, source, asked):  # published between the look and the lock
                place.remove()
                break
            if why:
                progress(f"packing anew: {why}", 0.0)
            return run(place)
    return 0, 0


def is_current(bundle: Path, source: Path, asked: Mapping[str, Any] | None = None) -> bool:
    """Whether there is a bundle, whole by the sizes of its files, of the files that the source has now. Opens neither.

    A touched source counts as changed, as with make; asked: see pack_locked.
    """
    try:
        manifest = bundles.read_manifest(bundle)
        folder = source if source.is_dir() else source.parent
        now = tuple(source_file(folder / file.name) for file in manifest.files)
        sizes = [(bundle / name).stat().st_size for name in (bundles.HOT, bundles.EXPERTS, bundles.METADATA)]
    except (EdgertError, OSError):
        return False
    whole = sizes == [manifest.hot_bytes, manifest.expert_bytes, manifest.metadata_bytes]
    same = manifest.source == str(source.resolve()) and now == manifest.files
    held = _asked_of(manifest)
    return whole and same and (held == asked or (not asked and same_goal(held, {})))


def _asked_of(manifest: Manifest) -> Mapping[str, Any]:
    """What a bundle was asked to be; the source's own weights: nothing, or the digest of a profile that it has."""
    held = manifest.bits.get("asked", {})
    if not manifest.bits and PROFILE in manifest.model:
        return {PROFILE: manifest.model[PROFILE]}
    return held if isinstance(held, Mapping) else {}


def _why_anew(out: Path, source: Path, file: TensorFile, asked: Mapping[str, Any]) -> str:
    """Why a bundle that is there has to be packed anew; empty: it has not. OptionError: it is another model's."""
    if not out.exists() or is_current(out, source, asked):
        return ""
    try:
        manifest = bundles.read_manifest(out)
    except EdgertError as error:
        return str(error)
    if manifest.source != str(source.resolve()):
        raise OptionError(f"{out} was packed from {manifest.source}: remove it, or name another folder")
    if manifest.files != source_files(file):
        return f"{file.path.name} has changed since it was packed"
    return f"{out.name} is damaged" if _asked_of(manifest) == asked else "with another profile, or proved on other text"


class Packing:
    """One run of packing, in a folder that is locked.

    source: the weights to pack, by default the file's own. made: a digest of what the source's weights were made from
    and how; work under another one is begun anew, for its weights may be others in the same formats.
    """

    def __init__(
        self, file: TensorFile, progress: Progress, source: WeightSource | None = None, made: str = ""
    ) -> None:
        self._file, self._made = file, made
        config = read_config(file.metadata, str(file.path))
        self._layout = Layout(file, Weights(file, config, source=source))
        self.manifest = m = self._layout.manifest
        self._total, self.inexact = m.hot_bytes + m.expert_bytes, m.inexact
        self.skipped = skipped(config)
        self._progress = progress

    def fill(self, place: Place) -> tuple[int, int]:
        """Pack what is missing; the bytes written, and those that were there. The folder then is a bundle."""
        folder, m = place.path, self._layout.manifest
        items = list(self._layout.items())
        journal = self._open_journal(folder, items)
        try:
            resumed = self._make(folder, items, journal)
            self._layout.set_checksums(journal.done)
            if source_files(self._file) != m.files:
                raise ModelFileError(f"{self._file.path}: the file was changed while it was packed; pack it again")
            write_durably(folder / bundles.METADATA, self._layout.metadata)
            write_durably(folder / bundles.MANIFEST, m.as_text().encode())
        except BaseException as error:
            if not journal.done or isinstance(error, (ModelFileError, UnsupportedError)):
                place.remove()  # there is nothing to go on with
            raise
        finally:
            journal.close()
        return self._total - resumed, resumed

    def _make(self, folder: Path, items: list[Item], journal: Journal) -> int:
        """Make the items that are missing; the bytes of the others."""
        n_done = len(journal.done)
        resumed = sum(round_up(item.n_bytes, PAGE) for item in items[:n_done])
        self._check_space(folder)
        if resumed:
            share = resumed / self._total
            self._progress(f"going on: {share:.0%} of {folder.name} was there already", share)
        self._meter = Meter(self._progress, f"packing {self._file.path.name}", self._total, resumed)
        for is_hot, name in ((True, bundles.HOT), (False, bundles.EXPERTS)):
            todo = [item for item in items[n_done:] if item.is_hot == is_hot]
            if todo:
                self._write(folder / name, todo, journal)
        (folder / bundles.EXPERTS).touch()  # a dense model has none
        return resumed

    def _open_journal(self, folder: Path, items: list[Item]) -> Journal:
        """The journal, with what of it the files bear out."""
        m, path = self._layout.manifest, folder / JOURNAL
        header = {
            "version": VERSION,
            "layout": m.content(),
            "made": self._made,
            "source": m.source,
            "files": [[file.name, file.n_bytes, file.mtime_ns] for file in m.files],
        }
        journal = Journal(path, header)
        ends = {item.is_hot: item.offset + item.n_bytes for item in items[: len(journal.done)]}
        for is_hot, end in ends.items():
            file = folder / (bundles.HOT if is_hot else bundles.EXPERTS)
            if not file.exists() or file.stat().st_size < end:
                journal.close()
                path.unlink()
                return Journal(path, header)
        return journal

    def _check_space(self, folder: Path) -> None:
        """StorageError if the disk has no room for what is missing."""
        there = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
        found = os.statvfs(folder)
        free = found.f_bavail * found.f_frsize
        needed = self._total + len(self._layout.metadata) + len(self._layout.manifest.as_text()) + _SPARE_BYTES - there
        if needed > free:
            more, missing = (-(-n // 2**20) for n in (needed, needed - free))
            raise StorageError(
                f"{folder.parent}: packing {self._file.path.name} takes {more:,} MiB more, but only "
                f"{free // 2**20:,} MiB are free; free {missing:,} MiB, or name a folder elsewhere"
            )

    def _write(self, path: Path, items: list[Item], journal: Journal) -> None:
        """Make items, which follow each other in one file, and note in the journal what is on disk."""
        made: deque[tuple[int, int]] = deque()  # ends and checksums of items that may not be durable yet

        def durable(position: int) -> None:
            checksums = []
            while made and made[0][0] <= position:
                checksums.append(made.popleft()[1])
            journal.add(checksums)

        writer = SlabWriter(path, items[0].offset, durable)
        reads = read_ahead(partial(_read, step) for item in items for step in item.steps())
        try:
            for item in items:
                writer.begin()
                assert writer.position == item.offset, (item, writer.position)
                while writer.position < item.offset + item.n_bytes:
                    step, raw = next(reads)
                    step.put(raw, writer.take(step.n_bytes))
                made.append((writer.position, writer.end()))
                self._meter.add(round_up(item.n_bytes, PAGE), item.words)
            writer.finish()
        finally:
            reads.close()
            writer.close()


def _read(step: Step) -> tuple[Step, Bytes]:
    return step, step.read()


def write_durably(path: Path, content: bytes) -> None:
    """A small file, written and synced."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def storage_errors(out: Path) -> Iterator[None]:
    """Turn what the disk says into a StorageError with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            problem = f"{out}: the disk is full ({error.strerror}); free some space and pack again"
            if (part := part_of(out)).exists():
                problem += f", which goes on where it broke off, or remove {part}"
        elif error.errno in _READ_ONLY:
            problem = f"{out}: the folder cannot be written ({error.strerror}); name a bundle elsewhere: OUT.edge"
        elif error.errno == errno.ENOENT and not out.parent.is_dir():
            problem = f"{out}: there is no folder {out.parent}; make it first"
        else:
            problem = f"{error.filename or out}: packing failed ({error.strerror or error}); check the disk"
        raise StorageError(problem) from error
