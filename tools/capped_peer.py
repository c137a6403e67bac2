"""Compare edgert and llama.cpp (mmap) under the same memory limit, page cache counted, in runs that alternate.

python tools/capped_peer.py MODEL.edge --peer-model MODEL.gguf --against path/to/llama-bench
                            [--caps 2200,1400 | --residency 25%] [--pairs 5] [--generate 32] [--threads 2]
python tools/capped_peer.py MODEL.edge --runs 20 [--caps ...] [--prompt 2000] [--context 4096]

Each run starts with the page cache dropped, in a cgroup of its own, and generates from random token ids; edgert gets
--memory equal to the limit. --residency 25% in the place of --caps: the limit with which edgert holds that share of
the experts. The second form runs edgert alone: that it never touches the limit, also with a long prompt. Needs root and
writable cgroups. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cage
from bench_peer import PeerError, Settings, parse, say

from edgert.bench_runner import Test
from edgert.cli.options import parse_shares
from edgert.errors import EdgertError
from edgert.memory import STARTING_BYTES, Budget, plan_memory
from edgert.plan_model import open_plan_model

_MIB = 1 << 20
_MMAP = Settings("mmap", "auto", "0")  # repacking would copy all weights out of the mapped file, and be killed


@dataclass(frozen=True)
class Run:
    """One run: tokens a second, or why there are none; peak, hits and kills; for edgert, what its report says."""

    rate: float | None
    outcome: cage.Outcome
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def trouble(self) -> str:
        """What is wrong with it; empty if nothing is."""
        if self.outcome.kills:
            return f"killed {self.outcome.kills} times"
        if self.rate is None:
            return f"exit {self.outcome.status}: {' '.join(self.outcome.stderr.split())[-300:]}"
        return f"{self.outcome.limit_hits} limit hits" if self.outcome.limit_hits else ""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "tokens_per_s": self.rate,
            "seconds": self.outcome.seconds,
            "peak_mib": self.outcome.peak_bytes / _MIB,
            "limit_hits": self.outcome.limit_hits,
            "kills": self.outcome.kills,
            "status": self.outcome.status,
            **({"report": self.report} if self.report else {}),
        }

    def __str__(self) -> str:
        rate = f"{self.rate:.2f} tok/s" if self.rate is not None else self.trouble
        for experts in (test["experts"] for test in self.report.get("tests", ()) if test["kind"] == "generate"):
            if experts is not None:
                rate += f" ({experts['residency']:.0%} of the experts in RAM, {experts['hit_rate'] or 0:.0%} hits)"
        return f"{rate}, peak {self.outcome.peak_bytes // _MIB:,} MiB, {self.outcome.limit_hits:,} limit hits"


@dataclass(frozen=True)
class Work:
    """What a run does: a prompt, or none, and tokens generated."""

    generate: int
    prompt: int
    context: int
    threads: int
    timeout_s: float

    def edgert(self, model: Path, cap_mib: int) -> Run:
        """A run of edgert whose --memory is the limit."""
        options = {
            "--memory": f"{cap_mib}MiB",
            "--context": str(self.context),
            "-p": str(self.prompt or ""),
            "-n": str(self.generate),
            "-r": "1",
            "--threads": str(self.threads),
        }
        start = [sys.executable, "-c", "from edgert.cli.main import main; main()", "bench", str(model)]
        outcome = self._run([*start, *(word for pair in options.items() for word in pair)], cap_mib)
        try:
            report = json.loads(outcome.stdout.strip().rpartition("\n")[2])
            rates = {test["kind"]: test["tokens_per_s"] for test in report["tests"]}
            return Run(float(rates["generate"]), outcome, report)
        except (ValueError, KeyError, TypeError):
            return Run(None, outcome)

    def peer(self, program: Path, model: Path, cap_mib: int) -> Run:
        """A run of llama-bench over mmap."""
        numbers = {"-p": 0, "-n": self.generate, "-t": self.threads, "-r": 1}
        command = [str(program), "-m", str(model), *(str(word) for pair in numbers.items() for word in pair)]
        outcome = self._run([*command, *_MMAP.as_options(), "-o", "json"], cap_mib)
        try:
            return Run(parse(outcome.stdout, Test("generate", self.generate))[0], outcome)
        except PeerError:
            return Run(None, outcome)

    def _run(self, command: Sequence[str], cap_mib: int) -> cage.Outcome:
        cage.drop_page_cache()
        return cage.run(command, cap_mib * _MIB, timeout_s=self.timeout_s, env=dict(os.environ))


def cap_for(model: Path, residency: float, context: int, threads: int) -> int:
    """The smallest limit, in MiB, with which edgert holds that share of the experts in RAM. EdgertError: no such model.

    The plan is that of a run with --memory, its kernels compiled.
    """
    needs = open_plan_model(str(model)).needs(context, "f16", threads)
    cap = -(-max(needs.floor().total, STARTING_BYTES) // _MIB)
    while plan_memory(needs, Budget(cap * _MIB, cap * _MIB, cap * _MIB, strict=True)).residency < residency:
        cap += 1
    return cap


def compare(work: Work, options: argparse.Namespace, cap_mib: int) -> dict[str, Any]:
    """Pairs of runs under one limit: edgert, its peer, and again."""
    ours, theirs = [], []
    for pair in range(options.pairs):
        ours.append(work.edgert(options.model, cap_mib))
        theirs.append(work.peer(options.against, options.peer_model or options.model, cap_mib))
        say(f"{cap_mib} MiB, pair {pair + 1} of {options.pairs}: edgert {ours[-1]}; peer {theirs[-1]}")
    ratios = [a.rate / b.rate for a, b in zip(ours, theirs, strict=True) if a.rate and b.rate]
    median = statistics.median(ratios) if ratios else None
    if median is not None:
        say(f"{cap_mib} MiB: median ratio {median:.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    return {
        "cap_mib": cap_mib,
        "median_ratio": median,
        "ratios": ratios,
        "edgert": summary(ours),
        "peer": summary(theirs),
    }


def alone(work: Work, options: argparse.Namespace, cap_mib: int) -> dict[str, Any]:
    """Runs of edgert only."""
    ours = []
    for run in range(options.runs):
        ours.append(work.edgert(options.model, cap_mib))
        say(f"{cap_mib} MiB, run {run + 1} of {options.runs}: {ours[-1]}")
    found = summary(ours)
    say(f"{cap_mib} MiB: {found['limit_hits']} limit hits and {found['kills']} kills in {options.runs} runs")
    return {"cap_mib": cap_mib, "edgert": found}


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians, sums and all runs."""
    rates = [run.rate for run in runs if run.rate is not None]
    return {
        "median_tokens_per_s": statistics.median(rates) if rates else None,
        "highest_peak_mib": max(run.outcome.peak_bytes for run in runs) / _MIB,
        "limit_hits": sum(run.outcome.limit_hits for run in runs),
        "kills": sum(run.outcome.kills for run in runs),
        "failed": sum(run.rate is None for run in runs),
        "runs": [run.as_json() for run in runs],
    }


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="a bundle or a GGUF")
    parser.add_argument("--peer-model", type=Path, metavar="MODEL.gguf", help="the same model for the peer")
    parser.add_argument("--against", type=Path, metavar="LLAMA_BENCH", help="a built llama-bench")
    parser.add_argument(
        "--caps", type=lambda text: [int(part) for part in text.split(",")], default=[2200, 1400], metavar="MIB,..."
    )
    parser.add_argument("--residency", type=parse_shares, metavar="SHARE,...", help="instead of --caps")
    parser.add_argument("--pairs", type=int, default=5, metavar="N")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="of edgert, without --against")
    parser.add_argument("--generate", type=int, default=32, metavar="N")
    parser.add_argument("--prompt", type=int, default=0, metavar="N", help="also a prompt, for edgert alone")
    parser.add_argument("--context", type=int, default=512, metavar="N")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--timeout", type=float, default=3600.0, metavar="SECONDS", help="of one run")
    options = parser.parse_args(arguments)
    if options.against and options.prompt:
        parser.error("--prompt is for edgert alone: leave --against away")
    return options


def main() -> int:
    """Run the comparison; exit code 1 if edgert touched a limit, was killed or failed."""
    options = read_options()
    work = Work(options.generate, options.prompt, options.context, options.threads, options.timeout)
    try:
        if options.residency:
            numbers = options.context, options.threads
            options.caps = [cap_for(options.model, share, *numbers) for share in options.residency]
        one = compare if options.against else alone
        found = [one(work, options, cap_mib) for cap_mib in options.caps]
    except KeyboardInterrupt:
        return 130
    except (cage.CageError, EdgertError, OSError, subprocess.TimeoutExpired) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    document = {
        "model": str(options.model),
        "peer": str(options.against) if options.against else None,
        "peer_settings": " ".join(_MMAP.as_options()) if options.against else None,
        "generate": options.generate,
        "prompt": options.prompt,
        "context": options.context,
        "threads": options.threads,
        "caps": found,
    }
    say(json.dumps(document))
    bad = any(cap["edgert"][what] for cap in found for what in ("limit_hits", "kills", "failed"))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
