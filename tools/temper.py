"""Give a GGUF model the temperature that suits a text, as a subject for quantisation studies.

python tools/temper.py MODEL.gguf --text FILE --out TEMPERED.gguf [--chunks 64] [--chunk 512]

A model that is surer of a text than it should be gains from noise: its perplexity falls when its weights are rounded,
and says nothing of what rounding costs. One factor on the logits (temperature scaling, arXiv 1706.04599), fitted on
text that is not measured on, lessens that. It goes into the last norm's weights; all others stay to the bit.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import gguf
import numpy as np
from measured_text import measured_text

import edgert
from edgert.divergence import scored_rows
from edgert.errors import EdgertError, OptionError, UnsupportedError
from edgert.perplexity import chunks as cut
from edgert.types import Floats

_NORM = "output_norm.weight"
_TRIED = np.exp(np.linspace(math.log(0.5), math.log(2.0), 33))  # temperatures


def fitted(rows: Iterable[tuple[Floats, int]]) -> tuple[float, float, float]:
    """(temperature, perplexity without it, perplexity with it) over rows of logits (n_vocab,) and what came next.

    OptionError where the best temperature lies outside of 0.5 to 2, or there are no rows.
    """
    losses, n_rows, plain = np.zeros(len(_TRIED)), 0, 0.0
    for logits, token in rows:
        relative = logits.astype(np.float64) - logits.max()
        for i, temperature in enumerate(_TRIED):
            losses[i] += _loss(relative / temperature, token)
        plain += _loss(relative, token)
        n_rows += 1
    best = int(losses.argmin())
    if not n_rows or best in (0, len(_TRIED) - 1):
        raise OptionError("--text: no temperature from 0.5 to 2 is its best; give a text that is more like the model's")
    a, b, c = losses[best - 1 : best + 2]
    place = 0.5 * (a - c) / (a - 2 * b + c)  # of the parabola through the best and its neighbours
    lowest = b - 0.25 * (a - c) * place
    ratio = _TRIED[1] / _TRIED[0]
    return float(_TRIED[best] * ratio**place), math.exp(plain / n_rows), math.exp(lowest / n_rows)


def _loss(scores: Floats, token: int) -> float:
    """Negative log-likelihood of a token in nats; scores (n_vocab,) with 0 as the largest, or less."""
    return math.log(float(np.exp(scores).sum())) - float(scores[token])


def _rows(path: Path, text: str, n_chunks: int, chunk: int) -> Iterable[tuple[Floats, int]]:
    """Logits and next tokens of the second halves of chunks, as perplexity scores them."""
    with edgert.load(path, context=chunk) as model:
        tokenizer = model.tokenizer
        ids = cut(tokenizer.encode(text), chunk, n_chunks, tokenizer.bos_id if tokenizer.add_bos else None)
        with model.held() as parts:
            for each in ids:
                yield from zip(scored_rows(parts, list(each)), each[len(each) // 2 + 1 :], strict=True)


def fold(path: Path, temperature: float, out: Path) -> None:
    """Copy a model, its last norm's weights divided by a temperature. UnsupportedError where they are not float32."""
    aside = out.with_name(f"{out.name}.part")
    shutil.copyfile(path, aside)
    try:
        tensors = [one for one in gguf.GGUFReader(aside, "r+").tensors if one.name == _NORM]
        if not tensors or tensors[0].tensor_type != gguf.GGMLQuantizationType.F32:
            raise UnsupportedError(f"{path}: {_NORM} is missing or not F32, so a temperature has no place in it")
        tensors[0].data[:] = tensors[0].data / np.float32(temperature)
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Fit, write, and say what it did; the exit status is 2 for what the caller can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=measured_text, metavar="FILE", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=512)
    args = parser.parse_args(argv)
    try:
        temperature, plain, tempered = fitted(_rows(args.model, args.text, args.chunks, args.chunk))
        fold(args.model, temperature, args.out)
    except EdgertError as error:
        print(f"temper.py: {error}", file=sys.stderr)
        return 2
    print(f"temperature {temperature:.4f}: perplexity {plain:.4f} -> {tempered:.4f}, wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
