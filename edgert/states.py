"""What the experts are given on calibration text, token by token, kept on disk: the rows that quantisers work with.

One file of float16, layer by layer, as a pass over the profile's text leaves it; the routes are the profile's own. A
small file beside it says how much of the text has passed, for a collection that is to go on after a kill.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.devices.base import Device
from edgert.errors import EdgertError, OptionError, StorageError
from edgert.experts.profile import Profile, normalised
from edgert.model import Model
from edgert.profile_run import run_chunk, tokens_meter
from edgert.tile_store import write_aside
from edgert.types import Floats, Ids
from edgert.weights import Progress

_LARGEST = float(np.finfo(np.float16).max)
_NOTE_S = 5.0  # between two notes of how much was collected


class States:
    """Rows of the layers that were collected. `path` is the caller's to remove.

    rows: float16 (n_layers of `layers`, n_tokens, d_model), mapped from the file. shares: float32 (n_tokens,), what
    each token counts by its domain's share, 1 in the mean. Raises StorageError where the file is not there as a whole.
    """

    def __init__(self, profile: Profile, layers: Sequence[int], path: Path) -> None:
        self.profile, self.layers, self.path = profile, list(layers), path
        if not _is_whole(path, shape := _shape(profile, self.layers)):
            raise StorageError(f"{path}: what the experts were given is gone, or cut short; collect it anew")
        self.rows: npt.NDArray[np.float16] = np.memmap(path, np.float16, "r", shape=shape)
        counts, shares = [len(domain.tokens) for domain in profile.domains], normalised(profile.shares)
        each = [shares.get(domain.name, 0.0) * profile.n_tokens / len(domain.tokens) for domain in profile.domains]
        self.shares: Floats = np.repeat(np.array(each, np.float32), counts)

    def tokens(self, layer: int, expert: int) -> tuple[Ids, Floats]:
        """The tokens (n,) that were routed to an expert, ascending over all domains that count, and weights (n,)."""
        found, weights, start = [], [], 0
        for domain in self.profile.domains:
            token, place = np.nonzero(domain.ids[layer] == expert)
            found.append(token + start)
            weights.append(domain.weights[layer][token, place])
            start += len(domain.tokens)
        tokens = np.concatenate(found)
        counts = self.shares[tokens] > 0
        return tokens[counts], np.concatenate(weights).astype(np.float32)[counts]

    def of(self, layer: int, expert: int, limit: int = 4096) -> tuple[Floats, Floats, Floats]:
        """What an expert was given (n, d_model), the router's weights (n,) and `shares` (n,), at most `limit` of them,
        evenly spread.

        OptionError for a layer that was not collected.
        """
        if layer not in self.layers:
            raise OptionError(f"layer {layer} was not collected; there are {self.layers}")
        tokens, weights = self.tokens(layer, expert)
        if len(tokens) > limit:
            chosen = (2 * np.arange(limit) + 1) * len(tokens) // (2 * limit)
            tokens, weights = tokens[chosen], weights[chosen]
        return self.rows[self.layers.index(layer)][tokens].astype(np.float32), weights, self.shares[tokens]


def collect_states(
    model: Model, profile: Profile, layers: Sequence[int] | None, path: Path, progress: Progress, about: str = ""
) -> States:
    """Run the profile's text once more and keep what the experts of `layers` (None: all that have experts) are given.

    about: a digest of what decides it all. With one, what was collected stays when progress(stage, fraction) raises, or
    the process is killed, and the next call with the same goes on; without one, the file is removed. Raises
    StorageError where there is no room for it (2 bytes x layers x tokens x width), EdgertError where the routes are not
    the profile's: it is of another model.
    """
    layers = profile.layers if layers is None else list(layers)
    shape, note = _shape(profile, layers), _Note(path, about)
    if not (note.done and _is_whole(path, shape)):
        note.write(0)
        _check_room(path, 2 * math.prod(shape))
    try:
        if note.done < profile.n_tokens:
            rows = np.memmap(path, np.float16, "r+", shape=shape)
            _fill(model, profile, layers, rows, note, progress)
    except BaseException:
        if not about:
            path.unlink(missing_ok=True)
        raise
    return States(profile, layers, path)


def _shape(profile: Profile, layers: Sequence[int]) -> tuple[int, int, int]:
    return len(layers), profile.n_tokens, profile.input_moments.shape[2]


def _is_whole(path: Path, shape: tuple[int, int, int]) -> bool:
    """Whether the file is as long as it has to be."""
    try:
        return path.stat().st_size == 2 * math.prod(shape)
    except OSError:
        return False


class _Note:
    """How many tokens of a file are collected, `done`, written beside it; 0 where it is about something else."""

    def __init__(self, path: Path, about: str) -> None:
        self._path, self._about, self.done = path.with_name(f"{path.name}.done"), about, 0
        with suppress(OSError, ValueError):
            found, _, done = self._path.read_text().partition(" ")
            self.done = int(done) if found == about else 0

    def write(self, done: int) -> None:
        """Note so many; nothing is written where there is nothing to be about."""
        self.done = done
        if self._about:
            write_aside(self._path, f"{self._about} {done}".encode())


def _fill(
    model: Model,
    profile: Profile,
    layers: Sequence[int],
    rows: np.memmap[Any, np.dtype[np.float16]],
    note: _Note,
    progress: Progress,
) -> None:
    """Run the text from where the note says and write the rows."""
    chunk, meter = profile.chunk, tokens_meter(progress, "collecting", profile.n_tokens, note.done)
    if chunk > model.n_context:
        raise OptionError(f"the profile is in chunks of {chunk} tokens, the context holds {model.n_context}; raise it")
    tokens, noted_at = np.concatenate([domain.tokens for domain in profile.domains]).tolist(), time.monotonic()
    with model.held() as parts:
        collector = _Collector(parts.engine.device, profile, layers, rows)
        collector.done = whole = note.done
        try:
            for start in range(whole, len(tokens), chunk):
                for n in run_chunk(parts, tokens[start : start + chunk], collector.observe):
                    collector.done += n
                    meter.add(n, f"{collector.done:,} of {len(tokens):,} tokens")
                whole = collector.done
                if time.monotonic() > noted_at + _NOTE_S:
                    rows.flush()
                    note.write(whole)
                    noted_at = time.monotonic()
        finally:
            rows.flush()
            note.write(whole)


class _Collector:
    """Writes the rows of one step after the other; `done`: tokens of earlier steps."""

    def __init__(self, device: Device, profile: Profile, layers: Sequence[int], rows: npt.NDArray[np.float16]) -> None:
        self._device, self._places, self._rows = device, {layer: place for place, layer in enumerate(layers)}, rows
        self._ids = np.concatenate([domain.ids for domain in profile.domains], axis=1)
        self.done = 0

    def observe(self, layer: int) -> None:
        """See edgert.engine.Observer."""
        found = self._device.inputs(layer)
        here = slice(self.done, self.done + len(found))
        if not np.array_equal(self._device.routed(layer).routes.ids, self._ids[layer, here]):
            raise EdgertError(
                f"layer {layer} routes otherwise than in the profile: it is of another model, or was made with other "
                "--activations or --kv-type; profile this model"
            )
        if layer in self._places:
            self._rows[self._places[layer], here] = np.clip(found, -_LARGEST, _LARGEST)


def _check_room(path: Path, n_bytes: int) -> None:
    """StorageError unless the disk has room for the file, allocated in one go."""
    try:
        free = shutil.disk_usage(path.absolute().parent).free
        if free < n_bytes:
            raise StorageError(
                f"{path}: {n_bytes:,} bytes are needed for what the experts are given, {free:,} are free; make room, "
                "or profile fewer --tokens"
            )
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written ({error.strerror}); name another folder") from error
