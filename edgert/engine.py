"""The forward pass: token ids in, logits out, one layer after the other, over a device and a residency.

Prefill and decode are the same step; only the number of rows differs. Nothing here knows formats, files of experts, or
which kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from edgert.devices.base import CHUNK, Cache, Device
from edgert.errors import ContextLengthError, OptionError
from edgert.experts.residency import Residency
from edgert.experts.routing import Router
from edgert.types import Floats, ModelConfig, Routes

Trace = Callable[[int, Routes], None]  # called with the layer and its routes


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
        """Keep the longest common prefix with `tokens`, but never all of them: the last is computed to be answered."""
        same = 0
        for ours, theirs in zip(self.tokens, tokens[: len(tokens) - 1], strict=False):
            if ours != theirs:
                break
            same += 1
        del self.tokens[same:]
        return same

    def check(self) -> list[str]:
        """What is wrong, one line each."""
        return [] if self.room >= 0 else [f"{len(self.tokens)} tokens in a cache for {self.cache.n_context}"]


class Engine:
    """Runs tokens through a model. One caller at a time."""

    def __init__(
        self, config: ModelConfig, device: Device, residency: Residency, embed: Callable[[list[int]], Floats]
    ) -> None:
        self.config, self.device, self.residency, self.embed = config, device, residency, embed
        self.router = Router(config.router) if config.router else None
        self.trace: Trace | None = None

    def step(self, tokens: list[int], session: Session) -> None:
        """Run a chunk of tokens through all layers; their keys and values join the session's."""
        start = len(session.tokens)
        self.device.begin(self.embed(tokens))  # (n_tokens, d_model)
        if not self._all_layers_at_once(session, start):
            for layer in range(self.config.n_layers):
                scores = self.device.attend(layer, session.cache, start)  # (n_tokens, n_expert)
                self._feed_forward(layer, scores)
        session.tokens += tokens

    def _all_layers_at_once(self, session: Session, start: int) -> bool:
        """Run all layers in one call of the device, if it can, no expert is away and nobody watches the routes."""
        tables = self.residency.tables
        used = None if tables is None or self.trace else self.device.run_layers(tables, session.cache, start)
        self.residency.hits += used or 0
        return used is not None

    def _feed_forward(self, layer: int, scores: Floats | None) -> None:
        if scores is None or self.router is None:
            self.device.experts(layer, None, with_shared=True)
            self.device.combine(layer, None)
            return
        routes = self.router.choose(scores)  # ids, weights: (n_tokens, top_k)
        if self.trace:
            self.trace(layer, routes)
        with_shared = True
        for group in self.residency.acquire(layer, routes):  # as experts are there
            self.device.experts(layer, group, with_shared=with_shared)
            with_shared = False
        self.device.combine(layer, routes)  # ascending expert id

    def prefill(self, tokens: Sequence[int], session: Session, *, chunk: int = CHUNK) -> Iterator[int]:
        """Run a prompt in chunks; yields the number of tokens of each, so that a caller can stop in between."""
        if not 1 <= chunk <= CHUNK:
            raise OptionError(f"chunk={chunk} must lie between 1 and {CHUNK}")
        if len(tokens) > session.room:
            raise ContextLengthError(
                f"{len(session.tokens) + len(tokens)} tokens do not fit the context of {session.cache.n_context}; "
                "shorten the prompt or load the model with a larger context"
            )
        for at in range(0, len(tokens), chunk):
            part = list(tokens[at : at + chunk])
            self.step(part, session)
            yield len(part)

    def last_logits(self, n_rows: int) -> Floats:
        """Logits (n_vocab,) of the last of the `n_rows` tokens of the step just run; valid until the next call."""
        return self.device.head(n_rows - 1)[0]

    def logits(self, n_rows: int, first: int = 0) -> Iterator[Floats]:
        """Logits of the rows from `first` on of the step just run, some rows at a time; each valid until the next."""
        while first < n_rows:
            rows = self.device.head(first)  # (some, n_vocab)
            yield rows
            first += len(rows)
