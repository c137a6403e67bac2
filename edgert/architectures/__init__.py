"""Model architectures: one file each, found by GGUF's `general.architecture`.

A file here maps metadata keys to `ModelConfig` and names of tensors to ours, and nothing else. To add one, add a module
with the architecture's name, hyphens as underscores (ARCHITECTURE is the name where it has underscores of its own), a
function `config(keys: Keys) -> ModelConfig`, and a golden fixture. Where they differ it has NAMES, what files call
tensors by what edgert.tensor_table calls them (those of layers without a prefix), and OPTIONAL, those of its layers
that need not be there.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from edgert.architectures.keys import Keys
from edgert.errors import ModelFileError, UnsupportedError
from edgert.types import ModelConfig

_NOT_ARCHITECTURES = {"keys"}
_TOWERS = {"clip", "mmproj"}  # what files with a tower for pictures or sound say


def supported() -> list[str]:
    """Names of the architectures that edgert runs."""
    return sorted(map(_name, _modules()))


def _modules() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)} - _NOT_ARCHITECTURES


def _name(module: str) -> str:
    """GGUF's name of the architecture that a module is for: its own, with hyphens, unless it says so."""
    return str(getattr(_module(module), "ARCHITECTURE", module.replace("_", "-")))


def tensor_names(architecture: str) -> dict[str, str]:
    """What files call tensors that edgert.tensor_table calls otherwise."""
    return dict(getattr(_module(architecture), "NAMES", {}))


def optional_tensors(architecture: str) -> frozenset[str]:
    """Tensors of a layer that a file may do without."""
    return frozenset(getattr(_module(architecture), "OPTIONAL", ()))


def _module(architecture: str) -> Any:
    return importlib.import_module(f"{__name__}.{architecture.replace('-', '_')}")


def read_config(metadata: Mapping[str, Any], file: str) -> ModelConfig:
    """The configuration that a GGUF's metadata describe.

    Raises UnsupportedError for an architecture, key or value that edgert does not honour, ModelFileError for one that
    makes no sense; both name the key.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelFileError(f"{file}: the key general.architecture is missing; this GGUF holds no model")
    if architecture in _TOWERS:
        raise UnsupportedError(
            f"{file}: general.architecture is {architecture!r}: this is the part of a model that sees or hears "
            "(mmproj), which edgert does not have; take the text model, which is a file of its own"
        )
    module = architecture.replace("-", "_")
    if module not in _modules() or _name(module) != architecture:
        raise UnsupportedError(
            f"{file}: general.architecture is {architecture!r:.60}; supported are {', '.join(supported())}"
        )
    keys = Keys(metadata, architecture, file)
    config: ModelConfig = _module(architecture).config(keys)
    keys.refuse_unread()
    return config
