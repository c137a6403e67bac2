"""What each part of a step computes and moves: operations, bytes and what bounds it, as rooflines have it.

Formulas (arXiv 2402.16363, whose table 1 they give cell by cell): a matrix of n_in x n_out for n tokens takes 2 n n_in
n_out operations and moves its weights, n n_in and n n_out numbers; the products with keys and with values take 2 h n L
d_head operations and move queries or outputs, keys or values, and scores; softmax takes 5 operations and 2 accesses an
element, a norm 7 and 2, an addition 1 and 2. Of experts the distinct ones count, E (1 - (1 - k/E)^n) if routing is
even.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from edgert.boards import Unit
from edgert.quant.formats import PackedPart
from edgert.tensor_table import EMBEDDING, HEAD, layer_tensors
from edgert.traffic import positions
from edgert.weights import Weights

PROMPT = 512  # tokens, where nobody says
Kind = Literal["int8", "float"]  # what a part's operations are
_QUANTISE, _ACTIVATE = 20.0, 30.0  # operations of edgert's kernels an element: largest, scaled, rounded; an exponential
_SHARING = ("attn_k", "attn_v", "ffn_up", "ffn_gate_inp")  # with the matrix before them, rows that were quantised once


@dataclass(frozen=True)
class Part:
    """One kind of part of a step: `count` of them, each with so many operations and bytes.

    weights: bytes of `n_bytes` that are weights. cold: whether these are experts'.
    """

    name: str
    count: float
    operations: float
    n_bytes: float
    kind: Kind
    weights: float = 0.0
    cold: bool = False

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.n_bytes if self.n_bytes else math.inf

    def rate(self, unit: Unit) -> float:
        """Operations a second that a unit reaches at most."""
        return min(self.peak(unit), self.intensity * unit.bytes_per_s)

    def bound(self, unit: Unit) -> str:
        """What limits it there."""
        return "memory" if self.intensity * unit.bytes_per_s < self.peak(unit) else "compute"

    def peak(self, unit: Unit) -> float:
        """Operations of its kind a second."""
        return unit.int8_per_s if self.kind == "int8" and unit.int8_per_s else unit.half_per_s

    def seconds(self, unit: Unit, compute_share: float = 1.0, read_share: float = 1.0) -> float:
        """Of all of them, on a unit that reaches these shares of its peaks."""
        computing = self.operations / (self.peak(unit) * compute_share)
        return self.count * max(computing, self.n_bytes / (unit.bytes_per_s * read_share))


@dataclass(frozen=True)
class Numbers:
    """Bytes of one number: of activations, and of keys and values. nodes: whether scores go to memory, all of them.

    A runtime of one graph node after the other computes the scores of every token with every position, and writes them;
    edgert's own kernels leave out what lies ahead of a token and keep scores in caches.
    """

    activation: float = 4.0
    cached: float = 2.0
    nodes: bool = False


def even_distinct(n_expert: int, top_k: int, n_tokens: int) -> float:
    """Experts of a layer that n tokens use together, if each is as likely as any other."""
    return n_expert * (1.0 - (1.0 - top_k / n_expert) ** n_tokens)


def step_parts(
    weights: Weights,
    n_tokens: int,
    n_seen: int,
    numbers: Numbers,
    *,
    n_logits: int = 1,
    distinct: Callable[[int], float] | None = None,
) -> list[Part]:
    """The parts of a step of n_tokens, the last of which sees n_seen positions, itself included.

    n_logits: tokens whose logits are wanted. distinct: experts of a layer that n tokens use, by default evenly.
    """
    found = list(_layer_parts(weights, n_tokens, n_seen, numbers))
    found += _expert_parts(weights, n_tokens, numbers, distinct)
    head = HEAD if HEAD in weights.shapes else EMBEDDING
    if n_logits:
        found.append(_linear(weights, "head", [head], n_logits, numbers, 1))
    return found


def _layer_parts(weights: Weights, n: int, seen: int, numbers: Numbers) -> Iterator[Part]:
    """Hot parts of all layers."""
    c, number = weights.config, numbers.activation
    layers = c.n_layers
    for name, tensors in _matrices(weights).items():
        yield _linear(weights, name, tensors, n, numbers, len(tensors))
    attending = len(c.attending_layers)
    one, together = (seen, seen) if numbers.nodes else positions(c, n, seen - n)
    scores = c.n_heads * n * one
    moved = scores * number if numbers.nodes else 0.0
    for name, head, width in (("qk_matmul", c.d_head, c.d_head), ("sv_matmul", c.d_value, c.d_value)):
        cached = together * c.n_kv_heads * width * numbers.cached
        if c.latent and name == "sv_matmul":  # latent vectors are there once, and were read for the scores
            cached = 0.0
        yield Part(name, attending, 2 * scores * head, n * c.n_heads * width * number + cached + moved, "float")
    if not numbers.nodes:
        yield from _row_parts(weights, n)
    if c.delta:
        memory = c.delta.d_values * c.delta.d_state
        yield Part("delta_net", layers - attending, 8.0 * n * memory, 2.0 * 4 * memory, "float")
    yield Part("softmax", attending, 5 * scores, 2 * moved, "float")
    wide = n * c.d_model
    yield Part("norm", 2 * layers + 1, 7 * wide, 2 * wide * number, "float")
    yield Part("add", 2 * layers, wide, 2 * wide * number, "float")


def _row_parts(weights: Weights, n: int) -> Iterator[Part]:
    """What edgert does with rows between products, in caches: int8 made of them, and gates' activation function."""
    c = weights.config
    quantised = activated = 0
    names = [(name, 1) for tensors in _matrices(weights).values() for name in tensors]
    if c.router is not None:
        names += [(f"blk.{layer}.ffn_{part}_exps.weight", c.router.top_k) for layer in c.expert_layers for part in _FFN]
    for name, count in names:
        n_out, n_in = weights.shapes[name][-2:]
        role = name.split(".")[2]
        if _kind(weights, name) == "int8" and not role.startswith(_SHARING):
            quantised += n_in * (count if role.startswith("ffn_down") else 1)
        if role.startswith("ffn_gate") and role != "ffn_gate_inp":
            activated += n_out * count
    yield Part("quantise", 1, _QUANTISE * n * quantised, 0.0, "float")
    yield Part("activation", 1, _ACTIVATE * n * activated, 0.0, "float")


class Product(NamedTuple):
    """Matrices of one format and shape, each of which is multiplied with so many rows."""

    matrix: PackedPart
    n_rows: int

    @property
    def operations(self) -> float:
        """Of one of them; a multiply-add counts as two."""
        return 2.0 * self.n_rows * math.prod(self.matrix.shape)


def products(weights: Weights, n_tokens: int) -> dict[Product, float]:
    """The layers' products of matrices with rows in a step of n_tokens, and how many there are of each."""
    c, found = weights.config, dict[Product, float]()
    names = [(name, n_tokens, 1.0) for tensors in _matrices(weights).values() for name in tensors]
    if c.router is not None:
        used = even_distinct(c.router.n_expert, c.router.top_k, n_tokens)
        rows = max(1, round(n_tokens * c.router.top_k / used))
        names += [(f"blk.{layer}.ffn_{part}_exps.weight", rows, used) for layer in c.expert_layers for part in _FFN]
    for name, rows, count in names:
        n_out, n_in = weights.shapes[name][-2:]
        sizes = weights.sizes_of(name)
        for format, n_bytes in sizes.items():
            product = Product(PackedPart(format, (n_out, n_in), 0), rows)
            found[product] = found.get(product, 0.0) + count * n_bytes / sum(sizes.values())
    return found


_FFN = ("gate", "up", "down")
_TITLES = {
    **{f"attn_{x}": f"{x}_proj" for x in "qkv"},
    "attn_output": "o_proj",
    **{
        f"ffn_{part}{suffix}": f"{part}_proj{title}"
        for part in _FFN
        for suffix, title in (("", ""), ("_shexp", " (shared)"))
    },
    "ffn_gate_inp": "router",
}


def _matrices(weights: Weights) -> dict[str, list[str]]:
    """Hot matrices of all layers by what they are for, those of one shape together."""
    found: dict[str, list[str]] = {}
    for layer in range(weights.config.n_layers):
        for tensor, shape in layer_tensors(weights.config, layer).items():
            name = f"blk.{layer}.{tensor}"
            if len(shape) == 2 and name in weights.shapes:
                plain = tensor.removesuffix(".weight")
                found.setdefault(_TITLES.get(plain, plain), []).append(name)
    return found


def _linear(weights: Weights, name: str, tensors: list[str], n: int, numbers: Numbers, count: int) -> Part:
    """Matrices of one shape, each times n rows; their bytes are the mean."""
    n_out, n_in = weights.shapes[tensors[0]][-2:]
    stored = sum(map(weights.bytes_of, tensors)) / len(tensors)
    moved = stored + n * (n_in + n_out) * numbers.activation
    return Part(name, count, 2.0 * n * n_in * n_out, moved, _kind(weights, tensors[0]), stored)


def _kind(weights: Weights, name: str) -> Kind:
    return "int8" if all(format.is_integer for format in weights.sizes_of(name)) else "float"


def _expert_parts(
    weights: Weights, n: int, numbers: Numbers, distinct: Callable[[int], float] | None
) -> Iterator[Part]:
    """Routed experts of all layers: a token computes top_k of them, the distinct ones are read."""
    c = weights.config
    if c.router is None:
        return
    e, k = c.router.n_expert, c.router.top_k
    used = even_distinct(e, k, n) if distinct is None else distinct(n)
    for part in _FFN:
        tensors = [f"blk.{layer}.ffn_{part}_exps.weight" for layer in c.expert_layers]
        n_out, n_in = weights.shapes[tensors[0]][-2:]
        each = sum(map(weights.bytes_of, tensors)) / len(tensors) / e
        moved = used * each + n * k * (n_in + n_out) * numbers.activation
        kind = _kind(weights, tensors[0])
        yield Part(f"{part}_proj (experts)", len(tensors), 2.0 * n * k * n_in * n_out, moved, kind, used * each, True)
