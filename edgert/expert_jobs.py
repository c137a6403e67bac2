"""What is computed for one expert by itself, in whichever process: the cost of formats, or the tiles of chosen ones.

A job holds all that it needs, and jobs may run in any order and again: the same bits come of it on machines of one kind
with one NumPy. Other instruction sets or another NumPy, whose linear algebra picks its kernels by them, may round
otherwise, and so now and then take another integer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.quant.formats import FORMATS, MatrixSource
from edgert.quant.quantise_expert import Biases, option_errors, quantise_expert
from edgert.states import States
from edgert.types import Floats
from edgert.weights import Weights

Bytes = npt.NDArray[np.uint8]
PROBE = "int3"  # the format in which a layer's experts are put to learn what their errors cost


@dataclass(frozen=True)
class ExpertJob:
    """One expert: its weights, what they multiplied, and the formats to quantise to.

    gate, up: (d_expert, d_model), down: (d_model, d_expert), float16 where the source has no more. rows: (n_tokens,
    d_model) with their router weights (n_tokens,). formats: those to be tried, or one each for gate, up and down ("":
    nothing to do). biases: of gate and up, where the model has them.
    """

    layer: int
    expert: int
    gate: npt.NDArray[Any]
    up: npt.NDArray[Any]
    down: npt.NDArray[Any]
    rows: npt.NDArray[np.float16]
    importance: Floats
    formats: tuple[str, ...]
    quantiser: str
    activation: str
    biases: Biases | None = None

    def __str__(self) -> str:
        return f"layer {self.layer}, expert {self.expert}"

    def arrays(self) -> tuple[Floats, Floats, Floats, Floats]:
        """gate, up, down and rows as float32."""
        gate, up, down, rows = (a.astype(np.float32) for a in (self.gate, self.up, self.down, self.rows))
        return gate, up, down, rows


def errors_of(job: ExpertJob) -> Floats:
    """Errors of the expert's output, (3, n_formats + 1), with one projection at a time in each format.

    The last is that of PROBE, rounded to the nearest.
    """
    arrays, about = job.arrays(), (job.importance, job.activation, job.biases)
    found = [
        option_errors(*arrays[:3], [FORMATS[name] for name in names], quantiser, arrays[3], *about)
        for names, quantiser in ((job.formats, job.quantiser), ([PROBE], "rtn"))
    ]
    return np.concatenate(found, axis=1)


def tiles_of(job: ExpertJob) -> list[Bytes | None]:
    """Tiles of gate, up and down in their formats; None where there was nothing to do."""
    gate, up, down, rows = job.arrays()
    formats = [FORMATS[name] if name else None for name in job.formats]
    made = quantise_expert(gate, up, down, formats, job.quantiser, rows, job.importance, job.activation, job.biases)
    tiles: list[Bytes | None] = []
    for matrix in made.matrices:
        if matrix is None:
            tiles.append(None)
            continue
        out = np.zeros(matrix.format.matrix_bytes(*matrix.shape), np.uint8)
        matrix.pack(out)
        tiles.append(out)
    return tiles


def jobs_of(
    weights: Weights,
    states: States,
    wanted: Iterator[tuple[int, int, tuple[str, ...]]],
    quantiser: str,
) -> Iterator[ExpertJob]:
    """A job for each (layer, expert, formats) that is wanted; weights are read when a job is asked for."""
    biases_of = functools.lru_cache(1)(weights.expert_biases)
    for layer, expert, formats in wanted:
        found = weights.expert(layer, expert)
        gate, up, down = (_floats(matrix) for matrix in (found.gate, found.up, found.down))
        rows, importance, shares = states.of(layer, expert)
        if weights.config.router is not None and weights.config.router.on_inputs:
            rows, importance = rows * importance[:, None], np.ones_like(importance)
        importance = importance * np.sqrt(shares)  # it is squared
        rows16 = rows.astype(np.float16)  # as they were kept
        activation = weights.config.activation
        of_layer = biases_of(layer)
        biases = None if of_layer is None else (of_layer.gate[expert], of_layer.up[expert])
        yield ExpertJob(layer, expert, gate, up, down, rows16, importance, formats, quantiser, activation, biases)


def _floats(matrix: MatrixSource) -> npt.NDArray[Any]:
    """The weights (n_out, n_in): half floats as they are, everything else as float32."""
    whole = matrix.whole()
    return whole.values if whole.values.dtype == np.float16 else whole.to_float()
