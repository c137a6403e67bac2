"""Text to calibrate on: files as chunks of token ids, evenly spread over each file, some of them kept back for proofs.

What is kept back are other documents, or other parts of the only one with a gap between; and no copies of what is
calibrated on.
Conversations go through the model's own chat template where it has one. What is in the files is never taken for control
tokens.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from edgert.chat_template import ChatTemplate
from edgert.corpus_files import Document, Whole, read_parts
from edgert.errors import OptionError, TemplateError
from edgert.experts.text_overlap import Words, copies
from edgert.tokenizer import Tokenizer

Chunks = list[list[int]]
_TOKEN_BYTES = 32  # of a file for each token wanted: real text has 3 to 5, so that a part holds a chunk
_LEAST_TOKEN_BYTES = 4  # by which the length of a file that is not read whole is judged
LEAST_HELD_OUT = 16  # chunks to keep back in sum, where there is text enough: fewer say little of a loss
_STRETCH = 4  # chunks kept back from one place of a document, if more than one place is


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

    held_out: the share of each file that is kept back; see least_held_out; at most as much as is calibrated on.
    OptionError for a file that cannot be read or holds too little.
    """
    names = _names(paths)
    n_chunks = chunks_for(n_tokens / len(paths), chunk)
    least, found = least_held_out(n_chunks, len(paths)) if held_out else 0, list[Corpus]()
    for place, (name, path) in enumerate(zip(names, paths, strict=True)):
        progress(f"reading {name}", place / len(paths))
        found.append(_read(name, path, _Encoder(tokenizer, template), n_chunks, chunk, held_out, least))
    return without_copies(found, template_words(template))


def whole_chunks(text: Whole, tokenizer: Tokenizer, template: ChatTemplate, chunk: int) -> Chunks:
    """All whole chunks of a text: plain text as edgert.perplexity cuts it, documents as they are calibrated on."""
    encoder = _Encoder(tokenizer, template)
    tokens = tokenizer.encode(text) if isinstance(text, str) else encoder.encode(text)
    return list(map(encoder.begin, _cut([tokens], chunk)))


def least_held_out(n_chunks: int, n_corpora: int = 1) -> int:
    """Chunks of each corpus to keep back at least, of `n_chunks` to calibrate on: half of them are enough."""
    return min(math.ceil(LEAST_HELD_OUT / n_corpora), n_chunks // 2)


def without_copies(corpora: Sequence[Corpus], words: Words) -> list[Corpus]:
    """The same without chunks kept back that repeat text of any that is calibrated on, and a note of how many."""
    calibrated, found = [chunk for one in corpora for chunk in one.tokens], list[Corpus]()
    for one in corpora:
        copied = copies(one.held_out, calibrated, words)
        note = f"{one.name}: {copied.sum()} of {len(copied)} chunks kept back were dropped, copies of calibration text"
        kept = [chunk for chunk, is_copy in zip(one.held_out, copied, strict=True) if not is_copy]
        found.append(one._replace(held_out=kept, notes=(*one.notes, note)) if copied.any() else one)
    return found


def template_words(template: ChatTemplate) -> list[list[int]]:
    """What a model's chat template writes around messages, whatever they say: runs of tokens."""
    if template.is_default:
        return []
    try:
        one, other = (
            template.encode(
                [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, said, strict=True)],
                add_generation_prompt=False,
            )
            for said in (("alpha", "beta", "gamma", "delta"), ("0", "123", "4567", "89"))
        )
    except TemplateError:
        return []
    blocks = difflib.SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    return [one[block.a : block.a + block.size] for block in blocks if block.size]


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


def _read(
    name: str, path: Path, encoder: _Encoder, n_chunks: int, chunk: int, held_out: float, least_kept: int
) -> Corpus:
    """One file's chunks: to calibrate on, and kept back."""
    parts = read_parts(path, n_chunks if held_out == 0 else 2 * n_chunks, chunk * _TOKEN_BYTES)
    is_whole = len(parts) == 1
    pieces = [encoder.encode([document]) for document in parts[0]] if is_whole else list(map(encoder.encode, parts))
    n_tokens = sum(map(len, pieces))
    size = n_tokens // chunk if is_whole else path.stat().st_size // (chunk * _LEAST_TOKEN_BYTES)
    wanted = max(1, round(held_out * size), min(least_kept, size - n_chunks)) if held_out else 0
    wanted, cut = min(wanted, n_chunks), partial(_cut, chunk=chunk)
    if is_whole:
        mean = n_tokens / max(len(pieces), 1)
        others, kept_back = _by_piece(pieces, wanted, math.ceil(wanted * chunk / max(mean, 1)), cut)
    else:
        first = partial(_first_chunks, chunk=chunk, least=n_chunks)
        others, kept_back = _by_piece(pieces, wanted, wanted, first)
    if not others or len(kept_back) < bool(held_out):  # too few documents, or one that is most of it
        others, kept_back = _by_place(cut(pieces), wanted)
    if not others or len(kept_back) < bool(held_out):
        kept = ", one of them to be kept back (--held-out 0 keeps none)" if held_out else ""
        raise OptionError(
            f"{path} has {n_tokens:,} tokens, but {'two chunks' if held_out else 'a chunk'} of {chunk} are needed"
            f"{kept}: give more text"
        )
    chosen = [others[place] for place in _evenly(len(others), min(n_chunks, len(others)))]
    notes = list(encoder.notes)
    if len(chosen) < n_chunks:
        notes.append(f"only {len(chosen) * chunk:,} tokens to calibrate on, {n_chunks * chunk:,} were asked for")
    return Corpus(
        name,
        list(map(encoder.begin, chosen)),
        list(map(encoder.begin, kept_back)),
        tuple(f"{name}: {note}" for note in notes),
    )


def _by_piece(pieces: Chunks, n_held_out: int, count: int, cut: Callable[[Chunks], Chunks]) -> tuple[Chunks, Chunks]:
    """Chunks of some pieces of text, and `n_held_out` of `count` others, or more, that lie evenly among them.

    Nothing where one piece is most of the text.
    """
    if not n_held_out:
        return cut(pieces), []
    if max(map(len, pieces)) > sum(map(len, pieces)) // 2:
        return [], []
    kept_back, chunks = set[int](), Chunks()
    while len(chunks) < n_held_out and len(kept_back) <= len(pieces) // 2:
        kept_back = set(_evenly(len(pieces), min(count, len(pieces))))
        chunks = cut([pieces[place] for place in sorted(kept_back)])
        count += max(1, count // 8)
    return cut([piece for place, piece in enumerate(pieces) if place not in kept_back]), chunks[:n_held_out]


def _by_place(chunks: Chunks, n_held_out: int) -> tuple[Chunks, Chunks]:
    """Chunks of a text, and `n_held_out` of other places in it; a chunk in between is of neither, where possible."""
    n = len(chunks)
    n_held_out = min(n_held_out, n - 1)
    n_places = max(1, n_held_out // _STRETCH)
    gap = int(n - n_held_out - 2 * n_places >= max(n_held_out, 3))
    kept_back, between = set[int](), set[int]()
    for place, middle in enumerate(_evenly(n, n_places) if n_held_out > 0 else ()):
        length = n_held_out * (place + 1) // n_places - n_held_out * place // n_places
        first = max(0, middle - length // 2)
        kept_back.update(range(first, first + length))
        between.update(range(first - gap, first + length + gap))
    others = [one for place, one in enumerate(chunks) if place not in kept_back | between]
    return others, [chunks[place] for place in sorted(kept_back)]


def _cut(pieces: Chunks, chunk: int) -> Chunks:
    """Whole chunks of pieces of text, one after the other."""
    tokens = [token for piece in pieces for token in piece]
    return [tokens[at : at + chunk] for at in range(0, len(tokens) - chunk + 1, chunk)]


def _first_chunks(pieces: Chunks, chunk: int, least: int) -> Chunks:
    """The first chunk of each piece of text; where that makes fewer than `least`, also of their rests put together."""
    whole = [piece[:chunk] for piece in pieces if len(piece) >= chunk]
    rests = [piece[chunk:] if len(piece) >= chunk else piece for piece in pieces]
    return whole + _cut(rests, chunk)[: max(0, least - len(whole))]


def _evenly(n: int, count: int) -> list[int]:
    """`count` of the numbers below `n`, evenly spread."""
    return [(2 * place + 1) * n // (2 * count) for place in range(count)]
