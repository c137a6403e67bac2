"""gpt-oss: gpt-oss-20b and gpt-oss-120b by OpenAI."""

from __future__ import annotations

from edgert.architectures.keys import Keys
from edgert.types import LayerConfig, ModelConfig

NAMES = {"ffn_norm.weight": "post_attention_norm.weight"}


def config(keys: Keys) -> ModelConfig:
    """Sinks; every other layer sees a window of positions; biases everywhere; a gated unit of its own."""
    common, window = keys.common(), keys.integer("attention.sliding_window")
    return ModelConfig(
        **common,
        rope=keys.rope("neox", common["d_head"]),
        router=keys.router(normalise=False, gating=3, gatings=(3,)),
        d_expert=keys.integer("expert_feed_forward_length"),
        layers=tuple(LayerConfig(window=0 if index % 2 else window) for index in keys.each_layer(common["n_layers"])),
        activation="swiglu-oss",
        sinks=True,
        expert_bias=True,
    )
