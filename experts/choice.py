"""The policy and the predictors that a replay found best for a model, kept where loading finds them.

One small JSON file a model, named after a digest of its key, in the user's cache folder. The key is the model's name
and configuration, not its weights: two fine-tunes that kept the name share a choice, which costs time and changes no
answer. A file that is damaged or cannot be read counts as none: the defaults then hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgert.experts.policies import POLICIES
from edgert.experts.predictors import DEFAULT, PREDICTORS
from edgert.types import Floats

DEFAULT_POLICY = "cost"
_VERSION = 1
_MOST_BYTES = 16 << 20
_SCALE = 10_000  # shares of the profile are kept as integers


@dataclass(frozen=True)
class Choice:
    """policy: a name of POLICIES. predictors: names of PREDICTORS. profile: the share of tokens that use each expert,
    (n_layers, n_expert), or None."""

    policy: str = DEFAULT_POLICY
    predictors: tuple[str, ...] = DEFAULT
    profile: Floats | None = None


def choices_folder() -> Path:
    """$XDG_CACHE_HOME/edgert/choices, or ~/.cache/edgert/choices; RuntimeError for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgert" / "choices"


def choice_path(model: str) -> Path:
    """The file of a model by its key (any text will do)."""
    return choices_folder() / f"{hashlib.sha256(model.encode()).hexdigest()[:32]}.json"


def save_choice(
    model: str, policies: Mapping[float, str], predictors: tuple[str, ...], profile: Floats, n_tokens: int
) -> Path:
    """Keep what was found: the policy for each residency, and the profile. Returns the file; raises OSError."""
    path = choice_path(model)
    document = {
        "version": _VERSION,
        "model": model,
        "tokens": n_tokens,
        "policies": [[share, name] for share, name in sorted(policies.items())],
        "predictors": list(predictors),
        "profile": np.rint(profile * _SCALE).astype(int).tolist(),
    }
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(json.dumps(document, separators=(",", ":")))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def choice_for(model: str, residency: float, shape: tuple[int, int]) -> Choice | None:
    """What was found for a model of shape (n_layers, n_expert) at the residency nearest `residency`, or None."""
    try:
        path = choice_path(model)
        if path.stat().st_size > _MOST_BYTES:
            return None
        return _choice(json.loads(path.read_text()), model, residency, shape)
    except (OSError, RuntimeError, ArithmeticError, ValueError, TypeError, LookupError):
        return None


def _choice(document: Any, model: str, residency: float, shape: tuple[int, int]) -> Choice | None:
    """The choice in a document; raises what a document of another form makes it raise."""
    if document["version"] != _VERSION or document["model"] != model:
        return None
    near = max(residency, 1e-6)
    _, policy = min(document["policies"], key=lambda row: abs(math.log(row[0] / near)))
    predictors = tuple(document["predictors"])
    profile: Floats = np.array(document["profile"], np.float32) / np.float32(_SCALE)
    sound = profile.shape == shape and bool(((profile >= 0) & (profile <= 1)).all())
    if policy not in POLICIES or not predictors or not set(predictors) <= set(PREDICTORS) or not sound:
        return None
    return Choice(policy, predictors, profile)
