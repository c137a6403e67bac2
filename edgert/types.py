"""The one vocabulary in which every architecture is described, and the routes of tokens to experts.

Frozen dataclasses; sizes count elements unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    kind: "norm" turns pairs (2i, 2i + 1), "neox" pairs (i, i + n/2). n_rotated: dimensions of a head that turn.
    scaling: "none", "linear" (angle / factor) or "yarn". magnitude multiplies cos and sin.
    """

    kind: Literal["norm", "neox"]
    n_rotated: int
    base: float = 10000.0
    scaling: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0
    original_context: int = 0
    magnitude: float = 1.0


@dataclass(frozen=True)
class RouterConfig:
    """How a token chooses its experts: score, take the top_k best (ties: lower id first), weight by their scores."""

    n_expert: int
    top_k: int
    gating: Literal["softmax", "sigmoid"] = "softmax"  # over all experts, before the choice
    normalise: bool = True  # divide the chosen weights by their sum
    scale: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape and multipliers."""

    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int  # of queries and keys
    d_value: int
    n_vocab: int
    n_context: int  # positions the model was made for
    eps: float
    rope: RopeConfig
    router: RouterConfig | None  # None: every layer is dense
    d_expert: int = 0  # width of a routed expert
    d_shared: int = 0  # width of the shared expert, or of the dense network where there is no router; 0: none
    shared_gate: bool = False  # a sigmoid gate on the shared expert's output
    activation: Literal["silu", "gelu", "swiglu-oss"] = "silu"  # of the gated units
    qk_norm: Literal["none", "head", "vector"] = "none"
    attention_scale: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0  # logits are multiplied by this


@dataclass(frozen=True)
class Routes:
    """Where tokens go: ids and weights are (n_tokens, top_k), best first; order sorts each row by ascending id."""

    ids: Ids
    weights: Floats
    order: Ids = field(repr=False)

    @property
    def n_tokens(self) -> int:
        """Tokens routed."""
        return self.ids.shape[0]
