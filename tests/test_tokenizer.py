"""Texts to ids and back: against llama.cpp's recorded ids, against slow obvious versions, and refusals of bad files."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import BYTE, CONTROL, GOLDEN, NORMAL, SHARED, UNKNOWN, USER_DEFINED, byte_level, sentencepiece

from edgert.errors import TokenizerError, UnsupportedError
from edgert.storage.gguf_file import GgufFile
from edgert.tokenizer import Tokenizer

KEY = "tokenizer.ggml."


def tokens_of(tokenizer: Tokenizer, text: str, **options: Any) -> list[str]:
    return [tokenizer.token_text(id_) for id_ in tokenizer.encode(text, **options)]


# --- what llama.cpp makes of the same texts


VOCABULARIES = (
    "command-r deepseek-coder deepseek-llm falcon gpt-2 llama-bpe llama-spm mpt phi-3 qwen2 qwen35 refact starcoder"
)


@pytest.mark.parametrize("name", VOCABULARIES.split())
def test_llama_cpp_vocabularies(name: str) -> None:
    path = SHARED / "tokenizers" / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with GgufFile.open(path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    cases = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    results = Path(f"{path}.out").read_text().split("\n")
    assert len(cases) > 40 and len(results) >= len(cases)
    for text, line in zip(cases, results, strict=False):
        ids = [int(word) for word in line.split()]
        assert tokenizer.encode(text, bos=False) == ids
        assert tokenizer.decode(ids) == text


def _golden_cases() -> list[tuple[str, dict[str, Any]]]:
    for folder in GOLDEN:
        if (folder / "tokenizer_cases.json").exists():
            return list(json.loads((folder / "tokenizer_cases.json").read_text(encoding="utf-8")).items())
    return []


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "qwen35"])
def test_golden_cases(name: str) -> None:
    group = dict(_golden_cases()).get(name)
    if group is None:
        pytest.skip("tokenizer_cases.json is not here")
    path = next((folder / group["model"] for folder in GOLDEN if (folder / group["model"]).exists()), None)
    if path is None:
        pytest.skip(f"{group['model']} is not here")
    with GgufFile.open(path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    for cases, special in (("plain", False), ("parse_special", True)):
        assert len(group[cases]) > 10
        for case in group[cases]:
            assert tokenizer.encode(case["text"], special=special) == case["ids"], case["text"]


# --- words before byte-level BPE

MERGES = ["1 2", "12 3", "123 4", "I T", "' S", "! Ċ", "Ġ a", "( a", "Ì ģ", "e Ìģ", "` =", "Ċ Ċ", "Ġ Ġ"]


@pytest.mark.parametrize(
    ("pres", "text", "expected"),
    [
        ("gpt-2 olmo deepseek-llm", "1234", "1234"),
        ("llama-bpe llama3 llama-v3 dbrx default falcon", "1234", "123 4"),
        ("smollm refact starcoder qwen2 qwen35", "1234", "1 2 3 4"),
        ("gpt-2 olmo smollm default falcon", "IT'S", "IT ' S"),
        ("llama-bpe dbrx qwen2 qwen35", "IT'S", "IT 'S"),
        ("gpt-2 smollm falcon deepseek-llm", "IT!\n", "IT ! Ċ"),
        ("llama-bpe qwen2 qwen35", "IT!\n", "IT !Ċ"),
        ("gpt-2 smollm default deepseek-llm", "(a", "( a"),
        ("llama-bpe qwen2 qwen35", "(a", "(a"),
        ("gpt-2 llama-bpe qwen2", "e\u0301", "e Ìģ"),
        ("qwen35", "e\u0301", "eÌģ"),
        ("default", "`=", "` ="),
        ("falcon gpt-2", "`=", "`="),
        ("gpt-2 llama-bpe qwen2 default", "   a", "ĠĠ Ġa"),
        ("llama-bpe qwen2 gpt-2", "\n\n", "ĊĊ"),
        ("deepseek-llm", "\n\n", "Ċ Ċ"),
    ],
)
def test_pre_tokenizers(pres: str, text: str, expected: str) -> None:
    for pre in pres.split():
        assert tokens_of(Tokenizer.from_metadata(byte_level(MERGES, pre=pre)), text, bos=False) == expected.split(), pre


def test_without_a_name_the_default_pre_tokenizer_is_used() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(MERGES, pre=None))
    assert tokenizer.pre == "default" and "tokenizer.ggml.pre is missing" in tokenizer.warning
    assert not Tokenizer.from_metadata(byte_level(MERGES, pre="default")).warning
    assert tokens_of(tokenizer, "1234`=") == ["123", "4", "`", "="]


def test_llama_bpe_takes_whole_words_and_starts_with_bos() -> None:
    metadata = byte_level([], {"<|bos|>": CONTROL}, words=["xyz"], pre="llama-bpe", bos_token_id=257)
    assert tokens_of(Tokenizer.from_metadata(metadata), "xyz xyz") == ["<|bos|>", "xyz", "Ġ", "x", "y", "z"]
    metadata[KEY + "pre"] = "qwen2"
    assert tokens_of(Tokenizer.from_metadata(metadata), "xyz") == ["x", "y", "z"]


# --- special tokens

SPECIAL = {"<|a|>": CONTROL, "<|a|>>": USER_DEFINED, "<unk>": UNKNOWN, "<b>": USER_DEFINED, "<|im_end|>": NORMAL}


@pytest.mark.parametrize(
    ("text", "plain", "special"),
    [
        ("x<|a|>y", "x < | a | > y", "x <|a|> y"),
        ("x<|a|>>", "x <|a|>>", "x <|a|>>"),  # the longer one is looked for first
        ("<b><b>", "<b> <b>", "<b> <b>"),  # a user's own token always counts
        ("<unk>", "< u n k >", "<unk>"),
        ("<|im_end|>", "< | i m _ e n d | >", "<|im_end|>"),  # known by its text, whatever type the file gives it
        ("<|a|<|a|>", "< | a | < | a | >", "< | a | <|a|>"),
        ("", "", ""),
    ],
)
def test_special_tokens(text: str, plain: str, special: str) -> None:
    tokenizer = Tokenizer.from_metadata(byte_level([], SPECIAL))
    assert tokens_of(tokenizer, text) == plain.split()
    assert tokens_of(tokenizer, text, special=True) == special.split()
    assert tokenizer.decode(tokenizer.encode(text, special=True), special=True) == text


def test_control_tokens_are_hidden_unless_asked_for() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level([], SPECIAL))
    ids = tokenizer.encode("x<|a|><b><unk>y", special=True)
    assert tokenizer.decode(ids) == "x<b>y"
    assert [tokenizer.is_control(id_) for id_ in ids] == [False, True, False, True, False]
    assert tokenizer.token_bytes(ids[1]) == b"<|a|>"


def test_merges_never_make_a_control_token() -> None:
    """A vocabulary may hold merges for it; llama.cpp then reads it out of ordinary text."""
    metadata = byte_level(["< |", "<| >"])
    metadata[KEY + "token_type"][257] = CONTROL
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokens_of(tokenizer, "<|>") == ["<|", ">"]
    assert tokens_of(tokenizer, "<|>", special=True) == ["<|>"]


def test_phi_3_swallows_white_space_behind_special_tokens() -> None:
    metadata = {**sentencepiece({"▁": -1.0, "a": -2.0}, {"<|end|>": CONTROL}), "general.name": "Phi3 mini"}
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokens_of(tokenizer, "<|end|> \n a", special=True, bos=False) == ["<|end|>", "▁", "a"]


def test_add_bos_and_eos() -> None:
    metadata = byte_level(
        [],
        {"<|x|>": CONTROL, "<|y|>": CONTROL},
        bos_token_id=256,
        eos_token_id=257,
        add_bos_token=True,
        add_eos_token=True,
    )
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokens_of(tokenizer, "a") == ["<|x|>", "a", "<|y|>"]
    assert tokens_of(tokenizer, "a", bos=False) == ["a"]
    assert tokens_of(tokenizer, "a", bos=True) == ["<|x|>", "a"]
    with pytest.raises(TokenizerError, match="no start token"):
        Tokenizer.from_metadata(byte_level()).encode("a", bos=True)


# --- tokens that end an answer


def stop_texts(tokenizer: Tokenizer) -> set[str]:
    return {tokenizer.token_text(id_) for id_ in tokenizer.stop_ids}


def test_stop_tokens_come_from_keys_and_texts() -> None:
    texts = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<e>", "<|fim_pad|>", "<|fim_prefix|>")
    special = dict.fromkeys(texts, CONTROL)
    tokenizer = Tokenizer.from_metadata(byte_level([], special, eos_token_id=259, eom_token_id=256 + 3))
    assert stop_texts(tokenizer) == {"<|im_end|>", "<|eot_id|>", "<e>", "<|fim_pad|>"}
    assert tokenizer.eos_id == 259 and tokenizer.bos_id is None


def test_a_message_end_does_not_stop_where_calls_and_returns_do() -> None:
    special = dict.fromkeys(("<|end|>", "<|return|>", "<|call|>"), CONTROL)
    assert stop_texts(Tokenizer.from_metadata(byte_level([], special))) == {"<|return|>", "<|call|>"}
    del special["<|call|>"]
    assert stop_texts(Tokenizer.from_metadata(byte_level([], special))) == {"<|return|>", "<|end|>"}


def test_an_ordinary_token_is_no_stop_token() -> None:
    """Qwen's merges make '</s>', which ends struck-out text in HTML."""
    tokenizer = Tokenizer.from_metadata(byte_level(["< /", "</ s", "</s >"]))
    assert not tokenizer.stop_ids and not tokenizer.is_control(tokenizer.encode("</s>")[0])


# --- SentencePiece

SCORES = {"▁": -9.0, "a": -9.0, "b": -9.0, "▁a": -1.0, "ab": -1.0, "▁▁": -5.0, "bb": -0.5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab", "▁a b"),  # "▁a" and "ab" tie: the left one wins
        ("abb", "▁a bb"),
        ("a b", "▁a ▁ b"),
        (" a", "▁ ▁a"),
        ("", ""),
        ("é", "▁ <0xC3> <0xA9>"),
        ("</s>a", "▁ <0x3C> <0x2F> <0x73> <0x3E> a"),
    ],
)
def test_sentencepiece(text: str, expected: str) -> None:
    assert tokens_of(Tokenizer.from_metadata(sentencepiece(SCORES)), text) == ["<s>", *expected.split()]


def test_a_space_comes_before_a_text_and_behind_special_tokens() -> None:
    tokenizer = Tokenizer.from_metadata(sentencepiece(SCORES))
    assert tokens_of(tokenizer, "a</s>a", special=True) == ["<s>", "▁a", "</s>", "▁a"]
    without = Tokenizer.from_metadata(sentencepiece(SCORES, add_space_prefix=False))
    assert tokens_of(without, "a</s>a", special=True) == ["<s>", "a", "</s>", "a"]
    assert without.decode(without.encode(" a")) == " a"


def test_characters_outside_the_vocabulary() -> None:
    metadata = sentencepiece({"▁": -1.0}, n_bytes=0)
    assert tokens_of(Tokenizer.from_metadata(metadata), "é", bos=False) == ["▁", "<unk>", "<unk>"]
    tokenizer = Tokenizer.from_metadata({**metadata, KEY + "unknown_token_id": 0xFFFFFFFF})
    with pytest.raises(TokenizerError, match="'é' is not in the vocabulary"):
        tokenizer.encode("é")


def join_slowly(text: str, scores: dict[str, float]) -> list[str]:
    """The whole algorithm, as SentencePiece states it."""
    parts = list(text)
    while True:
        joined = (left + right for left, right in pairwise(parts))
        found = [(-scores[both], i) for i, both in enumerate(joined) if both in scores]
        if not found:
            return parts
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@given(
    st.dictionaries(st.text("ab▁", min_size=2, max_size=5), st.integers(-3, 0), max_size=30),
    st.text("ab ", max_size=60) | st.text("ab", min_size=33, max_size=60),
)
def test_sentencepiece_against_the_slow_version(scores: dict[str, float], text: str) -> None:
    """Few different scores, so that ties are the rule; texts beyond the length of a remembered word."""
    scores = {**scores, "a": -9.0, "b": -9.0, "▁": -9.0}
    tokenizer = Tokenizer.from_metadata(sentencepiece(scores, add_space_prefix=False))
    assert tokens_of(tokenizer, text, bos=False) == join_slowly(text.replace(" ", "▁"), scores)


@given(
    st.lists(st.tuples(st.text("abc", min_size=1, max_size=3), st.text("abc", min_size=1, max_size=3)), max_size=12),
    st.text("abc", max_size=30),
)
def test_byte_level_against_the_slow_version(pairs: list[tuple[str, str]], text: str) -> None:
    known, ranks = {"a", "b", "c"}, {}
    for left, right in pairs:
        if left in known and right in known and left + right not in known:
            ranks[left, right] = len(ranks)
            known.add(left + right)
    parts = list(text)
    while found := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    assert tokens_of(Tokenizer.from_metadata(byte_level([f"{a} {b}" for a, b in ranks])), text) == parts


# --- texts and ids in general

BOTH = [
    Tokenizer.from_metadata(byte_level(MERGES, SPECIAL)),
    Tokenizer.from_metadata(sentencepiece(SCORES, {"<user>": USER_DEFINED})),
]


@pytest.mark.parametrize("tokenizer", BOTH, ids=["byte-level", "sentencepiece"])
@given(text=st.one_of(st.text(), st.text(" \n\tab1'<>|é漢\U0001f642\u0301\u3000")))
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == (text.replace("▁", " ") if tokenizer.model == "llama" else text)
    assert not any(tokenizer.is_control(id_) for id_ in ids if id_ != tokenizer.bos_id)


@pytest.mark.parametrize("tokenizer", BOTH, ids=["byte-level", "sentencepiece"])
def test_texts_and_ids_that_do_not_fit(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"U\+D800, half of a surrogate pair"):
        tokenizer.encode("a\ud800")
    for wrong in (-1, tokenizer.n_vocab):
        for use in (tokenizer.token_bytes, tokenizer.token_text, tokenizer.is_control):
            with pytest.raises(TokenizerError, match=f"there is no token {wrong}"):
                use(wrong)
        with pytest.raises(TokenizerError, match=f"there is no token {wrong}"):
            tokenizer.decode([wrong])
    name = "<user>" if tokenizer.model == "llama" else "<b>"
    assert tokenizer.id_of(name) == tokenizer.encode(name)[-1] and tokenizer.id_of("nothing like it") is None


def test_bytes_of_tokens() -> None:
    metadata = byte_level([], {"<0x0A>": BYTE, "unused": 5, "Ā漢": NORMAL})
    tokenizer = Tokenizer.from_metadata(metadata)
    assert [tokenizer.token_bytes(256 + i) for i in range(3)] == [b"\n", b"", b"\0" + "漢".encode()]
    assert b"".join(tokenizer.token_bytes(id_) for id_ in range(256)) == bytes(range(256))


def test_metadata_may_hold_numpy_arrays() -> None:
    metadata = sentencepiece(SCORES, bos_token_id=np.uint32(1))
    metadata[KEY + "scores"] = np.array(metadata[KEY + "scores"], np.float32)
    metadata[KEY + "token_type"] = np.array(metadata[KEY + "token_type"], np.int32)
    assert tokens_of(Tokenizer.from_metadata(metadata), "ab") == ["<s>", "▁a", "b"]


# --- vocabularies that contradict themselves


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model": None}, TokenizerError, "tokenizer.ggml.model is missing"),
        ({"model": 3}, TokenizerError, "tokenizer.ggml.model is 3"),
        ({"model": "bert"}, UnsupportedError, "'bert', which is not supported; supported are gpt2, llama"),
        (
            {"pre": "tekken-9"},
            UnsupportedError,
            "'tekken-9': edgert does not know how that cuts text. The nearest of the 77 names that it knows: tekken;",
        ),
        ({"pre": ["gpt-2"]}, UnsupportedError, "tokenizer.ggml.pre is ['gpt-2']: edgert does not know how"),
        ({"tokens": None}, TokenizerError, "tokenizer.ggml.tokens is missing"),
        ({"tokens": []}, TokenizerError, "tokenizer.ggml.tokens is empty"),
        ({"tokens": [1, 2]}, TokenizerError, "tokenizer.ggml.tokens is not a list of strings"),
        ({"tokens": np.array([1, 2])}, TokenizerError, "tokenizer.ggml.tokens is not a list of strings"),
        ({"tokens": ["a", "\udcff", "b"]}, TokenizerError, "token 1 is not valid UTF-8"),
        ({"tokens": ["a", "b", "a"]}, TokenizerError, "tokens 0 and 2 are both 'a'"),
        ({"token_type": [1]}, TokenizerError, "tokenizer.ggml.token_type has 1 values for 258 tokens"),
        ({"token_type": "x"}, TokenizerError, "tokenizer.ggml.token_type has a str for 258 tokens"),
        ({"token_type": [1] * 257 + [77]}, TokenizerError, "token 257 has the type 77"),
        ({"merges": None}, TokenizerError, "tokenizer.ggml.merges is missing"),
        ({"merges": ["a b", "ab"]}, TokenizerError, "merges: 'ab' is not two tokens"),
        ({"merges": ["a b c"]}, TokenizerError, "merges: 'a b c' is not two tokens"),
        ({"merges": ["a b", "ab x"]}, TokenizerError, "'ab x' needs the token 'abx', which is not in the vocabulary"),
        ({"merges": ["xx a"]}, TokenizerError, "needs the token 'xx'"),
        ({"bos_token_id": 258}, TokenizerError, "tokenizer.ggml.bos_token_id is 258, but the vocabulary has only"),
        ({"eos_token_id": -5}, TokenizerError, "tokenizer.ggml.eos_token_id is -5"),
        ({"eot_token_id": "x"}, TokenizerError, "tokenizer.ggml.eot_token_id is 'x', not a token id"),
        ({"add_bos_token": True}, TokenizerError, "add_bos_token is true, but tokenizer.ggml.bos_token_id is missing"),
        ({"add_bos_token": "yes"}, TokenizerError, "add_bos_token is 'yes', not true or false"),
        ({"model": "llama"}, TokenizerError, "tokenizer.ggml.scores is missing"),
        ({"model": "llama", "scores": [0.0]}, TokenizerError, "tokenizer.ggml.scores has 1 values for 258 tokens"),
        ({"model": "llama", "scores": [0.0] * 257 + [float("nan")]}, TokenizerError, "not a number for token 257"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], said: str) -> None:
    metadata = byte_level(["a b"], {"<x>": CONTROL})
    for key, value in change.items():
        metadata[KEY + key] = value
        if value is None:
            del metadata[KEY + key]
    with pytest.raises(error) as caught:
        Tokenizer.from_metadata(metadata)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_empty_texts_of_padding_tokens_are_tolerated() -> None:
    metadata = byte_level()
    metadata[KEY + "tokens"] += ["", ""]
    metadata[KEY + "token_type"] += [CONTROL, CONTROL]
    assert Tokenizer.from_metadata(metadata).encode("a", special=True) == [ord("a")]
