"""What single classes of `transformers` have in config.json beyond the common keys, as GGUF's metadata.

What the class would do and edgert does not is refused by key and value.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgert.storage.json_file import JsonObject, short

if TYPE_CHECKING:
    from edgert.huggingface_families import Family

_MAX_HEAD = 1 << 16
_SWIGLU_LIMIT = 7.0


def single(value: float) -> float:
    """A number as GGUF keeps it, so that a model is the same from either: rounded to single precision."""
    with np.errstate(over="ignore"):  # the infinity is refused by whoever reads the key
        return float(np.float32(value))


def multiplier_keys(config: JsonObject) -> dict[str, Any]:
    """Granite's four multipliers; the class's defaults are 1, where a GGUF without attention.scale means 1/sqrt(d)."""
    names = {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
    return {ours: single(config.number(theirs, 1.0)) for ours, theirs in names.items()}


def gpt_oss_keys(config: JsonObject) -> dict[str, Any]:
    """Widths of experts and window. Layers see a window and everything in turns, which GGUF has no key for."""
    kinds, usual = config.array("layer_types"), ("sliding_attention", "full_attention")
    if any(kind != usual[place % 2] for place, kind in enumerate(kinds)):
        config.refuse("layer_types", f"edgert has {usual[0]} and {usual[1]} in turns")
    if config.number("swiglu_limit", _SWIGLU_LIMIT) != _SWIGLU_LIMIT:
        config.refuse("swiglu_limit", f"edgert has {_SWIGLU_LIMIT}")
    return {
        "expert_feed_forward_length": config.integer("intermediate_size", least=1),
        "attention.sliding_window": config.integer("sliding_window", 128, least=1),
    }


def deepseek_2_keys(config: JsonObject) -> dict[str, Any]:
    """DeepSeek V2's latent attention, and its router: softmax over the experts, which are in one group."""
    return _latent_keys(config, normalised=False) | _one_group(config)


def deepseek_3_keys(config: JsonObject) -> dict[str, Any]:
    """DeepSeek V3's latent attention, and its router: sigmoid, with biases and groups."""
    if not config.boolean("rope_interleave", True):
        config.refuse("rope_interleave", "edgert runs this class with true, neighbours of a head turned together")
    return _latent_keys(config, normalised=True) | _groups(config)


def _latent_keys(config: JsonObject, *, normalised: bool) -> dict[str, Any]:
    """Latent attention as older GGUFs have it, keys and values of all heads from one matrix; and the experts.

    normalised: whether the class divides the weights of chosen experts by their sum where config.json does not say.
    """
    rotated = config.integer("qk_rope_head_dim", least=1, most=_MAX_HEAD)
    if config.integer("moe_layer_freq", 1) != 1:
        config.refuse("moe_layer_freq", "edgert runs this class with experts in every layer but the first (1)")
    if config.boolean("attention_bias", False):
        config.refuse("attention_bias", "edgert has latent attention without biases (false)")
    return {
        "attention.key_length": config.integer("qk_nope_head_dim", least=1, most=_MAX_HEAD) + rotated,
        "attention.value_length": config.integer("v_head_dim", least=1, most=_MAX_HEAD),
        "attention.q_lora_rank": config.integer("q_lora_rank", 0),
        "attention.kv_lora_rank": config.integer("kv_lora_rank", least=1),
        "rope.dimension_count": rotated,
        "leading_dense_block_count": config.integer("first_k_dense_replace", 0),
        "expert_feed_forward_length": config.integer("moe_intermediate_size", least=1),
        "expert_shared_count": config.integer("n_shared_experts", 0),
        "expert_weights_scale": single(config.number("routed_scaling_factor", 1.0)),
        "expert_weights_norm": config.boolean("norm_topk_prob", normalised),
    }


def _groups(config: JsonObject) -> dict[str, Any]:
    """DeepSeek V3's router: sigmoid, a bias for the choice, experts of some groups only."""
    for key, usual in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if config.text(key, usual) != usual:
            config.refuse(key, f"edgert runs this class with {usual}")
    n_groups = config.integer("n_group", 1, least=1)
    groups = {"expert_group_count": n_groups, "expert_group_used_count": config.integer("topk_group", 1, least=1)}
    return {"expert_gating_func": 2, **(groups if n_groups > 1 else {})}


def _one_group(config: JsonObject) -> dict[str, Any]:
    """DeepSeek V2's router: softmax. It chooses groups by their best expert, which no GGUF does."""
    if config.text("scoring_func", "softmax") != "softmax":
        config.refuse("scoring_func", "edgert runs this class with softmax")
    if config.boolean("norm_topk_prob", False):
        config.refuse("norm_topk_prob", "edgert runs this class with false")
    if config.text("topk_method", "greedy") == "group_limited_greedy" and config.integer("n_group", 1) > 1:
        config.refuse("topk_method", "edgert runs this class with greedy: take V2-Lite or V3")
    return {"expert_gating_func": 1}


def yarn_keys(config: JsonObject, rope: JsonObject, family: Family, factor: float) -> dict[str, Any]:
    """GGUF's keys for YaRN. Raises UnsupportedError for a setting that is not the usual one, which alone edgert has.

    gpt-oss does not round the ends of the ramp (truncate), which its GGUFs, and llama.cpp, do all the same.
    """
    context = config.integer("max_position_embeddings", least=1)
    keys: dict[str, Any] = {
        "rope.scaling.original_context_length": rope.integer("original_max_position_embeddings", context, least=1)
    }
    usual = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1 + 0.1 * math.log(factor)}
    if family.yarn == "scores":
        scale = rope.number("mscale_all_dim", 0.0)
        if not scale or rope.number("mscale", 1.0) != scale:  # else rotations would be multiplied too
            rope.refuse("mscale_all_dim", f"edgert runs this class with that of mscale, {short(rope.get('mscale'))}")
        keys["rope.scaling.yarn_log_multiplier"] = single(0.1 * scale)
        usual["attention_factor"] = 1.0
    else:
        for key in ("mscale", "mscale_all_dim"):
            if rope.get(key) is not None:
                rope.refuse(key, "edgert's YaRN does not have it: take another model")
    for key, value in usual.items():
        if not math.isclose(rope.number(key, value), value, rel_tol=1e-6):
            rope.refuse(key, f"edgert's YaRN has {value:.7g}")
    if not rope.boolean("truncate", True) and family.yarn != "unrounded":
        rope.refuse("truncate", "edgert's YaRN has true")
    return keys
