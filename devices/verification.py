"""Whether a device computes what the CPU device computes: every graph on the same inputs, and a prompt as a whole.

A device under test runs texts, and a witness notes what went into each layer and what came out. Then the CPU device
runs each layer, one at a time, on those very inputs: an error is that of one graph, not of all that came before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from edgert.devices.base import ExpertGroup, ExpertWeights, LayerWeights, Linear, Norm, Routed
from edgert.devices.buffers import aligned, round_up
from edgert.devices.cpu_parts import CpuAttention, CpuExperts
from edgert.devices.routing import pairs_reference
from edgert.devices.split import Seen
from edgert.quant.formats import F32, Matrix, PackedPart
from edgert.types import Floats, Ids, ModelConfig, Routes

# The most that a graph may be off, as a share of what it makes, in root mean squares. Inputs that are rounded to 8 bits
# differ in the last place, and by more where a provider lets more than 32 share a scale: of sound devices by up to 3 %.
ERRORS = {"f32": 1e-3, "int8": 5e-2}
# The most that a layer's rows, or those of them that one expert has, may be too large or small in their mean. Rounding
# goes either way: of sound devices it is at most 0.4 %, of those that do not round too. In the embedded model it finds
# 1 % of one projection of a layer's experts or of the head, 3 to 4 % of values or output, a quarter of one expert's.
GAINS = {"f32": 1e-3, "int8": 1e-2}
GAIN_ROWS = 8  # fewer are no mean
# The most that predictions for the prompt may diverge, in nats a token. Of inputs in 8 bits the last one turns with the
# order of a sum: experts of another device that are off by 0.006 % move the embedded model's predictions by 0.003, as
# far as rounding to 8 bits moves them at all. A mean over few tokens is worth little then: of 12 it may be 0.013.
DIVERGENCES = {"f32": 1e-4, "int8": 5e-3}
MISROUTED = 0.1  # most of the tokens that may go to other experts: those whose scores are nearly equal

PROMPT_TOKENS = 128  # that predictions are compared on
NOTED_TOKENS = 32  # of them, whose graphs are compared one by one
RANDOM_ROWS = 8  # of another text, likewise
LOGIT_ROWS = 8  # that are compared at a time: in float64 they take much memory


class Source(Protocol):
    """A model's weights, read as they are asked for."""

    def layer(self, index: int) -> LayerWeights: ...
    def expert(self, layer: int, index: int) -> ExpertWeights: ...
    def head(self) -> tuple[Norm, Linear]: ...
    def rope_divisors(self) -> Floats | None: ...


@dataclass
class Step:
    """A step of a text on the device under test: the rows it began with, what its layers made, and the head."""

    embeddings: Floats  # (n, d_model)
    layers: list[Seen]  # empty: not noted, only its predictions are compared
    last: Floats  # (n, d_model), what the head was given
    logits: Floats  # (n, n_vocab)


Text = Sequence[Step]


@dataclass(frozen=True)
class Findings:
    """errors: the largest of each kind of graph, as a share; gains: likewise, by what a layer or an expert is too
    large. divergence: nats a token. misrouted: a share of tokens."""

    errors: dict[str, float]
    gains: dict[str, float]
    divergence: float
    misrouted: float

    def problems(self, activations: str) -> list[str]:
        """What is beyond its bound, with the figure; empty if nothing is."""
        bound, even, most = ERRORS[activations], GAINS[activations], DIVERGENCES[activations]
        wrong = [
            f"{kind} is off by {100 * error:.3g} % (at most {100 * bound:g} %)"
            for kind, error in self.errors.items()
            if not error <= bound
        ]
        wrong += [
            f"{kind} is {100 * abs(gain):.3g} % too {'large' if gain > 0 else 'small'} (at most {100 * even:g} %)"
            for kind, gain in self.gains.items()
            if not abs(gain) <= even
        ]
        if not self.divergence <= most:
            wrong.append(f"predictions diverge by {self.divergence:.3g} nats a token (at most {most:g})")
        if not self.misrouted <= MISROUTED:
            wrong.append(f"{self.misrouted:.0%} of the tokens go to other experts (at most {MISROUTED:.0%})")
        return wrong


def compare(
    texts: Sequence[Text],
    config: ModelConfig,
    source: Source,
    *,
    kv_type: str,
    activations: str,
    threads: int | None,
    attention: bool = True,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Findings:
    """Run on the CPU device what was noted of texts; the first is the prompt that is compared as a whole, too.

    attention: whether attention and head are under test, not only routed experts.
    """
    replay = _Replay(texts, config, source, kv_type, attention, {"activations": activations, "threads": threads})
    for layer in range(config.n_layers):
        progress(layer / config.n_layers)
        replay.layer(layer)
    return replay.findings()


class _Replay:
    """The CPU device, a layer at a time."""

    def __init__(
        self,
        texts: Sequence[Text],
        config: ModelConfig,
        source: Source,
        kv_type: str,
        attention: bool,
        options: dict[str, Any],
    ) -> None:
        self._with_attention = attention
        self._texts, self._config, self._source, self._kv_type = texts, config, source, kv_type
        self._own = np.concatenate([step.embeddings for step in texts[0]])  # the prompt, as the CPU device has it
        self._noted = [[step for step in text if step.layers] for text in texts]
        self._n_context = max(sum(len(step.embeddings) for step in text) for text in texts)
        self._options = options | {"chunk": self._n_context}
        self._errors: dict[str, float] = {}
        self._gains: dict[str, float] = {}
        self._rows: dict[str, Any] = {}  # (2, n): sum and number of gains of rows, of a layer or of each expert
        self._misrouted: list[bool] = []
        self._divergence = 0.0

    def layer(self, index: int) -> None:
        """One layer, on all that was noted of it, and on the prompt's own stream."""
        last = index == self._config.n_layers - 1
        norm, head = self._source.head() if last else _no_head(self._config)
        layers = (self._config.layer(index),) if self._config.layers else ()
        config = replace(self._config, n_layers=1, n_vocab=head.matrix.shape[0], layers=layers)
        divisors = self._source.rope_divisors()
        cpu = CpuAttention(config, self._n_context, rope_divisors=divisors, **self._options)
        try:
            cpu.add_layer(self._source.layer(index))
            cpu.set_head(norm, head)
            noted = [self._attended(cpu, [step.layers[index].before for step in text]) for text in self._noted]
            own = self._attended(cpu, [self._own])
            for text, rights in zip(self._noted, noted, strict=True):
                for step, right in zip(text, rights, strict=True):
                    self._attention_errors(step.layers[index], right)
            total = self._experts(index, [step.layers[index] for text in self._noted for step in text] + own)[-1]
            self._own = own[0].after
            if total is not None:
                self._own = self._own + np.float32(config.residual_scale) * total
            if last:
                self._heads(cpu)
            self._end_layer()
        finally:
            cpu.close()

    def _attended(self, cpu: CpuAttention, rows: Sequence[Floats]) -> list[Seen]:
        """What the layer makes of a text's rows, step by step, but for its routed experts."""
        cache, start, found = cpu.new_cache(self._n_context, self._kv_type), 0, []
        for before in rows:
            cpu.begin(before)
            seen = Seen(before)
            seen.routes = _copied(cpu.attend(0, cache, start, 0))
            if seen.routes is not None:
                seen.inputs = cpu.inputs().copy()
                cpu.take(np.zeros_like(before))
            seen.after = cpu.state()
            found.append(seen)
            start += len(before)
        return found

    def _attention_errors(self, found: Seen, right: Seen) -> None:
        if not self._with_attention:
            return
        self._note("attention", found.after - found.before, right.after - right.before)
        if found.routes is None or right.routes is None or found.inputs is None or right.inputs is None:
            return
        self._note_error("attention", found.inputs, right.inputs)
        same = (np.sort(found.routes.ids, axis=1) == np.sort(right.routes.ids, axis=1)).all(axis=1)
        self._misrouted += (~same).tolist()
        if same.any():
            self._note("router", found.routes.weights[same], right.routes.weights[same])

    def _experts(self, index: int, noted: list[Seen]) -> list[Floats | None]:
        """The experts' sums for all of these, each expert read once; notes the errors of those that have sums too."""
        if self._config.router is None or not self._config.has_experts(index):
            return [None] * len(noted)
        inputs = np.concatenate([seen.inputs for seen in noted if seen.inputs is not None])
        routes = [seen.routes for seen in noted if seen.routes is not None]
        ids, weights = np.concatenate([r.ids for r in routes]), np.concatenate([r.weights for r in routes])
        n_expert = self._config.router.n_expert
        routed = Routed(Routes(ids, weights, np.argsort(ids, axis=1)), *pairs_reference(ids, n_expert))
        experts = CpuExperts(self._config, **(self._options | {"chunk": len(inputs)}))
        try:
            table = experts.new_table(n_expert)
            used = np.flatnonzero(routed.first[1:] > routed.first[:-1])
            parts = {expert: _parts(self._source.expert(index, expert)) for expert in used.tolist()}
            record = aligned(max(part[-1].offset + part[-1].n_bytes for part in parts.values()))
            for expert, described in parts.items():
                experts.place_expert(table, expert, described, record)
            experts.start(table, inputs, routed)
            for expert, described in parts.items():  # one at a time: a layer's experts take much memory
                source = self._source.expert(index, expert)
                for part, matrix in zip(described, (source.gate, source.up, source.down), strict=True):
                    matrix.pack(record[part.offset : part.offset + part.n_bytes])
                experts.experts(ExpertGroup(np.array([expert])))
            ends = np.cumsum([len(r.ids) for r in routes])[:-1]
            totals = np.split(experts.total().copy(), ends)
        finally:
            experts.close()
        for seen, total in zip(noted, totals, strict=True):
            if seen.total is not None:
                assert seen.routes is not None
                self._note("experts", seen.total, total, seen.routes.ids)
        return list(totals)

    def _heads(self, cpu: CpuAttention) -> None:
        """The head on what it was given on the device; and on the prompt's own stream."""
        for text in self._noted if self._with_attention else ():
            for step in text:
                for first, right in _logits(cpu, step.last):
                    self._note("head", step.logits[first : first + len(right)], right)
        found = [rows for step in self._texts[0] for rows in step.logits]
        for first, rows in _logits(cpu, self._own):
            right = _log_shares(rows)
            other = _log_shares(np.array(found[first : first + len(rows)]))
            self._divergence += float((np.exp(right) * (right - other)).sum()) / len(self._own)

    def _note(self, kind: str, found: Floats, right: Floats, ids: Ids | None = None) -> None:
        """Keep an error, and for the layer's end by what rows are too large; ids (n, top_k): whose, of experts."""
        self._note_error(kind, found, right)
        wide, n = right.astype(np.float64), self._config.router.n_expert if self._config.router else 0
        layer = np.full((len(wide), 1), n)  # behind the experts, all rows
        ids = layer if ids is None else np.concatenate((ids, layer), axis=1)
        square = np.square(wide).sum(axis=1)
        rows = square > 0
        gains, counts = self._rows.setdefault(kind, np.zeros((2, n + 1)))
        np.add.at(gains, ids[rows], ((found * wide).sum(axis=1)[rows] / square[rows] - 1)[:, None])
        np.add.at(counts, ids[rows], 1)

    def _note_error(self, kind: str, found: Floats, right: Floats) -> None:
        """Keep the error of a graph if it is its kind's largest."""
        error = float(np.sqrt(np.mean(np.square(found.astype(np.float64) - right))))
        scale = float(np.sqrt(np.mean(np.square(right.astype(np.float64)))))
        error = error / scale if scale else error
        self._errors[kind] = max(self._errors.get(kind, 0.0), error if np.isfinite(error) else np.inf)

    def _end_layer(self) -> None:
        """Keep what a layer's values, or an expert's, are too large or small by, if it is its kind's most."""
        for kind, (sums, counts) in self._rows.items():
            enough = counts >= GAIN_ROWS
            gains = sums[enough] / counts[enough]
            most = max([self._gains.get(kind, 0.0), *np.nan_to_num(gains, nan=np.inf).tolist()], key=abs)
            self._gains[kind] = most
        self._rows.clear()

    def findings(self) -> Findings:
        """What came of it."""
        misrouted = float(np.mean(self._misrouted)) if self._misrouted else 0.0
        divergence = self._divergence if np.isfinite(self._divergence) else np.inf
        return Findings(self._errors, self._gains, divergence, misrouted)


def _parts(weights: ExpertWeights) -> tuple[PackedPart, ...]:
    """Where an expert's matrices lie in a record."""
    parts, offset = list[PackedPart](), 0
    for matrix in (weights.gate, weights.up, weights.down):
        parts.append(PackedPart(matrix.format, matrix.shape, offset))
        offset += round_up(parts[-1].n_bytes, 64)
    return tuple(parts)


def _copied(routes: Routes | None) -> Routes | None:
    return None if routes is None else Routes(routes.ids.copy(), routes.weights.copy(), routes.order.copy())


def _logits(cpu: CpuAttention, rows: Floats) -> Iterator[tuple[int, Floats]]:
    """What the head makes of the residual stream (n, d_model): (row, logits) of some at a time, until the next."""
    cpu.begin(rows)
    first = 0
    while first < len(rows):
        found = cpu.head(first)
        for at in range(0, len(found), LOGIT_ROWS):
            yield first + at, found[at : at + LOGIT_ROWS]
        first += len(found)


def _log_shares(logits: Floats) -> Any:
    """Logarithms of probabilities, float64 (n, n_vocab)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _no_head(config: ModelConfig) -> tuple[Norm, Linear]:
    """A head that nobody asks."""
    return Norm(np.ones(config.d_model, np.float32)), Linear(Matrix(F32, np.zeros((1, config.d_model), np.float32)))
