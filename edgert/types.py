"""The one vocabulary in which every architecture is described, and the routes of tokens to experts.

Frozen dataclasses; sizes count elements unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
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


@dataclass(kw_only=True)
class ExpertCounts:
    """What was done to have experts at hand. The difference of two is what was done in between."""

    expert_hits: int = 0  # experts used, each counted once a layer and chunk, that were in RAM
    expert_misses: int = 0  # and that were not, or not yet
    bytes_read: int = 0  # of experts, from flash
    flash_wait_s: float = 0.0  # in which the arithmetic waited for flash
    flash_busy_s: float = 0.0  # in which flash was read
    prefetch_useful: int = 0  # bytes read before they were asked for: there in time,
    prefetch_late: int = 0  # still on their way when they were asked for,
    prefetch_wasted: int = 0  # not needed,
    prefetch_evicted: int = 0  # given up before they could be

    @property
    def hit_rate(self) -> float | None:
        """Share of the experts used that were in RAM when they were asked for; None if none was used."""
        used = self.expert_hits + self.expert_misses
        return self.expert_hits / used if used else None

    def __sub__(self, before: ExpertCounts) -> ExpertCounts:
        names = [field.name for field in fields(ExpertCounts)]
        return ExpertCounts(**{name: getattr(self, name) - getattr(before, name) for name in names})

    def __add__(self, other: ExpertCounts) -> ExpertCounts:
        names = [field.name for field in fields(ExpertCounts)]
        return ExpertCounts(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def take(self, counts: ExpertCounts) -> None:
        """Make these the counts."""
        for one in fields(ExpertCounts):
            setattr(self, one.name, getattr(counts, one.name))


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
