"""How well cheap guesses order experts by what they cost at a low width: rank correlation with trying each by itself.

python tools/proxy_rank.py MODEL PROFILE.npz [--every N] [--chunks N] [--work FOLDER] [--json FILE]

Exact is EdgeMoE's way (arXiv 2308.14352): one expert at 2 bits, all others at 4, the loss on calibration text; and, as
a loss moves both ways while quantising one expert moves it little, the divergence from the model with all at 4 besides.
--every 4 tries a quarter of the experts, spread over all layers; --chunks says on how much text each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgert.edgemoe import BASE, LOW, try_alone
from edgert.experts.allocation import Numbers
from edgert.experts.profile import Profile, Sensitivity
from edgert.experts.sensitivity import output_errors, rank_correlation, second_order, wanda_score
from edgert.quantising import Bench, weights_of
from edgert.tile_store import TileStore
from edgert.trial import Trial
from edgert.weights import Weights


def guesses(profile: Profile, sensitivity: Sensitivity, weights: Weights) -> dict[str, Numbers]:
    """What each proxy says of each expert, (n_layers, n_expert) by its name."""
    low, base = (sensitivity.formats.index(format.name) for format in (LOW, BASE))
    share = sensitivity.rows / sensitivity.n_tokens
    error = output_errors(sensitivity.errors, np.ones_like(share), low, base)
    wanda = np.zeros_like(share)
    for layer, expert in np.argwhere(sensitivity.rows > 0).tolist():
        found = weights.expert(layer, expert)
        matrices = [matrix.whole().to_float() for matrix in (found.gate, found.up, found.down)]
        seen, made = profile.input_moments[layer, expert], profile.hidden_moments[layer, expert]
        wanda[layer, expert] = wanda_score(matrices, (seen, seen, made), int(sensitivity.rows[layer, expert]))
    return {
        "frequency": share,
        "router mass": profile.mass().astype(np.float64),
        "Wanda score": wanda,
        "output error": error,
        "output error x share of tokens": output_errors(sensitivity.errors, share, low, base),
        "second order (used)": second_order(sensitivity.errors, share, sensitivity.gains, low, base),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a line for each proxy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--every", type=int, default=1, metavar="N")
    parser.add_argument("--chunks", type=int, metavar="N")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    profile = Profile.load(args.profile)
    if profile.sensitivity is None:
        raise SystemExit(f"{args.profile} has no sensitivity; make it without --no-sensitivity")
    bench = Bench(args.model, args.work or Path(f"{args.profile}.rank"), _say, options={"context": profile.chunk})
    with bench.model() as model:
        states = bench.states(model, profile)
    with bench.model(exact=True) as model:
        weights, store = weights_of(model), TileStore(bench.work / "tiles", [str(args.profile)])
        with Trial(model) as trial:
            quantiser = profile.sensitivity.quantiser
            alone = try_alone(bench, weights, states, profile, store, trial, quantiser, args.every, args.chunks)
        found = guesses(profile, profile.sensitivity, weights)
    document = {}
    for name, guess in found.items():
        by = {exact: rank_correlation(guess, np.asarray(getattr(alone, exact))) for exact in ("loss", "kl")}
        document[name] = by
        print(f"{name:32} with the loss {by['loss']:+.3f}, with the divergence {by['kl']:+.3f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(document, indent=1))
    return 0


def _say(stage: str, fraction: float) -> None:
    print(f"\r{stage} ({fraction:.0%})    ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
