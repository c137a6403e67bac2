"""Write a GGUF of gpt-oss-20b's or DeepSeek-V2-Lite's real shape with random weights: to measure speed, not answers.

python tools/real_shapes.py gpt-oss-20b|deepseek-v2-lite OUT.gguf [--layers N] [--seed 1]

Names, types and sizes are those of the public files (MXFP4 with Q8_0; Q4_K_M, whose rows of 1408 fall back to Q5_0 and
Q8_0), and so are the number of tokens and merges; the words are made up. Bits of blocks are drawn, not quantised.
Rows of the router differ in length, so that some experts are used more than others: over a hundred random tokens as
many as if 24 of 32 (20 to 29, by layer) or 37 of 64 (26 to 54) were used evenly, the exponential of the entropy, and
16 to 34 % and 13 to 35 % of a token's experts were the last one's. Real models: 58 to 64 % of all as if evenly. 12 GB
take a minute or two and 200 MB of memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, TokenType
from gguf import GGMLQuantizationType as Type
from random_blocks import random_blocks

from edgert.errors import EdgertError, OptionError
from edgert.preset_keys import KEY_PRESETS

Keys = Mapping[str, Any]
_AT_A_TIME = 32 << 20  # bytes that are drawn at once
_ALIGNMENT = 32  # of a tensor, GGUF's default
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


# ---- tensors ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tensor:
    """One tensor: its shape, slowest dimension first, and the mean and standard deviation of what is in it."""

    name: str
    shape: tuple[int, ...]
    type: Type
    spread: float
    mean: float = 0.0
    skew: float = 0.0  # of the logarithm of its rows' lengths

    @property
    def n_bytes(self) -> int:
        """Of the tensor as it is stored."""
        in_block, block_bytes = GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // in_block * block_bytes

    def pieces(self, random: np.random.Generator) -> Iterator[npt.NDArray[Any]]:
        """Its bytes in order."""
        if self.type == Type.F32:
            values = self.mean + self.spread * random.standard_normal(self.shape, np.float32)
            lengths = np.exp(self.skew * random.standard_normal((*self.shape[:-1], 1), np.float32))
            yield (values * lengths).astype(np.float32)
            return
        block_bytes = GGML_QUANT_SIZES[self.type][1]
        left = self.n_bytes // block_bytes
        while left:
            n = min(left, _AT_A_TIME // block_bytes)
            yield random_blocks(self.type, random, n, self.spread)
            left -= n


def _matrix(name: str, *shape: int, type: Type, gain: float = 1.0) -> Tensor:
    """A matrix that makes of inputs of variance 1 outputs of variance gain ** 2."""
    return Tensor(f"{name}.weight", shape, type, gain * shape[-1] ** -0.5)


def _vector(name: str, *shape: int, mean: float = 0.0, spread: float = 0.05) -> Tensor:
    return Tensor(name, shape, Type.F32, spread, mean)


def _norm(name: str, n: int) -> Tensor:
    return _vector(f"{name}.weight", n, mean=1.0, spread=0.1)


def _router(at: str, n_expert: int, d_model: int) -> Tensor:
    """Logits vary by about 1.5 from token to token; which experts win more often is by the lengths of their rows."""
    return Tensor(f"{at}ffn_gate_inp.weight", (n_expert, d_model), Type.F32, 1.5 * d_model**-0.5, skew=0.25)


def gpt_oss(keys: Keys, layer: int) -> Iterator[Tensor]:
    """Tensors of a layer of gpt-oss."""
    d, f, e = keys["embedding_length"], keys["expert_feed_forward_length"], keys["expert_count"]
    head, heads, at = keys["attention.key_length"], keys["attention.head_count"], f"blk.{layer}."
    rows = {"q": heads * head, "k": keys["attention.head_count_kv"] * head, "v": keys["attention.head_count_kv"] * head}
    yield _norm(f"{at}attn_norm", d)
    for name, n in rows.items():
        yield _matrix(f"{at}attn_{name}", n, d, type=Type.Q8_0)
        yield _vector(f"{at}attn_{name}.bias", n)
    yield _matrix(f"{at}attn_output", d, heads * head, type=Type.Q8_0)
    yield _vector(f"{at}attn_output.bias", d)
    yield _vector(f"{at}attn_sinks.weight", heads, spread=1.0)
    yield _norm(f"{at}post_attention_norm", d)
    yield _router(at, e, d)
    yield _vector(f"{at}ffn_gate_inp.bias", e)
    for name, n_out, n_in in (("gate", f, d), ("up", f, d), ("down", d, f)):
        yield _matrix(f"{at}ffn_{name}_exps", e, n_out, n_in, type=Type.MXFP4)
        yield _vector(f"{at}ffn_{name}_exps.bias", e, n_out)


def deepseek2(keys: Keys, layer: int) -> Iterator[Tensor]:
    """Tensors of a layer of DeepSeek-V2-Lite, with attention in the absorbed form that files have since 2025."""
    d, heads, rank = keys["embedding_length"], keys["attention.head_count"], keys["attention.kv_lora_rank"]
    rotated, d_key, d_out = (
        keys[key] for key in ("rope.dimension_count", "attention.key_length_mla", "attention.value_length_mla")
    )
    at, low = f"blk.{layer}.", Type.Q4_K
    down = _of_down(layer, keys["block_count"])
    yield _norm(f"{at}attn_norm", d)
    yield _matrix(f"{at}attn_q", heads * d_key, d, type=low)
    yield _matrix(f"{at}attn_kv_a_mqa", rank + rotated, d, type=low)
    yield _norm(f"{at}attn_kv_a_norm", rank)
    plain = d_key - rotated
    # not by its own rows: a key is the product of the transposed matrix with the latent vector
    yield Tensor(f"{at}attn_k_b.weight", (heads, rank, plain), _fitting(low, plain), rank**-0.5)
    yield _matrix(f"{at}attn_v_b", heads, d_out, rank, type=low)
    yield _matrix(f"{at}attn_output", d, heads * d_out, type=low)
    yield _norm(f"{at}ffn_norm", d)
    if layer < keys["leading_dense_block_count"]:
        yield from _gated(f"{at}ffn_{{}}", (), keys["feed_forward_length"], d, down)
        return
    e, f = keys["expert_count"], keys["expert_feed_forward_length"]
    yield _router(at, e, d)
    yield from _gated(f"{at}ffn_{{}}_exps", (e,), f, d, down)
    yield from _gated(f"{at}ffn_{{}}_shexp", (), f * keys["expert_shared_count"], d, down)


def _gated(name: str, stack: tuple[int, ...], f: int, d: int, down: Type) -> Iterator[Tensor]:
    for part, n_out, n_in, kind in (("gate", f, d, Type.Q4_K), ("up", f, d, Type.Q4_K), ("down", d, f, down)):
        yield _matrix(name.format(part), *stack, n_out, n_in, type=_fitting(kind, n_in))


def _of_down(layer: int, n_layers: int) -> Type:
    """The type of a layer's down projections in a Q4_K_M: more bits in the first and last eighth, and every third."""
    eighth = n_layers // 8
    more = layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
    return Type.Q6_K if more else Type.Q4_K


def _fitting(kind: Type, n_in: int) -> Type:
    """What llama-quantize takes instead of a K-quant whose blocks of 256 do not fit into a row."""
    return {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}[kind] if n_in % 256 else kind


# ---- models ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    """A model: the keys that its preset does not have, its tensors, its vocabulary."""

    keys: Keys
    layer: Callable[[Keys, int], Iterator[Tensor]]
    embedding: Type
    head: Type
    pre_tokenizer: str
    n_words: int  # tokens that text is made of; control tokens follow
    n_merges: int
    bos: int
    eos: int
    add_bos: bool

    def tensors(self, keys: Keys) -> Iterator[Tensor]:
        """All of them, in the order of the file. The head's logits vary by 3."""
        n, d = keys["vocab_size"], keys["embedding_length"]
        yield Tensor("token_embd.weight", (n, d), self.embedding, 1.0)
        for layer in range(keys["block_count"]):
            yield from self.layer(keys, layer)
        yield _norm("output_norm", d)
        yield _matrix("output", n, d, type=self.head, gain=3.0)


_YARN = {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 4096}
SHAPES = {
    "gpt-oss-20b": Shape(
        {**_YARN, "rope.scaling.factor": 32.0},
        gpt_oss,
        embedding=Type.Q8_0,
        head=Type.Q8_0,
        pre_tokenizer="gpt-4o",
        n_words=199998,
        n_merges=446189,
        bos=199998,
        eos=200002,
        add_bos=False,
    ),
    "deepseek-v2-lite": Shape(
        {
            **_YARN,
            "rope.scaling.factor": 40.0,
            "rope.scaling.yarn_log_multiplier": 0.0707,
            "rope.freq_base": 10000.0,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.q_lora_rank": 0,  # llama.cpp asks for it where there are not 26 or 27 layers
            "expert_gating_func": 1,
            "expert_weights_norm": False,
            "expert_weights_scale": 1.0,
        },
        deepseek2,
        embedding=Type.Q4_K,
        head=Type.Q6_K,
        pre_tokenizer="deepseek-llm",
        n_words=100000,
        n_merges=99757,
        bos=100000,
        eos=100001,
        add_bos=True,
    ),
}


def keys_of(name: str, **changed: Any) -> dict[str, Any]:
    """A model's keys, without their prefix."""
    return {**KEY_PRESETS[name].keys, **SHAPES[name].keys, **changed}


# ---- the file --------------------------------------------------------------------------------------------------------
def write(name: str, out: Path, keys: Keys, seed: int = 1) -> int:
    """Write `out`, aside first; its bytes. OSError, OptionError where the drive has too little room."""
    shape, aside = SHAPES[name], out.with_name(f"{out.name}.part")
    tensors = list(shape.tensors(keys))
    needed, free = sum(tensor.n_bytes for tensor in tensors), shutil.disk_usage(out.absolute().parent).free
    if needed > free:
        raise OptionError(f"{out}: {needed >> 20:,} MiB are needed, {free >> 20:,} MiB are free; or fewer --layers")
    random = np.random.Generator(np.random.SFC64(seed))
    try:
        _write_header(name, aside, keys, tensors)
        with aside.open("ab") as file:
            for tensor in tensors:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                for piece in tensor.pieces(random):
                    file.write(memoryview(piece).cast("B"))
            file.write(bytes(-file.tell() % _ALIGNMENT))
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    return out.stat().st_size


def _write_header(name: str, path: Path, keys: Keys, tensors: Sequence[Tensor]) -> None:
    """Everything before the first tensor."""
    preset = KEY_PRESETS[name]
    writer = gguf.GGUFWriter(path, preset.architecture)
    writer.add_name(f"{preset.title}'s shape, random weights")
    for key, value in keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{preset.architecture}.{key}", value)
    n_control = preset.keys["vocab_size"] - SHAPES[name].n_words
    n_tokens = keys["vocab_size"]
    _add_vocabulary(writer, SHAPES[name], n_tokens - min(n_control, n_tokens // 4), n_tokens)
    for tensor in tensors:
        unused = np.dtype(np.float16)  # the type is stated
        writer.add_tensor_info(tensor.name, tensor.shape, unused, tensor.n_bytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, shape: Shape, n_words: int, n_tokens: int) -> None:
    """Bytes, then words of two letters, of three and of four; control tokens at the end."""
    letters = _byte_letters()
    longer = chain.from_iterable(product(_LETTERS, repeat=length) for length in (2, 3, 4))
    words = letters + ["".join(word) for word in islice(longer, n_words - len(letters))]
    known = set(words)
    pairs = ((w[:at], w[at:]) for at in (-1, 1, 2) for w in words if len(w) > max(at, 1))
    merges = (f"{a} {b}" for a, b in dict.fromkeys(pairs) if a in known and b in known)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(shape.pre_tokenizer)
    writer.add_token_list(words + [f"<|control_{index}|>" for index in range(n_words, n_tokens)])
    writer.add_token_types([TokenType.NORMAL] * n_words + [TokenType.CONTROL] * (n_tokens - n_words))
    writer.add_token_merges(list(islice(merges, shape.n_merges)))
    writer.add_bos_token_id(n_words + shape.bos - shape.n_words)
    writer.add_eos_token_id(n_words + shape.eos - shape.n_words)
    writer.add_add_bos_token(shape.add_bos)


def _byte_letters() -> list[str]:
    """The letters that stand for the 256 bytes in byte-level vocabularies: GPT-2's, printable ones for themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=list(SHAPES))
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer than the model has")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    options = parser.parse_args(arguments)
    keys = keys_of(options.name)
    least, most = keys.get("leading_dense_block_count", 0) + 1, keys["block_count"]
    if options.layers is not None and not least <= options.layers <= most:
        parser.error(f"--layers {options.layers}: {options.name} has {most}, of which at least {least} are needed")
    return options


def main() -> int:
    """Write a model."""
    options = read_options()
    keys = keys_of(options.name, **({"block_count": options.layers} if options.layers else {}))
    try:
        n_bytes = write(options.name, options.out, keys, options.seed)
    except (EdgertError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(f"{options.out}: {keys['block_count']} layers, {n_bytes / 2**20:,.0f} MiB, seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
