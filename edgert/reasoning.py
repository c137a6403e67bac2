"""What a model thinks and what it answers, told apart while the text comes in, wherever it is cut into pieces.

A chat template shows which marks its model puts around its reasoning: they are found in the template's text, not by the
model's name. White space between marks and text belongs to neither part. Nothing is known here of tokens but which
of them are marks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, cast

from edgert.stop_cutter import overlap

Kind = Literal["answer", "reasoning"]

# Before and behind the reasoning, where it comes first: Qwen, GLM, DeepSeek, SmolLM, Granite and most others; ByteDance
# Seed; MiniMax; Mistral; Cohere; Apertus.
_PAIRS = (
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
)
_WRAPPED = ("response", "answer")  # what Granite 3.3 and Hunyuan-A13B put around the answer: <response>...</response>
_START, _CHANNEL, _MESSAGE, _END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
_CHANNEL_MARKS = (_START, _CHANNEL, _MESSAGE, _END, "<|constrain|>")  # OpenAI's harmony format


class Part(NamedTuple):
    """Some text of one kind. end: how many characters of what came in are settled with it, marks included."""

    kind: Kind
    text: str
    end: int


class Splitter(Protocol):
    """Tells the parts of one answer. marks: tokens that are marks, by id; their text does not come through push()."""

    marks: Mapping[int, str]

    def push(self, text: str) -> list[Part]:
        """The parts that are certain now that `text` is there."""

    def takes(self, mark: str) -> bool:
        """Whether a token that is this mark means it here; else it is text."""

    def mark(self, mark: str) -> list[Part]:
        """The parts that are certain now that this mark is there."""

    def flush(self) -> list[Part]:
        """What was held back, now that nothing follows."""


class PlainText:
    """No reasoning: all is answer."""

    marks: Mapping[int, str] = {}

    def __init__(self) -> None:
        self._n_read = 0

    def push(self, text: str) -> list[Part]:
        """The text as it is."""
        self._n_read += len(text)
        return [Part("answer", text, self._n_read)]

    def takes(self, mark: str) -> bool:
        """Never."""
        return False

    def mark(self, mark: str) -> list[Part]:
        """Nothing."""
        return []

    def flush(self) -> list[Part]:
        """Nothing: nothing is held back."""
        return []


@dataclass(frozen=True)
class Marks:
    """How a template marks reasoning. opens, closes: around it; empty where messages have channels (harmony).

    wrap: the name of a tag around the answer that follows, or "".
    """

    opens: str = ""
    closes: str = ""
    wrap: str = ""

    @property
    def has_channels(self) -> bool:
        """Whether messages name their channel."""
        return not self.closes

    @property
    def texts(self) -> tuple[str, ...]:
        """All marks, to be looked for among the tokens."""
        return _CHANNEL_MARKS if self.has_channels else (self.opens, self.closes)

    def splitter(self, prompt: str, tokens: Mapping[int, str]) -> Splitter:
        """A splitter for the answer to a prompt, whose end says whether the model is thinking already.

        tokens: the marks that are tokens of their own, by id; the others are looked for in the text.
        """
        if self.has_channels:
            return _Channels(tokens)
        end = prompt.rstrip()
        begins: _State = "before"
        if end.endswith(self.closes):
            begins = "between"
        elif end.endswith(self.opens):
            begins = "reasoning"
        return _Enclosed(self, tokens, begins)


def find_marks(template: str) -> Marks | None:
    """The marks that a chat template uses, or None if it knows no reasoning."""
    if _CHANNEL in template and _MESSAGE in template:
        return Marks()
    for opens, closes in _PAIRS:
        if closes in template:
            return Marks(opens, closes, next((name for name in _WRAPPED if f"<{name}>" in template), ""))
    return None


# ---- <think>...</think> ----------------------------------------------------------------------------------------------
_State = Literal["before", "reasoning", "between", "answer"]


class _Enclosed:
    """Reasoning between two marks, before the answer or nowhere: once it has begun, a mark is text.

    An answer without reasoning is left as it is, white space and all.
    """

    def __init__(self, how: Marks, tokens: Mapping[int, str], state: _State) -> None:
        self.marks = tokens
        self._how = how
        texts = [mark if mark not in tokens.values() else "" for mark in how.texts]
        self._opens, self._closes = texts  # to be looked for in the text; "": it is a token
        self._wrap_opens, self._wrap_closes = (f"<{how.wrap}>", f"</{how.wrap}>") if how.wrap else ("", "")
        self._state: _State = state
        self._wrapped = False
        self._started = False  # this part has text
        self._thought = False  # a part of reasoning had text
        self._held = ""
        self._n_read = 0

    def push(self, text: str) -> list[Part]:
        self._n_read += len(text)
        self._held += text
        parts: list[Part] = []
        while self._held and self._step(parts):
            pass
        return parts

    def takes(self, mark: str) -> bool:
        if self._state == "reasoning":
            return mark == self._how.closes or not self._started
        return self._state != "answer" and not self._held.strip()

    def mark(self, mark: str) -> list[Part]:
        parts = self.flush() if self._state == "reasoning" else []
        self._enter("reasoning" if mark == self._how.opens else "between", "")
        return parts

    def flush(self) -> list[Part]:
        text, trims = self._held, self._state in ("reasoning", "between") or self._wrapped
        self._held = ""
        return self._given(self._state == "reasoning", text.rstrip() if trims else text, trims)

    def _step(self, parts: list[Part]) -> bool:
        """Settle some of what is held; whether the rest is to be looked at anew."""
        if self._state in ("before", "between"):
            return self._begin()
        reasons = self._state == "reasoning"
        if reasons and not self._started and self._opens:  # as the prompt did, the model may begin once more
            text = self._held.lstrip()
            if text.startswith(self._opens):
                self._enter("reasoning", text.removeprefix(self._opens))
                return True
            if self._opens.startswith(text):
                return False
        mark = self._closes if reasons else self._wrap_closes if self._wrapped else ""
        place = self._held.find(mark) if mark else -1
        n_free = len(self._held) - overlap(self._held, mark) if place < 0 else place
        if trims := reasons or self._wrapped:
            n_free = len(self._held[:n_free].rstrip())
        text, self._held = self._held[:n_free], self._held[n_free:]
        parts += self._given(reasons, text, trims)
        if place >= 0:
            self._enter("between", self._held.lstrip().removeprefix(mark))
        return place >= 0

    def _begin(self) -> bool:
        """Look for a mark, or a tag, before the answer."""
        text = self._held.lstrip()
        after = self._state == "between"  # the white space is no part of the answer
        marks = [(self._opens, "reasoning"), (self._closes, "between"), (self._wrap_opens if after else "", "answer")]
        for mark, state in marks:
            if mark and text.startswith(mark):
                self._wrapped = state == "answer"
                self._enter(cast("_State", state), text.removeprefix(mark))
                return True
        if not text or any(mark.startswith(text) for mark, _ in marks):
            return False
        self._wrapped = False
        self._enter("answer", text if after else self._held)
        return True

    def _enter(self, state: _State, rest: str) -> None:
        self._state, self._held, self._started = state, rest, False

    def _given(self, reasons: bool, text: str, trims: bool) -> list[Part]:
        if trims and not self._started:
            text = text.lstrip()
            if reasons and text and self._thought:
                text = f"\n\n{text}"
        self._started = self._started or bool(text)
        self._thought = self._thought or (reasons and self._started)
        return [Part("reasoning" if reasons else "answer", text, self._n_read - len(self._held))] if text else []


# ---- <|channel|>analysis<|message|>...<|end|> ------------------------------------------------------------------------
class _Channels:
    """Messages with headers that name a channel: analysis is reasoning, final and commentary are the answer.

    A call of a tool stays as it was written, header and all, in the answer, for whoever reads calls. Parts of one kind
    from several messages are set off by an empty line. Text where the header should be is an answer without one.
    """

    def __init__(self, tokens: Mapping[int, str]) -> None:
        self.marks = tokens
        self._texts = [mark for mark in _CHANNEL_MARKS if mark not in tokens.values()]  # to be looked for in the text
        self._header: str | None = ""  # so far, as the prompt has begun the message; None: within a message
        self._bare = True  # no mark was seen
        self._kind: Kind = "answer"
        self._started = False  # this message has text
        self._said: set[Kind] = set()
        self._held = self._blank = ""  # the beginning of a mark, and white space before that
        self._n_read = 0

    def push(self, text: str) -> list[Part]:
        self._n_read += len(text)
        self._held += text
        parts: list[Part] = []
        while found := [(place, mark) for mark in self._texts if (place := self._held.find(mark)) >= 0]:
            place, mark = min(found)
            before, self._held = self._held[:place], self._held[place + len(mark) :]
            parts += self._text(before) + self._marked(mark)
        n_free = len(self._held) - max((overlap(self._held, mark) for mark in self._texts), default=0)
        free, self._held = self._held[:n_free], self._held[n_free:]
        return parts + self._text(free)

    def takes(self, mark: str) -> bool:
        return True

    def mark(self, mark: str) -> list[Part]:
        held, self._held = self._held, ""
        return self._text(held) + self._marked(mark)

    def flush(self) -> list[Part]:
        held, self._held = self._held, ""
        parts = self._text(held)
        if self._bare and self._header:
            parts += self._body(self._header)
        return parts

    def _text(self, text: str) -> list[Part]:
        if self._header is None or not text:
            return self._body(text)
        self._header += text
        call = " to="
        if self._bare and not call.startswith(self._header) and not self._header.startswith(call):
            text, self._header = self._header, None
            return self._body(text)
        return []

    def _marked(self, mark: str) -> list[Part]:
        """What a mark makes of what follows."""
        within, self._bare = self._header is None, False
        if mark == _MESSAGE:
            return self._message(self._header or "") if not within else []
        if mark == _START or mark == _END or (mark == _CHANNEL and within):
            self._header, self._blank = (mark if mark == _CHANNEL else ""), ""
        elif self._header is None:
            return self._body(mark)
        else:
            self._header += mark
        return []

    def _message(self, header: str) -> list[Part]:
        """Begin the message that a header announces; what stays of the header."""
        channel = header.partition(_CHANNEL)[2].split()[:1]
        calls = "to=" in header
        self._kind = "reasoning" if channel == ["analysis"] and not calls else "answer"
        self._header, self._started = None, False
        return self._body(header.removeprefix("assistant").strip() + _MESSAGE) if calls else []

    def _body(self, text: str) -> list[Part]:
        """Text of a message, without the white space around it."""
        if self._bare and text:
            self._said.add("answer")
            self._started = True
            return [Part("answer", text, self._n_read - len(self._held))]
        text = self._blank + text
        kept = text.rstrip()
        self._blank = text[len(kept) :] if self._started or kept else ""
        if not kept:
            return []
        if not self._started:
            kept = ("\n\n" if self._kind in self._said else "") + kept.lstrip()
        self._started = True
        self._said.add(self._kind)
        return [Part(self._kind, kept, self._n_read - len(self._held) - len(self._blank))]
