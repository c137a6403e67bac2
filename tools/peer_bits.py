"""What llama.cpp's own quantisations of a model cost, beside edgert's at the same size: perplexity and divergence.

python tools/peer_bits.py MODEL-f16.gguf PROFILE.npz --peer FOLDER --text FILE --calibration FILE [--chunks 64]
                          [--types Q8_0,Q4_0,...] [--work FOLDER] [--json FILE]

FOLDER holds llama-quantize, llama-imatrix and llama-perplexity. Each type is made without and with an importance matrix
of the calibration text and measured on the same chunks; its tensors' types are read back from its file, for rows that
do not fill a K-quant's block fall back. edgert's bundle gets as many bytes of weights, hot ones in 8 bits. --text takes
plain text, or a .jsonl of dialogues; see measured_text.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    n_bytes: int
    expert_bytes: int
    types: dict[str, int]  # bytes by type
    perplexity: float
    increase: float  # over its own program's source
    standard_error: float
    kl: float


class Peer:
    """llama.cpp's programs, a model in full precision, and the texts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder, self.model, self.work = args.peer, args.model, args.work
        self._text, self._chunks, self._threads = self.work / "text", args.chunks, args.threads
        self._text.write_bytes(args.text.encode())  # the same for both
        self._logits = self.work / "source-logits.bin"
        self._matrix = self.work / "imatrix.gguf"
        self._calibration = args.calibration

    def run(self, program: str, *words: object) -> str:
        """What a program prints. SystemExit if it fails."""
        found = subprocess.run([self.folder / program, *map(str, words)], capture_output=True, text=True)
        if found.returncode:
            raise SystemExit(f"{program} failed: {found.stderr[-2000:]}")
        return found.stdout + found.stderr

    def source(self) -> float:
        """The source's perplexity; keeps its predictions."""
        words = ["-f", self._text, "-c", 512, "--chunks", self._chunks, "-t", self._threads]
        said = self.run("llama-perplexity", "-m", self.model, *words, "--kl-divergence-base", self._logits)
        return float(_BASE.search(said)[1])  # type: ignore[index]

    def importance(self) -> None:
        """Make the importance matrix."""
        if not self._matrix.exists():
            words = ["-f", self._calibration, "-c", 512, "-t", self._threads, "-o", self._matrix]
            self.run("llama-imatrix", "-m", self.model, *words)

    def row(self, kind: str, *, with_matrix: bool) -> Row:
        """Make and measure one quantisation."""
        path = self.work / f"{kind}{'-imatrix' if with_matrix else ''}.gguf"
        matrix = ["--imatrix", self._matrix] if with_matrix else []
        self.run("llama-quantize", *matrix, self.model, path, kind, self._threads)
        words = ["-f", self._text, "-c", 512, "--chunks", self._chunks, "-t", self._threads]
        base = ["--kl-divergence-base", self._logits, "--kl-divergence"]
        said = self.run("llama-perplexity", "-m", path, *words, *base)
        types, experts = Counter[str](), 0
        for tensor in gguf.GGUFReader(path).tensors:
            if len(tensor.shape) > 1:
                types[tensor.tensor_type.name] += int(tensor.n_bytes)
                experts += int(tensor.n_bytes) if "_exps" in tensor.name else 0
        path.unlink()
        ratio = _RATIO.search(said)
        measured, divergence = _PERPLEXITY.search(said), _DIVERGENCE.search(said)
        assert measured and divergence and ratio, said[-3000:]
        increase, error = float(ratio[1]) - 1.0, float(ratio[2])
        name = path.stem
        total = sum(types.values())
        return Row(name, total, experts, dict(types), float(measured[1]), increase, error, float(divergence[1]))


def ours(args: argparse.Namespace, profile: Profile, size: int, name: str) -> Row:
    """edgert's bundle with at most so many bytes of weights."""
    out = args.work / f"{name}.edge"
    probe = args.work / "probe.edge"
    pack_bits(Request(args.model, probe, profile, Goal(bits_per_weight=2.6), options={"context": 512}), silent)
    m = read_manifest(probe)
    # The embedding table counts once where it is the head too: the bundle has rows of it on flash besides.
    hot = sum(tensor.n_bytes for tensor in m.tensors.values() if len(tensor.shape) == 2)
    n_weights = 8 * m.bits["bytes"] / m.bits["bits_per_weight"]
    goal = Goal(bits_per_weight=8 * (size - hot) / n_weights)
    found = pack_bits(Request(args.model, out, profile, goal, options={"context": 512}), silent)
    with load(args.model, context=512) as source, load(out, context=512) as bundle:
        tokenizer = source.tokenizer
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        parts = cut(tokenizer.encode(args.text), 512, args.chunks, bos)
        c = compare(source, bundle, parts)
    total = hot + found.bits["bytes"]
    types: dict[str, Any] = {"experts": found.bits["bytes"], "hot": hot}
    return Row(f"edgert {name}", total, total - hot, types, c.perplexity_after, c.increase, c.standard_error, c.kl)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--text", type=measured_text, metavar="FILE", required=True)
    for name in ("--peer", "--calibration"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", default=_TYPES, type=lambda text: text.split(","))
    parser.add_argument("--work", type=Path, default=Path("peer-bits"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    peer, profile, rows = Peer(args), Profile.load(args.profile), list[Row]()
    source = peer.source()
    print(f"llama.cpp's source: perplexity {source:.4f}", flush=True)
    peer.importance()
    for kind in args.types:
        for with_matrix in (False, True):
            rows.append(peer.row(kind, with_matrix=with_matrix))
            _print(rows[-1])
        rows.append(ours(args, profile, rows[-1].n_bytes, f"at {kind}"))
        _print(rows[-1])
    if args.json:
        args.json.write_text(json.dumps({"source": source, "rows": [asdict(row) for row in rows]}, indent=1))
    return 0


def _print(row: Row) -> None:
    kinds = ", ".join(f"{name} {size / 2**20:.2f}" for name, size in row.types.items())
    print(
        f"{row.name:18} {row.n_bytes / 2**20:7.2f} MiB, experts {row.expert_bytes / 2**20:7.2f}  perplexity "
        f"{row.perplexity:9.4f}  {row.increase:+8.3%} +/- {row.standard_error:.3%}  KL {row.kl:.5f}  ({kinds})",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
