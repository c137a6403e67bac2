"""From the tensors of a model's file or bundle to what a device takes: names, shapes, formats, layer by layer.

Every tensor of the file must be asked for by somebody: one that is left over could change the answers and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from edgert.devices.base import Device, ExpertWeights, LayerWeights, Linear, Table
from edgert.errors import ModelFileError, UnsupportedError
from edgert.quant import ggml
from edgert.quant.formats import Format, MatrixSource
from edgert.storage.bundle import Bundle
from edgert.storage.tensor_file import TensorFile
from edgert.types import Floats, ModelConfig
from edgert.weight_sources import BundleSource, FileSource, WeightSource

Progress = Callable[[str, float], None]  # called with (stage, fraction from 0 to 1)
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


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
            source = BundleSource(file) if isinstance(file, Bundle) else FileSource(file, decode_to_f32=decode_to_f32)
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
        self._wanted: dict[str, tuple[int, ...]] = {
            EMBEDDING: (c.n_vocab, c.d_model),
            "output_norm.weight": (c.d_model,),
        }
        if HEAD in self.shapes:
            self._wanted[HEAD] = (c.n_vocab, c.d_model)
        if "rope_freqs.weight" in self.shapes:
            self._wanted["rope_freqs.weight"] = (c.rope.n_rotated // 2,)
        for layer in range(c.n_layers):
            self._wanted |= {
                f"blk.{layer}.{name}": shape for name, shape in layer_shapes(self.config, layer, self.shapes).items()
            }
        self._check()

    def _check(self) -> None:
        for name, shape in self._wanted.items():
            found = self.shapes.get(name)
            if found is None and name.replace("_exps", ".0") in self.shapes:
                raise UnsupportedError(
                    f"{self._path}: it holds one tensor per expert ({name.replace('_exps', '.0')}), "
                    "as old conversions do; take a newer conversion"
                )
            if found is None:
                raise ModelFileError(
                    f"{self._path}: the tensor {name} is missing; the file is incomplete, download or convert it again"
                )
            if found != shape and math.prod(found) == math.prod(shape) == shape[-1]:
                continue  # a vector stored as a matrix of one row
            if found != shape:
                raise ModelFileError(
                    f"{self._path}: the tensor {name} has shape {found}, but the metadata ask for {shape}; "
                    "the file is damaged or made wrongly"
                )
        for name, shape in self.shapes.items():
            if not isinstance(self.file, Bundle):
                self._check_type(name, self.file)
            if name not in self._wanted:
                raise UnsupportedError(
                    f"{self._path}: the tensor {name} {shape} is not one that edgert uses for "
                    f"{self.config.architecture!r}; it may change the answers"
                )

    def _check_type(self, name: str, file: TensorFile) -> None:
        kind = file.tensors[name].type
        if not ggml.is_decodable(kind):
            raise UnsupportedError(
                f"{self._path}: the tensor {name} is of type {kind.name}, which edgert cannot read; "
                "take another quantisation"
            )

    # ---- reading -----------------------------------------------------------------------------------------------------
    def sizes_of(self, name: str) -> Mapping[Format, int]:
        """Bytes that a tensor takes in RAM once packed, by format."""
        return self._source.sizes_of(name)

    def formats(self) -> list[Format]:
        """The formats of all matrices that are packed."""
        matrices = (name for name, shape in self.shapes.items() if len(shape) > 1 and not self.is_on_file(name))
        return list(dict.fromkeys(format for name in matrices for format in self.sizes_of(name)))

    def _optional(self, name: str) -> Floats | None:
        return self._source.vector(name) if name in self.shapes else None

    def _query_key_value(self, prefix: str) -> list[Linear]:
        if f"{prefix}attn_qkv.weight" not in self.shapes:
            return [
                Linear(self._source.matrix(f"{prefix}attn_{n}.weight"), self._optional(f"{prefix}attn_{n}.bias"))
                for n in "qkv"
            ]
        c, name = self.config, f"{prefix}attn_qkv.weight"
        bias = self._optional(f"{prefix}attn_qkv.bias")
        parts, start = [], 0
        for rows in (c.n_heads * c.d_head, c.n_kv_heads * c.d_head, c.n_kv_heads * c.d_value):
            of_part = None if bias is None else bias[start : start + rows]
            parts.append(Linear(self._source.matrix(name, start, rows), of_part))
            start += rows
        return parts

    def layer(self, index: int) -> LayerWeights:
        """Hot weights of a layer."""
        prefix, c = f"blk.{index}.", self.config
        query, key, value = self._query_key_value(prefix)
        shared = None
        if c.d_shared:
            suffix = "_shexp" if c.router else ""
            shared = ExpertWeights(
                *(self._source.matrix(f"{prefix}ffn_{part}{suffix}.weight") for part in ("gate", "up", "down"))
            )
        return LayerWeights(
            attention_norm=self._source.vector(f"{prefix}attn_norm.weight"),
            query=query,
            key=key,
            value=value,
            output=Linear(
                self._source.matrix(f"{prefix}attn_output.weight"), self._optional(f"{prefix}attn_output.bias")
            ),
            feed_forward_norm=self._source.vector(f"{prefix}ffn_norm.weight"),
            query_norm=self._source.vector(f"{prefix}attn_q_norm.weight") if c.qk_norm != "none" else None,
            key_norm=self._source.vector(f"{prefix}attn_k_norm.weight") if c.qk_norm != "none" else None,
            router=self._source.matrix(f"{prefix}ffn_gate_inp.weight") if c.router else None,
            shared=shared,
            shared_gate=self._source.matrix(f"{prefix}ffn_gate_inp_shexp.weight") if c.shared_gate else None,
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
        """All that is always resident, by the names that a bundle has: attn_qkv split, the head always there."""
        c = self.config
        for layer in range(c.n_layers):
            prefix = f"blk.{layer}."
            for part, linear in zip("qkv", self._query_key_value(prefix), strict=True):
                yield HotTensor(f"{prefix}attn_{part}.weight", linear.matrix.shape, linear.matrix, None)
                if linear.bias is not None:
                    bias, name = linear.bias, f"{prefix}attn_{part}.bias"
                    yield HotTensor(name, bias.shape, None, lambda bias=bias: bias)  # type: ignore[misc]   # bound early
            for name in layer_shapes(self.config, layer, self.shapes):
                if not self.is_cold(name) and not name.startswith(("attn_q.", "attn_k.", "attn_v.", "attn_qkv.")):
                    yield self._hot(f"{prefix}{name}")
        for name in ("rope_freqs.weight", "output_norm.weight"):
            if name in self.shapes:
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
            table = device.new_table(config.router.n_expert) if config.router else None
            if table is not None and experts:
                for index, expert in enumerate(self.experts(layer)):
                    table[index] = device.pack_expert(expert)
            tables.append(table)
        progress("loading weights", config.n_layers / (config.n_layers + 1))
        device.set_head(*self.head())
        return tables

    def head(self) -> tuple[Floats, Linear]:
        """The final norm and the output head, which is the embedding table where there is no other."""
        name = HEAD if HEAD in self.shapes else EMBEDDING
        return self._source.vector("output_norm.weight"), Linear(self._source.matrix(name))

    def rope_divisors(self) -> Floats | None:
        """Divisors of the rotation's frequencies (n_rotated / 2,), where the file has them."""
        return self._optional("rope_freqs.weight")

    def embed(self, tokens: list[int]) -> Floats:
        """Embedding rows (n_tokens, d_model), read from the file and scaled."""
        embeddings = self._source.embedding(tokens)
        if self.config.embedding_scale != 1.0:
            embeddings = embeddings * np.float32(self.config.embedding_scale)
        return embeddings

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


def layer_shapes(config: ModelConfig, layer: int, there: Container[str]) -> dict[str, tuple[int, ...]]:
    """Names of a layer's tensors, without their prefix, and the shapes they must have.

    there: names of a file's tensors, which decide what is optional, and whether q, k and v are one.
    """
    c = config
    q, k, v = c.n_heads * c.d_head, c.n_kv_heads * c.d_head, c.n_kv_heads * c.d_value
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (c.d_model,),
        "ffn_norm.weight": (c.d_model,),
        "attn_output.weight": (c.d_model, c.n_heads * c.d_value),
    }
    optional: dict[str, tuple[int, ...]] = {
        "attn_output.bias": (c.d_model,),
        "attn_q.bias": (q,),
        "attn_k.bias": (k,),
        "attn_v.bias": (v,),
        "attn_qkv.bias": (q + k + v,),
    }
    if f"blk.{layer}.attn_qkv.weight" in there:
        shapes["attn_qkv.weight"] = (q + k + v, c.d_model)
    else:
        shapes |= {
            "attn_q.weight": (q, c.d_model),
            "attn_k.weight": (k, c.d_model),
            "attn_v.weight": (v, c.d_model),
        }
    if c.qk_norm == "head":
        shapes |= {"attn_q_norm.weight": (c.d_head,), "attn_k_norm.weight": (c.d_head,)}
    elif c.qk_norm == "vector":
        shapes |= {"attn_q_norm.weight": (q,), "attn_k_norm.weight": (k,)}
    if c.router:
        e, f = c.router.n_expert, c.d_expert
        shapes |= {
            "ffn_gate_inp.weight": (e, c.d_model),
            "ffn_gate_exps.weight": (e, f, c.d_model),
            "ffn_up_exps.weight": (e, f, c.d_model),
            "ffn_down_exps.weight": (e, c.d_model, f),
        }
    if c.d_shared:
        suffix = "_shexp" if c.router else ""
        shapes |= {
            f"ffn_gate{suffix}.weight": (c.d_shared, c.d_model),
            f"ffn_up{suffix}.weight": (c.d_shared, c.d_model),
            f"ffn_down{suffix}.weight": (c.d_model, c.d_shared),
        }
    if c.shared_gate:
        shapes["ffn_gate_inp_shexp.weight"] = (c.d_model,)
    return shapes | {name: shape for name, shape in optional.items() if f"blk.{layer}.{name}" in there}
