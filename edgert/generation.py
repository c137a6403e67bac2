"""Token ids in, pieces of text out, a whole answer at the end.

A Stream takes an iterator of tokens from whoever makes them, ends it at a stop token, a stop string, a limit or a
cancel, turns ids into whole characters, and keeps reasoning and answer apart where the model does. It counts, times,
and releases what it holds exactly once. It knows nothing of models, samplers or caches.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.errors import OptionError
from edgert.reasoning import Kind, Part, PlainText, Splitter
from edgert.sampling import log_softmax, top_logprobs
from edgert.stop_cutter import StopCutter
from edgert.types import ExpertCounts

FinishReason = Literal["stop", "length", "context", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token's natural log-probability, and the likeliest (id, log-probability), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, logits: NDArray[np.float32], token_id: int, n_top: int) -> TokenLogprob:
        """That of `token_id` in the unmodified distribution of logits (n_vocab,)."""
        return cls(token_id, float(log_softmax(logits)[token_id]), tuple(top_logprobs(logits, n_top)))


TokenEvent = tuple[int, TokenLogprob | None]  # what the maker of tokens yields


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text, never half a character, and the tokens that begin in it."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None  # as long as token_ids; None if not asked for
    kind: Kind = "answer"  # or "reasoning", which a chat template may mark


@dataclass(slots=True)
class Usage(ExpertCounts):
    """What an answer took. The maker of tokens fills prompt, cache, expert and byte counts as it goes."""

    prompt_tokens: int = 0  # all of the prompt
    cached_tokens: int = 0  # of these, taken from the cache and not computed again
    generated_tokens: int = 0  # made by the model, a stop token included
    ttft_s: float = 0.0  # from the request to the first token
    tpot_s: float = 0.0  # mean of the tokens after the first, without the time the reader took
    prefetch: str = ""  # whether experts are read ahead by now, and why; empty where nothing could be
    power: str = ""  # how many threads a hot board has left, and why; empty where it has all

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first one; 0 before there are two."""
        return 1 / self.tpot_s if self.tpot_s > 0 else 0.0

    @property
    def flash_wait_share(self) -> float:
        """Share of the time to the last token in which the arithmetic waited for experts from flash."""
        seconds = self.ttft_s + self.tpot_s * max(0, self.generated_tokens - 1)
        return min(1.0, self.flash_wait_s / seconds) if seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer, whole or so far."""

    text: str  # the answer alone
    token_ids: tuple[int, ...]  # of reasoning and answer, without a stop token and what a stop string cut off
    finish_reason: FinishReason | None  # None: not finished, or ended by an error
    stop: str | None  # the stop string that was met
    logprobs: tuple[TokenLogprob, ...] | None  # as long as token_ids; None if not asked for
    usage: Usage
    reasoning: str = ""  # what came before the answer, where the chat template marks it


@dataclass(frozen=True)
class StopRules:
    """When an answer ends; a stop string is looked for in the answer, not in its reasoning.

    OptionError for an empty stop string or a limit below one token.
    """

    stop_ids: Collection[int] = frozenset()
    stop: Collection[str] = ()  # one string stands for itself
    max_tokens: int | None = None  # None: until the context is full

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise OptionError(f"stop={text!r} is not allowed: give strings of one character or more")
        object.__setattr__(self, "stop", stop)
        limit = self.max_tokens
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise OptionError(f"max_tokens={limit!r} is not allowed: give a whole number from 1 up")


class Detokenizer(Protocol):
    """Turns ids into text that never ends within a character."""

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""

    def flush(self) -> str:
        """What is left, broken characters replaced."""


@dataclass(slots=True)
class _Said:
    """What has been given to the reader, and the tokens whose text is not out yet, with its place."""

    texts: dict[Kind, list[str]] = field(default_factory=lambda: {"answer": [], "reasoning": []})
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    waiting: deque[tuple[int, TokenEvent]] = field(default_factory=deque)
    n_received: int = 0  # characters out of the detokenizer

    def piece(self, part: Part, all_tokens: bool) -> Piece | None:
        """Give out a part with the tokens that begin in it, or with all; None for neither text nor token."""
        events = []
        while self.waiting and (all_tokens or self.waiting[0][0] < part.end):
            events.append(self.waiting.popleft()[1])
        if not part.text and not events:
            return None
        ids = tuple(token_id for token_id, _ in events)
        logprobs = tuple(logprob for _, logprob in events if logprob is not None)
        self.texts[part.kind].append(part.text)
        self.token_ids += ids
        self.logprobs += logprobs
        return Piece(part.text, ids, logprobs if len(logprobs) == len(ids) and logprobs else None, part.kind)


class Stream(Iterator[Piece]):
    """One answer as it is made: an iterator of pieces, and the completion so far.

    `tokens` yields (id, log-probability or None); when it ends by itself the context is full. Nothing is
    computed, so nothing may be held, until the first piece is asked for; from then on `tokens` gives back what it
    holds in its own `finally`, in whichever thread ends the answer. One thread at a time reads; any thread may call
    cancel() and close().
    """

    def __init__(
        self,
        tokens: Generator[TokenEvent, None, None],
        detokenizer: Detokenizer,
        rules: StopRules,
        *,
        splitter: Splitter | None = None,  # tells reasoning from answer; None: all is answer
        usage: Usage | None = None,  # shared with `tokens`, which fills its part
        cancelled: threading.Event | None = None,  # shared with `tokens`, to look at in a long prefill
        started: float | None = None,  # time.perf_counter() of the request; None is now
    ) -> None:
        self.usage = usage if usage is not None else Usage()
        self.finish_reason: FinishReason | None = None
        self._tokens = tokens
        self._detokenizer = detokenizer
        self._rules = rules
        self._splitter = splitter or PlainText()
        self._cutter = StopCutter(rules.stop)
        self._cancelled = cancelled or threading.Event()
        self._started = time.perf_counter() if started is None else started
        self._decode_s = 0.0
        self._said = _Said()
        self._ready: deque[tuple[Part, bool]] = deque()  # to be given out, with all tokens that wait or only its own
        self._stepping = threading.Lock()
        self._closing = False
        self._released = False

    def __next__(self) -> Piece:
        with self._stepping:
            try:
                piece = self._next_piece()
            except BaseException:
                self._release()
                raise
        if self._closing:
            self.close()
        if piece is None:
            raise StopIteration
        return piece

    def _next_piece(self) -> Piece | None:
        """Advance until there is something to give out; None at the end."""
        while True:
            while self._ready:
                piece = self._said.piece(*self._ready.popleft())
                if piece is not None:
                    return piece
            if self._released:
                return None
            parts = self._advance()
            ended = self.finish_reason is not None
            if ended:
                parts = parts or [Part("answer", "", 0)]  # for tokens without text
                self._release()
            last = len(parts) - 1
            whole = ended and self._cutter.met is None
            self._ready.extend((part, whole and number == last) for number, part in enumerate(parts))

    def _advance(self) -> list[Part]:
        """Take one token; the parts that it sets free. Sets finish_reason where the answer ends."""
        before = time.perf_counter()
        event = None if self._cancelled.is_set() else next(self._tokens, None)
        if event is None:
            return self._end("cancelled" if self._cancelled.is_set() else "context")
        self._count(before)
        if event[0] in self._rules.stop_ids:
            return self._end("stop")
        self._said.waiting.append((self._said.n_received, event))
        parts = self._cut(self._split(event[0]))
        if self._cutter.met is not None:
            self.finish_reason = "stop"
        elif self.usage.generated_tokens == self._rules.max_tokens:
            return parts + self._end("length")
        return parts

    def _split(self, token_id: int) -> list[Part]:
        """The parts that are certain with one more token."""
        mark = self._splitter.marks.get(token_id)
        if mark is not None and self._splitter.takes(mark):
            return self._pushed(self._detokenizer.flush()) + self._splitter.mark(mark)
        return self._pushed(self._detokenizer.push(token_id))

    def _pushed(self, text: str) -> list[Part]:
        self._said.n_received += len(text)
        return self._splitter.push(text)

    def _cut(self, parts: list[Part]) -> list[Part]:
        """The parts up to a stop string in the answer, or without what may be the beginning of one."""
        free: list[Part] = []
        for kind, text, end in parts:
            begin = end - len(text) - self._cutter.n_held
            cut = self._cutter.push(text) if kind == "answer" else self._cutter.flush()
            free.append(Part("answer", cut, begin + len(cut)))
            if self._cutter.met is not None:
                break
            if kind == "reasoning":
                free.append(Part(kind, text, end))
        return [part for part in free if part.text]

    def _end(self, reason: FinishReason) -> list[Part]:
        """Set the finish reason; the last parts, of what was held back."""
        parts = self._cut(self._pushed(self._detokenizer.flush()) + self._splitter.flush())
        held = self._cutter.flush()
        self.finish_reason = reason if self._cutter.met is None else "stop"
        return [*parts, Part("answer", held, self._said.n_received)] if held else parts

    def _count(self, before: float) -> None:
        """One more token, which was asked for at `before`."""
        now, usage = time.perf_counter(), self.usage
        usage.generated_tokens += 1
        if usage.generated_tokens == 1:
            usage.ttft_s = now - self._started
        else:
            self._decode_s += now - before
            usage.tpot_s = self._decode_s / (usage.generated_tokens - 1)

    def _release(self) -> None:
        """Close the maker of tokens, which gives back what it held, once."""
        if not self._released:
            self._released = True
            self._tokens.close()

    def cancel(self) -> None:
        """End the answer at the next token, from any thread; the reader still gets what was held back."""
        self._cancelled.set()

    def close(self) -> None:
        """Stop now and release the model; harmless when repeated. Text that was held back is dropped.

        While another thread is within a token, that thread does it as soon as the token is there.
        """
        self._closing = True
        self._cancelled.set()
        if self._stepping.acquire(blocking=False):
            try:
                self._ready.clear()
                if not self._released:
                    self.finish_reason = "cancelled"
                    self._release()
            finally:
                self._stepping.release()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_released"):  # else the constructor failed
            self.close()

    @property
    def completion(self) -> Completion:
        """The answer so far: exactly the pieces that were given out."""
        said = self._said
        return Completion(
            text="".join(said.texts["answer"]),
            token_ids=tuple(said.token_ids),
            finish_reason=self.finish_reason,
            stop=self._cutter.met,
            logprobs=tuple(said.logprobs) if said.logprobs else None,
            usage=self.usage,
            reasoning="".join(said.texts["reasoning"]),
        )

    def finish(self) -> Completion:
        """Read to the end and return the whole answer."""
        for _ in self:
            pass
        return self.completion
