"""From a path or name to the parts of a model that runs: file, configuration, plan, device, weights, tokenizer."""

from __future__ import annotations

import importlib.resources
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import numpy.typing as npt

from edgert import file_pages, streaming
from edgert.architectures import read_config
from edgert.chat_template import ChatTemplate
from edgert.cooling import MODES, Cooler, check_power, cooler_for
from edgert.devices import selection
from edgert.devices.base import Device
from edgert.devices.onnx_quantised import Ranges
from edgert.devices.selection import Selection
from edgert.engine import Engine, Session
from edgert.errors import EdgertError, MemoryLimitError, ModelFileError, OptionError
from edgert.experts import predictors
from edgert.experts.choice import choice_for
from edgert.experts.prefetch_control import Mode
from edgert.experts.residency import AllResident, Residency
from edgert.graphics_memory import card_bytes, hot_experts
from edgert.memory import Budget, MemoryPlan, Needs, available, budget_for, parse_share, plan_memory
from edgert.needs import needs
from edgert.pack import open_source
from edgert.quant import checksum, jit, packing
from edgert.quant.formats import TILE_ROWS
from edgert.quant.records import address_of
from edgert.sampling import Sampling
from edgert.storage.bundle import Bundle, is_bundle
from edgert.storage.gguf_file import GgufFile
from edgert.storage.tensor_file import TensorFile
from edgert.tokenizer import Tokenizer
from edgert.types import ModelConfig
from edgert.weights import Progress, Weights

if TYPE_CHECKING:
    from edgert.verifying import Verifier

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
        file: TensorFile | Bundle,
        engine: Engine,
        session: Session,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        defaults: Sampling,
        weights: Weights,
        memory: MemoryPlan,
        held: ExitStack,
        cooler: Cooler | None = None,
    ) -> None:
        self.name, self.path, self.file, self.weights, self.memory = name, path, file, weights, memory
        self.engine, self.session, self.tokenizer = engine, session, tokenizer
        self.template, self.defaults = template, defaults
        self.cooler = cooler  # None: never fewer threads
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
    memory: str | int | float | None,
    residency: str | float | None,
    policy: str,
    prefetch: Mode,
    trace: str | Path | None,
    context: int | None,
    threads: int | None,
    device: str,
    kv_type: str,
    activations: str,
    progress: Progress,
    reserved: int = 0,
    power: str = MODES[0],
    gpu_memory: str | int | None = None,
) -> Parts:
    """Everything that a Model needs, loaded; see edgert.load."""
    path = resolve(path_or_name)
    selected = selection.parse(_fastest(path, kv_type, power, threads) if device == "auto" else device)
    selected.check(activations)
    card = card_bytes(gpu_memory, selected)
    streaming.check_options(policy, prefetch)
    check_power(power)
    share = None if residency is None else parse_share(residency)
    budget = budget_for(memory, reserved)
    progress("reading the header", 0.0)
    with ExitStack() as held, _memory_errors(path):
        options = (context, kv_type, threads, activations, selected, card)
        file, weights, needed = _open(path, options, held, budget)
        if device == "auto" and selected.onnx and not _all_fits(needed, budget, share):
            selected = selection.parse("auto")  # it was measured with all experts in RAM
            options = (context, kv_type, threads, activations, selected, card)
            needed = needs(weights, needed.context, kv_type, threads, activations, selected)
        plan = plan_memory(needed, budget, residency=share)
        if plan.slots and not isinstance(file, Bundle):  # experts are read from a bundle only
            from edgert.cache import cached_bundle

            held.close()
            file, weights, needed = _open(cached_bundle(path, progress), options, held, budget)
            plan = plan_memory(needed, budget, residency=share)
        file_pages.release(dropping=budget.strict, compiling=True)  # what the imports read ahead
        config = weights.config
        made = selected.make(
            config,
            needed.context,
            kv_type=kv_type,
            threads=threads,
            activations=activations,
            rope_divisors=weights.rope_divisors(needed.context),
            chunk=plan.chunk,
            ranges=_ranges(file, weights, threads, progress) if selected.quantised else None,
            is_hot=None if needed.n_hot is None else _hot(needed.n_hot, weights),
        )
        held.callback(made.close)
        cooler = cooler_for(made, power)
        if cooler is not None:
            held.callback(cooler.close)
        _compile(_kernels(made, weights, kv_type, activations), progress)
        if config.router is not None and (plan.slots or not predictors.is_compiled()):
            predictors.prepare()
        if not isinstance(file, Bundle):
            _pack_nothing(weights)
        file_pages.release(dropping=budget.strict)  # after the compiler
        session = Session(made.new_cache(needed.context, kv_type))
        progress("building the tokenizer", 0.0)
        tokenizer, template = words(file)
        experts: Residency
        if plan.slots:
            assert isinstance(file, Bundle)
            experts = streaming.open_residency(file, config, made, plan, budget, held, policy=policy, prefetch=prefetch)
            weights.load_into(made, progress, experts=False)
            experts.fill()  # in the background, until somebody asks
        else:
            experts = AllResident(made, weights.load_into(made, progress))
        engine = Engine(config, made, experts, weights.embed)
        engine.pace = cooler.look if cooler is not None else None
        if _verifies(selected):
            _verify(selected, engine, session, weights, tokenizer, kv_type, activations, threads, progress)
        if trace is not None:
            streaming.record_routes(engine, weights, Path(trace), held)
        file_pages.release(dropping=budget.strict)
        progress("ready", 1.0)
        return Parts(
            name_of(file),
            path,
            file,
            engine,
            session,
            tokenizer,
            template,
            _defaults(file.metadata, path_or_name),
            weights,
            plan,
            held.pop_all(),
            cooler,
        )


def _fastest(path: Path, kv_type: str, power: str, threads: int | None) -> str:
    """The device that answered this model fastest, where that was measured, it is there, still trusted, and has such a
    cache; else "auto", as where threads are to be taken from the CPU."""
    from edgert.device_speed import OWN, speeds_of

    speeds = speeds_of(path, threads)
    if speeds is None or speeds.fastest == OWN or power != MODES[0]:
        return "auto"
    from edgert.devices.onnx_attention import CACHED
    from edgert.verifying import is_trusted

    return speeds.fastest if kv_type in CACHED and is_trusted(speeds.fastest) else "auto"


def _all_fits(needed: Needs, budget: Budget, share: float | None) -> bool:
    """Whether all experts are in RAM within a budget."""
    try:
        return not plan_memory(needed, budget, residency=share).slots
    except MemoryLimitError:
        return False


def _hot(n_hot: int, weights: Weights) -> npt.NDArray[np.bool_]:
    """Experts that a graphics card has: those that a profile found to be used most, or the first ones."""
    config = weights.config
    assert config.router is not None
    shape = config.n_layers, config.router.n_expert
    bundle = weights.file.path if isinstance(weights.file, Bundle) else None
    choice = choice_for(streaming.model_key(weights.file.metadata, config), 1.0, shape, bundle)
    used = None if choice is None or choice.profile is None else np.reshape(choice.profile, shape)
    return hot_experts(n_hot, shape, used)


def _ranges(file: TensorFile | Bundle, weights: Weights, threads: int | None, progress: Progress) -> Ranges:
    """Ranges that a device rounds values to, seen on a text."""
    from edgert.devices.onnx_ranges import measure
    from edgert.verifying import RANGES_TEXT

    embeddings, stage = weights.embed(words(file)[0].encode(RANGES_TEXT)), "measuring ranges of values"
    return measure(weights.config, weights, embeddings, threads, lambda fraction: progress(stage, fraction))


def _verify(
    selected: Selection,
    engine: Engine,
    session: Session,
    weights: Weights,
    tokenizer: Tokenizer,
    kv_type: str,
    activations: str,
    threads: int | None,
    progress: Progress,
) -> None:
    """Hold a device that is not edgert's own against the CPU device, or find that this was done before."""
    from edgert.verifying import PROMPT

    verifier = _verifier(selected, weights, kv_type, activations)
    verifier.ensure(engine, session, weights, tokenizer.encode(PROMPT), threads, progress)


def _verifies(selected: Selection) -> bool:
    """Whether a device is held against the CPU: without compiled kernels there is nothing to hold it against."""
    return selected.onnx and jit.JIT_ENABLED


def _verifier(selected: Selection, weights: Weights, kv_type: str, activations: str) -> Verifier:
    from edgert.verifying import Verifier

    formats = [format.name for format in weights.formats()]
    model = streaming.model_key(weights.file.metadata, weights.config)
    return Verifier(selected, model, formats, kv_type=kv_type, activations=activations)


def open_model(path: Path) -> TensorFile | Bundle:
    """Open a model by what the path is: a bundle, or what can be packed into one."""
    return Bundle.open(path) if is_bundle(path) else open_source(path)


def _open(
    path: Path,
    options: tuple[int | None, str, int | None, str, Selection, int | None],
    held: ExitStack,
    budget: Budget,
) -> tuple[TensorFile | Bundle, Weights, Needs]:
    """A model's file, its weights and what it needs."""
    file = open_model(path)
    held.callback(file.close)
    if budget.strict and isinstance(file, GgufFile):
        file.keep_no_pages()
    config = read_config(file.metadata, str(path))
    context, kv_type, threads, activations, selected, card = options
    weights = Weights(file, config, decode_to_f32=activations == "f32")
    n_context = context_of(context, config)
    verified = not _verifies(selected) or _verifier(selected, weights, kv_type, activations).kept() is not None
    needed = needs(weights, n_context, kv_type, threads, activations, selected, card, verified)
    return file, weights, needed


def _kernels(device: Device, weights: Weights, kv_type: str, activations: str) -> list[tuple[Any, int]]:
    """All that has to be compiled for a model."""
    kernels = device.kernels(weights.formats(), kv_type, activations, weights.config)
    return [*kernels, *checksum.kernels()] if isinstance(weights.file, Bundle) and jit.JIT_ENABLED else kernels


def words(file: TensorFile | Bundle) -> tuple[Tokenizer, ChatTemplate]:
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


def context_of(context: int | None, config: ModelConfig) -> int:
    """Positions to allocate."""
    if context is None:
        return min(config.n_context, DEFAULT_CONTEXT)
    if not 1 <= context <= config.n_context:
        raise OptionError(f"context={context} must lie between 1 and {config.n_context}, which this model was made for")
    return context


def _compile(kernels: Sequence[tuple[Any, int]], progress: Progress) -> None:
    """Compile what the model needs, or read it from the cache, with a word about what takes long."""
    for done, (kernel, n_arguments) in enumerate(kernels):
        if not jit.is_compiled(kernel):
            progress(f"compiling kernels for this machine, once ({done + 1} of {len(kernels)})", done / len(kernels))
        address_of(kernel, n_arguments)


def _pack_nothing(weights: Weights) -> None:
    """Compile the kernels that pack these weights now: later, the compiler would come on top of the model."""
    for kind, format in weights.packings():
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        n_in = math.lcm(block, format.block)
        raw = np.zeros((TILE_ROWS, n_in // block * block_bytes), np.uint8)
        packing.pack_rows(raw, kind, format, n_in, np.empty(format.matrix_bytes(TILE_ROWS, n_in), np.uint8))


def name_of(file: TensorFile | Bundle) -> str:
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
