"""What bits per expert cost: perplexity and divergence of a model with its experts in other formats, as one table.

python tools/bits_table.py MODEL PROFILE.npz [--text FILE] [--chunks 64] [--quantisers rtn,hqq,awq,gptq]
                           [--bpw 4.5,4,...] [--formats int4,int3-k,...] [--exact] [--work FOLDER] [--json FILE]

Uniform settings (all widths, groups, with minimum and without, and two-level scales) and mixed allocations, each put
into the loaded model in the place of its experts; hot weights stay as the source has them. Mixed ones are compared with
the lower hull of all uniform ones, interpolated in log perplexity over bits per weight, scales counted. --text takes
plain text, or a .jsonl of dialogues, see measured_text; without it what the profile kept back is measured on. With
--exact activations stay floats: what rounding them costs, the same for all settings, may hide what bits cost.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from measured_text import measured_text

from edgert.allocating import Problem
from edgert.bits import Bits, described, uniform
from edgert.experts.profile import Profile
from edgert.perplexity import chunks as cut
from edgert.proof_text import held_out_chunks
from edgert.quant.formats import FORMATS
from edgert.quantising import Bench, make_tiles, measure_sensitivity, put_layer, reader, weights_of
from edgert.trial import Trial
from edgert.weights import silent

_FEW = ("int2", "int3", "int4", "int5", "int6", "int8")  # of all quantisers
_TWO_LEVEL = ("int2-k", "int3-k", "int4-k", "int5-k", "int6-k")


@dataclass(frozen=True)
class Row:
    """One setting, measured."""

    name: str
    quantiser: str
    bits_per_weight: float
    n_bytes: int  # of the experts, scales counted
    perplexity: float
    increase: float  # of the perplexity, over the source's
    standard_error: float  # of the increase, paired by chunks
    kl: float
    top1: float


class Study:
    """One model, its profile, and the text that is measured on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.profile = Profile.load(args.profile)
        work = args.work or Path(f"{args.profile}.bits")
        self.bench = Bench(args.model, work, silent, options={"context": args.chunk})
        with self.bench.model() as model:
            self.states = self.bench.states(model, self.profile)
        self._model = self.bench.model(exact=args.exact)
        self.model = self._model.__enter__()
        self.weights = weights_of(self.model)
        self.chunks = self._chunks(args)
        self.trial = Trial(self.model)
        self.source = self.trial.measure(self.chunks)

    def _chunks(self, args: argparse.Namespace) -> list[list[int]]:
        """What is measured on, in chunks of token ids."""
        if args.text is None:
            return held_out_chunks(self.profile)[: args.chunks]
        tokenizer = self.model.tokenizer
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        return cut(tokenizer.encode(args.text), args.chunk, args.chunks, bos)

    def row(self, name: str, bits: Bits) -> Row:
        """Measure one setting."""
        store = self.bench.store(f"tiles-{bits.quantiser}", self.profile, bits.quantiser)
        make_tiles(self.bench, self.weights, self.states, bits, store)
        for layer in self.profile.layers:
            put_layer(self.trial, self.weights, bits, reader(bits, store), layer)
        found = self.trial.measure(self.chunks)
        difference = found.losses - self.source.losses
        rise, error = float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(len(difference))
        about = described(bits, self.weights.config)
        return Row(
            name,
            bits.quantiser,
            about["bits_per_weight"],
            about["bytes"],
            math.exp(float(found.losses.mean())),
            math.expm1(rise),
            math.exp(rise) * error,
            found.kl,
            found.top1,
        )

    def uniform_rows(self, quantisers: Sequence[str], names: Sequence[str]) -> Iterator[Row]:
        """Uniform settings, by default all, with the best quantiser, which is named last, and some with the others."""
        config = self.weights.config
        fit = [f for f in FORMATS.values() if f.is_integer and not f.table and f.name not in _TWO_LEVEL]
        fit += [FORMATS[name] for name in _TWO_LEVEL]
        fit = [f for f in fit if f.name in names] if names else fit
        fit = [f for f in fit if config.d_model % f.block == 0 and config.d_expert % f.block == 0]
        for quantiser in quantisers:
            for format in fit:
                if quantiser == quantisers[-1] or format.name in _FEW:
                    yield self.row(format.name, uniform(format, config, quantiser=quantiser))

    def mixed_rows(self, sizes: Sequence[float]) -> Iterator[Row]:
        """Mixed allocations at so many bits per weight."""
        sensitivity = self.profile.sensitivity or measure_sensitivity(self.bench, self.profile)
        problem = Problem(sensitivity, self.weights.config)
        for size in sizes:
            found = problem.within_bytes(int(size * problem.n_weights / 8))
            yield self.row(f"mixed {size:g}", found.bits)


def hull(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """The lower convex hull of (bits per weight, log of perplexity)."""
    points = sorted({(row.bits_per_weight, math.log(row.perplexity)) for row in rows})
    found: list[tuple[float, float]] = []
    for x, y in points:
        while len(found) > 1 and _turns_up(found[-2], found[-1], (x, y)):
            found.pop()
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def compare(rows: Sequence[Row], source: float) -> list[dict[str, float]]:
    """Each mixed setting beside the hull of the uniform ones at its size: rises of perplexity, and their ratio.

    Nothing where there are no uniform ones.
    """
    if not (edge := hull([row for row in rows if not row.name.startswith("mixed")])):
        return []
    xs, ys = [x for x, _ in edge], [y for _, y in edge]
    found = []
    for row in rows:
        if row.name.startswith("mixed"):
            at = math.exp(float(np.interp(row.bits_per_weight, xs, ys))) / source - 1.0
            ratio = row.increase / at if at > 0 else math.nan
            found.append({"bpw": row.bits_per_weight, "mixed": row.increase, "uniform": at, "ratio": ratio})
    return found


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--text", type=measured_text, metavar="FILE")
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--quantisers", default="rtn,hqq,awq,gptq", type=_names)
    parser.add_argument("--formats", default="", type=_names)
    parser.add_argument("--bpw", default="4.5,4,3.5,3,2.75,2.5", type=lambda text: [float(x) for x in _names(text)])
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    study, rows = Study(args), list[Row]()
    source = math.exp(float(study.source.losses.mean()))
    print(f"source: perplexity {source:.4f} ({len(study.chunks)} chunks of {args.chunk})", flush=True)
    for produce in (study.mixed_rows(args.bpw), study.uniform_rows(args.quantisers, args.formats)):
        for row in produce:
            rows.append(row)
            print(
                f"{row.name:14} {row.quantiser:5} {row.bits_per_weight:6.3f} bpw  perplexity {row.perplexity:9.4f}  "
                f"+{row.increase:8.3%} +/- {row.standard_error:.3%}  KL {row.kl:.3e}  top-1 {row.top1:.2%}",
                flush=True,
            )
    against = compare(rows, source)
    for one in against:
        print(f"{one['bpw']:.3f} bpw: mixed +{one['mixed']:.3%}, uniform +{one['uniform']:.3%}: {one['ratio']:.3f}")
    if args.json:
        document = {"source": source, "rows": [asdict(row) for row in rows], "mixed": against}
        args.json.write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
