"""What is said of a file whose tensors are not those that its metadata ask for: in one line, both are named.

Nothing is checked here: weights.py finds what is wrong, this finds the words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgert.architectures.keys import TOKENS
from edgert.errors import EdgertError, ModelFileError, UnsupportedError
from edgert.tensor_views import is_unused
from edgert.types import ModelConfig

_SIGHT = ("v.", "mm.", "a.", "model.vision", "model.visual")  # what files call towers for pictures and sound by
_FURTHER = ".nextn."  # in the names of tensors of layers that predict further tokens
_HEADS, _KV_HEADS = "attention.head_count", "attention.head_count_kv"
_KEY, _VALUE, _LATENT = "attention.key_length", "attention.value_length", "attention.kv_lora_rank"
_LATENT_HEADS = (_LATENT, _HEADS, "attention.key_length_mla", "attention.value_length_mla", _KEY, _VALUE)
_SHARED = ("expert_shared_feed_forward_length", "expert_shared_count")
_EXPERTS = ("expert_count", "expert_feed_forward_length", "feed_forward_length")
_RANK, _STATES = ("attention.q_lora_rank",), ("ssm.state_size", "ssm.group_count", "ssm.time_step_rank")
_DELTA = ("full_attention_interval", "attention.recurrent_layers")
_ROUTED = ("expert_count", "leading_dense_block_count", "interleave_moe_layer_step")
# Keys that the shape of a tensor follows from besides embedding_length, by how its name begins; the first row counts.
_KEYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"token_embd\.|output\.", ("vocab_size",)),
    (r"rope_f", ("rope.dimension_count",)),
    (r"attn_(q_a|q_b)", ("attention.q_lora_rank", _HEADS, "attention.key_length_mla", _KEY)),
    (r"attn_kv_a", (_LATENT, "rope.dimension_count")),
    (r"attn_(kv_b|k_b|v_b)", _LATENT_HEADS),
    (r"attn_qkv|attn_gate|ssm_", (*_STATES, "ssm.conv_kernel")),
    (r"attn_q|attn_sinks", (_HEADS, _KEY)),
    (r"attn_k", (_KV_HEADS, _KEY)),
    (r"attn_v", (_KV_HEADS, _VALUE)),
    (r"attn_output", (_HEADS, _VALUE)),
    (r"shortconv", ("shortconv.l_cache",)),
    (r"exp_probs_b|ffn_gate_inp\.", ("expert_count",)),
    (r"ffn_\w+_exps", _EXPERTS),
    (r"ffn_\w+_shexp", (*_SHARED, "expert_feed_forward_length", "feed_forward_length")),
    (r"ffn_(gate|up|down)\.", ("feed_forward_length",)),
)
# What a layer may have instead of a tensor that is missing, and the keys that decide; the first row that fits counts.
_INSTEAD: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (r"attn_q", ("attn_q_a",), _RANK),
    (r"attn_q_(a|a_norm|b)", ("attn_q",), _RANK),
    (r"attn_(q|k|v|output)(_norm|_gate)?", ("ssm_conv1d",), _DELTA),
    (r"attn_(qkv|gate)|ssm_.*", ("attn_output",), _DELTA),
    (r"attn_(q|k|v|output)(_norm)?", ("shortconv.conv",), (_KV_HEADS,)),
    (r"shortconv.*", ("attn_output",), (_KV_HEADS,)),
    (r"ffn_(gate|up|down)", ("ffn_gate_exps", "ffn_gate_up_exps"), _ROUTED),
    (r"exp_probs_b|ffn_gate_inp|ffn_\w+_(exps|shexp)", ("ffn_gate",), _ROUTED),
    # Two or three in one, whose rows are not as many as theirs together.
    (r"attn_(q|k|v)", ("attn_qkv",), (_HEADS, _KV_HEADS, _KEY, _VALUE)),
    (r"attn_(k|v)_b", ("attn_kv_b",), _LATENT_HEADS),
    (r"attn_(qkv|gate)", ("ssm_in",), _STATES),
    (r"ssm_(alpha|beta)", ("ssm_ba",), _STATES),
    (r"ffn_(gate|up)_exps", ("ffn_gate_up_exps",), _EXPERTS),
)


class Problems:
    """The words about one file. shapes: of its tensors, by the names of tensor_table; stored: names that it has."""

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        stored: Iterable[str],
    ) -> None:
        self._path, self._config, self._metadata, self._shapes = path, config, metadata, shapes
        self._unused = [name for name in stored if is_unused(config, name)]

    def missing(self, name: str) -> EdgertError:
        """The error about a tensor that is not there."""
        if name.replace("_exps", ".0") in self._shapes:
            return UnsupportedError(
                f"{self._path}: it holds one tensor per expert ({name.replace('_exps', '.0')}), "
                "as old conversions do; take a newer conversion"
            )
        if name.startswith("blk.0.") and not self._of_layer(0):
            if self._unused:
                return UnsupportedError(
                    f"{self._path}: it holds only layers that predict tokens beyond the next (MTP), and "
                    f"{name} is missing; take the file of the model itself"
                )
        return ModelFileError(
            f"{self._path}: the tensor {name} is missing{self._instead(name)}; "
            "the file is incomplete, download or convert it again"
        )

    def _of_layer(self, index: int) -> bool:
        return any(name.startswith(f"blk.{index}.") for name in self._shapes)

    def _instead(self, name: str) -> str:
        """What the metadata say that a missing tensor follows from, or what is there that they do not ask for."""
        prefix, _, rest = name.rpartition("blk.")
        index, _, part = rest.partition(".")
        if prefix or not part:
            return ""
        if not self._of_layer(int(index)):
            key = f"{self._config.architecture}.block_count"
            return f", as are all of layer {index}, but {key} is {self._metadata.get(key)}"
        base = part.rpartition(".")[0] or part
        for missing, others, keys in _INSTEAD:
            for other in (f"blk.{index}.{other}.weight" for other in others if re.fullmatch(missing, base)):
                if other in self._shapes:
                    shape = self._shapes[other]
                    stated = self._stated(keys) or f" ({self._config.architecture}.{keys[0]} is missing)"
                    return f", but there is {other} {shape}, which does not fit the metadata{stated}"
        return self._stated(_SHARED) if base.endswith("_shexp") else ""

    def misshapen(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> EdgertError:
        """The error about a tensor of another shape than it should have."""
        part = re.sub(r"^blk\.\d+\.", "", name)
        keys = next((keys for start, keys in _KEYS if re.match(start, part)), ())
        return ModelFileError(
            f"{self._path}: the tensor {name} has shape {found}, but the metadata ask for {wanted}"
            f"{self._stated((*keys, 'embedding_length'))}; the file is damaged or made wrongly"
        )

    def left_over(self, name: str) -> EdgertError:
        """The error about a tensor that nobody asks for."""
        c = self._config
        if name.startswith(_SIGHT):
            n = sum(one.startswith(_SIGHT) for one in self._shapes)
            return UnsupportedError(
                f"{self._path}: it holds a part that sees or hears ({name} and {n - 1} more tensors), which edgert "
                "does not have; take the text model alone"
            )
        if _FURTHER in name:
            key = f"{c.architecture}.nextn_predict_layers"
            return ModelFileError(
                f"{self._path}: the tensor {name} is of a layer that predicts tokens beyond the next (MTP), but "
                f"{key} is {self._metadata.get(key, 'missing')}; convert the model again"
            )
        index = name.split(".")[1] if name.startswith("blk.") else ""
        if index.isdecimal() and int(index) >= c.n_layers:
            key = f"{c.architecture}.block_count"
            return ModelFileError(
                f"{self._path}: the tensor {name} {self._shapes[name]} is of layer {index}, counted from 0, but "
                f"{key} is {self._metadata.get(key)}; the file is damaged or made wrongly"
            )
        if "_shexp." in name and not c.d_shared and (stated := self._stated(_SHARED)):
            return ModelFileError(
                f"{self._path}: the tensor {name} {self._shapes[name]} is of a shared expert, but the metadata ask for "
                f"none{stated}; the file is damaged or made wrongly"
            )
        return UnsupportedError(
            f"{self._path}: the tensor {name} {self._shapes[name]} is not one that edgert uses for "
            f"{c.architecture!r}; it may change the answers"
        )

    def _stated(self, keys: tuple[str, ...]) -> str:
        """What the metadata say under some keys, in brackets; of a vocabulary also how many tokens there are."""
        prefix = f"{self._config.architecture}."
        found = [(key, self._metadata[prefix + key]) for key in dict.fromkeys(keys) if prefix + key in self._metadata]
        words = ", ".join(f"{key} = {one.tolist() if isinstance(one, np.ndarray) else one!r:.40}" for key, one in found)
        tokens = self._metadata.get(TOKENS)
        if "vocab_size" in keys and isinstance(tokens, list):
            words += f"; {TOKENS} has {len(tokens)}"
        return f" ({prefix}{words})" if words else ""

    def check_unused(self) -> None:
        """Raise ModelFileError if tensors of a layer that is said not to be run look like those of others."""
        c = self._config
        for layer in range(c.n_layers, c.n_layers + c.n_unused_layers if self._unused else 0):
            names = [name for name in self._unused if name.startswith(f"blk.{layer}.")]
            if names and not any(_FURTHER in name for name in names):
                key = f"{c.architecture}.nextn_predict_layers"
                raise ModelFileError(
                    f"{self._path}: {key} is {c.n_unused_layers}, but the tensors of layer {layer}, such as "
                    f"{min(names)}, do not predict tokens beyond the next (none is called nextn); the file is damaged "
                    "or made wrongly"
                )
