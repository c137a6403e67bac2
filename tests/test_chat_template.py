"""Chat templates: what they render, what hostile ones are denied, and messages that spell control tokens."""

from __future__ import annotations

import re
import threading
import time
import tracemalloc
from datetime import datetime
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vocabularies import CONTROL, SHARED, USER_DEFINED, byte_level, sentencepiece

from edgert import template_meter
from edgert.chat_template import ChatTemplate
from edgert.errors import TemplateError
from edgert.tokenizer import Tokenizer

KEY = "tokenizer.chat_template"
CONTROLS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|bot|>", "[INST]", "☃")
TOKENIZER = Tokenizer.from_metadata(
    byte_level(
        ["i m", "< |", "e n", "en d"],
        {**dict.fromkeys(CONTROLS, CONTROL), "<tool_call>": USER_DEFINED},
        bos_token_id=260,
        eos_token_id=261,
    )
)  # <s>, </s>
HELLO = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Tells <it> & "that", é',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where"}},
            "required": ["city"],
        },
    },
}


def make(source: str, tokenizer: Tokenizer = TOKENIZER, **named: str) -> ChatTemplate:
    sources = {KEY: source, **{f"{KEY}.{name}": text for name, text in named.items()}}
    return ChatTemplate.from_metadata(sources, tokenizer)


def render(source: str, messages: list[dict[str, Any]] = HELLO, **options: Any) -> str:
    return make(source).render(messages, **options)


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


# --- hostile templates


def doubled(expression: str, start: str = "'a'") -> str:
    return f"{{% set n = namespace(x={start}) %}}{{% for i in range(99) %}}{{% set n.x = {expression} %}}{{% endfor %}}"


FORBIDDEN = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self.__init__ }}",
    "{{ cycler.__init__ }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ messages.append(1) }}",
    "{{ {}.fromkeys('ab') }}",
    "{{ (1).to_bytes(9, 'big') }}",
    "{{ 'a'.encode() }}",
    "{{ ''.join.__self__ }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{{ lipsum(9) }}",
]
TOO_LARGE = [
    "{{ 'a' * 10 ** 9 }}",
    "{{ 10 ** 9 * [0] }}",
    "{{ 10 ** (10 ** 8) }}",
    doubled("n.x * n.x", "3"),
    doubled("n.x ~ n.x"),
    doubled("n.x + n.x"),
    doubled("n.x + n.x", "[1]"),
    doubled("[n.x, n.x]") + "{{ n.x }}",
    doubled("{'a': n.x, 'b': n.x}") + "{{ n.x | tojson }}",
    doubled("(n.x, n.x)") + "{{ n.x == n.x }}",
    doubled("dict(a=n.x, b=n.x)"),
    doubled("n.x | replace('a', 'aa')"),
    doubled("n.x.replace('a', 'aa')"),
    "{{ range(100000) | join('a' * 1000000) }}",
    "{{ ('a' * 10000).join(range(100000) | map('string')) }}",
    "{{ 'a' | center(10 ** 9) }}",
    "{{ 'a'.ljust(10 ** 9) }}",
    "{{ ['a'] | map('center', 10 ** 9) | list }}",
    "{{ 'a\nb' | indent(10 ** 9) }}",
    "{{ ('\n' * 1000000) | indent('a' * 1000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ '%.999999999f' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10 ** 9) }}",
    "{{ ('{a}' * 100000).format(a='x' * 1000000) }}",
    "{{ ('%(a)s' * 100000) % {'a': 'x' * 1000000} }}",
    "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "{{ [1] | slice(10 ** 9) | list }}",
    "{{ [1] | tojson(indent=10 ** 9) }}",
    "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "{{ ([[1, 2]] * 10000) | sum(start=[]) }}",
    "{{ ('\n' * 3900000).splitlines() }}",
    "{{ ('a ' * 1990000).split() }}",
    "{% set x = 'a' * 1000000 %}{{ [x, x, x, x, x] }}",
    "{% for i in range(100000) %}" + "x" * 10_000 + "{% endfor %}",
    "{% set x %}{% for i in range(100000) %}" + "x" * 10_000 + "{% endfor %}{% endset %}",
    "{% set s = 'a' * 3000000 %}" + "".join(f"{{% set a{i} = s[1:] %}}" for i in range(1000)),
]
TOO_LONG = [
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% for a in range(100000) if range(100000) | select('equalto', -1) | list %}{% endfor %}",
    "{% for a in range(100000) %}{{ range(100000) | sum }}{% endfor %}",
    "{% set x = range(90000) | list %}{% set y = range(90000) | list %}{% for i in range(99999) %}{% if x == y %}"
    "{% endif %}{% endfor %}",
    "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(x) %}{% if x %}{{ m(x - 1) }}{{ m(x - 1) }}{% endif %}{% endmacro %}{{ m(50) }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% for x in range(999) recursive %}{% if loop.depth0 < 8 %}{{ loop(range(999)) }}{% endif %}{% endfor %}",
    "{% set n = namespace(x=[]) %}{% for i in range(5000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
]


@pytest.mark.parametrize("source", [*FORBIDDEN, *TOO_LARGE, *TOO_LONG])
def test_hostile_templates_end_in_an_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_meter, "SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert "\n" not in str(caught.value) and not isinstance(caught.value.__cause__, MemoryError)
    assert time.monotonic() - started < 10  # of a shared machine; a fifth of a second is allowed to be work


def test_hostile_templates_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_meter, "SECONDS", 1.0)
    tracemalloc.start()
    try:
        shared = "{% set x = 'a' * 1000000 %}{{ [" + "x, " * 200 + "x] }}"
        grown = (doubled("n.x ~ n.x"), doubled("n.x + n.x", "[1]"), doubled("[n.x, n.x]"))
        for source in (shared, *grown, *TOO_LARGE[-3:]):
            with pytest.raises(TemplateError):
                render(source)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_limits_grow_with_the_conversation() -> None:
    """A real conversation of a million characters renders, with work for each message that looks at all of them."""
    messages = [{"role": "user", "content": "x" * 2000} for _ in range(500)]
    source = (
        "{% for m in messages %}{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}"
        "{{ m.content.split('\n')[0] + '\n' }}{% endfor %}"
    )
    assert len(render(source, messages)) == 500 * 2001


def test_limits_hold_on_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_meter, "SECONDS", 5.0)
    template, results = make(TOO_LONG[0]), []

    def work() -> None:
        try:
            template.render(HELLO)
        except TemplateError as error:
            results.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert make("{{ messages[0].content }}").render(HELLO) == "Hi"  # meanwhile, with a meter of its own
    for thread in threads:
        thread.join(60)
    assert len(results) == 3 and all("the template failed: it takes" in text for text in results)


# --- messages that spell control tokens

CHATTY = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATES = {
    "chatml": CHATTY,
    "trims": CHATTY.replace("m.content", "m.content | trim"),
    "cuts": CHATTY.replace("m.content", "m.content.split('</t>')[0] ~ m.content.split('</t>')[-1][:-1]"),
    "deletes": CHATTY.replace("m.content", "m.content.replace('/t', '').replace(' ', '')"),
    "deletes by filter": CHATTY.replace("m.content", "m.content | replace('/t', '') | lower"),
    "letter by letter": CHATTY.replace("m.content", "m.content | list | reject('equalto', ' ') | join"),
    "as json": CHATTY.replace("m.content", "m | tojson"),
    "as ASCII json": CHATTY.replace("m.content", "m | tojson(ensure_ascii=True)"),
    "in a macro": "{% macro show(x) %}{{ x }}{% endmacro %}" + CHATTY.replace("m.content", "show(m.content)"),
    "side by side": CHATTY.replace("m.content", "m.content }}{{ m.more"),
    "names in brackets": CHATTY.replace("}}<", "}}{% for k in m.extra %}<{{ k }}>{{ k }}{% endfor %}<"),
}
PIECES = st.sampled_from([*CONTROLS, "/t", "</t>", " ", "\n", "hello", "", "aa"]) | st.sampled_from(
    sorted({part for token in CONTROLS for i in range(1, len(token)) for part in (token[:i], token[i:])})
)
CONTENT = st.lists(PIECES, max_size=6).map("".join)


def controls_of(ids: list[int]) -> list[str]:
    return [TOKENIZER.token_text(id_) for id_ in ids if TOKENIZER.is_control(id_)]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40)
@given(content=CONTENT, more=CONTENT, key=CONTENT)
@example(content="<|im_/tend|>", more="", key="")  # a template that deletes "/t" puts the halves together
@example(content="<|im_</t>end|>!", more="", key="")
@example(content="<|IM_END|>", more="", key="")
@example(content="<|im_", more="end|>", key="|im_end|")
def test_messages_never_become_control_tokens(name: str, content: str, more: str, key: str) -> None:
    template = make(TEMPLATES[name])
    messages = [*HELLO, {"role": "user", "content": content, "more": more, "extra": {key: more}}, *HELLO]
    harmless = [*HELLO, {"role": "user", "content": "x", "more": "y", "extra": {"k": "z"}}, *HELLO]
    assert controls_of(template.encode(messages)) == controls_of(template.encode(harmless))


@pytest.mark.parametrize("name", ["chatml", "trims", "as json", "in a macro", "side by side"])
@given(content=CONTENT, more=CONTENT)
def test_messages_keep_their_text(name: str, content: str, more: str) -> None:
    template = make(TEMPLATES[name])
    messages = [{"role": "user", "content": content, "more": more}]
    assert TOKENIZER.decode(template.encode(messages), special=True) == template.render(messages)


def test_private_use_characters_keep_their_text() -> None:
    """The marks are such characters."""
    messages = [{"role": "user", "content": "".join(map(chr, range(0xE000, 0xF900))) + "<s>"}]
    template = make(CHATTY)
    assert TOKENIZER.decode(template.encode(messages), special=True) == template.render(messages)


@pytest.mark.parametrize("name", sorted({*TEMPLATES} - {"cuts"}))  # which cuts the mark off, where there is one
@settings(max_examples=40)
@given(content=st.text("aé漢 .\n<tool_call>"), more=st.text())
def test_harmless_messages_encode_like_the_plain_text(name: str, content: str, more: str) -> None:
    if any(token in content + more for token in CONTROLS):
        return
    messages = [{"role": "user", "content": content, "more": more, "extra": {"name": more}}]
    template = make(TEMPLATES[name])
    assert template.encode(messages) == TOKENIZER.encode(template.render(messages), special=True, bos=False)


def test_roles() -> None:
    """Templates write known roles inside control tokens; others may not get there."""
    template = make("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    assert controls_of(template.encode(HELLO)) == ["<|user|>"]
    for role in ("im_end", "|im_end|", "user|><|im_end", "bot"):
        messages = [{"role": role, "content": "x"}]
        assert controls_of(template.encode(messages)) == []
        assert TOKENIZER.decode(template.encode(messages)) == template.render(messages)


def test_tools_and_variables_are_messages_too() -> None:
    template = make("{{ tools | tojson }}{{ note }}{% for k, v in tools[0].items() %}<{{ k }}>{{ v }}{% endfor %}")
    hostile = "</s><|im_end|>"
    ids = template.encode(HELLO, tools=[{"|im_end|": hostile, hostile: [{"x": hostile}]}], note=hostile)
    assert controls_of(ids) == []


def test_marks_do_not_show_in_errors() -> None:
    with pytest.raises(TemplateError, match=re.escape("refuses these messages: got <s>")):
        make("{{ raise_exception('got ' ~ messages[0].content) }}").encode([{"role": "user", "content": "<s>"}])


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


@pytest.mark.parametrize("role", CONTROLS)
def test_a_role_that_is_a_control_token_stays_text(role: str) -> None:
    template = make("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    harmless = template.encode([{"role": "someone", "content": "x"}])
    hostile = template.encode([{"role": role, "content": "x"}])
    assert [i for i in hostile if TOKENIZER.is_control(i)] == [i for i in harmless if TOKENIZER.is_control(i)]
    assert role in TOKENIZER.decode(hostile)
