"""From the tensors of a Hugging Face folder to those that a GGUF of the model would have: names, stacks, row order.

Nothing is read or copied: a GGUF tensor becomes the runs of rows that it is made of. Every tensor of the folder must be
one that the model's class has; one that is left over could change the answers and is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from edgert.errors import ModelFileError, UnsupportedError
from edgert.huggingface_config import FolderConfig
from edgert.huggingface_layout import FolderTensor, Run
from edgert.huggingface_oss import FLOATS, OssExperts
from edgert.storage.json_file import short
from edgert.storage.safetensors_file import StoredTensor

_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.(.+)", re.DOTALL)
_EXPERT = re.compile(r"\.experts\.(\d{1,6})\.")
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_COMPUTED = "self_attn.rotary_emb.inv_freq"  # old checkpoints hold the rotation's frequencies, which follow from others
_DOWNLOAD = "the folder is damaged: download it again"


class _Draft:
    """A GGUF tensor while its parts are found."""

    def __init__(self, tensor: StoredTensor, shape: tuple[int, ...], source: str) -> None:
        self.kind, self.shape, self.source = tensor.kind, shape, source
        self.runs: dict[int, Run] = {}  # by expert; 0 where it is not stacked


def folder_tensors(
    stored: Mapping[str, tuple[int, StoredTensor]], config: FolderConfig, where: str
) -> dict[str, FolderTensor]:
    """The tensors by GGUF's names. stored: by name, with the number of the file; where: the folder, for messages.

    Raises ModelFileError for tensors that are missing or contradict each other, UnsupportedError for ones that the
    model's class does not have, or that hold other numbers than F32, F16 and BF16.
    """
    table = _Table(config, where)
    for name, (file, tensor) in stored.items():
        table.add(name, file, tensor)
    if config.tied:
        table.drafts.pop("output.weight", None)  # some checkpoints save the shared table twice
    elif "output.weight" not in table.drafts:
        raise ModelFileError(
            f"{where}: the tensor lm_head.weight is missing, and config.json does not say that the head is the "
            "embedding table (tie_word_embeddings); the folder is incomplete: download it again"
        )
    tensors = {name: table.finish(name, draft) for name, draft in table.drafts.items()}
    tensors |= {tensor.name: tensor for tensor in table.oss_experts.tensors()}
    if config.rope_divisors is not None:
        values = config.rope_divisors.view(np.uint8)
        shape = config.rope_divisors.shape
        tensors["rope_freqs.weight"] = FolderTensor("rope_freqs.weight", shape, Type.F32, len(values), (), 0, values)
    return tensors


class _Table:
    def __init__(self, config: FolderConfig, where: str) -> None:
        self._config, self._where = config, where
        self.drafts: dict[str, _Draft] = {}
        self.oss_experts = OssExperts(config.n_expert, where)

    def add(self, name: str, file: int, tensor: StoredTensor) -> None:
        """Take in one tensor of the folder."""
        match = _LAYER.fullmatch(name)
        if match is None:
            targets: tuple[str, ...] = (_OUTER[name],) if name in _OUTER else ()
            expert = None
        else:
            layer, rest = int(match[1]), match[2]
            if rest == _COMPUTED or 0 <= layer - self._config.n_layers < self._config.n_unused_layers:
                return
            dealt = self._config.family.deals_experts and layer < self._config.n_layers
            if dealt and self.oss_experts.add(layer, rest, name, file, tensor):
                return
            found = _EXPERT.search(rest)
            expert = None if found is None else int(found[1])
            targets = self._config.family.names.get(_EXPERT.sub(".experts.{e}.", rest), ())
            targets = tuple(f"blk.{layer}.{target}" for target in targets)
            if layer >= self._config.n_layers or (expert or 0) >= max(self._config.n_expert, 1):
                targets = ()
        if not targets:
            raise UnsupportedError(
                f"{self._where}: the tensor {short(name)} {tensor.shape} is not one that edgert uses for "
                f"{self._config.family.architecture!r}; it may change the answers"
            )
        self._check(name, tensor)
        if expert is not None:
            if len(tensor.shape) != 2:
                raise self._wrong(name, tensor, "an expert's should have two dimensions")
            self._put(
                targets[0], name, expert, tensor, (self._config.n_expert, *tensor.shape), Run(file, tensor.offset)
            )
        else:
            self._add_whole(name, targets, file, tensor)

    def _add_whole(self, name: str, targets: tuple[str, ...], file: int, tensor: StoredTensor) -> None:
        """A tensor that is no single expert's: of all experts, or of none; for one name, or in halves for two."""
        shape, stacked = tensor.shape, len(tensor.shape) == 3
        n_stacked = shape[0] if stacked else 1
        if stacked and n_stacked != self._config.n_expert:
            raise self._wrong(name, tensor, f"the model has {self._config.n_expert} experts")
        if len(targets) == 2:
            if len(shape) < 2 or shape[-2] % 2:
                raise self._wrong(name, tensor, "it should hold two halves")
            shape = (*shape[:-2], shape[-2] // 2, shape[-1])
        n_bytes = tensor.n_bytes // n_stacked // len(targets)
        for number in range(n_stacked):
            for half, target in enumerate(targets):
                offset = tensor.offset + (number * len(targets) + half) * n_bytes
                self._put(target, name, number, tensor, shape, Run(file, offset))

    def _put(self, target: str, name: str, number: int, tensor: StoredTensor, shape: tuple[int, ...], run: Run) -> None:
        draft = self.drafts.setdefault(target, _Draft(tensor, shape, name))
        if number in draft.runs:
            raise ModelFileError(f"{self._where}: {short(draft.source)} and {short(name)} are the same; {_DOWNLOAD}")
        if (draft.kind, draft.shape) != (tensor.kind, shape):
            raise ModelFileError(
                f"{self._where}: {short(draft.source)} is {draft.shape} of {draft.kind}, but {short(name)} is {shape} "
                f"of {tensor.kind}; convert the model again, with all experts alike"
            )
        draft.runs[number] = run

    def _check(self, name: str, tensor: StoredTensor) -> None:
        if tensor.kind not in FLOATS:
            raise UnsupportedError(
                f"{self._where}: the tensor {short(name)} holds {tensor.kind} numbers; take the model in BF16, F16 or "
                "F32, or as GGUF"
            )
        if not 1 <= len(tensor.shape) <= 3 or 0 in tensor.shape:
            raise self._wrong(name, tensor, "it should have one to three dimensions, none of them 0")

    def _wrong(self, name: str, tensor: StoredTensor, expected: str) -> ModelFileError:
        return ModelFileError(
            f"{self._where}: the tensor {short(name)} has the shape {tensor.shape}, but {expected}; {_DOWNLOAD}"
        )

    def finish(self, name: str, draft: _Draft) -> FolderTensor:
        """The tensor that a draft has become, once all its parts are there."""
        n_runs = draft.shape[0] if len(draft.shape) == 3 else 1
        if missing := set(range(n_runs)) - draft.runs.keys():
            raise ModelFileError(
                f"{self._where}: of {short(draft.source)} and its like that of expert {min(missing)} is missing; "
                "the folder is incomplete: download it again"
            )
        n_bytes = math.prod(draft.shape) * (4 if draft.kind == "F32" else 2)
        runs = tuple(draft.runs[number] for number in range(n_runs))
        half = self._config.d_head // 2 if self._is_interleaved(name) else 0
        if half and (self._config.d_head % 2 or draft.shape[0] % self._config.d_head):
            raise ModelFileError(
                f"{self._where}: {short(draft.source)} has the shape {draft.shape}, which is no whole number of heads "
                f"of {self._config.d_head} (config.json: head_dim); {_DOWNLOAD}"
            )
        return FolderTensor(name, draft.shape, FLOATS[draft.kind], n_bytes, runs, half)

    def _is_interleaved(self, name: str) -> bool:
        parts = name.split(".")
        return self._config.family.interleaves and len(parts) == 4 and parts[2] in ("attn_q", "attn_k")


def row_order(rows: Sequence[int] | npt.NDArray[np.int64], half_head: int) -> npt.NDArray[np.int64]:
    """Which row of the folder's tensor each of these rows is: even ones of a head from its first half, odd ones from
    its second."""
    rows = np.asarray(rows, np.int64)
    inside = rows % (2 * half_head)
    return rows - inside + inside // 2 + half_head * (inside % 2)
