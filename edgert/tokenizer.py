"""Text to token ids and back, built from the metadata of a GGUF file.

Special tokens are cut out of a text first, the rest goes through byte-level BPE (HF `tokenizers`) or through
SentencePiece-style BPE. Results equal llama.cpp's, except that ordinary text never turns into a control token, and what
edgert.pretokenizers says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from edgert.detokenizer import StreamingDetokenizer
from edgert.errors import TokenizerError
from edgert.pretokenizers import PRE_TOKENIZERS
from edgert.sentencepiece import SPACE, SentencePieceEncoder
from edgert.vocabulary import TokenType, Vocabulary

_HIDDEN = (TokenType.CONTROL, TokenType.UNKNOWN)
_WHITE_SPACE = " \t\n\v\f\r"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in a byte-level vocabulary: printable Latin-1 for itself, the others
    from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A model's tokenizer; safe to use from several threads. Make one with `Tokenizer.from_metadata`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.model = vocabulary.model
        self.pre = vocabulary.pre
        self.warning = vocabulary.warning  # what the file leaves open, for the person; mostly empty
        self.n_vocab = len(vocabulary.tokens)
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.stop_ids = vocabulary.stop_ids
        self.add_bos, self.add_eos = vocabulary.add_bos, vocabulary.add_eos
        self._types: list[int] = vocabulary.types.tolist()
        self._special = [(vocabulary.tokens[id_], id_) for id_ in vocabulary.special_tokens()]
        self.control_texts = [token for token, id_ in self._special if self._types[id_] in _HIDDEN]
        self._bytes: dict[int, bytes] = {}
        self._spm = vocabulary.model == "llama"
        self._encode_words: Callable[[str], list[int]] = (
            SentencePieceEncoder(vocabulary).encode if self._spm else _byte_level_encoder(vocabulary)
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer that the tokenizer.* keys of a GGUF file describe.

        Raises TokenizerError for a vocabulary that is missing or contradicts itself, UnsupportedError for a
        tokenizer model or pre-tokenizer that edgert does not know.
        """
        return cls(Vocabulary.from_metadata(metadata))

    def encode(self, text: str, *, special: bool = False, bos: bool | None = None) -> list[int]:
        """The ids of a text.

        special: control tokens written in the text are recognised; without it their text is ordinary text. bos:
        whether the start token comes first; None: start and end token as the metadata say. Raises
        TokenizerError for text that is not Unicode, and for a start token where the vocabulary has none.
        """
        ids = self.encode_parts(self.partition(text, special=special))
        if self.add_bos if bos is None else bos:
            if self.bos_id is None:
                raise TokenizerError(
                    "the vocabulary has no start token (tokenizer.ggml.bos_token_id); encode with bos=False"
                )
            ids.insert(0, self.bos_id)
        if bos is None and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def partition(self, text: str, *, special: bool) -> list[str | int]:
        """Cut a text at special tokens: ids where they are written, the texts between as they are.

        Tokens that the user of the vocabulary defined always count, control and unknown ones if special. The
        longest are looked for first, over the whole text.
        """
        parts: list[str | int] = [text] if text else []
        characters = set(text)
        for token, id_ in self._special:
            if token[0] in characters and token in text and (special or self._types[id_] not in _HIDDEN):
                parts = [
                    piece
                    for part in parts
                    for piece in (self._cut_at(part, token, id_) if isinstance(part, str) else (part,))
                ]
        return parts

    def _cut_at(self, text: str, token: str, id_: int) -> Iterable[str | int]:
        first, *others = text.split(token)
        if first:
            yield first
        for part in others:
            yield id_
            if part := part.lstrip(_WHITE_SPACE) if id_ in self._vocabulary.strips_after else part:
                yield part

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """The ids of what `partition` gives; texts are ordinary text whatever they say."""
        ids: list[int] = []
        follows_special = True
        for number, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            else:
                prefix = " " if follows_special and self._takes_space(part, number == 0) else ""
                ids += self._encode_words(prefix + _unicode(part))
            follows_special = isinstance(part, int)
        return ids

    def _takes_space(self, text: str, first: bool) -> bool:
        """Whether a space comes before a text that is the first or follows a special token."""
        if not self._spm or not self._vocabulary.add_space_prefix:
            return False
        scheme = self._vocabulary.space_prefix
        return not scheme or (not text.startswith((" ", SPACE)) and (first or scheme == "always"))

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD. special: shows control tokens.

        The space that a SentencePiece tokenizer puts before a text is taken away again. Raises TokenizerError
        for an id outside the vocabulary.
        """
        ids = list(ids)
        texts = [self.visible_bytes(id_, special=special) for id_ in ids]
        first = next((i for i, text in enumerate(texts) if text), None)
        if first is not None and self.drops_space(ids[first]):
            texts[first] = texts[first].removeprefix(b" ")
        return b"".join(texts).decode("utf-8", "replace")

    def detokenizer(
        self, *, special: bool = False, after: Sequence[int] = (), shown: Collection[int] = ()
    ) -> StreamingDetokenizer:
        """For ids that come one by one. after: the ids before them, where the text continues one. shown: control tokens
        whose text comes through all the same."""
        return StreamingDetokenizer(self, special=special, after=after, shown=shown)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; of a special token its name. Raises TokenizerError for an unknown id."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._make_bytes(token_id)
        return found

    def visible_bytes(self, token_id: int, *, special: bool) -> bytes:
        """What a token adds to a text: nothing if it is a control token, unless special."""
        found = self.token_bytes(token_id)
        return b"" if not special and self._types[token_id] in _HIDDEN else found

    def drops_space(self, token_id: int) -> bool:
        """Whether a leading space of this token, as the first of a text, is the one that `encode` puts there."""
        ordinary = self._types[token_id] in (TokenType.NORMAL, TokenType.BYTE)
        return ordinary and self._spm and self._vocabulary.add_space_prefix

    def id_of(self, token_text: str) -> int | None:
        """The id of the token that the vocabulary writes like this ("▁" or "Ġ" for a space), or None."""
        return self._vocabulary.ids.get(token_text)

    def special_id(self, text: str) -> int | None:
        """The id of the control token, or token of the user's own, that is written like this, or None."""
        id_ = self._vocabulary.ids.get(text)
        special = (*_HIDDEN, TokenType.USER_DEFINED)
        return id_ if id_ is not None and self._types[id_] in special else None

    def token_text(self, token_id: int) -> str:
        """How the vocabulary writes a token. Raises TokenizerError for an unknown id."""
        self._check(token_id)
        return self._vocabulary.tokens[token_id]

    def is_control(self, token_id: int) -> bool:
        """Whether the token is hidden in decoded text, and recognised in text only with special=True."""
        self._check(token_id)
        return self._types[token_id] in _HIDDEN

    def _check(self, token_id: int) -> None:
        if not 0 <= token_id < self.n_vocab:
            raise TokenizerError(f"there is no token {token_id}: the vocabulary has the ids 0 to {self.n_vocab - 1}")

    def _make_bytes(self, token_id: int) -> bytes:
        text, kind = self.token_text(token_id), self._types[token_id]
        if kind in (TokenType.UNUSED, TokenType.UNDEFINED):
            return b""
        if kind == TokenType.BYTE and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes.fromhex(match[1])
        if kind != TokenType.NORMAL:
            return text.encode()
        if self._spm:
            return text.replace(SPACE, " ").encode()
        return b"".join(bytes([_BYTE_OF[char]]) if char in _BYTE_OF else char.encode() for char in text)


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text holds U+{ord(text[error.start]):04X}, half of a surrogate pair, which is not"
            " Unicode; decode the input with errors='replace'"
        ) from None
    return text


def _byte_level_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """Byte-level BPE by HF `tokenizers`, without the special tokens."""
    ids = dict(vocabulary.ids)
    for id_ in np.flatnonzero(np.isin(vocabulary.types, (*_HIDDEN, TokenType.BYTE))).tolist():
        del ids[vocabulary.tokens[id_]]
    merges = _merges(vocabulary.merges)
    # HF `tokenizers` raises if a part of a merge is no token, but panics if its result is none, so look at that first.
    results = "\n".join(vocabulary.merges).replace(" ", "").split("\n") if merges else []
    try:
        if not all(map(ids.__contains__, results)):
            raise KeyError
        model = models.BPE(ids, merges, ignore_merges=vocabulary.whole_words)
    except Exception:  # of no narrower class
        model = models.BPE(ids, _kept(merges, ids, vocabulary.ids), ignore_merges=vocabulary.whole_words)
    hf = HfTokenizer(model)
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[vocabulary.pre].patterns]
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return lambda text: list(hf.encode(text, add_special_tokens=False).ids)


def _merges(lines: Sequence[str]) -> list[tuple[str, str]]:
    words = " ".join(lines).split(" ") if lines else []  # one split of all: three times as fast as one for each
    if len(words) != 2 * len(lines) or "" in words:
        wrong = next(line for line in lines if len(line.split(" ")) != 2 or "" in line.split(" "))
        raise TokenizerError(
            f"tokenizer.ggml.merges: {wrong!r} is not two tokens with a space between; the file is"
            " corrupt: convert it again"
        )
    return list(zip(words[::2], words[1::2], strict=True))


def _kept(merges: list[tuple[str, str]], ids: Mapping[str, int], all_ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges without those that need a control token. Raises TokenizerError if one needs what is no token."""
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in all_ids:
                raise TokenizerError(
                    f"tokenizer.ggml.merges: '{left} {right}' needs the token {token!r}, which is"
                    " not in the vocabulary; the file is corrupt: convert it again"
                )
    return [(left, right) for left, right in merges if left in ids and right in ids and left + right in ids]
