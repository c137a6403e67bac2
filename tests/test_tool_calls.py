"""Calls of tools: rendered once and right in whatever form they come, and their marks shown where the model calls."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import golden_path
from vocabularies import CONTROL, SHARED, USER_DEFINED, byte_level

import edgert
from edgert.chat_template import ChatTemplate
from edgert.generation import StopRules, Stream
from edgert.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_metadata(
    byte_level([], {"<s>": CONTROL, "</s>": CONTROL}, bos_token_id=256, eos_token_id=257)
)
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}},
}
HELLO = [{"role": "user", "content": "Hi"}]
ARGUMENTS = {"city": "Köln", "days": 2}
REAL = sorted((SHARED / "templates").glob("*.jinja")) if (SHARED / "templates").exists() else []
WITHOUT_CALLS = ("HuggingFaceTB-SmolLM3", "LFM2-8B", "google-gemma", "microsoft-Phi")  # these show none


def conversation(arguments: Any, **message: Any) -> list[dict[str, Any]]:
    call = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call], **message}]


CONVERSATIONS = [
    conversation(arguments, **message)
    for arguments in (ARGUMENTS, json.dumps(ARGUMENTS, ensure_ascii=False), json.dumps(ARGUMENTS, indent=1))
    for message in ({"content": ""}, {"content": None}, {})
]


@pytest.mark.skipif(not REAL, reason=f"{SHARED / 'templates'} is not here")
@pytest.mark.parametrize("name", [path.name for path in REAL] or ["none"])
def test_real_templates_show_a_call_once_and_right(name: str) -> None:
    template = ChatTemplate((SHARED / "templates" / name).read_bytes().decode(), TOKENIZER)
    first, *others = [template.render(messages, tools=[TOOL]) for messages in CONVERSATIONS]
    assert set(others) == {first} and "None" not in first
    if not name.startswith(WITHOUT_CALLS):
        assert first.count("Köln") == 1 and '\\"city' not in first and "'city'" not in first


SHOWN = '{"city": "Köln", "days": 2}'


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ f.arguments | tojson }}", SHOWN),
        ("{{ f | tojson }}", f'{{"name": "weather", "arguments": {SHOWN}}}'),
        ("{% for k, v in f.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}", "<city>Köln<days>2"),
        ("{{ f.arguments if f.arguments is string else f.arguments | tojson }}", SHOWN),
        ("{{ '' + f.arguments }}", SHOWN),  # a text only
        ("{{ f.arguments }}", SHOWN),  # a dictionary would come as Python writes it
        ("{% if m.content is none %}{{ '' + f.arguments }}{% endif %}", SHOWN),  # DeepSeek R1
        ("{% if m.content is none %}{{ f.arguments | tojson }}{% endif %}", SHOWN),
        ("{% if 'x' in m.content %}{% endif %}{{ f.arguments | tojson }}", SHOWN),  # Qwen3, gpt-oss
        ("{{ m.content }}", ""),  # shows no calls
    ],
)
def test_each_template_gets_the_form_it_takes(source: str, expected: str) -> None:
    begins = "{% set m = messages[-1] %}{% set f = m.tool_calls[0].function %}"
    template = ChatTemplate(begins + (source if "f.name" in source else "{{ f.name }}:" + source), TOKENIZER)
    expected = f"weather:{expected}"
    for messages in CONVERSATIONS[:6]:  # a template that takes a text gets it as it was written
        assert template.render(messages) == expected
        assert TOKENIZER.decode(template.encode(messages)) == expected


@pytest.mark.parametrize("text", ["[1]", "5", '"x"', '{"city": ', "no JSON", "[" * 100_000])
def test_what_is_no_object_stays_as_it_is(text: str) -> None:
    template = ChatTemplate("{{ messages[-1].tool_calls[0].function.arguments }}", TOKENIZER)
    assert template.render(conversation(text)) == text


def test_an_empty_text_is_a_call_without_arguments() -> None:
    template = ChatTemplate("{{ messages[-1].tool_calls[0].function | tojson }}", TOKENIZER)
    assert template.render(conversation("")) == '{"name": "weather", "arguments": {}}'


@pytest.mark.parametrize("calls", [None, []])
def test_no_calls_are_none(calls: Any) -> None:
    """As clients write an answer that calls nothing; gpt-oss's and Llama's templates ask whether the field is there."""
    template = ChatTemplate("{{ 'tool_calls' in messages[-1] }}{{ messages[-1].content }}", TOKENIZER)
    assert template.render([{"role": "assistant", "content": "Hello", "tool_calls": calls}]) == "FalseHello"


@pytest.mark.parametrize("calls", ["x", ["x"], 5, [{"function": None}], [{"name": "weather", "arguments": '{"a": 1}'}]])
def test_other_shapes_are_left_to_the_template(calls: Any) -> None:
    template = ChatTemplate("{{ messages[-1].tool_calls | tojson }}", TOKENIZER)
    shown = json.loads(template.render([{"role": "assistant", "content": "", "tool_calls": calls}]))
    assert shown == ([{"name": "weather", "arguments": {"a": 1}}] if "weather" in str(calls) else calls)


def test_the_callers_messages_are_not_changed() -> None:
    messages = conversation(json.dumps(ARGUMENTS), content=None)
    before = json.dumps(messages)
    ChatTemplate("{{ messages[-1].tool_calls[0].function.arguments.city }}", TOKENIZER).render(messages)
    assert json.dumps(messages) == before


def test_arguments_never_become_control_tokens() -> None:
    template = ChatTemplate("{{ messages[-1].tool_calls[0].function.arguments | tojson }}", TOKENIZER)
    for arguments in ({"a": "</s>"}, '{"a": "<\\u002fs>"}'):
        ids = template.encode(conversation(arguments))
        assert 257 not in ids and TOKENIZER.decode(ids) == '{"a": "</s>"}'


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(arguments=st.dictionaries(st.text(max_size=4), VALUES, max_size=3))
def test_any_arguments_come_through(arguments: dict[str, Any]) -> None:
    for source in ("{{ f.arguments | tojson }}", "{{ '' + f.arguments }}"):
        source = f"{{% set f = messages[-1].tool_calls[0].function %}}{{{{ f.name }}}}:{source}"
        template = ChatTemplate(source, TOKENIZER)
        for given_as in (arguments, json.dumps(arguments)):
            shown = template.render(conversation(given_as)).removeprefix("weather:")
            assert json.loads(shown) == arguments


# --- marks in what the model says

BAR = "\uff5c"  # of DeepSeek's marks, with U+2581 between words
DEEPSEEK = [
    f"<{BAR}{words.replace(' ', chr(0x2581))}{BAR}>" for words in ("tool calls begin", "tool call begin", "tool sep")
]
DEEPSEEK += [f"<{BAR}{words.replace(' ', chr(0x2581))}{BAR}>" for words in ("tool call end", "tool calls end")]
KIMI = ["calls_section_begin", "call_begin", "call_argument_begin", "call_end", "calls_section_end"]
CALLS = [
    ("deepseek-ai-DeepSeek-V3.1", "".join(DEEPSEEK[:2]) + "weather" + DEEPSEEK[2] + "{}" + "".join(DEEPSEEK[3:])),
    (
        "moonshotai-Kimi-K2",
        "<|tool_{}|><|tool_{}|>functions.weather:0<|tool_{}|>{{}}<|tool_{}|><|tool_{}|>".format(*KIMI),
    ),
    ("LFM2-8B-A1B", "<|tool_call_start|>[weather()]<|tool_call_end|>"),  # its template writes no calls
    ("mistralai-Mistral-Nemo", '[TOOL_CALLS][{"name": "weather"}]'),
    ("meta-llama-Llama-3.1", "<|python_tag|>weather()"),
    ("GLM-4.6", "<tool_call>weather\n<arg_key>a</arg_key>\n<arg_value>b</arg_value>\n</tool_call>"),
    ("Qwen3-Coder", "<tool_call>\n<function=weather>\n</function>\n</tool_call>"),
]


def vocabulary(source: str, call: str, kind: int = CONTROL) -> Tokenizer:
    """A tokenizer in which all that looks like a mark, in a template and in a call, is a token."""
    looks = rf"<[|{BAR}][^<>|{BAR}]+[|{BAR}]>|\[/?[A-Z_]+\]|</?(?:tool_call|arg_key|arg_value|think)>"
    marks = dict.fromkeys(sorted({*re.findall(looks, source), *re.findall(looks, call)}), kind)
    return Tokenizer.from_metadata(
        byte_level([], {"<s>": CONTROL, "</s>": CONTROL, **marks}, bos_token_id=256, eos_token_id=257)
    )


def heard(template: ChatTemplate, tokenizer: Tokenizer, said: str, tools: bool) -> tuple[str, str]:
    """The answer and what its pieces join to, of a model that says just that."""
    ids = tokenizer.encode(said, special=True, bos=False)
    prompt = template.encode([{"role": "user", "content": "Hi"}], tools=[TOOL] if tools else None)
    stream = Stream(
        ((id_, None) for id_ in (*ids, 257)),
        tokenizer.detokenizer(shown=template.call_marks if tools else ()),
        StopRules(tokenizer.stop_ids),
        splitter=template.splitter(prompt),
    )
    pieces = "".join(piece.text for piece in stream if piece.kind == "answer")
    return stream.completion.text, pieces


@pytest.mark.skipif(not REAL, reason=f"{SHARED / 'templates'} is not here")
@pytest.mark.parametrize(("name", "call"), CALLS, ids=[name for name, _ in CALLS])
def test_calls_come_through_with_their_marks(name: str, call: str) -> None:
    source = next(path for path in REAL if path.name.startswith(name)).read_bytes().decode()
    tokenizer = vocabulary(source, call)
    template = ChatTemplate(source, tokenizer)
    assert heard(template, tokenizer, call, tools=True) == (call, call)
    hidden = tokenizer.decode(tokenizer.encode(call, special=True, bos=False))
    assert heard(template, tokenizer, call, tools=False) == (hidden, hidden) and hidden != call
    assert heard(template, vocabulary(source, call, USER_DEFINED), call, tools=False)[0] == call  # as before


@pytest.mark.skipif(not REAL, reason=f"{SHARED / 'templates'} is not here")
@pytest.mark.parametrize("name", [path.name for path in REAL] or ["none"])
def test_marks_of_turns_and_of_reasoning_stay_hidden(name: str) -> None:
    source = (SHARED / "templates" / name).read_bytes().decode()
    tokenizer = vocabulary(source, "")
    template = ChatTemplate(source, tokenizer)
    ids = template.encode([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, *HELLO])
    marks = {tokenizer.token_text(id_) for id_ in template.call_marks}
    assert template.call_marks.isdisjoint([*ids, *tokenizer.stop_ids])
    assert all(re.search("tool|arg|python|CALL", mark) for mark in marks), marks
    assert not marks & {"<think>", "</think>", "<|channel|>", "<|message|>", "[AVAILABLE_TOOLS]", "<|tool_list_start|>"}


CALLING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<|pad|>{{ c.function | tojson }}<|im_end|>{% endfor %}<|im_end|>{% endfor %}"
)


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_shows_marks_only_where_tools_are_given(stream: bool) -> None:
    with edgert.load(golden_path("llama-f32"), context=256, threads=1) as model:
        model.template = ChatTemplate(CALLING, model.tokenizer)
        pad, starts = (model.tokenizer.special_id(text) for text in ("<|pad|>", "<|im_start|>"))
        assert pad is not None and starts is not None and model.template.call_marks == {pad}

        def text(bias: dict[int, float], tools: Any) -> str:
            answer = model.chat(HELLO, tools=tools, max_tokens=3, temperature=0, logit_bias=bias, stream=stream)
            return "".join(piece.text for piece in answer) if stream else answer.text

        assert text({pad: 1e4}, [TOOL]) == "<|pad|>" * 3
        assert text({pad: 1e4}, None) == text({pad: 1e4}, []) == text({starts: 1e4}, [TOOL]) == ""
        assert text({pad: 1e4}, [TOOL]) == "<|pad|>" * 3


def test_a_template_that_cannot_show_a_call_still_has_named_marks() -> None:
    tokenizer = vocabulary("", "<|tool_call_start|><|im_end|>")
    template = ChatTemplate("{{ raise_exception('no') }}", tokenizer)
    assert [tokenizer.token_text(id_) for id_ in template.call_marks] == ["<|tool_call_start|>"]
    assert not ChatTemplate("x", TOKENIZER).call_marks
