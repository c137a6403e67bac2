"""A model's chat template: a conversation in, the prompt out, as text or as token ids.

Templates come with model files and are not trusted: they run in the metered sandbox. Nor are messages: what they say
never becomes a control token. Files without a template get ChatML. A template's text also tells how the model marks
its reasoning.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from types import TracebackType
from typing import Any

from jinja2 import Template, TemplateSyntaxError, meta

from edgert.errors import TemplateError
from edgert.reasoning import Marks, PlainText, Splitter, find_marks
from edgert.template_guard import ControlTextGuard
from edgert.template_meter import METER, Meter, Protect, Refusal
from edgert.template_sandbox import MAX_SOURCE, MeteredEnvironment
from edgert.tokenizer import Tokenizer
from edgert.tool_calls import (
    PROBE_TOOL,
    CallForm,
    find_form,
    in_form,
    is_named_as_mark,
    probe_answer,
    probe_call,
)

Message = Mapping[str, Any]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_KEY = "tokenizer.chat_template"
_PROMPT_END = 16  # tokens at the end of a prompt in which a mark may stand
_THINKING = re.compile(r"message(\.thinking|\[['\"]thinking['\"]\])")  # what some templates call reasoning_content
_SPECIAL = {"bos_token": "bos_id", "eos_token": "eos_id"}
_SWITCHES = frozenset({"enable_thinking", "thinking"})
_EFFORT = "reasoning_effort"
_NO_EFFORT = re.compile(rf"{_EFFORT}[^%{{}}]*?['\"](no_think|none|minimal)['\"]")  # within one tag


class ChatTemplate:
    """A compiled template; safe to use from several threads. Make one with `ChatTemplate.from_metadata`.

    source: of the template that is used without tools. is_default: the file has none, and ChatML stands in.
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, *, tool_source: str | None = None, is_default: bool = False
    ) -> None:
        self.source, self.is_default = source, is_default
        self._tokenizer = tokenizer
        escapes = re.search(r"ensure_ascii\s*=\s*[Tt]rue", source + (tool_source or "")) is not None
        self._guard = ControlTextGuard(tokenizer.control_texts, escapes=escapes)
        self._tool_source = tool_source
        self._special_texts = {
            name: tokenizer.token_text(id_) if (id_ := getattr(tokenizer, field)) is not None else ""
            for name, field in _SPECIAL.items()
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate:
        """The template of a GGUF file, with the one for tools where it has one of its own.

        It is parsed when it is first used: a model whose template is broken can still continue a text.
        """
        tool_source = _source(metadata, f"{_KEY}.tool_use")
        source = _source(metadata, _KEY) or _source(metadata, f"{_KEY}.default") or tool_source
        if source is None:
            return cls(CHATML, tokenizer, is_default=True)
        return cls(source, tokenizer, tool_source=tool_source)

    @cached_property
    def _template(self) -> Template:
        return _compile(MeteredEnvironment(), self.source, _KEY)

    @cached_property
    def _tool_template(self) -> Template:
        if self._tool_source is None:
            return self._template
        return _compile(MeteredEnvironment(), self._tool_source, f"{_KEY}.tool_use")

    @cached_property
    def supports_system(self) -> bool:
        """Whether a system message reaches the prompt."""
        return self._shows("edgert-probe", [{"role": "system", "content": "edgert-probe"}])

    @cached_property
    def supports_tools(self) -> bool:
        """Whether descriptions of tools reach the prompt."""
        return self._shows(PROBE_TOOL["function"]["name"], [], tools=[PROBE_TOOL])

    @cached_property
    def thinking_switches(self) -> frozenset[str]:
        """The variables, of those that models are taught, that make the template ask for reasoning or for none."""
        return _SWITCHES & self._variables

    def asking(self, thinking: bool) -> dict[str, Any]:
        """The variables that ask for reasoning, or for none, as `render` and `encode` take them; none without a switch.

        A template that reads a reasoning_effort instead, as gpt-oss's, gets "high", or "low" or what it calls none.
        """
        if self.thinking_switches or _EFFORT not in self._variables:
            return dict.fromkeys(self.thinking_switches, thinking)
        none = _NO_EFFORT.search(self.source)
        return {_EFFORT: "high" if thinking else none[1] if none else "low"}

    @cached_property
    def _variables(self) -> frozenset[str]:
        """All that the template reads and does not set itself."""
        environment, free = MeteredEnvironment(), set[str]()
        for source in filter(None, (self.source, self._tool_source)):
            with suppress(TemplateSyntaxError, RecursionError, MemoryError):  # said when the template is used
                free |= meta.find_undeclared_variables(environment.parse(source))
        return frozenset(free)

    @property
    def marks_reasoning(self) -> bool:
        """Whether the template knows marks around a model's reasoning."""
        return self._marks is not None

    @cached_property
    def _marks(self) -> Marks | None:
        return find_marks(self.source + (self._tool_source or ""))

    @cached_property
    def call_marks(self) -> frozenset[int]:
        """Control tokens with which the model marks a call of a tool, for whoever is to read calls out of an answer.

        Those that the template writes more often for a call than for an answer, and those that are named so. Never one
        that ends an answer, belongs to any turn or marks reasoning.
        """
        tokenizer, reasoning = self._tokenizer, self._marks.texts if self._marks else ()
        named = {tokenizer.special_id(text) for text in tokenizer.control_texts if is_named_as_mark(text)}
        written = self._controls(probe_call(self._call_form), tools=[PROBE_TOOL], add_generation_prompt=False)
        written -= self._controls(probe_answer(), tools=[PROBE_TOOL])  # instructions may write them too
        others = {*self._controls(probe_answer()), *tokenizer.stop_ids, *map(tokenizer.special_id, reasoning)}
        return frozenset(id_ for id_ in {*named, *written} - others if id_ is not None)

    def _controls(self, messages: Sequence[Message], **options: Any) -> Counter[int]:
        """How often which control token is in a prompt; none where the template fails."""
        with suppress(TemplateError):
            return Counter(filter(self._tokenizer.is_control, self.encode(messages, **options)))
        return Counter()

    def splitter(self, prompt: Sequence[int]) -> Splitter:
        """Tells reasoning from answer in what the model says to a prompt that `encode` has made."""
        if self._marks is None:
            return PlainText()
        ids = {self._tokenizer.special_id(mark): mark for mark in self._marks.texts}
        tokens = {id_: mark for id_, mark in ids.items() if id_ is not None}
        return self._marks.splitter(self._tokenizer.decode(prompt[-_PROMPT_END:], special=True), tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation as text.

        messages: {"role": ..., "content": ...} and whatever the template reads besides, as reasoning_content, of
        which most templates show only that of the last turn, and tool_calls, whose arguments may be a dictionary or, in
        OpenAI's form, a text of JSON, beside a content of None. tools: JSON schemas of functions. variables: further
        ones that the template knows, as enable_thinking=False (see `thinking_switches`). Raises TemplateError
        if the template does not parse, refuses the messages, fails, or takes too much.
        """
        inputs = {"messages": self._named(messages), "tools": tools, "variables": variables}
        return self._render(_Inputs(inputs), add_generation_prompt)

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """The prompt of a conversation as token ids, with one start token if the vocabulary asks for it.

        Control tokens come from the template only: where a message, a tool or a variable spells one, it is text.
        Arguments and errors as for `render`.
        """
        inputs = _Inputs({"messages": self._named(messages), "tools": tools, "variables": variables}, self._guard)
        text = self._render(inputs, add_generation_prompt, self._guard.protect)
        parts: list[str | int] = []
        for part in self._tokenizer.partition(text, special=True):
            if isinstance(part, int):
                parts.append(part)
            else:
                parts += self._tokenizer.partition(self._guard.unmark(part), special=False)
        ids = self._tokenizer.encode_parts(parts)
        bos = self._tokenizer.bos_id
        if self._tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def lasting(self, prompt: Sequence[int], messages: Sequence[Message], **options: Any) -> list[int]:
        """With how many tokens of a prompt, which `encode` has made, others will begin, ascending.

        Those up to the last question: templates drop reasoning beside calls of tools once a turn is over. And those of
        all messages: what asks for an answer behind them mostly differs from what is shown of it afterwards. None where
        the template does not tell. Arguments as for `encode`.
        """
        question = max((n for n, message in enumerate(messages, 1) if message["role"] == "user"), default=0)
        found = set()
        for n_messages in {question, len(messages)} - {0}:
            with suppress(TemplateError):
                alone = self.encode(messages[:n_messages], add_generation_prompt=False, **options)
                pairs = enumerate(zip(prompt, alone, strict=False))
                found.add(next((n for n, (one, other) in pairs if one != other), len(alone)))
        return sorted(n for n in found if 0 < n < len(prompt))

    def _named(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages as the template takes them: calls of tools in its form, reasoning_content under its name."""
        return [self._taken(message) if isinstance(message, Mapping) else message for message in messages]

    def _taken(self, message: Message) -> Message:
        message = in_form(message, lambda: self._call_form)
        if not self._calls_it_thinking:
            return message
        return _as_thinking(message, alone=self._marks is not None and self._marks.has_channels)

    @cached_property
    def _call_form(self) -> CallForm:
        def render(messages: Sequence[Message]) -> str:
            return self._render(_Inputs({"messages": messages, "tools": [PROBE_TOOL], "variables": {}}), False)

        return find_form(render)

    @cached_property
    def _calls_it_thinking(self) -> bool:
        return _THINKING.search(self.source + (self._tool_source or "")) is not None

    def _render(self, inputs: _Inputs, add_generation_prompt: bool, protect: Protect | None = None) -> str:
        template = self._template if inputs.tools is None else self._tool_template
        values = {
            "documents": None,
            **self._special_texts,
            **inputs.variables,
            "messages": inputs.messages,
            "tools": inputs.tools,
            "add_generation_prompt": add_generation_prompt,
        }
        meter = Meter(len(self.source) + inputs.size, protect)
        before = METER.set(meter)
        try:
            pieces, length = [], 0
            for piece in template.generate(values):
                length += len(piece)
                meter.check(length)
                pieces.append(piece)
            return "".join(pieces)
        except Exception as error:  # a template can make Python raise nearly everything
            raise self._failure(error) from error
        finally:
            METER.reset(before)

    def _failure(self, error: Exception) -> TemplateError:
        line = _line(error.__traceback__)
        where = f"{_KEY}, line {line}" if line else _KEY
        said = re.sub(r"\s+", " ", self._guard.unmark(str(error))).strip()[:500]
        if isinstance(error, Refusal):
            return TemplateError(f"{where}: the template refuses these messages: {said}")
        if isinstance(error, RecursionError):
            said = "it calls itself without end"
        name = "" if type(error).__module__.startswith(("jinja2", "edgert")) else f"{type(error).__name__}: "
        return TemplateError(
            f"{where}: the template failed: {name}{said}; check the messages, or give a prompt as text instead"
        )

    def _shows(self, word: str, messages: list[Message], **options: Any) -> bool:
        try:
            return word in self.render([*messages, {"role": "user", "content": "Hello"}], **options)
        except TemplateError:
            return False


class _Inputs:
    """Messages, tools and variables as plain new values, which is all that a template gets to see."""

    def __init__(self, inputs: Mapping[str, Any], guard: ControlTextGuard | None = None) -> None:
        same: Callable[[str], str] = str
        self._text = guard.mark if guard else same
        self._key = guard.mark_key if guard else same
        role = guard.mark_role if guard else same
        self.size = 0  # characters and nodes
        self.messages = []
        for number, message in enumerate(inputs["messages"]):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise TemplateError(
                    f"message {number} is {str(message)[:60]!r}; it must be a dictionary with a 'role'"
                    " and, mostly, a 'content'"
                )
            self.messages.append({**self._plain(message, 0), "role": role(message["role"])})
        self.tools = self._plain(inputs["tools"], 0)
        self.variables = self._plain(inputs["variables"], 0)

    def _plain(self, value: Any, depth: int) -> Any:
        if depth > 100:
            raise TemplateError("the messages or tools are nested more than 100 levels deep; make them flatter")
        self.size += 1
        if isinstance(value, str):
            self.size += len(value)
            return self._text(value)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, Mapping):
            return {self._key(str(key)): self._plain(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
            return [self._plain(inner, depth + 1) for inner in value]
        raise TemplateError(
            f"the messages or tools hold a {type(value).__name__}; a template takes text, numbers,"
            " true, false, none, lists and dictionaries"
        )


def _as_thinking(message: Message, alone: bool) -> Message:
    """A message for a template that reads `thinking`; alone: beside a tool call it takes that or a content, not both,
    as gpt-oss's does."""
    reasoning = message.get("reasoning_content")
    if not isinstance(reasoning, str) or not reasoning or "thinking" in message:
        return message
    named = {**message, "thinking": reasoning}
    return {**named, "content": ""} if alone and message.get("tool_calls") else named


def _source(metadata: Mapping[str, Any], key: str) -> str | None:
    source = metadata.get(key)
    if source is not None and not isinstance(source, str):
        raise TemplateError(f"{key} is a {type(source).__name__}, not a text; convert the model again")
    return source or None


def _compile(environment: MeteredEnvironment, source: str, key: str) -> Template:
    if len(source) > MAX_SOURCE:
        raise TemplateError(
            f"{key} has {len(source):,} characters, at most {MAX_SOURCE:,} are taken; the file is"
            " corrupt or hostile: convert the model again"
        )
    try:
        code = environment.compile(environment.parse_metered(source))
        return Template.from_code(environment, code, environment.make_globals(None))
    except TemplateSyntaxError as error:
        raise TemplateError(
            f"{key}, line {error.lineno}: {error.message}; the template is broken: convert the model again"
        ) from error
    except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise TemplateError(
            f"{key} cannot be compiled ({type(error).__name__}): it is nested too deeply; the file is"
            " corrupt or hostile: convert the model again"
        ) from error


def _line(trace: TracebackType | None) -> int | None:
    """The template's line in which an error arose; jinja2 puts frames of that name into its tracebacks."""
    line = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
