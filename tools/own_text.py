"""Text that a model writes itself: the only text that it is as sure of as it should be, for telling losses apart.

python tools/own_text.py MODEL OUT.txt --openings FILE... [--tokens 66000] [--turns 100] [--begin 0]

On text that others wrote noise may help a model that is too sure, so that perplexity falls where weights get worse.
Here each document begins with the first five words of a line of the openings (every so many of the first 400 long ones
of each file, from line --begin on) and goes on for 980 tokens, sampled at temperature 1 from all that could follow, the
end of a text never chosen. The same openings, seeds and weights give the same text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgert import load

_LEAST, _LINES, _WORDS, _LENGTH, _CONTEXT = 200, 400, 5, 980, 1024  # characters, lines, words, tokens


def openings(files: Sequence[Path], turns: int, begin: int) -> Iterator[str]:
    """The first words of lines, `turns` of each file at most."""
    for file in files:
        lines = [line for line in file.read_text(encoding="utf-8").split("\n") if len(line) > _LEAST][:_LINES]
        for line in lines[begin :: max(1, _LINES // turns)]:
            yield " ".join(line.split()[:_WORDS])


def main(argv: Sequence[str] | None = None) -> int:
    """Write, and say how far it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--openings", type=Path, nargs="+", required=True, metavar="FILE")
    for name, value in (("--tokens", 66_000), ("--turns", 100), ("--begin", 0)):
        parser.add_argument(name, type=int, default=value, metavar="N")
    args = parser.parse_args(argv)
    whole = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    written = 0
    with load(args.model, context=_CONTEXT) as model, args.out.open("w", encoding="utf-8", newline="\n") as out:
        never = dict.fromkeys(model.tokenizer.stop_ids, float("-inf"))
        for seed, opening in enumerate(openings(args.openings, args.turns, args.begin), start=1000 * args.begin):
            answer = model.generate(opening, max_tokens=_LENGTH, seed=seed, logit_bias=never, **whole)
            out.write(f"{opening}{answer.text}\n")
            written += len(answer.token_ids)
            print(f"\r{written:,} of {args.tokens:,} tokens", end="", file=sys.stderr, flush=True)
            if written > args.tokens:
                break
    print(file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
