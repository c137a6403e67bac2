"""From the text of `--device` to a device: one name for the whole model, or a name for each of its two parts.

auto, cpu, reference, onnx:PROVIDER, a provider's bare name, or attention=NAME,experts=NAME; with a ! behind, it is used
though verification has found it wrong. A device's code is imported when it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from edgert.devices.base import CHUNK, Device
from edgert.devices.onnx_runtime import PROVIDERS, settings_for
from edgert.devices.split import AttentionPart, ExpertPart, SplitDevice
from edgert.errors import OptionError
from edgert.quant import jit
from edgert.types import Floats, ModelConfig

_PARTS = ("attention", "experts")


@dataclass(frozen=True)
class Selection:
    """Names of the devices of both parts: "cpu", "reference" or "onnx:PROVIDER"."""

    attention: str
    experts: str
    forced: bool = False  # use it though verification has found it wrong

    @property
    def name(self) -> str:
        """What `--device` takes for it."""
        same = self.attention == self.experts
        return self.attention if same else f"attention={self.attention},experts={self.experts}"

    @property
    def onnx(self) -> bool:
        """Whether a part is ONNX Runtime's."""
        return "onnx:" in self.attention + self.experts

    @property
    def compiled(self) -> bool:
        """Whether a part is the CPU device's."""
        return "cpu" in (self.attention, self.experts)

    def make(
        self,
        config: ModelConfig,
        n_context: int,
        *,
        kv_type: str = "f16",
        threads: int | None = None,
        activations: str = "int8",
        rope_divisors: Floats | None = None,
        chunk: int = CHUNK,
    ) -> Device:
        """The device, empty. DeviceError: a provider that is not there; OptionError: what it does not do."""
        options: dict[str, Any] = {"threads": threads, "activations": activations, "chunk": chunk}
        if self.attention == self.experts and not self.onnx:
            return cast(Device, _whole(self.attention)(config, n_context, rope_divisors=rope_divisors, **options))
        angles = {"rope_divisors": rope_divisors}
        return SplitDevice(
            config,
            _attention(self.attention, config, n_context, kv_type, angles | options),
            _experts(self.experts, config, options),
        )


def _attention(
    name: str, config: ModelConfig, n_context: int, kv_type: str, options: Mapping[str, Any]
) -> AttentionPart:
    if name == "cpu":
        from edgert.devices.cpu_parts import CpuAttention

        return CpuAttention(config, n_context, **options)
    from edgert.devices.onnx_attention import OnnxAttention

    settings = settings_for(name.removeprefix("onnx:"), options["threads"], options["activations"])
    divisors, chunk = options["rope_divisors"], options["chunk"]
    return OnnxAttention(config, n_context, settings, rope_divisors=divisors, kv_type=kv_type, chunk=chunk)


def _experts(name: str, config: ModelConfig, options: Mapping[str, Any]) -> ExpertPart:
    if name == "cpu":
        from edgert.devices.cpu_parts import CpuExperts

        return CpuExperts(config, **options)
    from edgert.devices.onnx_experts import OnnxExperts

    settings = settings_for(name.removeprefix("onnx:"), options["threads"], options["activations"])
    return OnnxExperts(config, settings, chunk=options["chunk"])


def parse(text: str) -> Selection:
    """What `--device` says. OptionError for a name that is none, or a part named twice or not at all."""
    if text.endswith("!"):
        return replace(parse(text[:-1]), forced=True)
    if "=" not in text:
        name = _name(text, text)
        return Selection(name, name)
    pairs = [part.partition("=")[::2] for part in text.replace(" ", "").split(",")]
    named = dict(pairs)
    if len(named) < len(pairs) or set(named) != set(_PARTS):
        raise OptionError(f"device={text!r}: name both parts once, as in attention=onnx:cuda,experts=cpu")
    found = Selection(_name(named["attention"], text), _name(named["experts"], text))
    if "reference" in (found.attention, found.experts) and found.attention != found.experts:
        raise OptionError(f"device={text!r}: the reference device has no parts; use it for all, or cpu and onnx:NAME")
    return found


def _name(text: str, whole: str) -> str:
    """One device by its full name."""
    name = ("cpu" if jit.JIT_ENABLED else "reference") if text == "auto" else text
    if name in PROVIDERS and name != "cpu":
        name = f"onnx:{name}"
    if name == "reference" or (name == "cpu" and jit.JIT_ENABLED) or (name.startswith("onnx:") and name != "onnx:"):
        return name
    others = ", ".join(f"onnx:{provider}" for provider in PROVIDERS)
    raise OptionError(
        f"device={whole!r} is not known here; use auto, cpu (with numba's JIT enabled), reference, {others}, or "
        "attention=NAME,experts=NAME"
    )


def _whole(name: str) -> Any:
    """The class of a device of edgert's own."""
    if name == "cpu":
        from edgert.devices.cpu import CpuDevice

        return CpuDevice
    from edgert.devices.reference import ReferenceDevice

    return ReferenceDevice
