"""A graphics card's own memory: how much of it may be used, and which experts lie there."""

from __future__ import annotations

import contextlib
import os
import subprocess

import numpy as np
import numpy.typing as npt

from edgert.devices.onnx_runtime import provider_of
from edgert.devices.selection import Selection
from edgert.errors import OptionError
from edgert.memory import parse_size
from edgert.types import Floats

_USED_SHARE = 0.9  # of what is free, where nobody says how much: the driver and the provider take some themselves
_QUERY = ("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits")


def card_bytes(gpu_memory: str | int | None, device: Selection) -> int | None:
    """Bytes that may be used of the card that a device computes on; None: nobody knows, or it has no card.

    OptionError for no size, for a size where there is no card, and for none where experts lie on one and nobody knows
    what is free; DeviceError for a card's provider that is not there.
    """
    has_card = device.on_card("attention") or device.on_card("experts")
    if gpu_memory is None:
        found = _free() if has_card else None
        if found is None and device.on_card("experts"):
            provider_of(device.experts.removeprefix("onnx:"))
            raise OptionError(
                f"device={device.name!r}: nvidia-smi does not say how much of the card's memory is free; say how much "
                "may be used with --gpu-memory, for example 6GiB"
            )
        return found
    if not has_card:
        raise OptionError(f"gpu_memory={gpu_memory!r}: {device.name} has no memory of its own; leave it away")
    if isinstance(gpu_memory, float) or "%" in str(gpu_memory):
        raise OptionError(
            f"gpu_memory={gpu_memory!r}: a share would be of the machine's memory; write for example 6GiB"
        )
    try:
        return parse_size(gpu_memory)
    except OptionError as error:
        raise OptionError(f"gpu_{error}") from error


def _free() -> int | None:
    """Of the card that CUDA counts first among those it may see; of those it may be, the one that has least."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    sorted_alike = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"  # else the fastest comes first
    which = ("-i", first or "0") if sorted_alike or not (first or "0").isdigit() else ()
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        found = subprocess.run((*_QUERY, *which), capture_output=True, text=True, timeout=10, check=True).stdout
        return int(_USED_SHARE * (min(map(int, found.split())) << 20))
    return None


def hot_experts(n_hot: int, shape: tuple[int, int], used: Floats | None) -> npt.NDArray[np.bool_]:
    """Which experts (n_layers, n_expert) lie on the card: of each layer the n_hot that are used most.

    used: how often each is, of that shape; None: there is no profile, and the first ones are taken.
    """
    order = np.tile(np.arange(shape[1]), (shape[0], 1)) if used is None else np.argsort(-used, axis=1, kind="stable")
    found = np.zeros(shape, np.bool_)
    np.put_along_axis(found, order[:, :n_hot], True, axis=1)
    return found
