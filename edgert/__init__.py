"""edgert runs Mixture-of-Experts language models on small machines.

    import edgert
    with edgert.load("model.gguf") as model:
        for piece in model.chat([{"role": "user", "content": "Hello!"}], stream=True):
            print(piece.text, end="", flush=True)

Importing this package loads neither numba nor onnxruntime; names are found on first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgert.errors import EdgertError as EdgertError
    from edgert.generation import Completion as Completion
    from edgert.generation import Piece as Piece
    from edgert.generation import Stream as Stream
    from edgert.generation import Usage as Usage
    from edgert.model import Model as Model
    from edgert.model import load as load
    from edgert.sampling import Sampling as Sampling

_TREE = Path(__file__).resolve().parents[1]
if (_TREE / "storage" / "gguf_file.py").exists():  # a checkout that is imported in place, not installed
    __path__.append(str(_TREE))

__all__ = ["Completion", "EdgertError", "Model", "Piece", "Sampling", "Stream", "Usage", "load"]

_HOME = {
    "Completion": "edgert.generation",
    "EdgertError": "edgert.errors",
    "Model": "edgert.model",
    "Piece": "edgert.generation",
    "Sampling": "edgert.sampling",
    "Stream": "edgert.generation",
    "Usage": "edgert.generation",
    "load": "edgert.model",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
