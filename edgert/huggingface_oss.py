"""The experts of a gpt-oss folder, stacked, gate and up dealt out in turns: MXFP4 in blocks and scales, or floats.

What they become are the tensors of a GGUF: gate and up apart, rows in order, MXFP4 with its bytes kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from gguf import GGMLQuantizationType as Type

from edgert.errors import ModelFileError, UnsupportedError
from edgert.huggingface_layout import EveryOther, FolderTensor, Form, Mxfp4, Run, Stored, Turned
from edgert.storage.json_file import short
from edgert.storage.safetensors_file import StoredTensor

FLOATS = {"F32": Type.F32, "F16": Type.F16, "BF16": Type.BF16}
_NAME = re.compile(r"mlp\.experts\.(gate_up_proj|down_proj)(_blocks|_scales|_bias|)")
_PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
_DAMAGED = "the folder is damaged: download it again"


class _Found(NamedTuple):
    name: str  # as the folder has it
    tensor: StoredTensor
    stored: Stored


class OssExperts:
    """Takes in the tensors of experts, layer by layer, and gives out what they are in GGUF."""

    def __init__(self, n_expert: int, where: str) -> None:
        self._n_expert, self._where = n_expert, where
        self._found: dict[tuple[int, str], dict[str, _Found]] = {}  # by layer and projection, then by what it is

    def add(self, layer: int, name: str, full_name: str, file: int, tensor: StoredTensor) -> bool:
        """Take in a tensor, if it is one of experts. Raises ModelFileError for one that cannot be."""
        match = _NAME.fullmatch(name)
        if match is None:
            return False
        rank, kinds = {"_blocks": (4, ("U8",)), "_scales": (3, ("U8",)), "_bias": (2, FLOATS)}.get(
            match[2], (3, FLOATS)
        )
        if tensor.kind not in kinds:
            raise UnsupportedError(
                f"{self._where}: the tensor {short(full_name)} holds {tensor.kind} numbers, edgert takes "
                f"{' or '.join(kinds)} there"
            )
        halves = len(_PARTS[match[1]])
        dealt = tensor.shape[-1 if match[2] in ("", "_bias") else 1] if len(tensor.shape) == rank else 0
        blocks = match[2] != "_blocks" or tensor.shape[-1] == 16
        if len(tensor.shape) != rank or tensor.shape[0] != self._n_expert or dealt % halves or not blocks:
            raise self._wrong(full_name, tensor, f"{self._n_expert} experts should be in {rank} dimensions")
        row_bytes = tensor.n_bytes // math.prod(tensor.shape[: 2 if match[2] in ("_blocks", "_scales") else -1])
        stored = Stored(full_name, (Run(file, tensor.offset),), tensor.n_bytes, row_bytes)
        self._found.setdefault((layer, match[1]), {})[match[2]] = _Found(full_name, tensor, stored)
        return True

    def tensors(self) -> Iterator[FolderTensor]:
        """All tensors. Raises ModelFileError where a part is missing or does not fit another."""
        for (layer, projection), found in self._found.items():
            parts = _PARTS[projection]
            for place, part in enumerate(parts):
                name = f"blk.{layer}.ffn_{part}_exps"
                if "_bias" in found:
                    yield self._bias(f"{name}.bias", found["_bias"], place, len(parts))
                if "" in found:
                    yield self._floats(f"{name}.weight", found[""], place, len(parts))
                if "_blocks" in found or "_scales" in found:
                    yield self._mxfp4(f"{name}.weight", found, place, len(parts))

    def _bias(self, name: str, found: _Found, place: int, halves: int) -> FolderTensor:
        width = found.stored.row_bytes // found.tensor.shape[-1]
        shape = (self._n_expert, found.tensor.shape[-1] // halves)
        form: Form | None = EveryOther(found.stored, width, place) if halves == 2 else None
        runs = () if form else found.stored.runs
        return FolderTensor(name, shape, FLOATS[found.tensor.kind], math.prod(shape) * width, runs, form=form)

    def _floats(self, name: str, found: _Found, place: int, halves: int) -> FolderTensor:
        """Experts in floats lie as (n_expert, n_in, n_out)."""
        width = found.stored.row_bytes // found.tensor.shape[-1]
        _, n_in, n_out = found.tensor.shape
        shape = (self._n_expert, n_out // halves, n_in)
        form = Turned(found.stored, n_in, width, place, halves)
        return FolderTensor(name, shape, FLOATS[found.tensor.kind], math.prod(shape) * width, (), form=form)

    def _mxfp4(self, name: str, found: dict[str, _Found], place: int, halves: int) -> FolderTensor:
        if "" in found:
            raise ModelFileError(f"{self._where}: {short(found[''].name)} is there in MXFP4 too; {_DAMAGED}")
        if len(found.keys() & {"_blocks", "_scales"}) < 2:
            has, lacks = ("_blocks", "scales") if "_blocks" in found else ("_scales", "blocks")
            raise ModelFileError(
                f"{self._where}: {short(found[has].name)} is there without its {lacks}; the folder is incomplete: "
                "download it again"
            )
        blocks, scales = found["_blocks"], found["_scales"]
        if blocks.tensor.shape[:3] != scales.tensor.shape:
            raise self._wrong(scales.name, scales.tensor, f"{short(blocks.name)} has {blocks.tensor.shape}")
        _, n_rows, n_blocks, _ = blocks.tensor.shape
        shape = (self._n_expert, n_rows // halves, n_blocks * 32)
        n_bytes = math.prod(shape) // 32 * 17
        form = Mxfp4(blocks.stored, scales.stored, place, halves)
        return FolderTensor(name, shape, Type.MXFP4, n_bytes, (), form=form)

    def _wrong(self, name: str, tensor: StoredTensor, expected: str) -> ModelFileError:
        return ModelFileError(
            f"{self._where}: the tensor {short(name)} has the shape {tensor.shape}, but {expected}; {_DAMAGED}"
        )
