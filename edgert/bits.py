"""Which format each matrix of a model is packed to: the experts' one by one, hot weights by a rule.

What is chosen here is made elsewhere: this is data, and what a bundle says of itself in the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from edgert.errors import OptionError
from edgert.quant.formats import FORMATS, Format
from edgert.quant.ggml import format_for
from edgert.types import ModelConfig

PROJECTIONS = ("gate", "up", "down")
HOT_WIDTHS = (4, 5, 6, 8)
AS_SOURCE = -1


@dataclass(frozen=True)
class Bits:
    """Formats of a bundle.

    choice: (n_layers, n_expert, 3), an index into `formats`, or AS_SOURCE. hot: what hot matrices wider than that are
    packed to; None: they stay as the source has them. Routers and vectors always do.
    """

    formats: tuple[Format, ...]
    choice: npt.NDArray[np.int64]
    hot: Format | None = None
    quantiser: str = "gptq"

    @classmethod
    def uniform(cls, format: Format, n_layers: int, n_expert: int, **others: Any) -> Bits:
        """The same format for all experts."""
        return cls((format,), np.zeros((n_layers, n_expert, len(PROJECTIONS)), np.int64), **others)

    def of(self, layer: int, expert: int) -> tuple[Format | None, ...]:
        """Formats of gate, up and down; None: as the source has it."""
        return tuple(None if i == AS_SOURCE else self.formats[i] for i in self.choice[layer, expert].tolist())

    def hot_format(self, kind: Type, n_in: int) -> Format:
        """The format of a hot matrix whose source is of a ggml type."""
        found = format_for(kind)
        if self.hot is None or bits_per_weight(kind) <= self.hot.bits + 0.5 or n_in % self.hot.block:
            return found
        return self.hot

    def digest(self) -> str:
        """A digest of all that is chosen."""
        names = [format.name for format in self.formats]
        hot = None if self.hot is None else self.hot.name
        text = json.dumps([names, self.choice.tolist(), hot, self.quantiser])
        return hashlib.sha256(text.encode()).hexdigest()


def bits_per_weight(kind: Type) -> float:
    """Bits that a weight of a ggml type takes, scales counted."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    return 8 * n_bytes / block


def hot_format(width: int) -> Format:
    """The format for hot weights of a width. OptionError for one that is not in HOT_WIDTHS."""
    if width not in HOT_WIDTHS:
        raise OptionError(f"hot weights of {width} bits: use one of {', '.join(map(str, HOT_WIDTHS))}")
    return FORMATS[f"int{width}"]


def fitting(formats: Sequence[Format], n_in: int) -> list[int]:
    """Which of the formats can store rows of `n_in` columns."""
    return [place for place, format in enumerate(formats) if n_in % format.block == 0]


def expert_shapes(config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(n_out, n_in) of gate, up and down."""
    wide, narrow = (config.d_expert, config.d_model), (config.d_model, config.d_expert)
    return wide, wide, narrow
