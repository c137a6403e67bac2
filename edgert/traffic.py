"""What a step has to move and to compute: bytes that must be read and operations, from a model's sizes alone.

A lower bound, whatever the kernels do: every weight that is used is read once a chunk, and so is every cached position
that one of its tokens attends to. Knows the file's tensors and the sizes they are packed to; nothing of devices,
threads or time.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from edgert.types import ModelConfig
from edgert.weights import Weights


def positions(c: ModelConfig, n_tokens: int, start: int) -> tuple[float, float]:
    """Positions that one of the tokens start, start + 1, ... attends to, and that all of them together do.

    Means over the layers that attend, and the first over the tokens too: some have a window, or see their own stretch.
    """
    at, one, together = np.arange(start, start + n_tokens), 0.0, 0.0
    layers = [c.layer(index) for index in c.attending_layers]
    for (window, span), count in Counter((layer.window, layer.span) for layer in layers).items():
        first = np.zeros_like(at)
        if window:
            first = np.maximum(first, at + 1 - window)
        if span:
            first = np.maximum(first, at // span * span)
        one += count * float((at + 1 - first).mean())
        together += count * float(start + n_tokens - first[0])
    return one / max(1, len(layers)), together / max(1, len(layers))


@dataclass(frozen=True)
class Traffic:
    """Of one step, or of several together."""

    n_bytes: float = 0.0  # of weights and of the key/value cache that had to be read
    int8_operations: float = 0.0  # of integer matrices; a multiply-add counts as two
    float_operations: float = 0.0  # of float matrices and of attention

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.n_bytes + other.n_bytes,
            self.int8_operations + other.int8_operations,
            self.float_operations + other.float_operations,
        )


@dataclass(frozen=True)
class Part:
    """Some of a model's tensors: bytes once packed, and the weights in them, each used once a row of activations."""

    n_bytes: float = 0.0
    integers: float = 0.0
    floats: float = 0.0

    def __add__(self, other: Part) -> Part:
        return Part(self.n_bytes + other.n_bytes, self.integers + other.integers, self.floats + other.floats)

    def over(self, count: int) -> Part:
        """One of `count` equal parts."""
        return Part(self.n_bytes / count, self.integers / count, self.floats / count)


@dataclass(frozen=True)
class ModelTraffic:
    """The parts of a model that steps use in different numbers."""

    config: ModelConfig
    layers: Part  # hot weights of all layers
    head: Part
    expert: Part  # one routed expert, the mean over all
    embedding_row: float  # bytes
    position: float  # bytes of keys and values of one position, in all layers

    @classmethod
    def of(cls, weights: Weights, position: float) -> ModelTraffic:
        """Of a model file; `position`: bytes of the cache for one position."""
        c = weights.config
        head_name = "output.weight" if "output.weight" in weights.shapes else "token_embd.weight"
        layers, head, experts = Part(), Part(), Part()
        for name in weights.shapes:
            if name in (head_name, "output_norm.weight"):
                head += _part(weights, name)
            elif weights.is_cold(name):
                experts += _part(weights, name)
            elif name.startswith("blk."):
                layers += _part(weights, name)
        n_experts = len(c.expert_layers) * c.router.n_expert if c.router else 1
        row = weights.bytes_of("token_embd.weight") / c.n_vocab
        return cls(c, layers, head, experts.over(n_experts), row, position)

    def step(self, n_tokens: int, start: int, n_experts: int, *, with_head: bool) -> Traffic:
        """Of a chunk of tokens at positions start, start + 1, ...

        n_experts: distinct experts used, summed over the layers. with_head: logits of the last token are wanted.
        """
        c = self.config
        used = Part()
        for part, times, rows in (
            (self.layers, 1, n_tokens),
            (self.expert, n_experts, n_tokens * len(c.expert_layers) * (c.router.top_k if c.router else 0)),
            (self.head, int(with_head), int(with_head)),
        ):
            used += Part(times * part.n_bytes, rows * part.integers, rows * part.floats)
        one, together = positions(c, n_tokens, start)
        attention = 2 * len(c.attending_layers) * c.n_heads * (c.d_head + c.d_value) * n_tokens * one
        cache = self.position * together
        return Traffic(
            used.n_bytes + n_tokens * self.embedding_row + cache, 2 * used.integers, 2 * used.floats + attention
        )


def _part(weights: Weights, name: str) -> Part:
    shape, n_bytes = weights.shapes[name], weights.bytes_of(name)
    if len(shape) == 1:
        return Part(n_bytes)
    count = math.prod(shape)
    are_integers = all(format.is_integer for format in weights.sizes_of(name))
    return Part(n_bytes, count, 0) if are_integers else Part(n_bytes, 0, count)
