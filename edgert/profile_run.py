"""Chunks of calibration text run through a loaded model, and what is looked at meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from edgert.corpus import Corpus
from edgert.devices.base import Device
from edgert.experts.moments import Moments
from edgert.experts.trace import Recorder, Trace
from edgert.loading import Parts
from edgert.pack_meter import Meter
from edgert.profile_journal import ProfileJournal
from edgert.types import Ids
from edgert.weights import Progress

_WARM_TOKENS, _GUESSED_TOKENS = 512, 256  # that predictors learn from, and whose experts they then guess


def tokens_meter(progress: Progress, doing: str, total: int, done: int = 0) -> Meter:
    """Tells how far a work over tokens is."""
    return Meter(progress, doing, total, done, speed=_tokens_per_second)


def _tokens_per_second(rate: float) -> str:
    return f"{rate:,.0f} tokens/s" if rate >= 10 else f"{rate:.1f} tokens/s"


def part_of(progress: Progress, first: float, last: float) -> Progress:
    """Progress of one part of a work, from one fraction of the whole to another."""
    return lambda stage, fraction: progress(stage, first + (last - first) * fraction)


def run_chunk(parts: Parts, tokens: list[int], observe: Callable[[int], None]) -> Iterator[int]:
    """Run a chunk from an empty context, with `observe` called in each layer; yields the tokens of each step."""
    engine, session = parts.engine, parts.session
    session.tokens.clear()
    engine.observe = observe
    try:
        yield from engine.prefill(tokens, session)
    finally:
        engine.observe = None


def run_chunks(parts: Parts, journal: ProfileJournal, corpora: Sequence[Corpus], progress: Progress) -> None:
    """Run the chunks that the journal has not, and add them to it."""
    chunk, chunks = journal.chunk, [(one.name, tokens) for one in corpora for tokens in one.tokens]
    total = len(chunks) * chunk
    meter = tokens_meter(progress, "profiling", total, len(journal.ids) * chunk)
    for name, tokens in chunks[len(journal.ids) :]:
        routes, done = _Routes(parts.engine.device, journal.moments), len(journal.ids) * chunk
        journal.begin()
        for n in run_chunk(parts, tokens, routes.observe):
            done += n
            if done % chunk == 0:
                journal.add(routes=routes.taken())
            meter.add(n, f"{name}, {done:,} of {total:,} tokens")  # it may raise


class _Routes:
    """The routes of one chunk, step by step and layer by layer."""

    def __init__(self, device: Device, moments: Moments) -> None:
        self._device, self._moments = device, moments
        n_layers, n_expert = moments.counts.shape
        self._id_type = np.uint8 if n_expert <= 256 else np.uint16
        self._ids: list[list[Any]] = [[] for _ in range(n_layers)]
        self._weights: list[list[Any]] = [[] for _ in range(n_layers)]

    def observe(self, layer: int) -> None:
        """See edgert.engine.Observer."""
        device = self._device
        routed = device.routed(layer)
        self._ids[layer].append(routed.routes.ids.astype(self._id_type))
        self._weights[layer].append(routed.routes.weights.astype(np.float16))
        self._moments.add(layer, routed, device.inputs(layer), device.hidden(layer))

    def taken(self) -> tuple[Any, Any]:
        """Ids and weights, (n_layers, n_tokens, top_k); zeros in layers without experts."""
        return _stacked(self._ids), _stacked(self._weights)


def _stacked(layers: list[list[Any]]) -> Any:
    joined = [np.concatenate(steps) if steps else None for steps in layers]
    some = next(layer for layer in joined if layer is not None)
    return np.stack([np.zeros_like(some) if layer is None else layer for layer in joined])


# ---- what predictors make of it --------------------------------------------------------------------------------------
def record_scores(
    parts: Parts, journal: ProfileJournal, corpora: Sequence[Corpus], model: str, sizes: Ids, progress: Progress
) -> tuple[Trace, int]:
    """A trace to measure predictors with, and how many of its tokens they are to learn from.

    The last tokens of it, some of each corpus, run one by one, because routers look ahead in a token's last row only.
    """
    engine, session, chunk = parts.engine, parts.session, journal.chunk
    n_guessed = min(max(_GUESSED_TOKENS // len(corpora), 16), chunk // 2)
    n_warm = min(max(_WARM_TOKENS // len(corpora), 16), chunk - n_guessed)
    recorder = Recorder(model, sizes, journal.ids[0].shape[2], most_bytes=1 << 30)
    meter = tokens_meter(progress, "measuring predictors", n_guessed * len(corpora))
    place, before = 0, engine.trace
    for one in corpora:
        warm = slice(chunk - n_guessed - n_warm, chunk - n_guessed)
        recorder.add(journal.ids[place][:, warm], journal.weights[place][:, warm])
        place += len(one.tokens)

    def record(device: Device) -> None:
        ids, weights = zip(*(device.chosen(layer) for layer in range(len(sizes))), strict=True)
        recorder.add(np.stack(ids), np.stack(weights), [device.ahead(layer) for layer in range(len(sizes))])

    for one in corpora:
        session.tokens.clear()
        for _ in engine.prefill(one.tokens[0][: chunk - n_guessed], session):
            pass
        engine.trace = record
        for token in one.tokens[0][chunk - n_guessed :]:
            engine.step([token], session)
            meter.add(1, one.name)
        engine.trace = before
    return recorder.trace(), n_warm * len(corpora)
