"""Dimensions of well-known models by GGUF's keys, for architectures that edgert reads from GGUF files alone.

They are enough to plan for a model, and to hold the tables of tensors against what its makers say of its size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType as Type


class KeyPreset(NamedTuple):
    """A model by its keys, without their prefix. experts: the type that its experts are shipped in, whatever the rest.

    billions: parameters, as its makers count them. biases: of attention's matrices, by tensor.
    """

    title: str
    architecture: str
    billions: float
    keys: dict[str, Any]
    tied: bool = False
    biases: tuple[str, ...] = ()
    experts: Type | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """As a file has them."""
        prefixed = {f"{self.architecture}.{key}": value for key, value in self.keys.items()}
        return {"general.architecture": self.architecture, "general.name": self.title, **prefixed}


_QKV = ("attn_q.bias", "attn_k.bias", "attn_v.bias")


def _body(
    context: int, layers: int, d_model: int, d_ff: int, heads: int, kv_heads: Any, head: int, vocab: int
) -> dict[str, Any]:
    return {
        "context_length": context,
        "block_count": layers,
        "embedding_length": d_model,
        "feed_forward_length": d_ff,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": vocab,
    }


def _experts(count: int, used: int, width: int, **others: Any) -> dict[str, Any]:
    return {"expert_count": count, "expert_used_count": used, "expert_feed_forward_length": width, **others}


_SIGMOID = {"expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 2.5}
_GROUPS = {"expert_group_count": 8, "expert_group_used_count": 4}
_WINDOW = {"attention.sliding_window": 128, "rope.freq_base": 150000.0}
_LATENT = {
    "rope.dimension_count": 64,
    "attention.kv_lora_rank": 512,
    "attention.key_length": 576,
    "attention.value_length": 512,
    "attention.key_length_mla": 192,
    "attention.value_length_mla": 128,
}
_YARN = _LATENT | {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 40.0,
    "rope.scaling.original_context_length": 4096,
}
_DELTA = {
    "ssm.conv_kernel": 4,
    "ssm.state_size": 128,
    "ssm.group_count": 16,
    "ssm.time_step_rank": 32,
    "ssm.inner_size": 4096,
    "rope.dimension_count": 64,
    "expert_shared_feed_forward_length": 512,
}
_GLM_4 = KeyPreset(
    "GLM-4.5",
    "glm4moe",
    352.8,
    _body(131072, 93, 5120, 12288, 96, 8, 128, 151552)
    | {"rope.dimension_count": 64, "rope.freq_base": 1e6, "nextn_predict_layers": 1, **_SIGMOID}
    | _experts(160, 8, 1536, expert_shared_count=1, leading_dense_block_count=3),
    biases=_QKV,
)
_DEEPSEEK_V3 = KeyPreset(
    "DeepSeek-V3",
    "deepseek2",
    671.0,
    _body(163840, 61, 7168, 18432, 128, 1, 0, 129280)
    | _YARN
    | {"attention.q_lora_rank": 1536, **_SIGMOID, **_GROUPS}
    | _experts(256, 8, 2048, expert_shared_count=1, leading_dense_block_count=3),
)
_ATTENDING = {2, 6, 10, 14, 18, 21}  # layers of LFM2-8B-A1B

KEY_PRESETS: dict[str, KeyPreset] = {
    "gpt-oss-20b": KeyPreset(
        "gpt-oss-20b",
        "gpt-oss",
        20.9,
        _body(131072, 24, 2880, 2880, 64, 8, 64, 201088) | _experts(32, 4, 2880) | _WINDOW,
        biases=(*_QKV, "attn_output.bias"),
        experts=Type.MXFP4,
    ),
    "gpt-oss-120b": KeyPreset(
        "gpt-oss-120b",
        "gpt-oss",
        116.8,
        _body(131072, 36, 2880, 2880, 64, 8, 64, 201088) | _experts(128, 4, 2880) | _WINDOW,
        biases=(*_QKV, "attn_output.bias"),
        experts=Type.MXFP4,
    ),
    "deepseek-v2-lite": KeyPreset(
        "DeepSeek-V2-Lite",
        "deepseek2",
        15.7,
        _body(163840, 27, 2048, 10944, 16, 1, 0, 102400)
        | _YARN
        | _experts(64, 6, 1408, expert_shared_count=2, leading_dense_block_count=1),
    ),
    "deepseek-v3": _DEEPSEEK_V3,
    "deepseek-v3.1": _DEEPSEEK_V3._replace(title="DeepSeek-V3.1"),
    "deepseek-r1": _DEEPSEEK_V3._replace(title="DeepSeek-R1"),
    "kimi-k2": KeyPreset(
        "Kimi-K2",
        "deepseek2",
        1026.4,
        _body(131072, 61, 7168, 18432, 64, 1, 0, 163840)
        | _YARN
        | {"rope.freq_base": 50000.0, "rope.scaling.factor": 32.0, "attention.q_lora_rank": 1536}
        | {**_SIGMOID, "expert_weights_scale": 2.827}
        | _experts(384, 8, 2048, expert_shared_count=1, leading_dense_block_count=1),
    ),
    "glm-4.7-flash": KeyPreset(  # by sigmoid, as its files do not say
        "GLM-4.7-Flash",
        "deepseek2",
        29.9,
        _body(202752, 47, 2048, 10240, 20, 1, 0, 154880)
        | _LATENT
        | {"attention.key_length_mla": 256, "attention.value_length_mla": 256, "attention.q_lora_rank": 768}
        | {"rope.freq_base": 1e6, "expert_weights_norm": True, "expert_weights_scale": 1.8}
        | _experts(64, 4, 1536, expert_shared_count=1, leading_dense_block_count=1),
    ),
    "glm-4.5": _GLM_4,
    "glm-4.6": _GLM_4._replace(title="GLM-4.6", keys={**_GLM_4.keys, "context_length": 202752}),
    "glm-4.5-air": KeyPreset(
        "GLM-4.5-Air",
        "glm4moe",
        106.9,
        _body(131072, 47, 4096, 10944, 96, 8, 128, 151552)
        | {"rope.dimension_count": 64, "nextn_predict_layers": 1, **_SIGMOID, "expert_weights_scale": 1.0}
        | _experts(128, 8, 1408, expert_shared_count=1, leading_dense_block_count=1),
        biases=_QKV,
    ),
    "ernie-4.5-21b-a3b": KeyPreset(
        "ERNIE-4.5-21B-A3B",
        "ernie4_5-moe",
        21.8,
        _body(131072, 28, 2560, 12288, 20, 4, 128, 103424)
        | {"leading_dense_block_count": 1, "interleave_moe_layer_step": 1}
        | _experts(64, 6, 1536, expert_shared_feed_forward_length=3072),
        tied=True,
    ),
    "ling-mini-2.0": KeyPreset(
        "Ling-mini-2.0",
        "bailingmoe2",
        16.3,
        _body(32768, 20, 2048, 5120, 16, 4, 128, 157184)
        | {"rope.dimension_count": 64, **_SIGMOID, **_GROUPS}
        | _experts(256, 8, 512, expert_shared_count=1, leading_dense_block_count=1),
    ),
    "hunyuan-a13b": KeyPreset(
        "Hunyuan-A13B",
        "hunyuan-moe",
        80.4,
        _body(262144, 32, 4096, 3072, 32, 8, 128, 128167)
        | _experts(64, 8, 3072, expert_shared_feed_forward_length=3072),
        tied=True,
    ),
    "lfm2-8b-a1b": KeyPreset(
        "LFM2-8B-A1B",
        "lfm2moe",
        8.3,
        _body(128000, 24, 2048, 7168, 32, np.array([8 * (i in _ATTENDING) for i in range(24)]), 64, 65536)
        | {"shortconv.l_cache": 3, "leading_dense_block_count": 2, "expert_gating_func": 2}
        | _experts(32, 4, 1792),
        tied=True,
    ),
    "dots.llm1": KeyPreset(
        "dots.llm1",
        "dots1",
        142.8,
        _body(32768, 62, 4096, 10944, 32, 32, 128, 152064)
        | _SIGMOID
        | _experts(128, 6, 1408, expert_shared_count=2, leading_dense_block_count=1),
    ),
    "phi-3.5-moe": KeyPreset(
        "Phi-3.5-MoE",
        "phimoe",
        41.9,
        _body(131072, 32, 4096, 6400, 32, 8, 128, 32064) | {"expert_count": 16, "expert_used_count": 2},
        biases=(*_QKV, "attn_output.bias"),
    ),
    "qwen3-next-80b-a3b": KeyPreset(
        "Qwen3-Next-80B-A3B",
        "qwen3next",
        79.7,
        _body(262144, 48, 2048, 5120, 16, 2, 256, 151936) | _DELTA | _experts(512, 10, 512),
    ),
    "qwen3.5-35b-a3b": KeyPreset(
        "Qwen3.5-35B-A3B",
        "qwen35moe",
        34.7,
        _body(262144, 40, 2048, 5120, 16, 2, 256, 248320) | _DELTA | _experts(256, 8, 512),
    ),
    "llama-4-scout": KeyPreset(
        "Llama-4-Scout-17B-16E",
        "llama4",
        107.8,
        _body(10485760, 48, 5120, 16384, 40, 8, 128, 202048) | _experts(16, 1, 8192, interleave_moe_layer_step=1),
    ),
    "llama-4-maverick": KeyPreset(  # every other layer has experts
        "Llama-4-Maverick-17B-128E",
        "llama4",
        400.7,
        _body(1048576, 48, 5120, 16384, 40, 8, 128, 202048) | _experts(128, 1, 8192, interleave_moe_layer_step=2),
    ),
}
