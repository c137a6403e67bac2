"""The face of the library: load a model, generate, chat, measure.

Knows how the parts fit together; each part knows nothing of the others. Calls from several threads wait for each other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from edgert import perplexity
from edgert.chat_template import ChatTemplate
from edgert.engine import Engine, Session
from edgert.errors import BusyError, ContextLengthError, EdgertError, OptionError
from edgert.generation import Completion, StopRules, Stream, TokenEvent, TokenLogprob, Usage
from edgert.loading import load_parts
from edgert.sampling import Sampler, Sampling
from edgert.tokenizer import Tokenizer
from edgert.types import Floats, ModelConfig
from edgert.weights import Progress

Messages = Sequence[Mapping[str, Any]]


def load(
    path_or_name: str | Path | None = None,
    *,
    memory: str | int | None = None,
    context: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    kv_type: str = "f16",
    activations: str = "int8",
    progress: Progress | None = None,
) -> Model:
    """Load a GGUF model; None loads the embedded one.

    memory: most bytes the process may use ("2GiB"), refused if the model needs more. context: positions, by default the
    model's own up to 4096. threads: by default the physical cores that the process may use. device: "auto", "cpu" or
    "reference". kv_type: "f16" or "f32". activations: "int8", or "f32" to verify. progress(stage, fraction) is called
    while loading. Raises EdgertError.
    """
    return Model(
        load_parts(
            path_or_name,
            memory=memory,
            context=context,
            threads=threads,
            device=device,
            kv_type=kv_type,
            activations=activations,
            progress=progress or (lambda stage, fraction: None),
        )
    )


class _Turn:
    """Whose turn it is: threads wait for each other; a thread that would wait for itself is told so."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def take(self) -> None:
        """Wait for the model."""
        if self._owner == threading.get_ident():
            raise BusyError("this thread still reads another answer of this model: finish or close() that stream first")
        self._lock.acquire()
        self._owner = threading.get_ident()

    def give_back(self) -> None:
        """Let the next one have it; any thread may do it for the owner."""
        self._owner = None
        self._lock.release()

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.give_back()


class Model:
    """A loaded model. Use as a context manager or call close()."""

    def __init__(self, parts: Any) -> None:
        self.name: str = parts.name
        self.path: Path = parts.path
        self.config: ModelConfig = parts.engine.config
        self.tokenizer: Tokenizer = parts.tokenizer
        self.template: ChatTemplate = parts.template
        self.defaults: Sampling = parts.defaults
        self.n_context: int = parts.session.cache.n_context
        self._parts = parts
        self._engine: Engine = parts.engine
        self._session: Session = parts.session
        self._turn = _Turn()
        self._closed = False

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back memory, threads and the file. Waits for an answer in progress."""
        with self._turn:
            if not self._closed:
                self._closed = True
                self._parts.close()

    # ---- answers -----------------------------------------------------------------------------------------------------
    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = ...,
        stop: str | Sequence[str] = ...,
        logprobs: int | None = ...,
        sampling: Sampling | None = ...,
        stream: Literal[False] = ...,
        **options: Any,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = ...,
        stop: str | Sequence[str] = ...,
        logprobs: int | None = ...,
        sampling: Sampling | None = ...,
        stream: Literal[True],
        **options: Any,
    ) -> Stream: ...

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        sampling: Sampling | None = None,
        stream: bool = False,
        **options: Any,
    ) -> Completion | Stream:
        """Continue a text, or token ids, greedily unless told otherwise.

        max_tokens: None runs until a stop token or the end of the context. stop: strings that end the answer. logprobs:
        how many alternatives to report per token. options: fields of Sampling. stream: True returns an iterator of
        pieces. Raises ContextLengthError for a prompt longer than the context, OptionError for a bad option.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self._checked(prompt)
        answer = self._answer(ids, (sampling or Sampling()).changed(**options), max_tokens, stop, logprobs, after=ids)
        return answer if stream else answer.finish()

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        max_tokens: int | None = ...,
        stop: str | Sequence[str] = ...,
        logprobs: int | None = ...,
        sampling: Sampling | None = ...,
        stream: Literal[False] = ...,
        **options: Any,
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        max_tokens: int | None = ...,
        stop: str | Sequence[str] = ...,
        logprobs: int | None = ...,
        sampling: Sampling | None = ...,
        stream: Literal[True],
        **options: Any,
    ) -> Stream: ...

    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        sampling: Sampling | None = None,
        stream: bool = False,
        **options: Any,
    ) -> Completion | Stream:
        """Answer a conversation of {"role": ..., "content": ...} through the model's chat template.

        Sampling defaults are the model's own (`defaults`). What the cache still holds of earlier turns is not computed
        again. Otherwise as generate().
        """
        ids = self.template.encode(messages, tools=tools)
        answer = self._answer(ids, (sampling or self.defaults).changed(**options), max_tokens, stop, logprobs)
        return answer if stream else answer.finish()

    def _answer(
        self,
        ids: list[int],
        sampling: Sampling,
        max_tokens: int | None,
        stop: str | Sequence[str],
        logprobs: int | None,
        after: Sequence[int] = (),
    ) -> Stream:
        """The answer to `ids`; its text continues that of `after`."""
        if not ids:
            raise OptionError("the prompt is empty; give at least one token")
        if len(ids) > self.n_context:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, the context holds {self.n_context}; "
                "shorten it or use a larger --context"
            )
        outside = next((token for token in sampling.logit_bias if not 0 <= token < self.config.n_vocab), None)
        if outside is not None:
            raise OptionError(f"logit_bias has token {outside}, outside the vocabulary of {self.config.n_vocab}")
        rules = StopRules(self.tokenizer.stop_ids, (stop,) if isinstance(stop, str) else tuple(stop), max_tokens)
        usage, cancelled, held = Usage(prompt_tokens=len(ids)), threading.Event(), threading.Event()

        def release() -> None:
            if held.is_set():
                held.clear()
                self._turn.give_back()

        tokens = self._tokens(ids, Sampler(sampling), logprobs, usage, cancelled, held)
        return Stream(
            tokens,
            self.tokenizer.detokenizer(after=after),
            rules,
            usage=usage,
            cancelled=cancelled,
            on_close=release,
            started=time.perf_counter(),
        )

    def _tokens(
        self,
        ids: list[int],
        sampler: Sampler,
        n_logprobs: int | None,
        usage: Usage,
        cancelled: threading.Event,
        held: threading.Event,
    ) -> Generator[TokenEvent, None, None]:
        """Tokens of an answer, until the context is full or `cancelled` is set."""
        self._turn.take()
        held.set()
        self._check_open()
        engine, session, history = self._engine, self._session, list(ids)
        hits, misses, read = engine.residency.hits, engine.residency.misses, engine.residency.bytes_read
        usage.cached_tokens = session.trim(ids)
        n_rows = 0
        for n in engine.prefill(ids[usage.cached_tokens :], session):
            n_rows = n
            if cancelled.is_set():
                return
        while True:
            logits = engine.last_logits(n_rows)
            token = sampler.choose(logits, history)
            history.append(token)
            usage.expert_hits = engine.residency.hits - hits
            usage.expert_misses = engine.residency.misses - misses
            usage.bytes_read = engine.residency.bytes_read - read
            yield token, None if n_logprobs is None else TokenLogprob.of(logits, token, n_logprobs)
            if not session.room:
                return
            engine.step([token], session)
            n_rows = 1

    # ---- measurements ------------------------------------------------------------------------------------------------
    def logits(self, tokens: Sequence[int]) -> Floats:
        """Logits, float32 (n_tokens, n_vocab), of every position of a text from an empty context."""
        ids = self._checked(tokens)
        if not ids:
            raise OptionError("there are no tokens to run; give at least one")
        with self._turn:
            return np.concatenate([rows.copy() for _, rows in self._rows(ids)])

    def perplexity(
        self,
        text: str,
        *,
        chunk: int = 512,
        n_chunks: int | None = None,
        progress: Callable[[float, float], None] | None = None,
    ) -> perplexity.Perplexity:
        """Perplexity of a text as llama.cpp measures it; progress(fraction, value so far)."""
        if chunk > self.n_context:
            raise ContextLengthError(
                f"chunk={chunk} is longer than the context of {self.n_context}; load with a larger context"
            )
        bos = self.tokenizer.bos_id if self.tokenizer.add_bos else None
        parts = perplexity.chunks(self.tokenizer.encode(text), chunk, n_chunks, bos)
        with self._turn:
            return perplexity.score(parts, self._rows, progress)

    def _rows(self, ids: list[int], first: int = 0) -> Iterator[tuple[int, Floats]]:
        """(position, logits (n, n_vocab)) of `ids` from `first` on, some rows at a time, from an empty context."""
        self._check_open()
        self._session.tokens.clear()
        done = 0
        for n in self._engine.prefill(ids, self._session):
            position = max(done, first)
            for rows in self._engine.logits(n, position - done):
                yield position, rows
                position += len(rows)
            done += n

    def summary(self) -> dict[str, Any]:
        """What `edgert inspect` prints."""
        from edgert.loading import describe

        return describe(self.path, context=self.n_context)

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = [int(token) for token in tokens]
        outside = next((token for token in ids if not 0 <= token < self.config.n_vocab), None)
        if outside is not None:
            raise OptionError(f"token {outside} is outside the vocabulary of {self.config.n_vocab}")
        return ids

    def _check_open(self) -> None:
        if self._closed:
            raise EdgertError("this model is closed; load it again")


def describe(path_or_name: str | Path | None = None, *, context: int | None = None) -> dict[str, Any]:
    """What `edgert inspect` prints, without reading the weights."""
    from edgert.loading import describe

    return describe(path_or_name, context=context)
