"""What kind of drive holds a path: NVMe, SATA, eMMC, microSD and so on, as Linux shows it under /sys.

Says what the drive is, not how fast: that is measured (flash_probe.py).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from edgert.storage.flash_settings import existing, file_system

_NOT_LOCAL = {"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "virtiofs", "ceph"}
_IN_RAM = {"tmpfs", "ramfs"}


@dataclass(frozen=True)
class FlashClass:
    """kind: for people, "" if Linux does not tell; model: the maker's name; slow: whether such drives read experts
    slowly by their nature; link: of NVMe, "8.0 GT/s x4", and what it could be where that is more."""

    kind: str
    model: str = ""
    slow: bool = False
    link: str = ""
    possible_link: str = ""


def flash_class(path: str | os.PathLike[str], root: Path = Path("/")) -> FlashClass:
    """The kind of drive that holds a path; `root` holds sys/."""
    where = file_system(path)
    if where.kind in _IN_RAM:
        return FlashClass("RAM")
    if where.kind in _NOT_LOCAL:
        return FlashClass(f"network or host ({where.kind})", slow=True)
    number = existing(path).stat().st_dev
    at = root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    if not at.exists():  # btrfs and overlays have numbers of their own
        at = root / "sys/class/block" / Path(where.device).name
    return class_of(at) if at.exists() else FlashClass("")


def class_of(block: Path) -> FlashClass:
    """Of a block device, or a partition of one, by its folder in sysfs."""
    folder = block.resolve()
    slaves = sorted((folder / "slaves").glob("*"))
    if slaves:  # encrypted, LVM, RAID: the drive below decides
        return class_of(slaves[0])
    if (folder / "partition").exists():
        folder = folder.parent
    name, model = folder.name, _text(folder / "device/model")
    if name.startswith("nvme"):
        now, most = (_link(folder / "device/device", which) for which in ("current", "max"))
        return FlashClass("NVMe", model, link=now, possible_link=most if most != now else "")
    if name.startswith("mmcblk"):
        kind = {"SD": "microSD", "MMC": "eMMC"}.get(_text(folder / "device/type"), "SD or eMMC")
        return FlashClass(kind, _text(folder / "device/name"), slow=True)
    if re.search("/ufs|ufshcd", str(folder)):
        return FlashClass("UFS", model)
    if "/usb" in str(folder):
        return FlashClass("USB drive", model, slow=True)
    if name.startswith(("vd", "xvd")):
        return FlashClass("virtual disk", model)
    if name.startswith(("zram", "ram")):
        return FlashClass("RAM")
    if name.startswith("sd"):
        turns = _text(folder / "queue/rotational") == "1"
        return FlashClass("hard disk" if turns else "SATA SSD", model, slow=turns)
    return FlashClass("")


def _link(device: Path, which: str) -> str:
    """ "8.0 GT/s x4" of a PCIe device; empty if it does not tell."""
    speed, width = _text(device / f"{which}_link_speed"), _text(device / f"{which}_link_width")
    return f"{speed.removesuffix(' PCIe')} x{width}" if speed and width else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip("\0 \t\n")
    except OSError:
        return ""
