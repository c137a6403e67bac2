"""From the tensors of a GGUF to what a device takes: names, shapes, formats, layer by layer.

Every tensor of the file must be asked for by somebody: one that is left over could change the answers and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from gguf import GGMLQuantizationType as Type

from edgert.devices.base import Device, ExpertWeights, LayerWeights, Linear, Table
from edgert.errors import ModelFileError, UnsupportedError
from edgert.quant import ggml, packing
from edgert.quant.formats import Format
from edgert.quant.packing import StoredMatrix
from edgert.storage.gguf_file import GgufFile
from edgert.types import Floats, ModelConfig

Progress = Callable[[str, float], None]  # called with (stage, fraction from 0 to 1)


class Weights:
    """The weights of one model file. Shapes are checked against the configuration before anything is read."""

    def __init__(self, file: GgufFile, config: ModelConfig, *, decode_to_f32: bool = False) -> None:
        self.file, self.config, self._decode_to_f32 = file, config, decode_to_f32
        self._path = file.path
        c = config
        if c.n_layers > len(file.tensors):  # before names are made of it
            raise ModelFileError(
                f"{self._path}: {c.architecture}.block_count is {c.n_layers}, but the file has only "
                f"{len(file.tensors)} tensors; the file is damaged or made wrongly"
            )
        self._wanted: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (c.n_vocab, c.d_model),
            "output_norm.weight": (c.d_model,),
        }
        if "output.weight" in file.tensors:
            self._wanted["output.weight"] = (c.n_vocab, c.d_model)
        if "rope_freqs.weight" in file.tensors:
            self._wanted["rope_freqs.weight"] = (c.rope.n_rotated // 2,)
        for layer in range(c.n_layers):
            self._wanted |= {f"blk.{layer}.{name}": shape for name, shape in self._layer_shapes(layer).items()}
        self._check()

    def _layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Names of a layer's tensors, without their prefix, and the shapes they must have."""
        c = self.config
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
        if f"blk.{layer}.attn_qkv.weight" in self.file.tensors:
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
        return shapes | {name: shape for name, shape in optional.items() if f"blk.{layer}.{name}" in self.file.tensors}

    def _check(self) -> None:
        for name, shape in self._wanted.items():
            info = self.file.tensors.get(name)
            if info is None and name.replace("_exps", ".0") in self.file.tensors:
                raise UnsupportedError(
                    f"{self._path}: it holds one tensor per expert ({name.replace('_exps', '.0')}), "
                    "as old conversions do; take a newer conversion"
                )
            if info is None:
                raise ModelFileError(
                    f"{self._path}: the tensor {name} is missing; the file is incomplete, download or convert it again"
                )
            if info.shape != shape and math.prod(info.shape) == math.prod(shape) == shape[-1]:
                continue  # a vector stored as a matrix of one row
            if info.shape != shape:
                raise ModelFileError(
                    f"{self._path}: the tensor {name} has shape {info.shape}, but the metadata ask for {shape}; "
                    "the file is damaged or made wrongly"
                )
        for name, info in self.file.tensors.items():
            if not ggml.is_decodable(info.type):
                raise UnsupportedError(
                    f"{self._path}: the tensor {name} is of type {info.type.name}, which edgert cannot read; "
                    "take another quantisation"
                )
            if name not in self._wanted:
                raise UnsupportedError(
                    f"{self._path}: the tensor {name} {info.shape} is not one that edgert uses for "
                    f"{self.config.architecture!r}; it may change the answers"
                )

    # ---- reading -----------------------------------------------------------------------------------------------------
    def _vector(self, name: str) -> Floats:
        info = self.file.tensors[name]
        vector = ggml.to_float(self.file.read(name), info.type, (math.prod(info.shape),))
        if not np.isfinite(vector).all():
            raise packing.not_finite(f"{self._path}: the tensor {name}")
        return vector

    def _matrix(
        self, name: str, first_row: int = 0, n_rows: int | None = None, expert: int | None = None
    ) -> StoredMatrix:
        """Some rows of a tensor, by default all, read when they are packed."""
        info = self.file.tensors[name]
        n_in = info.shape[-1]
        return StoredMatrix(
            name=f"{self._path}: the tensor {name}" + ("" if expert is None else f", expert {expert}"),
            kind=info.type,
            shape=(math.prod(info.shape) // n_in if n_rows is None else n_rows, n_in),
            format=self.format_of(name),
            read_rows=lambda first, count: self.file.read_rows(name, first_row + first, count),
            first_row=first_row if expert is None else 0,
        )

    def format_of(self, name: str) -> Format:
        """The format that a tensor is packed to."""
        return ggml.format_for(self.file.tensors[name].type, decode_to_f32=self._decode_to_f32)

    def formats(self) -> list[Format]:
        """The formats of all matrices that are packed."""
        matrices = (name for name, info in self.file.tensors.items() if len(info.shape) > 1)
        return list(dict.fromkeys(self.format_of(name) for name in matrices if not self.is_on_file(name)))

    def _optional(self, name: str) -> Floats | None:
        return self._vector(name) if name in self.file.tensors else None

    def _query_key_value(self, prefix: str) -> list[Linear]:
        if f"{prefix}attn_qkv.weight" not in self.file.tensors:
            return [
                Linear(self._matrix(f"{prefix}attn_{n}.weight"), self._optional(f"{prefix}attn_{n}.bias"))
                for n in "qkv"
            ]
        c, name = self.config, f"{prefix}attn_qkv.weight"
        bias = self._optional(f"{prefix}attn_qkv.bias")
        parts, start = [], 0
        for rows in (c.n_heads * c.d_head, c.n_kv_heads * c.d_head, c.n_kv_heads * c.d_value):
            of_part = None if bias is None else bias[start : start + rows]
            parts.append(Linear(self._matrix(name, start, rows), of_part))
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
                *(self._matrix(f"{prefix}ffn_{part}{suffix}.weight") for part in ("gate", "up", "down"))
            )
        return LayerWeights(
            attention_norm=self._vector(f"{prefix}attn_norm.weight"),
            query=query,
            key=key,
            value=value,
            output=Linear(self._matrix(f"{prefix}attn_output.weight"), self._optional(f"{prefix}attn_output.bias")),
            feed_forward_norm=self._vector(f"{prefix}ffn_norm.weight"),
            query_norm=self._vector(f"{prefix}attn_q_norm.weight") if c.qk_norm != "none" else None,
            key_norm=self._vector(f"{prefix}attn_k_norm.weight") if c.qk_norm != "none" else None,
            router=self._matrix(f"{prefix}ffn_gate_inp.weight") if c.router else None,
            shared=shared,
            shared_gate=self._matrix(f"{prefix}ffn_gate_inp_shexp.weight") if c.shared_gate else None,
        )

    def experts(self, layer: int) -> Iterator[ExpertWeights]:
        """Experts of a layer, in ascending id; each is read when it is packed."""
        c = self.config
        assert c.router is not None
        rows = {"gate": c.d_expert, "up": c.d_expert, "down": c.d_model}
        for expert in range(c.router.n_expert):
            yield ExpertWeights(
                *(
                    self._matrix(f"blk.{layer}.ffn_{part}_exps.weight", expert * n, n, expert)
                    for part, n in rows.items()
                )
            )

    def load_into(self, device: Device, progress: Progress) -> list[Table | None]:
        """Give all weights to a device, layer by layer; its table of experts for each layer."""
        config, tables = self.config, []
        for layer in range(config.n_layers):
            progress("loading weights", layer / (config.n_layers + 1))
            device.add_layer(self.layer(layer))
            table = device.new_table(config.router.n_expert) if config.router else None
            if table is not None:
                for index, expert in enumerate(self.experts(layer)):
                    table[index] = device.pack_expert(expert)
            tables.append(table)
        progress("loading weights", config.n_layers / (config.n_layers + 1))
        device.set_head(*self.head())
        return tables

    def head(self) -> tuple[Floats, Linear]:
        """The final norm and the output head, which is the embedding table where there is no other."""
        name = "output.weight" if "output.weight" in self.file.tensors else "token_embd.weight"
        return self._vector("output_norm.weight"), Linear(self._matrix(name))

    def rope_divisors(self) -> Floats | None:
        """Divisors of the rotation's frequencies (n_rotated / 2,), where the file has them."""
        return self._optional("rope_freqs.weight")

    def embed(self, tokens: list[int]) -> Floats:
        """Embedding rows (n_tokens, d_model), read from the file and scaled."""
        info = self.file.tensors["token_embd.weight"]
        rows = np.concatenate([self.file.read_rows(info.name, token, 1) for token in tokens])
        embeddings = ggml.to_float(rows.reshape(-1), info.type, (len(tokens), self.config.d_model))
        if self.config.embedding_scale != 1.0:
            embeddings = embeddings * np.float32(self.config.embedding_scale)
        return embeddings

    def bytes_of(self, name: str) -> int:
        """Bytes that a tensor takes in RAM once packed."""
        info = self.file.tensors[name]
        if len(info.shape) == 1 or (info.type == Type.F32 and name.endswith(".bias")):
            return 4 * info.shape[0]
        n_out, n_in = info.shape[-2:]
        return math.prod(info.shape[:-2]) * self.format_of(name).matrix_bytes(n_out, n_in)

    def packing_bytes(self, name: str) -> int:
        """Bytes that packing a tensor takes at its peak, beside the packed one."""
        info = self.file.tensors[name]
        if len(info.shape) == 1:
            return info.n_bytes + 4 * info.shape[0]
        return packing.packing_bytes(info.type, info.shape[-2], info.shape[-1])

    def is_cold(self, name: str) -> bool:
        """Whether a tensor holds routed experts."""
        return name.endswith("_exps.weight")

    def is_on_file(self, name: str) -> bool:
        """Whether a tensor stays in the file: an embedding table that is not the head too."""
        return name == "token_embd.weight" and "output.weight" in self.file.tensors
