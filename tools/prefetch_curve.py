"""Compare decoding with and without reading ahead, in runs that alternate: A B B A, on the model's own text.

python tools/prefetch_curve.py MODEL [--residency 12.5%,25%,50%] [--flash 0,100,30] [--turns 7] [--tokens 64]

Two processes hold the same model, one with --prefetch off, one with auto, and take turns with the same tokens; at each
residency, and at each limit of the flash in MB/s (0: none; others need root and cgroups). Then the routes of the text
are replayed with all policies and predictors. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cage import CageError
from slow_flash import SlowFlash

from edgert.bench_experts import flash_rate_of
from edgert.bench_runner import Runner, Test, context_for
from edgert.cli import replay as replay_command
from edgert.cli.options import parse_shares
from edgert.experts.replay import replay
from edgert.experts.streamed import Streamed
from edgert.experts.trace import Trace
from edgert.loading import load_parts

_LOWEST = 0.98  # reading ahead is never to be slower than this


class WorkerError(Exception):
    """A process that holds a model did not do what it should."""


class Worker:
    """A process with a model of its own, which runs when it is asked to."""

    def __init__(self, options: argparse.Namespace, residency: float, prefetch: str, trace: str | None = None) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would take this process's threads for its own
        self._line, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, options, residency, prefetch, trace), daemon=True)
        self._process.start()
        other.close()
        self.experts_path = Path(self.ask(None))

    @property
    def number(self) -> int:
        """The process."""
        assert self._process.pid is not None
        return self._process.pid

    def ask(self, request: str | None) -> Any:
        """The answer to "prepare" or "run"; WorkerError if there is none."""
        try:
            if request is not None:
                self._line.send(request)
            answer = self._line.recv()
        except (EOFError, OSError):
            raise WorkerError("a process with a model ended early; what it said is above") from None
        if isinstance(answer, Exception):
            raise WorkerError(f"{type(answer).__name__}: {answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._line.close()
        self._process.join()


def _serve(line: Any, options: argparse.Namespace, residency: float, prefetch: Any, trace: str | None) -> None:
    """A worker: load, then do what is asked for until the other side is gone."""
    try:
        test, n_on = Test("text", options.tokens), [0]
        with ExitStack() as held:
            parts = load_parts(
                options.model,
                memory=None,
                residency=residency,
                policy=options.policy,
                prefetch=prefetch,
                trace=trace,
                context=context_for([test], options.turns, options.warm),
                threads=options.threads,
                device="auto",
                kv_type="f16",
                activations="int8",
                progress=lambda stage, fraction: None,
            )
            held.callback(parts.close)
            resident = parts.engine.residency
            assert isinstance(resident, Streamed), "the model does not stream: give residencies below 100%"
            ahead, flash = resident.prefetcher, flash_rate_of(resident)

            def count() -> None:
                n_on[0] += ahead is not None and ahead.enabled

            runner = Runner(parts, count, warm=options.warm)
            line.send(str(parts.file.path / "experts.bin"))
            while True:
                if line.recv() == "prepare":
                    runner.prepare(test)
                    line.send(None)
                    continue
                n_on[0] = 0
                rate = flash.measure() if flash is not None else None
                run = runner.run(test)
                word = "off" if ahead is None else ahead.controller.reason
                counts = {**asdict(run.counts), "hit_rate": run.counts.hit_rate}
                line.send({"seconds": run.seconds, "flash": rate, "on": n_on[0], "word": word, **counts})
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as problem:
        line.send(problem)


# ---- the comparison --------------------------------------------------------------------------------------------------
def compare(options: argparse.Namespace, residency: float, flash_mb: int) -> dict[str, Any]:
    """Turns of both at one residency and one limit of the flash. WorkerError, CageError."""
    with ExitStack() as after, ExitStack() as held:
        workers = {}
        for mode in ("off", "auto"):
            workers[mode] = Worker(options, residency, mode)
            held.callback(workers[mode].close)
        if flash_mb:
            slow = after.enter_context(SlowFlash(workers["off"].experts_path, flash_mb * 1_000_000))
            for worker in workers.values():
                slow.add(worker.number)
        for worker in workers.values():
            worker.ask("prepare")
        turns: dict[str, list[dict[str, Any]]] = {mode: [] for mode in workers}
        for turn in range(options.turns):
            for mode in ("off", "auto") if turn % 2 == 0 else ("auto", "off"):
                turns[mode].append(workers[mode].ask("run"))
    return summary(residency, flash_mb, options.tokens, turns["off"], turns["auto"])


def summary(
    residency: float, flash_mb: int, n_tokens: int, off: Sequence[dict[str, Any]], auto: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Plain values: the median of the turns' ratios, and what either did in all turns together."""
    ratios = [without["seconds"] / ahead["seconds"] for without, ahead in zip(off, auto, strict=True)]
    return {
        "residency": residency,
        "flash_limit_mb_per_s": flash_mb or None,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "off": _side(off, n_tokens),
        "auto": _side(auto, n_tokens),
        "enabled_share": sum(turn["on"] for turn in auto) / (len(auto) * n_tokens),
        "word": auto[-1]["word"],
    }


def _side(turns: Sequence[dict[str, Any]], n_tokens: int) -> dict[str, Any]:
    seconds, n_all = sum(turn["seconds"] for turn in turns), len(turns) * n_tokens
    total = {name: sum(turn[name] for turn in turns) for name in turns[0] if name not in ("word", "flash", "hit_rate")}
    return {
        "tokens_per_s": n_tokens / statistics.median(turn["seconds"] for turn in turns),
        "hit_rate": total["expert_hits"] / (total["expert_hits"] + total["expert_misses"]),
        "bytes_per_token": total["bytes_read"] / n_all,
        "flash_bytes_per_s": statistics.median(turn["flash"] for turn in turns),
        "flash_idle_share": max(0.0, 1 - total["flash_busy_s"] / seconds),
        "flash_wait_share": total["flash_wait_s"] / seconds,
        **{f"{name}_bytes": total[f"prefetch_{name}"] for name in ("useful", "late", "wasted", "evicted")},
    }


def describe(found: dict[str, Any]) -> str:
    """One line for a person."""
    off, auto, limit = found["off"], found["auto"], found["flash_limit_mb_per_s"]
    where = f"{found['residency']:.1%}, flash {f'limited to {limit} MB/s' if limit else 'as it is'}"
    speed = f"{auto['tokens_per_s']:.2f} tok/s against {off['tokens_per_s']:.2f}, ratio {found['ratio']:.3f}"
    speed += f" ({min(found['ratios']):.3f} to {max(found['ratios']):.3f})"
    idle = f"without: flash {off['flash_bytes_per_s'] / 1e6:,.0f} MB/s, idle {off['flash_idle_share']:.0%}"
    hits = f"hits {off['hit_rate']:.1%} -> {auto['hit_rate']:.1%}"
    ahead = ", ".join(
        f"{auto[f'{name}_bytes'] / 2**20:,.1f} {name}" for name in ("useful", "late", "wasted", "evicted")
    )
    return f"{where}: {speed}; {idle}; {hits}; on {found['enabled_share']:.0%} ({found['word']}); MiB ahead: {ahead}"


def replayed(options: argparse.Namespace) -> dict[str, Any]:
    """Hits of all policies and recall of all predictors on the routes of the text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.npz"
        worker = Worker(options, max(options.residency), "off", str(path))
        try:
            worker.ask("prepare")
            for _ in range(options.turns):
                worker.ask("run")
        finally:
            worker.close()
        return replay_command.as_json(replay(Trace.load(path), options.residency), None)


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="a bundle, or what can be packed into one")
    parser.add_argument("--residency", type=parse_shares, default="12.5%,25%,50%", metavar="SHARE,...")
    parser.add_argument(
        "--flash", type=lambda text: [int(part) for part in text.split(",")], default="0,100,30", metavar="MB/S,..."
    )
    parser.add_argument("--turns", type=int, default=7, metavar="N")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of a turn")
    parser.add_argument("--warm", type=int, default=64, metavar="N", help="tokens that are not timed")
    parser.add_argument("--policy", default="auto", metavar="NAME")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--no-replay", action="store_true")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the comparison; exit code 1 if reading ahead was slower than it may be."""
    options = read_options()
    found, skipped = [], []
    try:
        for flash_mb in options.flash:
            for residency in options.residency:
                try:
                    found.append(compare(options, residency, flash_mb))
                    print(describe(found[-1]), flush=True)
                except CageError as problem:
                    skipped.append(f"{residency:.4g} at {flash_mb} MB/s: {problem}")
                    print(f"skipped: {skipped[-1]}", flush=True)
        routes = None if options.no_replay else replayed(options)
    except KeyboardInterrupt:
        return 130
    except (WorkerError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if routes is not None:
        replay_command.show(routes)
    settings = {name: getattr(options, name) for name in ("model", "turns", "tokens", "warm", "policy", "threads")}
    print(json.dumps({**settings, "pairs": found, "skipped": skipped, "replay": routes}))
    return int(any(pair["ratio"] < _LOWEST for pair in found))


if __name__ == "__main__":
    sys.exit(main())
