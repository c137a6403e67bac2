"""Boards that a plan can be made for: what their makers and those who measured them say, with where it is from.

Rates are peaks; what edgert reaches of them is plan.py's. No board here was measured by edgert: what is said of
them is unverified, and the ranges of a plan are wide for it. The machine in hand is measured instead (plan_machine.py).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from edgert.errors import OptionError

_MIB, _GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Flash:
    """Where experts lie: bytes a second at megabyte reads, several at a time, and seconds that a read takes besides."""

    name: str
    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Unit:
    """What computes. Operations a second, a multiply-add counts as two; bytes_per_s: of memory, as far as it reaches.

    int8_per_s: None where nobody says. half_per_s: of 16-bit floats, or of 32-bit ones where there are no others.
    """

    name: str
    int8_per_s: float | None
    half_per_s: float
    bytes_per_s: float
    n_cores: int = 0  # those that edgert would use; 0 for what is no CPU
    instructions: str = ""  # the path of quant/isa.py

    @property
    def peak_per_s(self) -> float:
        """Of what it does fastest among int8 and 16-bit floats."""
        return max(self.int8_per_s or 0.0, self.half_per_s)


@dataclass(frozen=True)
class Board:
    """A machine on paper.

    ram_bytes: as sold. system_bytes: of it, that firmware, kernel and an idle system without a desktop take. slowness:
    how much longer one core takes for Python and system calls than one of the server that edgert was measured on.
    flash: the most usual fast one first. obstacle: why edgert's wheels do not run there; empty where they should.
    """

    name: str
    title: str
    ram_bytes: int
    system_bytes: int
    memory_bytes_per_s: float  # as specified, for all units together
    cpu: Unit | None
    gpu: Unit | None
    flash: tuple[Flash, ...]
    slowness: float = 3.0
    obstacle: str = ""
    remarks: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    measured: bool = False  # by edgert

    @property
    def main(self) -> Unit:
        """What a plan is made for: the CPU where there is one."""
        unit = self.cpu or self.gpu
        assert unit is not None
        return unit


def _arm(n_cores: int, clock_hz: float, bytes_per_s: float, instructions: str, pipes: int = 2) -> Unit:
    """Cores whose `pipes` vector pipes of 128 bits each start an instruction a cycle.

    A dot product (sdot) is 16 multiply-adds of int8, without it smull and additions make a quarter; a fused
    multiply-add is 4 of 32-bit floats, in which edgert computes what is not int8. Arm's optimisation guides of
    Cortex-A76, A78AE and Neoverse V3AE.
    """
    each = n_cores * clock_hz * pipes * 2
    return Unit("CPU", each * (16 if "neon-" in instructions else 4), each * 4, bytes_per_s, n_cores, instructions)


_PI_FLASH = (
    Flash("NVMe", 430e6, 1.5e-4),
    Flash("NVMe at PCIe 3.0", 800e6, 1.5e-4),
    Flash("microSD", 90e6, 4e-4),
)
_PI_REMARK = "NVMe on an M.2 HAT; PCIe 3.0 (dtparam=pciex1_gen=3) mostly works but is outside the specification"
_SD = Flash("microSD", 67e6, 4e-4)
_NVME_GEN3X4 = Flash("NVMe", 1.8e9, 1e-4)
_NVME_GEN4X4 = Flash("NVMe", 3.0e9, 1e-4)
_NVIDIA = "the maker's data sheet"
_CPU_GUESS = "memory rate of the CPU alone: an estimate, the data sheet gives that of all units together"
_ORIN_FLASH = "github.com/jetsonhacks/rootOnNVMe/issues/27 (NVMe 1.36 GB/s with one reader, microSD 67 MB/s)"

BOARDS = {
    board.name: board
    for board in (
        Board(
            "jetson-orin-nano",
            "Jetson Orin Nano 8GB",
            8 * _GIB,
            1400 * _MIB,
            102e9,
            _arm(6, 1.7e9, 35e9, "neon-dotprod"),
            Unit("GPU", 33e12, 17e12, 85e9),
            (_NVME_GEN3X4, _SD),
            remarks=("at the 25 W of JetPack 6.1 and later ('Super'); 68 GB/s and 40 TOPS before",),
            sources=(f"{_NVIDIA} (102 GB/s, 67 TOPS of sparse int8: half of it dense)", _ORIN_FLASH, _CPU_GUESS),
        ),
        Board(
            "jetson-orin-nx",
            "Jetson Orin NX 16GB",
            16 * _GIB,
            1500 * _MIB,
            102e9,
            _arm(8, 2.0e9, 40e9, "neon-dotprod"),
            Unit("GPU", 30e12, 15e12, 85e9),
            (_NVME_GEN4X4, _SD),
            slowness=2.5,
            sources=(f"{_NVIDIA} (102 GB/s; 100 TOPS of sparse int8, 60 of them the GPU's)", _CPU_GUESS),
        ),
        Board(
            "jetson-agx-orin",
            "Jetson AGX Orin 64GB",
            64 * _GIB,
            2000 * _MIB,
            204.8e9,
            _arm(12, 2.2e9, 65e9, "neon-dotprod"),
            Unit("GPU", 85e12, 42e12, 170e9),
            (_NVME_GEN4X4, Flash("eMMC", 300e6, 3e-4)),
            slowness=2.3,
            sources=(f"{_NVIDIA} (204.8 GB/s; 170 TOPS of sparse int8 on the GPU)", _CPU_GUESS),
        ),
        Board(
            "jetson-agx-thor",
            "Jetson AGX Thor 128GB",
            128 * _GIB,
            3000 * _MIB,
            273e9,
            _arm(14, 2.6e9, 120e9, "neon-i8mm", pipes=4),
            Unit("GPU", None, 258e12, 230e9),
            (Flash("NVMe", 4.5e9, 8e-5),),
            slowness=1.3,
            remarks=("16-bit rate derived from the 2,070 TFLOPS of sparse 4-bit floats: an eighth of it",),
            sources=(f"{_NVIDIA} (273 GB/s, 14 Neoverse V3AE at 2.6 GHz)", _CPU_GUESS),
        ),
        Board(
            "raspberry-pi-5",
            "Raspberry Pi 5 8GB",
            8 * _GIB,
            500 * _MIB,
            17.1e9,
            _arm(4, 2.4e9, 11.4e9, "neon-dotprod"),
            None,
            _PI_FLASH,
            slowness=2.5,
            remarks=(_PI_REMARK,),
            sources=(
                "raspberrypi.com, product brief (LPDDR4X-4267, 32 bits; four Cortex-A76 at 2.4 GHz)",
                "hellomatik.com/research/hitting-the-memory-wall-30b-moe-raspberry-pi (11.4 GB/s while decoding)",
            ),
        ),
        Board(
            "raspberry-pi-5-16gb",
            "Raspberry Pi 5 16GB",
            16 * _GIB,
            600 * _MIB,
            17.1e9,
            _arm(4, 2.4e9, 11.4e9, "neon-dotprod"),
            None,
            _PI_FLASH,
            slowness=2.5,
            remarks=(_PI_REMARK,),
            sources=("as the Raspberry Pi 5 8GB",),
        ),
        Board(
            "rk3588",
            "RK3588 16GB (Rock 5B, Orange Pi 5 Plus)",
            16 * _GIB,
            600 * _MIB,
            34.1e9,
            _arm(4, 2.3e9, 19e9, "neon-dotprod"),
            None,
            (Flash("NVMe", 2.0e9, 1e-4), Flash("eMMC", 280e6, 3e-4), Flash("microSD", 80e6, 4e-4)),
            slowness=2.5,
            remarks=("the four large cores alone; its NPU (6 TOPS of int8) is not used by edgert",),
            sources=(
                "turingpi.com, RK1 compute module benchmarks (17 to 22 GB/s sequential)",
                "Rockchip's data sheet (LPDDR4X-4266, 64 bits)",
            ),
        ),
        Board(
            "jetson-xavier-nx",
            "Jetson Xavier NX 8GB",
            8 * _GIB,
            1200 * _MIB,
            59.7e9,
            _arm(6, 1.4e9, 25e9, "neon"),
            Unit("GPU", 12.3e12, 6e12, 45e9),
            (_NVME_GEN3X4, _SD),
            slowness=3.5,
            obstacle="its system has Python 3.8, edgert needs 3.10",
            remarks=("no dot-product instructions",),
            sources=(f"{_NVIDIA} (59.7 GB/s; 21 TOPS of int8, 12.3 of them the GPU's)", _CPU_GUESS),
        ),
        Board(
            "jetson-tx2",
            "Jetson TX2 8GB",
            8 * _GIB,
            1200 * _MIB,
            59.7e9,
            _arm(4, 2.0e9, 20e9, "neon", pipes=1),
            Unit("GPU", None, 1.33e12, 40e9),
            (Flash("SATA SSD", 500e6, 1.5e-4), Flash("eMMC", 250e6, 3e-4)),
            slowness=5.0,
            obstacle="its system has Python 3.6 and glibc 2.27, edgert's wheels need 3.10 and 2.28",
            remarks=("no dot-product instructions",),
            sources=(f"{_NVIDIA} (59.7 GB/s, 1.33 TFLOPS of 16-bit floats)", _CPU_GUESS),
        ),
        Board(
            "a6000",
            "NVIDIA RTX A6000 48GB",
            48 * _GIB,
            500 * _MIB,
            768e9,
            None,
            Unit("GPU", 310e12, 155e12, 768e9),
            (_NVME_GEN4X4,),
            slowness=1.0,
            remarks=("for comparison with published rooflines; edgert plans for boards whose CPU computes",),
            sources=("arXiv 2402.16363, table 1 (155 TOP/s, 768 GB/s)",),
        ),
    )
}
HERE = "this"  # the name of the machine in hand


def board_named(name: str) -> Board:
    """A board by its name; OptionError, with the names there are, for another."""
    found = BOARDS.get(name.strip().lower())
    if found is not None:
        return found
    near = difflib.get_close_matches(name.strip().lower(), BOARDS, n=1, cutoff=0.5)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise OptionError(f"--board {name!r:.60} is not known{meant or '.'} There are: {HERE}, {', '.join(BOARDS)}")
