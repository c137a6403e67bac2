"""What a person asks of the bits per expert: a loss, a size, or speed; and what that means as limits.

A goal is data: parsed from words such as "2%" or "3.0bpw", kept in the bundle, compared with the next request.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from edgert.bits import HOT_WIDTHS
from edgert.errors import OptionError
from edgert.memory import parse_size
from edgert.quant.formats import FORMATS

Objective = Literal["size", "speed"]
Method = Literal["optimal", "edgemoe"]
_BPW = re.compile(r"(\d+(?:\.\d+)?)\s*bpw", re.IGNORECASE)
_BYTES = re.compile(r"\d+(?:\.\d+)?\s*([KMGT]?B|[KMGT](?:iB)?)", re.IGNORECASE)
_LEAST_BPW, _MOST_BPW = 1.5, 16.0
_MOST_LOSS = 10.0  # a perplexity eleven times as high is no quality bound any more


@dataclass(frozen=True)
class Goal:
    """What the experts' formats shall be chosen for.

    loss: the most that perplexity may rise, as a share (0.02). bits_per_weight: of the experts, scales counted.
    n_bytes: of the whole bundle. objective: what is minimised within `loss`. memory: bytes that the runtime will have,
    for speed. format: one for all experts instead. hot: bits of hot weights that are wider in the source; 0 keeps them.
    """

    loss: float | None = None
    bits_per_weight: float | None = None
    n_bytes: int | None = None
    objective: Objective = "size"
    memory: int | None = None
    method: Method = "optimal"
    format: str | None = None
    quantiser: str = "gptq"
    hot: int = 8

    def __post_init__(self) -> None:
        for name, value, known in (
            ("objective", self.objective, get_args(Objective)),
            ("method", self.method, get_args(Method)),
        ):
            if value not in known:
                raise OptionError(f"--{name} {value!r} is not known; use one of {', '.join(known)}")
        sized = self.bits_per_weight is not None or self.n_bytes is not None
        limits = (self.loss is not None) + sized
        if self.format is not None and (limits or self.objective == "speed" or self.method == "edgemoe"):
            raise OptionError("--format gives all experts the same bits: leave --loss, --size and the like away")
        if self.format is None and limits != 1:
            raise OptionError(
                "say either how much perplexity may rise (--loss 2%) or how large it may be (--size 3bpw)"
            )
        if (self.objective == "speed" or self.method == "edgemoe") and self.loss is None:
            what = "--objective speed" if self.objective == "speed" else "--method edgemoe"
            raise OptionError(f"{what} works within a bound on the loss: add --loss 2%")
        if self.objective == "speed" and self.memory is None:
            raise OptionError("--objective speed needs to know what the runtime will have: add --memory 2GiB")
        if self.objective == "speed" and self.method == "edgemoe":
            raise OptionError("--method edgemoe knows no speed: leave --objective speed away")
        check_quantiser(self.quantiser)
        if self.format is not None and self.format not in FORMATS:
            raise OptionError(f"--format {self.format!r} is not known; use one such as int4, int3-g64-min or int4-k")
        if self.format is not None and not FORMATS[self.format].is_integer:
            raise OptionError(
                f"--format {self.format}: experts are quantised to integers; use one such as int4, int3-g64-min or "
                "int4-k, or leave --format away to keep the source's weights"
            )
        if self.hot and self.hot not in HOT_WIDTHS:
            raise OptionError(
                f"--hot {self.hot}: use one of {', '.join(map(str, HOT_WIDTHS))}, or 0 to keep the source's"
            )

    def as_document(self) -> dict[str, Any]:
        """What was asked, for the manifest."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def check_quantiser(name: str) -> None:
    """OptionError, before anything is loaded, for a quantiser that there is not."""
    from edgert.quant.quantisers import QUANTISERS  # numba comes with it

    if name not in QUANTISERS:
        raise OptionError(f"--quantiser {name!r} is not known; use one of {', '.join(QUANTISERS)}")


def parse_loss(text: str) -> float:
    """The share of "2%"; OptionError for what is no share above 0, and for a number alone: 2 could be 2 % or 200 %."""
    number = text.strip().removesuffix("%").strip()
    try:
        value = float(number) / 100
    except ValueError:
        value = -1.0
    if "%" not in text and 0 < value <= 1:
        more = f", or {1e4 * value:g}%" if value < 0.01 else ""
        raise OptionError(f"--loss {text} is no share: write --loss {number}%{more}")
    if not 0 < value <= _MOST_LOSS:
        raise OptionError(f"--loss {text!r} is no bound on the rise of perplexity: write for example 2%")
    return value


def parse_target(text: str) -> dict[str, Any]:
    """The fields of a Goal that "3.0bpw" or "8GiB" stands for; OptionError for neither."""
    if found := _BPW.fullmatch(text.strip()):
        value = float(found[1])
        if not _LEAST_BPW <= value <= _MOST_BPW:
            raise OptionError(f"--size {text}: bits per weight lie between {_LEAST_BPW} and {_MOST_BPW}")
        return {"bits_per_weight": value}
    if not _BYTES.fullmatch(text.strip()):
        raise OptionError(
            f"--size {text!r} is no size: write bits per weight of the experts, such as 3.0bpw, or bytes of the "
            "bundle, such as 8GiB or 500MiB"
        )
    return {"n_bytes": parse_size(text)}
