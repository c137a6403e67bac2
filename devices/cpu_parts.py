"""The CPU device's two halves, each for use beside another device's other half, through the same compiled jobs.

CpuAttention runs layers up to their experts and takes the sum that comes back; CpuExperts runs experts on given rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgert.devices.base import APART, ExpertGroup, Routed, Table
from edgert.devices.cpu import CpuDevice
from edgert.devices.kv_cache import KvCache
from edgert.devices.layers import LAYER, STEP
from edgert.devices.split import on_host
from edgert.quant.formats import Format
from edgert.quant.functions import quantise_row
from edgert.quant.jit import inner
from edgert.quant.matmul import ROWS
from edgert.quant.records import address_of, at
from edgert.types import Floats, ModelConfig, Routes

_NOBODY = ExpertGroup(np.zeros(0, np.int64))


class _HotOnly(CpuDevice):
    """The CPU device without routed experts."""

    def add(self, layer: int, total: Floats) -> None:
        """Add scaled rows (n_tokens, d_model), and the shared expert's, to the residual stream."""
        n, router = self._n_tokens, self.config.router
        if router is not None and self._layer_records["shared"][layer]:
            self._rows["outputs"].floats[: min(n, APART) * router.top_k] = 0  # of nobody; a shared one's may lie there
            self.experts(layer, _NOBODY)
            self.combine(layer)
        x = self._rows["x"].floats[:n, : self.config.d_model]
        x += np.float32(self.config.residual_scale) * total

    def state(self) -> Floats:
        """The residual stream, (n_tokens, d_model)."""
        return self._rows["x"].floats[: self._n_tokens, : self.config.d_model].copy()


class CpuAttention:
    """All but routed experts; see devices.split.AttentionPart."""

    name = "cpu"
    settings: Sequence[Any] = ()

    def __init__(self, config: ModelConfig, n_context: int, **options: Any) -> None:
        """Options as CpuDevice takes them."""
        self._device = device = _HotOnly(config, n_context, **options)
        self.chunk, self.kernels = device.chunk, device.kernels
        self.add_layer, self.set_head, self.new_cache = device.add_layer, device.set_head, device.new_cache
        self.begin, self.head, self.close = device.begin, device.head, device.close
        self.look_ahead, self.state = device.ahead, device.state
        n_expert = config.router.n_expert if config.router else 0
        routed = [config.has_experts(layer) for layer in range(config.n_layers)]
        self._stopped = 0  # the layer that the device stopped at
        self._tables = [device.new_table(n_expert) if has else None for has in routed]

    def attend(self, layer: int, cache: KvCache, start: int, n_ahead: int) -> Routes | None:
        """Run a layer up to its experts; those without any are run at once with the next that has some."""
        self._layer = layer
        if layer == 0 or layer > self._stopped:
            self._stopped = self._device.run_layers(
                self._tables, None, cache, start, layer, every_layer=True, n_ahead=n_ahead
            )
        return self._device.routed(layer).routes if self._tables[layer] is not None else None

    def inputs(self) -> Floats:
        """What the experts of that layer are given, (n_tokens, d_model)."""
        return self._device.inputs(self._layer)

    def take(self, total: Any) -> None:
        """Take the weighted sum of that layer's experts."""
        self._device.add(self._layer, on_host(total))


@inner
def quantise_inputs(thread: int, n_threads: int, barrier: int, step: int) -> None:
    """Make the int8 form of the rows in `normed`; of a single token each thread has a row of its own."""
    s = at(step, STEP)
    r = at(s.normed, ROWS)
    single = s.n_tokens == 1
    for i in range(0 if single else thread, s.n_tokens, 1 if single else n_threads):
        row = thread if single else i
        quantise_row(r.floats + 4 * row * r.stride, s.d_model, r.groups + row * r.group_stride)


class _ExpertsOnly(CpuDevice):
    """The CPU device as one layer of routed experts, whose residual stream begins at zero."""

    def __init__(self, config: ModelConfig, **options: Any) -> None:
        small = replace(
            config,
            n_layers=1,
            layers=(),
            latent=None,
            delta=None,
            n_taps=0,
            query_gate=False,
            n_heads=1,
            n_kv_heads=1,
            d_head=16,
            d_value=16,
            n_vocab=1,
            d_shared=0,
            residual_scale=1.0,
        )
        rope = replace(config.rope, n_rotated=16)
        super().__init__(replace(small, rope=rope), 1, **options)
        self._layers = [np.zeros(1, LAYER)]
        self._ready = False

    def start(self, table: Table, inputs: Floats, routed: Routed) -> None:
        """Begin a layer."""
        if not self._ready:  # the formats of all experts are known by now
            self._allocate()
            self._ready = True
        self.begin(np.zeros_like(inputs))
        n, step = len(inputs), self._step
        n_rows = self.pool.n_threads if n == 1 else n
        self._rows["normed"].floats[:n_rows, : inputs.shape[1]] = inputs
        if self._quantised:
            self._run(address_of(quantise_inputs, 4))
        routes, n_pairs = routed.routes, len(routed.tokens)
        for made in self._routings[1:] if n == 1 else self._routings[:1]:
            for name, values in (("ids", routes.ids), ("weights", routes.weights), ("order", routes.order)):
                made[name][:n_pairs] = values.reshape(-1)
            made["first"][: len(routed.first)] = routed.first
            made["tokens"][:n_pairs], made["slots"][:n_pairs] = routed.tokens, routed.slots
        self._layer_records["experts"], step["is_first"] = table.ctypes.data, 1

    def total(self) -> Floats:
        """What the experts made, weighted and added up."""
        self.combine(0)
        return self._rows["x"].floats[: self._n_tokens, : self.config.d_model]


class CpuExperts:
    """Routed experts; see devices.split.ExpertPart."""

    name, layer = "cpu", 0
    settings: Sequence[Any] = ()

    def __init__(self, config: ModelConfig, **options: Any) -> None:
        """Options as CpuDevice takes them."""
        self._device = device = _ExpertsOnly(config, **options)
        self.new_table, self.pack_expert, self.place_expert = device.new_table, device.pack_expert, device.place_expert
        self.total, self.close = device.total, device.close

    def kernels(
        self, formats: Iterable[Format], kv_type: str, activations: str, config: ModelConfig | None = None
    ) -> list[tuple[Any, int]]:
        """What has to be compiled."""
        return [*self._device.kernels(formats, kv_type, activations, config), (quantise_inputs, 4)]

    def start(self, table: Table, inputs: Any, routed: Routed) -> None:
        """Begin a layer: rows (n_tokens, d_model), and which experts they go to."""
        self._device.start(table, on_host(inputs), routed)

    def experts(self, group: ExpertGroup) -> None:
        """Run a group of experts."""
        self._device.experts(0, group)

    def hidden(self) -> Floats:
        """What gate and up made of each pair, (n_pairs, d_expert)."""
        return self._device.hidden(0)
