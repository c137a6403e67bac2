"""Reading a GGUF's metadata on behalf of an architecture: typed, bounded, and nothing overlooked.

A key under the architecture's prefix that nobody read is refused, because it may change the answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import numpy as np

from edgert.errors import ModelFileError, UnsupportedError
from edgert.types import RopeConfig, RouterConfig

_LARGEST = 1 << 31
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
}


class _Common(TypedDict):
    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_value: int
    n_vocab: int
    n_context: int
    eps: float


class Keys:
    """The metadata of one file under the prefix of its architecture."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, file: str) -> None:
        self._metadata, self.architecture, self._file = metadata, architecture, file
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the file has the key."""
        return f"{self.architecture}.{key}" in self._metadata

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
            raise self._wrong(key, value, f"a whole number from {least} to {_LARGEST - 1}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise self._wrong(key, value, "a finite number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.number(key, default)
        if value <= 0:
            raise self._wrong(key, value, "a number above zero")
        return value

    def multiplier(self, key: str, default: float) -> float:
        """A number above zero; zero, which in a GGUF means that there is none, is the default."""
        value = self.number(key, default)
        return default if value == 0 else self.positive(key, default)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, (bool, np.bool_)):
            raise self._wrong(key, value, "true or false")
        return bool(value)

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def common(self) -> _Common:
        """The fields of ModelConfig that every architecture reads alike."""
        d_model, n_heads = self.integer("embedding_length"), self.integer("attention.head_count")
        n_kv_heads = self.integer("attention.head_count_kv", n_heads)
        if n_heads % n_kv_heads:
            raise self._wrong("attention.head_count_kv", n_kv_heads, f"a divisor of attention.head_count = {n_heads}")
        d_head = self.integer("attention.key_length", d_model // n_heads)
        tokens = self._metadata.get("tokenizer.ggml.tokens")
        return {
            "architecture": self.architecture,
            "n_layers": self.integer("block_count"),
            "d_model": d_model,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "d_head": d_head,
            "d_value": self.integer("attention.value_length", d_head),
            "n_vocab": self.integer("vocab_size", len(tokens) if isinstance(tokens, (list, np.ndarray)) else None),
            "n_context": self.integer("context_length"),
            "eps": self.positive("attention.layer_norm_rms_epsilon"),
        }

    def rope(
        self, kind: Literal["norm", "neox"], d_head: int, *, rotates: bool = True, whole_head: bool = False
    ) -> RopeConfig:
        """Rotary embedding: dimensions (none unless it `rotates`; of the whole head if they must be), base, scaling."""
        n_rotated = self.integer("rope.dimension_count", d_head)
        if whole_head and n_rotated != d_head:
            raise self._wrong("rope.dimension_count", n_rotated, f"the head size {d_head}")
        if n_rotated % 2 or n_rotated > d_head:
            raise self._wrong("rope.dimension_count", n_rotated, f"an even number up to the head size {d_head}")
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 1.0))  # the latter in old files
        if factor < 0:
            name = "rope.scaling.factor" if self.has("rope.scaling.factor") else "rope.scale_linear"
            raise self._wrong(name, factor, "a number above zero, or 0 for no scaling")
        scaling = self.text("rope.scaling.type", "linear" if factor not in (0.0, 1.0) else "none")
        if scaling not in ("none", "linear", "yarn"):
            raise UnsupportedError(
                f"{self._name('rope.scaling.type')} is {scaling!r:.60}; supported are none, linear, yarn"
            )
        for name in ("yarn_beta_fast", "yarn_beta_slow", "yarn_ext_factor", "yarn_attn_factor"):
            self._read.add(f"{self.architecture}.rope.scaling.{name}")  # fixed at 32, 1, 1, 1 as in llama.cpp
        return RopeConfig(
            kind=kind,
            n_rotated=n_rotated if rotates else 0,
            base=self.positive("rope.freq_base", 10000.0),
            scaling=scaling,  # type: ignore[arg-type]   # checked above
            factor=factor if factor > 0 else 1.0,
            original_context=self.integer("rope.scaling.original_context_length", self.integer("context_length")),
            magnitude=self.number("rope.scaling.attn_factor", 1.0),
        )

    def router(self, *, normalise: bool, scale: float = 1.0) -> RouterConfig:
        """Routing by softmax over all experts."""
        n_expert, top_k = self.integer("expert_count"), self.integer("expert_used_count")
        if top_k > n_expert:
            raise self._wrong("expert_used_count", top_k, f"at most expert_count = {n_expert}")
        gating = self.integer("expert_gating_func", 1)
        if gating not in (1, 2):
            raise UnsupportedError(
                f"{self._name('expert_gating_func')} is {gating}; supported are 1 (softmax), 2 (sigmoid)"
            )
        return RouterConfig(n_expert, top_k, "softmax" if gating == 1 else "sigmoid", normalise, scale)

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

    def _wrong(self, key: str, value: Any, expected: str) -> ModelFileError:
        return ModelFileError(
            f"{self._name(key)} is {value!r:.60}, not {expected}; the file is damaged or made wrongly"
        )
