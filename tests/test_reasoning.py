"""Reasoning and answer told apart: in hand-made examples, for any cut of the text, by the marks of real templates."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import CONTROL, SHARED, USER_DEFINED, byte_level

from edgert.chat_template import ChatTemplate
from edgert.generation import Completion, Piece, StopRules, Stream
from edgert.reasoning import Marks, PlainText, Splitter, find_marks
from edgert.tokenizer import Tokenizer

THINK = Marks("<think>", "</think>")
WRAPPED = Marks("<think>", "</think>", "answer")
CHANNELS = Marks()
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>")


def run(splitter: Splitter, pieces: list[str]) -> list[tuple[str, str]]:
    """The parts of a text in pieces, of one kind in a row joined. A piece that is a mark comes as a token."""
    parts, n_read = [], 0
    for piece in pieces:
        if piece in splitter.marks.values() and splitter.takes(piece):
            parts += splitter.mark(piece)
        else:
            n_read += len(piece)
            parts += splitter.push(piece)
        assert all(part.text and part.end <= n_read for part in parts)
    parts += splitter.flush()
    assert all(a.end <= b.end for a, b in pairwise(parts)), "parts come in order"
    return [(kind, "".join(part.text for part in row)) for kind, row in groupby(parts, key=lambda part: part.kind)]


def split(how: Marks, text: str, prompt: str = "", cuts: Any = ()) -> list[tuple[str, str]]:
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return run(how.splitter(prompt, {}), [text[a:b] for a, b in pairwise(borders)])


def by_tokens(how: Marks, text: str, prompt: str = "") -> list[tuple[str, str]]:
    """The same where all marks are tokens, each character another one."""
    tokens = dict(enumerate(how.texts))
    pieces = [text]
    for mark in how.texts:
        pieces = [part for piece in pieces for part in _parted(piece, mark, how.texts)]
    characters = [part if part in how.texts else c for part in pieces for c in ([part] if part in how.texts else part)]
    return run(how.splitter(prompt, tokens), characters)


def _parted(piece: str, mark: str, marks: tuple[str, ...]) -> list[str]:
    if piece in marks:
        return [piece]
    first, *others = piece.split(mark)
    return [first, *(part for other in others for part in (mark, other))]


R, A = "reasoning", "answer"
ENCLOSED = [
    ("<think>\nhm\n</think>\n\nyes", "", [(R, "hm"), (A, "yes")]),
    ("\n <think>a b\n c </think>yes\n", "", [(R, "a b\n c"), (A, "yes\n")]),
    ("<think>\n\n</think>\n\nyes", "", [(A, "yes")]),
    ("</think>yes", "", [(A, "yes")]),  # it did not begin to think
    ("hm\n</think>\n\nyes", "<|im_start|>assistant\n<think>\n", [(R, "hm"), (A, "yes")]),
    ("<think>\nhm</think>yes", "<think>\n", [(R, "hm"), (A, "yes")]),  # begun by the prompt, and once more
    ("\n\nyes ", "<think>\n\n</think>\n\n", [(A, "yes ")]),
    ("</think>\n\nyes", "<think>\n\n</think>\n\n", [(A, "yes")]),  # closed by the prompt, and once more
    ("<think>all the same</think>yes", "<think></think>", [(R, "all the same"), (A, "yes")]),
    ("<think>a</think>\n<think>b</think>c", "", [(R, "a\n\nb"), (A, "c")]),
    ("  yes <think>no</think> ", "", [(A, "  yes <think>no</think> ")]),  # further on it is text
    ("<think>a</think>b<think>c</think>", "", [(R, "a"), (A, "b<think>c</think>")]),
    ("<think>cut off </th", "", [(R, "cut off </th")]),
    ("<think>cut off \n", "", [(R, "cut off")]),
    ("<thi", "", [(A, "<thi")]),
    ("< think>", "", [(A, "< think>")]),
    (" \n", "", [(A, " \n")]),
    ("", "", []),
    ("a <think>", "what is <think> for", [(A, "a <think>")]),
]
HARMONY_CASES = [
    (
        "<|channel|>analysis<|message|>hm \n<|end|><|start|>assistant<|channel|>final<|message|>yes",
        [(R, "hm"), (A, "yes")],
    ),
    ("<|channel|>final<|message|> yes\n", [(A, "yes")]),
    (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>x",
        [(R, "a\n\nb"), (A, "I look.\n\nx")],
    ),
    (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json"
        '<|message|>{"x": 1}',
        [(R, "a"), (A, '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}')],
    ),
    (
        " to=functions.f<|channel|>commentary json<|message|>{}",
        [(A, "to=functions.f<|channel|>commentary json<|message|>{}")],
    ),
    ("<|channel|>analysis<|message|>hm", [(R, "hm")]),
    ("<|channel|>anal", []),  # cut off within a header
    (" plain text\n", [(A, " plain text\n")]),  # no header at all
    (" to", [(A, " to")]),
    ("plain<|end|><|start|>assistant<|channel|>final<|message|>x", [(A, "plain\n\nx")]),
]


@pytest.mark.parametrize(("text", "prompt", "expected"), ENCLOSED)
def test_marks_around_the_reasoning(text: str, prompt: str, expected: list[tuple[str, str]]) -> None:
    assert split(THINK, text, prompt) == expected
    assert split(THINK, text, prompt, range(len(text))) == expected
    assert by_tokens(THINK, text, prompt) == expected
    assert split(WRAPPED, text, prompt) == expected  # nothing is wrapped here


@pytest.mark.parametrize(("text", "expected"), HARMONY_CASES)
def test_channels(text: str, expected: list[tuple[str, str]]) -> None:
    assert split(CHANNELS, text) == expected
    assert split(CHANNELS, text, cuts=range(len(text))) == expected
    assert by_tokens(CHANNELS, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think>\n<answer>\n b\nc \n</answer>", [(R, "a"), (A, "b\nc")]),
        ("<think>a</think> <ans", [(R, "a"), (A, "<ans")]),
        ("<think>a</think> \n", [(R, "a")]),
        ("<think>a</think> b <answer>", [(R, "a"), (A, "b <answer>")]),
        ("<answer>b</answer>", [(A, "<answer>b</answer>")]),  # without reasoning it is left as it is
    ],
)
def test_a_tag_around_the_answer(text: str, expected: list[tuple[str, str]]) -> None:
    assert split(WRAPPED, text) == split(WRAPPED, text, cuts=range(len(text))) == expected


WORDS = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    *HARMONY,
    " to=f",
    "final",
    "analysis",
    "a",
    "é",
    "\n",
    "  ",
    "<",
)


@pytest.mark.parametrize("how", [THINK, WRAPPED, CHANNELS], ids=["think", "wrapped", "channels"])
@given(
    words=st.lists(st.sampled_from(WORDS), max_size=12),
    prompt=st.sampled_from(["", "<think>\n", "</think>"]),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_any_cut_gives_the_same_parts(how: Marks, words: list[str], prompt: str, cuts: list[int]) -> None:
    text = "".join(words)
    whole = split(how, text, prompt)
    assert split(how, text, prompt, cuts) == whole
    assert split(how, text, prompt, range(len(text))) == by_tokens(how, text, prompt) == whole
    left = "".join(part for _, part in whole)
    n_messages = text.count("<|message|>") + text.count("<think>")
    assert len(left) <= len(text) + 2 * n_messages, "nothing is added but empty lines between messages"
    for kind, part in whole:
        assert kind == A or part == part.strip()


# --- in a stream


class Characters:
    """A token is a character; control tokens, from 0x110000 on, have no text."""

    def push(self, token_id: int) -> str:
        return chr(token_id) if token_id < 0x110000 else ""

    def flush(self) -> str:
        return ""


MARK = {0x110000: "<think>", 0x110001: "</think>"}


def answered(text: str, how: Marks = THINK, tokens: Any = None, **rules: Any) -> tuple[list[Piece], Completion]:
    ids = {mark: id_ for id_, mark in (tokens or {}).items()}
    pieces = [text]
    for mark in ids:
        pieces = [part for piece in pieces for part in _parted(piece, mark, tuple(ids))]
    made = [id_ for part in pieces for id_ in ([ids[part]] if part in ids else map(ord, part))]
    stream = Stream(
        ((id_, None) for id_ in [*made, -1]),
        Characters(),
        StopRules(stop_ids={-1}, **rules),
        splitter=how.splitter("", tokens or {}),
    )
    found = list(stream)
    assert [id_ for piece in found for id_ in piece.token_ids] == list(stream.completion.token_ids)
    if stream.completion.stop is None and not rules.get("max_tokens"):
        assert list(stream.completion.token_ids) == made, "each token is in one piece, marks too"
    return found, stream.completion


@pytest.mark.parametrize("tokens", [None, MARK], ids=["text", "tokens"])
def test_a_stream_keeps_them_apart(tokens: Any) -> None:
    pieces, whole = answered("<think>\nhm, so\n</think>\n\nyes <b>", tokens=tokens)
    assert (whole.reasoning, whole.text, whole.finish_reason) == ("hm, so", "yes <b>", "stop")
    for kind, text in ((R, whole.reasoning), (A, whole.text)):
        assert "".join(piece.text for piece in pieces if piece.kind == kind) == text
    assert [kind for kind, _ in groupby(pieces, key=lambda piece: piece.kind)] == [R, A]
    assert pieces[0].text == "h", "as soon as it is certain"


@pytest.mark.parametrize("tokens", [None, MARK], ids=["text", "tokens"])
def test_stop_strings_are_looked_for_in_the_answer(tokens: Any) -> None:
    _, whole = answered("<think>a END b</think>\nc END d", tokens=tokens, stop="END")
    assert (whole.reasoning, whole.text, whole.stop) == ("a END b", "c ", "END")
    assert len(whole.token_ids) == len("a END b\nc ") + (len("<think></think>") if tokens is None else 2)
    _, whole = answered(
        "<|channel|>commentary<|message|>ab<|end|><|start|>assistant<|channel|>analysis<|message|>EN",
        CHANNELS,
        stop="bEN",
    )
    assert (whole.text, whole.reasoning, whole.stop) == ("ab", "EN", None)


def test_a_limit_within_the_reasoning() -> None:
    _, whole = answered("<think>abcdef</think>x", max_tokens=10)
    assert (whole.reasoning, whole.text, whole.finish_reason) == ("abc", "", "length")


def test_reading_stops_where_it_is_closed() -> None:
    """What was certain but not yet given out when the stream was closed is in no piece, and not in the answer."""
    text = "<think>a</think>b"
    stream = Stream(((0, None) for _ in range(3)), _Whole(text), StopRules(), splitter=THINK.splitter("", {}))
    first = next(stream)
    stream.close()
    assert (first.kind, first.text, list(stream)) == (R, "a", [])
    assert (stream.completion.reasoning, stream.completion.text) == ("a", "")


class _Whole(Characters):
    def __init__(self, text: str) -> None:
        self.text = text

    def push(self, token_id: int) -> str:
        return self.text


# --- what templates say

FOLDER = SHARED / "templates"
needs_templates = pytest.mark.skipif(not FOLDER.exists(), reason=f"{FOLDER} is not here")
TOKENIZER = Tokenizer.from_metadata(
    byte_level(
        [],
        {"<s>": CONTROL, "</s>": CONTROL, **dict.fromkeys(HARMONY, CONTROL), "<think>": USER_DEFINED},
        bos_token_id=256,
        eos_token_id=257,
    )
)
HELLO = [{"role": "user", "content": "Hi <think>"}]


def template(name: str) -> ChatTemplate:
    path = next(path for path in sorted(FOLDER.glob("*.jinja")) if name in path.name)
    return ChatTemplate(path.read_bytes().decode(), TOKENIZER)


def heard(template: ChatTemplate, text: str, **variables: Any) -> list[tuple[str, str]]:
    """What comes of an answer to HELLO; tokens where there are tokens."""
    splitter = template.splitter(template.encode(HELLO, **variables))
    pieces = [text]
    for mark in splitter.marks.values():
        pieces = [part for piece in pieces for part in _parted(piece, mark, tuple(splitter.marks.values()))]
    return run(splitter, pieces)


@needs_templates
@pytest.mark.parametrize(
    ("name", "variables", "text", "expected"),
    [
        ("Qwen3-0.6B", {}, "<think>\nhm\n</think>\n\nyes", [(R, "hm"), (A, "yes")]),
        ("Qwen3-0.6B", {"enable_thinking": False}, "yes", [(A, "yes")]),
        ("GLM-4.6", {}, "\n<think>hm</think>\nyes", [(R, "hm"), (A, "yes")]),
        ("GLM-4.6", {"enable_thinking": False}, "\nyes", [(A, "yes")]),
        ("SmolLM3", {}, "<think>\nhm\n</think>\nyes", [(R, "hm"), (A, "yes")]),
        ("DeepSeek-V3.1", {}, "yes", [(A, "yes")]),
        ("DeepSeek-V3.1", {"thinking": True}, "hm</think>yes", [(R, "hm"), (A, "yes")]),
        ("gpt-oss", {}, HARMONY_CASES[0][0], [(R, "hm"), (A, "yes")]),
        ("Qwen2.5", {}, "<think>x</think>", [(A, "<think>x</think>")]),
        ("granite-4.0", {}, "<think>x</think>", [(A, "<think>x</think>")]),
        ("LFM2", {}, "x", [(A, "x")]),
    ],
)
def test_real_templates(name: str, variables: Any, text: str, expected: list[tuple[str, str]]) -> None:
    assert heard(template(name), text, **variables) == expected


@needs_templates
def test_switches_of_real_templates() -> None:
    switches = {
        name: set(template(name).thinking_switches) for name in ("Qwen3-0", "GLM", "SmolLM3", "V3.1", "oss", "LFM2")
    }
    assert switches == {
        **{name: {"enable_thinking"} for name in ("Qwen3-0", "GLM", "SmolLM3")},
        "V3.1": {"enable_thinking", "thinking"},
        "oss": set(),
        "LFM2": set(),
    }


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLED = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "reasoning_content": "I should look.", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
]


@needs_templates
@pytest.mark.parametrize("name", ["Qwen3-0.6B", "GLM-4.6", "gpt-oss"])
def test_reasoning_of_earlier_turns(name: str) -> None:
    """Within a turn of tool calls it is shown again; once the turn is over it is dropped."""
    shown = template(name).render(CALLED)
    assert shown.count("I should look.") == 1 and "Rome" in shown and "sunny" in shown
    over = [*CALLED, {"role": "assistant", "content": "Sun.", "reasoning_content": "So it is."}, *HELLO]
    assert "I should look." not in (text := template(name).render(over)) and "So it is." not in text
    assert "Sun." in text and "Rome" in text


@needs_templates
def test_calls_of_a_template_that_shows_no_tools() -> None:
    """DeepSeek V3.1 leaves the description of tools to the system message, but shows calls and what came of them."""
    text = template("DeepSeek-V3.1").render([*CALLED, *HELLO], thinking=True)
    assert '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜>' in text
    assert "<｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜>" in text and text.endswith("<think>")


@needs_templates
def test_gpt_oss_takes_a_content_beside_a_call_for_reasoning() -> None:
    called = [CALLED[0], {**CALLED[1], "content": "Wait."}, CALLED[2]]
    assert "I should look." in (text := template("gpt-oss").render(called)) and "Wait." not in text
    assert "Wait." in template("gpt-oss").render([CALLED[0], {**called[1], "reasoning_content": ""}, CALLED[2]])


def test_other_templates_take_both_beside_a_call() -> None:
    made = ChatTemplate(
        "{% for message in messages %}{{ message.thinking }}|{{ message.content }};{% endfor %}", TOKENIZER
    )
    said = {"role": "assistant", "content": "c", "reasoning_content": "r"}
    assert made.render([said, {**said, "tool_calls": [CALL]}, {**said, "thinking": "t"}]) == "r|c;r|c;t|c;"


@pytest.mark.parametrize(
    ("source", "on", "off"),
    [
        ("{{ messages }}", {}, {}),
        ("{{ enable_thinking }}", {"enable_thinking": True}, {"enable_thinking": False}),
        ("{{ thinking }}{{ reasoning_effort }}", {"thinking": True}, {"thinking": False}),
        (  # gpt-oss
            "{% macro m() %}{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
            "{{ reasoning_effort }}{% endmacro %}{{ m() }}",
            {"reasoning_effort": "high"},
            {"reasoning_effort": "low"},
        ),
        (  # Hunyuan 3
            "{% if not reasoning_effort is defined %}{% set reasoning_effort = 'no_think' %}"
            "{% elif reasoning_effort not in ['high', 'low', 'no_think'] %}{{ raise_exception('') }}{% endif %}",
            {"reasoning_effort": "high"},
            {"reasoning_effort": "no_think"},
        ),
        ("{% if reasoning_effort in ['low', 'minimal'] %}{% endif %}", None, {"reasoning_effort": "minimal"}),
        ("{{ reasoning_effort }}{{ mode == 'none' }}", None, {"reasoning_effort": "low"}),  # not of the effort
        ("{{ broken", {}, {}),
    ],
)
def test_asking_for_reasoning_or_for_none(source: str, on: Any, off: Any) -> None:
    made = ChatTemplate(source, TOKENIZER)
    assert made.asking(False) == off and made.asking(True) == (on or {"reasoning_effort": "high"} if off else {})


@needs_templates
def test_asking_gpt_oss() -> None:
    oss = template("gpt-oss")
    for variables, effort in [({}, "medium"), (oss.asking(True), "high"), (oss.asking(False), "low")]:
        assert f"Reasoning: {effort}\n" in oss.render(HELLO, **variables)


def test_marks_by_the_text_of_a_template() -> None:
    assert find_marks("{{ messages }}") is None
    assert find_marks("x.split('</think>')") == THINK
    assert find_marks("[THINK]{{ x }}[/THINK] or <think></think>") == Marks("[THINK]", "[/THINK]")
    assert find_marks("between <think></think> and <response></response>") == Marks("<think>", "</think>", "response")
    assert find_marks("<|start|>a<|channel|>final<|message|></think>") == CHANNELS
    assert not ChatTemplate("{{ broken", TOKENIZER).thinking_switches
    assert ChatTemplate("</think>", TOKENIZER).marks_reasoning and not ChatTemplate("x", TOKENIZER).marks_reasoning
    assert isinstance(ChatTemplate("x", TOKENIZER).splitter([1, 2]), PlainText)
