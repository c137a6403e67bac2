"""EdgeMoE's way to choose bits (arXiv 2308.14352), run on a real model: two widths, each expert tried by itself.

The order of things is edgert.experts.edgemoe's; here is what it takes to measure an expert alone at the low width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.bits import PROJECTIONS, Bits
from edgert.experts.profile import Profile
from edgert.pack_meter import Meter
from edgert.quant.formats import FORMATS, Format
from edgert.quantising import Bench, make_tiles, put_expert, put_layer, reader, trial_chunks
from edgert.tile_store import TileStore

if TYPE_CHECKING:
    from edgert.states import States
    from edgert.trial import Trial
    from edgert.weights import Weights

BASE, LOW = FORMATS["int4"], FORMATS["int2"]
_CHUNKS = 4  # of calibration text for each expert's turn


def low_bits(low: npt.NDArray[np.bool_], quantiser: str, hot: Format | None) -> Bits:
    """Two bits for the experts of `low` (n_layers, n_expert), four for the others."""
    choice = np.repeat(low[..., None].astype(np.int64), len(PROJECTIONS), axis=2)
    return Bits((BASE, LOW), choice, hot, quantiser)


class Alone(NamedTuple):
    """What became of the model with each expert alone at the low width, (n_layers, n_expert): nats a token.

    loss: on calibration text; kl: divergence there from the model with all experts at the base width. Not a number for
    experts that were never routed to, which so keep the base width.
    """

    loss: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]


def try_alone(
    bench: Bench,
    weights: Weights,
    states: States,
    profile: Profile,
    store: TileStore,
    trial: Trial,
    quantiser: str,
    every: int = 1,
    n_chunks: int | None = None,
) -> Alone:
    """Try every expert alone at the low width, all others at the base. The tiles of both are left in the store.

    trial: of a model with exact activations, or rounding them hides what one expert costs. every: only each so many
    experts of a layer, other ones in each layer; the others are not a number. n_chunks: of calibration text for each
    turn, by default 4. What became of each is kept in the bench's folder, so that a kill costs one expert's turn.
    """
    n_chunks = n_chunks or _CHUNKS
    shape, chunks = profile.record_bytes.shape, trial_chunks(profile, n_chunks)
    kept = bench.store("alone", profile, quantiser, BASE.name, LOW.name, str(n_chunks))
    base, low = (
        low_bits(np.full(shape, lowered), quantiser, None).where_they_fit(weights.config) for lowered in (False, True)
    )
    for bits in (base, low):
        make_tiles(bench, weights, states, bits, store)
    for layer in profile.layers:
        put_layer(trial, weights, base, reader(base, store), layer)
    places = [(layer, expert) for layer in profile.layers for expert in range(layer % every, profile.n_expert, every)]
    routed = profile.frequency() > 0
    turns = {place: kept.array("-".join(map(str, place))) for place in places if routed[place]}
    missing = [place for place, turn in turns.items() if turn is None]
    meter = Meter(
        bench.progress,
        "one expert at a time",
        len(turns),
        len(turns) - len(missing),
        speed=lambda rate: f"{rate:.1f} experts/s",
    )
    if missing:
        trial.compare_with_this(chunks)
    for layer, expert in missing:
        put_expert(trial, weights, low, reader(low, store), layer, expert)
        measured = trial.measure(chunks)
        turn = turns[layer, expert] = np.array([measured.losses.mean(), measured.kl])
        kept.put_array(f"{layer}-{expert}", turn)
        put_expert(trial, weights, base, reader(base, store), layer, expert)
        meter.add(1, f"layer {layer}, expert {expert}")
    found = Alone(np.full(shape, np.nan), np.full(shape, np.nan))
    for place, values in turns.items():
        found.loss[place], found.kl[place] = values if values is not None else (np.nan, np.nan)
    return found
