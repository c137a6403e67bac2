"""A machine on paper for tests of reading ahead: arithmetic takes given times, a flash drive works off its queue.

Time is a number that is added to, so that a run is the same everywhere. The drive serves one piece after the other,
urgent reads first, and a piece that has begun is finished: that is how reading ahead can do harm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgert.devices.base import ABSENT, READING, READY
from edgert.experts.policies import make_policy
from edgert.experts.prefetch import Prefetcher

Ids = npt.NDArray[np.int64]


@dataclass
class Drive:
    """A queue of reads, worked off at `rate` bytes a second in pieces of `piece` bytes."""

    rate: float
    piece: int
    now: float = 0.0
    busy_s: float = 0.0
    n_bytes: int = 0
    urgent: deque[int] = field(default_factory=deque)
    ahead: deque[int] = field(default_factory=deque)
    left: dict[int, int] = field(default_factory=dict)  # bytes of a read that have not begun
    current: tuple[int, float] | None = None  # the read whose piece is under way, and when that ends
    done: list[int] = field(default_factory=list)

    def submit(self, key: int, n_bytes: int, *, urgent: bool) -> None:
        """Queue a read."""
        self.left[key] = n_bytes
        (self.urgent if urgent else self.ahead).append(key)

    def promote(self, key: int) -> None:
        """A read ahead is needed now."""
        if key in self.ahead:
            self.ahead.remove(key)
            self.urgent.append(key)

    def cancel(self, key: int) -> None:
        """Drop what has not begun of a read."""
        if key in self.ahead:
            self.ahead.remove(key)
        self.left[key] = 0

    def _begin(self) -> bool:
        queue = self.urgent or self.ahead
        if not queue:
            return False
        key = queue[0]
        n_bytes = min(self.piece, self.left[key])
        self.left[key] -= n_bytes
        if not self.left[key]:
            queue.popleft()
        self.n_bytes += n_bytes
        self.busy_s += n_bytes / self.rate
        self.current = key, self.now + n_bytes / self.rate
        return True

    def run(self, until: float) -> None:
        """Work up to a time."""
        while (self.current is not None or self._begin()) and self.current is not None and self.current[1] <= until:
            key, self.now = self.current
            self.current = None
            if not self.left[key]:
                self.done.append(key)
        self.now = max(self.now, until) if self.current is None else self.now


@dataclass(frozen=True)
class Machine:
    """Times and sizes. What Python takes at each layer stop and what a read ahead costs the arithmetic are counted."""

    layer_s: float
    record_bytes: int
    rate: float
    n_slots: int
    stop_s: float = 100e-6
    read_s: float = 60e-6
    contention: float = 0.0  # seconds of arithmetic lost for each second that the drive reads ahead
    piece: int = 512 << 10
    noise: float = 0.1


class Run:
    """Decodes routes ids (n_layers, n_tokens, top_k) and keeps the time of each token."""

    def __init__(self, machine: Machine, ids: Ids, n_expert: int, prefetcher: Prefetcher | None) -> None:
        self.machine, self.ids, self.n_expert, self.prefetcher = machine, ids, n_expert, prefetcher
        self.n_layers, self.n_tokens, self.top_k = ids.shape
        sizes = np.full((self.n_layers, n_expert), machine.record_bytes)
        self.policy = make_policy("cost", sizes)
        self.drive = Drive(machine.rate, machine.piece)
        self.state = np.zeros(self.n_layers * n_expert, np.uint8)
        self.held = np.zeros(self.n_layers * n_expert, bool)
        self.time, self.wait_s, self.seconds, self.on = 0.0, 0.0, [], []
        self._draw = np.random.default_rng(5)

    def decode(self, lookahead: Sequence[Sequence[npt.NDArray[np.float32]]] | None = None) -> float:
        """Run all tokens; the seconds they take. lookahead[token][layer]: what the routers of later layers say."""
        for token in range(self.n_tokens):
            self.one(token, lookahead)
        return self.time

    def one(self, token: int, lookahead: Sequence[Sequence[npt.NDArray[np.float32]]] | None) -> None:
        """One token through all layers."""
        drive, ahead = self.drive, self.prefetcher is not None and self.prefetcher.enabled
        begun, waited, busy, n_bytes = self.time, self.wait_s, drive.busy_s, drive.n_bytes
        slow = float(np.exp(self._draw.normal(0, self.machine.noise))) * (2.0 if self._draw.random() < 0.01 else 1.0)
        for layer in range(self.n_layers):
            self._layer(layer, token, slow, lookahead[token][layer] if ahead and lookahead else ())
        self.policy.next_token()
        self.seconds.append(self.time - begun)
        self.on.append(ahead)
        if self.prefetcher is not None:
            self.prefetcher.controller.step(
                self.time - begun, self.wait_s - waited, drive.busy_s - busy, drive.n_bytes - n_bytes
            )

    def _layer(self, layer: int, token: int, slow: float, lookahead: Sequence[npt.NDArray[np.float32]]) -> None:
        machine, drive, state = self.machine, self.drive, self.state
        self._compute(0.4 * machine.layer_s * slow)
        ids = self.ids[layer, token]
        keys = ids + layer * self.n_expert
        self.held[layer * self.n_expert : (layer + 1) * self.n_expert] = False
        self.held[keys] = True
        if self.prefetcher is not None:
            for key in self.prefetcher.settle(layer, ids, state):
                drive.cancel(key)
                state[key] = ABSENT
        missing = [key for key in keys.tolist() if state[key] == ABSENT]
        for key in keys[state[keys] == READING].tolist():
            drive.promote(key)
        waiting = {key for key in keys.tolist() if state[key] != READY}
        for key in missing:
            self._read(key, layer, urgent=True)
        part_s, ahead = (
            0.6 * machine.layer_s * slow / self.top_k,
            self.prefetcher is not None and self.prefetcher.enabled,
        )
        if ahead and not waiting:
            self._ahead(layer, ids, lookahead)
        self._compute(part_s * (self.top_k - len(waiting)))
        if ahead and waiting:
            self._ahead(layer, ids, lookahead)
        while waiting:
            arrived = [key for key in waiting if state[key] == READY]
            if not arrived:
                assert drive.current is not None
                self.wait_s += drive.current[1] - self.time
                self._pass(drive.current[1] - self.time)
            for key in arrived:
                waiting.discard(key)
                self._compute(part_s)
        self.policy.used(layer, ids)

    def _ahead(self, layer: int, ids: Ids, lookahead: Sequence[npt.NDArray[np.float32]]) -> None:
        assert self.prefetcher is not None
        self._pass(self.machine.stop_s)
        self.prefetcher.routed(layer, ids[None], lookahead)
        urgent = [key for key in ids + layer * self.n_expert if self.state[key] == READING]
        n_reading = int(np.count_nonzero(self.state == READING))
        size = self.machine.record_bytes
        for key in self.prefetcher.choose(layer, self.state, bool(urgent), size * (n_reading - len(urgent))):
            if not self._read(key, layer, urgent=False):
                break
            self.prefetcher.submitted(key)
            self.held[key] = True
            self._pass(self.machine.read_s)

    def _read(self, key: int, layer: int, *, urgent: bool) -> bool:
        if np.count_nonzero(self.state != ABSENT) >= self.machine.n_slots:
            keys = np.flatnonzero((self.state == READY) & ~self.held)
            if not len(keys):
                assert not urgent, "no room"
                return False
            self.state[keys[self.policy.worth(keys, layer).argmin()]] = ABSENT
        self.state[key] = READING
        self.drive.submit(key, self.machine.record_bytes, urgent=urgent)
        return True

    def _compute(self, seconds: float) -> None:
        """Arithmetic, slowed down while the drive reads ahead."""
        busy = self.drive.current is not None and not self.drive.urgent
        self._pass(seconds * (1 + self.machine.contention * busy))

    def _pass(self, seconds: float) -> None:
        self.time += max(seconds, 0.0)
        self.drive.run(self.time)
        for key in self.drive.done:
            self.state[key] = READY
        self.drive.done.clear()


def scores(ids: Ids, n_expert: int, truth: float, seed: int = 0) -> list[list[list[npt.NDArray[np.float32]]]]:
    """Router scores of the next two layers: noise, and `truth` standard deviations more for what will be chosen."""
    n_layers, n_tokens, _ = ids.shape
    made = np.random.default_rng(seed).normal(size=(n_tokens, n_layers, 2, n_expert)).astype(np.float32)
    for distance in (1, 2):
        for layer in range(n_layers - distance):
            np.add.at(
                made, (np.arange(n_tokens)[:, None], layer, distance - 1, ids[layer + distance]), truth / distance
            )
    return [[[*made[t, i, : n_layers - 1 - i]] for i in range(n_layers)] for t in range(n_tokens)]
