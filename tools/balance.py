"""Balance the random weights of a Q4_0 model, so that tokens are routed evenly: the worst case for an expert buffer.

python tools/balance.py MODEL.gguf OUT.gguf

Q4_0 stores -8 to 7. Nibbles that were drawn evenly have a mean of -0.5: every matrix then adds the same vector to every
token, which after three layers is all that the routers see, and 16 to 20 of 64 experts are used. Here -8 becomes 0. For
models of random weights only: others would lose their answers. Needs numpy and gguf only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

_BLOCK_BYTES = 18  # a scale of 2 bytes, then two nibbles a byte
_AT_A_TIME = 1 << 20  # blocks


def balance(source: Path, out: Path) -> int:
    """Write `out`, aside first; the number of tensors that were balanced. Raises OSError, ValueError."""
    aside, changed = out.with_name(f"{out.name}.part"), 0
    try:
        shutil.copyfile(source, aside)
        reader = gguf.GGUFReader(aside, mode="r+")
        for tensor in reader.tensors:
            if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0:
                changed += 1
                blocks = tensor.data.reshape(-1, _BLOCK_BYTES)
                for first in range(0, len(blocks), _AT_A_TIME):
                    part = blocks[first : first + _AT_A_TIME, 2:]
                    part[:] = balanced(part)
        reader.data.flush()
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    return changed


def balanced(nibbles: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pairs of nibbles with 8, which stands for zero, in the place of 0, which stands for -8."""
    low, high = (nibbles & 0x0F) == 0, (nibbles & 0xF0) == 0
    return nibbles | low.astype(np.uint8) << 3 | high.astype(np.uint8) << 7


def main() -> int:
    """Balance a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    options = parser.parse_args()
    try:
        changed = balance(options.model, options.out)
    except (OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(f"{options.out}: {changed} tensors balanced")
    return 0


if __name__ == "__main__":
    sys.exit(main())
