"""What llama.cpp's own quantisations of a model cost, beside edgert's at the same size: perplexity and divergence.

python tools/peer_bits.py MODEL-f16.gguf PROFILE.npz --peer FOLDER --text FILE... --calibration FILE [--chunks 64]
                          [--types Q8_0,Q4_0,...] [--hot 8] [--work FOLDER] [--json FILE]

FOLDER holds llama-quantize, llama-imatrix and llama-perplexity. Each type is made without and with an importance matrix
of the calibration text and measured on the same chunks; its tensors' types are read back from its file, for rows that
do not fill a K-quant's block fall back. What the source has quantised already is quantised again. edgert's bundle gets
as many bytes of weights, hot ones in --hot bits; 0 keeps the source's. --text takes plain text, or a .jsonl of
dialogues; see measured_text.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
from measured_text import measured_text

from edgert import load
from edgert.divergence import compare
from edgert.experts.profile import Profile
from edgert.goal import Goal
from edgert.pack_bits import Request, pack_bits
from edgert.perplexity import chunks as cut
from edgert.storage.bundle import read_manifest
from edgert.weights import silent

_TYPES = "Q8_0,Q4_0,Q4_K_M,Q3_K_M,Q2_K"
_PERPLEXITY = re.compile(r"Mean PPL\(Q\)\s*:\s*([\d.]+)\s*±\s*([\d.]+)")
_RATIO = re.compile(r"Mean PPL\(Q\)/PPL\(base\)\s*:\s*([\d.]+)\s*±\s*([\d.]+)")
_DIVERGENCE = re.compile(r"Mean\s+KLD:\s*([\d.]+)")
_BASE = re.compile(r"Final estimate: PPL = ([\d.]+)")


@dataclass(frozen=True)
class Row:
    """One quantisation, measured. Bytes of weights: matrices alone, the embedding table counted once."""

    name: str
    text: int  # which of those given
    n_bytes: int
    expert_bytes: int
    types: dict[str, int]  # bytes by type
    perplexity: float
    increase: float  # over its own program's source
    standard_error: float
    kl: float


class Peer:
    """llama.cpp's programs, a model in full precision, and the texts, which are the same for both."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._folder, self._model, self._work, self._threads = args.peer, args.model, args.work, args.threads
        self._chunks, self._calibration = args.chunks, args.calibration
        self._matrix = self._work / "imatrix.gguf"
        self._n_texts = len(args.text)
        for place, text in enumerate(args.text):
            (self._work / f"text-{place}").write_bytes(text.encode())

    def _run(self, program: str, *words: object, until: str = "") -> str:
        """What a program prints, which must have `until` in it. SystemExit if it fails.

        It is run again where the last lines are missing: some versions end before their log is written.
        """
        for _ in range(5):
            found = subprocess.run([self._folder / program, *map(str, words)], capture_output=True, text=True)
            if found.returncode == 0 and until in found.stdout + found.stderr:
                return found.stdout + found.stderr
        raise SystemExit(f"{program} failed, or does not say {until!r}: {found.stderr[-2000:]}")

    def _perplexity(self, model: Path, place: int, *words: str, until: str) -> str:
        about = ["-m", model, "-f", self._work / f"text-{place}", "-c", 512, "--chunks", self._chunks]
        logits = ["-t", self._threads, "--kl-divergence-base", self._work / f"source-logits-{place}"]
        return self._run("llama-perplexity", *about, *logits, *words, until=until)

    def sources(self) -> list[float]:
        """The source's perplexity of each text; keeps its predictions."""
        said = [self._perplexity(self._model, i, until="Final estimate: PPL") for i in range(self._n_texts)]
        return [float(_BASE.search(one)[1]) for one in said]  # type: ignore[index]

    def importance(self) -> None:
        """Make the importance matrix."""
        if not self._matrix.exists():
            words = ["-f", self._calibration, "-c", 512, "-t", self._threads, "-o", self._matrix]
            self._run("llama-imatrix", "-m", self._model, *words)

    def rows(self, kind: str, *, with_matrix: bool) -> list[Row]:
        """Make one quantisation, and measure it on each text."""
        path = self._work / f"{kind}{'-imatrix' if with_matrix else ''}.gguf"
        matrix = ["--imatrix", self._matrix] if with_matrix else []
        self._run("llama-quantize", "--allow-requantize", *matrix, self._model, path, kind, self._threads)
        types, experts = Counter[str](), 0
        for tensor in gguf.GGUFReader(path).tensors:
            if len(tensor.shape) > 1:
                types[tensor.tensor_type.name] += int(tensor.n_bytes)
                experts += int(tensor.n_bytes) if "_exps" in tensor.name else 0
        said = [self._perplexity(path, i, "--kl-divergence", until="Same top p:") for i in range(self._n_texts)]
        path.unlink()
        return [_row(path.stem, place, one, types, experts) for place, one in enumerate(said)]


def _row(name: str, place: int, said: str, types: Counter[str], experts: int) -> Row:
    ratio, measured, divergence = (pattern.search(said) for pattern in (_RATIO, _PERPLEXITY, _DIVERGENCE))
    assert measured and divergence and ratio, said[-3000:]
    increase, error = float(ratio[1]) - 1.0, float(ratio[2])
    sizes = sum(types.values()), experts, dict(types)
    return Row(name, place, *sizes, float(measured[1]), increase, error, float(divergence[1]))


def ours(args: argparse.Namespace, profile: Profile, size: int, name: str) -> list[Row]:
    """edgert's bundle with at most so many bytes of weights, on each text.

    Against the source with exact activations, as llama.cpp's: so rounding them to 8 bits is in both sides' figures. The
    embedding table counts once where it is the head too: the bundle has rows of it on flash besides.
    """
    tensors = [tensor for tensor in gguf.GGUFReader(args.model).tensors if len(tensor.shape) > 1]
    n_weights = sum(int(tensor.n_elements) for tensor in tensors if "_exps" in tensor.name)
    others = [tensor for tensor in tensors if "_exps" not in tensor.name]
    hot = sum(min(int(tensor.n_elements), int(tensor.n_bytes)) for tensor in others)  # in bytes, to begin with
    total = size + 1
    while total > size:
        goal = Goal(bits_per_weight=8 * (size - hot) / n_weights, hot=args.hot)
        out = args.work / f"{name}-{goal.bits_per_weight:.4f}bpw.edge"
        found = pack_bits(Request(args.model, out, profile, goal, options={"context": 512}), silent)
        manifest = read_manifest(out)
        hot = sum(tensor.n_bytes for tensor in manifest.tensors.values() if len(tensor.shape) == 2)
        total = hot + found.bits["bytes"]
        if total > size:
            shutil.rmtree(out)
    rows, types = list[Row](), {"experts": found.bits["bytes"], "hot": hot}
    with load(args.model, context=512, activations="f32") as source, load(out, context=512) as bundle:
        tokenizer = source.tokenizer
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        for place, text in enumerate(args.text):
            c = compare(source, bundle, cut(tokenizer.encode(text), 512, args.chunks, bos))
            sizes = total, total - hot, types
            rows.append(Row(f"edgert {name}", place, *sizes, c.perplexity_after, c.increase, c.standard_error, c.kl))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--text", type=measured_text, metavar="FILE", nargs="+", required=True)
    for name in ("--peer", "--calibration"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", default=_TYPES, type=lambda text: text.split(","))
    parser.add_argument("--hot", type=int, default=8, metavar="BITS")
    parser.add_argument("--work", type=Path, default=Path("peer-bits"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    peer, profile, rows = Peer(args), Profile.load(args.profile), list[Row]()
    sources = peer.sources()
    print("llama.cpp's source: perplexity", ", ".join(f"{one:.4f}" for one in sources), flush=True)
    peer.importance()
    for kind in args.types:
        for with_matrix in (False, True):
            rows += _said(peer.rows(kind, with_matrix=with_matrix))
        rows += _said(ours(args, profile, rows[-1].n_bytes, f"at {kind}"))
    if args.json:
        args.json.write_text(json.dumps({"sources": sources, "rows": [asdict(row) for row in rows]}, indent=1))
    return 0


def _said(rows: list[Row]) -> list[Row]:
    """The rows, printed."""
    for row in rows:
        kinds = ", ".join(f"{name} {size / 2**20:.2f}" for name, size in row.types.items())
        print(
            f"{row.name:18} {row.n_bytes / 2**20:7.2f} MiB, experts {row.expert_bytes / 2**20:7.2f}  text {row.text} "
            f"perplexity {row.perplexity:9.4f}  {row.increase:+8.3%} +/- {row.standard_error:.3%}  KL {row.kl:.5f}  "
            f"({kinds})",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
