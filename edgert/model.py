"""The face of the library: load a model, generate, chat, measure.

Knows how the parts fit together; each part knows nothing of the others. Calls from several threads wait for each other.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from edgert import perplexity
from edgert.chat_template import ChatTemplate
from edgert.errors import ContextLengthError, EdgertError, OptionError
from edgert.generation import Completion, StopRules, Stream, TokenEvent, TokenLogprob
from edgert.loading import Parts, load_parts
from edgert.memory import MemoryPlan, parse_size
from edgert.request import Request
from edgert.sampling import Sampling
from edgert.streaming import prefetch_state
from edgert.tensor_views import skipped
from edgert.tokenizer import Tokenizer
from edgert.turn import Turn
from edgert.types import Floats, ModelConfig
from edgert.weights import Progress, silent

if TYPE_CHECKING:
    from edgert.bench import Report
    from edgert.bench_runner import Test
    from edgert.experts.prefetch_control import Mode

Messages = Sequence[Mapping[str, Any]]


def load(
    path_or_name: str | Path | None = None,
    *,
    memory: str | int | float | None = None,
    residency: str | float | None = None,
    policy: str = "auto",
    prefetch: Mode = "auto",
    trace: str | Path | None = None,
    context: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    kv_type: str = "f16",
    activations: str = "int8",
    progress: Progress | None = None,
    reserved: int = 0,
    power: str = "full",
    gpu_memory: str | int | None = None,
) -> Model:
    """Load a model: a GGUF file, a bundle (.edge), a Hugging Face folder; None loads the embedded one.

    memory: most bytes the process may use ("2GiB"; "50%" or 0.5 of the machine's), by default what is available less a
    head-room. Experts that do not fit are read from flash as they are needed, with the same answers; a file that is no
    bundle is packed into one for that, once, in the cache folder. residency: the share of the experts to hold in RAM
    ("25%" or 0.25) instead of as many as fit. policy: which ones, see experts.policies.
    prefetch: "auto" reads experts before they are asked for where that pays, "always" wherever it can, "off" never.
    trace: a file for the routes of the last tokens, as many as fit 8 MiB, written when the model is closed; `edgert
    replay` reads it. context: positions, by default the model's own up to 4096. threads: by default the physical cores
    that the process may use. device: "auto", "cpu", "reference", "onnx:PROVIDER", or "attention=NAME,experts=NAME", see
    devices.selection. gpu_memory: most bytes of a graphics card's own memory ("6GiB"), by default nine tenths of what
    is free: as many experts as fit lie there, those that a profile found to be used most or without one the first of
    each layer, and the others in RAM. kv_type: "f16", "f32", or "int8", which is lossy.
    activations: "int8", or "f32" to verify. progress(stage, fraction) is called while loading. reserved: bytes of
    `memory` that the caller itself will take. power: "cool" takes threads away while the board is hot, with the same
    answers; "full" never does. Raises EdgertError.
    """
    return Model(
        load_parts(
            path_or_name,
            memory=memory,
            residency=residency,
            policy=policy,
            prefetch=prefetch,
            trace=trace,
            context=context,
            threads=threads,
            device=device,
            kv_type=kv_type,
            activations=activations,
            progress=progress or silent,
            reserved=reserved,
            gpu_memory=gpu_memory,
            power=power,
        )
    )


class Model:
    """A loaded model. Use as a context manager or call close()."""

    def __init__(self, parts: Parts) -> None:
        self.name: str = parts.name
        self.path: Path = parts.path
        self.config: ModelConfig = parts.engine.config
        self.tokenizer: Tokenizer = parts.tokenizer
        self.template: ChatTemplate = parts.template
        self.defaults: Sampling = parts.defaults
        self.memory: MemoryPlan = parts.memory  # what goes where, and a warning if it is tight
        self.skipped: str = skipped(self.config)  # what of the file is not run, in a line; mostly empty
        self.n_context: int = parts.session.cache.n_context
        self._forgets = parts.session.cache.forgets
        self._parts: Parts | None = parts  # None once closed
        self._turn = Turn()
        self._stream: weakref.ref[Stream] | None = None  # the one that has the turn, or had it last
        self._closing = False

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back memory, threads and the file; harmless when repeated.

        Ends an open stream, in whichever thread it is read. Waits for a whole answer or a measurement in progress in
        another thread; those that have not begun are refused.
        """
        self._closing = True  # before looking for a stream: one that begins now finds this set
        stream = self._stream() if self._stream is not None else None
        if stream is not None:
            stream.close()
        if self._turn.forked:  # the threads are the parent's, and the turn may be too
            parts, self._parts = self._parts, None
            if parts is not None:
                parts.file.close()
            return
        with self._turn:
            parts, self._parts = self._parts, None
            if parts is not None:
                parts.close()

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
        request = self._request(ids, (sampling or Sampling()).changed(**options), logprobs)
        answer = self._answer(request, max_tokens, stop, after=ids)
        return request.handed_out(answer) if stream else answer.finish()

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        variables: Mapping[str, Any] | None = ...,
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
        variables: Mapping[str, Any] | None = ...,
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
        variables: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        sampling: Sampling | None = None,
        stream: bool = False,
        **options: Any,
    ) -> Completion | Stream:
        """Answer a conversation of {"role": ..., "content": ...} through the model's chat template.

        variables: what the template knows besides, as {"enable_thinking": False}. Reasoning that it marks is kept
        apart: in pieces of kind "reasoning", in the answer's `reasoning`; messages may hold it as "reasoning_content",
        which templates mostly drop. tools: JSON schemas of functions; a call stays in the answer as the model writes
        it, marks included, of which those that are control tokens (`template.call_marks`) come as text. Sampling
        defaults are the model's own (`defaults`). What the cache still holds of earlier turns is not computed again.
        Otherwise as generate().
        """
        ids = self.template.encode(messages, tools=tools, **(variables or {}))
        request = self._request(ids, (sampling or self.defaults).changed(**options), logprobs)
        request.splitter = self.template.splitter(ids)
        request.shown = self.template.call_marks if tools else ()
        if self._forgets:  # elsewhere any position can be come back to
            request.keep = self.template.lasting(ids, messages, tools=tools, **(variables or {}))
        answer = self._answer(request, max_tokens, stop)
        return request.handed_out(answer) if stream else answer.finish()

    def _request(self, ids: list[int], sampling: Sampling, n_logprobs: int | None) -> Request:
        """A checked request for the answer to `ids`."""
        return Request.checked(ids, sampling, n_logprobs, self.n_context, self.config.n_vocab)

    def _answer(
        self, request: Request, max_tokens: int | None, stop: str | Sequence[str], after: Sequence[int] = ()
    ) -> Stream:
        """The answer to a request; its text continues that of `after`."""
        rules = StopRules(self.tokenizer.stop_ids, (stop,) if isinstance(stop, str) else tuple(stop), max_tokens)
        return Stream(
            self._tokens(request),
            self.tokenizer.detokenizer(after=after, shown=request.shown),
            rules,
            splitter=request.splitter,
            usage=request.usage,
            cancelled=request.cancelled,
            started=time.perf_counter(),
        )

    def _tokens(self, request: Request) -> Generator[TokenEvent, None, None]:
        """Tokens of an answer, until the context is full or it is cancelled; has the turn from first to last."""
        if not self._turn.take(request.cancelled):
            return
        try:
            self._stream = request.stream
            for event in self._run(self._open(), request):
                yield event
                self._turn.go_on()
        finally:
            self._turn.give_back()

    def _run(self, parts: Parts, request: Request) -> Iterator[TokenEvent]:
        """Prefill, then a token at a time."""
        engine, session, usage, history = parts.engine, parts.session, request.usage, list(request.ids)
        engine.residency.between_requests()
        before = engine.residency.counts
        usage.cached_tokens = session.trim(request.ids)
        n_rows = 0
        for n in engine.prompt(request.ids[usage.cached_tokens :], session, request.keep):
            n_rows = n
            if request.cancelled.is_set():
                return
        while True:
            logits = engine.last_logits(n_rows)
            token = request.sampler.choose(logits, history)
            history.append(token)
            usage.take(engine.residency.counts - before)
            usage.prefetch = prefetch_state(engine.residency)
            usage.power = parts.cooler.state if parts.cooler is not None else ""
            yield token, None if request.n_logprobs is None else TokenLogprob.of(logits, token, request.n_logprobs)
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
        parts = self._open()
        return parts.engine.read(ids, parts.session, first)

    @contextmanager
    def held(self) -> Iterator[Parts]:
        """What the model is made of, for a measurement; meanwhile nobody else's turn comes."""
        with self._turn:
            yield self._open()

    def bench(
        self,
        tests: Sequence[Test] | None = None,
        *,
        repetitions: int = 5,
        memory: str | int | None = None,
        steady: bool = False,
        progress: Progress | None = None,
    ) -> Report:
        """Time prompts and generation of random ids; see edgert.bench, whose DEFAULT holds the tests by default.

        memory: most bytes the process may use, as for load: the measurement of the memory's speed takes up to 1 GiB.
        steady: begin with a full expert buffer, keep the routes, measure neither phases nor the memory's speed.
        progress(stage, fraction) is called between steps too; it should do nothing while the stage is unchanged.
        """
        from edgert import bench

        limit = None if memory is None else parse_size(memory)
        with self._turn:
            return bench.measure(
                self._open(), tests or bench.DEFAULT, repetitions, limit, progress or silent, steady=steady
            )

    def summary(self) -> dict[str, Any]:
        """What `edgert inspect` prints."""
        from edgert.describing import describe

        return describe(self.path, context=self.n_context)

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = [int(token) for token in tokens]
        outside = next((token for token in ids if not 0 <= token < self.config.n_vocab), None)
        if outside is not None:
            raise OptionError(f"token {outside} is outside the vocabulary of {self.config.n_vocab}")
        return ids

    def _open(self) -> Parts:
        """The parts of an open model."""
        if self._parts is None or self._closing:
            raise EdgertError("this model is closed; load it again")
        return self._parts
