"""GGUF models written back as Hugging Face folders, by a mapping of its own: what test_huggingface*.py open.

Names, shapes and JSON are written out here as `transformers` 4 saves them, so that nothing of edgert's own mapping is
believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from published_pretokenizers import PRE_TOKENIZERS, WHOLE_WORDS, byte_level
from safetensors.numpy import save

from edgert.quant import ggml
from edgert.storage.gguf_file import GgufFile

CLASSES = {
    "llama": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "granitemoe": "GraniteMoeSharedForCausalLM",
}


def decoded(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A GGUF's metadata, and its weights as float32 arrays by name."""
    with GgufFile.open(path) as file:
        weights = {
            name: ggml.to_float(file.read(name), info.type, info.shape).copy() for name, info in file.tensors.items()
        }
        return dict(file.metadata), weights


def write_gguf(path: Path, metadata: Mapping[str, Any], weights: Mapping[str, Any], kind: str) -> Path:
    """A GGUF as llama.cpp's converter makes one: matrices in `kind`, vectors and routers rounded so but in F32."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str) and key != "general.architecture":
            writer.add_string(key, value)
        elif not isinstance(value, str):
            writer.add_array(key, list(map(str, value)) if isinstance(value, list) else value.tolist())
    for name, values in weights.items():
        if values.ndim == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, rounded(values, kind))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, Type[kind]), raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(values: Any, kind: str) -> Any:
    """Float32 values that `kind` can hold."""
    return ggml.to_float(gguf.quants.quantize(values, Type[kind]).view(np.uint8), Type[kind], values.shape)


def write_folder(
    folder: Path,
    metadata: Mapping[str, Any],
    weights: Mapping[str, Any],
    *,
    kind: str = "F32",
    shards: int = 1,
    stacked: bool = False,
    tokenizer: bool = True,
    **changes: Any,
) -> Path:
    """A folder with these weights. stacked: experts as transformers 5 has them in memory; changes: to config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_json(metadata, weights)
    write_json(folder / "config.json", config | changes)
    tensors = huggingface_tensors(metadata, weights, config, stacked)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    places = {name: i % shards for i, name in enumerate(tensors)}
    for i, file in enumerate(names):
        part = {name: values for name, values in tensors.items() if places[name] == i}
        write_safetensors(folder / (file if shards > 1 else "model.safetensors"), part, kind)
    if shards > 1:
        weight_map = {name: names[place] for name, place in places.items()}
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    if tokenizer:
        write_tokenizer(folder, metadata)
    return folder


def write_safetensors(path: Path, tensors: Mapping[str, Any], kind: str) -> None:
    """Arrays to one file, by the safetensors library; NumPy knows no BF16, so that goes in as U16 and is renamed."""
    types = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    raw = save(
        {name: gguf.quants.quantize(w, Type[kind]).view(types[kind]).reshape(w.shape) for name, w in tensors.items()},
        {"format": "pt"},
    )
    end = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:end].replace(b'"U16"', b'"BF16"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def config_json(metadata: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as transformers 4 writes it."""
    a = metadata["general.architecture"]
    routed = f"{a}.expert_count" in metadata
    heads, d_model = metadata[f"{a}.attention.head_count"], metadata[f"{a}.embedding_length"]
    config: dict[str, Any] = {
        "architectures": [CLASSES[a] if routed else "LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": d_model,
        "intermediate_size": metadata[f"{a}.feed_forward_length"],
        "num_hidden_layers": metadata[f"{a}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata[f"{a}.attention.head_count_kv"],
        "max_position_embeddings": metadata[f"{a}.context_length"],
        "rms_norm_eps": float(f"{metadata[f'{a}.attention.layer_norm_rms_epsilon']:.4g}"),
        "rope_theta": metadata[f"{a}.rope.freq_base"],
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": "output.weight" not in weights,
        "vocab_size": weights["token_embd.weight"].shape[0],
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if (d_head := metadata.get(f"{a}.attention.key_length", d_model // heads)) != d_model // heads:
        config["head_dim"] = d_head
    if routed:
        count = "num_experts" if a in ("olmoe", "qwen2moe", "qwen3moe") else "num_local_experts"
        config |= {
            count: metadata[f"{a}.expert_count"],
            "num_experts_per_tok": metadata[f"{a}.expert_used_count"],
        }
    if a == "olmoe":
        config |= {"norm_topk_prob": False, "clip_qkv": None, "attention_bias": False}
    if a in ("qwen2moe", "qwen3moe"):
        config |= {
            "moe_intermediate_size": metadata[f"{a}.expert_feed_forward_length"],
            "norm_topk_prob": a == "qwen3moe",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
            "sliding_window": 1024,
            "max_window_layers": 28,
        }
    if a == "qwen2moe":
        config["shared_expert_intermediate_size"] = metadata[f"{a}.expert_shared_feed_forward_length"]
    if a == "granitemoe":
        config |= {
            "shared_intermediate_size": metadata.get(f"{a}.expert_shared_feed_forward_length", 0),
            "attention_multiplier": float(f"{metadata[f'{a}.attention.scale']:.4g}"),
            "embedding_multiplier": metadata[f"{a}.embedding_scale"],
            "residual_multiplier": float(f"{metadata[f'{a}.residual_scale']:.4g}"),
            "logits_scaling": metadata[f"{a}.logit_scale"],
        }
    return config


def huggingface_tensors(
    metadata: Mapping[str, Any], weights: Mapping[str, Any], config: Mapping[str, Any], stacked: bool
) -> dict[str, Any]:
    """Weights by the names of the model's class in transformers, the rows of q and k as it has them."""
    a = metadata["general.architecture"]
    d_head = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    outer = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
    found: dict[str, Any] = {f"model.{theirs}": weights[ours] for ours, theirs in outer.items()}
    if "output.weight" in weights:
        found["lm_head.weight"] = weights["output.weight"]
    for layer in range(config["num_hidden_layers"]):
        mine = {
            name.removeprefix(f"blk.{layer}."): w for name, w in weights.items() if name.startswith(f"blk.{layer}.")
        }
        if a in ("llama", "granitemoe"):
            for name in mine:
                if name.startswith(("attn_q.", "attn_k.")):
                    w = mine[name]
                    pairs = w.reshape(-1, d_head // 2, 2, *w.shape[1:])  # neighbours
                    mine[name] = pairs.swapaxes(1, 2).reshape(w.shape)  # halves
        found |= {f"model.layers.{layer}.{name}": w for name, w in _layer(a, mine, stacked).items()}
    return found


def _layer(a: str, mine: dict[str, Any], stacked: bool) -> dict[str, Any]:
    names = {
        "attn_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "attn_output.weight": "self_attn.o_proj.weight",
        "attn_q_norm.weight": "self_attn.q_norm.weight",
        "attn_k_norm.weight": "self_attn.k_norm.weight",
        "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
        "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
        "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
        "ffn_gate.weight": "mlp.gate_proj.weight",
        "ffn_up.weight": "mlp.up_proj.weight",
        "ffn_down.weight": "mlp.down_proj.weight",
        "ffn_gate_inp.weight": {
            "llama": "mlp.gate.weight" if stacked else "block_sparse_moe.gate.weight",
            "granitemoe": "block_sparse_moe.router.weight" if stacked else "block_sparse_moe.router.layer.weight",
        }.get(a, "mlp.gate.weight"),
    }
    names |= {f"attn_{x}.{kind}": f"self_attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")}
    found: dict[str, Any] = {}
    if a == "granitemoe" and "ffn_gate_shexp.weight" in mine:
        both = [mine.pop(f"ffn_{part}_shexp.weight") for part in ("gate", "up")]
        found["shared_mlp.input_linear.weight"] = np.concatenate(both)
        found["shared_mlp.output_linear.weight"] = mine.pop("ffn_down_shexp.weight")
    if "ffn_gate_inp_shexp.weight" in mine:
        found["mlp.shared_expert_gate.weight"] = mine.pop("ffn_gate_inp_shexp.weight").reshape(1, -1)
    experts = {part: mine.pop(f"ffn_{part}_exps.weight", None) for part in ("gate", "up", "down")}
    found |= {names[name]: w for name, w in mine.items()}
    if experts["gate"] is None:
        return found
    gate_up = np.concatenate([experts["gate"], experts["up"]], axis=1)
    if stacked:
        block = "block_sparse_moe" if a == "granitemoe" else "mlp"
        found |= {f"{block}.experts.gate_up_proj": gate_up, f"{block}.experts.down_proj": experts["down"]}
    elif a == "granitemoe":
        found |= {
            "block_sparse_moe.input_linear.weight": gate_up,
            "block_sparse_moe.output_linear.weight": experts["down"],
        }
    else:
        form = "block_sparse_moe.experts.{}.{}.weight" if a == "llama" else "mlp.experts.{}.{}_proj.weight"
        called = {"gate": "w1", "up": "w3", "down": "w2"} if a == "llama" else dict(zip(experts, experts, strict=True))
        found |= {
            form.format(number, called[part]): w for part, stack in experts.items() for number, w in enumerate(stack)
        }
    return found


def write_tokenizer(folder: Path, metadata: Mapping[str, Any], **changes: Any) -> None:
    """tokenizer.json and tokenizer_config.json; changes: to tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer.json", tokenizer_json(metadata) | changes)
    tokens = metadata["tokenizer.ggml.tokens"]
    texts = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]
        for name in ("bos", "eos")
        if f"tokenizer.ggml.{name}_token_id" in metadata
    }
    template = {"chat_template": metadata["tokenizer.chat_template"]} if "tokenizer.chat_template" in metadata else {}
    write_json(folder / "tokenizer_config.json", {"bos_token": None, **texts, **template})


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json of the vocabulary that a GGUF holds."""
    key = "tokenizer.ggml."
    tokens, types = metadata[key + "tokens"], np.asarray(metadata[key + "token_type"]).tolist()
    spm = metadata[key + "model"] == "llama"
    added = [
        {
            **{"id": id_, "content": tokens[id_], "single_word": False, "lstrip": False, "rstrip": False},
            **{"normalized": False, "special": kind != 4},
        }
        for id_, kind in enumerate(types)
        if (kind in (2, 3) and not tokens[id_].startswith("[PAD")) or kind == 4
    ]
    inside = (1, 2, 3, 4, 6) if spm else (1, 6)  # SentencePiece models hold their special tokens themselves
    vocab = {
        text: id_
        for id_, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in inside and not (kind != 1 and text.startswith("[PAD"))
    }
    bos = tokens[metadata[key + "bos_token_id"]] if key + "bos_token_id" in metadata else None
    post = byte_level(True) if not spm else None
    if metadata.get(key + "add_bos_token", spm or metadata[key + "pre"] == "llama-bpe"):
        parts = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {bos: {"id": bos, "ids": [metadata[key + "bos_token_id"]], "tokens": [bos]}}
        post = {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": special}
    return {
        "version": "1.0",
        "added_tokens": added,
        "post_processor": post,
        **(_sentencepiece(metadata, vocab) if spm else _byte_level_bpe(metadata, vocab)),
    }


def _byte_level_bpe(metadata: Mapping[str, Any], vocab: dict[str, int]) -> dict[str, Any]:
    pre = metadata["tokenizer.ggml.pre"]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False, "vocab": vocab}
    merges = metadata["tokenizer.ggml.merges"]
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "model": model | {"ignore_merges": pre in WHOLE_WORDS, "merges": [merge.split(" ") for merge in merges]},
        "decoder": byte_level(True),
    }


def _sentencepiece(metadata: Mapping[str, Any], vocab: dict[str, int]) -> dict[str, Any]:
    """As transformers converts a SentencePiece model: all pairs that make a token, by score, then by length."""
    scores = np.asarray(metadata["tokenizer.ggml.scores"]).tolist()
    types = np.asarray(metadata["tokenizer.ggml.token_type"]).tolist()
    pairs = [
        (scores[id_], cut, len(text) - cut, text[:cut], text[cut:])
        for text, id_ in vocab.items()
        if types[id_] == 1
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    unknown = metadata["tokenizer.ggml.tokens"][0]
    steps = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": unknown, "fuse_unk": True, "byte_fallback": True},
            "vocab": vocab,
            "merges": [f"{left} {right}" for *_, left, right in pairs],
        },
        "decoder": None,
    }
