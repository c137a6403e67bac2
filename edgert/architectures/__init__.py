"""Model architectures: one file each, found by GGUF's `general.architecture`.

A file here maps metadata keys to `ModelConfig` and nothing else. To add one, add a module with the architecture's name
(a hyphen becomes an underscore) and a function `config(keys: Keys) -> ModelConfig`, and a golden fixture.
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


def supported() -> list[str]:
    """Names of the architectures that edgert runs."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in names if name not in _NOT_ARCHITECTURES)


def read_config(metadata: Mapping[str, Any], file: str) -> ModelConfig:
    """The configuration that a GGUF's metadata describe.

    Raises UnsupportedError for an architecture, key or value that edgert does not honour, ModelFileError for one that
    makes no sense; both name the key.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelFileError(f"{file}: the key general.architecture is missing; this GGUF holds no model")
    if architecture not in supported():
        raise UnsupportedError(
            f"{file}: general.architecture is {architecture!r:.60}; supported are {', '.join(supported())}"
        )
    module = importlib.import_module(f"{__name__}.{architecture.replace('-', '_')}")
    keys = Keys(metadata, architecture, file)
    config: ModelConfig = module.config(keys)
    keys.refuse_unread()
    return config
