"""The Device seam: what the engine asks of the place where arithmetic runs.

A device keeps hot weights in its own layout, turns experts into rows of its own tables, and runs the two halves of a
layer. It knows nothing of files, of residency, or of which experts were chosen and why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgert.quant.formats import Format, MatrixSource, PackedPart
from edgert.types import Floats, Ids, ModelConfig, Routes

CHUNK = 512  # most tokens that one call takes, unless a device is made for fewer or more
APART = 16  # most tokens whose experts' outputs are kept apart, so that experts may come in any order
AHEAD = 2  # layers whose routers may look ahead
ABSENT, READING, READY = 0, 1, 2  # states of an expert: not in RAM, on its way there, in its table to be run
Table = npt.NDArray[Any]  # (n_expert,) or (n_expert, ...) of a device's own kind; indexed by expert ids


@dataclass(frozen=True)
class Linear:
    """y = matrix x + bias."""

    matrix: MatrixSource
    bias: Floats | None = None


@dataclass(frozen=True)
class Norm:
    """An RMS norm: x / sqrt(mean(x**2) + eps) * weight + bias."""

    weight: Floats
    bias: Floats | None = None


@dataclass(frozen=True)
class ExpertWeights:
    """One feed-forward network: down(silu(gate x) * (up x)). gate, up: (d_ff, d_model); down: (d_model, d_ff)."""

    gate: MatrixSource
    up: MatrixSource
    down: MatrixSource


@dataclass(frozen=True)
class ExpertBiases:
    """What a layer's experts add: gate, up (n_expert, d_ff), down (n_expert, d_model). They stay in RAM."""

    gate: Floats
    up: Floats
    down: Floats


@dataclass(frozen=True)
class AttentionWeights:
    """Attention. gate: what heads give is multiplied with its sigmoid. sinks (n_heads,): a score without a value."""

    query: Linear  # (n_heads d_head, d_model)
    key: Linear  # (n_kv_heads d_head, d_model)
    value: Linear  # (n_kv_heads d_value, d_model)
    output: Linear  # (d_model, n_heads d_value)
    query_norm: Floats | None = None
    key_norm: Floats | None = None
    gate: Linear | None = None  # (n_heads d_value, d_model)
    sinks: Floats | None = None


@dataclass(frozen=True)
class LatentWeights:
    """Latent attention, absorbed: see types.LatentConfig, whose sizes these are."""

    query: Linear  # (n_heads (d_plain + n_rotated), query_rank or d_model), of each head the plain part first
    latent: Linear  # (d_value + n_rotated, d_model)
    latent_norm: Floats  # (d_value,)
    key_up: MatrixSource  # (n_heads d_value, d_plain)
    value_up: MatrixSource  # (n_heads d_output, d_value)
    output: Linear  # (d_model, n_heads d_output)
    query_down: Linear | None = None  # (query_rank, d_model)
    query_norm: Floats | None = None  # (query_rank,)


@dataclass(frozen=True)
class ConvolutionWeights:
    """A short convolution. Of input's rows, thirds are b, c and y: output(c * convolution of b * y)."""

    input: Linear  # (3 d_model, d_model)
    taps: Floats  # (n_taps, d_model), the last that of the present token
    output: Linear  # (d_model, d_model)


@dataclass(frozen=True)
class DeltaWeights:
    """A gated delta net: see types.DeltaConfig, whose sizes these are."""

    input: Linear  # (d_channels, d_model): queries, keys, values
    gate: Linear  # (d_values, d_model)
    beta: Linear  # (n_value_heads, d_model)
    alpha: Linear  # (n_value_heads, d_model)
    taps: Floats  # (n_taps, d_channels), the last that of the present token
    decay: Floats  # (n_value_heads,), not above 0
    step_bias: Floats  # (n_value_heads,)
    norm: Floats  # (d_state,)
    output: Linear  # (d_model, d_values)


Mixer = AttentionWeights | LatentWeights | ConvolutionWeights | DeltaWeights


@dataclass(frozen=True)
class LayerWeights:
    """Hot weights of one layer."""

    mixer_norm: Norm  # (d_model,)
    mixer: Mixer
    feed_forward_norm: Norm  # (d_model,)
    router: Linear | None = None  # (n_expert, d_model)
    choice_bias: Floats | None = None  # (n_expert,), added to the scores for the choice alone
    shared: ExpertWeights | None = None  # the shared expert, or a dense layer's network
    shared_gate: MatrixSource | None = None  # (1, d_model)
    expert_biases: ExpertBiases | None = None


@dataclass(frozen=True)
class Routed:
    """The routes of one layer, and its (token, expert) pairs, expert by expert.

    Pairs first[e] to first[e + 1] belong to expert e (first: n_expert + 1); pair p takes token tokens[p] and leaves its
    output in row slots[p] = token * top_k + k. Valid until the device goes on.
    """

    routes: Routes
    first: Ids
    tokens: Ids
    slots: Ids


@dataclass(frozen=True)
class ExpertGroup:
    """Some experts of a layer, by their ids (n,). phases: 1 runs gate and up, 2 down on what they left, 3 both."""

    ids: Ids
    phases: int = 3


class Cache(Protocol):
    """What is kept of one sequence, for all layers: keys and values, and states that pass from token to token."""

    n_context: int
    n_bytes: int

    @property
    def has_states(self) -> bool:
        """Whether there are any of the latter: only where a step ends can they be kept."""

    @property
    def forgets(self) -> bool:
        """Whether there are positions that cannot be come back to."""

    def begin(self, start: int, n_tokens: int) -> None:
        """A step begins at position `start`: 0, where the last one ended, or what `rewind` returned."""

    def end(self, position: int) -> None:
        """The step is done; the next one begins at `position`."""

    def keep(self, spare: int | None = None, position: int | None = None) -> None:
        """Make this a position that `rewind` can come back to, in the place of an older one other than `spare`.

        position: one of the last step instead, where there are no states.
        """

    def rewind(self, n: int) -> int:
        """Go back to the position n, or one before it that can be come back to; which one."""


class Device(Protocol):
    """Where arithmetic runs. Shapes: x float32 (n_tokens, d_model), n_tokens <= chunk. One caller at a time.

    A step: begin, then for each layer that `run_layers` stops at its experts, group by group, and combine; then head.
    """

    name: str
    chunk: int  # most tokens of a step
    n_used: int  # experts that the step has used so far, each counted once a layer

    def kernels(
        self, formats: Iterable[Format], kv_type: str, activations: str, config: ModelConfig | None = None
    ) -> list[tuple[Any, int]]:
        """What a model with matrices of these formats needs compiled: kernels, and how many integers each takes.

        config: of the model; without one, what most models need.
        """

    def add_layer(self, weights: LayerWeights) -> None:
        """Take the hot weights of the next layer."""

    def set_head(self, norm: Norm, output: Linear) -> None:
        """Take the final norm (d_model,) and the output head (n_vocab, d_model)."""

    def new_table(self, n_expert: int) -> Table:
        """An empty table of one layer's experts."""

    def pack_expert(self, weights: ExpertWeights) -> Any:
        """An expert as a row for a table; the device keeps what the row points to."""

    def new_cache(self, n_context: int, kv_type: str) -> Cache:
        """A key/value cache for `n_context` positions, of one of kv_cache.KV_TYPES."""

    def place_expert(
        self, table: Table, expert: int, parts: tuple[PackedPart, ...], record: npt.NDArray[np.uint8]
    ) -> None:
        """Make an expert of a table the gate, up and down whose record lies, or will lie, in a buffer."""

    def begin(self, embeddings: Floats) -> None:
        """Make `embeddings` the residual stream of a chunk."""

    def run_layers(
        self,
        tables: Sequence[Table | None],
        states: npt.NDArray[np.uint8] | None,
        cache: Any,
        start: int,
        first: int,
        *,
        every_layer: bool,
        n_ahead: int,
    ) -> int:
        """Run the tokens at positions start, start + 1, ... through layers from `first` on.

        Stops after the routing of a layer that needs an expert which is not READY in `states` (n_layers * n_expert,;
        None: all are), or with every_layer of any that has experts, and returns its number; the number of layers when
        all are done. n_ahead: how many of the next layers' routers score the last token's state, for `ahead`.
        """

    def routed(self, layer: int) -> Routed:
        """The routes of the layer that run_layers stopped at."""

    def chosen(self, layer: int) -> tuple[Ids, Floats]:
        """Ids and weights, (n_tokens, top_k), of any layer that this step has run through; valid until the next.

        Zeros where a layer has no experts.
        """

    def ahead(self, layer: int) -> list[Floats]:
        """Scores (n_expert,) that the routers of layers layer + 1, layer + 2, ... gave in `layer`; maybe none.

        They end before the first of these layers that has no experts.
        """

    def inputs(self, layer: int) -> Floats:
        """What the experts of the layer that was stopped at are given, (n_tokens, d_model); valid until combine."""

    def hidden(self, layer: int) -> Floats:
        """What their gate and up made, as down takes it: (n_pairs, d_expert), in the order of Routed's pairs.

        Of the experts of the stopped layer that were run, once all of them were; valid until the device goes on.
        """

    def experts(self, layer: int, group: ExpertGroup) -> None:
        """Run a group of experts of the layer that was stopped at; those of more than APART tokens in ascending id."""

    def combine(self, layer: int) -> None:
        """Add the weighted expert outputs, in ascending expert id, and the shared one to the residual stream."""

    def head(self, first_row: int = 0) -> Floats:
        """Logits (rows, n_vocab) of the chunk's tokens from `first_row` on; valid until the next call."""

    def close(self) -> None:
        """Give back threads and memory."""


def rope_angles(config: ModelConfig, n_context: int, divisors: Floats | None) -> Floats:
    """cos and sin, float32 (n_context, n_rotated / 2, 2), computed in float64.

    divisors: (n_rotated / 2,) of the `rope_freqs` tensor, or None. YaRN as Peng et al. 2023 (arXiv 2309.00071), with
    beta 32 and 1.
    """
    rope = config.rope
    pairs = np.arange(rope.n_rotated // 2, dtype=np.float64)
    frequency = rope.base ** (-2.0 * pairs / max(rope.n_rotated, 1))
    if divisors is not None:
        frequency = frequency / divisors.astype(np.float64)
    if rope.scaling == "linear":
        frequency = frequency / rope.factor
    elif rope.scaling == "yarn":

        def turning(rotations: float) -> float:
            wavelength = rope.original_context / (rotations * 2.0 * np.pi)
            return float(rope.n_rotated * np.log(wavelength) / (2.0 * np.log(rope.base)))

        low, high = max(0.0, np.floor(turning(32.0))), min(rope.n_rotated - 1.0, np.ceil(turning(1.0)))
        ramp = 1.0 - np.clip((pairs - low) / max(0.001, high - low), 0.0, 1.0)
        frequency = frequency / rope.factor * (1.0 - ramp) + frequency * ramp
    angles = np.arange(n_context, dtype=np.float64)[:, None] * frequency[None, :]
    return np.stack((np.cos(angles) * rope.magnitude, np.sin(angles) * rope.magnitude), axis=2).astype(np.float32)


def query_factors(config: ModelConfig, start: int, n: int) -> Floats:
    """What queries at positions start, start + 1, ... are multiplied with where they are tempered, float32 (n,)."""
    growth, span = config.temperature
    steps = np.arange(start + 1, start + n + 1, dtype=np.float64) // span
    return (1.0 + growth * np.log(steps + 1.0)).astype(np.float32)
