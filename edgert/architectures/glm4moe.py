"""glm4moe: GLM-4.5, GLM-4.6 and GLM-4.5-Air by Z.ai."""

from __future__ import annotations

from edgert.architectures.keys import Keys
from edgert.types import ModelConfig

NAMES = {"ffn_norm.weight": "post_attention_norm.weight"}
OPTIONAL = frozenset({"attn_q_norm.weight", "attn_k_norm.weight"})


def config(keys: Keys) -> ModelConfig:
    """Half of each head rotated; sigmoid routing with biases; the last layers, which predict further, are not run."""
    common, width = keys.common(unused_layers=True), keys.integer("expert_feed_forward_length")
    keys.ignore("rope.dimension_sections")  # for text, whose positions are all equal, it is the same rotation
    return ModelConfig(
        **common,
        rope=keys.rope("neox", common["d_head"]),
        router=keys.router(normalise=None, gating=2, gatings=(1, 2), scaled=True, biased=True),
        d_expert=width,
        d_shared=width * keys.integer("expert_shared_count", 0, least=0),
        d_dense=keys.integer("feed_forward_length"),
        layers=keys.dense_layers(common["n_layers"]),
        qk_norm="head",
    )
