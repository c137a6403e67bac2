"""Training data of sparse upcycling: text and chat files, cleaned of what is measured on, as rows of tokens.

A source is a file; its documents are blocks of a text or whole conversations. A part of each source is held
out for the perplexity before and after. Knows files and tokens, nothing about weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgert.chat_template import ChatTemplate
from edgert.errors import OptionError
from edgert.tokenizer import Tokenizer

Conversation = list[dict[str, str]]  # messages: role, content

BLOCK_CHARACTERS = 4000  # paragraphs of a text are encoded together up to this length
HELD_OUT_PART = 0.02  # of the documents of each source
MAX_HELD_OUT_ROWS = 64  # per source: enough for a figure, little enough for a CPU
RUN = 13  # words in a row that two texts must share to count as the same
SHORTEST = 6  # paragraphs with fewer words are too common to tell anything
ROLES = {"USER": "user", "SYSTEM": "assistant"}  # task dialogues call the answering side SYSTEM


class Exclusion:
    """Recognises paragraphs of the texts that the model will be measured on."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._seen: set[tuple[str, ...]] = set()
        for path in paths:
            for paragraph in _paragraphs(path):
                self._seen.update(_runs(paragraph))

    def hits(self, paragraph: str) -> bool:
        """Whether the paragraph, or RUN words in a row of it, occur in an excluded text."""
        return not self._seen.isdisjoint(_runs(paragraph))


@dataclass(frozen=True)
class Source:
    """The documents of one file that may be trained on: blocks of text, or conversations."""

    name: str
    documents: Sequence[str | Conversation]
    n_dropped: int  # paragraphs or conversations that occur in an excluded text

    @property
    def n_held_out(self) -> int:
        """How many documents, the last ones, are not trained on."""
        return max(1, round(len(self.documents) * HELD_OUT_PART))

    @property
    def training(self) -> Sequence[str | Conversation]:
        """The documents to train on."""
        return self.documents[: -self.n_held_out]

    @property
    def held_out(self) -> Sequence[str | Conversation]:
        """The documents to measure on."""
        return self.documents[-self.n_held_out :]


@dataclass(frozen=True)
class Data:
    """Rows of token ids, int64 (n_rows, n_context)."""

    training: np.ndarray
    held_out: dict[str, np.ndarray]  # by source; a source too short for a row has none

    def __add__(self, other: Data) -> Data:
        """Both together."""
        return Data(np.concatenate((self.training, other.training)), self.held_out | other.held_out)

    def check(self, batch: int) -> None:
        """OptionError unless there is a batch to train on and a row to measure on."""
        if len(self.training) < batch or not self.held_out:
            n_held_out = sum(map(len, self.held_out.values()))
            raise OptionError(
                f"--text and --chat: they give {len(self.training)} rows to train on, --batch is "
                f"{batch}, and {n_held_out} to measure on; give more or a shorter --context"
            )

    def batch(self, step: int, size: int, seed: int) -> np.ndarray:
        """The rows (size, n_context) of training step `step`: each row once an epoch, each time shuffled."""
        steps_per_epoch = len(self.training) // size
        epoch, place = divmod(step, steps_per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(self.training))
        return self.training[order[place * size : (place + 1) * size]]


class Encoder:
    """Turns documents into rows of tokens with the dense model's own tokenizer and chat template."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.tokenizer = Tokenizer.from_metadata(metadata)
        self.template = ChatTemplate.from_metadata(metadata, self.tokenizer)

    def document(self, document: str | Conversation) -> list[int]:
        """Token ids of one document."""
        if isinstance(document, str):
            return self.tokenizer.encode(document, bos=False)
        return self.template.encode(document, add_generation_prompt=False)

    def prompt(self, question: str) -> list[int]:
        """Token ids of a conversation that the model is to answer."""
        return self.template.encode([{"role": "user", "content": question}])

    def rows(self, documents: Iterable[str | Conversation], n_context: int) -> np.ndarray:
        """The documents one after the other, cut into rows (n_rows, n_context); a ragged end is left out."""
        tokens = np.fromiter((token for document in documents for token in self.document(document)), np.int64)
        n_rows = len(tokens) // n_context
        return tokens[: n_rows * n_context].reshape(n_rows, n_context)


def read_text(path: Path, exclusion: Exclusion) -> Source:
    """A text file as blocks of whole paragraphs (lines)."""
    kept, n_dropped = [], 0
    for paragraph in _read(path).split("\n"):
        if exclusion.hits(paragraph):
            n_dropped += 1
        else:
            kept.append(paragraph)
    return Source(str(path), _blocks(kept), n_dropped)


def read_chat(path: Path, exclusion: Exclusion) -> Source:
    """A file of conversations; those with an excluded message are dropped whole."""
    conversations = _conversations(path)
    kept = [chat for chat in conversations if not any(exclusion.hits(message["content"]) for message in chat)]
    return Source(str(path), kept, len(conversations) - len(kept))


def questions(sources: Iterable[Source]) -> list[str]:
    """The opening user message of every conversation to train on, each once, in order."""
    openings: dict[str, None] = {}
    for source in sources:
        for document in source.training:
            if not isinstance(document, str) and document[0]["role"] == "user":
                openings[document[0]["content"]] = None
    return list(openings)


def build(sources: Sequence[Source], encoder: Encoder, n_context: int) -> Data:
    """Encode all sources."""
    training = [encoder.rows(source.training, n_context) for source in sources]
    held_out = {source.name: encoder.rows(source.held_out, n_context) for source in sources}
    return Data(
        np.concatenate(training), {name: rows[:MAX_HELD_OUT_ROWS] for name, rows in held_out.items() if len(rows)}
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OptionError(f"{path}: not readable ({error.strerror}); give a text file") from None


def _paragraphs(path: Path) -> list[str]:
    if path.suffix in {".json", ".jsonl"}:
        return [message["content"] for chat in _conversations(path) for message in chat]
    return _read(path).split("\n")


def _runs(paragraph: str) -> list[tuple[str, ...]]:
    """The runs of RUN words by which a paragraph is recognised; a shorter one is a single run."""
    words = re.findall(r"\w+", paragraph.lower())
    if len(words) < SHORTEST:
        return []
    return [tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))]


def _blocks(paragraphs: Iterable[str]) -> list[str]:
    blocks: list[str] = []
    size = BLOCK_CHARACTERS
    for paragraph in paragraphs:
        if size >= BLOCK_CHARACTERS:
            blocks.append("")
            size = 0
        blocks[-1] += f"{paragraph}\n"
        size += len(paragraph) + 1
    return blocks


def _conversations(path: Path) -> list[Conversation]:
    text = _read(path)
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
        return [_conversation(row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"{path}: not a file of conversations ({error!r}); a row needs messages, turns, or instruction and output"
        ) from None


def _conversation(row: dict[str, Any]) -> Conversation:
    """One row as messages: chat messages, dialogue turns, or an instruction with its input and output."""
    if "messages" in row:
        return [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    if "turns" in row:
        return [{"role": ROLES[speaker], "content": words} for speaker, words in row["turns"]]
    question = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
