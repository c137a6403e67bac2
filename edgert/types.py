"""The one vocabulary in which every architecture is described, and the routes of tokens to experts.

Frozen dataclasses; sizes count elements unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def _stated(config: Any) -> str:
    """A dataclass as text, without fields from `_later` on that are not used: what is kept under it stays found."""
    shown, later = [], False
    for one in fields(config):
        value, later = getattr(config, one.name), later or one.name == config._later
        if not later or value != one.default:
            shown.append(f"{one.name}={value!r}")
    return f"{type(config).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class RopeConfig:
    """Rotary position embedding.

    kind: "norm" turns pairs (2i, 2i + 1), "neox" pairs (i, i + n/2). n_rotated: dimensions of a head that turn.
    scaling: "none", "linear" (angle / factor) or "yarn". magnitude multiplies cos and sin, whatever the scaling.
    two_ranges: the file may have divisors for contexts up to original_context and others beyond, whatever the scaling.
    """

    kind: Literal["norm", "neox"]
    n_rotated: int
    base: float = 10000.0
    scaling: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0
    original_context: int = 0
    magnitude: float = 1.0
    two_ranges: bool = False

    _later: ClassVar[str] = "two_ranges"
    __repr__ = _stated


@dataclass(frozen=True, repr=False)
class RouterConfig:
    """How a token chooses its experts: score, take the top_k best (ties: lower id first), weight by their scores.

    A layer may have biases that are added to the scores for the choice alone. n_groups: experts lie in groups of equal
    size, of which the n_groups_used with the largest sum of their two best scores are chosen from. late: the choice is
    by the logits, and only the chosen ones go through the gating. on_inputs: an expert's weight multiplies what it
    takes, not what it gives.
    """

    n_expert: int
    top_k: int
    gating: Literal["softmax", "sigmoid"] = "softmax"  # over all experts, before the choice
    normalise: bool = True  # divide the chosen weights by their sum
    scale: float = 1.0
    n_groups: int = 1
    n_groups_used: int = 1
    biased: bool = False  # whether the model has biases for the choice
    late: bool = False
    on_inputs: bool = False

    _later: ClassVar[str] = "n_groups"
    __repr__ = _stated


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) with its matrices absorbed.

    What is cached of a token is one key for all heads, the rotated part and then the latent vector, which is its value
    too: in ModelConfig n_kv_heads is 1, d_value the length of the latent vector, d_head that and
    rope.n_rotated. A head's query has d_plain dimensions that are turned into d_value of them by a matrix of its own,
    and another matrix turns what it attended to into the d_output that it gives.
    """

    d_plain: int
    d_output: int
    query_rank: int = 0  # queries come through a normed vector of this length; 0: straight from the input


@dataclass(frozen=True)
class DeltaConfig:
    """Gated delta net (Yang et al. 2024, arXiv 2412.06464): a state of (d_state, d_state) for each value head.

    Before it, a causal convolution of n_taps over every channel of queries, keys and values. A value head h uses key
    head h // (n_value_heads / n_key_heads), or h % n_key_heads if they take turns.
    """

    n_key_heads: int
    n_value_heads: int
    d_state: int
    n_taps: int
    in_turn: bool = False

    @property
    def d_keys(self) -> int:
        """Channels of all keys, and of all queries."""
        return self.n_key_heads * self.d_state

    @property
    def d_values(self) -> int:
        """Channels of all values."""
        return self.n_value_heads * self.d_state

    @property
    def d_channels(self) -> int:
        """Channels of the convolution: queries, keys, values."""
        return 2 * self.d_keys + self.d_values


@dataclass(frozen=True)
class LayerConfig:
    """In what the layers of a model differ.

    mixer: what lets a token see those before it. routed: whether there are experts (where the model has a router), or
    one dense network. window: positions that a token attends to, its own the last; 0: all. span: it attends to those
    of its own stretch of so many positions; 0: all. rotates, normed: whether q and k are rotated, and normed where the
    model norms them. tempered: whether queries grow with their position, see ModelConfig.temperature.
    """

    mixer: Literal["attention", "convolution", "delta"] = "attention"
    routed: bool = True
    window: int = 0
    span: int = 0
    rotates: bool = True
    normed: bool = True
    tempered: bool = False


_ALIKE = LayerConfig()


@dataclass(frozen=True, repr=False)
class ModelConfig:
    """A model's shape and multipliers. Tensors that are not named here are those that every model has."""

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
    qk_norm: Literal["none", "head", "vector", "unit"] = "none"  # unit: of each head, without weights
    attention_scale: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0  # logits are multiplied by this
    layers: tuple[LayerConfig, ...] = ()  # of each layer; none: all are alike
    d_dense: int = 0  # width of the network of layers without experts, where others have them
    latent: LatentConfig | None = None  # latent attention
    delta: DeltaConfig | None = None  # of layers with a gated delta net
    n_taps: int = 0  # of layers with a short convolution
    norm_late: bool = False  # q and k are normed after the rotation
    query_gate: bool = False  # what a head attended to is multiplied with the sigmoid of a gate
    sinks: bool = False  # each head has one more score, to which no value belongs
    norm_bias: bool = False  # the norms of the residual stream add a bias, and so does the head
    expert_bias: bool = False  # the router and the experts' matrices add biases
    temperature: tuple[float, int] = (0.0, 1)  # (a, n): queries at p times 1 + a ln(floor((p + 1) / n) + 1)
    n_unused_layers: int = 0  # in the file, after the others: they predict further tokens and are not run

    _later: ClassVar[str] = "layers"
    __repr__ = _stated

    def layer(self, index: int) -> LayerConfig:
        """What a layer is like."""
        return self.layers[index] if self.layers else _ALIKE

    def has_experts(self, index: int) -> bool:
        """Whether a layer routes."""
        return self.router is not None and self.layer(index).routed

    def d_always(self, index: int) -> int:
        """Width of the network that every token takes in a layer, the shared expert or a dense one; 0: none."""
        return self.d_shared if self.router is None or self.layer(index).routed else self.d_dense

    @property
    def expert_layers(self) -> list[int]:
        """Layers that route."""
        return [index for index in range(self.n_layers) if self.has_experts(index)]

    @property
    def attending_layers(self) -> list[int]:
        """Layers that have keys and values."""
        return [index for index in range(self.n_layers) if self.layer(index).mixer == "attention"]

    def mixers(self) -> set[str]:
        """The kinds of mixers of all layers."""
        return {self.layer(index).mixer for index in range(self.n_layers)} if self.layers else {"attention"}

    @property
    def d_attended(self) -> int:
        """Width of what all heads of an attention layer give together."""
        return self.n_heads * (self.latent.d_output if self.latent else self.d_value)


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
