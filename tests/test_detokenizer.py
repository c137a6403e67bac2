"""The streaming detokenizer: its pieces are the text, and never half a character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import CONTROL, USER_DEFINED, byte_level, sentencepiece

from edgert.errors import TokenizerError
from edgert.tokenizer import Tokenizer

SPECIAL = {"<|c|>": CONTROL, " <u>": USER_DEFINED}
BYTE_LEVEL = Tokenizer.from_metadata(byte_level(["Ã ©", "Ġ a", "ð Ł", "ĺ Ĥ"], SPECIAL))
SPM = Tokenizer.from_metadata(sentencepiece({"▁": -9.0, "a": -9.0, "▁a": -1.0, "é": -2.0, "▁▁": -3.0}, SPECIAL))
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SPM], ids=["byte-level", "sentencepiece"])


def pieces(tokenizer: Tokenizer, ids: list[int], **options: object) -> list[str]:
    detokenizer = tokenizer.detokenizer(**options)  # type: ignore[arg-type]   # passed on as they are
    return [*(detokenizer.push(id_) for id_ in ids), detokenizer.flush()]


@BOTH
@given(data=st.data(), special=st.booleans())
def test_pieces_of_any_ids_are_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject, special: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_vocab - 1)))
    raw = b"".join(tokenizer.visible_bytes(id_, special=special) for id_ in ids)
    text = "".join(pieces(tokenizer, ids, special=special))
    assert text == tokenizer.decode(ids, special=special)
    assert text == raw.decode("utf-8", "replace") or text == raw.removeprefix(b" ").decode("utf-8", "replace")


@BOTH
@given(text=st.one_of(st.text(), st.text(" aé\U0001f602漢")))
def test_pieces_of_a_text_hold_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("▁", " ").replace("\ufffd", "?")
    parts = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts) and parts[-1] == ""


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a\xc3\xa9b", ["a", "", "é", "b", ""]),
        ("😂".encode(), ["", "", "", "😂", ""]),
        (b"\xffa", ["\ufffd", "a", ""]),  # no character begins like this
        (b"\xc3a", ["", "\ufffda", ""]),  # certain with the byte behind it
        (b"\xe2\x82", ["", "", "\ufffd"]),  # certain at the end
        (b"\xe0\x80", ["", "\ufffd\ufffd", ""]),  # overlong
        (b"\xed\xa0\x80", ["", "", "\ufffd\ufffd\ufffd", ""]),  # half of a surrogate pair
    ],
)
def test_characters_come_as_early_as_they_are_certain(data: bytes, expected: list[str]) -> None:
    assert pieces(BYTE_LEVEL, list(data)) == expected


def test_a_hidden_token_does_not_break_a_character() -> None:
    control = BYTE_LEVEL.id_of("<|c|>")
    assert control is not None
    assert pieces(BYTE_LEVEL, [0xC3, control, 0xA9]) == ["", "", "é", ""]
    assert pieces(BYTE_LEVEL, [0x61, control], special=True) == ["a", "<|c|>", ""]


def spm(*tokens: str) -> list[int]:
    ids = [SPM.id_of(token) for token in tokens]
    assert None not in ids
    return ids  # type: ignore[return-value]   # None is ruled out above


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["▁a", "▁a"], ["a", " a", ""]),
        (["▁▁", "a"], [" ", "a", ""]),  # one of two spaces is the text's own
        (["<s>", "▁a"], ["", "a", ""]),  # the start token is not seen
        (["<0x20>", "a"], ["", "a", ""]),
        ([" <u>", "▁a"], [" <u>", " a", ""]),  # nothing was put before a special token
        (["a", "▁", "a"], ["a", " ", "a", ""]),
    ],
)
def test_the_space_before_a_text(tokens: list[str], expected: list[str]) -> None:
    assert pieces(SPM, spm(*tokens)) == expected
    assert SPM.decode(spm(*tokens)) == "".join(expected)


def test_a_text_that_goes_on() -> None:
    assert pieces(SPM, spm("▁a"), after=spm("▁a")) == [" a", ""]
    assert pieces(SPM, spm("▁a"), after=spm("<s>")) == ["a", ""]
    assert pieces(BYTE_LEVEL, [0xA9, 0x61], after=[0x61, 0xC3]) == ["é", "a", ""]


def test_without_a_space_prefix_every_space_counts() -> None:
    tokenizer = Tokenizer.from_metadata(sentencepiece({"▁": -1.0, "▁a": -1.0, "a": -1.0}, add_space_prefix=False))
    assert pieces(tokenizer, tokenizer.encode(" a", bos=False)) == [" a", ""]


def test_an_unknown_id_is_refused() -> None:
    with pytest.raises(TokenizerError, match="there is no token 100000"):
        SPM.detokenizer().push(100_000)
