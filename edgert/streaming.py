"""The flash tier of one model put together as planned: its bundle, a reader with lanes, expert buffer and policy."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import numpy as np

from edgert.devices.base import Device
from edgert.engine import Engine
from edgert.errors import OptionError
from edgert.experts.buffer import Checked, ExpertBuffer
from edgert.experts.choice import Choice, choice_for
from edgert.experts.policies import POLICIES, make_policy
from edgert.experts.prefetch import Prefetcher
from edgert.experts.prefetch_control import Controller, Mode
from edgert.experts.residency import Residency
from edgert.experts.slots import ALIGNMENT, Slots
from edgert.experts.streamed import Streamed
from edgert.experts.trace import TraceWriter
from edgert.guard import guard_for
from edgert.memory import Budget, MemoryPlan
from edgert.needs import record_bytes
from edgert.storage.bundle import Bundle
from edgert.storage.flash import FlashFile
from edgert.storage.flash_settings import flash_settings
from edgert.storage.reader import Reader
from edgert.types import ModelConfig
from edgert.weights import Weights


def model_key(metadata: Mapping[str, Any], config: ModelConfig) -> str:
    """What a model is called where something is kept for it: the same for its file and its bundle."""
    return f"{metadata.get('general.name')} {config}"


def record_routes(engine: Engine, weights: Weights, path: Path, held: ExitStack) -> None:
    """Write the routes of the last steps to a trace file when `held` is closed.

    OptionError: no experts, or a file that cannot be written.
    """
    config = engine.config
    if config.router is None:
        raise OptionError(f"{weights.file.path} has no experts whose routes could be traced")
    writer = TraceWriter(path, model_key(weights.file.metadata, config), record_bytes(weights), config.router.top_k)
    held.callback(writer.close)
    layers = range(config.n_layers)

    def record(device: Device) -> None:
        ids, chosen = zip(*(device.chosen(layer) for layer in layers), strict=True)
        writer.add(np.stack(ids), np.stack(chosen), [device.ahead(layer) for layer in layers])

    engine.trace = record


def check_options(policy: str, prefetch: str) -> None:
    """OptionError for the name of a policy or mode that there is not."""
    if policy not in ("auto", *POLICIES):
        raise OptionError(f"policy={policy!r} is not known; use auto, {', '.join(POLICIES)}")
    if prefetch not in get_args(Mode):
        raise OptionError(f"prefetch={prefetch!r} is not known; use {', '.join(get_args(Mode))}")


def prefetch_state(residency: Residency) -> str:
    """Whether experts are read ahead at this moment, and why; empty where nothing could be."""
    if not isinstance(residency, Streamed) or residency.prefetcher is None:
        return ""
    controller = residency.prefetcher.controller
    return "on: always" if controller.mode == "always" else controller.reason


def open_residency(
    bundle: Bundle,
    config: ModelConfig,
    device: Device,
    plan: MemoryPlan,
    budget: Budget,
    held: ExitStack,
    *,
    policy: str,
    prefetch: Mode,
) -> Streamed:
    """A residency over the bundle's experts with the plan's expert buffer; what it opens is closed by `held`."""
    assert config.router is not None
    n_expert = config.router.n_expert
    settings = flash_settings(bundle.experts_path, int(bundle.record_bytes.max()))
    file = FlashFile(bundle.experts_path, direct=settings.direct)
    held.callback(file.close)
    reader = Reader(
        file,
        lanes=settings.lanes,
        chunk_bytes=settings.chunk_bytes,
        check=Checked(bundle),
        name=lambda key: f"layer {key // n_expert}, expert {key % n_expert}",
    )
    held.callback(reader.close)
    sizes = bundle.record_bytes
    choice = choice_for(model_key(bundle.metadata, config), plan.residency, sizes.shape, bundle.path) or Choice()
    chosen = make_policy(choice.policy if policy == "auto" else policy, sizes, choice.profile, choice.topics)
    buffer = ExpertBuffer(device, bundle, reader, Slots(plan.slots // ALIGNMENT * ALIGNMENT), chosen)
    top_k, ahead = config.router.top_k, None
    if prefetch != "off":
        stuck = settings.lanes * settings.chunk_bytes
        mean = int(sizes[sizes > 0].mean())
        controller = Controller(
            config.n_layers, mean, stuck_bytes=stuck, bytes_per_s=settings.bytes_per_s, mode=prefetch
        )
        ahead = Prefetcher(top_k, sizes, controller, choice.predictors, choice.primed)
    residency = Streamed(device, buffer, chosen, top_k, ahead)
    if choice.profile is not None:
        keys = np.flatnonzero(sizes)
        residency.first = keys[np.argsort(-chosen.worth(keys, config.n_layers - 1), kind="stable")]
    guard = guard_for(residency, plan, budget)
    held.callback(guard.close)
    residency.watch = guard.look
    residency.between_requests = guard.between_requests
    return residency
