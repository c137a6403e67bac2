"""Calls of tools in a conversation: the form in which a chat template takes them, and the marks it puts around them.

Both are found by what the template makes of a call, not by the model's name; nothing is known here of token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from edgert.errors import TemplateError

Message = Mapping[str, Any]


class CallForm(NamedTuple):
    """How a template takes a message that calls tools. content: where the message says nothing besides."""

    as_text: bool = False  # the arguments are a text of JSON, not a dictionary
    content: str | None = ""


_FORMS = tuple(CallForm(as_text, content) for content in ("", None) for as_text in (False, True))
_MARK = re.compile("tool.?call|python.?tag", re.IGNORECASE)
_NAME, _KEY, _VALUE = "edgert_probe", "edgert_key", "edgert_value"
_ARGUMENTS = {_KEY: _VALUE}
PROBE_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {_KEY: {"type": "string", "description": "A text."}},
            "required": [],
        },
    },
}


def probe_call(form: CallForm) -> list[Message]:
    """A conversation that ends with a call of PROBE_TOOL."""
    function = {"name": _NAME, "arguments": json.dumps(_ARGUMENTS) if form.as_text else _ARGUMENTS}
    call = {"id": "edgert123", "type": "function", "function": function}  # Mistral takes ids of 9 characters only
    said = {"role": "assistant", "content": form.content, "tool_calls": [call]}
    return [{"role": "user", "content": "Hello"}, said]


def probe_answer() -> list[Message]:
    """The same conversation where the answer calls nothing."""
    return [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]


def is_named_as_mark(token: str) -> bool:
    """Whether a control token says by its name that it marks a call: some templates, as LFM2's, write none."""
    return _MARK.search(token) is not None


def find_form(render: Callable[[Sequence[Message]], str]) -> CallForm:
    """The first form in which `render` shows a call as it is; the usual one where it shows none."""
    for form in _FORMS:
        try:
            text = render(probe_call(form))
        except TemplateError:
            continue
        wrong = f'\\"{_KEY}' in text or f"'{_KEY}'" in text  # a text within a text, or as Python writes a dictionary
        if not wrong and all(word in text for word in (_NAME, _KEY, _VALUE)):
            return form
    return CallForm()


def in_form(message: Message, form: Callable[[], CallForm]) -> Message:
    """A message as the template takes it; OpenAI's clients send arguments as text, and no content beside a call.

    What is no JSON object stays as it is. form: asked for only where the message calls tools.
    """
    if "tool_calls" not in message:
        return message
    calls = message["tool_calls"]
    if not calls:  # clients write null, which many a template takes for a call
        return {key: value for key, value in message.items() if key != "tool_calls"}
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        return message
    as_text, content = form()
    taken = [_call(call, as_text) if isinstance(call, Mapping) else call for call in calls]
    return {**message, "content": message.get("content") or content, "tool_calls": taken}


def _call(call: Mapping[str, Any], as_text: bool) -> Mapping[str, Any]:
    if isinstance(function := call.get("function"), Mapping):
        return {**call, "function": _call(function, as_text)}
    arguments = call.get("arguments")
    if as_text and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False, default=str)}
    if not as_text and isinstance(arguments, str):
        return {**call, "arguments": _parsed(arguments)}
    return call


def _parsed(text: str) -> Any:
    """The object that a text of JSON describes, {} for an empty text; else the text."""
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
