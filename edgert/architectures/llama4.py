"""llama4: Llama 4 Scout and Maverick by Meta, text only."""

from __future__ import annotations

from dataclasses import replace

from edgert.architectures.keys import Keys
from edgert.types import LayerConfig, ModelConfig

_SPAN = 8192  # positions that attend to each other in the layers that rotate; also the step of the temperature
_NORMLESS = 128  # Maverick, known by its number of experts, does not norm q and k


def config(keys: Keys) -> ModelConfig:
    """One expert a token, whose weight multiplies its input; every fourth layer sees all positions, unrotated.

    The other layers rotate, then norm q and k without weights, and see only their own stretch of positions.
    """
    common, width = keys.common(), keys.integer("expert_feed_forward_length")
    window = "attention.sliding_window"  # which says by 0 that all layers see everything, and nothing else
    if keys.has(window) and not keys.integer(window, least=0):
        raise keys.unsupported(window, 0, f"a model whose layers see {_SPAN} positions, by another number or no key")
    step, n_layers = keys.integer("interleave_moe_layer_step"), common["n_layers"]
    keys.ignore("expert_shared_count")
    router = keys.router(normalise=False, gating=2, gatings=(2,))
    layers = []
    for index in keys.each_layer(n_layers):
        routed = (index + 1) % step == 0
        if (index + 1) % 4:
            layers.append(LayerConfig(routed=routed, span=_SPAN))
        else:
            layers.append(LayerConfig(routed=routed, rotates=False, normed=False, tempered=True))
    return ModelConfig(
        **common,
        rope=keys.rope("norm", common["d_head"]),
        router=replace(router, late=True, on_inputs=True),
        d_expert=width,
        d_shared=width,
        d_dense=keys.integer("feed_forward_length"),
        layers=tuple(layers),
        qk_norm="none" if router.n_expert == _NORMLESS else "unit",
        norm_late=True,
        temperature=(0.1, _SPAN),
    )
