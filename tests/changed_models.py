"""Fixtures with other tensors or other metadata, made anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from models import golden_path

Tensors = dict[str, Any]


def unchanged(tensors: Tensors) -> None:
    """All tensors as they are."""


def rewritten(name: str, target: Path, change: Callable[[Tensors], None] = unchanged, **keys: Any) -> Path:
    """A fixture with other tensors, all F32, and other values of keys, whose dots are written as two underscores.

    keys: those of the architecture; None takes one away, others are added: int, float, bool, str or list.
    """
    import gguf

    reader = gguf.GGUFReader(golden_path(name))
    architecture = str(reader.fields["general.architecture"].contents())
    changed = {f"{architecture}.{key.replace('__', '.')}": value for key, value in keys.items()}
    writer = gguf.GGUFWriter(target, architecture)
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in changed:
            sub_type = entry.types[-1] if len(entry.types) > 1 else None
            writer.add_key_value(key, entry.contents(), entry.types[0], sub_type)
    for key, value in changed.items():
        if value is not None:
            one = value[0] if isinstance(value, list) else value
            kind, sub_type = gguf.GGUFValueType.get_type(value), gguf.GGUFValueType.get_type(one)
            writer.add_key_value(key, value, kind, sub_type if isinstance(value, list) else None)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    change(tensors)
    for tensor, data in tensors.items():
        writer.add_tensor(tensor, np.ascontiguousarray(data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
