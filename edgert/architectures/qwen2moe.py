"""qwen2moe: Qwen1.5-MoE and Qwen2-MoE."""

from __future__ import annotations

from edgert.architectures.keys import Keys
from edgert.types import ModelConfig


def config(keys: Keys) -> ModelConfig:
    """q/k/v biases; a shared expert behind a sigmoid gate; expert weights not normalised."""
    common, router = keys.common(), keys.router(normalise=False)
    return ModelConfig(
        **common,
        rope=keys.rope("neox", common["d_head"]),
        router=router,
        d_expert=keys.expert_width(router),
        d_shared=keys.integer("expert_shared_feed_forward_length", 0, least=0) or keys.integer("feed_forward_length"),
        shared_gate=True,
    )
