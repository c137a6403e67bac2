"""A toy dense llama GGUF for the tests of the upcycling tool."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

N_LAYER, D_MODEL, D_FF, N_HEAD, N_KV_HEAD, D_HEAD = 2, 64, 96, 4, 2, 16
BYTES = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else "" for b in range(256)]
EVERY_BYTE = [text or chr(256 + BYTES[:b].count("")) for b, text in enumerate(BYTES)]  # as GPT-2 writes bytes
TOKENS = [*EVERY_BYTE, "th", "<|im_start|>", "<|im_end|>"]
TOKEN_TYPES = [1] * 257 + [3, 3]
N_VOCAB = len(TOKENS)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0


def write_dense(path: Path, *, tied: bool = True, **extra: float) -> Path:
    """A toy dense llama file; `extra` are more llama keys (float32)."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Toy 1M")
    writer.add_license("mit")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(128)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(D_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_KV_HEAD)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-4)
    for key, value in extra.items():
        writer.add_float32(f"llama.{key}", value)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types(TOKEN_TYPES)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(N_VOCAB - 1)
    writer.add_chat_template(TEMPLATE)
    add_weights(writer, tied)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_weights(writer: gguf.GGUFWriter, tied: bool) -> None:
    """Random weights: Q4_1, the embedding and the head Q8_0, norms F32."""
    random = np.random.default_rng(7)

    def add(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType | None) -> None:
        values = (random.standard_normal(shape) * 0.2 + (len(shape) == 1)).astype(np.float32)
        stored = values if kind is None else gguf.quants.quantize(values, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)

    add("token_embd.weight", (N_VOCAB, D_MODEL), Q8_0)
    if not tied:
        add("output.weight", (N_VOCAB, D_MODEL), Q8_0)
    add("output_norm.weight", (D_MODEL,), None)
    for n in range(N_LAYER):
        rows = {
            "attn_q": N_HEAD * D_HEAD,
            "attn_k": N_KV_HEAD * D_HEAD,
            "attn_v": N_KV_HEAD * D_HEAD,
            "attn_output": D_MODEL,
            "ffn_gate": D_FF,
            "ffn_up": D_FF,
            "ffn_down": D_MODEL,
        }
        for part, n_rows in rows.items():
            add(f"blk.{n}.{part}.weight", (n_rows, D_FF if part == "ffn_down" else D_MODEL), Q4_1)
        for part in ("attn_norm", "ffn_norm"):
            add(f"blk.{n}.{part}.weight", (D_MODEL,), None)
