"""Token ids to text, one by one, as they come from the model: whole characters only, each as early as it is sure.

It knows bytes and the leading space of SentencePiece, not how a model makes tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import Protocol


class TokenText(Protocol):
    """What a detokenizer asks of its tokenizer."""

    def visible_bytes(self, token_id: int, *, special: bool) -> bytes:
        """The bytes that a token adds to a text."""

    def drops_space(self, token_id: int) -> bool:
        """Whether a space that begins this token, as the first of a text, was put there by the tokenizer."""


class StreamingDetokenizer:
    """Pieces that, joined, are the tokenizer's `decode` of all ids.

    Bytes that are no UTF-8 become U+FFFD, once it is certain that nothing can make them a character. after: ids
    that stand before; they complete a character or keep a leading space, but their own text is not given out again.
    special: control tokens are shown; shown: these are in any case.
    """

    def __init__(
        self,
        tokenizer: TokenText,
        *,
        special: bool = False,
        after: Sequence[int] = (),
        shown: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._special, self._shown = special, shown
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True
        for token_id in after:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that this token completes, '' while a character is still incomplete.

        Raises TokenizerError for an id outside the vocabulary.
        """
        added = self._tokenizer.visible_bytes(token_id, special=self._special or token_id in self._shown)
        if self._at_start and added:
            self._at_start = False
            if self._tokenizer.drops_space(token_id):
                added = added.removeprefix(b" ")
        return self._decoder.decode(added)

    def flush(self) -> str:
        """What is left at the end: '' or U+FFFD for a character that never got complete."""
        return self._decoder.decode(b"", final=True)
