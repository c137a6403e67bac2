"""Profiling: calibration text runs through the model, and where its tokens go and what experts are given is kept.

The same model and text give the same profile bit for bit: whether experts lie in RAM or on flash, however many tokens
run at a time, and however often the run was interrupted. What quantising costs is measured elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgert.architectures import read_config
from edgert.corpus import Corpus, chunks_for, least_held_out, read_corpora, template_words, without_copies
from edgert.errors import ModelFileError, OptionError, StorageError
from edgert.experts.moments import Moments
from edgert.experts.profile import OWN_TEXT, Domain, Profile, kinds_in_words
from edgert.experts.replay import compare_predictors
from edgert.loading import Parts, open_model, resolve, words
from edgert.model import load
from edgert.model_digest import model_digest as model_digest
from edgert.model_sizes import model_sizes
from edgert.needs import record_bytes
from edgert.own_text import write_chunk
from edgert.pack import stem
from edgert.profile_journal import ProfileJournal
from edgert.profile_run import part_of, record_scores, run_chunks, tokens_meter
from edgert.storage.aside import check_writable
from edgert.storage.bundle import is_bundle
from edgert.streaming import model_key
from edgert.types import Ids, ModelConfig
from edgert.weights import Progress
from edgert.work_folder import locked_work

CHUNK = 512  # tokens, or as many as the context holds
N_TOKENS, HELD_OUT = 20_000, 0.1  # to calibrate on, and the share of each text that is kept back
_WRITING = 2  # how a model's own text is written: to be raised with what changes it
_WRITTEN, _RUN, _AHEAD = 0.65, 0.8, 0.9  # of the work, roughly, when its parts are done


@dataclass(frozen=True)
class Profiled:
    """What profile_model did. n_run: tokens that ran now, `seconds` long; n_resumed: that had been run earlier.

    notes: what a person should know of the text, a line each.
    """

    profile: Profile
    path: Path
    n_run: int
    n_resumed: int
    seconds: float
    notes: tuple[str, ...]


def default_out(model: str | Path | None) -> Path:
    """Where a profile goes by default: beside the model under its name; of the embedded one, here."""
    path = resolve(model).absolute()
    name = f"{stem(path).removesuffix('.edge') if is_bundle(path) else stem(path)}.profile.npz"
    return Path(name) if path == resolve(None).absolute() else path.with_name(name)


def chunk_of(config: ModelConfig, context: int | None) -> int:
    """Tokens of a chunk of a model's text, with a context of so many (None: of as many as the model takes)."""
    return min(CHUNK, context or CHUNK, config.n_context)


def profile_model(
    model: str | Path | None,
    out: Path | None = None,
    *,
    corpora: Sequence[Path] = (),
    n_tokens: int = N_TOKENS,
    held_out: float = HELD_OUT,
    progress: Progress,
    **runtime: Any,
) -> Profiled:
    """Profile a model on `n_tokens` of text and write the profile to `out`; see default_out.

    corpora: files of text, see corpus_files; without any the model writes its own. held_out: the share of each that is
    kept back. runtime: keywords of edgert.load. progress(stage, fraction) may raise: what was run is kept, and the next
    call with the same text goes on from there. A profile that is there is left as it is: OptionError unless it is of
    this model and text; so too while another process is at work on it. Raises EdgertError.
    """
    out = default_out(model) if out is None else Path(out)
    run = _Run(model, out, corpora, n_tokens, held_out, progress, runtime)
    if (found := run.found()) is None:
        _check_writable(out)
        with locked_work(out):
            if (found := run.found()) is None:  # nor written by another process in between
                return run.go()
    return Profiled(found, out, 0, found.n_tokens, 0.0, run.notes)


class _Run:
    """One run: what it is about, known before any weight is read."""

    def __init__(
        self,
        model: str | Path | None,
        out: Path,
        corpora: Sequence[Path],
        n_tokens: int,
        held_out: float,
        progress: Progress,
        runtime: dict[str, Any],
    ) -> None:
        if n_tokens < 1 or not 0 <= held_out < 1:
            raise OptionError(f"tokens={n_tokens}, held_out={held_out}: at least 1, and a share from 0 to below 1")
        self._path, self._out, self._progress, self._runtime = resolve(model), out, progress, runtime
        progress("reading the header", 0.0)
        with contextlib.closing(open_model(self._path)) as file:
            self._config = config = read_config(file.metadata, str(self._path))
            if config.router is None:
                raise OptionError(f"{self._path} has no experts to profile; name a Mixture-of-Experts model")
            self._digest, self._router = model_digest(file), config.router
            self._chunk = chunk_of(config, runtime.get("context"))
            if self._chunk < 16:
                raise OptionError(f"context={self._chunk} is too short to profile; use at least 16")
            self._corpora = (
                read_corpora(
                    corpora,
                    *words(file),
                    n_tokens=n_tokens,
                    chunk=self._chunk,
                    held_out=held_out,
                    progress=progress,
                )
                if corpora
                else []
            )
        n_chunks = chunks_for(n_tokens, self._chunk)
        self._n_own = 0 if corpora else n_chunks  # chunks that the model writes itself, and those to keep back
        least = max(1, least_held_out(n_chunks), round(n_chunks * held_out / (1 - held_out)))
        self._n_own_held_out = least if held_out and not corpora else 0
        self.notes = tuple(note for one in self._corpora for note in one.notes)

    def found(self) -> Profile | None:
        """The profile at `out`, if there is one. OptionError: `out` is another, or something else, which stays."""
        if not self._out.exists():
            return None
        try:
            profile = Profile.load(self._out)
        except ModelFileError as error:
            raise OptionError(
                f"{self._out} is there already, and is no profile: remove it, or name another file with --out"
            ) from error
        if difference := self._difference(profile):
            raise OptionError(
                f"{self._out} is there already, a profile with other settings ({difference}): name another file with "
                "--out, or remove it"
            )
        return profile

    def _difference(self, profile: Profile) -> str:
        """What tells a profile from the one that this run would make; "" if it is that."""
        if profile.digest != self._digest:
            return f"of another model than {self._path.name}"
        if profile.chunk != self._chunk:
            return f"in chunks of {profile.chunk} tokens, not of {self._chunk}, see --context"
        if profile.own_text != (not self._corpora):
            return "of text that the model wrote itself" if profile.own_text else "of --corpus files, not of own text"
        theirs = {domain.name: (domain.tokens, domain.held_out) for domain in profile.domains}
        known = profile.settings.get("kinds", self._kinds())
        if known != self._kinds():
            return f"run with {kinds_in_words(known)}, not with {kinds_in_words(self._kinds())}"
        if not self._corpora:
            if list(theirs) != [OWN_TEXT]:
                return f"of {', '.join(theirs)}"
            found = profile.settings.get("own") or [len(tokens) // self._chunk for tokens in theirs[OWN_TEXT]]
            both = [
                f"{calibrated * self._chunk:,} tokens of own text, {kept * self._chunk:,} more kept back"
                for calibrated, kept in (found, (self._n_own, self._n_own_held_out))
            ]
            return "" if both[0] == both[1] else f"{both[0]}, not {both[1]}"
        ours = {one.name: (len(one.tokens), len(one.held_out)) for one in self._corpora}
        if list(theirs) != list(ours):
            return f"of {', '.join(theirs)}, not of {', '.join(ours)}"
        for name, counts in ours.items():
            for found, count, which in zip(theirs[name], counts, ("tokens", "tokens kept back"), strict=True):
                if len(found) != count * self._chunk:
                    return f"{len(found):,} {which} of {name}, not {count * self._chunk:,}"
        for one in self._corpora:
            for found, chunks in zip(theirs[one.name], (one.tokens, one.held_out), strict=True):
                if found.tolist() != _flat(chunks):
                    return f"{one.name} had other text"
        return ""

    def _own(self) -> list[int] | None:
        """Chunks that the model is to write to calibrate on and to keep back, if it is."""
        return None if self._corpora else [self._n_own, self._n_own_held_out]

    def go(self) -> Profiled:
        """Run what has not been run, and write the profile."""
        config, router = self._config, self._router
        shape = (config.n_layers, router.n_expert, config.d_model, config.d_expert)
        moments = Moments(*shape)
        journal = ProfileJournal(
            self._out.with_name(self._out.name + ".part"),
            self._about(),
            moments,
            chunk=self._chunk,
            top_k=router.top_k,
        )
        n_resumed = len(journal.ids) * self._chunk
        runtime = {**self._runtime, "context": self._chunk, "progress": self._loading, "reserved": self._needed()}
        with load(self._path, **runtime) as model, model.held() as parts, _kept(journal):
            progress = self._progress
            template = template_words(parts.template)
            corpora = self._corpora
            if not corpora:
                written = self._write(parts, journal, part_of(progress, 0.0, _WRITTEN))
                corpora = without_copies([written], template)
            started = time.perf_counter()
            run_chunks(parts, journal, corpora, part_of(progress, 0.0 if self._corpora else _WRITTEN, _RUN))
            seconds = time.perf_counter() - started
            key, sizes = model_key(parts.file.metadata, config), record_bytes(parts.weights)
            settings = {"kinds": self._kinds(), "own": self._own(), "template": template, "model": model_sizes(parts)}
            trace, n_warm = record_scores(parts, journal, corpora, key, sizes, part_of(progress, _RUN, _AHEAD))
        recall = compare_predictors(trace, part_of(progress, _AHEAD, 1.0), n_warm)
        found = {name: np.array(rows) for name, rows in recall.items()}
        profile = self._profile(key, sizes, corpora, journal, found, settings)
        with _storage_errors(self._out):
            profile.save(self._out)
        journal.remove()
        notes = tuple(note for one in corpora for note in one.notes)
        return Profiled(profile, self._out, profile.n_tokens - n_resumed, n_resumed, seconds, notes)

    def _loading(self, stage: str, fraction: float) -> None:
        """Progress of loading, which is not the end."""
        if fraction < 1:
            self._progress(stage, fraction)

    def _kinds(self) -> list[Any]:
        """Options of running that decide the bits."""
        return [self._runtime.get(name) for name in ("kv_type", "activations")]

    def _about(self) -> Any:
        """What decides the bits of a profile."""
        text = [[one.name, _digest(one.tokens), _digest(one.held_out)] for one in self._corpora]
        kinds = self._kinds()
        return [self._digest, self._chunk, text or [_WRITING, self._n_own, self._n_own_held_out], kinds]

    def _needed(self) -> int:
        """Bytes that profiling takes beside the model: sums, routes, rows of one layer as float64."""
        c, router = self._config, self._router
        sums = Moments.n_bytes(c.n_layers, router.n_expert, c.d_model, c.d_expert)
        n_chunks = sum(len(one.tokens) for one in self._corpora) or self._n_own
        routes = c.n_layers * n_chunks * self._chunk * router.top_k * 4
        return sums + 2 * routes + 12 * self._chunk * (c.d_model + router.top_k * c.d_expert)

    def _write(self, parts: Parts, journal: ProfileJournal, progress: Progress) -> Corpus:
        """The model's own text."""
        n_chunks, chunk = self._n_own + self._n_own_held_out, self._chunk
        done = len(journal.own_text)
        meter = tokens_meter(progress, "the model writes its own text", n_chunks * chunk, done * chunk)
        for number in range(done, n_chunks):
            words = f"{number * chunk:,} of {n_chunks * chunk:,} tokens"
            written, is_kept_back = partial(meter.add, words=words), number >= self._n_own
            place = number - self._n_own if is_kept_back else number
            journal.add(own_text=write_chunk(parts, place, chunk, written, held_out=is_kept_back))
        chunks = journal.own_text
        return Corpus(OWN_TEXT, chunks[: self._n_own], chunks[self._n_own : n_chunks])

    def _profile(
        self,
        key: str,
        sizes: Ids,
        corpora: Sequence[Corpus],
        journal: ProfileJournal,
        recall: dict[str, Any],
        settings: dict[str, Any],
    ) -> Profile:
        domains, first = [], 0
        for one in corpora:
            place = slice(first, first + len(one.tokens))
            tokens, held_out = (np.array(_flat(chunks), np.int32) for chunks in (one.tokens, one.held_out))
            ids, weights = (np.concatenate(routes[place], axis=1) for routes in (journal.ids, journal.weights))
            domains.append(Domain(one.name, tokens, held_out, ids, weights))
            first = place.stop
        n_tokens = sum(len(domain.tokens) for domain in domains)
        inputs, hidden = journal.moments.means()
        return Profile(
            model=key,
            digest=self._digest,
            chunk=self._chunk,
            record_bytes=sizes,
            domains=tuple(domains),
            shares={domain.name: len(domain.tokens) / n_tokens for domain in domains},
            own_text=not self._corpora,
            input_moments=inputs,
            hidden_moments=hidden,
            recall=recall,
            settings=settings,
        )


def _flat(chunks: Sequence[Sequence[int]]) -> list[int]:
    return [token for chunk in chunks for token in chunk]


def _digest(chunks: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(np.array(chunks, np.int32).tobytes()).hexdigest()


def _check_writable(out: Path) -> None:
    """StorageError now, not after the run."""
    with _storage_errors(out):
        check_writable(out)


@contextlib.contextmanager
def _storage_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{out} cannot be written ({error.strerror}); name another file with --out") from error


@contextlib.contextmanager
def _kept(journal: ProfileJournal) -> Iterator[None]:
    """What was run is kept, whatever ends the run; on a full disk, what was kept before."""
    try:
        yield
    finally:
        with contextlib.suppress(StorageError):
            journal.save()
