"""Small vocabularies as GGUF metadata, for the tests of tokenizer, detokenizer and chat template."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared"  # the project's own tests do without it
GOLDEN = (Path(__file__).resolve().parent / "golden", SHARED / "golden" / "open")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def byte_characters() -> list[str]:
    """How byte-level vocabularies write the bytes 0 to 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def pair_merges(texts: Sequence[str]) -> list[str]:
    """Merges of all pairs of bytes that stand side by side in some texts, in an order without meaning: what joins
    across a cut, or is cut where it should join, shows in the ids."""
    characters = byte_characters()
    pairs = {pair for text in texts for pair in pairwise(text.encode())}
    return sorted((f"{characters[a]} {characters[b]}" for a, b in pairs), key=lambda merge: zlib.crc32(merge.encode()))


def byte_level(
    merges: Sequence[str] = (),
    special: Mapping[str, int] | None = None,
    *,
    pre: str | None = "gpt-2",
    words: Sequence[str] = (),
    **keys: Any,
) -> dict[str, Any]:
    """A gpt2 vocabulary: all bytes, what the merges make, `words`, then special tokens with their types.

    keys: further tokenizer.ggml.* values.
    """
    tokens = byte_characters()
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += [word for word in words if word not in tokens]
    types = [NORMAL] * len(tokens)
    for text, kind in (special or {}).items():
        tokens.append(text)
        types.append(kind)
    metadata: dict[str, Any] = {"model": "gpt2", "tokens": tokens, "token_type": types, "merges": list(merges), **keys}
    if pre is not None:
        metadata["pre"] = pre
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def sentencepiece(
    scores: Mapping[str, float], special: Mapping[str, int] | None = None, *, n_bytes: int = 256, **keys: Any
) -> dict[str, Any]:
    """A llama vocabulary: <unk>, <s>, </s>, byte tokens, tokens with scores, special tokens with their types."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(n_bytes)), *scores, *(special or {})]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * n_bytes, *[NORMAL] * len(scores), *(special or {}).values()]
    values = [0.0] * (3 + n_bytes) + list(scores.values()) + [0.0] * len(special or {})
    metadata: dict[str, Any] = {"model": "llama", "tokens": tokens, "token_type": types, "scores": values, **keys}
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
