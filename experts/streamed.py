"""Experts that lie on flash: what is read when, so that the arithmetic waits as little as may be.

Of a token's experts those in RAM run while the others are read, and each of these runs as it comes. A prompt takes the
experts of a layer in ascending id, while those of the next layer follow on flash. What to give up for them is
buffer.py's, what to read before it is asked for prefetch.py's.
"""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from edgert.devices.base import ABSENT, APART, READING, READY, Device, ExpertGroup, Routed
from edgert.experts.buffer import AHEAD, NEEDED, ExpertBuffer
from edgert.experts.policies import Policy
from edgert.experts.prefetch import Prefetcher
from edgert.experts.slots import ALIGNMENT
from edgert.storage.reader import Arrival, Read
from edgert.types import ExpertCounts, Ids

_IN_ORDER_GROUP = 4  # experts of a prompt that run at a time: between them places are freed and reads follow
_SEED_TOKENS = 64  # of a chunk's end, by which the policy judges what to keep for the answer


class Streamed:
    """A residency whose experts lie on flash; see experts.residency.Residency."""

    def __init__(
        self, device: Device, buffer: ExpertBuffer, policy: Policy, top_k: int, prefetcher: Prefetcher | None = None
    ) -> None:
        self._device, self._buffer, self._policy, self._prefetcher = device, buffer, policy, prefetcher
        self._reader, self._n_expert = buffer.reader, buffer.n_expert
        self.tables, self.states = buffer.tables, buffer.state
        self._hits, self._misses, self._wait_s = 0, 0, 0.0
        self.watch: Callable[[], None] = lambda: None  # called when a step begins: it may ask for another size,
        self.between_requests: Callable[[], None] = lambda: None  # and this one when an answer begins
        self._n_tokens, self._n_missed = 0, 0  # of the step under way
        self._begun = 0.0, ExpertCounts()  # when it began, and the counts then
        self._ended_at, self._under_way = 0, 0  # when the last step ended: bytes that had been read, and asked for
        self._open = False  # a step has begun and not finished
        self.first: Ids = np.zeros(0, np.int64)  # keys of experts to read while nobody asks, best first
        self._filling = False  # that is under way
        self._acquired: set[int] = set()  # layers of this step that were asked for
        largest, by_layer = int(buffer.sizes.max()), buffer.sizes.reshape(-1, self._n_expert).sum(axis=1)
        self.least_bytes = (top_k + 1) * largest
        self._working_set = int(by_layer.sum() * top_k // self._n_expert)
        self._window_bytes, self._layer_bytes = top_k * largest, int(by_layer.max())
        self._needs_all = 3 * self._n_expert / top_k  # tokens of a chunk that needs practically every expert
        self._wanted = buffer.n_bytes

    # ---- what the engine asks ----------------------------------------------------------------------------------------
    @property
    def counts(self) -> ExpertCounts:
        """What was done so far."""
        found = ExpertCounts(
            expert_hits=self._hits,
            expert_misses=self._misses,
            bytes_read=0 if self._filling else self._reader.bytes_read,  # the first step is charged with all of it
            flash_wait_s=self._wait_s,
            flash_busy_s=self._reader.busy_s,
        )
        if self._prefetcher is not None:
            for outcome in ("useful", "late", "wasted", "evicted"):
                setattr(found, f"prefetch_{outcome}", getattr(self._prefetcher.controller, outcome).n_bytes)
        return found

    @property
    def policy(self) -> Policy:
        """What says which experts to give up."""
        return self._policy

    @property
    def buffer(self) -> ExpertBuffer:
        """Where the experts are that are in RAM."""
        return self._buffer

    @property
    def prefetcher(self) -> Prefetcher | None:
        """What reads ahead, if anything does."""
        return self._prefetcher

    @property
    def every_layer(self) -> bool:
        """With a prefetcher at work each layer is a moment to read ahead."""
        return self._prefetcher is not None and self._prefetcher.enabled and self._n_tokens == 1

    @property
    def n_ahead(self) -> int:
        """Layers whose routers look ahead."""
        return self._prefetcher.n_ahead if self._prefetcher is not None and self._n_tokens == 1 else 0

    def begin(self, n_tokens: int) -> None:
        """A step begins: put right what a failed one left, and change the buffer's size if that was asked for."""
        if self._open:
            self._buffer.recover()
        self._open = True
        if self._filling:
            self._reader.cancel(list(self._buffer.reads.values()))
            self._filling = False
        self._buffer.book(self._reader.poll())  # a child of a fork learns here that it has neither lanes nor bytes
        self.watch()
        if self._wanted != self._buffer.n_bytes:
            self._buffer.cancel_all()
            self._buffer.resize(self._wanted)
        self._n_tokens, self._n_missed = n_tokens, 0
        self._acquired.clear()
        self._begun = time.perf_counter(), self.counts
        if n_tokens > 1:
            self._buffer.pins[:] = 0  # what was read ahead was for a token that does not come
        if n_tokens > APART:
            self._buffer.share_out(max(self.least_bytes, min(self._buffer.n_bytes // 4, self._layer_bytes)))
            self._read_all(0)
        else:
            self._buffer.share_out(self._window_bytes if self._buffer.n_bytes < self._working_set else None)

    def acquire(self, layer: int, routed: Routed) -> Iterator[ExpertGroup]:
        """Groups of experts: those in RAM while the others arrive, or in ascending id where a chunk has many tokens."""
        ids, first, buffer, start = routed.routes.ids, routed.first, self._buffer, layer * self._n_expert
        self._acquired.add(layer)
        self._used(layer, ids)
        keys = np.flatnonzero(first[1:] > first[:-1]) + start
        buffer.pins[keys] = NEEDED
        state = buffer.state[keys]
        self._n_missed += int(np.count_nonzero(state != READY))
        for key in keys[state == READING].tolist():
            self._reader.promote(buffer.reads[key])
        missing = deque(keys[state == ABSENT].tolist())
        if len(ids) > APART:
            yield from self._in_order(layer, keys, missing)
        else:
            yield from self._as_they_come(layer, routed, keys, missing)

    def finish(self) -> None:
        """The step is done: tell policy and prefetcher of the layers that ran without asking, and what it took."""
        self._hits += self._device.n_used - self._n_missed
        self._misses += self._n_missed
        for layer, table in enumerate(self.tables):
            if table is not None and layer not in self._acquired:
                self._used(layer, self._device.chosen(layer)[0])
        self._policy.next_token(self._n_tokens)
        self._open = False
        if self._prefetcher is not None and self._n_tokens == 1:
            started, before = self._begun
            took = self.counts - before
            took.bytes_read += min(before.bytes_read - self._ended_at, self._under_way)  # while the head ran
            self._prefetcher.controller.step(
                time.perf_counter() - started, took.flash_wait_s, took.flash_busy_s, took.bytes_read
            )
        self._ended_at = self._reader.bytes_read
        self._under_way = sum(len(read.buffer) for read in self._buffer.reads.values())

    # ---- the experts of one layer ------------------------------------------------------------------------------------
    def _as_they_come(self, layer: int, routed: Routed, keys: Ids, missing: deque[int]) -> Iterator[ExpertGroup]:
        """Experts in RAM first, then each as soon as its gate and up are there, and its down after that."""
        buffer, start = self._buffer, layer * self._n_expert
        there = keys[buffer.state[keys] == READY]
        waiting, begun = set(keys.tolist()).difference(there.tolist()), set[int]()
        buffer.read(missing, layer)
        if not waiting:
            self._read_ahead(layer, routed, waiting, missing)
        if len(there):
            yield ExpertGroup(there - start)
            buffer.pins[there] = 0
        arrived: list[tuple[int, bool]] = []
        if waiting:  # Python's work ahead hides behind these reads
            arrived = self._book(self._reader.poll(), missing)
            buffer.read(missing, layer)
            self._read_ahead(layer, routed, waiting, missing)
        while waiting:
            buffer.read(missing, layer)
            assert buffer.reads or arrived, "the expert buffer holds fewer experts than a token needs"
            halves: set[int] = set()
            wholes: list[int] = []
            rests: list[int] = []
            for key, whole in arrived or self._wait(missing):
                if key in waiting and not whole:
                    halves.add(key)
                elif key in waiting:
                    halves.discard(key)
                    (rests if key in begun else wholes).append(key)
            for group, phases in ((sorted(halves), 1), (wholes, 3), (rests, 2)):
                if group:
                    yield ExpertGroup(np.array(group) - start, phases)
            arrived = []
            begun |= halves
            waiting.difference_update(wholes, rests)
            buffer.pins[wholes + rests] = 0

    def _in_order(self, layer: int, keys: Ids, missing: deque[int]) -> Iterator[ExpertGroup]:
        """Experts in ascending id; those of the next layer follow on flash if the chunk will need them all."""
        buffer, order, at = self._buffer, keys.tolist(), 0
        while at < len(order):
            buffer.read(missing, layer)
            if not missing:
                self._read_all(layer + 1)
            ready = at
            while ready < min(at + _IN_ORDER_GROUP, len(order)) and buffer.state[order[ready]] == READY:
                ready += 1
            if ready > at:
                yield ExpertGroup(keys[at:ready] - layer * self._n_expert)
                buffer.pins[order[at:ready]] = 0
                at = ready
                self._book(self._reader.poll(), missing)
            else:
                if not buffer.reads:
                    self._sacrifice(order[at:], missing)
                self._wait(missing)

    def _sacrifice(self, order: Sequence[int], missing: deque[int]) -> None:
        """Give up the last of the experts to come that is here: the first has no room else. It is read once more."""
        last = next((key for key in reversed(order) if self._buffer.state[key] == READY), None)
        assert last is not None, "the expert buffer holds no expert at all"
        self._buffer.give_up(last)  # it keeps its pin: once it is back it has to stay
        self._n_missed += 1
        missing.insert(bisect.bisect(missing, last), last)

    def _wait(self, missing: deque[int]) -> list[tuple[int, bool]]:
        """(key, whether it is whole) of what has arrived, at least one arrival."""
        started = time.perf_counter()
        arrivals = self._reader.wait()
        self._wait_s += time.perf_counter() - started
        return self._book(arrivals, missing)

    def _book(self, arrivals: list[Arrival], missing: deque[int]) -> list[tuple[int, bool]]:
        """Note arrivals; what had been cancelled when it came to be needed is missing again."""
        found = self._buffer.book(arrivals)
        while self._buffer.lost:
            key = self._buffer.lost.pop()
            missing.insert(bisect.bisect(missing, key), key)
        return found

    # ---- before it is asked for --------------------------------------------------------------------------------------
    def fill(self) -> None:
        """Begin to read the `first` experts into the empty buffer, as many as fit; the first step ends it.

        A read that fails is not heard of: it is made again when it is needed.
        """
        reads: list[Read] = []
        for key in self.first.tolist():
            if not self._buffer.start(key, 0, reads, urgent=False):
                break
        if reads:
            self._filling = True
            self._reader.submit(reads)

    def _read_all(self, layer: int) -> None:
        """Read what a long chunk will need of a layer to come, as far as there is room."""
        buffer = self._buffer
        if self._n_tokens < self._needs_all or layer >= len(self.tables) or self.tables[layer] is None:
            return
        start = layer * self._n_expert
        keys = slice(start, start + self._n_expert)
        missing = deque((np.flatnonzero(buffer.state[keys] == ABSENT) + start).tolist())
        buffer.pins[keys] = AHEAD  # those that are here are not to be given up for the others
        buffer.read(missing, layer)
        buffer.pins[list(missing)] = 0

    def _read_ahead(self, layer: int, routed: Routed, waiting: set[int], missing: deque[int]) -> None:
        """Begin reads that the prefetcher thinks worth while, if those of this layer have all been asked for."""
        prefetcher, buffer = self._prefetcher, self._buffer
        if prefetcher is None or not prefetcher.enabled or self._n_tokens > 1:
            return
        prefetcher.routed(layer, routed.routes.ids, self._device.ahead(layer))
        if missing:  # there is no room for more, and what is missing may be among the guesses
            return
        urgent = any(buffer.state[key] == READING for key in waiting)
        ahead = sum(len(read.buffer) for key, read in buffer.reads.items() if key not in waiting)
        reads: list[Read] = []
        for key in prefetcher.choose(layer, buffer.state, urgent, ahead):
            if not buffer.start(key, layer, reads, urgent=False):
                break
            buffer.pins[key] = AHEAD
            prefetcher.submitted(key)
        if reads:
            self._reader.submit(reads)

    def _used(self, layer: int, ids: Ids) -> None:
        """Tell of a layer's routes: the policy, and the prefetcher, which books what became of its reads for them."""
        self._buffer.pins[layer * self._n_expert : (layer + 1) * self._n_expert] = 0  # what was read ahead had its time
        self._policy.used(layer, ids[0] if len(ids) == 1 else ids[-_SEED_TOKENS:])
        if self._prefetcher is not None:
            if self._buffer.reads:  # what has arrived in the meantime is not late
                self._buffer.book(self._reader.poll())
            stale = self._prefetcher.settle(layer, ids, self._buffer.state)
            if stale:
                self._reader.cancel([self._buffer.reads[key] for key in stale])

    # ---- the buffer's size -------------------------------------------------------------------------------------------
    @property
    def slot_bytes(self) -> int:
        """Bytes of the expert buffer."""
        return self._buffer.n_bytes

    def request_bytes(self, n_bytes: int) -> None:
        """Ask for another size, from any thread; it is taken when the next step begins."""
        n_bytes = min(max(n_bytes, self.least_bytes), self._buffer.most_bytes)
        self._wanted = n_bytes // ALIGNMENT * ALIGNMENT

    def check(self) -> list[str]:
        """What is wrong, one line each; empty if nothing is."""
        wrong = self._buffer.check()
        if not self._open and (self._buffer.pins == NEEDED).any():
            wrong.append("experts are held though no step is under way")
        return wrong
