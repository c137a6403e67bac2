"""Dimensions of well-known models, as their config.json gives them: enough to plan for one before anything is fetched.

A preset is a config.json in small: it takes the way of huggingface_config.py, and is checked like a file.
"""

from __future__ import annotations

import difflib
from typing import Any

from edgert.errors import OptionError
from edgert.preset_keys import KEY_PRESETS

_QWEN3 = {"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True, "head_dim": 128, "vocab_size": 151936}


def _shape(context: int, layers: int, d_model: int, d_ff: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "max_position_embeddings": context,
        "num_hidden_layers": layers,
        "hidden_size": d_model,
        "intermediate_size": d_ff,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def _experts(count: int, used: int, width: int | None = None) -> dict[str, Any]:
    found = {"num_experts": count, "num_experts_per_tok": used}
    return found | ({} if width is None else {"moe_intermediate_size": width})


def _granite(layers: int, d_model: int, heads: int, experts: int) -> dict[str, Any]:
    shape = _shape(131072, layers, d_model, 512, heads, 8)
    more = {"num_local_experts": experts, "num_experts_per_tok": 8, "tie_word_embeddings": True, "vocab_size": 49155}
    return {"architectures": ["GraniteMoeForCausalLM"], **shape, **more}


PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {**_QWEN3, **_shape(40960, 48, 2048, 6144, 32, 4), **_experts(128, 8, 768)},
    "qwen3-coder-30b-a3b": {**_QWEN3, **_shape(262144, 48, 2048, 5472, 32, 4), **_experts(128, 8, 768)},
    "qwen3-235b-a22b": {**_QWEN3, **_shape(40960, 94, 4096, 12288, 64, 4), **_experts(128, 8, 1536)},
    "qwen1.5-moe-a2.7b": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "vocab_size": 151936,
        "shared_expert_intermediate_size": 5632,
        **_shape(8192, 24, 2048, 5632, 16, 16),
        **_experts(60, 4, 1408),
    },
    "qwen2-57b-a14b": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "vocab_size": 151936,
        "shared_expert_intermediate_size": 20480,
        **_shape(131072, 28, 3584, 18944, 28, 4),
        **_experts(64, 8, 2560),
    },
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"],
        "vocab_size": 50304,
        **_shape(4096, 16, 2048, 1024, 16, 16),
        **_experts(64, 8),
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        **_shape(32768, 32, 4096, 14336, 32, 8),
    },
    "mixtral-8x22b": {
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32768,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        **_shape(65536, 56, 6144, 16384, 48, 8),
    },
    "granite-3.1-1b-a400m": _granite(24, 1024, 16, 32),
    "granite-3.1-3b-a800m": _granite(32, 1536, 24, 40),
    "llama-2-7b": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        **_shape(4096, 32, 4096, 11008, 32, 32),
    },
}
TITLES = {
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "qwen3-coder-30b-a3b": "Qwen3-Coder-30B-A3B",
    "qwen3-235b-a22b": "Qwen3-235B-A22B",
    "qwen1.5-moe-a2.7b": "Qwen1.5-MoE-A2.7B",
    "qwen2-57b-a14b": "Qwen2-57B-A14B",
    "olmoe-1b-7b": "OLMoE-1B-7B",
    "mixtral-8x7b": "Mixtral-8x7B",
    "mixtral-8x22b": "Mixtral-8x22B",
    "granite-3.1-1b-a400m": "Granite-3.1-1B-A400M",
    "granite-3.1-3b-a800m": "Granite-3.1-3B-A800M",
    "llama-2-7b": "LLaMA-2-7B",
}


def preset_named(name: str) -> dict[str, Any]:
    """A preset by its name; OptionError, with the names there are, for another."""
    found = PRESETS.get(name.lower())
    if found is not None:
        return found
    known = [*PRESETS, *KEY_PRESETS]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    meant = f"; did you mean {near[0]}?" if near else "."
    raise OptionError(
        f"{name!r:.60} is neither a file nor a preset{meant} Presets are: {', '.join(known)}; or give a GGUF file "
        "(its first megabytes are enough), a bundle, a Hugging Face folder or its config.json"
    )
