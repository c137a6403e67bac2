"""What a model takes in memory, counted from its tables of tensors before anything of it is read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgert.devices.base import CHUNK
from edgert.devices.kv_cache import cache_bytes, check_kv_type
from edgert.devices.onnx_runtime import form_of
from edgert.devices.selection import Selection
from edgert.errors import MemoryLimitError
from edgert.experts.predictors import is_compiled, predictor_bytes
from edgert.experts.topics import topic_bytes
from edgert.memory import WORD_BYTES, Needs, mib
from edgert.quant import jit
from edgert.storage.bundle import Bundle
from edgert.storage.bundle_manifest import PAGE, round_up
from edgert.tensor_table import EMBEDDING, HEAD
from edgert.types import Ids, ModelConfig
from edgert.weight_sources import KEPT_ROWS
from edgert.weights import Weights

_CHUNKS = (32, 64, 128, 256, CHUNK)  # tokens of a step, from which the plan chooses
_READER_BYTES = 4 << 20  # of the lanes, their queues and stacks; records are read to where they stay


def needs(
    weights: Weights,
    n_context: int,
    kv_type: str,
    threads: int | None = None,
    activations: str = "int8",
    device: Selection | None = None,
    card: int | None = None,
    verified: bool = False,
) -> Needs:
    """What loading and running will take of the machine's memory.

    device: None for the CPU; verified: it was held against the CPU before. card: bytes of a graphics card's own memory
    that may be taken; None: as many as it takes.
    OptionError for an unknown kv_type; MemoryLimitError: too few of the card's.
    """
    rings = device is None or device.attention == "cpu"  # others keep all positions
    found = _on_cpu(weights, n_context, kv_type, threads, activations, rings)
    if device is None or not device.onnx:
        return found
    with_onnx = _with_onnx(found, weights, n_context, kv_type, device)
    if not verified:
        with_onnx = replace(with_onnx, libraries=with_onnx.libraries + _verifying(weights, found.record, threads))
    return _with_card(with_onnx, found, weights.config, device, card)


def _with_card(needed: Needs, on_cpu: Needs, config: ModelConfig, device: Selection, limit: int | None) -> Needs:
    """Of needs in one memory those that are the machine's where a card has its own: experts fill what is left of it."""
    taken = 0
    if device.on_card("attention"):
        taken = needed.hot + max(map(needed.step_bytes, needed.work))
        needed = replace(needed, hot=0, kv=dict.fromkeys(needed.kv, 0))
    n_hot, n_expert = None, config.router.n_expert if config.router else 0
    if device.on_card("experts") and n_expert:
        row = int(on_cpu.cold * needed.beside) // n_expert  # one expert of each layer
        n_hot = n_expert if limit is None else max(min((limit - taken) // row, n_expert), 0)
        taken += max(n_hot, 1) * row
        cold = on_cpu.cold * (n_expert - n_hot) // n_expert
        needed = replace(needed, cold=cold, beside=0.0, streams=False, n_hot=n_hot)
    if limit is not None and taken > limit:
        raise MemoryLimitError(
            f"--gpu-memory {mib(limit)}MiB is below the {mib(taken)} MiB that {device.name} takes; give more, or a "
            "shorter --context, or leave a part to the CPU as in --device attention=cpu,experts=NAME"
        )
    return needed


def _with_onnx(found: Needs, weights: Weights, n_context: int, kv_type: str, device: Selection) -> Needs:
    """The same where a part is ONNX Runtime's: weights are there in the form of its sessions."""
    from edgert.devices import onnx_memory

    config = weights.config
    in_ram = [name for name in weights.shapes if not weights.is_on_file(name)]
    of_part = {True: form_of(device.experts), False: form_of(device.attention)}
    forms = {
        name: sum(
            onnx_memory.form_bytes(*one, of_part[weights.is_cold(name)]) for one in weights.sizes_of(name).items()
        )
        for name in in_ram
        if len(weights.shapes[name]) > 1
    }
    hot, beside = found.hot, 0.0
    loading = max(found.loading, 2 * max(forms[name] for name in forms if not weights.is_cold(name)))
    if device.attention != "cpu":
        hot = sum(n_bytes for name, n_bytes in forms.items() if not weights.is_cold(name))
        hot += (config.n_layers + 2) * onnx_memory.SESSION_BYTES
        hot *= 2 if of_part[False] else 1  # graphs of a token and of a chunk
    if device.experts != "cpu" and config.router:
        cold = sum(n_bytes for name, n_bytes in forms.items() if weights.is_cold(name))
        cold += len(config.expert_layers) * config.router.n_expert * onnx_memory.SESSION_BYTES
        beside = cold / found.cold
    own = {chunk: work for chunk, work in found.work.items() if chunk <= onnx_memory.CHUNK}
    return replace(
        found,
        hot=hot,
        unused=found.unused if device.experts == "cpu" else 0,
        beside=beside,
        loading=loading,
        libraries=onnx_memory.LIBRARY_BYTES,
        work={
            chunk: onnx_memory.work_bytes(config, n_context, chunk, kv_type) + (work if device.compiled else 0)
            for chunk, work in own.items()
        },
    )


def _verifying(weights: Weights, record: int, threads: int | None) -> int:
    """What it takes to hold the device against the CPU on first use."""
    from edgert.devices import onnx_memory
    from edgert.devices.cores import choose_threads

    layers = dict.fromkeys(range(weights.config.n_layers), 0)
    for name in weights.shapes:
        if name.startswith("blk.") and not weights.is_cold(name) and not weights.is_on_file(name):
            layers[int(name.split(".")[1])] += weights.bytes_of(name)
    head = weights.bytes_of(HEAD if HEAD in weights.shapes else EMBEDDING)
    n_threads = threads or choose_threads().n_threads
    return onnx_memory.verifying_bytes(weights.config, max(layers.values()), head, record, n_threads)


def _on_cpu(
    weights: Weights, n_context: int, kv_type: str, threads: int | None, activations: str, rings: bool
) -> Needs:
    """What the CPU device will take. rings: whether layers that see only the last positions keep rings."""
    from edgert.devices import buffers, cpu, work_space
    from edgert.devices.cores import choose_threads

    check_kv_type(kv_type)
    config = weights.config
    in_ram = [name for name in weights.shapes if not weights.is_on_file(name)]
    float_hidden = activations == "f32" or any(
        "ffn_down" in name
        and name.endswith(".weight")
        and not all(format.is_integer for format in weights.sizes_of(name))
        for name in in_ram
    )
    n_threads = threads or choose_threads().n_threads
    hot = sum(weights.bytes_of(name) for name in in_ram if not weights.is_cold(name))
    packed = sum(map(weights.bytes_of, in_ram))
    work = {
        chunk: work_space.work_bytes(config, n_context, n_threads, float_hidden=float_hidden, chunk=chunk)
        + buffers.unused_bytes(hot)
        for chunk in _CHUNKS
    }
    kernels = cpu.CpuDevice.kernels(weights.formats(), kv_type, activations, weights.config)
    sizes = record_bytes(weights)
    n_expert, top_k = (config.router.n_expert, config.router.top_k) if config.router else (0, 0)
    merges = weights.file.metadata.get("tokenizer.ggml.merges")
    n_merges = len(merges) if isinstance(merges, (list, np.ndarray)) else 0
    return Needs(
        hot=hot,
        kv={chunk: cache_bytes(config, n_context, kv_type, chunk if rings else None) for chunk in _CHUNKS},
        work=work,
        tokenizer=WORD_BYTES * (config.n_vocab + n_merges),
        context=n_context,
        kv_type=kv_type,
        compiling=not (all(jit.is_compiled(kernel) for kernel, _ in kernels) and (not n_expert or is_compiled())),
        loading=max(weights.packing_bytes(name) for name in in_ram),
        cold=int(sizes.sum()),
        unused=buffers.unused_bytes(packed) - buffers.unused_bytes(hot),
        record=int(sizes.max(initial=0)),
        top_k=top_k,
        working_set=int(sizes.sum()) * top_k // max(n_expert, 1),
        buffers=_READER_BYTES
        + predictor_bytes(config.n_layers, n_expert)
        + topic_bytes(config.n_layers, n_expert)
        + KEPT_ROWS * (weights.bytes_of(EMBEDDING) // config.n_vocab),
        streams=config.router is not None,
    )


def record_bytes(weights: Weights) -> Ids:
    """Sizes (n_layers, n_expert) of the expert records that a bundle of this model has or would have."""
    if isinstance(weights.file, Bundle):
        return weights.file.record_bytes
    config = weights.config
    if config.router is None:
        return np.zeros((config.n_layers, 0), np.int64)
    n_expert, rows = config.router.n_expert, []
    for layer in range(config.n_layers):
        if not config.has_experts(layer):
            rows.append([0] * n_expert)
            continue
        parts = [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
        sizes = [round_up(weights.bytes_of(name) // n_expert, 64) for name in parts]
        rows.append([round_up(sum(sizes), PAGE)] * n_expert)
    return np.array(rows, np.int64)
