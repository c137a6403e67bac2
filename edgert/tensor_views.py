"""Tensors as edgert names and cuts them, over those of a file, which may be joined, split, or called otherwise.

A view is some rows of one tensor, in some order; nothing of it is read here. What the file has beyond these views is
nobody's, and keeps its own name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from edgert.tensor_table import Shapes, layer_tensors, model_tensors, optional_layer_tensors, optional_model_tensors
from edgert.types import ModelConfig


class Stretch(NamedTuple):
    """Rows first, first + 1, ..., `n` of them; and again from each `step` further on, `times` in all."""

    first: int
    n: int
    times: int = 1
    step: int = 0


Rows = tuple[Stretch, ...]


@dataclass(frozen=True)
class View:
    """Rows of a tensor of the file, in the order in which we have them; of a vector, its numbers.

    shape: ours. turned: the rows are one stretch, and each of its parts a matrix that stands here transposed.
    """

    name: str
    shape: tuple[int, ...]
    rows: Rows
    turned: bool = False

    def between(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Rows first, first + 1, ... of ours as (first, count) of the file's."""
        start = 0  # of ours
        for rows in self.rows:
            n = rows.n * rows.times
            at, end = max(first - start, 0), min(first + count - start, n)
            while at < end:
                turn, inside = divmod(at, rows.n)
                taken = min(rows.n - inside, end - at)
                yield rows.first + turn * rows.step + inside, taken
                at += taken
            start += n


def whole(name: str, shape: tuple[int, ...]) -> View:
    """All of a tensor."""
    return View(name, shape, (Stretch(0, math.prod(shape) // (max(shape[-1], 1) if len(shape) > 1 else 1)),))


def views(c: ModelConfig, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str]) -> dict[str, View]:
    """Views by our names of all that a model has of a file with tensors of these shapes, and of what is left over.

    names: what the file calls tensors that we call otherwise. Tensors of layers that are not run are nobody's.
    """
    found: dict[str, View] = {}
    _add(found, "", {**model_tensors(c), **optional_model_tensors(c)}, shapes, names)
    for layer in range(min(c.n_layers, len(shapes))):
        wanted = {**layer_tensors(c, layer), **optional_layer_tensors(c, layer)}
        _add(found, f"blk.{layer}.", wanted, shapes, names)
        _add_parts(found, f"blk.{layer}.", c, wanted, shapes)
    used = {view.name for view in found.values()}
    for name, shape in shapes.items():
        if name not in used and not is_unused(c, name):
            found[name] = whole(name, shape)
    return found


def is_unused(c: ModelConfig, name: str) -> bool:
    """Whether a tensor belongs to a layer that is not run."""
    first, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return first == "blk" and number.isdecimal() and c.n_layers <= int(number) < c.n_layers + c.n_unused_layers


def skipped(c: ModelConfig) -> str:
    """One line on the layers of a file that are not run, for the person; mostly empty."""
    if not c.n_unused_layers:
        return ""
    last = c.n_layers + c.n_unused_layers - 1
    several = f"layers {c.n_layers} to {last} predict" if c.n_unused_layers > 1 else f"layer {last} predicts"
    pronoun, verb = ("they", "are") if c.n_unused_layers > 1 else ("it", "is")
    return f"{several} tokens beyond the next (MTP): {pronoun} {verb} not run, and answers are the same without"


def _add(
    found: dict[str, View], prefix: str, wanted: Shapes, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str]
) -> None:
    """Tensors that the file has as they are wanted, but perhaps under another name or in another shape."""
    for name, shape in wanted.items():
        theirs = f"{prefix}{names.get(name, name)}"
        theirs = theirs if theirs in shapes else f"{prefix}{name}"
        if theirs not in shapes:
            continue
        view = whole(theirs, shapes[theirs])
        same = math.prod(shapes[theirs]) == math.prod(shape) and len(shape) < len(shapes[theirs])
        if same and len(shape) == 1:  # a small matrix that is a vector to us
            view = View(theirs, shape, (Stretch(0, shape[0]),))
        elif same and shapes[theirs][-1] == shape[-1]:
            view = replace(view, shape=shape)
        found[f"{prefix}{name}"] = view


def _add_parts(
    found: dict[str, View], prefix: str, c: ModelConfig, wanted: Shapes, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Tensors that are part of a larger one of the file."""
    for theirs, parts in _joined(c, wanted):
        shape = shapes.get(f"{prefix}{theirs}")
        n_rows = sum(stretch.n * stretch.times for _, rows, _ in parts for stretch in rows)
        if shape is None or math.prod(shape[:-1] or shape) != n_rows:
            continue
        if any(f"{prefix}{name}" in shapes and name != theirs for name, _, _ in parts):
            continue
        for name, rows, turned in parts:
            if name in wanted:
                found[f"{prefix}{name}"] = View(f"{prefix}{theirs}", wanted[name], rows, turned)


def _joined(c: ModelConfig, wanted: Shapes) -> Iterator[tuple[str, list[tuple[str, Rows, bool]]]]:
    """Names of larger tensors, and of their parts: name, rows, whether these are turned."""
    if "attn_k.weight" in wanted:
        sizes = (c.n_heads * c.d_head, c.n_kv_heads * c.d_head, c.n_kv_heads * c.d_value)
        for kind in ("weight", "bias"):
            stacked = zip("qkv", _stacked(sizes), strict=True)
            yield f"attn_qkv.{kind}", [(f"attn_{name}.{kind}", rows, False) for name, rows in stacked]
    if c.query_gate:
        queries, gates = _dealt(c.n_heads, (c.d_head, c.d_value))
        yield "attn_q.weight", [("attn_q.weight", queries, False), ("attn_q_gate.weight", gates, False)]
    if c.latent:
        keys, values = _dealt(c.n_heads, (c.latent.d_plain, c.latent.d_output))
        yield "attn_kv_b.weight", [("attn_k_b.weight", keys, True), ("attn_v_b.weight", values, False)]
    if c.delta:
        yield from _joined_delta(c)
    if c.router:
        gates, ups = _dealt(c.router.n_expert, (c.d_expert, c.d_expert))
        parts = [("ffn_gate_exps.weight", gates, False), ("ffn_up_exps.weight", ups, False)]
        yield "ffn_gate_up_exps.weight", parts


def _joined_delta(c: ModelConfig) -> Iterator[tuple[str, list[tuple[str, Rows, bool]]]]:
    """Matrices that qwen3next groups by key head."""
    assert c.delta is not None
    d, several = c.delta, c.delta.n_value_heads // c.delta.n_key_heads
    betas, alphas = _dealt(d.n_key_heads, (several, several))
    yield "ssm_ba.weight", [("ssm_beta.weight", betas, False), ("ssm_alpha.weight", alphas, False)]
    values = several * d.d_state
    *mixed, gates = _dealt(d.n_key_heads, (d.d_state, d.d_state, values, values))
    rows = tuple(stretch for part in mixed for stretch in part)
    yield "ssm_in.weight", [("attn_qkv.weight", rows, False), ("attn_gate.weight", gates, False)]


def _stacked(sizes: tuple[int, ...]) -> list[Rows]:
    """Parts of these sizes, one after the other."""
    return _dealt(1, sizes)


def _dealt(n: int, sizes: tuple[int, ...]) -> list[Rows]:
    """Parts of which n times a stretch of each lies after that of the others."""
    return [(Stretch(sum(sizes[:place]), size, n, sum(sizes)),) for place, size in enumerate(sizes)]
