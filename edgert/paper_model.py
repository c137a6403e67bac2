"""A model on paper: the table of tensors that its GGUF would have, from its configuration and a quantisation's name.

Types are those that llama-quantize gives, near enough to tell sizes within a few per cent. There are no weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from edgert.architectures import read_config
from edgert.errors import ModelFileError, OptionError
from edgert.huggingface_config import read_folder_config
from edgert.preset_keys import KeyPreset
from edgert.storage.gguf_values import TensorInfo
from edgert.storage.json_file import JsonObject
from edgert.tensor_table import EMBEDDING, HEAD, layer_tensors, model_tensors, optional_layer_tensors
from edgert.types import ModelConfig

# What most matrices are stored in, what the sensitive ones (some of the values and down projections), what the head.
QUANTISATIONS = {
    "q3_k_m": (Type.Q3_K, Type.Q4_K, Type.Q6_K),
    "q4_0": (Type.Q4_0, Type.Q4_0, Type.Q6_K),
    "q4_k_m": (Type.Q4_K, Type.Q6_K, Type.Q6_K),
    "q5_k_m": (Type.Q5_K, Type.Q6_K, Type.Q6_K),
    "q6_k": (Type.Q6_K, Type.Q6_K, Type.Q6_K),
    "q8_0": (Type.Q8_0, Type.Q8_0, Type.Q8_0),
    "f16": (Type.F16, Type.F16, Type.F16),
    "bf16": (Type.BF16, Type.BF16, Type.BF16),
}
DEFAULT_QUANTISATION = "q4_k_m"
_WHOLE = {"ffn_gate_inp.weight", "ssm_alpha.weight", "ssm_beta.weight"}  # small, and stored as they are
# For rows that are no multiple of 256, as llama-quantize chooses.
_FALLBACKS = {Type.Q3_K: Type.IQ4_NL, Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}


class PaperFile:
    """What looks like an open model and has a table of tensors alone; see storage.tensor_file.TensorFile."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.path, self.metadata, self.tensors = path, metadata, tensors
        self.parts: tuple[Path, ...] = ()
        self.n_bytes = sum(tensor.n_bytes for tensor in tensors.values())

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """ModelFileError: there is nothing to read."""
        raise ModelFileError(f"{self.path}: the tensor {name} is on paper only; name a file to run")

    def read_rows(self, name: str, first_row: int, n_rows: int) -> npt.NDArray[np.uint8]:
        """ModelFileError: there is nothing to read."""
        return self.read(name)

    def close(self) -> None:
        """Nothing to do."""


def paper_model(config_json: JsonObject, quantisation: str, name: str, path: Path) -> tuple[PaperFile, ModelConfig]:
    """The model that a config.json describes, as GGUF in a quantisation of QUANTISATIONS.

    Raises UnsupportedError and ModelFileError for what edgert does not run or makes no sense, OptionError for a
    quantisation that is not known.
    """
    _check(quantisation)
    folder = read_folder_config(config_json)
    metadata = {**folder.metadata, "general.name": name}
    config = read_config(metadata, str(path))
    experts = Type.MXFP4 if folder.quantised == "mxfp4" else None  # which GGUFs keep, whatever the rest
    types = _types(config, folder.tied, folder.family.biases, experts, quantisation)
    return PaperFile(path, metadata, types), config


def paper_preset(preset: KeyPreset, quantisation: str, path: Path) -> tuple[PaperFile, ModelConfig]:
    """The same of a preset by GGUF's keys."""
    _check(quantisation)
    config = read_config(preset.metadata, str(path))
    types = _types(config, preset.tied, preset.biases, preset.experts, quantisation)
    return PaperFile(path, preset.metadata, types), config


def _check(quantisation: str) -> None:
    if quantisation not in QUANTISATIONS:
        raise OptionError(f"{quantisation!r:.40} is no quantisation known here; use {', '.join(QUANTISATIONS)}")


def _types(
    config: ModelConfig, tied: bool, biases: Sequence[str], experts: Type | None, quantisation: str
) -> dict[str, TensorInfo]:
    """The table of tensors. biases: which of attention's there are; experts: their own type, if they have one."""
    body, more, head = QUANTISATIONS[quantisation]
    embedding = (config.n_vocab, config.d_model)
    tensors = [_tensor(EMBEDDING, embedding, head if tied else body)]
    vectors = {name: shape for name, shape in model_tensors(config).items() if name != EMBEDDING}
    tensors += [_tensor(name, shape, Type.F32) for name, shape in vectors.items()]
    if not tied:
        tensors.append(_tensor(HEAD, embedding, head))
    for layer in range(config.n_layers):
        optional = {name: shape for name, shape in optional_layer_tensors(config, layer).items() if name in biases}
        for name, shape in {**layer_tensors(config, layer), **optional}.items():
            kind = more if _is_sensitive(name, layer, config.n_layers) else body
            if len(shape) == 1 or name in _WHOLE:
                kind = Type.F32
            elif experts is not None and name.endswith("_exps.weight"):
                kind = experts
            tensors.append(_tensor(f"blk.{layer}.{name}", shape, kind))
    return {tensor.name: tensor for tensor in tensors}


def _is_sensitive(name: str, layer: int, n_layers: int) -> bool:
    """Whether llama-quantize's mixes give a matrix more bits: its `use_more_bits`."""
    often = layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2
    return often and name.startswith(("attn_v.", "ffn_down"))


def _tensor(name: str, shape: tuple[int, ...], kind: Type) -> TensorInfo:
    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = _FALLBACKS.get(kind, kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        kind, block, block_bytes = Type.F16, 1, 2
    return TensorInfo(name, shape, kind, 0, 0, math.prod(shape) // block * block_bytes)
