"""ernie4_5-moe: ERNIE 4.5 by Baidu."""

from __future__ import annotations

from dataclasses import replace

from edgert.architectures.keys import Keys
from edgert.types import ModelConfig

ARCHITECTURE = "ernie4_5-moe"
OPTIONAL = frozenset({"exp_probs_b.bias"})


def config(keys: Keys) -> ModelConfig:
    """Softmax, with biases for the choice; experts in every layer, or every few, after the dense ones."""
    common, step = keys.common(), keys.integer("interleave_moe_layer_step")
    keys.ignore("expert_shared_count")
    layers = keys.dense_layers(common["n_layers"])
    return ModelConfig(
        **common,
        rope=keys.rope("norm", common["d_head"]),
        router=keys.router(normalise=True, biased=True),
        d_expert=keys.integer("expert_feed_forward_length"),
        d_shared=keys.integer("expert_shared_feed_forward_length", 0, least=0),
        d_dense=keys.integer("feed_forward_length"),
        layers=tuple(
            replace(layer, routed=layer.routed and (index + 1) % step == 0) for index, layer in enumerate(layers)
        ),
    )
