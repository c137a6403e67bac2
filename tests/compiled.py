"""What tests call of the functions that otherwise only compiled code calls."""

from __future__ import annotations

from typing import Any

from edgert.devices import routing
from edgert.quant import functions, matmul
from edgert.quant.jit import kernel


@kernel
def choose_row(scores: Any, router: int, bias: int, work: Any, ids: Any, weights: Any, order: Any) -> None:
    """See routing.choose_row."""
    routing.choose_row(scores, router, bias, work, ids, weights, order)


@kernel
def rms_norm(x: int, weight: int, out: int, n: int, eps: float) -> None:
    """See functions.rms_norm."""
    functions.rms_norm(x, weight, out, n, eps)


@kernel
def quantise_row(x: int, n: int, groups: int) -> None:
    """See functions.quantise_row."""
    functions.quantise_row(x, n, groups)


@kernel
def multiply(
    matrix: int, rows: int, first: int, count: int, tile: int, n_tiles: int, out: int, stride: int, scratch: int
) -> None:
    """See matmul.multiply."""
    matmul.multiply(matrix, rows, first, count, tile, n_tiles, out, stride, scratch)
