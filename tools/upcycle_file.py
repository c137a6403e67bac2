"""The files of sparse upcycling: a dense llama GGUF in, routed experts beside it, a granitemoe GGUF out.

Every dimension comes from the dense file's metadata, and its tensors go into the new file as they are stored,
bit for bit: only the routed experts and their routers are new. Needs numpy and gguf (safetensors only for
expert files); it knows nothing about training.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from edgert.errors import ModelFileError, OptionError, UnsupportedError

ATTENTION = ("attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
PROJECTIONS = ("gate", "up", "down")
EXPERT_TYPES = ("Q4_0", "Q8_0", "F16")
QUANT_BLOCK = 32  # weights of a row that share a scale in Q4_0 and Q8_0

# What the training code computes; any other key is refused, so that nothing is lost unseen.
KNOWN_KEYS = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.dimension_count",
        "vocab_size",
    }
)

Experts = Mapping[str, np.ndarray]
"""Routed experts by GGUF name: `blk.N.ffn_{gate,up}_exps.weight` (n_expert, d_expert, d_model),
`blk.N.ffn_down_exps.weight` (n_expert, d_model, d_expert),
`blk.N.ffn_gate_inp.weight` (n_expert, d_model): the router."""


@dataclass(frozen=True)
class DenseConfig:
    """Sizes and constants of the dense model."""

    n_layer: int
    n_context: int
    d_model: int
    d_ff: int
    n_head: int
    n_kv_head: int
    d_head: int
    n_vocab: int
    rope_base: float
    norm_eps: float


@dataclass(frozen=True)
class Card:
    """How the new file introduces itself (the `general.` keys that are not copied)."""

    name: str
    basename: str
    description: str
    base_name: str
    base_organization: str

    @classmethod
    def read(cls, path: Path, default: Card) -> Card:
        """`default` with the fields that the JSON object in `path` gives; OptionError for any other field."""
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OptionError(f"{path}: not readable as JSON ({error}); see tools/smollm2_moe.json") from None
        names = [field.name for field in fields(cls)]
        if not isinstance(given, dict) or set(given) - set(names):
            raise OptionError(f"{path}: a card is one JSON object with some of the fields {', '.join(names)}")
        return cls(**{**asdict(default), **given})


class DenseFile:
    """A dense llama-architecture GGUF, mapped; UnsupportedError for any feature that upcycling would lose."""

    def __init__(self, path: Path) -> None:
        try:
            self.reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise ModelFileError(f"{path}: not readable as GGUF ({error}); give a dense llama GGUF") from None
        self.path = path
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise UnsupportedError(f"{path}: general.architecture is {architecture!r}, upcycling needs llama")
        self.config = self._read_config()
        self._check_tensors()

    def field(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key as Python has it, `default` where the key is missing."""
        found = self.reader.fields.get(key)
        return default if found is None else found.contents()

    def metadata(self) -> dict[str, Any]:
        """All metadata; numeric arrays as numpy arrays, arrays of strings as lists."""
        values: dict[str, Any] = {}
        for key, field in self.reader.fields.items():
            value = field.contents()
            numeric = field.types[0] == GGUFValueType.ARRAY and field.types[-1] != GGUFValueType.STRING
            values[key] = np.asarray(value) if numeric else value
        return values

    def weight(self, name: str) -> np.ndarray:
        """The tensor `name`, float32, slowest dimension first."""
        tensor = self.tensors[name]
        return np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding table."""
        return "output.weight" not in self.tensors

    def _number(self, key: str, default: float | None = None) -> Any:
        value = self.field(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UnsupportedError(f"{self.path}: llama.{key} is {value!r}; upcycling needs one number there")
        return value

    def _read_config(self) -> DenseConfig:
        for key in self.reader.fields:
            if key.startswith("llama.") and key.removeprefix("llama.") not in KNOWN_KEYS:
                raise UnsupportedError(f"{self.path}: {key} = {self.field(key)!r} is not known to upcycling")
        n_head, d_model = self._number("attention.head_count"), self._number("embedding_length")
        d_head = self._number("attention.key_length", d_model // n_head)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._number(key, d_head) != d_head:
                found = self._number(key)
                raise UnsupportedError(f"{self.path}: llama.{key} is {found}, upcycling needs {d_head}")
        return DenseConfig(
            n_layer=self._number("block_count"),
            n_context=self._number("context_length"),
            d_model=d_model,
            d_ff=self._number("feed_forward_length"),
            n_head=n_head,
            n_kv_head=self._number("attention.head_count_kv", n_head),
            d_head=d_head,
            n_vocab=self._number("vocab_size", len(self.field("tokenizer.ggml.tokens", ()))),
            rope_base=self._number("rope.freq_base", 10000.0),
            norm_eps=self._number("attention.layer_norm_rms_epsilon"),
        )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that the configuration calls for, with their shapes."""
        c = self.config
        block = {
            "attn_norm": (c.d_model,),
            "ffn_norm": (c.d_model,),
            "attn_q": (c.n_head * c.d_head, c.d_model),
            "attn_k": (c.n_kv_head * c.d_head, c.d_model),
            "attn_v": (c.n_kv_head * c.d_head, c.d_model),
            "attn_output": (c.d_model, c.n_head * c.d_head),
            "ffn_gate": (c.d_ff, c.d_model),
            "ffn_up": (c.d_ff, c.d_model),
            "ffn_down": (c.d_model, c.d_ff),
        }
        shapes = {"token_embd.weight": (c.n_vocab, c.d_model), "output_norm.weight": (c.d_model,)}
        if not self.tied:
            shapes["output.weight"] = (c.n_vocab, c.d_model)
        for layer in range(c.n_layer):
            shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
        return shapes

    def _check_tensors(self) -> None:
        wanted = self._shapes()
        for name, shape in wanted.items():
            found = tuple(reversed(self.tensors[name].shape.tolist())) if name in self.tensors else None
            if found != shape:
                raise ModelFileError(f"{self.path}: {name} has shape {found}, the metadata call for {shape}")
        if extra := sorted(set(self.tensors) - set(wanted)):
            raise UnsupportedError(f"{self.path}: tensor {extra[0]} is not part of a plain dense llama model")


def default_card(dense: DenseFile, n_expert: int, top_k: int) -> Card:
    """A card made from the dense file's own."""
    base = dense.field("general.name", dense.path.stem)
    organization = dense.field("general.organization", "unknown")
    licence = dense.field("general.license", "licence not stated")
    description = (
        f"Sparse upcycling of {base} ({organization}, {licence}): its feed-forward layers are the shared "
        f"expert of a Mixture-of-Experts with {n_expert} routed experts a layer, top-{top_k}."
    )
    return Card(
        name=f"{base} MoE",
        basename=f"{dense.field('general.basename', 'dense')}-moe",
        description=description,
        base_name=base,
        base_organization=organization,
    )


def expert_shape(dense: DenseFile, experts: Experts) -> tuple[int, int]:
    """(n_expert, d_expert) of `experts`; ModelFileError where one is missing or does not fit `dense`."""
    c = dense.config
    first = experts.get("blk.0.ffn_gate_exps.weight", np.empty((0, 0, 0)))
    if first.ndim != 3 or not first.size:
        raise ModelFileError(f"routed experts: blk.0.ffn_gate_exps.weight has shape {first.shape}")
    n_expert, d_expert = first.shape[:2]
    wanted: dict[str, tuple[int, ...]] = {
        "ffn_gate_inp": (n_expert, c.d_model),
        "ffn_gate_exps": (n_expert, d_expert, c.d_model),
        "ffn_up_exps": (n_expert, d_expert, c.d_model),
        "ffn_down_exps": (n_expert, c.d_model, d_expert),
    }
    shapes = {f"blk.{n}.{part}.weight": shape for n in range(c.n_layer) for part, shape in wanted.items()}
    for name in [*shapes, *experts]:
        found, needed = experts[name].shape if name in experts else None, shapes.get(name)
        if found != needed:
            raise ModelFileError(f"routed experts: {name} has shape {found}, {dense.path} calls for {needed}")
    return n_expert, d_expert


def assemble(dense: DenseFile, experts: Experts, out: Path, *, top_k: int, expert_type: str, card: Card) -> None:
    """Write the granitemoe GGUF `out`, aside first: `dense` bit for bit, `experts` in `expert_type`."""
    n_expert, d_expert = expert_shape(dense, experts)
    check_expert_options(dense.config, n_expert, d_expert, top_k, expert_type)
    aside = out.with_name(f"{out.name}.part")
    writer = gguf.GGUFWriter(aside, "granitemoe")
    _write_card(writer, dense, card)
    _write_sizes(writer, dense, n_expert, d_expert, top_k)
    for key in dense.reader.fields:
        if key.startswith("tokenizer."):
            _copy_field(writer, dense, key)
    writer.add_quantization_version(dense.field("general.quantization_version", gguf.GGML_QUANT_VERSION))
    for name, data, kind in _tensors(dense, experts, GGMLQuantizationType[expert_type]):
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(aside, out)


def check_expert_options(config: DenseConfig, n_expert: int, d_expert: int, top_k: int, expert_type: str) -> None:
    """OptionError unless so many experts of this width and type can be made and routed."""
    if expert_type not in EXPERT_TYPES:
        raise OptionError(f"--expert-type {expert_type}: use one of {', '.join(EXPERT_TYPES)}")
    if not 1 <= top_k <= n_expert:
        raise OptionError(f"--top-k {top_k}: it must lie between 1 and the number of experts, {n_expert}")
    if not 1 <= d_expert <= config.d_ff:
        raise OptionError(f"--width {d_expert}: it must lie between 1 and the dense width, {config.d_ff}")
    if expert_type != "F16" and (d_expert % QUANT_BLOCK or config.d_model % QUANT_BLOCK):
        raise OptionError(
            f"--expert-type {expert_type}: rows of {d_expert} and {config.d_model} weights do "
            f"not fill blocks of {QUANT_BLOCK}; use --expert-type F16 or another --width"
        )


def read_experts(path: Path) -> dict[str, np.ndarray]:
    """The routed experts of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        experts: dict[str, np.ndarray] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{path}: not readable as safetensors ({error}); see --save-experts") from None
    return experts


def save_experts(experts: Experts, path: Path) -> None:
    """Write routed experts as safetensors: projections float16, routers float32."""
    from safetensors.numpy import save_file

    aside = path.with_name(f"{path.name}.part")
    save_file(as_stored(experts), aside)
    os.replace(aside, path)


def as_stored(experts: Experts) -> dict[str, np.ndarray]:
    """`experts` as an expert file holds them: assembling now or from that file gives the same bytes."""
    return {
        name: np.ascontiguousarray(value, dtype=np.float32 if "gate_inp" in name else np.float16)
        for name, value in experts.items()
    }


def experts_of(path: Path) -> dict[str, np.ndarray]:
    """The routed experts of an assembled GGUF, dequantised to float32."""
    parts = ("_exps.weight", "ffn_gate_inp.weight")
    return {
        tensor.name: np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        for tensor in gguf.GGUFReader(path).tensors
        if tensor.name.endswith(parts)
    }


def _write_card(writer: gguf.GGUFWriter, dense: DenseFile, card: Card) -> None:
    writer.add_type("model")
    writer.add_name(card.name)
    writer.add_basename(card.basename)
    for key in ("general.license", "general.languages"):
        if key in dense.reader.fields:
            _copy_field(writer, dense, key)
    writer.add_description(card.description)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, card.base_name)
    writer.add_base_model_organization(0, card.base_organization)


def _write_sizes(writer: gguf.GGUFWriter, dense: DenseFile, n_expert: int, d_expert: int, top_k: int) -> None:
    """The architecture keys; with these multipliers granitemoe computes what llama computes."""
    c = dense.config
    writer.add_block_count(c.n_layer)
    writer.add_context_length(c.n_context)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(d_expert)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.d_head)
    if c.d_head * c.n_head != c.d_model:  # else a reader's default is right
        writer.add_key_length(c.d_head)
        writer.add_value_length(c.d_head)
    writer.add_vocab_size(c.n_vocab)
    writer.add_expert_count(n_expert)
    writer.add_expert_used_count(top_k)
    writer.add_expert_shared_feed_forward_length(c.d_ff)
    writer.add_embedding_scale(1.0)
    writer.add_residual_scale(1.0)
    writer.add_logit_scale(1.0)
    writer.add_attention_scale(c.d_head**-0.5)


def _copy_field(writer: gguf.GGUFWriter, dense: DenseFile, key: str) -> None:
    kinds = dense.reader.fields[key].types
    writer.add_key_value(key, dense.field(key), kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)


def _tensors(
    dense: DenseFile, experts: Experts, kind: GGMLQuantizationType
) -> Iterator[tuple[str, np.ndarray, GGMLQuantizationType]]:
    """Name, stored data and type of every tensor of the new file, in its order."""

    def stored(source: str, name: str) -> tuple[str, np.ndarray, GGMLQuantizationType]:
        tensor = dense.tensors[source]
        return name, np.ascontiguousarray(tensor.data), tensor.tensor_type

    for name in ("token_embd.weight", "output_norm.weight") + (() if dense.tied else ("output.weight",)):
        yield stored(name, name)
    for layer in range(dense.config.n_layer):
        block = f"blk.{layer}"
        for part in ATTENTION:
            yield stored(f"{block}.{part}.weight", f"{block}.{part}.weight")
        for part in PROJECTIONS:
            yield stored(f"{block}.ffn_{part}.weight", f"{block}.ffn_{part}_shexp.weight")
        router = f"{block}.ffn_gate_inp.weight"
        yield router, np.ascontiguousarray(experts[router], dtype=np.float32), GGMLQuantizationType.F32
        for part in PROJECTIONS:
            name = f"{block}.ffn_{part}_exps.weight"
            yield name, gguf.quants.quantize(experts[name].astype(np.float32), kind), kind
