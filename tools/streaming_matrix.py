"""Compare streamed with resident answers over every combination of the choices that must not change them.

python tools/streaming_matrix.py [--models NAME,...] [--golden-tokens 64] [--tokens 64] [--predictors] [--every 1]

Policy x prefetch mode x share of the experts in RAM x threads x chunk, for the golden models and the embedded one: all
logits of a prompt, then tokens greedily, bit for bit. Ends at the first difference with status 1. A golden model takes
some minutes, and there are 45; `--every 3` runs every third combination, `--predictors` each predictor alone as well.
Needs tests/.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests")]

from models import engine_of, golden_names, golden_path  # noqa: E402   # found through the line above
from streaming_models import Host, answer  # noqa: E402

from edgert.experts.policies import POLICIES  # noqa: E402
from edgert.experts.predictors import DEFAULT, PREDICTORS  # noqa: E402
from edgert.loading import EMBEDDED, resolve  # noqa: E402
from edgert.pack import pack  # noqa: E402
from edgert.storage.bundle import Bundle  # noqa: E402

N_PROMPT = 70
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # 0: as few experts in RAM as run
THREADS = (1, 2)
MODES = {"off": ("off", ()), "auto": ("auto", DEFAULT), "always": ("always", DEFAULT)}
ALONE = {f"always by {name}": ("always", (name,)) for name in PREDICTORS}


class Plan(NamedTuple):
    """What is run of a model."""

    chunks: tuple[int, ...]
    guesses: dict[str, Any]  # prefetch mode and predictors
    n_tokens: int
    every: int = 1  # combination of so many


class Row(NamedTuple):
    """What came of a model."""

    name: str
    combinations: int
    compared: int  # logits and tokens
    n_bytes: int  # read
    hit_rates: tuple[float, float]
    seconds: float

    def __str__(self) -> str:
        low, high = self.hit_rates
        return (
            f"{self.name:24}{self.combinations:8,}{self.compared / 1e6:13,.1f} M{self.n_bytes / 2**30:9,.1f} GiB"
            f"   {low:4.0%} - {high:4.0%}{self.seconds:9,.0f} s"
        )


def combinations(plan: Plan) -> Iterator[tuple[int, str, str, float, int]]:
    """Threads, policy, guesses, share, chunk."""
    return islice(product(THREADS, POLICIES, plan.guesses, SHARES, plan.chunks), None, None, plan.every)


def compare(name: str, source: Path, bundle: Path, plan: Plan) -> Row:
    """Run all combinations of a model; raises SystemExit at the first difference."""
    engine, session = engine_of(source, activations="int8", kv_type="f16")
    prompt = [(7 * i * i + 3 * i + 11) % engine.config.n_vocab for i in range(N_PROMPT)]
    expected = answer(engine, session, prompt, N_PROMPT, plan.n_tokens)
    engine.device.close()
    started, n, n_bytes, rates, hosts = time.perf_counter(), 0, 0, list[float](), dict[int, Host]()
    with Bundle.open(bundle) as opened:
        for threads, policy, guesses, share, chunk in combinations(plan):
            if threads not in hosts:
                hosts[threads] = Host(opened, threads=threads)
            mode, predictors = plan.guesses[guesses]
            made = {"share": share, "policy": policy, "mode": mode, "predictors": predictors, "halves": n % 2 == 0}
            engine, session, experts = hosts[threads].streamed(**made)
            found = answer(engine, session, prompt, chunk, plan.n_tokens)
            wrong = differences(expected, found) + experts.residency.check()
            if wrong:
                raise SystemExit(f"{name}, {threads} threads, chunks of {chunk}, {made}: {'; '.join(wrong)}")
            counts, n = experts.residency.counts, n + 1
            n_bytes += counts.bytes_read
            rates.append(counts.expert_hits / (counts.expert_hits + counts.expert_misses))
        for host in hosts.values():
            host.__exit__(None, None, None)
    compared = n * (expected[0].size + plan.n_tokens)
    return Row(name, n, compared, n_bytes, (min(rates), max(rates)), time.perf_counter() - started)


def differences(expected: tuple[Any, list[int]], found: tuple[Any, list[int]]) -> list[str]:
    """What differs, in words."""
    wrong = []
    rows = (expected[0] != found[0]).any(axis=1).nonzero()[0]
    if len(rows):
        wrong.append(f"the logits differ in {len(rows)} positions from {rows[0]} on")
    if expected[1] != found[1]:
        wrong.append(f"the tokens are {found[1]}, not {expected[1]}")
    return wrong


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the matrix and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="names of golden models, and smollm2-moe; by default all")
    parser.add_argument("--golden-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of the embedded model")
    parser.add_argument("--predictors", action="store_true", help="each alone as well")
    parser.add_argument("--every", type=int, default=1, help="combination of so many")
    options = parser.parse_args(arguments)
    names = options.models.split(",") if options.models else [*golden_names(), EMBEDDED]
    guesses = MODES | (ALONE if options.predictors else {})
    of_golden = Plan((1, 7, 17, N_PROMPT), guesses, options.golden_tokens, options.every)
    of_embedded = Plan((20, N_PROMPT), guesses, options.tokens, options.every)
    print(f"{'model':24}{'runs':>8}{'compared':>15}{'read':>13}   {'hit rate':11}{'time':>11}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            embedded = name == EMBEDDED
            source = resolve(None) if embedded else golden_path(name)
            bundle = pack(source, Path(folder) / f"{name}.edge", progress=lambda stage, fraction: None)
            rows.append(compare(name, source, bundle, of_embedded if embedded else of_golden))
            print(rows[-1], flush=True)
    total, seconds = sum(row.combinations for row in rows), sum(row.seconds for row in rows)
    print(f"{total:,} combinations in {seconds:,.0f} s: every bit the same")


if __name__ == "__main__":
    main()
