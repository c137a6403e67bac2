"""granitemoe: Granite 3 MoE by IBM, with or without a shared expert; also edgert's embedded model."""

from __future__ import annotations

from edgert.architectures.keys import Keys
from edgert.types import ModelConfig


def config(keys: Keys) -> ModelConfig:
    """Four multipliers: embedding, residual, attention, and a divisor of the logits.

    `rope.scaling.finetuned`, if false, means here that nothing is rotated.
    """
    common = keys.common()
    common["attention_scale"] = keys.multiplier("attention.scale", common["attention_scale"])
    return ModelConfig(
        **common,
        rope=keys.rope("norm", common["d_head"], rotates=keys.boolean("rope.scaling.finetuned", True)),
        router=keys.router(normalise=True),
        d_expert=keys.integer("feed_forward_length"),
        d_shared=keys.integer("expert_shared_feed_forward_length", 0, least=0),
        embedding_scale=keys.multiplier("embedding_scale", 1.0),
        residual_scale=keys.multiplier("residual_scale", 1.0),
        logit_scale=1.0 / keys.positive("logit_scale"),
    )
