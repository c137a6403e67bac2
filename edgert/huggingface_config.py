"""From config.json and generation_config.json to GGUF's metadata: one row of a table for each class of `transformers`.

What the class would do and edgert does not is refused by key and value. Keys that the class does not read are passed
over, as `transformers` passes them over. Tensors and tokenizers are not known here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgert.errors import UnsupportedError
from edgert.huggingface_families import FAMILIES, Family
from edgert.huggingface_settings import single, yarn_keys
from edgert.storage.json_file import JsonObject, short
from edgert.types import Floats

# Caps far above any real model: they bound what is made before the sizes of the tensors are seen.
_MAX_EXPERTS = 1 << 16
_MAX_LAYERS = 1 << 16
_MAX_VOCABULARY = 1 << 20
_MAX_HEAD = 1 << 16


@dataclass(frozen=True)
class FolderConfig:
    """What config.json says, checked. rope_divisors: of the rotation's frequencies, (d_head / 2,), or None."""

    family: Family
    n_layers: int
    n_expert: int  # 0: dense
    n_unused_layers: int  # at the end of the folder, which predict further tokens and are not run
    d_head: int
    n_vocab: int
    tied: bool  # the head is the embedding table
    quantised: str  # how the experts' weights are: mxfp4, or "" for floats
    metadata: dict[str, Any]
    rope_divisors: Floats | None


def read_folder_config(config: JsonObject) -> FolderConfig:
    """What a model's config.json says.

    Raises UnsupportedError for a class, key or value that edgert does not honour, ModelFileError for what makes no
    sense.
    """
    family = _family(config)
    _refuse_unsupported(config, family)
    keys = _shape_keys(config, family)
    if family.routed:
        keys |= _expert_keys(config, family)
    if family.keys is not None:
        keys |= family.keys(config)
    n_layers, n_unused = keys["block_count"], 0
    if family.has_unused_layers:
        n_unused = config.integer("num_nextn_predict_layers", 0, most=_MAX_LAYERS)
    if n_unused:  # which GGUF counts among the layers
        keys |= {"block_count": n_layers + n_unused, "nextn_predict_layers": n_unused}
    rope, divisors = _rope(config, family, keys["rope.dimension_count"])
    prefixed = {f"{family.architecture}.{key}": value for key, value in (keys | rope).items()}
    return FolderConfig(
        family=family,
        n_layers=n_layers,
        n_expert=keys.get("expert_count", 0),
        n_unused_layers=n_unused,
        d_head=keys["attention.key_length"],
        n_vocab=keys["vocab_size"],
        tied=config.boolean("tie_word_embeddings", False),
        quantised="" if config.get("quantization_config") is None else family.quantised,
        metadata={"general.architecture": family.architecture, **prefixed},
        rope_divisors=divisors,
    )


def sampling_keys(generation: JsonObject) -> dict[str, Any]:
    """GGUF's general.sampling.* keys for what a generation_config.json recommends.

    Raises ModelFileError for values that make no sense.
    """
    keys: dict[str, Any] = {
        f"general.sampling.{ours}": single(generation.number(theirs))
        for ours, theirs in (
            ("temp", "temperature"),
            ("top_p", "top_p"),
            ("min_p", "min_p"),
            ("penalty_repeat", "repetition_penalty"),
        )
        if generation.get(theirs) is not None
    }
    if generation.get("top_k") is not None:
        keys["general.sampling.top_k"] = generation.integer("top_k")
    return keys


def _family(config: JsonObject) -> Family:
    names = config.array("architectures")
    if len(names) != 1 or not isinstance(names[0], str):
        config.wrong("architectures", names, "a list with the name of one class")
    if names[0] not in FAMILIES:
        config.refuse(
            "architectures", f"supported are {', '.join(FAMILIES)}: take one of these, or a GGUF of the model"
        )
    return FAMILIES[names[0]]


def _refuse_unsupported(config: JsonObject, family: Family) -> None:
    """Raise UnsupportedError for the first setting that would change the answers."""
    quantised = config.get("quantization_config") is not None
    method = config.object("quantization_config").get("quant_method") if quantised else ""
    if quantised and method != (family.quantised or None):
        raise UnsupportedError(
            f"{config.where}: the key quantization_config is there, the weights are quantised ({short(method)}); "
            "take the model in BF16, F16 or F32, or as GGUF"
        )
    if config.text("hidden_act", "silu") not in ("silu", "swish"):
        config.refuse("hidden_act", "the only activation that edgert has for this class is silu")
    if config.get("clip_qkv") is not None:
        config.refuse("clip_qkv", "edgert does not clip: take another model")
    if config.number("partial_rotary_factor", 1.0) != 1:
        config.refuse("partial_rotary_factor", "edgert rotates whole heads of this class: take another model")
    if family.normalises is not None and config.boolean("norm_topk_prob", False) != family.normalises:
        config.refuse("norm_topk_prob", f"edgert runs this class with {str(family.normalises).lower()}")
    if config.integer("decoder_sparse_step", 1, least=1) != 1:
        config.refuse("decoder_sparse_step", "edgert runs this class with experts in every layer (1)")
    if config.array("mlp_only_layers"):
        config.refuse("mlp_only_layers", "edgert runs this class with experts in every layer ([])")
    if family.window != "run":
        _refuse_window(config, family)


def _refuse_window(config: JsonObject, family: Family) -> None:
    """Raise UnsupportedError for a sliding window that is narrower than the context."""
    counts = config.boolean("use_sliding_window", family.window == "counts")
    kinds = config.array("layer_types")
    if any(kind != "full_attention" for kind in kinds) or (counts and not kinds):
        width, context = config.integer("sliding_window", 0), config.integer("max_position_embeddings", least=1)
        if 0 < width < context:
            config.refuse(
                "sliding_window",
                f"edgert attends to all {context:,} positions (max_position_embeddings): within the window both are "
                "the same, so set max_position_embeddings to its width",
            )
        if unknown := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
            config.refuse("layer_types", f"edgert does not know {short(unknown[0])}: take another model")


def _shape_keys(config: JsonObject, family: Family) -> dict[str, Any]:
    n_heads, d_model = config.integer("num_attention_heads", least=1), config.integer("hidden_size", least=1)
    d_head = config.integer("head_dim", d_model // n_heads, least=1, most=_MAX_HEAD)
    return {
        "block_count": config.integer("num_hidden_layers", least=1, most=_MAX_LAYERS),
        "context_length": config.integer("max_position_embeddings", least=1),
        "embedding_length": d_model,
        "feed_forward_length": config.integer("intermediate_size", least=1),
        "attention.head_count": n_heads,
        "attention.head_count_kv": config.integer("num_key_value_heads", n_heads, least=1),
        "attention.key_length": d_head,
        "attention.value_length": d_head,
        "attention.layer_norm_rms_epsilon": single(config.number("rms_norm_eps", family.eps)),
        "rope.dimension_count": d_head,
        "vocab_size": config.integer("vocab_size", least=1, most=_MAX_VOCABULARY),
    }


def _expert_keys(config: JsonObject, family: Family) -> dict[str, Any]:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    name = next((name for name in names if config.get(name) is not None), "num_experts")
    n_expert = config.integer(name, least=1, most=_MAX_EXPERTS)
    if config.integer("num_experts", n_expert) != n_expert:
        config.wrong("num_experts", config.get("num_experts"), f"num_local_experts = {n_expert}")
    keys = {"expert_count": n_expert, "expert_used_count": config.integer("num_experts_per_tok", least=1)}
    for ours, theirs, default in family.widths:
        keys[ours] = config.integer(theirs, default, least=1 if default is None else 0)
    return keys


def _rope(config: JsonObject, family: Family, d_head: int) -> tuple[dict[str, Any], Floats | None]:
    """GGUF's rope keys, and the divisors of the frequencies where the scaling is llama3's.

    transformers 5 writes all of it into rope_parameters, 4 the base into rope_theta and the rest into rope_scaling.
    """
    rope = config.object("rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling")
    base = rope.number("rope_theta", config.number("rope_theta", family.base))
    if base <= 0:
        rope.wrong("rope_theta", base, "a number above zero")
    if rope.number("partial_rotary_factor", 1.0) != 1:
        rope.refuse("partial_rotary_factor", "edgert rotates whole heads of this class: take another model")
    kind = rope.text("rope_type", rope.text("type", "default"))
    keys: dict[str, Any] = {"rope.freq_base": single(base)}
    if kind == "default":
        return keys, None
    if kind not in ("linear", "yarn", "llama3") or any(isinstance(value, dict) for value in rope.values.values()):
        rope.refuse(
            "rope_type" if "rope_type" in rope.values else "type", "supported are default, linear, yarn, llama3"
        )
    factor = rope.number("factor")
    if not 1 <= factor <= 1e6:
        rope.wrong("factor", factor, "a number from 1 to 1,000,000")
    if kind == "llama3":
        return keys, _llama3_divisors(rope, base, factor, d_head)
    keys |= {"rope.scaling.type": kind, "rope.scaling.factor": single(factor)}
    return keys | (yarn_keys(config, rope, family, factor) if kind == "yarn" else {}), None


def _llama3_divisors(rope: JsonObject, base: float, factor: float, d_head: int) -> Floats:
    """What Llama 3.1 divides frequencies by: (d_head / 2,); 1 for short waves, `factor` for long ones, blended between.

    Formula: transformers' `_compute_llama3_parameters`; llama.cpp stores the same as rope_freqs.weight.
    """
    low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
    original = rope.integer("original_max_position_embeddings", least=1)
    if not 0 < low < high:
        rope.wrong("low_freq_factor", low, f"a number above 0 and below high_freq_factor = {high}")
    lengths = 2 * math.pi * base ** (np.arange(0, d_head, 2) / d_head)
    smooth = np.clip((original / lengths - low) / (high - low), 0.0, 1.0)
    divisors: Floats = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return divisors
