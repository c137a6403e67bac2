"""Whether reading ahead pays: each read by expected gain, and the whole by what it was worth in measured seconds.

A controller knows times, bytes and probabilities, not experts. It compares a token with what it would have taken
without reading ahead, `compute + wait for each byte x bytes asked for`, both measured on tokens that did without; so it
sees what its reads and Python's work cost the arithmetic, whatever the hit rate does meanwhile.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Outcome = Literal["useful", "late", "wasted", "evicted"]
Mode = Literal["auto", "always", "off"]


@dataclass
class Tally:
    """Reads that ended in one way."""

    reads: int = 0
    n_bytes: int = 0

    def add(self, n_bytes: int) -> None:
        """One more."""
        self.reads += 1
        self.n_bytes += n_bytes


class _Without(NamedTuple):
    """What a token took without reading ahead."""

    seconds: float
    wait_s: float
    busy_s: float
    n_bytes: int


class _With(NamedTuple):
    """What a token took with it."""

    seconds: float
    asked: int  # bytes that would have been read without
    lost: int  # bytes that were read for nothing


class Controller:
    """Decides what may be read ahead. `enabled` changes only in step(), and `reason` says why it is as it is.

    Runs of tokens with reading ahead alternate with a few without, so that what else the machine does falls on both:
    short runs in a trial, ever longer ones while the gain is clear.

    record_bytes: of an expert, on average. stuck_bytes: what the reader's lanes have in flight at most, which cannot be
    stopped. bytes_per_s: the flash's rate, if it is known before anything was read. mode: "always" reads every likely
    guess, for tests and measurements.
    """

    FIRST, CONTROL = 3, 4  # tokens without, before the first trial, and between runs
    RUN, LONGEST_RUN = 16, 192  # tokens with
    ROUNDS = 8  # runs whose gains are remembered
    PAUSE, LONGEST_PAUSE = 64, 4096  # tokens until the next trial: four times as many with each that fails
    LEAST_IDLE = 0.05  # share of a token's time, below which there is no room
    STARTS_AT, CLEAR, ENDS_AT, MOST = 0.02, 0.04, 0.01, 0.1  # gains, as shares of a token's time
    _TRUST, _LESS_TRUST = 1.5, 0.5  # runs that the gain expected counts for, and after a trial that failed
    ABORT = -0.51  # tokens lost, at which a run is given up: more than one alone may count for
    _MEMORY = 12  # tokens without reading ahead that are remembered: of the last controls
    _CLIP = 0.5  # of a token's time: what one token may count for, so that one stall does not decide
    _POLLUTION = 0.1  # chance that what a wrong read drives out would have been used soon
    _LAYER_S, _READ_S = 120e-6, 60e-6  # Python's part of guessing at each layer, and of one read
    _HIDDEN = 0.5  # of the idle time, or of the waiting if that is less, that reading ahead may save
    _MARGIN = 1.2  # expected gain over expected loss

    def __init__(
        self,
        n_layers: int,
        record_bytes: int,
        *,
        stuck_bytes: int = 2 << 20,
        bytes_per_s: float | None = None,
        mode: Mode = "auto",
    ) -> None:
        self.mode, self.enabled, self.reason = mode, mode == "always", "nothing has been measured yet"
        self.useful, self.late, self.wasted, self.evicted = Tally(), Tally(), Tally(), Tally()
        self._n_layers, self._record_bytes, self._stuck_bytes = n_layers, record_bytes, stuck_bytes
        self._rate, self._read_bytes, self._busy_s = bytes_per_s or 0.0, 0.0, 0.0
        self._without: deque[_Without] = deque(maxlen=self._MEMORY)
        self._with: list[_With] = []  # of the run under way, or just over
        self._rounds: deque[float] = deque(maxlen=self.ROUNDS)  # gains of the last runs
        self._expected, self._trust = 0.0, self._TRUST  # gain of the trial under way, and what that counts for
        self._compute_s, self._wait_s, self._wait_s_per_byte, self._idle_s = 0.0, 0.0, 0.0, 0.0  # of a token without
        self._saved, self._ahead_bytes, self._lost_bytes = 0, 0, 0  # bytes of this token's outcomes
        self._until, self._run, self._pause = self.FIRST, self.RUN, self.PAUSE  # tokens
        self._settling = False  # the token after a change is half of each kind

    def afresh(self, mode: Mode) -> Controller:
        """One that knows nothing yet, for the same model and flash."""
        return Controller(
            self._n_layers,
            self._record_bytes,
            stuck_bytes=self._stuck_bytes,
            bytes_per_s=self._rate or None,
            mode=mode,
        )

    # ---- each read ---------------------------------------------------------------------------------------------------
    def accepts(self, n_bytes: int, probability: float, distance: int, urgent: bool, ahead_bytes: int) -> bool:
        """Whether to read a record ahead that is used with this probability, `distance` layers from now.

        The idle time of a layer is taken for exponentially distributed about its mean: `begins` is then the chance that
        it outlasts the reads before this one, and `hidden_s` what it hides of this one if it does.

        urgent: whether experts of this layer are under way. ahead_bytes: what was asked for ahead and is not there yet.
        """
        if self.mode == "always":
            return probability >= 0.2 and ahead_bytes <= 4 * n_bytes
        if not self._rate:
            return False
        idle_s, layer_s = distance * self._idle_s / self._n_layers, self._compute_s / self._n_layers
        idle_s = max(idle_s, 1e-9 if urgent else layer_s)
        read_s = n_bytes / self._rate
        begins = math.exp(-ahead_bytes / self._rate / idle_s)
        hidden_s = idle_s * (1.0 - math.exp(-read_s / idle_s))
        delay_s = min(read_s - hidden_s, 0.5 * self._stuck_bytes / self._rate)  # of the next urgent read, if wrong
        waited = min(1.0, self._wait_s_per_byte * self._rate)  # the part of reading that is not hidden anyway
        gain_s = probability * begins * hidden_s * waited
        loss_s = (1.0 - probability) * (begins * (delay_s + self._POLLUTION * read_s * waited) + self._READ_S)
        return gain_s > self._MARGIN * loss_s

    def outcome(self, kind: Outcome, n_bytes: int) -> None:
        """How a read ended: in time, begun but not in time, not needed, or given up before it could be."""
        tally: Tally = getattr(self, kind)
        tally.add(n_bytes)
        self._ahead_bytes += n_bytes
        if kind in ("useful", "late"):
            self._saved += n_bytes
        else:
            self._lost_bytes += n_bytes

    # ---- each token --------------------------------------------------------------------------------------------------
    def step(self, seconds: float, wait_s: float, busy_s: float, n_bytes: int) -> None:
        """One token was decoded: what it took, waited for reads, how long the flash was busy, and all bytes read."""
        if n_bytes and busy_s > 0:
            self._read_bytes, self._busy_s = 0.9 * self._read_bytes + n_bytes, 0.9 * self._busy_s + busy_s
            self._rate = self._read_bytes / self._busy_s
        asked = max(0, n_bytes - self._ahead_bytes) + self._saved  # what would have been read without
        lost, self._saved, self._ahead_bytes, self._lost_bytes = self._lost_bytes, 0, 0, 0
        if self.mode != "auto":
            return
        if self._settling:
            self._settling = False
            return
        self._until -= 1
        if self.enabled:
            self._with.append(_With(seconds, asked, lost))
            if self._until <= 0 or self._gain(self._with) <= self.ABORT:
                self._switch(False, self.CONTROL, self.reason)
        else:
            self._without.append(_Without(seconds, wait_s, busy_s, n_bytes))
            if self._until <= 0:
                self._measure()
                if not self._with or self._pays():
                    self._begin()

    def _begin(self) -> None:
        """Start a run, if there is anything to gain."""
        seconds, wait_s = self._compute_s + self._wait_s, self._wait_s
        idle = self._idle_s / seconds
        saved_s = self._HIDDEN * min(self._idle_s, wait_s)
        n_reads = saved_s * self._rate / self._record_bytes if self._record_bytes else 0.0
        costs_s = self._n_layers * self._LAYER_S + n_reads * self._READ_S
        gain = (saved_s - costs_s) / seconds
        if idle >= self.LEAST_IDLE and (self._rounds or gain >= self.STARTS_AT):
            if not self._rounds:
                self._expected = min(gain, self.MOST)
            self._switch(True, self._run, f"on: the flash is idle {idle:.0%} of the time")
            return
        self._until = self.FIRST
        self._forget()
        if idle < self.LEAST_IDLE:
            self.reason = f"off: the flash is idle {idle:.0%} of the time, there is no room to read ahead"
        else:
            least = (
                f"waiting takes {wait_s / seconds:.0%}" if wait_s < self._idle_s else f"the flash is idle {idle:.0%}"
            )
            self.reason = f"off: {least} of the time, and reading ahead would cost as much as it may save of it"

    def _measure(self) -> None:
        """What tokens without reading ahead take, one stall not counting for more than it should."""
        tokens = sorted(self._without, key=lambda token: token.seconds)
        most = (1 + self._CLIP) * tokens[len(tokens) // 2].seconds
        scales = [min(1.0, most / max(token.seconds, 1e-9)) for token in tokens]
        n, n_bytes = len(tokens), sum(token.n_bytes for token in tokens)
        wait_s = sum(token.wait_s * scale for token, scale in zip(tokens, scales, strict=True))
        seconds = sum(token.seconds * scale for token, scale in zip(tokens, scales, strict=True))
        busy_s = sum(token.busy_s * scale for token, scale in zip(tokens, scales, strict=True))
        self._compute_s, self._wait_s = (seconds - wait_s) / n, wait_s / n
        self._wait_s_per_byte = wait_s / n_bytes if n_bytes else 0.0
        self._idle_s = max(0.0, seconds - busy_s) / n

    def _gain(self, tokens: Sequence[_With]) -> float:
        """What these tokens gained, in tokens without reading ahead."""
        gain = 0.0
        for token in tokens:
            expected_s = self._compute_s + token.asked * self._wait_s_per_byte
            lost_s = self._POLLUTION * token.lost * self._wait_s_per_byte
            share = (expected_s - token.seconds - lost_s) / max(expected_s, 1e-9)
            gain += max(-self._CLIP, min(self._CLIP, share))
        return gain

    def _pays(self) -> bool:
        """Judge by the runs so far and by what was expected; False ends trial or use.

        One run's gain is uncertain by about as much as there is to gain: flash drives and machines are not steady.
        """
        self._rounds.append(self._gain(self._with) / len(self._with))
        self._with.clear()
        gain = (sum(self._rounds) + self._trust * self._expected) / (len(self._rounds) + self._trust)
        if gain < self.ENDS_AT:
            self.reason = f"off: reading ahead gained {sum(self._rounds) / len(self._rounds):+.1%} of the time"
            self._forget()
            self._until, self._pause = self._pause, min(4 * self._pause, self.LONGEST_PAUSE)
            self._trust = self._LESS_TRUST
            return False
        if gain >= self.CLEAR and len(self._rounds) >= self.ROUNDS // 2:
            self._run, self._pause, self._trust = min(2 * self._run, self.LONGEST_RUN), self.PAUSE, self._TRUST
        return True

    def _forget(self) -> None:
        """The next run is the first of a trial."""
        self._run = self.RUN
        self._rounds.clear()

    def _switch(self, enabled: bool, until: int, reason: str) -> None:
        self.enabled, self._until, self.reason, self._settling = enabled, until, reason, True
