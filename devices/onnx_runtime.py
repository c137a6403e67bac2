"""ONNX Runtime as edgert uses it: providers by name, sessions with weights in memory, and buffers that are bound.

The packages `onnx` and `onnxruntime` are imported when a device asks for them, never before. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import DeviceError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Provider:
    """An execution provider: ONNX Runtime's name for it, and where its memory is."""

    name: str  # edgert's; of OpenVINO with ":" and a unit behind it, where that is not the CPU
    full_name: str
    memory: str = "cpu"  # ONNX Runtime's name of the memory that its inputs and outputs are bound in
    proven: bool = False  # whether edgert's own tests run on it
    form: str = ""  # of its graphs, one of FORMS
    inputs: str = "uint8"  # what graphs of the form "qdq" round the inputs of products to

    @property
    def unit(self) -> str:
        """What OpenVINO calls its device_type."""
        return self.name.partition(":")[2] or "CPU"


# What stands behind a "+" in a device's name. static: all shapes are fixed, steps are padded to one token or the whole
# chunk. qdq: that, and products are of 8-bit weights with inputs and outputs rounded to ranges measured beforehand.
FORMS = ("", "static", "qdq")
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("cpu", "CPUExecutionProvider", proven=True),
        Provider("openvino", "OpenVINOExecutionProvider", proven=True),
        Provider("cuda", "CUDAExecutionProvider", "cuda"),
        Provider("tensorrt", "TensorrtExecutionProvider", "cuda", inputs="int8"),
        Provider("qnn", "QNNExecutionProvider", form="qdq", inputs="uint16"),
        Provider("coreml", "CoreMLExecutionProvider"),
        Provider("directml", "DmlExecutionProvider", "dml"),
        Provider("acl", "ACLExecutionProvider"),
        Provider("xnnpack", "XnnpackExecutionProvider"),
    )
}


UNITS = re.compile(r"(CPU|GPU|NPU)(\.\d+)?")  # of OpenVINO. AUTO and HETERO choose anew each time: no verdict holds
_REMOTE = ("AzureExecutionProvider",)  # ask a service on the network: no devices


def form_of(name: str) -> str:
    """The form of the graphs of "onnx:PROVIDER", with "+" and a form behind it or not; one of FORMS."""
    plain, plus, form = name.removeprefix("onnx:").partition("+")
    if plus:
        return form
    if plain.startswith("openvino:NPU"):
        return "static"  # it has no shapes that change
    return PROVIDERS[plain].form if plain in PROVIDERS else ""


def runtime() -> Any:
    """The package onnxruntime. DeviceError where it or `onnx` is not installed."""
    try:
        importlib.import_module("onnx")
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise DeviceError(
            f"devices of ONNX Runtime need the packages onnx and onnxruntime ({error}): pip install 'edgert[onnx]', or "
            "onnx and the onnxruntime of your board (onnxruntime-gpu, onnxruntime-openvino)"
        ) from error


def available() -> list[Provider]:
    """The providers that this installation of ONNX Runtime reports, those that edgert knows first; no remote ones."""
    reported = [name for name in runtime().get_available_providers() if name not in _REMOTE]
    known = [provider for provider in PROVIDERS.values() if provider.full_name in reported]
    if PROVIDERS["openvino"] in known:
        known += [_of_openvino(unit) for unit in _openvino_units() if unit != "CPU"]
    names = {provider.full_name for provider in known}
    others = (name for name in reported if name not in names)
    return known + [Provider(name.removesuffix("ExecutionProvider").lower(), name) for name in others]


def _of_openvino(unit: str) -> Provider:
    name = f"openvino:{unit}"
    return replace(PROVIDERS["openvino"], name=name, proven=False, form=form_of(name))


def _openvino_units() -> list[str]:
    """What OpenVINO finds on this machine; some builds of ONNX Runtime do not tell."""
    with contextlib.suppress(ImportError, AttributeError, RuntimeError):
        found = importlib.import_module("onnxruntime.capi._pybind_state").get_available_openvino_device_ids()
        return [str(unit) for unit in found if UNITS.fullmatch(str(unit))]
    return []


def provider_of(name: str) -> Provider:
    """A provider by edgert's name for it, "+" and a form behind it or not.

    DeviceError where this installation has none of that name.
    """
    found = available()
    plain, plus, form = name.partition("+")
    first, _, unit = plain.partition(":")
    units = _openvino_units() if unit and PROVIDERS.get(first) in found else [unit]
    if unit not in units and (not units or unit in {known.partition(".")[0] for known in units}):
        found.append(_of_openvino(unit))  # the first of its kind; or nobody knows which there are
    for provider in found:
        if provider.name == plain:
            return replace(provider, form=form) if plus else provider
    there = ", ".join(f"onnx:{provider.name}" for provider in found)
    raise DeviceError(
        f"device onnx:{name} is not there: onnxruntime {runtime().__version__} as installed has {there}; "
        "use one of these, or install the onnxruntime that has it"
    )


@dataclass(frozen=True)
class Settings:
    """How sessions are made. exact: no rounding of activations, whatever the provider would do by itself."""

    provider: Provider
    threads: int = 1
    exact: bool = False
    graphs: set[bytes] = field(default_factory=set, compare=False)  # all that were made; weights are not in them

    @property
    def name(self) -> str:
        """The device's name."""
        own, form = form_of(self.provider.name), self.provider.form
        return f"onnx:{self.provider.name}" + (f"+{form}" if form != own else "")

    @property
    def static(self) -> bool:
        """Whether all shapes in graphs are fixed."""
        return self.provider.form != ""

    @property
    def quantised(self) -> bool:
        """Whether graphs have QuantizeLinear and DequantizeLinear around their products."""
        return self.provider.form == "qdq"

    def provider_options(self) -> dict[str, str]:
        """What the provider is told: OpenVINO may compute in bf16, CUDA in TF32, and OpenVINO rounds activations to
        8 bits, all unasked. Whether it heeds that is measured, see onnx_placement.product_error."""
        if self.provider.full_name == PROVIDERS["openvino"].full_name:
            unit = self.provider.unit
            hints = {} if unit.startswith("NPU") else {"INFERENCE_PRECISION_HINT": "f32"}  # an NPU has fp16 alone
            if self.exact and hints:
                hints["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
            told = {"device_type": unit, "load_config": json.dumps({unit: hints})}
            return told | ({"num_of_threads": str(self.threads)} if unit == "CPU" else {})
        return {"use_tf32": "0"} if self.provider.name == "cuda" else {}


def settings_for(name: str, threads: int | None, activations: str) -> Settings:
    """How sessions on a provider are made; threads: None for those that the CPU device would take."""
    from edgert.devices.cores import choose_threads

    return Settings(provider_of(name), threads or choose_threads().n_threads, exact=activations == "f32")


@dataclass(frozen=True)
class Model:
    """A graph, serialised, and its weights, which are handed over beside it: no copy is made of them on the way."""

    graph: bytes
    weights: Mapping[str, Array] = field(default_factory=dict)


def session(model: Model, settings: Settings, *, profile: Path | None = None) -> Any:
    """An InferenceSession; profile: how the names of files begin that say what ran where.

    DeviceError where the provider cannot be started or the graph not be read. Of what the provider does not take ONNX
    Runtime gives the CPU its part: see onnx_placement.
    """
    ort = runtime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what is wrong is said by the exceptions
    options.intra_op_num_threads, options.inter_op_num_threads = settings.threads, 1
    options.enable_mem_pattern = False  # shapes change with every token
    options.enable_cpu_mem_arena = False  # there is a session for each layer and expert: each would keep its largest
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores are others' too
    provider = settings.provider
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if model.weights:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in model.weights.values()]
        options.add_external_initializers(list(model.weights), values)
    try:
        made = ort.InferenceSession(
            model.graph, options, providers=[(provider.full_name, settings.provider_options())], enable_fallback=False
        )
    except Exception as error:  # the classes are pybind's, without a common base
        reason = " ".join(str(error).split())
        raise DeviceError(
            f"onnx:{provider.name} does not take a graph of this model ({reason[-300:]}); use another --device"
        ) from error
    if made.get_providers()[0] != provider.full_name:  # what it could not load is left out without a word
        raise DeviceError(
            f"onnx:{provider.name} could not be started, {made.get_providers()[0]} took its place; "
            "install what the provider needs, or use another --device"
        )
    settings.graphs.add(model.graph)
    return made


class Buffer:
    """Memory on a device that graphs read and write, whole or in part; allocated once.

    On the CPU it is an array; elsewhere reading copies it, and what the host makes is bound from the host's memory.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, memory: str = "cpu") -> None:
        """Zeros in ONNX Runtime's memory of that name."""
        self._take(np.zeros(shape, dtype), memory)

    @classmethod
    def of(cls, array: Array, memory: str = "cpu") -> Buffer:
        """With the content of an array."""
        made = cls.__new__(cls)
        made._take(np.ascontiguousarray(array), memory)
        return made

    def _take(self, array: Array, memory: str) -> None:
        self.shape, self.dtype, self.memory, self.n_bytes = array.shape, array.dtype, memory, array.nbytes
        self._row_bytes = array.nbytes // max(array.shape[0], 1)
        self._array = array if memory == "cpu" else None
        self._value = None if memory == "cpu" else runtime().OrtValue.ortvalue_from_numpy(array, memory, 0)
        self.address = int(array.ctypes.data if self._value is None else self._value.data_ptr())

    def rows(self, first: int, count: int) -> View:
        """Some rows, along the first axis."""
        assert 0 <= first and 0 < count and first + count <= self.shape[0], (first, count, self.shape)
        return View(self, self.address + first * self._row_bytes, (count, *self.shape[1:]))

    def whole(self) -> View:
        """All of it."""
        return View(self, self.address, self.shape)

    def shaped(self, *shape: int) -> View:
        """The beginning, in another shape."""
        assert math.prod(shape) <= math.prod(self.shape), (shape, self.shape)
        return View(self, self.address, shape)

    def host(self) -> Array:
        """The content: the memory itself, or a copy."""
        if self._array is not None:
            return self._array
        assert self._value is not None
        copied: Array = self._value.numpy()
        return copied


@dataclass(frozen=True)
class View:
    """A part of a buffer, as inputs and outputs are bound."""

    buffer: Buffer
    address: int
    shape: tuple[int, ...]

    def rows(self, first: int, count: int) -> View:
        """Some of its rows."""
        assert 0 <= first and 0 < count and first + count <= self.shape[0], (first, count, self.shape)
        row = math.prod(self.shape[1:]) * self.buffer.dtype.itemsize
        return View(self.buffer, self.address + first * row, (count, *self.shape[1:]))

    def read(self) -> Array:
        """Its content on the host; of memory on the CPU that itself, to be written too."""
        start = (self.address - self.buffer.address) // self.buffer.dtype.itemsize
        whole = self.buffer.host().reshape(-1)
        return whole[start : start + math.prod(self.shape)].reshape(self.shape)


class Call:
    """A session with its inputs and outputs bound to views; what is bound stays so until it is bound anew."""

    def __init__(self, made: Any) -> None:
        self._session, self._binding = made, made.io_binding()
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}

    def __call__(self, inputs: Mapping[str, View], outputs: Mapping[str, View]) -> None:
        """Run, from and to these views."""
        for name, view in inputs.items():
            if self._bound.get(name) != (view.address, view.shape):
                memory, dtype = view.buffer.memory, view.buffer.dtype
                self._binding.bind_input(name, memory, 0, dtype, view.shape, view.address)
                self._bound[name] = view.address, view.shape
        for name, view in outputs.items():
            if self._bound.get(name) != (view.address, view.shape):
                memory, dtype = view.buffer.memory, view.buffer.dtype
                self._binding.bind_output(name, memory, 0, dtype, view.shape, view.address)
                self._bound[name] = view.address, view.shape
        self._session.run_with_iobinding(self._binding)
