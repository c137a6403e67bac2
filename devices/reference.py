"""The reference device: the same model in NumPy, slow and obvious, equal to the CPU device bit for bit.

It keeps weights unpacked and does the arithmetic of edgert.quant.reference in the order that the kernels follow. Tests
hold every device against it; with NUMBA_DISABLE_JIT=1 it is the device that answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from edgert.devices import reference_mixers as mixers
from edgert.devices.base import (
    CHUNK,
    READY,
    ConvolutionWeights,
    DeltaWeights,
    ExpertGroup,
    ExpertWeights,
    LatentWeights,
    LayerWeights,
    Linear,
    Norm,
    Routed,
    Table,
    rope_angles,
)
from edgert.devices.reference_attention import ReferenceCache
from edgert.devices.routing import choose_reference, pairs_reference
from edgert.errors import OptionError
from edgert.quant import reference
from edgert.quant.formats import GROUP, Format, MatrixSource, PackedPart
from edgert.quant.reference import fma
from edgert.quant.unpacking import PackedMatrix
from edgert.types import Floats, Ids, ModelConfig


class ReferenceDevice:
    """Device in NumPy; see devices.base.Device."""

    name = "reference"

    def __init__(
        self,
        config: ModelConfig,
        n_context: int,
        *,
        threads: int | None = None,
        activations: str = "int8",
        rope_divisors: Floats | None = None,
        chunk: int = CHUNK,
    ) -> None:
        if activations not in ("int8", "f32"):
            raise OptionError(f"activations={activations!r} is not known; use int8 or f32")
        self.config, self.n_context, self.chunk = config, n_context, chunk
        self._int8 = activations == "int8"
        self._angles = rope_angles(config, n_context, rope_divisors)
        self._layers: list[LayerWeights] = []
        self._outputs: Floats | None = None  # (n_tokens * top_k, d_model) of the layer in hand, once an expert ran

    @staticmethod
    def kernels(
        formats: Iterable[Format], kv_type: str, activations: str, config: ModelConfig | None = None
    ) -> list[tuple[Any, int]]:
        """Nothing is compiled."""
        return []

    def add_layer(self, weights: LayerWeights) -> None:
        """Take the hot weights of the next layer."""
        shared, gate = weights.shared, weights.shared_gate
        mixer = {one.name: _whole(getattr(weights.mixer, one.name)) for one in fields(weights.mixer)}
        self._layers.append(
            replace(
                weights,
                mixer=type(weights.mixer)(**mixer),
                router=_whole(weights.router),
                shared=shared and self.pack_expert(shared),
                shared_gate=gate and gate.whole(),
            )
        )

    def set_head(self, norm: Norm, output: Linear) -> None:
        """Take the final norm and the output head."""
        self._norm, self._head = norm, _whole(output)

    def new_table(self, n_expert: int) -> Table:
        """One ExpertWeights per expert."""
        return np.empty(n_expert, object)

    def pack_expert(self, weights: ExpertWeights) -> ExpertWeights:
        """The expert with its matrices read, not packed."""
        return ExpertWeights(weights.gate.whole(), weights.up.whole(), weights.down.whole())

    def new_cache(self, n_context: int, kv_type: str) -> ReferenceCache:
        """A key/value cache for `n_context` positions."""
        return ReferenceCache(self.config, n_context, kv_type)

    def place_expert(
        self, table: Table, expert: int, parts: tuple[PackedPart, ...], record: npt.NDArray[np.uint8]
    ) -> None:
        """Make an expert of a table the packed record in a buffer, unpacked when it is used."""
        table[expert] = ExpertWeights(*(PackedMatrix(part, record) for part in parts))

    # ---- the step ----------------------------------------------------------------------------------------------------
    def begin(self, embeddings: Floats) -> None:
        """Make `embeddings` (n_tokens, d_model) the residual stream."""
        assert 0 < len(embeddings) <= self.chunk
        self._x = embeddings.copy()
        self._chosen: dict[int, tuple[Ids, Floats]] = {}
        self.n_used = 0

    def run_layers(
        self,
        tables: Sequence[Table | None],
        states: npt.NDArray[np.uint8] | None,
        cache: ReferenceCache,
        start: int,
        first: int,
        *,
        every_layer: bool = False,
        n_ahead: int = 0,
    ) -> int:
        """Layers from `first` on, up to one that lacks an expert; see devices.base.Device."""
        for layer in range(first, self.config.n_layers):
            scores, self._outputs = self._mix(layer, cache, start), None
            if scores is None:
                self.combine(layer)
                continue
            routed = self.routed(layer, scores)
            table, used = tables[layer], np.flatnonzero(routed.first[1:] > routed.first[:-1])
            assert table is not None
            self.n_used += len(used)
            self._ahead: list[Floats] = []
            while len(self._ahead) < n_ahead and (guess := self._scores(layer + 1 + len(self._ahead))) is not None:
                self._ahead.append(guess)
            self._table = table
            if every_layer or (states is not None and (states[used + layer * len(table)] != READY).any()):
                return layer
            self.experts(layer, ExpertGroup(used))
            self.combine(layer)
        return self.config.n_layers

    def routed(self, layer: int, scores: Floats | None = None) -> Routed:
        """The routes of the layer that run_layers stopped at, or of new scores (n_tokens, n_expert)."""
        if scores is not None:
            assert self.config.router is not None
            routes = choose_reference(scores, self.config.router, self._layers[layer].choice_bias)
            self._chosen[layer] = routes.ids, routes.weights
            self._routed = Routed(routes, *pairs_reference(routes.ids, scores.shape[1]))
        return self._routed

    def chosen(self, layer: int) -> tuple[Ids, Floats]:
        """Ids and weights of a layer that the step has run through."""
        assert self.config.router is not None
        shape = len(self._x), self.config.router.top_k
        none = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        return self._chosen.get(layer, none)

    def ahead(self, layer: int) -> list[Floats]:
        """What the routers of the next layers make of this layer's state."""
        return self._ahead

    def _scores(self, layer: int) -> Floats | None:
        """What a layer's router makes of the last token's present state, (n_expert,)."""
        weights = self._layers[layer] if layer < self.config.n_layers else None
        if weights is None or weights.router is None:
            return None
        return self._linear(weights.router, self._norm_of(self._x[-1:], weights.feed_forward_norm))[0]

    def _mix(self, layer: int, cache: ReferenceCache, start: int) -> Floats | None:
        """The half of a layer that sees other tokens: router scores (n_tokens, n_expert), or None if it is dense."""
        weights, c, kind = self._layers[layer], self.config, self.config.layer(layer)
        normed = self._norm_of(self._x, weights.mixer_norm)  # (n_tokens, d_model)
        angles, mixer, linear = self._angles[start : start + len(normed)], weights.mixer, self._linear
        if isinstance(mixer, ConvolutionWeights):
            mixed = mixers.convolve_short(mixer, normed, linear, cache, layer)
        elif isinstance(mixer, DeltaWeights):
            mixed = mixers.run_delta(c, mixer, normed, linear, cache, layer)
        elif isinstance(mixer, LatentWeights):
            mixed = mixers.attend_latent(c, kind, mixer, normed, linear, angles, cache, layer, start)
        else:
            mixed = mixers.attend(c, kind, mixer, normed, linear, angles, cache, layer, start)
        self._x = fma(linear(mixer.output, mixed), np.float32(c.residual_scale), self._x)
        self._normed = self._norm_of(self._x, weights.feed_forward_norm)
        return None if weights.router is None else linear(weights.router, self._normed)

    def _norm_of(self, x: Floats, norm: Norm) -> Floats:
        return reference.rms_norm(x, norm.weight, self.config.eps, norm.bias)

    def inputs(self, layer: int) -> Floats:
        """What the experts of the layer that was stopped at are given, (n_tokens, d_model)."""
        return self._normed

    def hidden(self, layer: int) -> Floats:
        """What down takes of each pair, (n_pairs, d_expert): with int8 activations, what the integers stand for."""
        hidden = np.concatenate([self._hidden[expert] for expert in sorted(self._hidden)])
        if not self._int8:
            return hidden
        width = hidden.shape[1]
        padded = np.pad(hidden, ((0, 0), (0, -width % GROUP)))
        integers, scales = reference.quantise_activations(padded)
        return (integers.astype(np.float32) * np.repeat(scales, GROUP, axis=1))[:, :width]

    def experts(self, layer: int, group: ExpertGroup) -> None:
        """Run a group of experts; what its first phase makes is kept."""
        assert self.config.router is not None
        biases, routes = self._layers[layer].expert_biases, self._routed.routes
        if self._outputs is None:
            self._outputs = np.zeros((len(self._x) * self.config.router.top_k, self.config.d_model), np.float32)
            self._hidden: dict[int, Floats] = {}
        for i in group.ids.tolist():
            expert, pairs = self._table[i], slice(self._routed.first[i], self._routed.first[i + 1])
            added = (None, None, None) if biases is None else (biases.gate[i], biases.up[i], biases.down[i])
            if group.phases & 1:
                factors = None
                if self.config.router.on_inputs:
                    factors = routes.weights.reshape(-1, 1)[self._routed.slots[pairs]]
                rows = self._normed[self._routed.tokens[pairs]]
                self._hidden[i] = self._gate_and_up(expert, rows, added[0], added[1], factors)
            if group.phases & 2:
                output = self._linear(Linear(expert.down, added[2]), self._hidden[i])
                self._outputs[self._routed.slots[pairs]] = output

    def combine(self, layer: int) -> None:
        """Add the weighted expert outputs, in ascending expert id, and the shared one to the residual stream."""
        total, weights = np.zeros_like(self._x), self._layers[layer]
        if self._outputs is not None:
            routes = self._routed.routes
            outputs = self._outputs.reshape(*routes.ids.shape, -1)  # (n_tokens, top_k, d_model)
            for k in range(routes.ids.shape[1]):
                slot = routes.order[:, k, None]
                weight = np.take_along_axis(routes.weights, slot, axis=1)
                if self.config.router and self.config.router.on_inputs:
                    weight = np.ones_like(weight)
                total = fma(weight, np.take_along_axis(outputs, slot[:, :, None], axis=1)[:, 0], total)
        if weights.shared is not None:
            gate = weights.shared_gate
            share = np.ones((1, 1), np.float32) if gate is None else reference.sigmoid(self._matmul(gate, self._normed))
            total = fma(share, self._expert(weights.shared, self._normed), total)
        self._x = fma(total, np.float32(self.config.residual_scale), self._x)

    def head(self, first_row: int = 0) -> Floats:
        """Logits (rows, n_vocab) of the chunk's tokens from `first_row` on."""
        return self._linear(self._head, self._norm_of(self._x[first_row:], self._norm)) * np.float32(
            self.config.logit_scale
        )

    def close(self) -> None:
        """Give back memory."""
        self._layers.clear()

    # ---- parts -------------------------------------------------------------------------------------------------------
    def _matmul(self, matrix: MatrixSource, x: Floats) -> Floats:
        return reference.matmul(matrix.whole(), x, int8_activations=self._int8)

    def _linear(self, linear: Linear, x: Floats) -> Floats:
        product = self._matmul(linear.matrix, x)
        return product if linear.bias is None else product + linear.bias

    def _expert(self, expert: ExpertWeights, x: Floats) -> Floats:
        return self._matmul(expert.down, self._gate_and_up(expert, x))  # (n_tokens, d_model)

    def _gate_and_up(
        self,
        expert: ExpertWeights,
        x: Floats,
        gate_bias: Floats | None = None,
        up_bias: Floats | None = None,
        factors: Floats | None = None,
    ) -> Floats:
        """(n_tokens, d_ff). factors (n_tokens, 1): of the inputs, and so of the products."""
        gate, up = self._linear(Linear(expert.gate, gate_bias), x), self._linear(Linear(expert.up, up_bias), x)
        if factors is not None:
            gate, up = gate * factors, up * factors
        return reference.activate(gate, up, self.config.activation)


@overload
def _whole(part: Linear) -> Linear: ...


@overload
def _whole(part: Any) -> Any: ...


def _whole(part: Any) -> Any:
    """A part of a layer's weights with its matrix read; what is no matrix as it is."""
    if isinstance(part, Linear):
        return Linear(part.matrix.whole(), part.bias)
    return part.whole() if hasattr(part, "whole") else part
