"""The profile of a model: what was learnt from running text through it, and what quantising its experts would cost.

One .npz of plain arrays, checked when it is read as if it were hostile. Text of several kinds is kept apart, so that
another weight can be given to each; profiles of one model are merged the same way. Nothing here runs a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import OptionError
from edgert.experts.array_file import compressed_size, write_arrays
from edgert.experts.profile_file import read_profile, read_settings
from edgert.experts.trace import Trace
from edgert.types import Floats, Ids

OWN_TEXT = "own text"  # the name of the domain that the model wrote itself


@dataclass(frozen=True)
class Domain:
    """Text of one kind, in whole chunks, each of which was run from an empty context.

    name: of its corpus, or OWN_TEXT. tokens: int32 (n_tokens,), calibration. held_out: int32 (n,), kept back for
    proofs, never calibrated on. ids, weights: routes of `tokens`, uint8 or uint16 and float16, (n_layers, n_tokens,
    top_k); those of layers without experts mean nothing.
    """

    name: str
    tokens: npt.NDArray[np.int32]
    held_out: npt.NDArray[np.int32]
    ids: npt.NDArray[np.unsignedinteger[Any]]
    weights: npt.NDArray[np.float16]


@dataclass(frozen=True)
class Sensitivity:
    """What quantising costs.

    quantiser: a name of QUANTISERS. formats: names of FORMATS. errors: float32 (n_layers, n_expert, 3, n_formats), the
    mean over an expert's own rows of the squared error of its output, weighted by the router, with gate, up or down
    alone quantised; infinite where a format does not fit. rows: int32 (n_layers, n_expert), calibration tokens of each
    expert, of n_tokens in all. gains: float32 (n_layers,), nats of KL divergence for a unit of error summed over the
    layer's experts, each times its share of the tokens; is_measured: and not assumed to be such that layers are alike.
    """

    quantiser: str
    formats: tuple[str, ...]
    errors: Floats
    rows: npt.NDArray[np.int32]
    gains: Floats
    n_tokens: int
    is_measured: bool = True

    def loss(self) -> Floats:
        """Expected KL divergence in nats a token, (n_layers, n_expert, 3, n_formats): terms of a sum."""
        share = self.rows.astype(np.float64) / max(self.n_tokens, 1)
        fits = np.isfinite(self.errors)
        loss = self.gains[:, None, None, None] * share[..., None, None] * np.where(fits, self.errors, 0.0)
        found: Floats = np.where(fits, loss, np.inf).astype(np.float32)
        return found

    def incompressible(self) -> Sensitivity:
        """The one of this shape that takes the most bytes in a file: before it is measured, no less is sure to do."""
        draw, end = np.random.default_rng(0), 0x7F800000  # bits of what is infinite
        errors, gains = (
            draw.integers(end, size=a.shape, dtype=np.uint32).view(np.float32) for a in (self.errors, self.gains)
        )
        return replace(self, errors=errors, gains=gains, is_measured=False)


@dataclass(frozen=True)
class Profile:
    """What was learnt of one model.

    model: its key (edgert.streaming.model_key). digest: of its file (edgert.profiling.model_digest). chunk: tokens of a
    chunk. record_bytes: (n_layers, n_expert), 0 where a layer has no experts. shares: the weight of each domain, by its
    name; they sum to 1. own_text: whether the model wrote text itself because none was given. input_moments,
    hidden_moments: mean squares of what gate and up, and of what down is multiplied with, over the tokens routed to an
    expert, (n_layers, n_expert, d_model) and (n_layers, n_expert, d_expert); 0 where never routed. recall: of each
    predictor and of combinations, one and two layers ahead, (2, n_layers), NaN where it has no guess. settings: what
    else a run knew, as JSON has it: "template", runs of token ids that a chat template writes; "kinds", options of
    running that decide the bits; "own", chunks that the model was to write and to keep back; "model", its configuration
    and sizes. Older profiles have none.
    """

    model: str
    digest: str
    chunk: int
    record_bytes: Ids
    domains: tuple[Domain, ...]
    shares: Mapping[str, float]
    own_text: bool
    input_moments: Floats
    hidden_moments: Floats
    recall: Mapping[str, Floats]
    sensitivity: Sensitivity | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Layers, those without experts too."""
        return self.record_bytes.shape[0]

    @property
    def n_expert(self) -> int:
        """Experts of a layer."""
        return self.record_bytes.shape[1]

    @property
    def top_k(self) -> int:
        """Experts that a token uses in a layer."""
        return self.domains[0].ids.shape[2]

    @property
    def n_tokens(self) -> int:
        """Calibration tokens of all domains."""
        return sum(len(domain.tokens) for domain in self.domains)

    @property
    def layers(self) -> list[int]:
        """Layers that have experts."""
        found: list[int] = np.flatnonzero(self.record_bytes.any(axis=1)).tolist()
        return found

    def domain(self, name: str) -> Domain:
        """A domain by its name; OptionError, with the names there are, for another."""
        for one in self.domains:
            if one.name == name:
                return one
        names = ", ".join(domain.name for domain in self.domains)
        raise OptionError(f"the profile has no text called {name!r}; it has {names}")

    def frequency(self, shares: Mapping[str, float] | None = None) -> Floats:
        """The share of tokens that use each expert, (n_layers, n_expert); also with other shares than its own."""
        return self._mean(_count, shares)

    def mass(self, shares: Mapping[str, float] | None = None) -> Floats:
        """The router's weight of each expert summed over a token's choices, likewise (n_layers, n_expert)."""
        return self._mean(_weigh, shares)

    def _mean(self, measure: Any, shares: Mapping[str, float] | None) -> Floats:
        """The weighted mean over domains of a sum over tokens (n_layers, n_expert)."""
        total = np.zeros(self.record_bytes.shape)
        for name, share in normalised(self.shares if shares is None else shares).items():
            domain = self.domain(name)
            total += share * measure(domain, self.n_expert) / len(domain.tokens)
        mean: Floats = (total * (self.record_bytes > 0)).astype(np.float32)
        return mean

    def trace(self, name: str | None = None) -> Trace:
        """The routes of a domain, or of all one after the other, to be replayed; nothing is known of scores ahead."""
        domains = self.domains if name is None else (self.domain(name),)
        ids = np.concatenate([domain.ids for domain in domains], axis=1)
        weights = np.concatenate([domain.weights for domain in domains], axis=1)
        return Trace.without_scores(self.model, self.record_bytes, ids, weights)

    def with_sensitivity(self, sensitivity: Sensitivity | None) -> Profile:
        """The same profile with what quantising costs."""
        return replace(self, sensitivity=sensitivity)

    def save(self, path: Path) -> None:
        """Write the profile, aside first. Raises OSError."""
        write_arrays(Path(path), _as_arrays(self))

    def file_bytes(self) -> int:
        """Bytes of the file that it is saved as."""
        return compressed_size(_as_arrays(self))

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile; ModelFileError for a file that is none, or lies about itself."""
        return _from_arrays(read_profile(Path(path)))


def normalised(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares that sum to 1; OptionError for negative ones, or none."""
    total = float(sum(shares.values()))
    if not shares or not 0 < total < np.inf or min(shares.values()) < 0:
        raise OptionError(f"shares {dict(shares)} must be numbers that are not negative and not all 0")
    return {name: share / total for name, share in shares.items()}


def kinds_in_words(kinds: Sequence[Any]) -> str:
    """Options of running that decide the bits, as settings have them."""
    named = zip(("--kv-type", "--activations"), kinds, strict=True)
    return ", ".join(f"{name} {kind}" for name, kind in named if kind) or "defaults"


def _count(domain: Domain, n_expert: int) -> npt.NDArray[np.float64]:
    """How often each expert was chosen, (n_layers, n_expert)."""
    return np.array([np.bincount(ids.reshape(-1), minlength=n_expert)[:n_expert] for ids in domain.ids], np.float64)


def _weigh(domain: Domain, n_expert: int) -> npt.NDArray[np.float64]:
    """The router weights of each expert, summed, (n_layers, n_expert)."""
    layers = zip(domain.ids, domain.weights, strict=True)
    return np.array(
        [np.bincount(ids.reshape(-1), weights.reshape(-1), n_expert)[:n_expert] for ids, weights in layers], np.float64
    )


# ---- the file --------------------------------------------------------------------------------------------------------
def _as_arrays(profile: Profile) -> dict[str, Any]:
    domains, names = profile.domains, list(profile.recall)
    arrays = {
        "version": np.int64(1),
        "model": np.array(profile.model),
        "digest": np.array(profile.digest),
        "chunk": np.int64(profile.chunk),
        "own_text": np.int64(profile.own_text),
        "record_bytes": profile.record_bytes.astype(np.int64),
        "domains": np.array([domain.name for domain in domains]),
        "shares": np.array([profile.shares.get(domain.name, 0.0) for domain in domains], np.float64),
        "n_tokens": np.array([len(domain.tokens) for domain in domains], np.int64),
        "n_held_out": np.array([len(domain.held_out) for domain in domains], np.int64),
        "tokens": np.concatenate([domain.tokens for domain in domains]).astype(np.int32),
        "held_out": np.concatenate([domain.held_out for domain in domains]).astype(np.int32),
        "ids": np.concatenate([domain.ids for domain in domains], axis=1),
        "weights": np.concatenate([domain.weights for domain in domains], axis=1).astype(np.float16),
        "input_moments": profile.input_moments.astype(np.float32),
        "hidden_moments": profile.hidden_moments.astype(np.float32),
        "predictors": np.array(names, np.str_),
        "recall": np.array([profile.recall[name] for name in names], np.float32).reshape(-1, 2, profile.n_layers),
    }
    if profile.settings:
        arrays["settings"] = np.array(json.dumps(profile.settings))
    if (found := profile.sensitivity) is not None:
        arrays |= {
            "quantiser": np.array(found.quantiser),
            "formats": np.array(found.formats, np.str_),
            "errors": found.errors.astype(np.float32),
            "rows": found.rows.astype(np.int32),
            "gains": found.gains.astype(np.float32),
            "n_sensitivity": np.int64(found.n_tokens),
        }
        if not found.is_measured:
            arrays["assumed"] = np.int64(1)
    return arrays


def _from_arrays(arrays: dict[str, Any]) -> Profile:
    names = arrays["domains"].tolist()
    tokens, held_out = _split(arrays["tokens"], arrays["n_tokens"]), _split(arrays["held_out"], arrays["n_held_out"])
    ids, weights = (_split(arrays[name], arrays["n_tokens"], axis=1) for name in ("ids", "weights"))
    sensitivity = None
    if "errors" in arrays:
        sensitivity = Sensitivity(
            str(arrays["quantiser"]),
            tuple(arrays["formats"].tolist()),
            arrays["errors"],
            arrays["rows"],
            arrays["gains"],
            int(arrays["n_sensitivity"]),
            is_measured="assumed" not in arrays,
        )
    return Profile(
        model=str(arrays["model"]),
        digest=str(arrays["digest"]),
        chunk=int(arrays["chunk"]),
        record_bytes=arrays["record_bytes"],
        domains=tuple(map(Domain, names, tokens, held_out, ids, weights)),
        shares=normalised(dict(zip(names, arrays["shares"].tolist(), strict=True))),
        own_text=bool(arrays["own_text"]),
        input_moments=arrays["input_moments"],
        hidden_moments=arrays["hidden_moments"],
        recall=dict(zip(arrays["predictors"].tolist(), arrays["recall"], strict=True)),
        sensitivity=sensitivity,
        settings=read_settings(str(arrays.get("settings", "{}"))),
    )


def _split(array: Any, counts: Any, axis: int = 0) -> Sequence[Any]:
    """The parts of `counts` entries each."""
    return np.split(array, np.cumsum(counts)[:-1].tolist(), axis)
