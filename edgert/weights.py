"""From the tensors of a model's file or bundle to what a device takes: names, shapes, formats, layer by layer.

Every tensor of the file must be asked for by somebody: one that is left over could change the answers and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType as Type

from edgert.architectures import optional_tensors
from edgert.devices.base import (
    AttentionWeights,
    ConvolutionWeights,
    DeltaWeights,
    Device,
    ExpertBiases,
    ExpertWeights,
    LatentWeights,
    LayerWeights,
    Linear,
    Mixer,
    Norm,
    Table,
)
from edgert.errors import ModelFileError, UnsupportedError
from edgert.quant import ggml
from edgert.quant.formats import Format, MatrixSource
from edgert.storage.bundle import Bundle
from edgert.storage.tensor_file import TensorFile
from edgert.tensor_problems import Problems
from edgert.tensor_table import (
    DIVISORS,
    EMBEDDING,
    HEAD,
    LONG_DIVISORS,
    SHORT_DIVISORS,
    Shapes,
    layer_tensors,
    model_tensors,
    optional_layer_tensors,
    optional_model_tensors,
)
from edgert.types import Floats, ModelConfig
from edgert.weight_sources import BundleSource, FileSource, WeightSource

_FIRST = tuple(f"attn_{part}.{kind}" for part in "qkv" for kind in ("weight", "bias"))
Progress = Callable[[str, float], None]  # called with (stage, fraction from 0 to 1)


def silent(stage: str, fraction: float) -> None:
    """Progress that nobody looks at."""


class HotTensor(NamedTuple):
    """What is always resident under one name: a matrix, or a vector, which is read when it is asked for."""

    name: str
    shape: tuple[int, ...]
    matrix: MatrixSource | None
    vector: Callable[[], Floats] | None


class Weights:
    """The weights of one model. Shapes are checked against the configuration before anything is read."""

    def __init__(
        self,
        file: TensorFile | Bundle,
        config: ModelConfig,
        *,
        decode_to_f32: bool = False,
        source: WeightSource | None = None,
    ) -> None:
        """source: what to read of `file`, by default its own weights."""
        self.file, self.config = file, config
        if source is None:
            source = (
                BundleSource(file)
                if isinstance(file, Bundle)
                else FileSource(file, config, decode_to_f32=decode_to_f32)
            )
        self._source = source
        self.shapes = self._source.shapes  # of every tensor, hot and cold, by name
        self._path = file.path
        c = config
        if isinstance(file, Bundle) and c.router and file.record_bytes.shape != (c.n_layers, c.router.n_expert):
            found = "{} layers of {} experts".format(*file.record_bytes.shape)
            raise ModelFileError(
                f"{self._path}: its manifest has {found}, but the metadata ask for {c.n_layers} of "
                f"{c.router.n_expert}; remove the bundle and pack the model again"
            )
        if c.n_layers > len(self.shapes):  # before names are made of it
            raise ModelFileError(
                f"{self._path}: {c.architecture}.block_count is {c.n_layers}, but the file has only "
                f"{len(self.shapes)} tensors; the file is damaged or made wrongly"
            )
        self._wanted = {**model_tensors(c), **self._there(optional_model_tensors(c))}
        self._optional_tensors = optional_tensors(c.architecture)
        for layer in range(c.n_layers):
            self._wanted |= {f"blk.{layer}.{name}": shape for name, shape in self._layer_shapes(layer).items()}
        self._check()

    def _there(self, optional: Shapes, prefix: str = "") -> Shapes:
        """Those of some tensors that there are."""
        return {name: shape for name, shape in optional.items() if f"{prefix}{name}" in self.shapes}

    def _layer_shapes(self, layer: int) -> Shapes:
        """Names of a layer's tensors, without their prefix, and the shapes they must have."""
        shapes = layer_tensors(self.config, layer)
        optional = {name: shapes.pop(name) for name in self._optional_tensors & shapes.keys()}
        return shapes | self._there(optional | optional_layer_tensors(self.config, layer), f"blk.{layer}.")

    def _check(self) -> None:
        problems = Problems(self._path, self.config, self.file.metadata, self.shapes, self.file.tensors)
        problems.check_unused()
        for name, shape in self._wanted.items():
            found = self.shapes.get(name)
            if found is None:
                raise problems.missing(name)
            if found not in (shape, (1, *shape)):  # the latter: a vector that a bundle has as a matrix
                raise problems.misshapen(name, found, shape)
        for name in self.shapes:
            if isinstance(self._source, FileSource):
                self._check_type(name, self._source)
            if name not in self._wanted:
                raise problems.left_over(name)

    def _check_type(self, name: str, source: FileSource) -> None:
        kind = source.stored_type(name)
        if not ggml.is_decodable(kind):
            raise UnsupportedError(
                f"{self._path}: the tensor {source.stored_name(name)} is of type {kind.name}, which edgert cannot "
                "read; take another quantisation"
            )

    # ---- reading -----------------------------------------------------------------------------------------------------
    def sizes_of(self, name: str) -> Mapping[Format, int]:
        """Bytes that a tensor takes in RAM once packed, by format."""
        return self._source.sizes_of(name)

    def formats(self) -> list[Format]:
        """The formats of all matrices that are packed."""
        matrices = (name for name, shape in self.shapes.items() if len(shape) > 1 and not self.is_on_file(name))
        return list(dict.fromkeys(format for name in matrices for format in self.sizes_of(name)))

    def packings(self) -> set[tuple[Type, Format]]:
        """Types of a file's matrices, and the formats that they are packed to; none of a bundle."""
        source = self._source
        if not isinstance(source, FileSource):
            return set()
        matrices = [name for name, shape in self.shapes.items() if len(shape) > 1]
        return {(source.kind(name), format) for name in matrices for format in self.sizes_of(name)}

    def _optional(self, name: str) -> Floats | None:
        return self._source.vector(name) if name in self.shapes else None

    def _linear(self, name: str) -> Linear:
        """A matrix, and its bias where there is one."""
        return Linear(self._source.matrix(f"{name}.weight"), self._optional(f"{name}.bias"))

    def _linear_if_there(self, name: str) -> Linear | None:
        return self._linear(name) if f"{name}.weight" in self.shapes else None

    def _norm(self, name: str) -> Norm:
        return Norm(self._source.vector(f"{name}.weight"), self._optional(f"{name}.bias"))

    def _taps(self, name: str) -> Floats:
        """Taps of a convolution, (n_taps, n_channels)."""
        n_taps = self.config.delta.n_taps if self.config.delta else self.config.n_taps
        return np.ascontiguousarray(self._source.vector(name).reshape(-1, n_taps).T)

    def layer(self, index: int) -> LayerWeights:
        """Hot weights of a layer."""
        prefix, c = f"blk.{index}.", self.config
        routed, shared = c.has_experts(index), None
        if c.d_always(index):
            suffix = "_shexp" if routed else ""
            shared = ExpertWeights(
                *(self._source.matrix(f"{prefix}ffn_{part}{suffix}.weight") for part in ("gate", "up", "down"))
            )
        return LayerWeights(
            mixer_norm=self._norm(f"{prefix}attn_norm"),
            mixer=self._mixer(prefix, c.layer(index).mixer),
            feed_forward_norm=self._norm(f"{prefix}ffn_norm"),
            router=self._linear(f"{prefix}ffn_gate_inp") if routed else None,
            choice_bias=self._optional(f"{prefix}exp_probs_b.bias"),
            shared=shared,
            shared_gate=self._source.matrix(f"{prefix}ffn_gate_inp_shexp.weight") if c.shared_gate and routed else None,
            expert_biases=self.expert_biases(index),
        )

    def expert_biases(self, layer: int) -> ExpertBiases | None:
        """What the matrices of a layer's experts add, where the model has that."""
        router = self.config.router
        if router is None or not (self.config.expert_bias and self.config.has_experts(layer)):
            return None
        parts = (self._source.vector(f"blk.{layer}.ffn_{part}_exps.bias") for part in ("gate", "up", "down"))
        return ExpertBiases(*(part.reshape(router.n_expert, -1) for part in parts))

    def _mixer(self, prefix: str, kind: str) -> Mixer:
        """The weights of what lets a token see those before it."""
        if kind == "convolution":
            return ConvolutionWeights(
                input=self._linear(f"{prefix}shortconv.in_proj"),
                taps=self._taps(f"{prefix}shortconv.conv.weight"),
                output=self._linear(f"{prefix}shortconv.out_proj"),
            )
        if kind == "delta":
            return DeltaWeights(
                input=self._linear(f"{prefix}attn_qkv"),
                gate=self._linear(f"{prefix}attn_gate"),
                beta=self._linear(f"{prefix}ssm_beta"),
                alpha=self._linear(f"{prefix}ssm_alpha"),
                taps=self._taps(f"{prefix}ssm_conv1d.weight"),
                decay=self._source.vector(f"{prefix}ssm_a"),
                step_bias=self._source.vector(f"{prefix}ssm_dt.bias"),
                norm=self._source.vector(f"{prefix}ssm_norm.weight"),
                output=self._linear(f"{prefix}ssm_out"),
            )
        if self.config.latent:
            has_rank = self.config.latent.query_rank > 0
            return LatentWeights(
                query=self._linear(f"{prefix}{'attn_q_b' if has_rank else 'attn_q'}"),
                latent=self._linear(f"{prefix}attn_kv_a_mqa"),
                latent_norm=self._source.vector(f"{prefix}attn_kv_a_norm.weight"),
                key_up=self._source.matrix(f"{prefix}attn_k_b.weight"),
                value_up=self._source.matrix(f"{prefix}attn_v_b.weight"),
                output=self._linear(f"{prefix}attn_output"),
                query_down=self._linear_if_there(f"{prefix}attn_q_a"),
                query_norm=self._optional(f"{prefix}attn_q_a_norm.weight"),
            )
        return AttentionWeights(
            query=self._linear(f"{prefix}attn_q"),
            key=self._linear(f"{prefix}attn_k"),
            value=self._linear(f"{prefix}attn_v"),
            output=self._linear(f"{prefix}attn_output"),
            query_norm=self._optional(f"{prefix}attn_q_norm.weight"),
            key_norm=self._optional(f"{prefix}attn_k_norm.weight"),
            gate=self._linear_if_there(f"{prefix}attn_q_gate"),
            sinks=self._optional(f"{prefix}attn_sinks.weight"),
        )

    def experts(self, layer: int) -> Iterator[ExpertWeights]:
        """Experts of a layer, in ascending id; each is read when it is packed."""
        assert self.config.router is not None
        for expert in range(self.config.router.n_expert):
            yield self.expert(layer, expert)

    def expert(self, layer: int, index: int) -> ExpertWeights:
        """One expert, read when it is packed."""
        return ExpertWeights(*self._source.expert(layer, index))

    def hot(self) -> Iterator[HotTensor]:
        """All that is always resident, by the names of tensor_table, the head always there."""
        c = self.config
        for layer in range(c.n_layers):
            names = self._layer_shapes(layer)
            first = [name for name in _FIRST if name in names]  # where bundles have had them
            for name in (*first, *(name for name in names if name not in _FIRST)):
                if not self.is_cold(name):
                    yield self._hot(f"blk.{layer}.{name}")
        for name in {**optional_model_tensors(c), **model_tensors(c)}:
            if name in self.shapes and name not in (EMBEDDING, HEAD):
                yield self._hot(name)
        head = self.head()[1].matrix
        yield HotTensor(HEAD, head.shape, head, None)

    def _hot(self, name: str) -> HotTensor:
        shape = self._wanted[name]
        if len(shape) == 1 and not name.endswith("ffn_gate_inp_shexp.weight"):
            return HotTensor(name, shape, None, lambda: self._source.vector(name))
        matrix = self._source.matrix(name)
        return HotTensor(name, matrix.shape, matrix, None)

    def load_into(self, device: Device, progress: Progress, *, experts: bool = True) -> list[Table | None]:
        """Give all weights to a device, layer by layer; its table of experts for each layer.

        Without `experts` only the hot weights are read, and the tables stay empty.
        """
        config, tables = self.config, []
        for layer in range(config.n_layers):
            progress("loading weights", layer / (config.n_layers + 1))
            device.add_layer(self.layer(layer))
            table = device.new_table(config.router.n_expert) if config.router and config.has_experts(layer) else None
            if table is not None and experts:
                for index, expert in enumerate(self.experts(layer)):
                    table[index] = device.pack_expert(expert)
            tables.append(table)
        progress("loading weights", config.n_layers / (config.n_layers + 1))
        device.set_head(*self.head())
        return tables

    def head(self) -> tuple[Norm, Linear]:
        """The final norm and the output head, which is the embedding table where there is no other."""
        name = HEAD if HEAD in self.shapes else EMBEDDING
        return self._norm("output_norm"), Linear(self._source.matrix(name), self._optional("output.bias"))

    def rope_divisors(self, n_context: int = 0) -> Floats | None:
        """Divisors of the rotation's frequencies (n_rotated / 2,), where the file has them.

        n_context: positions that there will be; beyond the model's original ones, others may apply.
        """
        rope = self.config.rope
        if rope.two_ranges:
            return self._optional(LONG_DIVISORS if n_context > rope.original_context else SHORT_DIVISORS)
        return self._optional(DIVISORS)

    def embed(self, tokens: list[int]) -> Floats:
        """Embedding rows (n_tokens, d_model), read from the file and scaled."""
        embeddings = self._source.embedding(tokens)
        if self.config.embedding_scale != 1.0:
            embeddings = embeddings * np.float32(self.config.embedding_scale)
        return embeddings

    @property
    def n_parameters(self) -> int:
        """Numbers in all tensors; a bundle's table that is its head too counts once."""
        tied = isinstance(self.file, Bundle) and self.file.manifest.model.get("tied") is True
        return sum(math.prod(shape) for name, shape in self.shapes.items() if not (tied and name == EMBEDDING))

    def table_type(self) -> Type:
        """The ggml type of the rows of the embedding table that a bundle has."""
        return self._source.table_type()

    def bytes_of(self, name: str) -> int:
        """Bytes that a tensor takes in RAM once packed."""
        return sum(self.sizes_of(name).values())

    def packing_bytes(self, name: str) -> int:
        """Bytes that packing a tensor takes at its peak, beside the packed one."""
        return self._source.packing_bytes(name)

    def is_cold(self, name: str) -> bool:
        """Whether a tensor holds routed experts."""
        return name.endswith("_exps.weight")

    def is_on_file(self, name: str) -> bool:
        """Whether a tensor stays in the file: an embedding table that is not the head too."""
        return name == EMBEDDING and HEAD in self.shapes
