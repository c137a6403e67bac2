"""How text is cut into words, under each name: as llama.cpp cuts it, as tokenizer.json files say, and nothing lost."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from published_pretokenizers import PRE_TOKENIZERS as PUBLISHED
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer
from vocabularies import CONTROL, byte_level, pair_merges

from edgert.pretokenizers import PRE_TOKENIZERS
from edgert.tokenizer import Tokenizer

CASES = json.loads((Path(__file__).parent / "golden" / "pretokenizer_cases.json").read_text(encoding="utf-8"))
TEXTS: list[str] = CASES["texts"]
MERGES = pair_merges(TEXTS)

# Where llama.cpp's own expressions depart from those of the models: texts by number, and what is different there.
CASE = 3  # words of mixed case, as in "McDonald" or "ÉCOLE"
SPACES = 14  # white space that is not ASCII, before a letter
MARKS = {20, 21}  # combining marks, which the models take as letters
DIGITS = 2  # that are not ASCII
THOUSANDS = 6  # digits with letters behind them
DEPARTS: dict[str, set[int]] = {
    **{name: {CASE, *MARKS} for name in "gpt-4o llama4 kanana2 talkie minimax-m2 tekken kimi-k2".split()},
    **{name: {CASE, THOUSANDS} for name in "tiny_aya cohere2moe".split()},
    **{name: {SPACES} for name in "deepseek-llm deepseek-coder".split()},
    "youtu": {CASE},
    "superbpe": {DIGITS},
}
NAMES = {known.patterns: name for name, known in PRE_TOKENIZERS.items()}.values()  # one for each way of cutting


@cache
def cutter(name: str) -> Any:
    """The pieces that a name stands for, as HF `tokenizers` makes them of our expressions."""
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name].patterns]
    return pre_tokenizers.Sequence(steps)


@cache
def published(name: str) -> Any:
    """The pieces that a model's own tokenizer.json makes, the bytes of each written as byte-level BPE writes them."""
    model = {"type": "BPE", "vocab": {}, "merges": []}
    return HfTokenizer.from_str(json.dumps({"pre_tokenizer": PUBLISHED[name], "model": model})).pre_tokenizer


def spans(cut: Any, text: str) -> list[tuple[int, int]]:
    return [span for _, span in cut.pre_tokenize_str(text)]


# --- against llama.cpp


@pytest.mark.parametrize(("names", "sums"), CASES["sums"].items())
def test_the_ids_are_those_of_llama_cpp(names: str, sums: list[int]) -> None:
    for name in names.split():
        ids: list[list[list[int]]] = [[] for _ in TEXTS]
        for merges in (MERGES, MERGES[::-1]):
            metadata = byte_level(merges, {"<s>": CONTROL}, pre=name, bos_token_id=256 + len(MERGES))
            tokenizer = Tokenizer.from_metadata(metadata)
            for text, both in zip(TEXTS, ids, strict=True):
                both.append(tokenizer.encode(text, bos=False))
                assert tokenizer.decode(both[-1]) == text
        found = {i for i, expected in enumerate(sums) if zlib.crc32(json.dumps(ids[i]).encode()) != expected}
        assert found == DEPARTS.get(name, set()), (name, [TEXTS[i] for i in found])


def test_every_name_is_among_the_cases() -> None:
    assert {*" ".join(CASES["sums"]).split(), "deepseek-llm-digits"} == set(PRE_TOKENIZERS)


# --- whatever the text

ALPHABET = "aAbBéÉяЯ'sStTlLvVeErRdDmM 09½٣ \n\r\t\u00a0\u2003.,/!-_(\"<^`|漢カ한ไ\u0301\u094d\u1100🙂"
ANY = st.text(ALPHABET, max_size=40) | st.text(max_size=20)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(text=ANY)
@example(text="\n \r\n  a'LL 1234567é\u0301")
def test_pieces_are_the_text_cut_up(name: str, text: str) -> None:
    """Each piece is not empty and the text between two cuts: nothing is lost, doubled or changed."""
    found = cutter(name).pre_tokenize_str(text)
    assert "".join(piece for piece, _ in found) == text
    at = 0
    for piece, (start, end) in found:
        assert piece and start == at and piece == text[start:end]
        at = end


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=60)
@given(text=ANY)
@example(text="'S'Ll'RE'tIs DON'T it's\r\n\n x")
@example(text="McDonald's ÉcoleMAISON ЁлкаДом HTTPServer e\u0301A 漢字Kana 12345678")
def test_pieces_are_those_of_the_published_expressions(name: str, text: str) -> None:
    text = text.replace("\u017f", "")  # a long s, which the files take for one without case, and llama.cpp does not
    assert spans(cutter(name), text) == spans(published(name), text)


@settings(max_examples=40)
@given(text=ANY)
@example(text="\ufffd\U0010ffff\x00")
def test_bytes_come_back(text: str) -> None:
    for name in ("gpt-4o", "kimi-k2", "deepseek-v3", "tekken", "superbpe", "glm4"):
        tokenizer = _TOKENIZERS.setdefault(name, Tokenizer.from_metadata(byte_level(MERGES, pre=name)))
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


_TOKENIZERS: dict[str, Tokenizer] = {}
