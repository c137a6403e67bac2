"""Which format each matrix of a model is packed to: the experts' one by one, hot weights by a rule.

What is chosen here is made elsewhere: this is data, and what a bundle says of itself in the end.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from edgert.errors import OptionError
from edgert.quant.formats import FORMATS, GROUP, Format
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

    def where_they_fit(self, config: ModelConfig) -> Bits:
        """The same without formats for projections whose rows they cannot store: these stay as the source has them."""
        choice = self.choice.copy()
        for place, (_, n_in) in enumerate(expert_shapes(config)):
            for number, format in enumerate(self.formats):
                if n_in % format.block:
                    choice[..., place][self.choice[..., place] == number] = AS_SOURCE
        return replace(self, choice=choice)

    def of(self, layer: int, expert: int) -> tuple[Format | None, ...]:
        """Formats of gate, up and down; None: as the source has it."""
        return tuple(None if i == AS_SOURCE else self.formats[i] for i in self.choice[layer, expert].tolist())

    def hot_format(self, kind: Type, n_in: int) -> Format:
        """The format of a hot matrix whose source is of a ggml type."""
        found = format_for(kind)
        if self.hot is None or bits_per_weight(kind) <= self.hot.bits + 0.5 or n_in % self.hot.block:
            return found
        return self.hot

    def table_type(self, kind: Type, n_in: int) -> Type:
        """The ggml type of an embedding table whose source is of another: Q8_0 where hot weights get fewer bits.

        It lies on flash, a row at a time, so that fewer than 8 bits would save nothing that matters.
        """
        is_wide = self.hot is not None and bits_per_weight(kind) > bits_per_weight(Type.Q8_0)
        return Type.Q8_0 if is_wide and n_in % GROUP == 0 else kind

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


def kept_projections(config: ModelConfig) -> list[int]:
    """Projections, of PROJECTIONS, whose rows no format of integers can store."""
    return [place for place, (_, n_in) in enumerate(expert_shapes(config)) if n_in % GROUP]


def kept_words(config: ModelConfig) -> str:
    """One line on projections that cannot be quantised, for the person; mostly empty. OptionError if none can be."""
    kept = kept_projections(config)
    if len(kept) == len(PROJECTIONS):
        raise OptionError(
            f"experts have rows of {config.d_model} and {config.d_expert} columns, and formats take multiples of "
            f"{GROUP}: none of their tensors can be quantised; pack the model as it is, without --loss, --size and "
            "--format"
        )
    if not kept:
        return ""
    names = " and ".join(f"ffn_{PROJECTIONS[place]}_exps" for place in kept)
    n_in = expert_shapes(config)[kept[0]][1]
    return (
        f"{names}, whose rows have {n_in} columns, where formats take multiples of {GROUP}: left as in the source, the "
        "rest is quantised"
    )


def expert_shapes(config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(n_out, n_in) of gate, up and down."""
    wide, narrow = (config.d_expert, config.d_model), (config.d_model, config.d_expert)
    return wide, wide, narrow


def uniform(format: Format, config: ModelConfig, **others: Any) -> Bits:
    """One format for all experts, and where rows are too short for it the nearest that fits."""
    assert config.router is not None
    names = [format, *(FORMATS[name] for name in (f"int{format.bits}", "int4"))]
    widths = config.d_model, config.d_expert
    kept_words(config)
    fit = [[f for f in names if n_in % f.block == 0] for n_in in widths]
    wide, narrow = (formats[0] if formats else format for formats in fit)
    choice = np.zeros((config.n_layers, config.router.n_expert, len(PROJECTIONS)), np.int64)
    choice[:, :, PROJECTIONS.index("down")] = int(narrow is not wide)
    return Bits((wide, narrow), choice, **others).where_they_fit(config)


def described(bits: Bits, config: ModelConfig) -> dict[str, Any]:
    """What a manifest says of the bits, beside what was asked; of what is quantised."""
    shapes, chosen = expert_shapes(config), bits.choice != AS_SOURCE
    sizes = np.array([[format.matrix_bytes(*shape) for format in bits.formats] for shape in shapes])
    n_bytes = sum(int(sizes[place, bits.choice[chosen[..., place], place]].sum()) for place in range(len(shapes)))
    n_weights = int(chosen.sum()) * math.prod(shapes[0])
    hot = "" if bits.hot is None else bits.hot.name
    size = round(8 * n_bytes / n_weights, 4)
    return {"quantiser": bits.quantiser, "hot": hot, "bytes": n_bytes, "bits_per_weight": size}
