"""SentencePiece-style BPE, exactly as llama.cpp does it: join the neighbours that make the token with the highest
score, leftmost first where scores tie, until nothing joins; what is no token then falls back to bytes.

Not through HF `tokenizers`, because its BPE orders pairs by unique ranks and cannot tie: Llama's vocabulary
gives all runs of spaces the same score, and every token that can be split in two ways ties with itself.
"""

from __future__ import annotations

import heapq
import re
from functools import lru_cache

import numpy as np

from edgert.errors import TokenizerError
from edgert.vocabulary import TokenType, Vocabulary

SPACE = "▁"  # how the vocabulary writes a space
_LONG = 32  # characters: longer words are cut further, and not remembered
_N_REMEMBERED = 32_768  # words


class SentencePieceEncoder:
    """Text to ids, for a text without special tokens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        assert vocabulary.scores is not None, "Vocabulary checks the scores of a llama model"
        kept = ~np.isin(vocabulary.types, (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE))
        ids: list[int] = np.flatnonzero(kept).tolist()
        cost = (-vocabulary.scores).tolist()
        self._ids = {vocabulary.tokens[id_]: id_ for id_ in ids}
        self._cost = {vocabulary.tokens[id_]: cost[id_] for id_ in ids}
        self._bytes = [
            vocabulary.ids.get(f"<0x{byte:02X}>", self._ids.get(chr(byte), vocabulary.unknown_id))
            for byte in range(256)
        ]
        # A word ends before a space sign, unless some token reaches over it. No join can cross such a border.
        reaching = {
            token[i - 1] for token in self._ids if SPACE in token[1:] for i in range(1, len(token)) if token[i] == SPACE
        }
        before = f"[^{''.join(map(re.escape, sorted(reaching)))}]" if reaching else "."
        self._word_border = re.compile(f"(?<={before})(?={SPACE})", re.DOTALL)
        self._linked: frozenset[str] | None = None
        self._remembered = lru_cache(_N_REMEMBERED)(self._join)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, spaces included as they are; nothing is put before or behind it."""
        ids: list[int] = []
        for word in self._word_border.split(text.replace(" ", SPACE)):
            if len(word) <= _LONG:
                ids += self._remembered(word)
            else:
                for part in self._cut(word):
                    ids += self._join(part)
        return ids

    def _cut(self, word: str) -> list[str]:
        """Cut a long word between all characters that stand side by side in no token (Chinese, Base64)."""
        if self._linked is None:
            self._linked = frozenset(token[i : i + 2] for token in self._ids for i in range(len(token) - 1))
        linked = self._linked
        borders = [i for i in range(1, len(word)) if word[i - 1 : i + 1] not in linked]
        return [word[start:end] for start, end in zip([0, *borders], [*borders, len(word)], strict=True)]

    def _join(self, word: str) -> list[int]:
        parts = list(word)  # the part that begins here, "" where it was joined
        follows = [*range(1, len(parts)), -1]  # where the next part begins
        precedes = [*range(-1, len(parts) - 1)]
        cost, heap = self._cost, []
        for i in range(len(parts) - 1):
            if (both := parts[i] + parts[i + 1]) in cost:
                heap.append((cost[both], i, len(both)))
        heapq.heapify(heap)
        while heap:
            _, left, length = heapq.heappop(heap)
            right = follows[left]
            if right < 0 or not parts[left] or len(parts[left]) + len(parts[right]) != length:
                continue  # one of the two has been joined otherwise meanwhile
            parts[left] += parts[right]
            parts[right] = ""
            follows[left] = after = follows[right]
            if after >= 0:
                precedes[after] = left
                if (both := parts[left] + parts[after]) in cost:
                    heapq.heappush(heap, (cost[both], left, len(both)))
            if (before := precedes[left]) >= 0 and (both := parts[before] + parts[left]) in cost:
                heapq.heappush(heap, (cost[both], before, len(both)))
        ids: list[int] = []
        for part in filter(None, parts):
            if (id_ := self._ids.get(part)) is not None:
                ids.append(id_)
            else:
                ids += self._fall_back(part)
        return ids

    def _fall_back(self, character: str) -> list[int]:
        ids = [id_ for byte in character.encode() if (id_ := self._bytes[byte]) is not None]
        if not ids:
            raise TokenizerError(
                f"the character {character!r} is not in the vocabulary, which has neither byte tokens"
                " nor an unknown token; take it out of the text, or convert the model again"
            )
        return ids
