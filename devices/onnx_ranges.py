"""Ranges of the values in a model's graphs, measured on a text with the CPU's provider, a layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from edgert.devices.base import ExpertWeights, LayerWeights, Linear, Norm, rope_angles
from edgert.devices.onnx_graphs import attention_graph, expert_graph, head_graph
from edgert.devices.onnx_quantised import Ranges, Rounding
from edgert.devices.onnx_runtime import Model, Settings, session, settings_for
from edgert.types import Floats, ModelConfig


class Source(Protocol):
    """A model's weights, read as they are asked for."""

    def layer(self, index: int) -> LayerWeights: ...
    def expert(self, layer: int, index: int) -> ExpertWeights: ...
    def head(self) -> tuple[Norm, Linear]: ...
    def rope_divisors(self) -> Floats | None: ...


def measure(
    config: ModelConfig,
    source: Source,
    embeddings: Floats,
    threads: int | None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Ranges:
    """What values the graphs make of a text's embeddings (n_tokens, d_model). DeviceError without onnxruntime."""
    settings, x = settings_for("cpu", threads, "f32"), embeddings
    attention, experts = list[Floats](), list[Floats]()
    texts = _Text(config, len(x), source.rope_divisors())
    for layer in range(config.n_layers):
        progress(layer / config.n_layers)
        weights = source.layer(layer)
        graph = attention_graph(config, weights, None, np.float32, exact=True, rounding=_watched())
        made = _run(graph, settings, {"x": x, **texts.inputs(config.layer(layer).window)})
        attention.append(made["ranges"])
        x = made["new_x"]
        added = made.get("new_shared", np.float32(0))
        experts.append(np.zeros((0, 2), np.float32))
        if weights.router is not None:
            total, experts[-1] = _experts(config, source, layer, made, settings)
            added = added + total
        x = x + np.float32(config.residual_scale) * added
    norm, output = source.head()
    graph = head_graph(config, norm, output, None, exact=True, rounding=_watched())
    return Ranges(attention, experts, _run(graph, settings, {"x": x})["ranges"])


class _Text:
    """What attention is given beside the residual stream, for n tokens from the first on."""

    def __init__(self, config: ModelConfig, n: int, divisors: Floats | None) -> None:
        c, angles, positions = config, rope_angles(config, n, divisors), np.arange(n)
        self._apart = positions[:, None] - positions  # (n, n), above zero for what lies behind
        self._inputs = {
            "cosines": np.ascontiguousarray(angles[:, :, 0]),
            "sines": np.ascontiguousarray(angles[:, :, 1]),
            "positions": positions.astype(np.int64)[:, None],
            "keys": np.zeros((n, c.n_kv_heads, c.d_head), np.float32),
            "values": np.zeros((n, c.n_kv_heads, c.d_value), np.float32),
        }

    def inputs(self, window: int) -> dict[str, Any]:
        """By their names."""
        seen = (self._apart >= 0) & (self._apart < (window or len(self._apart)))
        return self._inputs | {"mask": np.where(seen, np.float32(0), np.float32(-1e30))}


def _experts(
    config: ModelConfig, source: Source, layer: int, made: dict[str, Any], settings: Settings
) -> tuple[Floats, Floats]:
    """The weighted sum (n_tokens, d_model) of a layer's experts, and the ranges of all that were chosen."""
    total, every = np.zeros_like(made["normed"]), list[Floats]()
    for expert in np.unique(made["ids"]).tolist():
        rows, turns = np.nonzero(made["ids"] == expert)
        graph = expert_graph(config, source.expert(layer, expert), exact=True, rounding=_watched())
        found = _run(graph, settings, {"normed": made["normed"], "tokens": rows.astype(np.int64)})
        total[rows] += made["weights"][rows, turns][:, None] * found["out"]
        every.append(found["ranges"])
    seen = np.stack(every)  # (n_chosen, n_places, 2)
    return total, np.stack((seen[:, :, 0].min(axis=0), seen[:, :, 1].max(axis=0)), axis=1)


def _watched() -> Rounding:
    return Rounding(None, "uint8")


def _run(graph: Model, settings: Settings, inputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs of a graph, by name."""
    made = session(graph, settings)
    names = [one.name for one in made.get_outputs()]
    return dict(zip(names, made.run(names, inputs), strict=True))
