"""What a bundle's profile saves: bytes read per token with it and without, at one residency, on text it never saw.

python tools/profile_gain.py MODEL.edge --text FILE... [--residency 25%] [--windows 8] [--tokens 256] [--prefetch auto]

MODEL.edge was packed with a profile. Without it is the same bundle, its experts linked, less what the profile gave it.
Windows of text are run in turn as one process would meet them, all but the first quarter of each token by token, as
answers are. Bytes are those of these tokens, what was read ahead in vain included. Answers are the same either way.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import edgert
from edgert.cli.options import parse_shares
from edgert.storage.bundle import CHOICE, PROFILE
from edgert.types import ExpertCounts


def bare(bundle: Path, folder: Path) -> Path:
    """The bundle without what its profile gave it, in `folder`; its files are linked."""
    out = folder / bundle.name
    out.mkdir()
    for path in bundle.iterdir():
        if path.name not in (CHOICE, PROFILE):
            os.link(path, out / path.name)
    return out


def measure(bundle: Path, texts: Sequence[Path], args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a process reads for the windows of each text, begun anew for each."""
    found = []
    for path in texts:
        with edgert.load(bundle, residency=args.residency, context=args.tokens, prefetch=args.prefetch) as model:
            ids = model.tokenizer.encode(path.read_bytes().decode("utf-8"))
            counts, n_tokens, last = ExpertCounts(), 0, list[int]()
            for window in range(args.windows):
                first = window * (len(ids) - args.tokens) // args.windows
                for end in range(first + args.tokens // 4, first + args.tokens):
                    answer = model.generate(ids[first:end], max_tokens=1, temperature=0.0)
                    last.extend(answer.token_ids)
                    if answer.usage.prompt_tokens - answer.usage.cached_tokens == 1:
                        counts, n_tokens = counts + answer.usage, n_tokens + 1
        found.append(
            {
                "text": path.name,
                "tokens": n_tokens,
                "bytes_per_token": counts.bytes_read / n_tokens,
                "hit_rate": counts.hit_rate,
                "read_in_vain": (counts.prefetch_wasted + counts.prefetch_evicted) / max(counts.bytes_read, 1),
                "answers": hash(tuple(last)),
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure with and without; one line a text, then one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--residency", default=0.25, type=lambda text: parse_shares(text)[0])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prefetch", default="auto")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.bundle.absolute().parent) as folder:
        without = measure(bare(args.bundle, Path(folder)), args.text, args)
    with_profile = measure(args.bundle, args.text, args)
    for before, after in zip(without, with_profile, strict=True):
        if before["answers"] != after["answers"]:
            raise SystemExit(f"{before['text']}: the profile changed an answer")
        a, b = (one["bytes_per_token"] for one in (before, after))
        print(
            f"{before['text']}: {before['tokens']:,} tokens, {a:,.0f} bytes each without, {b:,.0f} with the profile "
            f"({b / a:.3f}), hits {before['hit_rate']:.1%} and {after['hit_rate']:.1%}",
            flush=True,
        )
    print(json.dumps({"without": without, "with": with_profile}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
