"""Takes threads away while the board is hot, and gives them back when it has cooled: `--power cool`.

Between two tokens, or two chunks of a prompt, every two seconds: the zone nearest its limit, and what slows the board
down already. Fewer threads compute the same bits, so answers do not change; only their pace does. `HeatPolicy` decides
from readings alone, `Cooler` takes them and changes the device's threads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgert import sysfs, thermal
from edgert.devices import attention
from edgert.devices.base import Device
from edgert.errors import OptionError
from edgert.quant import jit

if TYPE_CHECKING:
    from edgert.devices.cpu import CpuDevice
    from edgert.devices.threads import ThreadPool

MODES = ("full", "cool")
LOOK_S = 2.0  # between two readings, which take some milliseconds


class HeatPolicy:
    """How many threads, and when.

    Down a step when the nearest zone is less than NEAR below its limit, or something slows the board down already; the
    next step has to wait for the effect of the last. Up a step when all has been COOL below its limits for a calm time,
    which doubles each time that a step up was followed by heat, so that threads do not come and go.
    """

    NEAR, COOL = 3.0, 10.0  # degrees below the limit
    SETTLE_S, CALM_S, LONGEST_CALM_S, RELAPSE_S = 10.0, 20.0, 320.0, 60.0

    def __init__(self, counts: Sequence[int]) -> None:
        """counts: of threads, descending; the first is all."""
        self._counts, self._place = counts, 0
        self._changed_at = self._raised_at = float("-inf")
        self._calm_since: float | None = None
        self._calm_s = self.CALM_S

    def decide(self, seconds: float, margin: float, slowed: bool) -> int:
        """Threads from this moment on. margin: degrees that the nearest zone is below its limit."""
        if margin < self.COOL or slowed:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = seconds
        hot = margin < self.NEAR or slowed
        if hot and self._place + 1 < len(self._counts) and seconds - self._changed_at >= self.SETTLE_S:
            if seconds - self._raised_at < self.RELAPSE_S:
                self._calm_s = min(2 * self._calm_s, self.LONGEST_CALM_S)
            self._place, self._changed_at = self._place + 1, seconds
        elif self._place and self._calm_since is not None and seconds - self._calm_since >= self._calm_s:
            self._place, self._changed_at, self._raised_at = self._place - 1, seconds, seconds
            self._calm_since = seconds
        return self._counts[self._place]


def thread_counts(device: CpuDevice) -> list[int]:
    """All threads of a device, then at most half as many, and so on down to one; of each step the most for which the
    device's work space is large enough."""

    def stride(count: int) -> int:
        return int(attention.new_scratch(device.config, count, device.n_context, device.chunk)["stride"][0])

    n_threads = device.pool.n_threads
    found, room = [n_threads], stride(n_threads)
    while found[-1] > 1:  # one thread always fits: it leaves parts to none
        found.append(next(count for count in range(found[-1] // 2, 0, -1) if stride(count) <= room))
    return found


class Cooler:
    """Looks at the board between steps. state: what holds threads back, for people; empty where nothing does."""

    def __init__(self, device: CpuDevice) -> None:
        self._device = device
        self._policy = HeatPolicy(thread_counts(device))
        self.pool = device.pool  # of all threads
        self._pools: dict[int, ThreadPool] = {self.pool.n_threads: self.pool}
        self._next_look = 0.0
        self.state = ""

    def look(self) -> None:
        """Between two steps; most calls only look at the clock."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        zones, slowing = thermal.zones(sysfs.ROOT), sorted(thermal.signs(sysfs.ROOT).now)
        count = self._policy.decide(now, zones[0].margin if zones else 1e3, bool(slowing))
        self._use(count)
        why = ", ".join([*map(str, zones[:1]), *slowing])
        most = self.pool.n_threads
        self.state = f"{count} of {most} threads: {why}" if count < most else ""

    def _use(self, count: int) -> None:
        """Compute with so many threads. Pools are kept: one that waits takes no time, and a step up is at once."""
        if count not in self._pools:
            from edgert.devices.threads import ThreadPool

            self._pools[count] = ThreadPool(count)
        self._device.pool = self._pools[count]

    def close(self) -> None:
        """End the threads of all pools."""
        for pool in self._pools.values():
            pool.close()


def check_power(power: str) -> None:
    """OptionError for what is no mode, or asks for temperatures that this machine does not show."""
    if power not in MODES:
        raise OptionError(f"power={power!r:.40} is not known; use full, or cool: fewer threads while the board is hot")
    if power == "cool" and not thermal.zones(sysfs.ROOT) and not thermal.slows(sysfs.ROOT):
        raise OptionError("power='cool': this machine shows no temperature under /sys/class/thermal; use full")


def cooler_for(device: Device, power: str) -> Cooler | None:
    """What keeps a device's board cool; None for power="full". OptionError for a device that computes elsewhere."""
    if power == "full":
        return None
    if jit.JIT_ENABLED:
        from edgert.devices.cpu import CpuDevice

        if isinstance(device, CpuDevice):
            return Cooler(device)
    raise OptionError(f"power='cool' takes threads from device='cpu'; of {device.name} it can take none: use full")
