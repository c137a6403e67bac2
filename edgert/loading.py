"""From a path or name to the parts of a model that runs: file, configuration, plan, device, weights, tokenizer."""

from __future__ import annotations

import importlib.resources
import os
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgert.architectures import read_config
from edgert.chat_template import ChatTemplate
from edgert.devices.kv_cache import cache_bytes, check_kv_type
from edgert.engine import Engine, Session
from edgert.errors import EdgertError, MemoryLimitError, ModelFileError, OptionError
from edgert.experts.residency import AllResident
from edgert.memory import COMPILING_BYTES, PROCESS_BYTES, TOKEN_BYTES, MemoryPlan, available, parse_size
from edgert.quant import jit
from edgert.quant.records import address_of
from edgert.sampling import Sampling
from edgert.storage.gguf_file import GgufFile
from edgert.tokenizer import Tokenizer
from edgert.types import ModelConfig
from edgert.weights import Progress, Weights

EMBEDDED = "smollm2-moe"
DEFAULT_CONTEXT = 4096
_CHAT = Sampling(temperature=0.7, top_k=40, top_p=0.95, min_p=0.05)
_GGUF_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
    "penalty_last_n": "repetition_window",
}


class Parts:
    """What a Model is made of. Closed by close(), or when nothing refers to it any more."""

    def __init__(
        self,
        name: str,
        path: Path,
        file: GgufFile,
        engine: Engine,
        session: Session,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        defaults: Sampling,
        weights: Weights,
        memory: MemoryPlan,
        held: ExitStack,
    ) -> None:
        self.name, self.path, self.file, self.weights, self.memory = name, path, file, weights, memory
        self.engine, self.session, self.tokenizer = engine, session, tokenizer
        self.template, self.defaults = template, defaults
        self._close = weakref.finalize(self, _close, held, os.getpid())
        self._close.atexit = False  # a daemon thread may still compute then; the process gives all back

    def close(self) -> None:
        """Give back threads, memory and the file; a second call does nothing."""
        self._close()


def _close(held: ExitStack, owner: int) -> None:
    if os.getpid() == owner:  # in a forked child the threads are the parent's
        held.close()


def resolve(path_or_name: str | Path | None) -> Path:
    """The file of a model: None or "smollm2-moe" is the embedded one."""
    if path_or_name is None or (str(path_or_name) == EMBEDDED and not os.path.exists(EMBEDDED)):
        path = Path(str(importlib.resources.files("edgert.demo") / "smollm2-moe-q4_0.gguf"))
        if not path.exists():
            raise ModelFileError(f"{path}: the embedded model is missing from this installation; install edgert again")
        return path
    return Path(path_or_name)


def load_parts(
    path_or_name: str | Path | None,
    *,
    memory: str | int | None,
    context: int | None,
    threads: int | None,
    device: str,
    kv_type: str,
    activations: str,
    progress: Progress,
) -> Parts:
    """Everything that a Model needs, loaded; see edgert.load."""
    path, make_device = resolve(path_or_name), _device(device)
    limit = None if memory is None else parse_size(memory)
    progress("reading the header", 0.0)
    with ExitStack() as held, _memory_errors(path):
        file = held.enter_context(GgufFile.open(path))
        config = read_config(file.metadata, str(path))
        n_context = _context(context, config)
        weights = Weights(file, config, decode_to_f32=activations == "f32")
        needed = plan(weights, n_context, kv_type, threads, activations)
        needed.require(limit, path.name)
        made = make_device(
            config, n_context, threads=threads, activations=activations, rope_divisors=weights.rope_divisors()
        )
        held.callback(made.close)
        _compile(made.kernels(weights.formats(), kv_type, activations), progress)
        session = Session(made.new_cache(n_context, kv_type))
        progress("building the tokenizer", 0.0)
        tokenizer, template = _words(file)
        engine = Engine(config, made, AllResident(weights.load_into(made, progress)), weights.embed)
        progress("ready", 1.0)
        defaults = _defaults(file.metadata, path_or_name)
        return Parts(
            _name(file),
            path,
            file,
            engine,
            session,
            tokenizer,
            template,
            defaults,
            weights,
            needed,
            held.pop_all(),
        )


def _words(file: GgufFile) -> tuple[Tokenizer, ChatTemplate]:
    """A file's tokenizer and chat template; errors name the file."""
    try:
        tokenizer = Tokenizer.from_metadata(file.metadata)
        return tokenizer, ChatTemplate.from_metadata(file.metadata, tokenizer)
    except EdgertError as error:
        raise type(error)(f"{file.path}: {error}") from error


@contextmanager
def _memory_errors(path: Path) -> Iterator[None]:
    """Turn a MemoryError into a MemoryLimitError."""
    try:
        yield
    except MemoryError as error:
        raise MemoryLimitError(
            f"{path}: memory ran out while the model was loaded, {available() / 2**20:,.0f} MiB are available; "
            "close other programs, raise the process's limit, or use a smaller model or a shorter --context"
        ) from error


def _context(context: int | None, config: ModelConfig) -> int:
    """Positions to allocate."""
    if context is None:
        return min(config.n_context, DEFAULT_CONTEXT)
    if not 1 <= context <= config.n_context:
        raise OptionError(f"context={context} must lie between 1 and {config.n_context}, which this model was made for")
    return context


def _device(name: str) -> Any:
    """The class of a device by name."""
    if name == "auto":
        name = "cpu" if jit.JIT_ENABLED else "reference"
    if name == "cpu" and jit.JIT_ENABLED:
        from edgert.devices.cpu import CpuDevice

        return CpuDevice
    if name == "reference":
        from edgert.devices.reference import ReferenceDevice

        return ReferenceDevice
    raise OptionError(f"device={name!r} is not known here; use auto, cpu (with numba's JIT enabled) or reference")


def _compile(kernels: Sequence[tuple[Any, int]], progress: Progress) -> None:
    """Compile what the model needs, or read it from the cache, with a word about what takes long."""
    for done, (kernel, n_arguments) in enumerate(kernels):
        if not jit.is_compiled(kernel):
            progress(f"compiling kernels for this machine, once ({done + 1} of {len(kernels)})", done / len(kernels))
        address_of(kernel, n_arguments)


def _name(file: GgufFile) -> str:
    name = file.metadata.get("general.name")
    return name if isinstance(name, str) and name else file.path.stem


def _defaults(metadata: Any, path_or_name: str | Path | None) -> Sampling:
    """Sampling of chats: what the file recommends, over edgert's own."""
    if path_or_name is None or str(path_or_name) == EMBEDDED:
        return Sampling(temperature=0.7, repetition_penalty=1.1)
    found = {
        ours: metadata[f"general.sampling.{theirs}"]
        for theirs, ours in _GGUF_SAMPLING.items()
        if f"general.sampling.{theirs}" in metadata
    }
    return _CHAT.changed(**found)


def plan(
    weights: Weights, n_context: int, kv_type: str, threads: int | None = None, activations: str = "int8"
) -> MemoryPlan:
    """What loading and running will take."""
    from edgert.devices import buffers, cpu
    from edgert.devices.cores import choose_threads

    config, tensors = weights.config, weights.file.tensors
    in_ram = [name for name in tensors if not weights.is_on_file(name)]
    packed = sum(map(weights.bytes_of, in_ram))
    float_hidden = activations == "f32" or any(
        "ffn_down" in name and not weights.format_of(name).is_integer for name in in_ram
    )
    check_kv_type(kv_type)
    kernels = cpu.CpuDevice.kernels(weights.formats(), kv_type, activations)
    compiled = all(jit.is_compiled(kernel) for kernel, _ in kernels)
    work = cpu.work_bytes(config, n_context, threads or choose_threads().n_threads, float_hidden=float_hidden)
    return MemoryPlan(
        process=PROCESS_BYTES + TOKEN_BYTES * config.n_vocab + (0 if compiled else COMPILING_BYTES),
        hot=sum(weights.bytes_of(name) for name in in_ram if not weights.is_cold(name)),
        cold=sum(weights.bytes_of(name) for name in in_ram if weights.is_cold(name)),
        kv=cache_bytes(config, n_context, kv_type),
        work=work + buffers.unused_bytes(packed),
        loading=max(weights.packing_bytes(name) for name in in_ram),
        context=n_context,
        kv_type=kv_type,
    )


def describe(
    path_or_name: str | Path | None = None, *, context: int | None = None, kv_type: str = "f16"
) -> dict[str, Any]:
    """What `edgert inspect` prints, without reading the weights."""
    path = resolve(path_or_name)
    with GgufFile.open(path) as file:
        config = read_config(file.metadata, str(path))
        weights = Weights(file, config)
        n_context = _context(context, config)
        tokenizer, template = _words(file)
        memory = plan(weights, n_context, kv_type)
        types: Counter[str] = Counter()
        for info in file.tensors.values():
            types[info.type.name] += info.n_bytes
        parameters = sum(int(np.prod(info.shape)) for info in file.tensors.values())
        cold = sum(info.n_bytes for name, info in file.tensors.items() if weights.is_cold(name))
        total = sum(info.n_bytes for info in file.tensors.values())
        return {
            "path": str(path),
            "name": _name(file),
            "architecture": config.architecture,
            "parameters": parameters,
            "bpw": 8 * total / parameters,
            "bytes": {"total": file.n_bytes, "hot": total - cold, "cold": cold},
            "tensor_types": dict(types.most_common()),
            "layers": config.n_layers,
            "embedding_length": config.d_model,
            "context_length": config.n_context,
            "experts": _experts(config, cold),
            "vocabulary": {"model": tokenizer.model, "pre": tokenizer.pre, "size": config.n_vocab},
            "tokenizer": {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "stop": sorted(tokenizer.stop_ids)},
            "template": {
                "source": "ChatML default" if template.is_default else "model",
                "supports_system": template.supports_system,
                "supports_tools": template.supports_tools,
            },
            "memory": {
                part: getattr(memory, part)
                for part in ("hot", "cold", "kv", "work", "loading", "process", "total", "context", "kv_type")
            },
        }


def _experts(config: ModelConfig, cold: int) -> dict[str, int] | None:
    if config.router is None:
        return None
    count = config.router.n_expert * config.n_layers
    return {
        "count": config.router.n_expert,
        "used": config.router.top_k,
        "shared": int(config.d_shared > 0),
        "layers": config.n_layers,
        "bytes_each": cold // count,
        "working_set": cold // count * config.router.top_k * config.n_layers,
    }
