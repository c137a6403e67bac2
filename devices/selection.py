"""From the text of `--device` to a device: one name for the whole model, or a name for each of its two parts.

auto, cpu, reference, onnx:PROVIDER, a provider's bare name, or attention=NAME,experts=NAME; OpenVINO's name may have a
unit behind it, as in openvino:GPU.1, and each +static or +qdq, see onnx_runtime.FORMS. With a ! at the end the device
is used though verification has found it wrong. A device's code is imported when it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from edgert.devices.base import CHUNK, Device
from edgert.devices.onnx_quantised import Ranges
from edgert.devices.onnx_runtime import FORMS, PROVIDERS, UNITS, Settings, form_of, settings_for
from edgert.devices.split import AttentionPart, ExpertPart, SplitDevice
from edgert.errors import OptionError
from edgert.quant import jit
from edgert.types import Floats, LayerConfig, ModelConfig

_PARTS = ("attention", "experts")
UNIFIED = Path("/etc/nv_tegra_release")  # a Jetson's: what its GPU takes is the machine's memory


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

    def on_card(self, part: str) -> bool:
        """Whether "attention" or "experts" is computed in a graphics card's own memory, apart from the machine's."""
        plain = getattr(self, part).removeprefix("onnx:").partition("+")[0]
        return plain in PROVIDERS and PROVIDERS[plain].memory != "cpu" and not UNIFIED.exists()

    @property
    def quantised(self) -> bool:
        """Whether a part rounds values to ranges that are to be measured first."""
        return any(form_of(name) == "qdq" for name in (self.attention, self.experts) if name.startswith("onnx:"))

    @property
    def compiled(self) -> bool:
        """Whether a part is the CPU device's."""
        return "cpu" in (self.attention, self.experts)

    def check(self, activations: str) -> None:
        """OptionError for what contradicts the device."""
        if self.quantised and activations == "f32":
            raise OptionError(f"device={self.name!r} rounds activations to integers; use it with --activations int8")

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
        ranges: Ranges | None = None,
        is_hot: npt.NDArray[np.bool_] | None = None,
    ) -> Device:
        """The device, empty. ranges: for what is `quantised`. is_hot: experts (n_layers, n_expert) that the experts'
        device has, where it has not all; the CPU has the others.

        DeviceError: a provider that is not there; OptionError: what it does not do.
        """
        for name, lacking in ((self.attention, beyond_attention(config)), (self.experts, beyond_experts(config))):
            if name.startswith("onnx:") and lacking:
                raise OptionError(
                    f"device={name!r} does not have {lacking}, which {config.architecture} needs; use cpu"
                )
        options: dict[str, Any] = {"threads": threads, "activations": activations, "chunk": chunk}
        if self.attention == self.experts and not self.onnx:
            return cast(Device, _whole(self.attention)(config, n_context, rope_divisors=rope_divisors, **options))
        angles = {"rope_divisors": rope_divisors}
        return SplitDevice(
            config,
            _attention(self.attention, config, n_context, kv_type, angles | options, ranges),
            _experts(self.experts, config, options, ranges, is_hot),
        )


def beyond_attention(c: ModelConfig) -> str:
    """What a model has, all but its routed experts, that graphs of ONNX Runtime do not; nothing if they have it all."""
    r, plain = c.router, LayerConfig()
    found = {
        "latent attention": c.latent is not None,
        "gated delta nets": c.delta is not None,
        "short convolutions": c.n_taps > 0,
        "gates behind attention": c.query_gate,
        "attention sinks": c.sinks,
        "norms with biases": c.norm_bias,
        "norms behind or without a rotation": c.norm_late or c.qk_norm == "unit",
        "layers that differ": any(replace(layer, window=0) != plain for layer in c.layers),
        "this kind of routing": r is not None and (r.late or r.biased or r.on_inputs or r.n_groups > 1),
    }
    return next((words for words, has in found.items() if has), "")


def beyond_experts(c: ModelConfig) -> str:
    """The same of routed experts."""
    if c.expert_bias:
        return "experts with biases"
    if c.router is not None and len(c.expert_layers) < c.n_layers:
        return "layers without experts"
    return "weights on experts' inputs" if c.router is not None and c.router.on_inputs else ""


def _attention(
    name: str,
    config: ModelConfig,
    n_context: int,
    kv_type: str,
    options: Mapping[str, Any],
    ranges: Ranges | None,
) -> AttentionPart:
    if name == "cpu":
        from edgert.devices.cpu_parts import CpuAttention

        return CpuAttention(config, n_context, **options)
    from edgert.devices.onnx_attention import OnnxAttention

    settings, own = _settings(name, options, ranges)
    divisors, chunk = options["rope_divisors"], options["chunk"]
    return OnnxAttention(config, n_context, settings, rope_divisors=divisors, kv_type=kv_type, chunk=chunk, ranges=own)


def _experts(
    name: str,
    config: ModelConfig,
    options: Mapping[str, Any],
    ranges: Ranges | None,
    is_hot: npt.NDArray[np.bool_] | None = None,
) -> ExpertPart:
    if name == "cpu":
        from edgert.devices.cpu_parts import CpuExperts

        return CpuExperts(config, **options)
    from edgert.devices.onnx_experts import OnnxExperts

    settings, own = _settings(name, options, ranges)
    found = OnnxExperts(config, settings, chunk=options["chunk"], ranges=own)
    if is_hot is None or is_hot.all():
        return found
    from edgert.devices.cpu_parts import CpuExperts
    from edgert.devices.onnx_hot import HotExperts

    return HotExperts(config, found, CpuExperts(config, **options), is_hot)


def _settings(name: str, options: Mapping[str, Any], ranges: Ranges | None) -> tuple[Settings, Ranges | None]:
    """How sessions are made, and the ranges that their graphs round to, if they do."""
    settings = settings_for(name.removeprefix("onnx:"), options["threads"], options["activations"])
    assert ranges is not None or not settings.quantised, "the ranges were not measured"
    return settings, ranges if settings.quantised else None


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
    plain, plus, form = name.partition("+")
    provider, colon, unit = plain.removeprefix("onnx:").partition(":")
    if colon:
        provider = _with_unit(provider, unit.upper(), whole)
    if provider.partition(":")[0] in PROVIDERS and name != "cpu":
        plain = f"onnx:{provider}"
        name = plain + plus + form
    if form not in FORMS:
        forms = ", ".join(f"+{known}" for known in FORMS if known)
        raise OptionError(f"device={whole!r}: +{form} is no form of graphs; use {forms}, or leave it away")
    if name == "reference" or (name == "cpu" and jit.JIT_ENABLED) or (plain.startswith("onnx:") and plain != "onnx:"):
        return name
    others = ", ".join(f"onnx:{provider}" for provider in PROVIDERS)
    raise OptionError(
        f"device={whole!r} is not known here; use auto, cpu (with numba's JIT enabled), reference, {others}, or "
        "attention=NAME,experts=NAME"
    )


def _with_unit(provider: str, unit: str, whole: str) -> str:
    """A provider's name with its unit, without one that goes without saying."""
    if provider != "openvino" or not UNITS.fullmatch(unit):
        raise OptionError(
            f"device={whole!r}: {provider}:{unit} is no provider with a unit; use openvino:CPU, openvino:GPU, "
            "openvino:GPU.1 or openvino:NPU"
        )
    return provider if unit == "CPU" else f"{provider}:{unit}"


def _whole(name: str) -> Any:
    """The class of a device of edgert's own."""
    if name == "cpu":
        from edgert.devices.cpu import CpuDevice

        return CpuDevice
    from edgert.devices.reference import ReferenceDevice

    return ReferenceDevice
