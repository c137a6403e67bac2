"""bailingmoe2: Ling 2.0 and Ring 2.0 by inclusionAI."""

from __future__ import annotations

from edgert.architectures.keys import Keys
from edgert.types import ModelConfig

OPTIONAL = frozenset({"exp_probs_b.bias"})


def config(keys: Keys) -> ModelConfig:
    """Part of each head rotated, q and k normed before; experts in groups, with biases for the choice."""
    common, width = keys.common(unused_layers=True), keys.integer("expert_feed_forward_length")
    shared = keys.integer("expert_shared_feed_forward_length", 0, least=0) or width
    keys.integer("expert_gating_func")  # required
    return ModelConfig(
        **common,
        rope=keys.rope("neox", common["d_head"]),
        router=keys.router(normalise=None, gatings=(1, 2), scaled=True, biased=True),
        d_expert=width,
        d_shared=shared * keys.integer("expert_shared_count", 0, least=0),
        d_dense=keys.integer("feed_forward_length"),
        layers=keys.dense_layers(common["n_layers"]),
        qk_norm="head",
    )
