"""The ledger: how much RAM a model needs before any of it is allocated, how much there is, and which experts fit.

`plan_memory` is a pure function of what a model needs and a budget. It knows nothing of files and devices; whoever
loads a model counts its needs and does as the plan says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from edgert import cgroup
from edgert.errors import MemoryLimitError, OptionError

_UNITS = {
    "": 1,
    "B": 1,
    "K": 1 << 10,
    "KIB": 1 << 10,
    "KB": 10**3,
    "M": 1 << 20,
    "MIB": 1 << 20,
    "MB": 10**6,
    "G": 1 << 30,
    "GIB": 1 << 30,
    "GB": 10**9,
    "T": 1 << 40,
    "TIB": 1 << 40,
    "TB": 10**12,
}
_MIB = 1 << 20

# Measured as a cgroup counts, page cache and kernel memory included, from a cold cache. At work, the pages of idle
# libraries given back (file_pages.py): 98 to 108 MiB, and 71 more if kernels were compiled. At the end of the imports,
# before anything can be given back: 269 MiB, 292 with the command line, 220 of them page cache, most read ahead.
PROCESS_BYTES = 120 * _MIB
COMPILING_BYTES = 76 * _MIB
STARTING_BYTES = 320 * _MIB
WORD_BYTES = 340  # of the tokenizer and the metadata it is made of, for each token and each merge: 300 to 330

# Left to everything else when nobody names a budget. Other programs grow, and what they read has to stay in the page
# cache: a buffer that makes the machine page is slower than a smaller one. A tenth is what a desktop's programs move by
# within a minute; the guard sees what is more. The kernel's own reserve, 1 %, is not counted as available anyway.
HEAD_ROOM_SHARE, HEAD_ROOM_LEAST, HEAD_ROOM_MOST = 0.10, 128 * _MIB, 2048 * _MIB
_CHUNK_SHARE = 4  # a longer chunk's further work space takes at most this part of what the shortest leaves
_KERNEL_BYTES = 16 * _MIB  # page tables and the like of this process as it stands: planned for, but not available


# ---- sizes -----------------------------------------------------------------------------------------------------------
def parse_size(size: str | int | float) -> int:
    """Bytes of "2GiB", "900MiB", "1.5GB" or a plain number; of "50%" or 0.5 too, a share of the machine's memory."""
    if isinstance(size, (int, float)) and not isinstance(size, bool):
        n_bytes = float(size) * (installed() if isinstance(size, float) and size <= 1 else 1)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*|%)\s*", str(size))
        if not match or match[2].upper() not in (*_UNITS, "%"):
            raise OptionError(f"memory={size!r} is not a size; write for example 2GiB, 900MiB or 50%")
        number, unit = float(match[1]), match[2].upper()
        is_share = unit == "%" or (not unit and "." in match[1] and number <= 1)
        if is_share:
            number, unit = number / (100 if unit == "%" else 1) * installed(), ""
            if number > installed():
                raise OptionError(f"memory={size!r} is more than this machine has; write at most 100%")
        n_bytes = number * _UNITS[unit]
    if not 1 <= n_bytes < 2**60:
        raise OptionError(f"memory={size!r} must be above zero and below 2**60 bytes")
    return int(n_bytes)


def parse_share(share: str | float) -> float:
    """The share of "12.5%", "0.25" or a number: above 0, at most 1. OptionError for anything else."""
    problem = "must lie above 0 and not above 100%"
    try:
        if isinstance(share, bool) or not isinstance(share, (str, int, float)):
            raise ValueError
        text = str(share).strip()
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value, problem = math.nan, "is not a share; write for example 25% or 0.25"
    if not 0 < value <= 1:
        raise OptionError(f"residency={share!r} {problem}")
    return value


def installed() -> int:
    """Bytes of memory of the machine, or of the smallest limit of a cgroup that this process is in."""
    limits = [group.limit or 0 for group in cgroup.limited()]
    return min(int(psutil.virtual_memory().total), *limits) if limits else int(psutil.virtual_memory().total)


def held() -> int:
    """Bytes that this process holds and that no file stands behind."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


def taken() -> int:
    """Bytes that this process holds beyond what a plan counts for it: its host's, or an earlier model's."""
    return max(held() - PROCESS_BYTES, 0)


def available(proc: Path = cgroup.PROC, cgroups: Path = cgroup.ROOT) -> int:
    """Bytes that this process may still take, plus what it holds already: of the machine, and of each of its cgroups.

    The page cache does not count as taken: the kernel drops it when memory is asked for.
    """
    free = int(psutil.virtual_memory().available)
    for group in cgroup.limited(proc, cgroups):
        free = min(free, (group.limit or 0) - (group.usage or 0) + group.file_pages)
    return max(free, 0) + held()


def head_room() -> int:
    """Bytes that stay free where no budget is stated."""
    return int(min(max(HEAD_ROOM_SHARE * installed(), HEAD_ROOM_LEAST), HEAD_ROOM_MOST))


@dataclass(frozen=True)
class Budget:
    """What the process may use: what was stated, as far as it is there, or what is available less a head-room."""

    n_bytes: int
    stated: int | None  # None: nobody did
    free: int  # what was available, with what the process holds for edgert
    strict: bool = False  # whether somebody measures the process by it, page cache included
    taken: int = 0  # by the process for other things, and so off the budget already
    elsewhere: bool = False  # whether it is the memory of a machine that is not here

    def option(self, n_bytes: int) -> str:
        """The --memory that leaves so many bytes."""
        return f"{-(-(n_bytes + self.taken) // _MIB)}MiB"

    @property
    def named(self) -> str:
        """The budget that was stated, as messages have it."""
        held = f", of which this process holds {mib(self.taken)} MiB for other things," if self.taken else ""
        return f"--memory {(self.stated or 0) // _MIB}MiB{held}"


def budget_for(memory: str | int | float | None, reserved: int = 0) -> Budget:
    """The budget that --memory states; with "auto" or None the default. OptionError: no size.

    reserved: bytes of it that the process will take for other things. To be asked for before anything of the model is
    there: what the process holds then is others'.
    """
    other = taken() + reserved
    free = max(available() - other, 0)
    if memory is None or memory == "auto":
        return Budget(max(free - head_room(), 0), None, free, strict=bool(cgroup.limited()), taken=other)
    stated = parse_size(memory)
    room = max(stated - other, 0)
    return Budget(room if room <= free + _KERNEL_BYTES else free, stated, free, strict=True, taken=other)


# ---- the plan --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose. `loading` is needed only while weights are packed, before keys, values and work space are."""

    process: int
    hot: int
    cold: int  # all experts, where they stay in RAM
    kv: int
    work: int
    loading: int
    context: int
    kv_type: str
    tokenizer: int = 0
    buffers: int = 0  # of reads from flash, and tables of guesses
    slots: int = 0  # the expert buffer, where experts are streamed
    forms: int = 0  # what a device keeps of experts in a form of its own, beside that buffer
    chunk: int = 0  # most tokens of a step
    all_experts: int = 0
    working_set: int = 0
    least_slots: int = 0  # what the expert buffer may shrink to
    floor: int = 0  # the smallest budget that runs
    warning: str = ""

    @property
    def total(self) -> int:
        """What the process needs at its peak."""
        experts = self.cold + self.slots + self.forms + self.buffers
        return self.process + self.tokenizer + self.hot + experts + max(self.kv + self.work, self.loading)

    @property
    def residency(self) -> float:
        """The share of all experts that is in RAM."""
        return self.slots / self.all_experts if self.slots else 1.0

    def parts(self, experts: str = "experts") -> str:
        """What the total is made of, in MiB: "process 140 + hot 850 + KV 128"."""
        named = {
            "process": self.process,
            "tokenizer": self.tokenizer,
            "hot": self.hot,
            "KV": self.kv,
            "work": self.work,
            "loading": max(self.loading - self.kv - self.work, 0),
            "read buffers": self.buffers,
            experts: self.cold + self.slots + self.forms,
        }
        return " + ".join(f"{name} {mib(n_bytes)}" for name, n_bytes in named.items() if n_bytes)

    def as_dict(self) -> dict[str, int | float | str]:
        """The ledger for a person or a script; sizes in bytes, residency a share."""
        names = (
            "hot",
            "cold",
            "slots",
            "forms",
            "kv",
            "work",
            "loading",
            "buffers",
            "tokenizer",
            "process",
            "total",
            "floor",
        )
        return {
            **{name: getattr(self, name) for name in names},
            "working_set": self.working_set,
            "residency": round(self.residency, 4),
            "context": self.context,
            "chunk": self.chunk,
            "kv_type": self.kv_type,
        }


@dataclass(frozen=True)
class Needs:
    """What a model takes, in bytes, before it is decided which of its experts stay in RAM."""

    hot: int
    kv: Mapping[int, int]  # most tokens of a step (a chunk) -> keys and values: layers that see a window have a ring
    work: Mapping[int, int]  # likewise -> work space
    tokenizer: int
    context: int
    kv_type: str
    compiling: bool = False  # kernels have to be compiled first
    loading: int = 0  # while weights are packed or checked
    cold: int = 0  # all experts
    unused: int = 0  # of the pages that hold them, where all of them stay in RAM
    record: int = 0  # the largest expert, as a record on flash
    top_k: int = 0
    working_set: int = 0  # the records that one token routes to
    buffers: int = 0  # of reads and guesses, where experts are streamed
    streams: bool = False  # whether experts can stay on flash
    beside: float = 0.0  # bytes that a device keeps of an expert in a form of its own, for each byte of its record
    libraries: int = 0  # that the device loads, and what its verification takes
    n_hot: int | None = None  # experts of each layer that lie in a graphics card's memory; None: none do

    @property
    def least_slots(self) -> int:
        """The smallest expert buffer: the experts of one token in one layer, and one that arrives."""
        return min((self.top_k + 1) * self.record, self.cold) if self.streams else 0

    def step_bytes(self, chunk: int) -> int:
        """What depends on the chunk: keys, values and work space."""
        return self.kv[chunk] + self.work[chunk]

    def floor(self) -> MemoryPlan:
        """The smallest plan that runs."""
        return self.plan(min(self.work), self.least_slots)

    @property
    def least_budget(self) -> int:
        """The smallest --memory: the floor, or what a process of edgert takes while it starts."""
        return max(self.floor().total, STARTING_BYTES)

    def plan(self, chunk: int, slots: int = 0) -> MemoryPlan:
        """With an expert buffer of so many bytes, or (0) with all experts in RAM."""
        return MemoryPlan(
            process=PROCESS_BYTES + self.libraries + (COMPILING_BYTES if self.compiling else 0),
            tokenizer=self.tokenizer,
            hot=self.hot,
            cold=0 if slots else int(self.cold * (self.beside or 1)),
            forms=int(slots * self.beside),
            kv=self.kv[chunk],
            work=self.work[chunk] + (0 if slots else self.unused),
            loading=self.loading,
            context=self.context,
            kv_type=self.kv_type,
            buffers=self.buffers if slots else 0,
            slots=slots,
            chunk=chunk,
            all_experts=self.cold,
            working_set=self.working_set,
            least_slots=self.least_slots,
        )


def plan_memory(needs: Needs, budget: Budget, *, residency: float | None = None) -> MemoryPlan:
    """Which experts stay in RAM, and how many tokens a step takes.

    All of them if they fit; else the longest chunk that takes at most a quarter of what the shortest leaves (a prompt
    reads all experts once a chunk), and the rest is expert buffer. residency: the share of the experts to hold instead.
    MemoryLimitError: below the floor.
    """
    lowest = needs.floor()
    floor = needs.least_budget if budget.strict else lowest.total
    limit = budget.n_bytes
    if budget.stated is None:  # a head-room is a wish, an answer is what counts
        limit = max(limit, min(floor, budget.free))
    if limit < floor:
        raise _below_the_floor(needs, lowest, floor, budget)
    if residency is not None and residency < 1:
        plan = _at_residency(needs, residency, limit)
    else:
        fitting = [plan for plan in map(needs.plan, sorted(needs.work)) if plan.total <= limit]
        if not fitting and residency is not None:
            raise _too_much(needs.plan(min(needs.work)), residency, limit)
        plan = fitting[-1] if fitting else _streamed(needs, limit)
    return replace(plan, floor=floor, warning=_warning(plan, max(map(needs.step_bytes, needs.work)), budget))


def _streamed(needs: Needs, limit: int) -> MemoryPlan:
    """As many experts in RAM as fit beside the rest."""
    least = needs.step_bytes(min(needs.work))
    floor, share = needs.floor(), 1 + needs.beside
    experts = floor.slots + floor.forms
    left = limit - floor.total + experts + least  # for experts, keys, values and work space
    more = left - least  # what the shortest chunk leaves
    most = least + max(0, min(more // _CHUNK_SHARE, more - experts))
    chunk = max(chunk for chunk in needs.work if needs.step_bytes(chunk) <= most)
    return needs.plan(chunk, min(int((left - needs.step_bytes(chunk)) / share), needs.cold))


def _at_residency(needs: Needs, residency: float, limit: int) -> MemoryPlan:
    """A share of the experts in RAM, with the longest chunk that fits."""
    if not needs.streams or residency <= 0:
        problem = "must be above 0" if needs.streams else "asks for experts on flash, which this model does not have"
        raise OptionError(f"residency={residency:g} {problem}; leave it away, or give a bundle and a share up to 1")
    slots = min(max(int(residency * needs.cold), needs.least_slots), needs.cold)
    plans = [needs.plan(chunk, slots) for chunk in sorted(needs.work)]
    fitting = [plan for plan in plans if plan.total <= limit]
    if not fitting:
        raise _too_much(plans[0], residency, limit)
    return fitting[-1]


def _warning(plan: MemoryPlan, most_step: int, budget: Budget) -> str:
    """What a person should know about a plan that runs, or nothing. most_step: bytes of the longest step."""
    if not plan.slots:
        return ""
    found = []
    if budget.stated is not None and budget.n_bytes < budget.stated - budget.taken:
        found.append(f"only {mib(budget.free)} MiB of {budget.named} are available")
    if plan.slots < plan.working_set:
        enough = budget.option(plan.total - plan.slots + plan.working_set - plan.kv - plan.work + most_step)
        found.append(
            f"the expert buffer of {mib(plan.slots)} MiB is below one working set, the {mib(plan.working_set)} MiB of "
            f"experts that a token needs: most are read from flash for every token; --memory {enough} holds one"
        )
    if plan.forms:
        found.append(
            "ONNX Runtime makes a session for each expert that comes from flash, some 20 ms each time, more on a busy "
            "machine; --device attention=NAME,experts=cpu has no need of them"
        )
    return "; ".join(found)


def _below_the_floor(needs: Needs, lowest: MemoryPlan, floor: int, budget: Budget) -> MemoryLimitError:
    experts = f"{needs.top_k + 1} experts" if lowest.slots else "experts"
    if floor > lowest.total:
        why = f"this model's floor of {mib(floor)} MiB, which a process of edgert takes while it starts"
        shorter = ""
    else:
        why, shorter = f"this model's floor of {mib(floor)} MiB ({lowest.parts(experts)})", " or a shorter --context"
    if budget.elsewhere and budget.free < floor:
        return MemoryLimitError(f"it leaves {mib(budget.free)} MiB, below {why}; plan for a smaller model{shorter}")
    if budget.stated is not None and budget.stated - budget.taken < floor:
        return MemoryLimitError(f"{budget.named} is below {why}; use --memory {budget.option(floor)}{shorter}")
    shorter = ", or use a smaller model" + shorter
    return MemoryLimitError(f"{mib(budget.free)} MiB are available, below {why}; close other programs{shorter}")


def _too_much(plan: MemoryPlan, residency: float, limit: int) -> MemoryLimitError:
    return MemoryLimitError(
        f"residency {residency:.3g} needs {mib(plan.total)} MiB ({plan.parts()}), but {mib(limit)} MiB are the budget; "
        "use a smaller --residency, a larger --memory or a shorter --context"
    )


def mib(n_bytes: int) -> str:
    """Whole MiB, rounded up, as messages have them."""
    return f"{-(-n_bytes // _MIB):,}"
