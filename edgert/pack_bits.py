"""Packing with bits chosen per expert: solve, quantise, pack, measure; and again where the bound on loss was missed.

The bundle is proved before it gets its name. What was quantised is kept until then, so that the next attempt, or a pack
that goes on after a kill, quantises only what is new.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgert import perplexity
from edgert.allocating import Problem, Solution
from edgert.bits import AS_SOURCE, PROJECTIONS, Bits, expert_shapes, hot_format
from edgert.edgemoe import low_bits, try_alone
from edgert.errors import OptionError
from edgert.experts.allocation import Mask
from edgert.experts.edgemoe import choose_low
from edgert.experts.profile import Profile
from edgert.experts.profiled_choice import bundle_choice, choice_bytes
from edgert.experts.speed_allocation import routes_to_replay
from edgert.goal import Goal
from edgert.loading import context_of
from edgert.model_digest import model_digest
from edgert.pack import Packed, Packing, open_source, pack_locked, storage_errors, write_durably
from edgert.pack_place import Place
from edgert.profiling import default_out as default_profile
from edgert.profiling import profile_model
from edgert.proof import Proof, check, prove
from edgert.quant.formats import FORMATS, Format
from edgert.quantising import Bench, make_tiles, measure_sensitivity, reader, text_digest, weights_of
from edgert.requantised import RequantisedSource
from edgert.storage import bundle as bundles
from edgert.storage.tensor_file import TensorFile
from edgert.tier import tier_for
from edgert.tile_store import TileStore
from edgert.types import ModelConfig
from edgert.weights import Progress, Weights

_ATTEMPTS = 6
_CLOSE = 0.85  # of the bound: nearer than that, a smaller bundle is not sought
_REPLAYED_TOKENS = 4000  # of the profile's routes, for speed
_TOKENS, _HELD_OUT = 20_000, 0.2  # of a profile that is made here; half of what is kept back selects, half proves
_CAUTION = 0.95  # of the loss that the last measurement lets expect


@dataclass(frozen=True)
class Request:
    """A pack with chosen bits.

    text: what to prove on, unseen by calibration, and its name; None takes what the profile kept back. options:
    keywords of edgert.load.
    """

    source: Path
    out: Path
    profile: Profile
    goal: Goal
    text: str | None = None
    text_name: str = ""
    dask: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def asked(self) -> dict[str, Any]:
        """What a bundle is compared with, to know whether it is the one that is asked for."""
        return {**self.goal.as_document(), "profile": text_digest(self.profile)}


@dataclass(frozen=True)
class PackedBits:
    """What came of it. proof, never_routed: None and empty where the bundle was there already."""

    packed: Packed
    bits: Mapping[str, Any]  # as the manifest has it
    proof: Proof | None
    never_routed: Sequence[tuple[int, int]]  # layer and number of experts that stay at four bits

    def lines(self) -> Iterator[str]:
        """What a person should know of it."""
        size, quantiser = self.bits["bits_per_weight"], self.bits["quantiser"]
        yield f"experts: {size:.2f} bits per weight, scales counted ({quantiser})"
        if self.proof is not None:
            yield from self.proof.lines()
        if self.never_routed:
            some = ", ".join(f"{expert} of layer {layer}" for layer, expert in self.never_routed[:5])
            more = f" and {len(self.never_routed) - 5} more" if len(self.never_routed) > 5 else ""
            yield f"never routed to in the profile's text, and so kept at four bits: expert {some}{more}"


def pack_bits(request: Request, progress: Progress) -> PackedBits:
    """Pack a model with the bits that its goal asks for, proved.

    Raises OptionError for a profile of another model or a goal that cannot be reached, with the figures, and what
    packing and loading raise. What is done when it is interrupted is kept.
    """
    started = time.perf_counter()
    with contextlib.closing(open_source(request.source, keep_pages=False)) as file, storage_errors(request.out):
        if request.profile.digest != model_digest(file):
            raise OptionError(
                f"the profile is of another model than {request.source} (it knows "
                f"{request.profile.model.partition(' ModelConfig')[0]}): make one of this model with `edgert profile`"
            )
        run = _Run(request, file, progress)
        written, resumed = pack_locked(file, request.source, request.out, request.asked(), progress, run.fill)
        n_bytes, seconds = bundles.size(request.out), time.perf_counter() - started
        packed = Packed(request.out, n_bytes, written, resumed, seconds, run.inexact)
    return PackedBits(packed, bundles.read_manifest(request.out).bits, run.proof, run.never_routed)


class _Run:
    """One pack, from the first solution to the one that holds what was asked."""

    def __init__(self, request: Request, file: TensorFile, progress: Progress) -> None:
        self._request, self._file, self._progress = request, file, progress
        self._goal, self._profile = request.goal, request.profile
        self._bench = Bench(request.source, work_of(request.out), progress, request.dask, request.options)
        self.proof: Proof | None = None
        self.never_routed: list[tuple[int, int]] = []
        self.inexact: dict[str, str] = {}

    def fill(self, place: Place) -> tuple[int, int]:
        """Fill and publish the place of the bundle."""
        with self._bench.model() as model:
            self._model, self._weights = model, weights_of(model)
            self._hot = hot_format(self._goal.hot) if self._goal.hot else None
            quantiser = self._goal.quantiser
            self._store = TileStore(self._bench.work / f"tiles-{quantiser}", [text_digest(self._profile), quantiser])
            self._states = self._bench.states(model, self._profile)
            if self._goal.loss is None or self._goal.format is not None:
                written = self._attempt(place, self._sized(place))
            else:
                choose = self._as_edgemoe if self._goal.method == "edgemoe" else self._within_loss
                written = choose(place, self._goal.loss)
            self._finish(place)
        return written

    # ---- solutions ---------------------------------------------------------------------------------------------------
    def _problem(self) -> Problem:
        sensitivity = self._profile.sensitivity
        if sensitivity is None or sensitivity.quantiser != self._goal.quantiser:
            sensitivity = measure_sensitivity(self._bench, self._profile, self._goal.quantiser)
        problem = Problem(sensitivity, self._weights.config, self._hot)
        self.never_routed = problem.never_routed
        return problem

    def _sized(self, place: Place) -> Bits:
        """The formats for a size, or the one format for all."""
        config, goal = self._weights.config, self._goal
        if goal.format is not None:
            return uniform(FORMATS[goal.format], config, hot=self._hot, quantiser=goal.quantiser)
        problem = self._problem()
        if goal.bits_per_weight is not None:
            return problem.within_bytes(int(goal.bits_per_weight * problem.n_weights / 8)).bits
        assert goal.n_bytes is not None
        smallest = Packing(self._file, self._progress, self._source(problem.smallest().bits))
        m = smallest.manifest
        self._profile.save(self._bench.work / bundles.PROFILE)
        rest = m.hot_bytes + m.metadata_bytes + 2 * len(m.as_text())  # a proof is to come
        rest += choice_bytes(m.record_bytes) + (self._bench.work / bundles.PROFILE).stat().st_size
        return problem.within_records(goal.n_bytes - rest).bits

    def _within_loss(self, place: Place, bound: float) -> tuple[int, int]:
        """Attempts at the smallest bundle whose measured rise of perplexity stays within the bound."""
        problem, written = self._problem(), (0, 0)
        solve = self._fastest(problem) if self._goal.objective == "speed" else problem.within_loss
        expected, best = math.log1p(bound), None
        tried: list[str] = []
        for _ in range(_ATTEMPTS):
            try:
                found = solve(expected)
            except OptionError:
                found = problem.largest()
            written = self._attempt(place, found.bits)
            worst = self._worst()
            tried.append(f"{8 * found.n_bytes / problem.n_weights:.2f} bits: {worst:.2%}")
            self._progress(f"attempt {len(tried)}: {tried[-1]} at most", 1.0)
            if worst <= bound:
                best = found
                if worst >= _CLOSE * bound or found.n_bytes <= problem.smallest().n_bytes:
                    return written
            elif found.n_bytes >= problem.most_bytes:
                break
            rise = max(math.log1p(max(worst, -0.5)), 1e-6)
            expected *= min(max(_CAUTION * math.log1p(bound) / rise, 0.05), 20.0)
        if best is None:
            raise OptionError(
                f"--loss {bound:.2%} cannot be reached; bits per weight, and rise of perplexity with its standard "
                f"error: {', '.join(tried)}; allow more, or calibrate on more text"
            )
        return self._attempt(place, best.bits)

    def _as_edgemoe(self, place: Place, bound: float) -> tuple[int, int]:
        """The most experts of two bits, the least sensitive ones, that keep the bound; see edgemoe."""
        from edgert.trial import Trial

        quantiser, tried = self._goal.quantiser, list[tuple[int, tuple[int, int]]]()

        def measure(low: Mask) -> float:
            tried.append((int(low.sum()), self._attempt(place, low_bits(low, quantiser, self._hot))))
            return self._worst()

        with Trial(self._model) as trial:
            parts = self._bench, self._weights, self._states, self._profile, self._store
            alone = try_alone(*parts, trial, quantiser).loss
        low = choose_low(alone, measure, bound).low
        if tried[-1][0] != int(low.sum()):
            measure(low)
        return tried[-1][1]

    def _worst(self) -> float:
        """The rise of perplexity that was measured, and a standard error."""
        assert self.proof is not None
        return self.proof.comparison.increase + self.proof.comparison.standard_error

    def _fastest(self, problem: Problem) -> Callable[[float], Solution]:
        """What solves for speed on this machine's flash, in the memory of the goal."""
        assert self._goal.memory is not None
        source, config = self._source(problem.smallest().bits), self._weights.config
        weights = Weights(self._file, config, source=source)
        n_context = context_of(self._request.options.get("context"), config)
        tier = tier_for(weights, self._goal.memory, self._request.out.parent, n_context)
        trace = routes_to_replay(self._profile, _REPLAYED_TOKENS)
        return lambda loss: problem.fastest(trace, tier, loss, self._progress)

    # ---- one attempt -------------------------------------------------------------------------------------------------
    def _source(self, bits: Bits) -> RequantisedSource:
        return RequantisedSource(self._file, bits, reader(bits, self._store))

    def _attempt(self, place: Place, bits: Bits) -> tuple[int, int]:
        """Quantise, pack and measure; the bytes written, and those that were there."""
        make_tiles(self._bench, self._weights, self._states, bits, self._store)
        packing = Packing(self._file, self._progress, self._source(bits))
        packing.manifest.bits = {"asked": self._request.asked(), **described(bits, self._weights.config)}
        written = packing.fill(place)
        self._manifest, self.inexact = packing.manifest, packing.inexact
        self.proof = self._prove(place.path)
        return written

    def _prove(self, bundle: Path) -> Proof:
        from edgert.model import load

        chunks, name = held_out_chunks(self._profile), "text that the profile kept back"
        if self._request.text is not None:
            tokenizer, name = self._model.tokenizer, self._request.text_name
            bos = tokenizer.bos_id if tokenizer.add_bos else None
            chunks = perplexity.chunks(tokenizer.encode(self._request.text), self._profile.chunk, None, bos)
        with load(bundle, progress=self._progress, **self._request.options) as candidate:
            return prove(self._model, candidate, chunks, name, self._progress, checks=False)

    def _finish(self, place: Place) -> None:
        """Say what was measured, add the profile, and give the bundle its name."""
        from edgert.model import load

        assert self.proof is not None
        with load(place.path, progress=self._progress, **self._request.options) as candidate:
            self.proof = check(self.proof, self._model, candidate, self._progress)
        self._manifest.proof = self.proof.as_document()
        self._profile.save(place.path / bundles.PROFILE)
        self._progress("replaying the profile's routes", 1.0)
        write_durably(place.path / bundles.CHOICE, bundle_choice(self._profile, self._manifest.record_bytes))
        write_durably(place.path / bundles.MANIFEST, self._manifest.as_text().encode())
        place.publish()
        self._bench.remove()


def profile_for(source: Path, out: Path, given: Path | None, progress: Progress, options: Mapping[str, Any]) -> Profile:
    """The profile that is given, or lies beside the model or the bundle to be; else one that is made now.

    That is of text that the model writes, and is kept beside the bundle: the next pack, with another goal, finds it.
    """
    beside = out.with_name(f"{out.name.removesuffix('.edge')}.profile.npz")
    for path in (given, default_profile(source), beside):
        if path is not None and (path is given or path.exists()):
            return Profile.load(path)
    progress(f"no profile is given: the model writes text to calibrate on, kept in {beside}", 0.0)
    made = profile_model(source, beside, n_tokens=_TOKENS, held_out=_HELD_OUT, progress=progress, **options)
    return made.profile


def work_of(out: Path) -> Path:
    """Where what is under way is kept for a bundle or profile."""
    return out.with_name(f"{out.name}.work")


def held_out_chunks(profile: Profile) -> list[list[int]]:
    """What a profile kept back, in chunks."""
    return [chunk for domain in profile.domains for chunk in domain.held_out.reshape(-1, profile.chunk).tolist()]


def uniform(format: Format, config: ModelConfig, **others: Any) -> Bits:
    """One format for all experts, and where rows are too short for it the nearest that fits."""
    assert config.router is not None
    names = [format, *(FORMATS[name] for name in (f"int{format.bits}", "int4"))]
    wide, narrow = (next(f for f in names if n_in % f.block == 0) for n_in in (config.d_model, config.d_expert))
    choice = np.zeros((config.n_layers, config.router.n_expert, len(PROJECTIONS)), np.int64)
    choice[:, :, PROJECTIONS.index("down")] = int(narrow is not wide)
    return Bits((wide, narrow), choice, **others)


def described(bits: Bits, config: ModelConfig) -> dict[str, Any]:
    """What a manifest says of the bits, beside what was asked; of what is quantised."""
    shapes, chosen = expert_shapes(config), bits.choice != AS_SOURCE
    sizes = np.array([[format.matrix_bytes(*shape) for format in bits.formats] for shape in shapes])
    n_bytes = sum(int(sizes[place, bits.choice[chosen[..., place], place]].sum()) for place in range(len(shapes)))
    n_weights = int(chosen.sum()) * math.prod(shapes[0])
    hot = "" if bits.hot is None else bits.hot.name
    size = round(8 * n_bytes / n_weights, 4)
    return {"quantiser": bits.quantiser, "hot": hot, "bytes": n_bytes, "bits_per_weight": size}
