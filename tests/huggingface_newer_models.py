"""gpt-oss and DeepSeek GGUFs written back as Hugging Face folders, by a mapping of its own.

Written out as the models' own checkpoints have it: experts of gpt-oss stacked with gate and up in turns, in MXFP4
blocks and scales or turned over in floats; DeepSeek's keys and values from one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from huggingface_models import write_json, write_tokenizer
from safetensors.numpy import save

from edgert.storage.gguf_file import GgufFile


def read_all(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A GGUF's metadata, and its tensors as they are: float32, or uint8 blocks (..., n_blocks, 17) of MXFP4."""
    with GgufFile.open(path) as file:
        tensors = {}
        for name, info in file.tensors.items():
            raw = file.read(name)
            is_float = info.type == Type.F32
            tensors[name] = (
                raw.view(np.float32).reshape(info.shape) if is_float else raw.reshape(*info.shape[:-1], -1, 17)
            )
        return dict(file.metadata), tensors


def common_config(metadata: Mapping[str, Any], rope_scaling: Mapping[str, Any]) -> dict[str, Any]:
    a = metadata["general.architecture"]
    get = {key.removeprefix(f"{a}."): value for key, value in metadata.items()}
    return {
        "hidden_act": "silu",
        "hidden_size": get["embedding_length"],
        "intermediate_size": get["feed_forward_length"],
        "num_hidden_layers": get["block_count"],
        "num_attention_heads": get["attention.head_count"],
        "max_position_embeddings": get["context_length"],
        "num_experts_per_tok": get["expert_used_count"],
        "rms_norm_eps": float(f"{get['attention.layer_norm_rms_epsilon']:.4g}"),
        "rope_theta": get["rope.freq_base"],
        "rope_scaling": dict(rope_scaling),
        "vocab_size": get["vocab_size"],
        "tie_word_embeddings": False,
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
    }


def oss_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """As openai/gpt-oss-20b has it."""
    n_layers = metadata["gpt-oss.block_count"]
    scaling = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    return common_config(metadata, {**scaling, "rope_type": "yarn", "truncate": False}) | {
        "architectures": ["GptOssForCausalLM"],
        "head_dim": metadata["gpt-oss.attention.key_length"],
        "num_key_value_heads": metadata["gpt-oss.attention.head_count_kv"],
        "num_local_experts": metadata["gpt-oss.expert_count"],
        "experts_per_token": metadata["gpt-oss.expert_used_count"],
        "layer_types": ["sliding_attention", "full_attention"] * (n_layers // 2),
        "sliding_window": metadata["gpt-oss.attention.sliding_window"],
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    }


def deepseek_config(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """As deepseek-ai/DeepSeek-V2-Lite and DeepSeek-V3 have it."""
    get = {key.removeprefix("deepseek2."): value for key, value in metadata.items()}
    version_3 = get["expert_gating_func"] == 2
    mscale = round(10 * get["rope.scaling.yarn_log_multiplier"], 4)
    scaling = {
        **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": mscale, "mscale_all_dim": mscale},
        **{"original_max_position_embeddings": 4096, "type": "yarn"},
    }
    rotated = get["rope.dimension_count"]
    return common_config(metadata, scaling) | {
        "architectures": ["DeepseekV3ForCausalLM" if version_3 else "DeepseekV2ForCausalLM"],
        "num_key_value_heads": get["attention.head_count"],
        "q_lora_rank": get["attention.q_lora_rank"] or None,
        "kv_lora_rank": get["attention.kv_lora_rank"],
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": get.get("attention.key_length_mla", get["attention.key_length"]) - rotated,
        "v_head_dim": get.get("attention.value_length_mla", get["attention.value_length"]),
        "n_routed_experts": get["expert_count"],
        "n_shared_experts": get["expert_shared_count"],
        "moe_intermediate_size": get["expert_feed_forward_length"],
        "moe_layer_freq": 1,
        "first_k_dense_replace": get["leading_dense_block_count"],
        "routed_scaling_factor": get["expert_weights_scale"],
        "norm_topk_prob": get["expert_weights_norm"],
        "scoring_func": "sigmoid" if version_3 else "softmax",
        "topk_method": "noaux_tc" if version_3 else "greedy",
        "n_group": get.get("expert_group_count", 1),
        "topk_group": get.get("expert_group_used_count", 1),
        "attention_bias": False,
        "ep_size": 1,
        "num_nextn_predict_layers": 1 if version_3 else 0,
    }


def in_turns(first: Any, second: Any, axis: int) -> Any:
    """Elements of two arrays one after the other along an axis."""
    both = np.stack((first, second), axis=axis + 1)
    shape = list(first.shape)
    shape[axis] *= 2
    return both.reshape(shape)


def neighbours(blocks: Any) -> tuple[Any, Any]:
    """ggml's MXFP4 (..., n_blocks, 17) as blocks of two neighbours a byte (..., n_blocks, 16), and scales."""
    low, high = blocks[..., 1:] & 15, blocks[..., 1:] >> 4
    numbers = np.concatenate((low, high), axis=-1)  # in their order
    return np.ascontiguousarray(numbers[..., 0::2] | numbers[..., 1::2] << 4), np.ascontiguousarray(blocks[..., 0])


def oss_tensors(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    found = _outer(tensors)
    for layer in range(metadata["gpt-oss.block_count"]):
        mine, there = _layer(tensors, layer), f"model.layers.{layer}."
        found |= {
            f"{there}input_layernorm.weight": mine["attn_norm.weight"],
            f"{there}post_attention_layernorm.weight": mine["post_attention_norm.weight"],
            f"{there}self_attn.sinks": mine["attn_sinks.weight"],
            f"{there}mlp.router.weight": mine["ffn_gate_inp.weight"],
            f"{there}mlp.router.bias": mine["ffn_gate_inp.bias"],
        }
        for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o")):
            for kind in ("weight", "bias"):
                found[f"{there}self_attn.{theirs}_proj.{kind}"] = mine[f"attn_{ours}.{kind}"]
        gate, up, down = (mine[f"ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        experts = f"{there}mlp.experts."
        found[f"{experts}gate_up_proj_bias"] = in_turns(mine["ffn_gate_exps.bias"], mine["ffn_up_exps.bias"], 1)
        found[f"{experts}down_proj_bias"] = mine["ffn_down_exps.bias"]
        gate_up = in_turns(gate, up, 1)
        if gate.dtype == np.uint8:
            for name, blocks in (("gate_up_proj", gate_up), ("down_proj", down)):
                found[f"{experts}{name}_blocks"], found[f"{experts}{name}_scales"] = neighbours(blocks)
        else:
            found[f"{experts}gate_up_proj"] = np.ascontiguousarray(gate_up.swapaxes(1, 2))
            found[f"{experts}down_proj"] = np.ascontiguousarray(down.swapaxes(1, 2))
    return found


_DEEPSEEK_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_shexp.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_experts.down_proj.weight",
}


def joined(mine: Mapping[str, Any]) -> Any:
    """Keys and values of all heads from one matrix: of each head the rows of keys, then those of values."""
    keys = mine["attn_k_b.weight"].swapaxes(1, 2)  # (n_heads, d_key without rotation, rank)
    both = np.concatenate((keys, mine["attn_v_b.weight"]), axis=1)
    return both.reshape(-1, both.shape[-1])


def deepseek_tensors(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    found = _outer(tensors)
    for layer in range(metadata["deepseek2.block_count"]):
        mine, there = _layer(tensors, layer), f"model.layers.{layer}."
        if "attn_k_b.weight" in mine:
            mine["attn_kv_b.weight"] = joined(mine)
            del mine["attn_k_b.weight"], mine["attn_v_b.weight"]
        for part in ("gate", "up", "down"):
            for number, expert in enumerate(mine.pop(f"ffn_{part}_exps.weight", ())):
                found[f"{there}mlp.experts.{number}.{part}_proj.weight"] = expert
        found |= {f"{there}{_DEEPSEEK_NAMES[name]}": tensor for name, tensor in mine.items()}
    if metadata["deepseek2.expert_gating_func"] == 2:  # a layer that predicts the token after the next
        last = metadata["deepseek2.block_count"]
        found[f"model.layers.{last}.eh_proj.weight"] = np.zeros((64, 128), np.float32)
    return found


def _outer(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
        "lm_head.weight": tensors["output.weight"],
    }


def _layer(tensors: Mapping[str, Any], layer: int) -> dict[str, Any]:
    prefix = f"blk.{layer}."
    return {name.removeprefix(prefix): w for name, w in tensors.items() if name.startswith(prefix)}


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Any], metadata: Mapping[str, Any]) -> Path:
    """The folder's files. Tensors of uint16 are BF16."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    raw = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, {"format": "pt"})
    end = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:end].replace(b'"U16"', b'"BF16"')
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    write_tokenizer(folder, metadata)
    return folder


def as_bf16(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Float tensors as the checkpoints have them."""
    return {
        name: tensor
        if tensor.dtype == np.uint8
        else gguf.quants.quantize(tensor, Type.BF16).view(np.uint16).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }
