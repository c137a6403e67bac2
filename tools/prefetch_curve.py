"""Compare decoding with and without reading ahead, in runs that alternate: A B B A, on the model's own text.

python tools/prefetch_curve.py MODEL [--residency 12.5%,25%,50%] [--flash 0,100,30] [--turns 7] [--tokens 64]

One process holds the model, and what decides about reading ahead is changed between the runs; the text goes on. (Of two
processes with the same model, one may read the same flash 15 % faster throughout: it lies in the memory they got.) Each
residency is measured, and each limit of the flash in MB/s (0: none; others need root and cgroups). Then the routes of
the text are replayed with all policies and predictors. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from edgert.loading import Parts, load_parts

_LOWEST = 0.98  # reading ahead is never to be slower than this


class WorkerError(Exception):
    """The process that holds a model did not do what it should."""


def compare(options: argparse.Namespace, residency: float, flash_mb: int) -> dict[str, Any]:
    """Turns of both at one residency and one limit of the flash, in a process of their own. WorkerError, CageError."""
    context = multiprocessing.get_context("spawn")  # a fork would take this process's threads for its own
    line, other = context.Pipe()
    process = context.Process(target=_serve, args=(other, options, residency, flash_mb), daemon=True)
    process.start()
    other.close()
    assert process.pid is not None
    with ExitStack() as after, ExitStack() as held:
        held.callback(process.join)
        held.callback(line.close)  # the process ends then
        experts_path = _answer(line)
        if flash_mb:
            after.enter_context(SlowFlash(experts_path, flash_mb * 1_000_000)).add(process.pid)
        line.send("go")
        found: dict[str, Any] = _answer(line)
    return found


def _answer(line: Any) -> Any:
    """What the other side says; WorkerError if that is an error or nothing."""
    try:
        answer = line.recv()
    except (EOFError, OSError):
        raise WorkerError("the process with the model ended early; what it said is above") from None
    if isinstance(answer, Exception):
        raise WorkerError(f"{type(answer).__name__}: {answer}")
    return answer


def _serve(line: Any, options: argparse.Namespace, residency: float, flash_mb: int) -> None:
    try:
        line.send(_compare(line, options, residency, flash_mb))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as problem:
        line.send(problem)


@contextmanager
def _loaded(options: argparse.Namespace, residency: float, test: Test, trace: str | None = None) -> Iterator[Parts]:
    """The model, with room for all turns of the test."""
    parts = load_parts(
        options.model,
        memory=None,
        residency=residency,
        policy=options.policy,
        prefetch="auto",
        trace=trace,
        context=context_for([test], 2 * options.turns, options.warm),
        threads=options.threads,
        device="auto",
        kv_type="f16",
        activations="int8",
        progress=lambda stage, fraction: None,
    )
    try:
        yield parts
    finally:
        parts.close()


def _compare(line: Any, options: argparse.Namespace, residency: float, flash_mb: int) -> dict[str, Any]:
    test = Test("text", options.tokens)
    with ExitStack() as held:
        parts = held.enter_context(_loaded(options, residency, test))
        resident = parts.engine.residency
        assert isinstance(resident, Streamed), "the model does not stream: give residencies below 100%"
        ahead, flash = resident.prefetcher, flash_rate_of(resident)
        assert ahead is not None and flash is not None
        line.send(parts.file.path / "experts.bin")
        line.recv()
        deciding = {"off": ahead.controller.afresh("off"), "auto": ahead.controller.afresh("auto")}
        turns: dict[str, list[dict[str, Any]]] = {mode: [] for mode in deciding}
        n_on = [0]

        def count() -> None:
            n_on[0] += ahead.enabled

        ahead.decide_by(deciding["off"])
        runner = Runner(parts, count, warm=options.warm)
        runner.prepare(test)
        for turn in range(options.turns):
            for mode in ("off", "auto") if turn % 2 == 0 else ("auto", "off"):
                n_on[0] = 0
                ahead.decide_by(deciding[mode])
                rate, run = flash.measure(), runner.run(test)
                word = "off" if mode == "off" else ahead.controller.reason
                counts = {**asdict(run.counts), "hit_rate": run.counts.hit_rate}
                turns[mode].append({"seconds": run.seconds, "flash": rate, "on": n_on[0], "word": word, **counts})
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
    test = Test("text", options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.npz"
        with _loaded(options, max(options.residency), test, str(path)) as parts:
            runner = Runner(parts, lambda: None, warm=options.warm)
            runner.prepare(test)
            for _ in range(2 * options.turns):
                runner.run(test)
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
