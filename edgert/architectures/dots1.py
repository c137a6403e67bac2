"""dots1: dots.llm1 by rednote."""

from __future__ import annotations

from edgert.architectures.keys import Keys
from edgert.types import ModelConfig

OPTIONAL = frozenset({"exp_probs_b.bias"})


def config(keys: Keys) -> ModelConfig:
    """q and k normed per head before the rotation; dense layers first; shared experts as one wide one, not gated."""
    common, width = keys.common(), keys.integer("expert_feed_forward_length")
    keys.integer("expert_gating_func")  # required
    return ModelConfig(
        **common,
        rope=keys.rope("neox", common["d_head"]),
        router=keys.router(normalise=None, gatings=(1, 2), scaled=True, biased=True),
        d_expert=width,
        d_shared=width * keys.integer("expert_shared_count", 0, least=0),
        d_dense=keys.integer("feed_forward_length"),
        layers=keys.dense_layers(common["n_layers"]),
        qk_norm="head",
    )
