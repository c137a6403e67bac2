"""What a profile's file may hold: names, kinds, shapes and ranges of its arrays, whoever wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edgert.experts.array_file import Layout, check_ids, check_record_bytes, read_arrays

_MOST_BYTES = 4 << 30
_MOST_TOKENS = 1 << 30
_MOST_DOMAINS = 1000
_MOST_SETTINGS = 1 << 20
_EXPERTS = ("n_layers", "n_expert")
_TABLE = {
    "version": Layout("iu"),
    "model": Layout("U"),
    "digest": Layout("U"),
    "chunk": Layout("iu"),
    "own_text": Layout("iu"),
    "record_bytes": Layout("i", _EXPERTS),
    "domains": Layout("U", ("n_domains",)),
    "shares": Layout("f", ("n_domains",)),
    "n_tokens": Layout("i", ("n_domains",)),
    "n_held_out": Layout("i", ("n_domains",)),
    "tokens": Layout("i", ("all_tokens",)),
    "held_out": Layout("i", ("all_held_out",)),
    "ids": Layout("u", ("n_layers", "all_tokens", "top_k")),
    "weights": Layout("f", ("n_layers", "all_tokens", "top_k")),
    "input_moments": Layout("f", (*_EXPERTS, "d_model")),
    "hidden_moments": Layout("f", (*_EXPERTS, "d_expert")),
    "predictors": Layout("U", ("n_predictors",)),
    "recall": Layout("f", ("n_predictors", 2, "n_layers")),
    "quantiser": Layout("U"),
    "formats": Layout("U", ("n_formats",)),
    "errors": Layout("f", (*_EXPERTS, 3, "n_formats")),
    "rows": Layout("i", _EXPERTS),
    "gains": Layout("f", ("n_layers",)),
    "n_sensitivity": Layout("iu"),
    "assumed": Layout("iu"),
    "settings": Layout("U"),
}
_SENSITIVITY = frozenset({"quantiser", "formats", "errors", "rows", "gains", "n_sensitivity"})
_TYPES = {
    "record_bytes": np.int64,
    "tokens": np.int32,
    "held_out": np.int32,
    "weights": np.float16,
    "input_moments": np.float32,
    "hidden_moments": np.float32,
    "recall": np.float32,
    "errors": np.float32,
    "rows": np.int32,
    "gains": np.float32,
}


def read_profile(path: Path) -> dict[str, Any]:
    """The checked arrays of a profile; ModelFileError for a file that is none, or lies about itself."""
    return read_arrays(
        path,
        _TABLE,
        _check,
        what="a profile",
        remedy="give a file made with `edgert profile`",
        most_bytes=_MOST_BYTES,
        optional=(_SENSITIVITY, frozenset({"assumed"}), frozenset({"settings"})),
    )


def _check(arrays: dict[str, Any], extents: dict[str, int]) -> None:
    """ValueError unless the values fit together."""
    if arrays["version"] != 1:
        raise ValueError(f"version {arrays['version']}, only 1 is known")
    for name, kind in _TYPES.items():
        if name in arrays and arrays[name].dtype != kind:
            raise ValueError(f"{name} has type {arrays[name].dtype}, not {np.dtype(kind)}")
    if not 0 < extents["top_k"] <= extents["n_expert"] or not extents["d_model"]:
        raise ValueError(f"{extents['top_k']} of {extents['n_expert']} experts of width {extents['d_model']}")
    sizes = arrays["record_bytes"]
    check_record_bytes(sizes)
    check_ids(arrays["ids"][sizes.any(axis=1)], extents["n_expert"])
    _check_domains(arrays, extents)
    for name in ("weights", "input_moments", "hidden_moments"):
        if not (np.isfinite(arrays[name]).all() and (arrays[name] >= 0).all()):
            raise ValueError(f"{name} has values that are negative or no numbers")
    recall = arrays["recall"]
    if not ((recall >= 0) & (recall <= 1) | np.isnan(recall)).all():
        raise ValueError("recall is not between 0 and 1")
    _check_different(arrays["predictors"])
    if "errors" in arrays:
        _check_sensitivity(arrays)
    elif "assumed" in arrays:
        raise ValueError("it says that gains are assumed, and has none")
    if "settings" in arrays:
        read_settings(str(arrays["settings"]))


def read_settings(text: str) -> dict[str, Any]:
    """Settings from their JSON; ValueError unless they are an object, with runs of token ids as its template."""
    if len(text) > _MOST_SETTINGS:
        raise ValueError(f"settings of {len(text):,} characters, at most {_MOST_SETTINGS:,} are read")
    found = json.loads(text)
    words = found.get("template", []) if isinstance(found, dict) else None
    if not isinstance(words, list) or not all(isinstance(word, list) and word for word in words):
        raise ValueError("settings are not what settings are")
    own, kinds = found.get("own"), found.get("kinds", [None, None])
    counts = [*(token for word in words for token in word), *(own if isinstance(own, list) else [])]
    if not all(type(count) is int and 0 <= count < 1 << 31 for count in counts):
        raise ValueError("settings have numbers that no tokens have")
    if (own is not None and len(own) != 2) or not isinstance(kinds, list) or len(kinds) != 2:
        raise ValueError("settings are not what settings are")
    return dict(found)


def _check_domains(arrays: dict[str, Any], extents: dict[str, int]) -> None:
    """ValueError unless the text is in whole chunks, and each kind of it has a name and a share."""
    chunk, counts, shares = int(arrays["chunk"]), arrays["n_tokens"], arrays["shares"]
    if not 0 < extents["n_domains"] <= _MOST_DOMAINS or not 1 < chunk <= _MOST_TOKENS:
        raise ValueError(f"{extents['n_domains']} kinds of text in chunks of {chunk} tokens")
    for name, total, least in (("n_tokens", "all_tokens", 1), ("n_held_out", "all_held_out", 0)):
        counts = arrays[name]
        if counts.min() < least or counts.max() > _MOST_TOKENS or counts.sum() != extents[total]:
            raise ValueError(f"{name} does not add up to {extents[total]:,}")
        if (counts % chunk).any():
            raise ValueError(f"{name} is not in whole chunks of {chunk}")
    if not (np.isfinite(shares).all() and shares.min() >= 0 and 0 < shares.sum() < np.inf):
        raise ValueError("shares has values that no shares have")
    for name in ("tokens", "held_out"):
        if arrays[name].min(initial=0) < 0:
            raise ValueError(f"{name} has negative ids")
    _check_different(arrays["domains"])


def _check_sensitivity(arrays: dict[str, Any]) -> None:
    rows, n_tokens = arrays["rows"], int(arrays["n_sensitivity"])
    if not 0 < n_tokens <= _MOST_TOKENS or rows.min() < 0 or rows.max() > n_tokens:
        raise ValueError(f"rows are not between 0 and {n_tokens}")
    errors = arrays["errors"]
    unfit = np.isinf(errors[rows > 0])  # formats that do not fit a projection, and so that of no expert
    if not (errors >= 0).all() or (unfit.any(axis=0) != unfit.all(axis=0)).any() or (unfit.size and unfit.all()):
        raise ValueError("errors has values that are negative or no numbers")
    if not np.isfinite(arrays["gains"]).all() or arrays["gains"].min() < 0:
        raise ValueError("gains has values that are negative or no numbers")
    _check_different(arrays["formats"])


def _check_different(names: Any) -> None:
    if len(set(names.tolist())) != len(names) or any(not name or len(name) > 10_000 for name in names.tolist()):
        raise ValueError(f"names {names.tolist()[:10]} are not different, or too long")
