"""What fewer bits would cost by a profile's sensitivity: the best mixes of formats by size, and single formats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from edgert.allocating import Problem
from edgert.bits import AS_SOURCE, Bits
from edgert.errors import OptionError
from edgert.proof import Proof
from edgert.quant.formats import FORMATS
from edgert.report_subject import Subject
from edgert.types import Floats, Ids

GOAL = 0.02  # increase of perplexity that is asked for where there is no bundle
_POINTS = 25


class Point(NamedTuple):
    """Bits per weight of the experts, and the increase of perplexity as a share."""

    name: str
    bits: float
    increase: float


@dataclass(frozen=True)
class Loss:
    """The curve of best mixes, points of one format for all, and the point that is chosen.

    chosen: of the bundle by its manifest, else the smallest mix within GOAL, else the one with least loss; None for a
    bundle with formats whose loss is not known. bits: of the chosen point, (n_layers, n_expert).
    """

    mixes: list[Point]
    uniform: list[Point]
    chosen: Point | None
    bits: Floats


def loss_curve(subject: Subject) -> Loss | None:
    """From the profile's sensitivity; None where it has none, or knows no format that fits, or the model is unknown."""
    sensitivity = subject.profile.sensitivity
    if sensitivity is None or subject.config is None:
        return None
    try:
        problem = Problem(sensitivity, subject.config)
    except OptionError:  # no format fits, or nothing was routed
        return None
    if len(problem.places) < len(problem.shapes):  # of what stays as the source has it nothing is known here
        return None
    least, most = problem.smallest().n_bytes, problem.most_bytes
    limits = np.linspace(least, most, _POINTS).astype(np.int64).tolist()
    mixes = [_point("", problem, found.n_bytes, found.loss) for found in map(problem.within_bytes, limits)]
    if (packed := subject.bits()) is None:
        try:
            found = problem.within_loss(math.log1p(GOAL))
        except OptionError:
            found = problem.largest()
        chosen = _point("", problem, found.n_bytes, found.loss)
        return Loss(mixes, _uniform(subject, problem), chosen, _bits_by_expert(subject, found.bits))
    choice = _packed(subject, problem, sensitivity.formats)
    of_bundle = None if choice is None else _point_of(problem, choice)
    return Loss(mixes, _uniform(subject, problem), of_bundle, packed)


def proof_of(subject: Subject) -> Proof | None:
    """What was measured when a bundle was packed; None where nothing was. ModelFileError for a damaged proof."""
    if subject.bundle is None or not subject.bundle.manifest.proof:
        return None
    return Proof.from_document(subject.bundle.manifest.proof, f"{subject.path}: its proof")


def _packed(subject: Subject, problem: Problem, formats: tuple[str, ...]) -> Ids | None:
    """The options that a bundle's experts have, (n_items,); None if one has a format whose loss was not measured."""
    names, numbers = subject.formats(), {name: number for number, name in enumerate(formats)}
    assert names is not None
    found = [numbers.get(name, -1) for name in names[problem.layers].reshape(-1).tolist()]
    return None if -1 in found else np.array(found)


def _point_of(problem: Problem, choice: Ids) -> Point:
    rows = np.arange(len(choice))
    return _point("", problem, int(problem.sizes[rows, choice].sum()), math.fsum(problem.losses[rows, choice]))


def _point(name: str, problem: Problem, n_bytes: int, loss: float) -> Point:
    return Point(name, 8 * n_bytes / problem.n_weights, math.expm1(loss))


def _uniform(subject: Subject, problem: Problem) -> list[Point]:
    """One point for each format that all matrices can have."""
    assert subject.profile.sensitivity is not None
    return [
        _point(name, problem, int(problem.sizes[:, place].sum()), math.fsum(problem.losses[:, place]))
        for place, name in enumerate(subject.profile.sensitivity.formats)
        if all(n_in % FORMATS[name].block == 0 for _, n_in in problem.shapes)
    ]


def _bits_by_expert(subject: Subject, bits: Bits) -> Floats:
    """Bits per weight of each expert, (n_layers, n_expert), NaN where there are none."""
    table = np.array([[*(f.matrix_bytes(*shape) for f in bits.formats), np.nan] for shape in subject.shapes])
    assert AS_SOURCE == -1, "the last of each row"
    n_bytes = sum(table[place][bits.choice[..., place]] for place in range(len(subject.shapes)))
    found: Floats = (8 * n_bytes / subject.weights_per_expert).astype(np.float32)
    return found
