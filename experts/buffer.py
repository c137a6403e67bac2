"""The expert buffer and what is in it: experts on their way from flash, those that are there, and who has to go.

Used by one thread, the one that runs the model; the reader's lanes only fill places and report. Experts that have a
pin stay; of the others the policy names the one to give up. When to read what is streamed.py's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgert.devices.base import ABSENT, READING, READY, Device, Table
from edgert.experts.policies import Policy
from edgert.experts.slots import ALIGNMENT, Slots
from edgert.quant.formats import PackedPart
from edgert.storage.reader import Arrival, Read, Reader
from edgert.types import Ids

AHEAD, NEEDED = 1, 2  # pins
_MOST_MOVED = 2  # times the bytes of a gap that may be moved for it, where something else may be given up


class Records(Protocol):
    """Where the expert records of a model lie."""

    record_bytes: Ids  # (n_layers, n_expert); 0 where a layer has no experts
    record_offset: Ids

    def parts(self, layer: int, expert: int) -> tuple[PackedPart, PackedPart, PackedPart]:
        """Gate, up and down within a record."""

    def check_record(self, layer: int, expert: int, record: npt.NDArray[np.uint8]) -> None:
        """Raise ModelFileError if the bytes of a record are not those that were packed."""


class Checked:
    """Compares each record with its checksum when it is first read: for a Reader, which calls it on a lane."""

    def __init__(self, records: Records) -> None:
        self._records, self._seen = records, np.zeros(records.record_bytes.size, np.bool_)

    def __call__(self, read: Read) -> None:
        """Raise ModelFileError if the bytes are not those that were packed."""
        if not self._seen[read.key]:
            layer, expert = divmod(read.key, self._records.record_bytes.shape[1])
            self._records.check_record(layer, expert, read.buffer)
            self._seen[read.key] = True


class ExpertBuffer:
    """Experts by key, `layer * n_expert + expert`: state (ABSENT, READING, READY), and pins (0, AHEAD, NEEDED).

    What has a pin is not given up. AHEAD is for what was read before it was asked for: it goes if all else is needed,
    and if its read fails, nobody is told, for it will be read again when it is.
    """

    HALVES_FROM = 1 << 20  # bytes of a record from which gate and up are computed while down is on its way

    def __init__(self, device: Device, records: Records, reader: Reader, slots: Slots, policy: Policy) -> None:
        self._device, self._records, self._slots, self._policy = device, records, slots, policy
        self.reader = reader
        n_layers, self.n_expert = records.record_bytes.shape
        self.sizes: Ids = records.record_bytes.reshape(-1)
        self.tables: Sequence[Table | None] = [
            device.new_table(self.n_expert) if sizes.any() else None for sizes in records.record_bytes
        ]
        for layer, table in enumerate(self.tables):  # the device learns now which kinds of records will come
            if table is not None:
                for expert in range(self.n_expert):
                    device.place_expert(table, expert, records.parts(layer, expert), slots.memory)
        n_keys = len(self.sizes)
        self.state = np.zeros(n_keys, np.uint8)
        self.pins = np.zeros(n_keys, np.uint8)
        self.reads: dict[int, Read] = {}  # under way
        self.lost: list[int] = []  # needed experts whose reads had been cancelled before they were
        self._offsets = records.record_offset.reshape(-1)
        self._place = np.full(n_keys, -1, np.int64)
        self._layer_of = np.arange(n_keys) // self.n_expert
        self._layer_bytes = np.zeros(n_layers, np.int64)  # of the buffer, by layer
        self._shares: npt.NDArray[np.float64] | None = None  # bytes that each layer keeps; None: one for all
        self._victims: deque[int] = deque()
        self._only_over = False  # whether those are of layers that have more than their share
        self._moving = False  # records between two places

    @property
    def n_bytes(self) -> int:
        """Bytes that may be in use."""
        return self._slots.limit

    @property
    def most_bytes(self) -> int:
        """Bytes that it was made for."""
        return len(self._slots.memory)

    # ---- reading -----------------------------------------------------------------------------------------------------
    def read(self, keys: deque[int], layer: int, *, urgent: bool = True) -> None:
        """Submit reads of absent experts, as many as there is room for while `layer` runs; the rest stays in `keys`."""
        reads: list[Read] = []
        self._victims.clear()
        while keys:
            if self.start(keys[0], layer, reads, urgent=urgent):
                keys.popleft()
            elif self.reads or not (self.pins == AHEAD).any():
                break
            else:
                self.pins[self.pins == AHEAD] = 0
        if reads:
            self.reader.submit(reads)

    def start(self, key: int, layer: int, reads: list[Read], *, urgent: bool) -> bool:
        """Add the read of an absent expert, into a place of its own, to `reads`; False if there is no room."""
        size = int(self.sizes[key])
        place = self._room(size, layer)
        if place is None:
            return False
        of_layer, expert = divmod(key, self.n_expert)
        buffer, parts = self._slots.at(place, size), self._records.parts(of_layer, expert)
        self._place[key], self.state[key] = place, READING
        self._layer_bytes[of_layer] += size
        self._device.place_expert(self._table(of_layer), expert, parts, buffer)
        marks = (parts[2].offset, size) if size >= self.HALVES_FROM else (size,)
        read = self.reads[key] = Read(key, int(self._offsets[key]), buffer, marks, urgent)
        reads.append(read)
        return True

    def read_again(self, keys: Iterable[int]) -> list[Read]:
        """Reads of experts that are here into their own places, to measure the flash with: not one byte changes.

        For whoever submits them and takes all their arrivals while nothing else is under way.
        """
        sizes = {int(key): int(self.sizes[key]) for key in keys}
        return [
            Read(key, int(self._offsets[key]), self._slots.at(int(self._place[key]), size), (size,))
            for key, size in sizes.items()
        ]

    def book(self, arrivals: Iterable[Arrival]) -> list[tuple[int, bool]]:
        """Note arrivals: (key, whether it is whole now) of each; raises what went wrong with one that is needed."""
        found, error = [], None
        for arrival in arrivals:
            key = arrival.read.key
            if arrival.error is not None or arrival.cancelled:
                del self.reads[key]
                self.give_up(key)
                if self.pins[key] == NEEDED and arrival.error is not None:
                    error = arrival.error
                elif self.pins[key] == NEEDED:
                    self.lost.append(key)
                continue
            whole = arrival.mark == len(arrival.read.buffer)
            if whole:
                del self.reads[key]
                self.state[key] = READY
            found.append((key, whole))
        if error is not None:
            raise error
        return found

    def cancel_all(self) -> None:
        """Until this returns, nothing writes into the buffer any more."""
        self.pins[:] = 0
        self.lost.clear()
        self.reader.cancel(list(self.reads.values()))
        while arrivals := self.reader.wait():  # none once nothing is under way
            self.book(arrivals)

    def recover(self) -> None:
        """After a step that was cut short, by Ctrl-C at any line: keep what is surely whole, do the books anew."""
        self.cancel_all()
        if self._moving:
            self.state[:], self._moving = ABSENT, False
        whole = self.state == READY
        self.state[~whole], self._place[~whole] = ABSENT, -1
        self.reads.clear()  # of arrivals that nobody got
        self._slots.keep(dict(zip(self._place[whole].tolist(), self.sizes[whole].tolist(), strict=True)))
        self._layer_bytes[:] = np.bincount(self._layer_of, self.sizes * whole, len(self._layer_bytes))

    def _table(self, layer: int) -> Table:
        table = self.tables[layer]
        assert table is not None, f"layer {layer} has no experts"
        return table

    # ---- room --------------------------------------------------------------------------------------------------------
    def share_out(self, window: int | None) -> None:
        """Let each layer keep a share of all but `window` bytes; None: whoever is worth most stays.

        For where a policy over all layers would keep nothing for long: below one token's working set, and in a prompt,
        which goes through all layers once a chunk. The window is what experts pass through.
        """
        self._shares = None
        if window is not None:
            by_layer = self._records.record_bytes.sum(axis=1)
            self._shares = max(self.n_bytes - window, 0) * (by_layer / by_layer.sum())

    def _room(self, n_bytes: int, layer: int) -> int | None:
        """A place of that size, others having been given up for it; None if all that is here is needed.

        Gaps are joined where that moves little; else one more is given up, whose place may do.
        """
        while (place := self._slots.take(n_bytes)) is None:
            may_fit = self._slots.free_bytes >= n_bytes
            if may_fit and self._join_gaps(n_bytes, _MOST_MOVED * n_bytes):
                continue
            victim = self._victim(layer)
            if victim is not None:
                self.give_up(victim)
            elif not may_fit or not self._join_gaps(n_bytes, self.n_bytes):
                return None
        return place

    def _victim(self, layer: int) -> int | None:
        """The expert to give up: of layers that have more than their share, or of all, the one worth least."""
        while True:
            if not self._victims and not self._list_victims(layer):
                return None
            key = self._victims.popleft()
            if self.state[key] != READY or self.pins[key]:
                continue
            if self._only_over and not self._over()[self._layer_of[key]]:
                self._victims.clear()  # its layer has given up enough: who else has too much?
                continue
            return key

    def _list_victims(self, layer: int) -> bool:
        """List what may be given up, least worth first; whether there is anything."""
        keys = np.flatnonzero((self.state == READY) & (self.pins == 0))
        self._only_over = False
        if self._shares is not None:
            over = self._over()[self._layer_of[keys]]
            self._only_over = bool(over.any())
            keys = keys[over] if self._only_over else keys
        if len(keys):
            worth = self._policy.worth(keys, layer)
            self._victims.extend(keys[np.argsort(worth, kind="stable")].tolist())
        return len(keys) > 0

    def _over(self) -> npt.NDArray[np.bool_]:
        """Which layers have more than their share of the buffer."""
        assert self._shares is not None
        return self._layer_bytes > self._shares

    def give_up(self, key: int) -> None:
        """An expert is absent, and its place free again."""
        place = int(self._place[key])
        self.state[key], self._place[key] = ABSENT, -1  # first: what is READY is whole, also after Ctrl-C
        self._slots.give_back(place, int(self.sizes[key]))
        self._layer_bytes[self._layer_of[key]] -= self.sizes[key]

    def _join_gaps(self, n_bytes: int, most_bytes: int) -> bool:
        """Move experts that nobody computes or reads, most_bytes of them, so that a gap of n_bytes comes about."""
        keys = np.flatnonzero((self.state == READY) & (self.pins == 0))
        places = self._place[keys].tolist()
        at = dict(zip(places, keys.tolist(), strict=True))
        sizes = dict(zip(places, self.sizes[keys].tolist(), strict=True))

        def moved(old: int, new: int) -> None:
            key = at[old]
            layer, expert = divmod(key, self.n_expert)
            self._place[key] = new
            buffer = self._slots.at(new, int(self.sizes[key]))
            self._device.place_expert(self._table(layer), expert, self._records.parts(layer, expert), buffer)

        self._moving = True
        joined = self._slots.join_gaps(n_bytes, sizes, moved, most_bytes)
        self._moving = False
        return joined

    # ---- the whole ---------------------------------------------------------------------------------------------------
    def resize(self, n_bytes: int) -> None:
        """Give up what lies beyond a new size, a multiple of 4,096; nothing is under way."""
        assert n_bytes % ALIGNMENT == 0 and not self.reads
        beyond = self._slots.memory[n_bytes:]
        for key in np.flatnonzero((self.state == READY) & (self._place + self.sizes > n_bytes)).tolist():
            self.give_up(key)
            layer, expert = divmod(key, self.n_expert)  # what a device made of records that lay there goes with them
            self._device.place_expert(self._table(layer), expert, self._records.parts(layer, expert), beyond)
        self._slots.set_limit(n_bytes)

    def check(self) -> list[str]:
        """What is wrong, one line each; empty if nothing is."""
        places = {int(self._place[key]): int(self.sizes[key]) for key in np.flatnonzero(self.state != ABSENT)}
        wrong = self._slots.check(places) + self.reader.check()
        reading = set(np.flatnonzero(self.state == READING).tolist())
        if reading != set(self.reads):
            wrong.append(f"{len(reading)} experts are being read, {len(self.reads)} reads are known")
        by_layer = np.bincount(self._layer_of, self.sizes * (self.state != ABSENT), len(self._layer_bytes))
        if (by_layer != self._layer_bytes).any():
            wrong.append("the layers' bytes do not add up")
        return wrong
