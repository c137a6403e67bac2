"""Packing with bits chosen per expert: solve, quantise, pack, measure; and again where the bound on loss was missed.

The bundle is proved before it gets its name. What was quantised is kept until then, so that the next attempt, or a pack
that goes on after a kill, quantises only what is new.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from edgert import chosen_bits
from edgert.allocating import Problem, Solution
from edgert.architectures import read_config
from edgert.bits import Bits, described, hot_format, kept_words, uniform
from edgert.divergence import Rise, rise, token_losses
from edgert.edgemoe import low_bits, try_alone
from edgert.errors import OptionError
from edgert.experts.allocation import Mask
from edgert.experts.edgemoe import choose_low
from edgert.experts.speed_allocation import Tier, routes_to_replay
from edgert.loss_search import Search
from edgert.pack import (
    Packed,
    Packing,
    add_profile,
    check_profile,
    open_source,
    pack_locked,
    storage_errors,
    write_durably,
)
from edgert.pack_place import Place
from edgert.pack_request import Request as Request
from edgert.pack_request import profile_for as profile_for
from edgert.pack_sizes import Sizes
from edgert.proof import Proof, check, prove
from edgert.quant.formats import FORMATS
from edgert.quantising import (
    Bench,
    make_tiles,
    measure_sensitivity,
    reader,
    weights_of,
)
from edgert.requantised import RequantisedSource
from edgert.storage import bundle as bundles
from edgert.storage.tensor_file import TensorFile
from edgert.tensor_views import skipped
from edgert.weights import Progress
from edgert.work_folder import work_of

_PROOFS = 3  # of ever smaller expected losses, where other text missed a bound that was kept where bits were chosen
_LEAST_LOWERED, _MOST_LOWERED = 0.7, 0.05  # factors of what is expected from one of them to the next
_REPLAYED_TOKENS = 4000  # of the profile's routes, for speed


@dataclass(frozen=True)
class PackedBits:
    """What came of it, now or when the bundle that is there was packed. bits: as the manifest has it."""

    packed: Packed
    bits: Mapping[str, Any]
    proof: Proof

    def lines(self) -> Iterator[str]:
        """What a person should know of it."""
        size, quantiser = self.bits["bits_per_weight"], self.bits["quantiser"]
        yield f"experts: {size:.2f} bits per weight, scales counted ({quantiser})"
        yield from chosen_bits.lines(self.bits)
        yield from self.proof.lines(self.bits["asked"].get("loss"))


def pack_bits(request: Request, progress: Progress) -> PackedBits:
    """Pack a model with the bits that its goal asks for, proved.

    Raises OptionError for a profile of another model, too little text to prove on, or a goal that cannot be reached,
    with the figures, and what packing and loading raise. What is done when it is interrupted is kept.
    """
    started, out = time.perf_counter(), request.out
    with contextlib.closing(open_source(request.source, keep_pages=False)) as file, storage_errors(out):
        check_profile(request.profile, file, request.source)
        run = _Run(request, file, progress)
        written, resumed = pack_locked(file, request.source, out, request.asked(), progress, run.fill)
        seconds = time.perf_counter() - started
        packed = Packed(out, bundles.size(out), written, resumed, seconds, run.inexact, run.skipped)
    manifest = bundles.read_manifest(out)
    return PackedBits(packed, manifest.bits, Proof.from_document(manifest.proof, f"{out}: its proof"))


class _Run:
    """One pack, from the first solution to the one that holds what was asked; what needs no weights is checked now."""

    def __init__(self, request: Request, file: TensorFile, progress: Progress) -> None:
        self._request, self._file, self._progress = request, file, progress
        self._goal, self._profile = request.goal, request.profile
        self._bench = Bench(request.source, work_of(request.out), progress, request.dask, request.options)
        self._hot = hot_format(self._goal.hot) if self._goal.hot else None
        self._text = request.proof_text(file)
        self._said: dict[str, Any] = {}  # of the bits that are packed, for the manifest
        self._packed = ""  # digest of the bits in the place of the bundle
        self._rises: dict[str, Rise] = {}  # measured, by digest of the bits
        self._tried: list[str] = []
        self.inexact: dict[str, str] = {}
        self._config = read_config(file.metadata, str(file.path))
        self.skipped = skipped(self._config)
        if kept := kept_words(self._config):
            self._said["kept"] = kept
        self._sizes = Sizes(file, self._config, self._goal, self._hot)
        self._sizes.check(self._profile)
        self._tier: Tier | None = None
        if found := self._sizes.tier(self._profile, request.out.absolute().parent, request.options):
            self._tier, self._said["flash"] = found
            progress(f"flash of {self._said['flash']}", 0.0)

    def fill(self, place: Place) -> tuple[int, int]:
        """Fill and publish the place of the bundle."""
        self._store = self._bench.store(f"tiles-{self._goal.quantiser}", self._profile, self._goal.quantiser)
        self._measure_first()
        with self._bench.model() as model:
            self._model, self._weights = model, weights_of(model)
            self._states = self._bench.states(model, self._profile)
            if self._goal.loss is not None:
                self._proved_within(place, self._goal.loss)
            else:
                self._pack(place, self._uniform() if self._goal.format is not None else self._sized())
                self._proof = self._prove(place)
            self._finish(place)
        return self._written

    def _measure_first(self) -> None:
        """What takes models of its own in RAM, before the one that the result is held against is there."""
        from edgert.trial import Trial

        bench, goal = self._bench, self._goal
        if goal.loss is not None and goal.method == "edgemoe":
            with bench.model() as model:
                states = bench.states(model, self._profile)
            with bench.model(exact=True) as model, Trial(model) as trial:
                parts = bench, weights_of(model), states, self._profile, self._store
                self._alone = try_alone(*parts, trial, goal.quantiser).loss
        elif goal.format is None and self._sizes.measured(self._profile) is None:
            found = measure_sensitivity(bench, self._profile, goal.quantiser)
            self._profile = self._profile.with_sensitivity(found)  # the bundle's has it, then

    # ---- solutions ---------------------------------------------------------------------------------------------------
    def _problem(self) -> Problem:
        found = self._sizes.measured(self._profile)
        assert found is not None, "it was measured first"
        if not found.is_measured:
            self._said["assumed"] = "layers are alike in what errors cost, as not all experts were in RAM"
        return self._sizes.problem(self._profile)

    def _uniform(self) -> Bits:
        """The one format for all."""
        assert self._goal.format is not None
        asked = FORMATS[self._goal.format]
        bits = uniform(asked, self._weights.config, hot=self._hot, quantiser=self._goal.quantiser)
        wide, narrow = (format.name for format in bits.formats)
        if "kept" in self._said:
            narrow = asked.name  # it is not used
        if {wide, narrow} != {asked.name}:
            self._said["instead"] = (
                f"gate and up are {wide}, down is {narrow}: {asked.name} takes rows of a multiple of {asked.block}"
            )
        self._unknown("quantised knowing nothing of what they are given")
        return bits

    def _sized(self) -> Bits:
        """The formats of the least loss within a size."""
        problem, goal = self._problem(), self._goal
        if goal.bits_per_weight is not None:
            found = problem.within_bytes(int(goal.bits_per_weight * problem.n_weights / 8))
        else:
            assert goal.n_bytes is not None
            found = problem.within_records(goal.n_bytes, self._sizes.beside(self._profile, problem.smallest().bits))
        least, loss = f"{found.bound:.4g}", f"{found.loss:.4g}"
        self._said["optimum"] = f"expected to lose {loss} nats a token, " + (
            f"the least that these formats can in {found.n_bytes:,} bytes of experts"
            if least == loss
            else f"and no choice of these formats in {found.n_bytes:,} bytes of experts less than {least}"
        )
        self._unknown("so kept at four bits")
        return found.bits

    def _proved_within(self, place: Place, bound: float) -> None:
        """Pack the smallest bundle that keeps the bound where bits are chosen, until one keeps it where it is proved.

        There a standard error is allowed on top: that a text which was not chosen by says more is as likely as that it
        says less, and bits are chosen with a standard error to spare.
        """
        choose = self._by_edgemoe(place, bound) if self._goal.method == "edgemoe" else self._by_search(place, bound)
        share, proved = 1.0, set[str]()
        for _ in range(_PROOFS):
            if (bits := choose(share)) is None or bits.digest() in proved:
                break
            proved.add(bits.digest())
            self._pack(place, bits)
            self._proof = self._prove(place)
            found = self._proof.comparison
            if found.increase <= bound + found.standard_error:
                return
            self._tried.append(f"{found.increase:+.2%} +/- {found.standard_error:.2%} where it is proved")
            share = min(max(bound / found.increase, _MOST_LOWERED), _LEAST_LOWERED)
        raise OptionError(
            f"--loss {100 * bound:g}% cannot be reached; bits per weight, and rise of perplexity with its standard "
            f"error: {', '.join(self._tried)}; allow more, or profile more text"
        )

    def _by_search(self, place: Place, bound: float) -> Callable[[float], Bits | None]:
        """Chooses the smallest or fastest within a bound that is expected to lose a share of the one chosen before."""
        problem = self._problem()
        solve = self._fastest(problem) if self._goal.objective == "speed" else problem.within_loss
        largest, smallest = problem.largest(), problem.smallest()
        self._unknown("so kept at four bits")

        def measure(found: Solution) -> Rise:
            risen = self._measure(place, found.bits)
            words = f"{8 * found.n_bytes / problem.n_weights:.2f} bits: {risen.increase:+.2%}"
            self._tell(f"{words} +/- {risen.standard_error:.2%}")
            return risen

        most = math.inf

        def choose(share: float) -> Bits | None:
            nonlocal most
            found = Search(solve, largest, smallest, measure).go(bound, share * most)
            if found is None:
                return None
            most = found.loss
            if found is largest:
                self._said["optimum"] = "the least loss that the formats reach"
            elif found.seconds is None:
                self._said["optimum"] = (
                    f"no choice of these formats that is expected to lose as little takes less than {found.bound:,.0f} "
                    f"bytes of experts; this one {found.n_bytes:,}"
                )
            else:
                milliseconds = 1e3 * found.seconds
                self._said["optimum"] = (
                    f"experts are expected to take {milliseconds:.3g} ms a token where none is read ahead"
                )
            return found.bits

        return choose

    def _by_edgemoe(self, place: Place, bound: float) -> Callable[[float], Bits | None]:
        """Chooses the most experts of two bits, the least sensitive ones, that keep a bound; see edgemoe.

        Of the number that was chosen before a share at most.
        """
        self._unknown("so kept at four bits")

        def measure(low: Mask) -> float:
            risen = self._measure(place, self._low(low))
            self._tell(f"{int(low.sum()):,} experts of two bits: {risen.increase:+.2%} +/- {risen.standard_error:.2%}")
            return risen.increase + risen.standard_error

        most = self._alone.size

        def choose(share: float) -> Bits:
            nonlocal most
            low = choose_low(self._alone, measure, bound, int(share * most)).low
            most = int(low.sum())
            return self._low(low)

        return choose

    def _low(self, low: Mask) -> Bits:
        """Two bits for these experts, four for the others."""
        return low_bits(low, self._goal.quantiser, self._hot).where_they_fit(self._config)

    def _tell(self, tried: str) -> None:
        if tried not in self._tried:
            self._tried.append(tried)
            self._progress(f"attempt {len(self._tried)}: {tried}", 1.0)

    def _unknown(self, what: str) -> None:
        """Say which experts nothing is known of, and what became of them."""
        if unused := chosen_bits.never_routed(self._profile):
            self._said |= {"never_routed": unused, "unknown": what}

    def _fastest(self, problem: Problem) -> Callable[[float], Solution]:
        """What solves for speed on this machine's flash, in the memory of the goal."""
        tier = self._tier
        assert tier is not None
        trace = routes_to_replay(self._profile, _REPLAYED_TOKENS)
        return lambda loss: problem.fastest(trace, tier, loss, self._progress)

    # ---- one attempt -------------------------------------------------------------------------------------------------
    def _source(self, bits: Bits) -> RequantisedSource:
        return RequantisedSource(self._file, bits, reader(bits, self._store))

    def _pack(self, place: Place, bits: Bits) -> None:
        """Quantise and pack, unless that is what the place holds."""
        if self._packed == bits.digest():
            return
        self._packed = ""
        make_tiles(self._bench, self._weights, self._states, bits, self._store)
        made = hashlib.sha256(f"{self._store.header} {bits.digest()}".encode()).hexdigest()
        packing = Packing(self._file, self._progress, self._source(bits), made)
        self._bits = {"asked": self._request.asked(), **described(bits, self._weights.config)}
        packing.manifest.bits = self._bits
        self._written = packing.fill(place)
        self._manifest, self.inexact, self._packed = packing.manifest, packing.inexact, bits.digest()

    def _measure(self, place: Place, bits: Bits) -> Rise:
        """The rise of perplexity on the text that bits are chosen by; each choice, and the source, is measured once."""
        from edgert.model import load

        if (key := bits.digest()) not in self._rises:
            self._pack(place, bits)
            chunks = self._text.select
            if not self._rises:
                self._before = token_losses(self._model, chunks, partial(self._progress, "measuring the source"))
            with load(place.path, progress=self._progress, **self._request.options) as candidate:
                after = token_losses(candidate, chunks, partial(self._progress, "measuring the attempt"))
            self._rises[key] = rise(self._before, after)
        return self._rises[key]

    def _prove(self, place: Place) -> Proof:
        from edgert.model import load

        with load(place.path, progress=self._progress, **self._request.options) as candidate:
            return prove(self._model, candidate, self._text.prove, self._text.name, self._progress, checks=False)

    def _finish(self, place: Place) -> None:
        """Say what was measured, add the profile, and give the bundle its name."""
        from edgert.model import load

        with load(place.path, progress=self._progress, **self._request.options) as candidate:
            self._manifest.proof = check(self._proof, self._model, candidate, self._progress).as_document()
        self._manifest.bits = {**self._bits, **self._said}
        add_profile(place, self._profile, self._manifest, self._progress)
        write_durably(place.path / bundles.MANIFEST, self._manifest.as_text().encode())
        place.publish()
        self._bench.remove()
