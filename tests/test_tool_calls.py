"""Calls of tools: rendered once and right in whatever form they come, by made-up templates and real ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import CONTROL, SHARED, byte_level

from edgert.chat_template import ChatTemplate
from edgert.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_metadata(
    byte_level([], {"<s>": CONTROL, "</s>": CONTROL}, bos_token_id=256, eos_token_id=257)
)
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}},
}
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
