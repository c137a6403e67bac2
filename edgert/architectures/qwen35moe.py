"""qwen35moe: Qwen3.5 with experts, text only."""

from __future__ import annotations

from edgert.architectures import qwen3next
from edgert.architectures.keys import Keys
from edgert.types import ModelConfig

NAMES = qwen3next.NAMES


def config(keys: Keys) -> ModelConfig:
    """As qwen3next, but that value heads take the key heads in turn."""
    keys.ignore("rope.dimension_sections")  # for text, whose positions are all equal, it is the same rotation
    return qwen3next.config(keys, in_turn=True)
