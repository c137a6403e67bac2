"""Measure the time to the first token with experts on flash, beside what it may be: of a long prompt, and from cold.

python tools/ttft.py MODEL.edge [--prompt 1000] [--residency 25%] [--runs 5]
                                [--cold-prompt 16] [--cold-residency 50%] [--cold-runs 3]

The long prompt: at most 1.25 x max(the same with all experts in RAM, bytes of the other experts / flash rate) + 0.5 s.
From cold (a new process, the page cache dropped: needs root): at most (hot bytes + bytes of the experts that the prompt
is routed to) / flash rate + 2 s. Prompts are random ids. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import cage

import edgert
from edgert.bench import Result
from edgert.bench_runner import Test
from edgert.cli.options import parse_shares
from edgert.errors import EdgertError

_COLD = """
import json, sys
import edgert
from edgert.bench_runner import Test

path, share, n_tokens, threads = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
with edgert.load(path, residency=share, context=512, threads=threads) as model:
    ids = [(7919 * i) % model.config.n_vocab for i in range(1, n_tokens + 1)]
    usage = model.generate(ids, max_tokens=1).usage
    print("first", flush=True)
    experts = model.bench([Test("generate", 2)], repetitions=3, steady=True).results[0].experts
    print(json.dumps({
        "ttft_s": usage.ttft_s,
        "experts": usage.expert_hits + usage.expert_misses,
        "bytes_read": usage.bytes_read,
        "hot_bytes": model.summary()["memory"]["hot"],
        "flash_bytes_per_s": experts and experts.flash_bytes_per_s,
        "record_bytes": experts and experts.working_set / (model.config.n_layers * model.config.router.top_k),
    }))
"""


def long_prompt(options: argparse.Namespace) -> dict[str, Any]:
    """The first token of a long prompt. EdgertError."""
    streamed, whole = (_prompt(options, share) for share in (options.residency, 1.0))
    experts = streamed.experts
    assert experts is not None, f"at {options.residency:.0%} nothing is on flash"
    other_bytes = experts.buffer_bytes / experts.residency - experts.buffer_bytes
    reading_s = other_bytes / experts.flash_bytes_per_s
    return {
        "prompt": options.prompt,
        "residency": experts.residency,
        "ttft_s": streamed.seconds,
        "runs_s": streamed.runs_s,
        "resident_ttft_s": whole.seconds,
        "other_bytes": other_bytes,
        "bytes_read": experts.counts.bytes_read / len(streamed.runs_s),
        "flash_bytes_per_s": experts.flash_bytes_per_s,
        "reading_s": reading_s,
        "bar_s": 1.25 * max(whole.seconds, reading_s) + 0.5,
    }


def _prompt(options: argparse.Namespace, residency: float) -> Result:
    """Runs of the prompt with this share of the experts in RAM."""
    context = max(512, options.prompt)
    with edgert.load(options.model, residency=residency, context=context, threads=options.threads) as model:
        (result,) = model.bench([Test("prompt", options.prompt)], repetitions=options.runs, steady=True).results
        return result


def cold_start(options: argparse.Namespace) -> dict[str, Any]:
    """From the start of a process to its first token, nothing in the page cache."""
    arguments = [options.model, options.cold_residency, options.cold_prompt, options.threads]
    command = [sys.executable, "-c", _COLD, *map(str, arguments)]
    seconds, told = [], []
    for _ in range(options.cold_runs):
        cage.drop_page_cache()
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            seconds.append(time.perf_counter() - started)
            rest = process.stdout.read()
        if process.returncode or first != "first\n":
            raise RuntimeError("the process that starts from cold failed; what it said is above")
        told.append(json.loads(rest))
    flash = statistics.median(one["flash_bytes_per_s"] for one in told)
    expert_bytes = told[0]["experts"] * told[0]["record_bytes"]
    reading_s = (told[0]["hot_bytes"] + expert_bytes) / flash
    return {
        "prompt": options.cold_prompt,
        "residency": options.cold_residency,
        "first_token_s": statistics.median(seconds),
        "runs_s": seconds,
        "of_which_prompt_s": statistics.median(one["ttft_s"] for one in told),
        "hot_bytes": told[0]["hot_bytes"],
        "expert_bytes": expert_bytes,
        "flash_bytes_per_s": flash,
        "reading_s": reading_s,
        "bar_s": reading_s + 2.0,
    }


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="a bundle")
    parser.add_argument("--prompt", type=int, default=1000, metavar="N")
    parser.add_argument("--residency", type=lambda text: parse_shares(text)[0], default="25%", metavar="SHARE")
    parser.add_argument("--runs", type=int, default=5, metavar="N")
    parser.add_argument("--cold-prompt", type=int, default=16, metavar="N")
    parser.add_argument("--cold-residency", type=lambda text: parse_shares(text)[0], default="50%", metavar="SHARE")
    parser.add_argument("--cold-runs", type=int, default=3, metavar="N", help="0: only the long prompt")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    return parser.parse_args(arguments)


def main() -> int:
    """Measure both; exit code 1 if a bar was missed."""
    options = read_options()
    found: dict[str, Any] = {}
    try:
        found["long"] = found_long = long_prompt(options)
        print(
            f"{options.prompt} tokens at {found_long['residency']:.1%}: {found_long['ttft_s']:.2f} s, at most "
            f"{found_long['bar_s']:.2f}; all in RAM {found_long['resident_ttft_s']:.2f} s, reading "
            f"{found_long['other_bytes'] / 2**20:,.0f} MiB at {found_long['flash_bytes_per_s'] / 1e9:.2f} GB/s "
            f"{found_long['reading_s']:.2f} s",
            flush=True,
        )
        if options.cold_runs:
            found["cold"] = cold = cold_start(options)
            print(
                f"{options.cold_prompt} tokens at {cold['residency']:.1%} from cold: {cold['first_token_s']:.2f} s, of "
                f"which the prompt {cold['of_which_prompt_s']:.2f}, at most {cold['bar_s']:.2f}; hot "
                f"{cold['hot_bytes'] / 2**20:,.0f} + experts {cold['expert_bytes'] / 2**20:,.0f} MiB at "
                f"{cold['flash_bytes_per_s'] / 1e9:.2f} GB/s"
            )
    except KeyboardInterrupt:
        return 130
    except (EdgertError, cage.CageError, RuntimeError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(json.dumps({"model": options.model, "threads": options.threads, **found}))
    measured = [("long", "ttft_s"), ("cold", "first_token_s")]
    return int(any(found[name][key] > found[name]["bar_s"] for name, key in measured if name in found))


if __name__ == "__main__":
    sys.exit(main())
