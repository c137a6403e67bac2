"""How far each quantiser's experts are from the source's, on rows they were not fitted to, and the seconds each takes.

python tools/quantiser_errors.py MODEL PROFILE.npz [--quantisers rtn,hqq,awq,gptq] [--formats int2,int3,...] [--every N]

Each of the tried experts is quantised for one half of the calibration rows that reach it; the error is that of its
output on the other half, weighted by the router, as a share of the output's own square. --every 8 tries an eighth of
the experts, spread over all layers. One process, so that seconds are those of one expert on all threads of NumPy.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgert.experts.profile import Profile
from edgert.quant.formats import FORMATS
from edgert.quant.quantise_expert import quantise_expert
from edgert.quant.quantisers import QUANTISERS
from edgert.quant.reference import activate
from edgert.quantising import Bench, profile_counts, weights_of
from edgert.types import Floats
from edgert.weights import Weights, silent

_FEWEST = 64  # rows of an expert, to be fitted to one half of them and measured on the other
_BLOCKS = 8  # that rows are cut into: neighbours are of one text, and stay together


def relative_error(
    before: Sequence[Floats], after: Sequence[Floats], rows: Floats, weight: Floats, activation: str
) -> float:
    """The squared error of an expert's output on rows (n_tokens, d_model), over the output's square, both weighted.

    before, after: gate, up and down. weight (n_tokens,): the router's.
    """
    outputs = [activate(rows @ gate.T, rows @ up.T, activation) @ down.T for gate, up, down in (before, after)]
    squares = [np.square(one).sum(axis=1, dtype=np.float64) for one in (outputs[0] - outputs[1], outputs[0])]
    square = np.square(weight, dtype=np.float64)
    return float(squares[0] @ square) / max(float(squares[1] @ square), 1e-30)


def tried(profile: Profile, every: int) -> list[tuple[int, int]]:
    """Layers and experts: each so many of a layer, other ones in each layer, that have rows enough."""
    counts = profile_counts(profile)
    places = [(layer, expert) for layer in profile.layers for expert in range(layer % every, profile.n_expert, every)]
    return [place for place in places if counts[place] >= _FEWEST]


def whole_expert(weights: Weights, layer: int, expert: int) -> list[Floats]:
    """gate, up and down as floats."""
    found = weights.expert(layer, expert)
    return [matrix.whole().to_float() for matrix in (found.gate, found.up, found.down)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a line for each quantiser and format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--quantisers", default=",".join(QUANTISERS), type=lambda text: text.split(","))
    parser.add_argument("--formats", default="int2,int3,int4,int5,int6,int8", type=lambda text: text.split(","))
    parser.add_argument("--every", type=int, default=8, metavar="N")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args(argv)
    profile = Profile.load(args.profile)
    bench = Bench(args.model, args.work or Path(f"{args.profile}.errors"), silent, options={"context": profile.chunk})
    with bench.model() as model:
        weights, states = weights_of(model), bench.states(model, profile)
        activation = weights.config.activation
        if weights.expert_biases(profile.layers[0]) is not None:
            raise SystemExit(f"{args.model}: experts with biases are not measured by this tool")
        if not (places := tried(profile, args.every)):
            raise SystemExit(f"{args.profile}: no expert has {_FEWEST} rows; profile more tokens")
        print(f"{len(places)} experts, medians", flush=True)
        for quantiser in args.quantisers:
            for name in args.formats:
                errors, seconds = [], []
                for place in places:
                    before = whole_expert(weights, *place)
                    rows, importance, _ = states.of(*place)
                    held = np.arange(len(rows)) * _BLOCKS // len(rows) % 2 == 1
                    started = time.perf_counter()
                    fitted = rows[~held], importance[~held]
                    found = quantise_expert(*before, [FORMATS[name]] * 3, quantiser, *fitted, activation)
                    seconds.append(time.perf_counter() - started)
                    after = [matrix.to_float() for matrix in found.matrices if matrix is not None]
                    errors.append(relative_error(before, after, rows[held], importance[held], activation))
                print(
                    f"{quantiser:5} {name:5} error {statistics.median(errors):8.3%}, "
                    f"{statistics.median(seconds):.3f} s an expert",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
