"""From logits to the next token: penalties, filters, temperature, a seeded draw, and log-probabilities.

The order is that of llama.cpp's default chain: logit bias, penalties, top-k, typical, top-p, min-p,
temperature, draw; so every filter sees the distribution at temperature 1. Temperature 0 takes the largest
logit after bias and penalties. It knows nothing of models, text or stop rules: logits in, one id out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.errors import EdgertError, OptionError

Ids = NDArray[np.int64]
Values = NDArray[np.float64]

FIRST_PREFIX = 128  # candidates sorted at first by top-p and typical; nearly always enough, grown if not


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Every default switches its step off, and temperature 0 is greedy.

    Raises OptionError, naming the option, the value and what is allowed.
    """

    temperature: float = 0.0  # >= 0; 0 is greedy: the largest logit, the lowest id among equals
    top_k: int = 0  # the k most probable tokens; 0 is off
    top_p: float = 1.0  # the fewest most probable tokens that hold this probability; 1 is off
    min_p: float = 0.0  # tokens at least this fraction as probable as the best; 0 is off
    typical_p: float = 1.0  # the fewest most typical tokens that hold more than this; 1 is off
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of seen tokens; 1 is off
    repetition_window: int = 64  # how many last tokens, prompt included, the three penalties look at
    frequency_penalty: float = 0.0  # taken off a logit for every time its token was seen
    presence_penalty: float = 0.0  # taken off a logit once if its token was seen
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to logits; -inf bans a token
    seed: int | None = None  # the same seed gives the same text; None is fresh entropy

    def __post_init__(self) -> None:
        for name, (lowest, highest, kind) in _RANGES.items():
            object.__setattr__(self, name, _number(name, getattr(self, name), lowest, highest, kind))
        if self.repetition_penalty == 0:
            raise OptionError("repetition_penalty=0 is not allowed: give a number above 0; 1 is off")
        if self.seed is not None:
            object.__setattr__(self, "seed", _number("seed", self.seed, 0, 2**64 - 1, int))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    def changed(self, **changes: Any) -> Sampling:
        """A copy with some fields set anew; OptionError for a name that is no field or a bad value."""
        known = [f.name for f in fields(self)]
        for name, value in changes.items():
            if name not in known:
                raise OptionError(f"{name}={value!r} is no sampling option: there are {', '.join(known)}")
        return replace(self, **changes)

    @property
    def penalises(self) -> bool:
        """Whether the tokens seen so far change the choice."""
        neutral = self.repetition_penalty == 1 and self.frequency_penalty == 0 and self.presence_penalty == 0
        return self.repetition_window > 0 and not neutral


_RANGES: dict[str, tuple[float, float, type]] = {
    "temperature": (0, math.inf, float),
    "top_k": (0, math.inf, int),
    "top_p": (0, 1, float),
    "min_p": (0, 1, float),
    "typical_p": (0, 1, float),
    "repetition_penalty": (0, math.inf, float),
    "repetition_window": (0, math.inf, int),
    "frequency_penalty": (-math.inf, math.inf, float),
    "presence_penalty": (-math.inf, math.inf, float),
}


def _number(name: str, value: Any, lowest: float, highest: float, kind: type) -> float | int:
    """`value` as a finite `kind` between the bounds, or OptionError."""
    of_kind = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if of_kind and math.isfinite(value) and lowest <= value <= highest:
        return int(value) if kind is int else float(value)
    noun = "a whole number" if kind is int else "a finite number"
    if lowest == -math.inf:
        allowed = noun
    elif highest == math.inf:
        allowed = f"{noun} from {lowest} up"
    else:
        allowed = f"{noun} from {lowest} to {highest}"
    raise OptionError(f"{name}={value!r} is not allowed: give {allowed}")


def _checked_bias(bias: Any) -> dict[int, float]:
    """A copy of a logit bias, or OptionError."""
    if not isinstance(bias, Mapping):
        raise OptionError(f"logit_bias={bias!r} is not allowed: give a mapping of token ids to numbers")
    checked = {}
    for token, value in bias.items():
        if not isinstance(token, Integral) or isinstance(token, bool) or token < 0:
            raise OptionError(f"logit_bias has the key {token!r}: give token ids, whole numbers from 0 up")
        if not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value) or value == math.inf:
            raise OptionError(f"logit_bias[{token}]={value!r} is not allowed: give a finite number or -inf")
        checked[int(token)] = float(value)
    return checked


class Sampler:
    """Chooses tokens by one Sampling; it keeps the random state of one text and nothing else."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def choose(self, logits: NDArray[np.float32], history: Sequence[int] = ()) -> int:
        """The next token's id, from logits (n_vocab,) and the ids so far, the prompt's included.

        EdgertError where logits hold NaN or +inf, OptionError where a bias names no token or bans all.
        """
        _check_logits(logits)
        options = self.sampling
        plain = not options.logit_bias and not options.penalises
        if plain and options.temperature == 0:
            return int(logits.argmax())
        values = logits.astype(np.float64)  # (n_vocab,)
        if not plain:
            apply_bias(values, options.logit_bias)
            apply_penalties(values, history, options)
            if values.max() == -math.inf:
                raise OptionError("logit_bias bans every token: leave at least one to choose")
        if options.temperature == 0:
            return int(values.argmax())
        ids, kept = filtered(values, options)
        with np.errstate(over="ignore", under="ignore"):
            weights = np.exp((kept - kept.max()) / options.temperature).cumsum()  # (n_kept,), ids ascending
        drawn = int(np.searchsorted(weights, self._random.random() * weights[-1], side="right"))
        return int(ids[drawn])


def _check_logits(logits: NDArray[np.float32]) -> None:
    """EdgertError unless the largest logit is a number: a NaN anywhere shows in the maximum."""
    assert logits.ndim == 1 and logits.size, f"logits of shape {logits.shape}"
    largest = logits.max()
    if not np.isfinite(largest):
        raise EdgertError(f"the model's largest logit is {largest}: its file is damaged; get it anew")


def apply_bias(values: Values, bias: Mapping[int, float]) -> None:
    """Add a logit bias to `values`, float64 (n_vocab,), in place; OptionError for an id beyond it."""
    for token, amount in bias.items():
        if token >= values.size:
            raise OptionError(f"logit_bias names token {token}: this model's ids end at {values.size - 1}")
        values[token] += amount


def apply_penalties(values: Values, history: Sequence[int], options: Sampling) -> None:
    """Penalise in place the tokens among the last `repetition_window` of `history`, as llama.cpp does.

    A positive logit is divided by the repetition penalty and another multiplied; then it loses
    count x frequency + presence.
    """
    if not options.penalises or not len(history):
        return
    seen, counts = np.unique(np.asarray(history[-options.repetition_window :], np.int64), return_counts=True)
    old = values[seen]  # (n_seen,)
    factor = options.repetition_penalty
    new = np.where(old > 0, old / factor, old * factor)
    values[seen] = new - (counts * options.frequency_penalty + options.presence_penalty)


def filtered(values: Values, options: Sampling) -> tuple[Ids, Values]:
    """The ids, ascending, that pass the filters in their order, and their logits as given.

    Values are float64 (n_vocab,), of which one at least is above -inf.
    """
    ids = np.flatnonzero(values > -math.inf)
    if ids.size < values.size:
        values = values[ids]
    steps = (
        (options.top_k > 0, top_k, options.top_k),
        (options.typical_p < 1, typical, options.typical_p),
        (options.top_p < 1, top_p, options.top_p),
        (options.min_p > 0, min_p, options.min_p),
    )
    for wanted, step, amount in steps:
        if wanted:
            kept = step(values, amount)
            ids, values = ids[kept], values[kept]
    return ids, values


def top_k(values: Values, k: float) -> Ids:
    """Places, ascending, of the k largest values; the lowest places among equals."""
    return np.sort(_smallest(-values, int(k)))


def top_p(values: Values, p: float) -> Ids:
    """Places, ascending, of the fewest largest values whose probability reaches p (nucleus sampling)."""
    return _prefix(-values, np.exp(log_softmax(values)), p, "left")


def min_p(values: Values, p: float) -> Ids:
    """Places, ascending, of the values whose probability is at least p times the largest one's."""
    return np.flatnonzero(values >= values.max() + math.log(p))


def typical(values: Values, p: float) -> Ids:
    """Places, ascending, of the most typical values whose probability exceeds p (arXiv 2202.00666).

    Most typical is what has its surprise -log p_i nearest to the entropy.
    """
    log_p = log_softmax(values)
    probability = np.exp(log_p)
    entropy = -float((probability * log_p).sum())
    return _prefix(np.abs(-log_p - entropy), probability, p, "right")


def _smallest(key: Values, n: int) -> Ids:
    """Places of the n smallest keys, smallest first; equal keys by place."""
    if n >= key.size:
        return np.argsort(key, kind="stable")
    border = np.partition(key, n - 1)[n - 1]
    below = np.flatnonzero(key < border)
    equal = np.flatnonzero(key == border)[: n - below.size]
    places = np.sort(np.concatenate([below, equal]))
    return places[np.argsort(key[places], kind="stable")]


def _prefix(key: Values, probability: Values, p: float, side: Any) -> Ids:
    """Places, ascending, of the smallest keys until their sum reaches ('left') or exceeds ('right') p.

    Sorts only as far as it must: a full sort of 150,000 candidates would be the dearest part of a token.
    """
    n = FIRST_PREFIX
    while True:
        order = _smallest(key, n)
        enough = int(np.searchsorted(probability[order].cumsum(), p, side=side))
        if enough < order.size or n >= key.size:
            return np.sort(order[: enough + 1])
        n *= 16


def log_softmax(logits: NDArray[np.floating[Any]]) -> Values:
    """Natural logarithms of the probabilities, float64, of logits (n,): no bias, no temperature."""
    values = np.asarray(logits, np.float64)
    shifted = values - values.max()
    return np.asarray(shifted - math.log(np.exp(shifted).sum()), np.float64)


def top_logprobs(logits: NDArray[np.floating[Any]], n: int) -> list[tuple[int, float]]:
    """The n most probable (id, log-probability), best first, the lowest id among equals."""
    if n <= 0:
        return []
    log_p = log_softmax(logits)
    return [(int(i), float(log_p[i])) for i in _smallest(-log_p, n)]
