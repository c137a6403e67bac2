"""Chat templates: what they render, real ones word for word, errors in one line, and one start token."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from chat_templates import HELLO, KEY, TOKENIZER, TOOL, make, render
from vocabularies import SHARED, sentencepiece

from edgert.chat_template import ChatTemplate
from edgert.errors import TemplateError
from edgert.tokenizer import Tokenizer

# --- rendering


def test_chatml_where_the_file_has_no_template() -> None:
    template = ChatTemplate.from_metadata({}, TOKENIZER)
    messages = [{"role": "system", "content": "Be kind."}, *HELLO, {"role": "assistant", "content": None}]
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    assert template.render(messages, add_generation_prompt=False) == text
    assert template.render(messages) == text + "<|im_start|>assistant\n"
    assert template.is_default and template.supports_system and not template.supports_tools
    assert not make("x").is_default


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>Hi</s>"),
        (
            "{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}",
            "Hi\n",
        ),
        ("{% generation %}a{{ messages[0].content }}{% endgeneration %}", "aHi"),
        (
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}"
            "{{ i }}{% endfor %}",
            "02",
        ),
        ("{% set ns = namespace(n=1) %}{% for i in range(3) %}{% set ns.n = ns.n * 2 %}{% endfor %}{{ ns.n }}", "8"),
        ("{{ {'b': '<é>', 'a': [1, none, true]} | tojson }}", '{"b": "<é>", "a": [1, null, true]}'),
        (
            "{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=True, indent=1, sort_keys=true) }}",
            '{\n "a": 1,\n "b": "\\u00e9"\n}',
        ),
        ("{% macro m(x, y='d') %}<{{ x }}{{ y }}>{% endmacro %}{{ m(1) }}{{ m(2, y=caller) }}", "<1d><2>"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}", "Hi"),
        (
            "{{ 'a-b'.split('-')[-1] ~ ' x '.strip() ~ 'HI'.lower() }}{{ '%s=%d' % ('n', 3) }}"
            "{{ '{}:{k}'.format(1, k=2) }}",
            "bxhin=31:2",
        ),
        (
            "{{ messages[::-1][0].content[1:] }}{{ 'H' in messages[0].content }}{{ (1, 2)[1] }}{{ dict(a=3).a }}",
            "iTrue23",
        ),
        ("{{ tools is none }} {{ unknown is defined }} {{ add_generation_prompt }} {{ flag }}", "True False True 7"),
        ("{% for k, v in {'x': 1, 'y': 2}.items() if k != 'x' %}{{ k }}{{ v }}{{ loop.last }}{% endfor %}", "y2True"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x | upper | indent(2) }}", "A1"),
        ("{{ unknown }}|{{ none }}|{{ '1234567 %s' % 1 }}", "|None|1234567 1"),
    ],
)
def test_what_templates_use(source: str, expected: str) -> None:
    assert render(source, flag=7) == expected


def test_strftime_now() -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    assert before <= render("{{ strftime_now('%Y-%m-%d') }}") <= datetime.now().strftime("%Y-%m-%d")


def test_a_template_of_its_own_for_tools() -> None:
    template = make("plain", tool_use="{% for t in tools %}{{ t.function.name }}{% endfor %}")
    assert template.render(HELLO) == "plain" and template.source == "plain"
    assert template.render(HELLO, tools=[TOOL]) == "weather" and template.supports_tools
    assert ChatTemplate.from_metadata({f"{KEY}.default": "d"}, TOKENIZER).render(HELLO) == "d"


def test_what_a_template_supports() -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ tools | tojson }}"
    assert not make(refuses).supports_system and make(refuses).supports_tools
    assert not make("{{ messages[-1].content }}").supports_system and not make("x").supports_tools


# --- real templates

REAL = sorted((SHARED / "templates").glob("*.jinja")) if (SHARED / "templates").exists() else []
needs_templates = pytest.mark.skipif(not REAL, reason=f"{SHARED / 'templates'} is not here")
TURNS = [*HELLO, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"}]


def real(name: str) -> ChatTemplate:
    return make(next(path for path in REAL if path.name.startswith(name)).read_bytes().decode())


@needs_templates
@pytest.mark.parametrize("name", [path.name for path in REAL] or ["none"])
def test_real_templates(name: str) -> None:
    template = real(name)
    for messages in (HELLO, TURNS):
        text = template.render(messages)
        assert all(message["content"] in text for message in messages)
        assert template.encode(messages) == TOKENIZER.encode(text, special=True, bos=False)
    assert template.supports_system == (not name.startswith("google-gemma-2"))
    if template.supports_system:
        assert "Be kind." in template.render([{"role": "system", "content": "Be kind."}, *TURNS])
    assert template.supports_tools == (name.split("-")[0] not in ("HuggingFaceTB", "deepseek", "google", "microsoft"))
    if template.supports_tools:
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
        text = template.render(
            [
                *HELLO,
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny"},
                {"role": "assistant", "content": "Sun."},
                *HELLO,
            ],
            tools=[TOOL],
        )
        for part in ("weather", "Where") + (() if name.startswith("LFM2") else ("Rome", "sunny")):
            assert part in text


@needs_templates
@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        (
            "Qwen-Qwen2.5",
            HELLO,
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "Qwen-Qwen3",
            [*HELLO, {"role": "assistant", "content": "<think>\nx\n</think>\n\nb"}, *HELLO],
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "meta-llama",
            [{"role": "system", "content": " S "}, *HELLO],
            "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
            "Today Date: 26 Jul 2024\n\n"
            "S<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "google-gemma",
            TURNS,
            "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n<start_of_turn>user\nBye"
            "<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            "microsoft-Phi",
            TURNS,
            "<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\n",
        ),
        (
            "mistralai",
            [{"role": "system", "content": "S"}, *TURNS],
            "<s>[INST]Hi[/INST]Hello.</s>[INST]S\n\nBye[/INST]",
        ),
    ],
)
def test_real_templates_word_for_word(name: str, messages: list[dict[str, str]], expected: str) -> None:
    assert real(name).render(messages) == expected


# --- errors


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("one\ntwo\n{% for x in %}", "tokenizer.chat_template, line 3: Expected an expression"),
        ("one\n{{ 1 | nothing }}", "line 2: No filter named 'nothing'"),
        ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "cannot be compiled (RecursionError)"),
        ("{% for a in x %}" * 60 + "{% endfor %}" * 60, "cannot be compiled"),
        ("x" * 300_000, "300,000 characters, at most 262,144"),
    ],
)
def test_templates_that_do_not_compile_fail_when_used(source: str, said: str) -> None:
    template = make(source)
    assert not template.supports_system
    with pytest.raises(TemplateError) as caught:
        template.render([{"role": "user", "content": "Hi"}])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_is_no_text() -> None:
    with pytest.raises(TemplateError, match=r"tokenizer\.chat_template is a list, not a text"):
        ChatTemplate.from_metadata({KEY: ["x"]}, TOKENIZER)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "\n\n{{ raise_exception('Roles must\nalternate') }}",
            "tokenizer.chat_template, line 3: the template refuses these messages: Roles must alternate",
        ),
        ("a\n{{ nothing.at.all }}", "line 2: the template failed: 'nothing' is undefined"),
        ("{{ 1 + 'a' }}", "line 1: the template failed: TypeError: unsupported operand"),
        ("{% include 'x' %}", "the template failed"),
        ("{{ raise_exception('long' * 1000) }}", "longlong"),
    ],
)
def test_templates_that_fail(source: str, said: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"content": "x"}], "message 0 is \"{'content': 'x'}\"; it must be a dictionary with a 'role'"),
        ([*HELLO, "x"], "message 1 is 'x'"),
        ([{"role": 3}], "message 0"),
        ([{"role": "user", "content": b"x"}], "hold a bytes"),
        ([{"role": "user", "content": object()}], "hold a object"),
    ],
)
def test_messages_of_the_wrong_kind(messages: list[Any], said: str) -> None:
    for use in (make("x").render, make("x").encode):
        with pytest.raises(TemplateError) as caught:
            use(messages)
        assert said in str(caught.value)


def test_messages_that_hold_themselves() -> None:
    content: list[Any] = []
    content.append(content)
    with pytest.raises(TemplateError, match="more than 100 levels deep"):
        render("x", [{"role": "user", "content": content}])


# --- the start token


@pytest.mark.parametrize(
    ("source", "add_bos", "expected"),
    [
        ("{{ bos_token }}a", True, ["<s>", "▁a"]),
        ("a", True, ["<s>", "▁a"]),
        ("a", False, ["▁a"]),
        ("{{ bos_token }}a{{ eos_token }}", False, ["<s>", "▁a", "</s>"]),
        ("{{ bos_token }}{{ bos_token }}a", True, ["<s>", "<s>", "▁a"]),
        ("", True, ["<s>"]),
    ],
)
def test_one_start_token(source: str, add_bos: bool, expected: list[str]) -> None:
    tokenizer = Tokenizer.from_metadata(sentencepiece({"▁": -9.0, "a": -9.0, "▁a": -1.0}, add_bos_token=add_bos))
    ids = make(source or "{# nothing #}", tokenizer).encode(HELLO)
    assert [tokenizer.token_text(id_) for id_ in ids] == expected
