"""Reading a GGUF's metadata on behalf of an architecture: typed, bounded, and nothing overlooked.

A key under the architecture's prefix that nobody read is refused, because it may change the answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import numpy as np

from edgert.errors import ModelFileError, UnsupportedError
from edgert.types import LayerConfig, RopeConfig, RouterConfig

TOKENS = "tokenizer.ggml.tokens"
_LARGEST = 1 << 31
_MOST_LAYERS = 4096  # where each is described by itself
# Keys that do not change the arithmetic, or that merely repeat a tensor's shape.
_HARMLESS = {
    "vocab_size",
    "feed_forward_length",
    "rope.scaling.finetuned",  # granitemoe reads it
    "expert_feed_forward_length",
    "tensor_data_layout",
}
# Keys that are harmless at some values only.
_HARMLESS_AT: dict[str, tuple[float, ...]] = {
    "attention.sliding_window": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "interleave_moe_layer_step": (1,),
    "nextn_predict_layers": (0,),
}
# GGUF's numbers of gating functions: what they are over, and whether the choice comes first.
_GATINGS: dict[int, tuple[Literal["softmax", "sigmoid"], bool]] = {
    1: ("softmax", False),
    2: ("sigmoid", False),
    3: ("softmax", True),
}
_GATING_NAMES = {1: "softmax", 2: "sigmoid", 3: "softmax over the chosen"}


class _Common(TypedDict):
    architecture: str
    n_layers: int
    n_unused_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_value: int
    n_vocab: int
    n_context: int
    eps: float
    attention_scale: float


class Keys:
    """The metadata of one file under the prefix of its architecture."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, file: str) -> None:
        self._metadata, self.architecture, self._file = metadata, architecture, file
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the file has the key."""
        return f"{self.architecture}.{key}" in self._metadata

    def ignore(self, *names: str) -> None:
        """Let keys through whatever they say: this architecture does not use them."""
        self._read.update(f"{self.architecture}.{name}" for name in names)

    def integers(self, key: str, n: int) -> list[int]:
        """An integer for each of n layers, at least 0; one alone is that of all."""
        value = self._value(key, None)
        if not isinstance(value, np.ndarray):
            return [self.integer(key, least=0)] * n
        if value.dtype.kind not in "iu" or len(value) < n or (value < 0).any() or (value >= _LARGEST).any():
            raise self.wrong(key, value, f"a whole number from 0 to {_LARGEST - 1} for each of {n} layers")
        return [int(number) for number in value[:n]]

    def booleans(self, key: str, n: int) -> list[bool]:
        """True or false for each of n layers; one alone is that of all."""
        value = self._value(key, None)
        if not isinstance(value, np.ndarray):
            return [self.boolean(key, False)] * n
        if value.dtype.kind != "b" or len(value) < n:
            raise self.wrong(key, value, f"true or false for each of {n} layers")
        return [bool(one) for one in value[:n]]

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer of at least `least`. One per layer is accepted where all are the same."""
        value = self._value(key, default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(value):
            if (value != value[0]).any():
                raise UnsupportedError(
                    f"{self._name(key)} differs between layers ({value.min()} to {value.max()}); "
                    "edgert runs models whose layers are all alike"
                )
            value = int(value[0])
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value < _LARGEST:
            raise self.wrong(key, value, f"a whole number from {least} to {_LARGEST - 1}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise self.wrong(key, value, "a finite number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.number(key, default)
        if value <= 0:
            raise self.wrong(key, value, "a number above zero")
        return value

    def multiplier(self, key: str, default: float) -> float:
        """A number above zero; zero, which in a GGUF means that there is none, is the default."""
        value = self.number(key, default)
        return default if value == 0 else self.positive(key, default)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, (bool, np.bool_)):
            raise self.wrong(key, value, "true or false")
        return bool(value)

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        return value

    def common(self, *, n_kv_heads: int | None = None, unused_layers: bool = False) -> _Common:
        """The fields of ModelConfig that every architecture reads alike, or with few exceptions.

        n_kv_heads: where the file says it in another way. unused_layers: whether files have layers at the end, as many
        as nextn_predict_layers, that predict further tokens; they are not run.
        """
        d_model, n_heads = self.integer("embedding_length"), self.integer("attention.head_count")
        if n_kv_heads is None:
            n_kv_heads = self.integer("attention.head_count_kv", n_heads)
        if n_heads % n_kv_heads:
            raise self.wrong("attention.head_count_kv", n_kv_heads, f"a divisor of attention.head_count = {n_heads}")
        d_head = self.integer("attention.key_length", d_model // n_heads)
        n_layers = self.integer("block_count")
        n_unused = self.integer("nextn_predict_layers", 0, least=0) if unused_layers else 0
        if n_unused >= n_layers:
            raise self.wrong("nextn_predict_layers", n_unused, f"less than block_count = {n_layers}")
        return {
            "architecture": self.architecture,
            "n_layers": n_layers - n_unused,
            "n_unused_layers": n_unused,
            "d_model": d_model,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "d_head": d_head,
            "d_value": self.integer("attention.value_length", d_head),
            "n_vocab": self._n_vocab(),
            "n_context": self.integer("context_length"),
            "eps": self.positive("attention.layer_norm_rms_epsilon"),
            "attention_scale": d_head**-0.5,
        }

    def _n_vocab(self) -> int:
        """Rows of the embedding table: as many as there are tokens, whatever vocab_size says, as in llama.cpp."""
        tokens = self._metadata.get(TOKENS)
        n_tokens = len(tokens) if isinstance(tokens, (list, np.ndarray)) else 0
        return n_tokens or self.integer("vocab_size")

    def rope(
        self,
        kind: Literal["norm", "neox"],
        d_head: int,
        *,
        rotates: bool = True,
        whole_head: bool = False,
        longrope: bool = False,
        yarn_magnitude: bool = True,
    ) -> RopeConfig:
        """Rotary embedding: dimensions (none unless it `rotates`; of the whole head if they must be), base, scaling.

        longrope: whether files may have divisors for two ranges of contexts, whether or not the type says so, as
        llama.cpp's converter never does. yarn_magnitude: whether YaRN makes cos and sin larger.
        """
        n_rotated = self.integer("rope.dimension_count", d_head)
        if whole_head and n_rotated != d_head:
            raise self.wrong("rope.dimension_count", n_rotated, f"the head size {d_head}")
        if n_rotated % 2 or n_rotated > d_head:
            raise self.wrong("rope.dimension_count", n_rotated, f"an even number up to the head size {d_head}")
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 1.0))  # the latter in old files
        if factor < 0:
            name = "rope.scaling.factor" if self.has("rope.scaling.factor") else "rope.scale_linear"
            raise self.wrong(name, factor, "a number above zero, or 0 for no scaling")
        unnamed = "linear" if factor not in (0.0, 1.0) else "none"
        scaling = self.text("rope.scaling.type", unnamed)
        known = ("none", "linear", "yarn", "longrope") if longrope else ("none", "linear", "yarn")
        if scaling not in known:
            raise UnsupportedError(
                f"{self._name('rope.scaling.type')} is {scaling!r:.60}; supported are {', '.join(known)}"
            )
        if scaling == "longrope":  # of which the tensors are all there is
            scaling = unnamed
        for name in ("yarn_beta_fast", "yarn_beta_slow", "yarn_ext_factor", "yarn_attn_factor"):
            self._read.add(f"{self.architecture}.rope.scaling.{name}")  # fixed at 32, 1, 1, 1 as in llama.cpp
        factor, magnitude = factor if factor > 0 else 1.0, self.number("rope.scaling.attn_factor", 1.0)
        n_context = self.integer("context_length")
        if scaling == "yarn" and yarn_magnitude:
            magnitude *= 1.0 + 0.1 * float(np.log(max(factor, 1.0)))
        return RopeConfig(
            kind=kind,
            n_rotated=n_rotated if rotates else 0,
            base=self.positive("rope.freq_base", 10000.0),
            scaling=scaling,  # type: ignore[arg-type]   # checked above
            factor=factor,
            original_context=self.integer("rope.scaling.original_context_length", n_context, least=0) or n_context,
            magnitude=magnitude,
            two_ranges=longrope,
        )

    def router(
        self,
        *,
        normalise: bool | None,
        gating: int = 1,
        gatings: tuple[int, ...] = (1,),
        scaled: bool = False,
        biased: bool = False,
    ) -> RouterConfig:
        """Routing. gating: GGUF's number of the function where the file names none; gatings: those that may be named.

        normalise: None: as expert_weights_norm says. scaled: whether the architecture has expert_weights_scale. biased:
        whether it may have biases for the choice. Groups of experts count in every architecture, as in llama.cpp.
        """
        n_expert, top_k = self.integer("expert_count"), self.integer("expert_used_count")
        if top_k > n_expert:
            raise self.wrong("expert_used_count", top_k, f"at most expert_count = {n_expert}")
        found = self.integer("expert_gating_func", gating, least=0) or gating
        if found not in gatings:
            known = ", ".join(f"{number} ({_GATING_NAMES[number]})" for number in gatings)
            raise UnsupportedError(f"{self._name('expert_gating_func')} is {found}; supported are {known}")
        if normalise is None:
            normalise = self.boolean("expert_weights_norm", False)
        n_groups, n_groups_used = self._groups(n_expert, top_k)
        over, late = _GATINGS[found]
        return RouterConfig(
            n_expert,
            top_k,
            over,
            normalise,
            self.multiplier("expert_weights_scale", 1.0) if scaled else 1.0,
            n_groups=n_groups,
            n_groups_used=n_groups_used,
            biased=biased,
            late=late,
        )

    def _groups(self, n_expert: int, top_k: int) -> tuple[int, int]:
        """Groups of experts, and how many of them are chosen from."""
        n_groups = self.integer("expert_group_count", 1, least=0) or 1
        n_used = self.integer("expert_group_used_count", n_groups, least=0)
        if n_groups == 1:
            return 1, 1
        if n_expert % n_groups:
            raise self.wrong("expert_group_count", n_groups, f"a divisor of expert_count = {n_expert}")
        if not 0 < n_used <= n_groups or top_k > n_used * (n_expert // n_groups):
            least = -(-top_k // (n_expert // n_groups))
            raise self.wrong("expert_group_used_count", n_used, f"a whole number from {least} to {n_groups}")
        return n_groups, n_used

    def dense_layers(self, n_layers: int) -> tuple[LayerConfig, ...]:
        """Layers of which the first, leading_dense_block_count, have no experts."""
        n_dense = self.integer("leading_dense_block_count", 0, least=0)
        if n_dense >= n_layers:
            raise self.wrong("leading_dense_block_count", n_dense, f"less than the {n_layers} layers that run")
        return tuple(LayerConfig(routed=index >= n_dense) for index in self.each_layer(n_layers))

    def each_layer(self, n_layers: int) -> range:
        """The layers' numbers; ModelFileError if there are more than any model has."""
        if n_layers > _MOST_LAYERS:
            raise self.wrong("block_count", n_layers, f"at most {_MOST_LAYERS}")
        return range(n_layers)

    def expert_width(self, router: RouterConfig) -> int:
        """Width of an expert. Old files give that of all the experts of a token together, as `feed_forward_length`."""
        width = self.integer("expert_feed_forward_length", 0, least=0)
        return width or max(1, self.integer("feed_forward_length") // router.top_k)

    def refuse_unread(self) -> None:
        """Raise UnsupportedError for the first key of the architecture that was neither read nor is harmless."""
        prefix = f"{self.architecture}."
        for key, value in self._metadata.items():
            short = key.removeprefix(prefix)
            if not key.startswith(prefix) or key in self._read or short in _HARMLESS:
                continue
            if isinstance(value, (bool, int, float, np.number)) and value in _HARMLESS_AT.get(short, ()):
                continue
            raise UnsupportedError(
                f"{self._file}: the key {key} = {value!r:.60} is not supported by edgert and may change the answers"
            )

    def _value(self, key: str, default: Any) -> Any:
        full = f"{self.architecture}.{key}"
        self._read.add(full)
        if full in self._metadata:
            return self._metadata[full]
        if default is None:
            raise ModelFileError(f"{self._file}: the key {full} is missing; the file is incomplete, convert it again")
        return default

    def _name(self, key: str) -> str:
        return f"{self._file}: {self.architecture}.{key}"

    def unsupported(self, key: str, value: Any, supported: str) -> UnsupportedError:
        """The error about a key whose value is none that edgert runs."""
        return UnsupportedError(f"{self._name(key)} is {value!r:.60}; supported is {supported}")

    def wrong(self, key: str, value: Any, expected: str) -> ModelFileError:
        """The error about a key whose value cannot be."""
        return ModelFileError(
            f"{self._name(key)} is {value!r:.60}, not {expected}; the file is damaged or made wrongly"
        )
