"""The policy and the predictors that a replay found best for a model, and what they start with, where loading finds it.

One JSON file a model, named after a digest of its key, in the user's cache folder; and one of the same form in a bundle
that was packed with a profile. The key is the model's name and configuration, not its weights: two fine-tunes that kept
the name share a choice, which costs time and changes no answer. A file that is damaged or cannot be read counts as
none: the defaults then hold.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.experts import topics as maps
from edgert.experts.policies import POLICIES
from edgert.experts.predictors import DEFAULT, PREDICTORS, Primed, table_bytes
from edgert.experts.topics import TopicMap
from edgert.storage.aside import written_aside
from edgert.storage.bundle import CHOICE as CHOICE
from edgert.types import Floats

DEFAULT_POLICY = "cost"
_VERSION = 1
_MOST_BYTES = 16 << 20
_SCALE = 10_000  # shares of the profile are kept as integers


@dataclass(frozen=True)
class Choice:
    """policy: a name of POLICIES. predictors: names of PREDICTORS. profile: the share of tokens that use each expert,
    (n_layers, n_expert), or None. topics: maps by the tokens that they look ahead. paths: the predictors' path table.
    """

    policy: str = DEFAULT_POLICY
    predictors: tuple[str, ...] = DEFAULT
    profile: Floats | None = None
    topics: Mapping[int, TopicMap] = field(default_factory=dict)
    paths: npt.NDArray[np.uint8] | None = None

    @property
    def primed(self) -> Primed | None:
        """What the predictors start with."""
        return None if self.profile is None or self.paths is None else Primed(self.profile, self.paths)


@dataclass(frozen=True)
class Found:
    """What a replay found. policies: the best by residency; the others as in Choice. n_tokens: that were replayed."""

    policies: Mapping[float, str]
    predictors: tuple[str, ...]
    profile: Floats
    n_tokens: int
    topics: Mapping[int, TopicMap] = field(default_factory=dict)
    paths: npt.NDArray[np.uint8] | None = None


def choices_folder() -> Path:
    """$XDG_CACHE_HOME/edgert/choices, or ~/.cache/edgert/choices; RuntimeError for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgert" / "choices"


def choice_path(model: str) -> Path:
    """The file of a model by its key (any text will do)."""
    return choices_folder() / f"{hashlib.sha256(model.encode()).hexdigest()[:32]}.json"


def save_choice(model: str, found: Found) -> Path:
    """Keep what was found for a model. Returns the file; raises OSError."""
    path = choice_path(model)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_bytes(as_bytes(model, found))
    return path


def as_bytes(model: str, found: Found) -> bytes:
    """The file of a choice."""
    paths = found.paths
    document = {
        "version": _VERSION,
        "model": model,
        "tokens": found.n_tokens,
        "policies": [[share, name] for share, name in sorted(found.policies.items())],
        "predictors": list(found.predictors),
        "profile": np.rint(found.profile * _SCALE).astype(int).tolist(),
        "topics": {str(ahead): maps.as_document(found.topics[ahead]) for ahead in sorted(found.topics)},
        "paths": None if paths is None else base64.b64encode(zlib.compress(paths.tobytes(), 9)).decode(),
    }
    return json.dumps(document, separators=(",", ":")).encode()


def choice_for(model: str, residency: float, shape: tuple[int, int], bundle: Path | None = None) -> Choice | None:
    """What was found for a model of shape (n_layers, n_expert) at the residency nearest `residency`, or None.

    What the user's own replay found comes before what lies in the bundle's folder.
    """
    with contextlib.suppress(RuntimeError):  # a user without a home
        if (own := _read(choice_path(model), model, residency, shape)) is not None:
            return own
    return None if bundle is None else _read(bundle / CHOICE, model, residency, shape)


def _read(path: Path, model: str, residency: float, shape: tuple[int, int]) -> Choice | None:
    """The choice in a file, if it is one for this model."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        return _choice(json.loads(path.read_text()), model, residency, shape)
    except (OSError, ArithmeticError, ValueError, TypeError, AttributeError, LookupError, RecursionError, zlib.error):
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
    topics, paths = document.get("topics", {}), document.get("paths")
    return Choice(
        policy,
        predictors,
        profile,
        {int(ahead): maps.from_document(one, shape) for ahead, one in topics.items()},
        None if paths is None else _path_table(paths, shape),
    )


def _path_table(text: str, shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """A path table, no larger unpacked than it may be; raises what other text makes it raise."""
    n_bytes = table_bytes(*shape) // 4  # kept as bytes
    unpacked = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), n_bytes + 1)
    if len(unpacked) != n_bytes:
        raise ValueError(f"a path table of {len(unpacked)} bytes, not {n_bytes}")
    return np.frombuffer(unpacked, np.uint8).reshape(shape[0], -1, shape[1] + 1)
