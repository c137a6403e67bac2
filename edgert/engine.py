"""The forward pass: token ids in, logits out, one layer after the other, over a device and a residency.

Prefill and decode are the same step; only the number of rows differs. Nothing here knows formats, files of experts, or
which kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from edgert.devices.base import AHEAD, Cache, Device
from edgert.errors import ContextLengthError, OptionError
from edgert.experts.residency import Residency
from edgert.types import Floats, ModelConfig

Trace = Callable[[Device], None]  # called after each step: the device still knows what each layer chose
Pace = Callable[[], None]  # called before each step
Observer = Callable[[int], None]  # called in each layer that has experts when they have run: the device knows all rows


class Session:
    """One sequence: the tokens whose keys and values are in the cache."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.tokens: list[int] = []

    @property
    def room(self) -> int:
        """Positions that are still free."""
        return self.cache.n_context - len(self.tokens)

    def trim(self, tokens: Sequence[int]) -> int:
        """Keep the longest common prefix with `tokens`, but never all of them: the last is computed to be answered.

        Less is kept where the model has states that pass from token to token, or sees only the last positions: up to a
        position that was kept.
        """
        same = 0
        for ours, theirs in zip(self.tokens, tokens[: len(tokens) - 1], strict=False):
            if ours != theirs:
                break
            same += 1
        return self.cut(same)

    def cut(self, n: int) -> int:
        """Keep the first n tokens, or fewer where the cache can only go back further; how many."""
        kept = self.cache.rewind(min(n, len(self.tokens)))
        del self.tokens[kept:]
        return kept

    def check(self) -> list[str]:
        """What is wrong, one line each."""
        return [] if self.room >= 0 else [f"{len(self.tokens)} tokens in a cache for {self.cache.n_context}"]


class Engine:
    """Runs tokens through a model. One caller at a time."""

    def __init__(
        self, config: ModelConfig, device: Device, residency: Residency, embed: Callable[[list[int]], Floats]
    ) -> None:
        self.config, self.device, self.residency, self.embed = config, device, residency, embed
        self.trace: Trace | None = None
        self.observe: Observer | None = None
        self.pace: Pace | None = None
        self.every_layer = False  # run the experts of each layer in calls of their own, to measure or to test

    def step(self, tokens: list[int], session: Session) -> None:
        """Run a chunk of tokens through all layers; their keys and values join the session's."""
        if self.pace:
            self.pace()
        start, layer, n_layers = len(session.tokens), 0, self.config.n_layers
        session.cache.begin(start, len(tokens))
        self.residency.begin(len(tokens))
        self.device.begin(self.embed(tokens))  # (n_tokens, d_model)
        while (layer := self._run_layers(session, start, layer)) < n_layers:
            for group in self.residency.acquire(layer, self.device.routed(layer)):  # as experts are there
                self.device.experts(layer, group)
            if self.observe:
                self.observe(layer)
            self.device.combine(layer)  # ascending expert id
            layer += 1
        self.residency.finish()
        if self.trace:
            self.trace(self.device)
        session.tokens += tokens
        session.cache.end(len(session.tokens))

    def _run_layers(self, session: Session, start: int, first: int) -> int:
        """Run layers up to one whose experts are not all in RAM: its number."""
        residency = self.residency
        return self.device.run_layers(
            residency.tables,
            residency.states,
            session.cache,
            start,
            first,
            every_layer=self.every_layer or self.observe is not None or residency.every_layer,
            n_ahead=AHEAD if self.trace else residency.n_ahead,
        )

    def prefill(self, tokens: Sequence[int], session: Session, *, chunk: int | None = None) -> Iterator[int]:
        """Run a prompt in chunks; yields the number of tokens of each, so that a caller can stop in between."""
        chunk = self.device.chunk if chunk is None else chunk
        if not 1 <= chunk <= self.device.chunk:
            raise OptionError(f"chunk={chunk} must lie between 1 and {self.device.chunk}")
        if len(tokens) > session.room:
            raise ContextLengthError(
                f"{len(session.tokens) + len(tokens)} tokens do not fit the context of {session.cache.n_context}; "
                "shorten the prompt or load the model with a larger context"
            )
        for at in range(0, len(tokens), chunk):
            part = list(tokens[at : at + chunk])
            self.step(part, session)
            yield len(part)

    def prompt(self, tokens: Sequence[int], session: Session, keep: Sequence[int] = ()) -> Iterator[int]:
        """As prefill, of a text that others may come back to: what that takes is kept where it begins and ends.

        keep: the lengths of what others will begin with, counted from the session's first token, ascending, the surest
        first; by default they come back with the same text, and need what was before its last token.
        """
        cache, start, spare = session.cache, len(session.tokens), keep[0] if keep else None
        end = start + len(tokens)
        cache.keep(spare)
        marks = [n for n in keep or (end - 1,) if start < n < end]
        for stop in (*marks, end) if cache.has_states else (end,):  # states are kept only where a step ends
            for n in self.prefill(tokens[len(session.tokens) - start : stop - start], session):
                for mark in marks:
                    if 0 <= len(session.tokens) - mark < n:
                        cache.keep(spare, mark)
                yield n

    def last_logits(self, n_rows: int) -> Floats:
        """Logits (n_vocab,) of the last of the `n_rows` tokens of the step just run; valid until the next call."""
        return self.device.head(n_rows - 1)[0]

    def logits(self, n_rows: int, first: int = 0) -> Iterator[Floats]:
        """Logits of the rows from `first` on of the step just run, some rows at a time; each valid until the next."""
        while first < n_rows:
            rows = self.device.head(first)  # (some, n_vocab)
            yield rows
            first += len(rows)

    def read(self, tokens: Sequence[int], session: Session, first: int = 0) -> Iterator[tuple[int, Floats]]:
        """(position, logits (n, n_vocab)) of a text from position `first` on, some rows at a time.

        What the session holds of the text before `first` is not computed again.
        """
        done = session.trim(tokens[: first + 1])
        for n in self.prefill(tokens[done:], session):
            position = max(done, first)
            for rows in self.logits(n, position - done):
                yield position, rows
                position += len(rows)
            done += n
