"""What a manifest keeps of how bits were chosen, beside its records: what was asked, and what came of it, in words.

Documents are read as if they were hostile: what is not of the kind that packing writes is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgert.experts.profile import Profile

PROFILE, PROOF = "profile", "proof"  # in what was asked: digests of what it was made with
_SHOWN = 5  # experts and layers that are named, of many


def profile_digest(profile: Profile) -> str:
    """A digest of all of a profile that decides what a bundle holds."""
    digest = hashlib.sha256(f"{profile.digest} {profile.chunk} {sorted(profile.shares.items())}".encode())
    for domain in profile.domains:
        for array in (domain.tokens, domain.held_out, domain.ids):
            digest.update(np.ascontiguousarray(array).tobytes() + b"\0")
    if (found := profile.sensitivity) is not None:
        digest.update(f"{found.quantiser} {found.formats} {found.n_tokens}".encode())
        for table in (found.errors, found.rows, found.gains):
            digest.update(np.ascontiguousarray(table).tobytes())
    return digest.hexdigest()[:32]


def never_routed(profile: Profile) -> dict[str, list[int]]:
    """Experts that no token of the profile's text was routed to, by layer."""
    unused = (profile.record_bytes > 0) & (profile.frequency(dict.fromkeys(profile.shares, 1.0)) == 0)
    return {str(layer): np.flatnonzero(unused[layer]).tolist() for layer in np.flatnonzero(unused.any(axis=1))}


def asked_words(asked: Mapping[str, Any]) -> str:
    """What was asked, as it is written on the command line; digests are not."""
    words = []
    for key, value in asked.items():
        if key == "loss" and isinstance(value, float):
            words.append(f"--loss {100 * value:g}%")
        elif key == "bits_per_weight" and isinstance(value, (int, float)):
            words.append(f"--size {value:g}bpw")
        elif key == "n_bytes":
            words.append(f"--size {value}B")
        elif key not in (PROFILE, PROOF) and _DEFAULTS.get(key) != value:
            words.append(f"--{key} {value}{'B' if key == 'memory' else ''}")
    return " ".join(words) or "the source's own bits"


_DEFAULTS = {"objective": "size", "method": "optimal", "quantiser": "gptq", "hot": 8}
_LINES = {"kept": "not quantised", "instead": "formats", "assumed": "assumed", "optimum": "optimum", "flash": "flash"}


def same_goal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two bundles were asked to be the same, whatever profile and text they were made with."""
    first, second = ({k: v for k, v in asked.items() if k not in (PROFILE, PROOF)} for asked in (one, other))
    return first == second


def lines(chosen: Mapping[str, Any]) -> Iterator[str]:
    """What a person should know of how bits were chosen, a line each; of a manifest's document."""
    for key, name in _LINES.items():
        if isinstance(value := chosen.get(key), str):
            yield f"{name}: {value}"
    unused = chosen.get("never_routed")
    if isinstance(unused, Mapping) and (named := _experts(unused)):
        yield f"never routed to in the profile's text: {named}, {chosen.get('unknown', '')}"


def words(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The document for a person, by the name of what is said."""
    asked = chosen.get("asked")
    found: dict[str, Any] = {"asked": asked_words(asked)} if isinstance(asked, Mapping) else {}
    for key, name in (("quantiser", "quantiser"), ("hot", "hot weights")):
        if isinstance(value := chosen.get(key), str):
            found[name] = value or "as in the source"
    return found | dict(line.split(": ", 1) for line in lines(chosen))


def _experts(unused: Mapping[str, Any]) -> str:
    """The experts of some layers, the first ones by name."""
    pairs = [(layer, n) for layer, experts in unused.items() if isinstance(experts, Sequence) for n in experts]
    named = ", ".join(f"{expert} of layer {layer}" for layer, expert in pairs[:_SHOWN])
    more = f" and {len(pairs) - _SHOWN:,} more" if len(pairs) > _SHOWN else ""
    return f"expert {named}{more}" if pairs else ""
