"""Compare edgert with llama.cpp on the same model file and machine, in pairs of runs that alternate: A B A B.

python tools/bench_peer.py MODEL.gguf --against path/to/llama-bench [--prompt 512,128] [--generate 64] [--depth 0]
                                      [--threads 2] [--pairs 5] [--repetitions 2]

edgert runs in one child process that keeps the model loaded and sleeps between its turns; llama-bench is started anew
for each of its turns. Neither one's loading, warming up or filling of the context counts. The peer runs at its best:
the fastest of its settings (load mode, flash attention, repacking) is looked for first, with short runs, for prompts
and for generation. Both keep keys and values as half floats. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from edgert.bench import tests_of
from edgert.bench_runner import Runner, Test, context_for
from edgert.loading import load_parts

_SHORT = {"prompt": 128, "generate": 16}  # tokens of the runs that look for the peer's best settings
_LONGEST_S = 3600


class PeerError(Exception):
    """The peer did not run, or what it printed is not what llama-bench prints."""


@dataclass(frozen=True)
class Settings:
    """Those of llama-bench that decide its speed on a CPU."""

    load_mode: str
    flash_attention: str
    repack: str

    def as_options(self) -> list[str]:
        """On its command line."""
        return ["-lm", self.load_mode, "-fa", self.flash_attention, "--repack", self.repack]


ALL = [Settings(*values) for values in product(("mmap", "none"), ("on", "off"), ("1", "0"))]


@dataclass(frozen=True)
class Peer:
    """A llama-bench and the model that it runs."""

    program: Path
    model: Path
    threads: int
    settings: Settings | None = None  # known already; None: to be found

    def rates(self, test: Test, settings: Settings, repetitions: int) -> list[float]:
        """Tokens a second of each repetition."""
        prompt, generate = (test.n_tokens, 0) if test.kind == "prompt" else (0, test.n_tokens)
        numbers = {"-p": prompt, "-n": generate, "-d": test.depth, "-t": self.threads, "-r": repetitions}
        command = [str(self.program), "-m", str(self.model)]
        for option, number in numbers.items():
            command += [option, str(number)]
        try:
            done = subprocess.run(
                [*command, *settings.as_options(), "-o", "json"], capture_output=True, text=True, timeout=_LONGEST_S
            )
        except (OSError, subprocess.TimeoutExpired) as problem:
            raise PeerError(f"{self.program}: {problem}") from problem
        if done.returncode:
            raise PeerError(f"{self.program} ended with {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
        return parse(done.stdout, test)

    def best_settings(self, tests: Sequence[Test]) -> dict[tuple[str, int], Settings]:
        """The fastest settings for each kind of test and depth.

        All are tried at a kind's first depth; at the others flash attention alone, as only attention depends on depth.
        """
        if self.settings is not None:
            return {(test.kind, test.depth): self.settings for test in tests}
        best: dict[tuple[str, int], Settings] = {}
        first: dict[str, Settings] = {}
        for test in tests:
            if (test.kind, test.depth) in best:
                continue
            short = replace(test, n_tokens=min(test.n_tokens, _SHORT[test.kind]))
            known = first.get(test.kind)
            tried = [replace(known, flash_attention=on) for on in ("on", "off")] if known else ALL
            best[test.kind, test.depth] = self._fastest(short, tried)
            first.setdefault(test.kind, best[test.kind, test.depth])
        return best

    def _fastest(self, test: Test, tried: Sequence[Settings]) -> Settings:
        """By rounds, the slower half leaving after each; the best run counts: what else the machine does slows runs."""
        best: dict[Settings, float] = {}
        problem: PeerError | None = None
        left = list(tried)
        while len(left) > 1 or not best:
            for settings in left:
                name = f"{test.name}: {' '.join(settings.as_options())}"
                try:
                    best[settings] = max(best.get(settings, 0.0), *self.rates(test, settings, 2))
                    say(f"{name} {best[settings]:.1f} tok/s")
                except PeerError as refused:  # some builds lack one of them
                    problem = refused
                    say(f"{name} does not run: {refused}")
            if not best:
                raise PeerError(f"no setting runs; the last one: {problem}")
            left = sorted((settings for settings in left if settings in best), key=lambda s: -best[s])
            left = left[: (len(left) + 1) // 2]
        return left[0]


def parse(printed: str, test: Test) -> list[float]:
    """The rates of `test` in what llama-bench printed with -o json; PeerError if they are not there."""
    wanted = {
        "n_prompt": test.n_tokens if test.kind == "prompt" else 0,
        "n_gen": test.n_tokens if test.kind == "generate" else 0,
        "n_depth": test.depth,
    }
    try:
        for run in json.loads(printed):
            if all(run[key] == value for key, value in wanted.items()):
                rates = [float(rate) for rate in run["samples_ts"]]
                if rates and min(rates) > 0:
                    return rates
    except (ValueError, KeyError, TypeError) as problem:
        raise PeerError(f"llama-bench printed something else than expected: {printed[:200]!r}") from problem
    raise PeerError(f"llama-bench printed nothing about {test.name}: {printed[:200]!r}")


# ---- edgert ----------------------------------------------------------------------------------------------------------
class Ours:
    """edgert with a model, in a process of its own."""

    def __init__(self, model: Path, context: int, threads: int) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._line, end = spawning.Pipe()
        self._process = spawning.Process(target=_serve, args=(end, str(model), context, threads), daemon=True)
        self._process.start()
        end.close()
        self._receive()  # loaded

    def rates(self, test: Test, repetitions: int) -> list[float]:
        """Tokens a second of each repetition."""
        self._line.send((test, repetitions))
        return [test.n_tokens / seconds for seconds in self._receive()]

    def _receive(self) -> Any:
        try:
            answer = self._line.recv()
        except EOFError:
            raise PeerError("edgert's process ended early; what it said is above") from None
        if isinstance(answer, str):
            raise PeerError(f"edgert: {answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._line.close()
        self._process.join()


def _serve(line: Any, model: str, context: int, threads: int) -> None:
    """The child: load, then run what is asked for until the other side is gone."""
    try:
        parts = load_parts(
            model,
            memory=None,
            residency=None,
            policy="auto",
            prefetch="auto",
            trace=None,
            context=context,
            threads=threads,
            device="auto",
            kv_type="f16",
            activations="int8",
            progress=lambda stage, fraction: None,
        )
        runner = Runner(parts)
        line.send([])
        while True:
            test, repetitions = line.recv()
            runner.prepare(test)
            line.send([runner.run(test).seconds for _ in range(repetitions)])
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as problem:
        line.send(f"{type(problem).__name__}: {problem}")


# ---- the comparison --------------------------------------------------------------------------------------------------
@dataclass
class Comparison:
    """The pairs of one test: tokens a second of both."""

    test: Test
    settings: Settings
    ours: list[float]
    theirs: list[float]

    @property
    def ratios(self) -> list[float]:
        """edgert over its peer, pair by pair."""
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "test": self.test.name,
            "edgert_tokens_per_s": self.ours,
            "peer_tokens_per_s": self.theirs,
            "ratios": self.ratios,
            "median_ratio": statistics.median(self.ratios),
            "peer_settings": asdict(self.settings),
        }


def compare(ours: Ours, peer: Peer, tests: Sequence[Test], n_pairs: int, repetitions: int) -> Iterator[Comparison]:
    """Pairs of runs, test by test: a run of edgert, one of the peer, and again."""
    best = peer.best_settings(tests)
    for test in tests:
        settings = best[test.kind, test.depth]
        say(f"{test.name}: the peer with {' '.join(settings.as_options())}")
        made = Comparison(test, settings, [], [])
        for pair in range(n_pairs):
            made.ours.append(statistics.median(ours.rates(test, repetitions)))
            made.theirs.append(statistics.median(peer.rates(test, settings, repetitions)))
            rates = f"edgert {made.ours[-1]:.1f}, peer {made.theirs[-1]:.1f} tok/s"
            say(f"{test.name}: pair {pair + 1} of {n_pairs}: {rates}, ratio {made.ratios[-1]:.2f}")
        say(f"{test.name}: median ratio {statistics.median(made.ratios):.2f}")
        yield made


def say(line: str) -> None:
    """A line to stdout, at once."""
    print(line, flush=True)


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


def _settings(text: str) -> Settings:
    return Settings(*text.split(","))


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--against", type=Path, required=True, metavar="LLAMA_BENCH", help="a built llama-bench")
    parser.add_argument("--prompt", type=_counts, default=[512, 128], metavar="N,...")
    parser.add_argument("--generate", type=_counts, default=[64], metavar="N,...")
    parser.add_argument("--depth", type=_counts, default=[0], metavar="N,...")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--pairs", type=int, default=5, metavar="N")
    parser.add_argument(
        "--settings", type=_settings, metavar="LM,FA,REPACK", help="the peer's, instead of a search: mmap,on,1"
    )
    parser.add_argument("--repetitions", type=int, default=2, metavar="N", help="within a turn; their median counts")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the comparison."""
    options = read_options()
    try:
        tests = tests_of(options.prompt, options.generate, options.depth)
        peer = Peer(options.against, options.model, options.threads, options.settings)
        ours = Ours(options.model, context_for(tests), options.threads)
        try:
            made = [one.as_json() for one in compare(ours, peer, tests, options.pairs, options.repetitions)]
        finally:
            ours.close()
    except KeyboardInterrupt:
        return 130
    except Exception as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    document = {
        "model": str(options.model),
        "peer": str(options.against),
        "threads": options.threads,
        "pairs": options.pairs,
        "repetitions": options.repetitions,
        "tests": made,
    }
    say(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
