"""hunyuan-moe: Hunyuan-A13B by Tencent."""

from __future__ import annotations

from edgert.architectures.keys import Keys
from edgert.types import ModelConfig


def config(keys: Keys) -> ModelConfig:
    """q and k normed per head after the rotation; expert width is feed_forward_length; a shared expert, ungated."""
    common, width = keys.common(), keys.integer("feed_forward_length")
    keys.ignore("expert_shared_count")
    return ModelConfig(
        **common,
        rope=keys.rope("neox", common["d_head"]),
        router=keys.router(normalise=True),
        d_expert=width,
        d_shared=keys.integer("expert_shared_feed_forward_length", 0, least=0) or width,
        qk_norm="head",
        norm_late=True,
    )
