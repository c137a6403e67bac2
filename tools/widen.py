"""Widen the experts of a model: the same routing and the same answers bit for bit, with more bytes to read.

python tools/widen.py MODEL.gguf OUT.gguf --width 4096 [--seed 1]

New neurons get rows of gate and up that are drawn from those the expert has, and columns of zeros in down: they are
computed and add nothing. So real routing can be measured with experts of several MiB each. Layer by layer; needs numpy
and gguf only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType

from edgert.errors import EdgertError, ModelFileError, OptionError

Bytes = npt.NDArray[np.uint8]
_WIDTHS = ("expert_feed_forward_length", "feed_forward_length")  # the first one that is there counts
_OURS = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture"}  # the writer adds these


def widen(source: Path, out: Path, width: int, seed: int = 1) -> None:
    """Write `out`, aside first: `source` with experts of `width` neurons. ModelFileError, OptionError."""
    reader = _open(source)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    old = _width(source, tensors)
    _check_width(tensors, old, width)
    aside = out.with_name(f"{out.name}.part")
    writer = gguf.GGUFWriter(aside, reader.fields["general.architecture"].contents())
    _copy_metadata(reader, writer, width, old)
    for tensor in reader.tensors:
        shape = _stored_shape(tensor, width) if "_exps." in tensor.name else tensor.data.shape
        n_bytes = int(np.prod(shape)) * tensor.data.dtype.itemsize
        writer.add_tensor_info(tensor.name, shape, tensor.data.dtype, n_bytes, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(seed)
    for tensor in reader.tensors:
        writer.write_tensor_data(_wider(tensor, width, old, random) if "_exps." in tensor.name else tensor.data)
    writer.close()
    os.replace(aside, out)


def _open(path: Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise ModelFileError(f"{path}: not readable as GGUF ({error}); give a model with routed experts") from None


def _width(path: Path, tensors: dict[str, Any]) -> int:
    """Neurons of an expert now."""
    gate = tensors.get("blk.0.ffn_gate_exps.weight")
    if gate is None:
        raise ModelFileError(f"{path}: blk.0.ffn_gate_exps.weight is missing; give a model with routed experts")
    return int(gate.shape[1])


def _check_width(tensors: dict[str, Any], old: int, width: int) -> None:
    """OptionError unless every down projection can have columns of that width."""
    for name, tensor in tensors.items():
        if name.endswith("ffn_down_exps.weight"):
            block = gguf.GGML_QUANT_SIZES[tensor.tensor_type][0]
            if width < old or width % block:
                kind = tensor.tensor_type.name
                raise OptionError(
                    f"--width {width}: it must be at least {old}, and a multiple of {block} for {name}, which is {kind}"
                )


def _copy_metadata(reader: Any, writer: gguf.GGUFWriter, width: int, old: int) -> None:
    """All keys, the width of an expert scaled (some files give that of all experts of a token together)."""
    architecture = reader.fields["general.architecture"].contents()
    names = (f"{architecture}.{name}" for name in _WIDTHS)
    changed = next(name for name in names if name in reader.fields)
    for key, field in reader.fields.items():
        if key in _OURS:
            continue
        value, kind = field.contents(), field.types[0]
        if key == changed:
            value = value // old * width
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, kind, sub_type=inner)


def _stored_shape(tensor: Any, width: int) -> tuple[int, ...]:
    """Shape of the wider tensor's data, slowest dimension first; of bytes where the type has blocks."""
    n_expert, rows, columns = tensor.data.shape
    if "ffn_down" not in tensor.name:
        return n_expert, width, columns
    return n_expert, rows, columns * width // int(tensor.shape[0])


def _wider(tensor: Any, width: int, old: int, random: np.random.Generator) -> Any:
    """The data of a tensor of experts with `width` neurons."""
    data: Bytes = tensor.data
    if "ffn_down" in tensor.name:  # zeros stand for zero in every type: its scales are zero
        wider = np.zeros(_stored_shape(tensor, width), data.dtype)
        wider[..., : data.shape[2]] = data
        return wider
    rows = random.integers(old, size=(len(data), width - old))
    return np.concatenate([data, np.take_along_axis(data, rows[..., None], 1)], 1)


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--width", type=int, default=4096, metavar="N", help="neurons of an expert")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of what the new neurons are drawn with")
    return parser.parse_args(arguments)


def main() -> int:
    """Widen a model."""
    options = read_options()
    try:
        widen(options.model, options.out, options.width, options.seed)
    except (EdgertError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(f"{options.out}: {options.out.stat().st_size / 2**20:,.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
