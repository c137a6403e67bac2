"""Text to calibrate on: files as chunks of token ids, evenly spread over each file, some of them kept back for proofs.

Conversations go through the model's own chat template where it has one. What is in the files is never taken for control
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from edgert.chat_template import ChatTemplate
from edgert.corpus_files import Document, read_parts
from edgert.errors import OptionError, TemplateError
from edgert.tokenizer import Tokenizer

Chunks = list[list[int]]
_TOKEN_BYTES = 32  # of a file for each token wanted: real text has 3 to 5, so that a part holds a chunk
_LEAST_TOKEN_BYTES = 4  # by which the length of a file that is not read whole is judged


class Corpus(NamedTuple):
    """Text of one kind, in chunks of equal length; the first token of each is the start token if the model wants one.

    notes: what a person should know of it, a line each.
    """

    name: str
    tokens: Chunks
    held_out: Chunks
    notes: tuple[str, ...] = ()


def read_corpora(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    n_tokens: int,
    chunk: int,
    held_out: float,
    progress: Callable[[str, float], None],
) -> list[Corpus]:
    """A corpus of each file: together `n_tokens` to calibrate on, the same number from each, in whole chunks.

    held_out: the share of each file that is kept back, at most as much as is calibrated on. OptionError for a file that
    cannot be read or holds too little.
    """
    names = _names(paths)
    n_chunks = chunks_for(n_tokens / len(paths), chunk)
    found = []
    for place, (name, path) in enumerate(zip(names, paths, strict=True)):
        progress(f"reading {name}", place / len(paths))
        found.append(_read(name, path, _Encoder(tokenizer, template), n_chunks, chunk, held_out))
    return found


def chunks_for(n_tokens: float, chunk: int) -> int:
    """Chunks that hold so many tokens, at least one."""
    return max(1, math.ceil(n_tokens / chunk))


def _names(paths: Sequence[Path]) -> list[str]:
    """What the files are called: by their names, or by their paths where two have the same."""
    for path in paths:
        if sum(other.absolute() == path.absolute() for other in paths) > 1:
            raise OptionError(f"{path} is named twice: each text counts once; weigh them when you merge profiles")
    names = [path.name for path in paths]
    found = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    return [name.encode("utf-8", "replace").decode() for name in found]  # bytes of another encoding are no text


class _Encoder:
    """Documents as token ids, and how many conversations the template refused."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._n_refused, self._why = 0, ""

    def encode(self, documents: Iterable[Document]) -> list[int]:
        """Documents one after the other."""
        return [token for document in documents for token in self._encode(document)]

    def _encode(self, document: Document) -> list[int]:
        if not isinstance(document, str):
            if not self._template.is_default:
                try:
                    return self._template.encode(document, add_generation_prompt=False)
                except TemplateError as error:
                    self._n_refused, self._why = self._n_refused + 1, str(error)
            document = "\n".join(message["content"] for message in document)
        return self._tokenizer.encode(f"{document}\n\n", bos=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know."""
        if not self._n_refused:
            return ()
        return (f"{self._n_refused} conversations are taken as plain text: {self._why}",)

    def begin(self, chunk: list[int]) -> list[int]:
        """A chunk with the start token in front, if the model wants one, as edgert.perplexity has it."""
        bos = self._tokenizer.bos_id if self._tokenizer.add_bos else None
        return chunk if bos is None else [bos, *chunk[1:]]


def _read(name: str, path: Path, encoder: _Encoder, n_chunks: int, chunk: int, held_out: float) -> Corpus:
    """One file's chunks: to calibrate on, and kept back."""
    n_parts = n_chunks if held_out == 0 else 2 * n_chunks
    parts = read_parts(path, n_parts, chunk * _TOKEN_BYTES)
    encoded = [encoder.encode(part) for part in parts]
    chunks = _cut(encoded[0], chunk) if len(encoded) == 1 else _first_chunks(encoded, n_parts, chunk)
    size = len(chunks) if len(encoded) == 1 else path.stat().st_size / (chunk * _LEAST_TOKEN_BYTES)
    n_held_out = min(max(1, round(held_out * size)), n_chunks) if held_out else 0
    least = 1 + bool(held_out)
    if len(chunks) < least:
        count = sum(map(len, encoded))
        kept = ", one of them to be kept back (--held-out 0 keeps none)" if held_out else ""
        raise OptionError(
            f"{path} has {count:,} tokens, but {'a chunk' if least == 1 else 'two chunks'} of {chunk} are needed"
            f"{kept}: give more text"
        )
    kept_back = set(_evenly(len(chunks), min(n_held_out, len(chunks) - 1)))
    others = [place for place in range(len(chunks)) if place not in kept_back]
    chosen = [others[place] for place in _evenly(len(others), min(n_chunks, len(others)))]
    notes = list(encoder.notes)
    if len(chosen) < n_chunks:
        notes.append(f"only {len(chosen) * chunk:,} tokens to calibrate on, {n_chunks * chunk:,} were asked for")
    return Corpus(
        name,
        [encoder.begin(chunks[place]) for place in chosen],
        [encoder.begin(chunks[place]) for place in sorted(kept_back)],
        tuple(f"{name}: {note}" for note in notes),
    )


def _cut(tokens: list[int], chunk: int) -> Chunks:
    """Whole chunks one after the other."""
    return [tokens[at : at + chunk] for at in range(0, len(tokens) - chunk + 1, chunk)]


def _first_chunks(parts: Sequence[list[int]], n_chunks: int, chunk: int) -> Chunks:
    """The first chunk of each part; where parts are too short for one, also of their rests put together."""
    chunks = [part[:chunk] for part in parts if len(part) >= chunk]
    rests = [token for part in parts for token in part[chunk if len(part) >= chunk else 0 :]]
    return chunks + _cut(rests, chunk)[: n_chunks - len(chunks)]


def _evenly(n: int, count: int) -> list[int]:
    """`count` of the numbers below `n`, evenly spread."""
    return [(2 * place + 1) * n // (2 * count) for place in range(count)]
