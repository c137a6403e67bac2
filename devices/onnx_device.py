"""Devices of ONNX Runtime, whole or in part, made from the names that `--device` takes."""

from __future__ import annotations

from edgert.devices.onnx_attention import CACHED, OnnxAttention
from edgert.devices.onnx_experts import OnnxExperts
from edgert.devices.onnx_runtime import Settings, provider_of
from edgert.devices.split import SplitDevice
from edgert.errors import OptionError
from edgert.types import Floats, ModelConfig

CHUNK = 128  # most tokens of a step: the scores of all heads are kept at once


def onnx_device(
    config: ModelConfig,
    n_context: int,
    *,
    provider: str = "cpu",
    kv_type: str = "f16",
    threads: int | None = None,
    activations: str = "int8",
    rope_divisors: Floats | None = None,
    chunk: int = CHUNK,
) -> SplitDevice:
    """The whole model on one provider."""
    made = settings(provider, threads, activations)
    if kv_type not in CACHED:
        raise OptionError(f"kv_type={kv_type!r} is not there on onnx:{provider}; use {' or '.join(CACHED)}")
    chunk = min(chunk, CHUNK)
    attention = OnnxAttention(config, n_context, made, rope_divisors=rope_divisors, kv_type=kv_type, chunk=chunk)
    return SplitDevice(config, attention, OnnxExperts(config, made, chunk=chunk))


def settings(provider: str, threads: int | None, activations: str) -> Settings:
    """How sessions on a provider are made."""
    from edgert.devices.cores import choose_threads

    return Settings(provider_of(provider), threads or choose_threads().n_threads, exact=activations == "f32")
