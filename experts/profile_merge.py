"""One profile of several profiles of the same model, each with a weight: as if their text had been one mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.errors import OptionError
from edgert.experts.profile import Domain, Profile, Sensitivity, kinds_in_words, normalised
from edgert.experts.text_overlap import Words, copies
from edgert.types import Floats


class Part(NamedTuple):
    """A profile that is merged; name: what to call it where something is wrong, or where two texts have one name."""

    name: str
    profile: Profile
    weight: float


def merge(parts: Sequence[Part]) -> Profile:
    """The profile of all text, the kinds of it weighted by their share in each profile times its weight.

    Moments and losses are those of the mixture; recall is the weighted mean. Sensitivity is merged where all have it by
    the same quantiser for the same formats, else left out. What one kept back and another calibrated on is dropped, see
    text_overlap. OptionError for profiles that do not fit.
    """
    first = parts[0].profile
    for part in parts:
        _check(parts[0], part)
    kinds = _kinds(parts)
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        raise OptionError(f"profiles {', '.join(names)}: each can be merged once")
    weights = normalised({part.name: part.weight for part in parts})
    frequencies = {part.name: part.profile.frequency().astype(np.float64) for part in parts}
    domains, shares = _domains(parts, weights)
    words = [word for part in parts for word in part.profile.settings.get("template", [])]

    def moments(which: str) -> Floats:
        total = sum(
            weights[p.name] * frequencies[p.name][..., None] * getattr(p.profile, which).astype(np.float64)
            for p in parts
        )
        share = sum(weights[name] * frequency for name, frequency in frequencies.items())
        return _ratio(np.asarray(total), np.asarray(share)[..., None])

    common = [name for name in first.recall if all(name in part.profile.recall for part in parts)]
    return replace(
        first,
        domains=_without_copies(domains, first.chunk, words),
        shares=shares,
        own_text=all(part.profile.own_text for part in parts),
        input_moments=moments("input_moments"),
        hidden_moments=moments("hidden_moments"),
        recall={
            name: np.asarray(sum(weights[p.name] * p.profile.recall[name] for p in parts), np.float32)
            for name in common
        },
        sensitivity=_sensitivity(parts, weights),
        settings={**first.settings, **kinds, "own": None, "template": words},
    )


def _without_copies(domains: Sequence[Domain], chunk: int, words: Words) -> tuple[Domain, ...]:
    """The same without chunks kept back that repeat text of any that was calibrated on."""
    calibrated = [tokens for domain in domains for tokens in domain.tokens.reshape(-1, chunk).tolist()]
    found = []
    for domain in domains:
        held_out = domain.held_out.reshape(-1, chunk)
        kept = held_out[~copies(held_out.tolist(), calibrated, words)]
        found.append(replace(domain, held_out=kept.reshape(-1)))
    return tuple(found)


def _check(first: Part, other: Part) -> None:
    """OptionError unless two profiles are of one model, and cut alike."""
    ours, theirs = first.profile, other.profile
    if theirs.digest != ours.digest or not np.array_equal(theirs.record_bytes, ours.record_bytes):
        raise OptionError(f"{other.name} is a profile of another model than {first.name}: profile one model")
    if theirs.chunk != ours.chunk:
        raise OptionError(
            f"{other.name} is in chunks of {theirs.chunk} tokens, {first.name} of {ours.chunk}: use one --context"
        )
    shapes = [(p.top_k, p.input_moments.shape, p.hidden_moments.shape, p.domains[0].ids.dtype) for p in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise OptionError(f"{other.name} has other shapes than {first.name}: one of them is damaged")


def _kinds(parts: Sequence[Part]) -> dict[str, Any]:
    """The setting that all share who know it; OptionError where two differ: no run would give the routes of both."""
    known = [part for part in parts if "kinds" in part.profile.settings]
    for other in known[1:]:
        ours, theirs = (part.profile.settings["kinds"] for part in (known[0], other))
        if theirs != ours:
            raise OptionError(
                f"{other.name} was run with {kinds_in_words(theirs)}, {known[0].name} with {kinds_in_words(ours)}, "
                "which routes otherwise: profile both with the same --kv-type and --activations"
            )
    return {"kinds": known[0].profile.settings["kinds"]} if known else {}


def _domains(parts: Sequence[Part], weights: Mapping[str, float]) -> tuple[tuple[Domain, ...], dict[str, float]]:
    """All text with its shares; a name that two profiles have is given that of the profile too."""
    names = [domain.name for part in parts for domain in part.profile.domains]
    found, shares = [], dict[str, float]()
    for part in parts:
        for domain in part.profile.domains:
            name = domain.name if names.count(domain.name) == 1 else f"{part.name}: {domain.name}"
            found.append(replace(domain, name=name))
            shares[name] = weights[part.name] * part.profile.shares.get(domain.name, 0.0)
    return tuple(found), normalised(shares)


def _sensitivity(parts: Sequence[Part], weights: Mapping[str, float]) -> Sensitivity | None:
    """What quantising costs on the mixture: losses are weighted means, and so are gains and shares of the tokens."""
    # Losses are without end where a format does not fit, and no weight times that is no number.
    each = [(weights[part.name], part.profile.sensitivity) for part in parts if weights[part.name]]
    known = [(weight, one) for weight, one in each if one is not None]
    if len(known) < len(each) or len({(one.quantiser, one.formats) for _, one in known}) > 1:
        return None
    n_tokens = sum(one.n_tokens for _, one in known)
    gains = np.asarray(sum(weight * one.gains.astype(np.float64) for weight, one in known))
    share = np.asarray(sum(weight * one.rows / max(one.n_tokens, 1) for weight, one in known))
    loss = np.asarray(sum(weight * one.loss().astype(np.float64) for weight, one in known))
    rows = np.rint(share * n_tokens)
    unit = gains[:, None] * rows / n_tokens
    return Sensitivity(
        known[0][1].quantiser,
        known[0][1].formats,
        _ratio(loss, unit[..., None, None]),
        rows.astype(np.int32),
        gains.astype(np.float32),
        n_tokens,
        is_measured=all(one.is_measured for _, one in known),
    )


def _ratio(total: npt.NDArray[np.float64], share: npt.NDArray[np.float64]) -> Floats:
    """total / share, 0 where share is."""
    return np.divide(total, share, out=np.zeros_like(total), where=np.broadcast_to(share > 0, total.shape)).astype(
        np.float32
    )
