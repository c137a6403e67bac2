"""olmoe: OLMoE by Ai2."""

from __future__ import annotations

from edgert.architectures.keys import Keys
from edgert.types import ModelConfig


def config(keys: Keys) -> ModelConfig:
    """q and k normed over the whole projected vector before the rotation; expert weights not normalised."""
    common = keys.common()
    return ModelConfig(
        **common,
        rope=keys.rope("neox", common["d_head"]),
        router=keys.router(normalise=False),
        d_expert=keys.integer("feed_forward_length"),
        qk_norm="vector",
    )
