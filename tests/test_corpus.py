"""Calibration text: chunks from all over a file, conversations through the template, and files that are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vocabularies import CONTROL, byte_level

from edgert import corpus, corpus_files
from edgert.chat_template import ChatTemplate
from edgert.corpus import Corpus, read_corpora, whole_chunks
from edgert.corpus_files import read_parts, read_whole
from edgert.errors import OptionError
from edgert.perplexity import chunks
from edgert.tokenizer import Tokenizer

KEYS = byte_level([], {"<s>": CONTROL, "<u>": CONTROL, "<a>": CONTROL}, bos_token_id=256, add_bos_token=False)
TOKENIZER = Tokenizer.from_metadata(KEYS)  # a token is a byte
TEMPLATE = ChatTemplate.from_metadata(
    {
        "tokenizer.chat_template": "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content }}{% endfor %}"
    },
    TOKENIZER,
)
NO_TEMPLATE = ChatTemplate.from_metadata({}, TOKENIZER)


def read(*paths: Path, template: ChatTemplate = TEMPLATE, tokenizer: Tokenizer = TOKENIZER, **options: Any) -> Any:
    options = {"n_tokens": 64, "chunk": 16, "held_out": 0.1, "progress": lambda stage, fraction: None} | options
    return read_corpora(paths, tokenizer, template, **options)


def texts(path: Path) -> list[str]:
    """All documents of a small file, conversations as user> and assistant> lines."""
    return [
        document if isinstance(document, str) else " ".join(f"{m['role']}> {m['content']}" for m in document)
        for document in read_parts(path, 1, 1 << 20)[0]
    ]


def decoded(one: Corpus) -> list[str]:
    return [TOKENIZER.decode(chunk, special=True) for chunk in [*one.tokens, *one.held_out]]


# ---- a whole file ----------------------------------------------------------------------------------------------------
def test_dialogues_are_proved_on_as_they_are_calibrated_on_and_plain_text_is_cut_as_for_perplexity(
    tmp_path: Path,
) -> None:
    said = [{"role": role, "content": f"{n:03d}" * 5} for n in range(9) for role in ("user", "assistant")]
    path, text = tmp_path / "d.jsonl", "".join(f"{n:04d}" for n in range(20)) + "\n"
    path.write_text("".join(json.dumps({"messages": said[n : n + 2]}) + "\n" for n in range(0, 18, 2)))
    (calibrated,) = read(path, held_out=0.0, n_tokens=1000)
    assert whole_chunks(read_whole(path), TOKENIZER, TEMPLATE, 16) == calibrated.tokens and len(calibrated.tokens) == 18
    path = tmp_path / "t.txt"
    path.write_text(text)
    tokenizer = Tokenizer.from_metadata({**KEYS, "tokenizer.ggml.add_bos_token": True})
    expected = chunks(tokenizer.encode(text), 16, None, tokenizer.bos_id)
    assert whole_chunks(read_whole(path), tokenizer, TEMPLATE, 16) == expected and len(expected) == 5


# ---- chunks ----------------------------------------------------------------------------------------------------------
def test_a_small_file_is_cut_into_chunks_of_which_some_are_kept_back(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("".join(f"{n:07d}\n" for n in range(40)))  # 20 chunks of two lines
    (one,) = read(path)
    assert one.name == "t.txt" and one.notes == ()
    assert [len(one.tokens), len(one.held_out)] == [4, 2] and all(len(chunk) == 16 for chunk in one.tokens)
    found = decoded(one)
    assert len(set(found)) == 6 and all(text in path.read_text() for text in found)
    numbers = sorted(int(text[:7]) for text in found[:4])
    assert numbers[0] < 10 and numbers[-1] >= 28, "from all over the file"
    (everything,) = read(path, n_tokens=10_000)
    assert [len(everything.tokens), len(everything.held_out)] == [16, 2], "a chunk before and after is of neither"
    assert everything.notes == ("t.txt: only 256 tokens to calibrate on, 10,000 were asked for",)
    (nothing_back,) = read(path, n_tokens=10_000, held_out=0)
    assert len(nothing_back.tokens) == 20 and not nothing_back.held_out
    (much_back,) = read(path, held_out=0.9)
    assert len(much_back.held_out) == 4, "at most as much as is calibrated on"


def test_tokens_are_shared_evenly_and_each_file_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    paths = [tmp_path / "t.txt", tmp_path / "a" / "t.txt", tmp_path / "u.txt"]
    for path in paths:
        path.write_text("abcdefg\n" * 100)
    found = read(*paths, n_tokens=96)
    assert [one.name for one in found] == [str(paths[0]), str(paths[1]), "u.txt"]
    assert [len(one.tokens) for one in found] == [2, 2, 2]
    with pytest.raises(OptionError, match=r"t\.txt is named twice"):
        read(paths[0], paths[2], paths[0])


def test_of_a_large_file_parts_are_read_from_all_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_TOKEN_BYTES", 4)
    path = tmp_path / "t.txt"
    path.write_text("".join(f"{n:07d}\n" for n in range(100_000)))
    (one,) = read(path)
    numbers = sorted(int(text[:7]) for text in decoded(one))
    assert len(one.tokens) == len(one.held_out) == 4
    assert all(abs(number - place * 12_500) < 10 for place, number in enumerate(numbers)), "and lines are whole"
    long_lines = tmp_path / "long.txt"
    long_lines.write_text("äöü" * 100_000)
    (one,) = read(long_lines)
    assert all(set(text) <= set("äöü\ufffd") for text in decoded(one)), "characters are not cut but at a chunk's end"


def test_documents_of_a_large_file_of_lines_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_TOKEN_BYTES", 2)
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n:05d} " + "x" * (n % 90)}) + "\n" for n in range(5000)))
    (one,) = read(path)
    found = decoded(one)
    assert len(found) == 8 and all(text[:5].isdigit() for text in found), found
    assert max(int(text[:5]) for text in found) > 4000 > 1000 > min(int(text[:5]) for text in found)


def test_parts_too_short_for_a_chunk_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_TOKEN_BYTES", 2)
    path = tmp_path / "t.jsonl"
    line = json.dumps({"text": "ab", "id": "x" * 0} | {"n": [0] * 20}) + "\n"
    path.write_text(line * 2000)
    (one,) = read(path)
    assert one.tokens and all(text.replace("ab\n\n", "").strip("ab\n") == "" for text in decoded(one))


def test_whole_documents_are_kept_back(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n:03d} " * (5 + n % 20)}) + "\n" for n in range(100)))
    (one,) = read(path, n_tokens=1600)
    kept, used = (
        {int(n) for text in map(TOKENIZER.decode, chunks) for n in text.split() if len(n) == 3}
        for chunks in (one.held_out, one.tokens)
    )
    assert len(one.held_out) >= 16 and not kept & used and min(kept) < 20 < 80 < max(kept)
    (few,) = read(path, n_tokens=320)
    assert len(few.held_out) == 20, "the share of the file, and at most what is calibrated on"


def test_no_fewer_chunks_than_say_something_are_kept_back_where_there_is_text(tmp_path: Path) -> None:
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for place, path in enumerate(paths):
        path.write_text("".join(f"{n:07d}\n" for n in range(place * 10_000, place * 10_000 + 1000)))
    found = read(*paths, n_tokens=40 * 16, held_out=0.001)
    assert [(len(one.tokens), len(one.held_out)) for one in found] == [(20, 8), (20, 8)]
    assert [len(one.held_out) for one in read(*paths, n_tokens=1000 * 16, held_out=0.001)] == [1, 1], "there is none"
    assert not any(one.held_out for one in read(*paths, held_out=0))


def test_what_is_kept_back_is_no_copy_of_calibration_text(tmp_path: Path) -> None:
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    lines = [f"{n:07d}\n" for n in range(40)]
    for path, part in zip(paths, (lines, lines[10:]), strict=True):
        path.write_text("".join(part))
    one, two = read(*paths, n_tokens=20 * 16)
    used = {text for found in (one, two) for text in decoded(found._replace(held_out=[]))}
    kept = [text for found in (one, two) for text in decoded(found._replace(tokens=[]))]
    assert 0 < len(kept) < 9 and not used & set(kept)
    assert one.notes == (
        f"one.txt: {5 - len(one.held_out)} of 5 chunks kept back were dropped, copies of calibration text",
    )


def test_what_a_template_writes_around_messages_makes_no_copies(tmp_path: Path) -> None:
    source = TEMPLATE.source.replace("{{ m.content }}", "You are a kind and helpful assistant. {{ m.content }}")
    template = ChatTemplate.from_metadata({"tokenizer.chat_template": source}, TOKENIZER)
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n:07d}", "answer": f"{n + 5000}"}) + "\n" for n in range(400)))
    (one,) = read(path, template=template, chunk=64, n_tokens=1280)
    assert len(one.held_out) == 20 and "copies" not in "".join(one.notes)


def test_a_chunk_begins_with_the_start_token_where_the_model_wants_one(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("<s>abcdefg\n" * 100)
    (one,) = read(path, tokenizer=Tokenizer.from_metadata({**KEYS, "tokenizer.ggml.add_bos_token": True}))
    assert all(chunk[0] == 256 and 256 not in chunk[1:] for chunk in [*one.tokens, *one.held_out])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(text=st.text("aä\n€😀", min_size=1, max_size=400), n_parts=st.integers(1, 8), part_bytes=st.integers(4, 60))
def test_parts_of_text_are_in_order_and_never_overlap(tmp_path: Path, text: str, n_parts: int, part_bytes: int) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(text.encode())
    try:
        parts = ["".join(map(str, part)) for part in read_parts(path, n_parts, part_bytes)]
    except OptionError as error:
        assert "holds no text" in str(error)
        return
    place = 0
    for part in parts:
        found = text.find(part, place)
        assert found >= 0, (part, place)
        place = found + len(part)
    if len(parts) == 1:
        assert parts == [text]


# ---- documents -------------------------------------------------------------------------------------------------------
CONVERSATION = "user> Hi assistant> Hello user> Bye"
DOCUMENTS = {
    "messages": (
        {"id": 1, "messages": [{"role": r, "content": c} for r, c in zip("uau", ["Hi", "Hello", "Bye"], strict=True)]},
        CONVERSATION,
    ),
    "openai": (
        [{"role": r, "content": c} for r, c in [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]],
        CONVERSATION,
    ),
    "sharegpt": (
        {"conversations": [{"from": f, "value": v} for f, v in [("human", "Hi"), ("gpt", "Hello"), ("human", "Bye")]]},
        CONVERSATION,
    ),
    "pairs": ({"turns": [["USER", "Hi"], ["SYSTEM", "Hello"], ["USER", "Bye"]]}, CONVERSATION),
    "names": ({"dialogue": [["Ann", "Hi"], ["Bob", "Hello"], ["Ann", "Bye"]]}, CONVERSATION),
    "system": (
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]},
        "system> Be kind. user> Hi",
    ),
    "alpaca": (
        {"instruction": "Add", "input": "1, 2", "output": "3", "id": "x"},
        "user> Add\n\n1, 2 assistant> 3",
    ),
    "question": ({"question": "Who?", "answer": "Me."}, "user> Who? assistant> Me."),
    "text": ({"url": "http://x", "text": "Only this", "n": 3}, "Only this"),
    "strings": ({"a": "one", "b": [1, None, "two", {"c": "three"}]}, "one\ntwo\nthree"),
    "string": ("just text", "just text"),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        "user\nHi",
    ),
    "question alone": ({"question": "Who?", "answer": ""}, "Who?"),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".JSON"])
def test_what_a_json_document_says(kind: str, suffix: str, tmp_path: Path) -> None:
    value, expected = DOCUMENTS[kind]
    path = tmp_path / f"t{suffix}"
    if suffix == ".jsonl":
        path.write_text(f"\n{json.dumps(value)}\n\n{json.dumps(3)}\n{json.dumps(value)}")
        assert texts(path) == [expected, expected]
    else:
        path.write_text(json.dumps([value, {"n": 1}, value], indent=2))
        assert texts(path) == [expected, expected]
        path.write_text(json.dumps(value))
        assert texts(path) == [expected]


def test_conversations_go_through_the_template_and_never_become_control_tokens(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text((json.dumps({"turns": [["USER", "<u>Hi"], ["SYSTEM", "Hello"]]}) + "\n") * 40)
    (one,) = read(path)
    ids = [token for chunk in [*one.tokens, *one.held_out] for token in chunk]
    assert ids.count(257) and ids.count(258), "what the template writes"
    text = TOKENIZER.decode(TEMPLATE.encode([{"role": "user", "content": "<u>Hi"}]), special=True)
    assert text == "<u><u>Hi" and abs(ids.count(257) - ids.count(258)) <= 6
    (plain,) = read(path, template=NO_TEMPLATE)
    assert all(token < 256 for chunk in plain.tokens for token in chunk)


def test_conversations_that_the_template_refuses_are_taken_as_text_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    path.write_text((json.dumps({"messages": messages}) + "\n") * 40)
    (one,) = read(path)
    assert "Be kind.\nHi\n\n" in "".join(decoded(one))
    assert one.notes[0].startswith("t.jsonl: 40 conversations are taken as plain text: ")
    assert "no system" in one.notes[0]


# ---- files that are refused ------------------------------------------------------------------------------------------
BAD = {
    "empty.txt": (b"", "holds nothing"),
    "blank.txt": (b"\n" * 1_000_000, "holds no text"),
    "short.txt": (b"one line", r"has 10 tokens, but two chunks of 16 are needed, one of them to be kept back"),
    "null.txt": (b"abc\0def" * 100, "has a null at byte 3: it is binary"),
    "picture.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "has a null at byte 8"),
    "latin.txt": ("Grüße aus Köln\n".encode("latin-1") * 50, r"is not UTF-8 at byte 2: convert it first \(iconv"),
    "wide.txt": ("Text\n" * 50).encode("utf-16"),
    "wide.jsonl": ('{"text": "x"}\n' * 50).encode("utf-16-be"),
    "none.json": (b"hello there\n" * 10, r"is not JSON \(Expecting value.*\): name it \.jsonl if each line"),
    "lines.json": (b'{"a": "b"}\n' * 10, r"is not JSON \(Extra data.*\): name it \.jsonl"),
    "cut.json": (b'[{"a": "b"}, {"a"', r"is not JSON \("),
    "broken.jsonl": (
        b'{"text": "x"}\n{"text": \n{"text": "x"}\n',
        r"is not JSON at byte 14 \(.*\): mend or remove that line",
    ),
    "deep.json": (b"[" * 200_000 + b"]" * 200_000, "it is nested too deeply"),
    "deep.jsonl": (b"[" * 200_000 + b"]" * 200_000, "it is nested too deeply"),
    "numbers.json": (b"[1, 2, 3]", "holds no text"),
    "numbers.jsonl": (b"1\n2\n", "holds no text"),
    "digits.json": (b"1" * 100_000, r"is not JSON \(.*digits"),
    "latin.jsonl": ('{"text": "ü"}\n'.encode("latin-1") * 50, "is not UTF-8 at byte 10"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    bad = BAD[name]
    content, message = bad if isinstance(bad, tuple) else (bad, "UTF-16|null at byte")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(OptionError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and name in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        (".", r"cannot be read \(Is a directory"),
        ("pipe", "is no regular file"),
        ("absent.txt", "cannot be read \\(No such file"),
        ("nu\0ll", "cannot be read \\(embedded null"),
    ):
        with pytest.raises(OptionError, match=message):
            read(tmp_path / name)
    if os.geteuid():
        (tmp_path / "secret").write_text("x")
        (tmp_path / "secret").chmod(0)
        with pytest.raises(OptionError, match=r"cannot be read \(Permission denied"):
            read(tmp_path / "secret")


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_files, "_MOST_JSON", 100)
    monkeypatch.setattr(corpus_files, "_MOST_LINE", 100)
    for name, message in (("a.json", r"at most 100 are read of a \.json"), ("a.jsonl", "a line of more than")):
        (tmp_path / name).write_text(json.dumps("x" * 200))
        with pytest.raises(OptionError, match=message):
            read(tmp_path / name)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.json"):
        (tmp_path / name).write_bytes(b'\xef\xbb\xbf"abc"')
        assert texts(tmp_path / name) == ['"abc"' if name == "a.txt" else "abc"]
