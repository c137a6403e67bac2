"""lfm2moe: LFM2-8B-A1B and its family by Liquid AI."""

from __future__ import annotations

from dataclasses import replace

from edgert.architectures.keys import Keys
from edgert.types import ModelConfig

NAMES = {"output_norm.weight": "token_embd_norm.weight"}


def config(keys: Keys) -> ModelConfig:
    """Short convolutions in most layers, attention where attention.head_count_kv is above 0; sigmoid routing."""
    heads = keys.integers("attention.head_count_kv", len(keys.each_layer(keys.integer("block_count"))))
    attending = {n for n in heads if n}
    if len(attending) != 1:
        raise keys.unsupported("attention.head_count_kv", sorted(attending), "one number in all layers that attend")
    common = keys.common(n_kv_heads=attending.pop())
    layers = zip(keys.dense_layers(common["n_layers"]), heads, strict=True)
    return ModelConfig(
        **common,
        rope=keys.rope("neox", common["d_head"]),
        router=keys.router(normalise=True, gating=2, gatings=(2,), biased=True),
        d_expert=keys.integer("expert_feed_forward_length"),
        d_dense=keys.integer("feed_forward_length"),
        layers=tuple(layer if n else replace(layer, mixer="convolution") for layer, n in layers),
        n_taps=keys.integer("shortconv.l_cache", least=2),
        qk_norm="head",
    )
