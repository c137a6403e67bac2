"""What quantising a model's experts costs, and quantising them: jobs over all experts, and trials of whole layers.

The experts' inputs are made once, by running the profile's own text again; everything then is done expert by expert,
in as many processes as there are, and kept in a folder, so that what was done before a kill is not done again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgert.bits import PROJECTIONS, Bits, expert_shapes, fitting, kept_words
from edgert.expert_jobs import PROBE, errors_of, jobs_of, tiles_of
from edgert.experts.profile import Profile, Sensitivity, normalised
from edgert.jobs import run_jobs
from edgert.pack_meter import Meter
from edgert.quant.formats import FORMATS, Format, MatrixSource
from edgert.quant.quantisers import quantise
from edgert.requantised import Bytes, MadeMatrix, Place, Read
from edgert.states import States, collect_states
from edgert.tile_store import TileStore
from edgert.types import Floats, Ids
from edgert.weights import Progress, Weights

if TYPE_CHECKING:
    from edgert.model import Model
    from edgert.trial import Trial

# Formats worth choosing between: for each size the one with the least error, of which a model takes those that fit its
# rows' lengths.
CANDIDATES = (
    *("int2-g128", "int2-g64", "int2", "int2-k", "int2-g16"),
    *("int3-g128", "int3-g64", "int3-k", "int3"),
    *("int4-g128", "int4-g64", "int4"),
    *("int5-g64", "int6-g64", "int8-g64"),
)
SHORT_CANDIDATES = ("int5", "int6", "int8")  # besides, where rows are no multiple of 64
_BASE = "int8"  # what the experts of other layers get in a trial
_TAKEN = 0.05  # nats that the probe's format costs a model, where it cannot be measured
_TRIAL_CHUNKS = 8
_EXACT = {"activations": "f32", "kv_type": "f32", "device": "cpu"}
METHOD = 5  # of finding errors and gains: to be raised with what changes their values


@dataclass(frozen=True)
class Bench:
    """What the work on one model needs: its file, the folder for what is under way, and how to run jobs and the model.

    options: keywords of edgert.load. dask: the address of a cluster, or None for processes here.
    """

    source: Path
    work: Path
    progress: Progress
    dask: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def model(self, *, exact: bool = False) -> Iterator[Model]:
        """The model, loaded. exact: with activations, keys and values as floats, for rounding them costs more than one
        expert's bits; on the CPU, which takes them."""
        from edgert.model import load

        options = {**self.options, **_EXACT} if exact else self.options
        with load(self.source, progress=self.progress, **options) as model:
            yield model

    def remove(self) -> None:
        """Remove the folder: the work is done."""
        shutil.rmtree(self.work, ignore_errors=True)

    def tell(self, text: str) -> None:
        """What went wrong and is mended."""
        self.progress(text, 0.0)

    def store(self, name: str, profile: Profile, *settings: str) -> TileStore:
        """A store of what is found of a profile with these settings, by today's method; under others it is emptied."""
        shares = " ".join(f"{share:.6g}" for share in normalised(profile.shares).values())
        return TileStore(self.work / name, [METHOD, text_digest(profile), shares, *self._kinds(), *settings])

    def _kinds(self) -> list[str]:
        """Options of running that decide what is found."""
        return [str(self.options.get(name)) for name in ("activations", "kv_type")]

    def states(self, model: Model, profile: Profile) -> States:
        """What the experts were given while the profile's text ran; kept in the folder, and gone on with."""
        self.work.mkdir(parents=True, exist_ok=True)
        about = "-".join([text_digest(profile), *self._kinds()])
        return collect_states(model, profile, None, self.work / "states.f16", self.progress, about)


def text_digest(profile: Profile) -> str:
    """A digest of the model and of the text that it was profiled on."""
    digest = hashlib.sha256(profile.digest.encode())
    for domain in profile.domains:
        digest.update(domain.tokens.tobytes())
    return digest.hexdigest()


def profile_counts(profile: Profile) -> Ids:
    """Calibration tokens of each expert, (n_layers, n_expert), in the domains that count."""
    ids = np.concatenate([domain.ids for domain in profile.domains if profile.shares.get(domain.name)], axis=1)
    counts = [np.bincount(layer.reshape(-1), minlength=profile.n_expert) for layer in ids]
    return np.array(counts, np.int64) * (profile.record_bytes > 0)


def weights_of(model: Model) -> Weights:
    """The weights that a model was loaded from."""
    with model.held() as parts:
        return parts.weights


def candidates(weights: Weights) -> tuple[str, ...]:
    """The names of the formats to choose between: those that fit a projection of this model."""
    widths = weights.config.d_model, weights.config.d_expert
    names = CANDIDATES if all(n_in % 64 == 0 for n_in in widths) else (*CANDIDATES, *SHORT_CANDIDATES)
    formats = [FORMATS[name] for name in names]
    fit = {place for n_in in widths for place in fitting(formats, n_in)}
    return tuple(names[place] for place in sorted(fit))


def measure_sensitivity(bench: Bench, profile: Profile, quantiser: str = "gptq") -> Sensitivity:
    """The error of every expert's output with each projection in each format, and what errors in each layer cost.

    Takes the time of quantising all experts in all formats. Raises what loading the model raises.
    """
    with bench.model() as model:
        weights, layers = weights_of(model), profile.layers
        if left := kept_words(weights.config):
            bench.tell(left)
        names = candidates(weights)
        store = bench.store(f"sensitivity-{quantiser}", profile, quantiser, *names)
        states = bench.states(model, profile)
        rows = profile_counts(profile).astype(np.int32)
        errors = np.zeros((profile.n_layers, profile.n_expert, len(PROJECTIONS), len(names) + 1), np.float32)
        missing = []
        for layer in layers:
            for expert in range(profile.n_expert):
                kept = store.array(f"errors-{layer}-{expert}")
                if kept is None:
                    missing.append((layer, expert, names))
                else:
                    errors[layer, expert] = kept
        jobs = jobs_of(weights, states, iter(missing), quantiser)
        meter = Meter(bench.progress, "trying formats", len(missing), speed=_experts_a_second)
        with closing(run_jobs(errors_of, jobs, dask=bench.dask, notice=bench.tell)) as results:
            for place, found in results:
                layer, expert, _ = missing[place]
                errors[layer, expert] = found
                store.put_array(f"errors-{layer}-{expert}", found)
                meter.add(1, f"layer {layer}")
        errors, probe = errors[..., :-1], errors[..., -1]
        probe = np.where(np.isfinite(probe), probe, 0)  # what it does not fit stays as it is
        total = (rows[..., None] / profile.n_tokens * probe).sum(axis=(1, 2))
    with bench.model(exact=True) as model:
        if streamed := bool(model.memory.slots):  # trials exchange experts in RAM
            bench.progress("not all experts are in RAM: every layer is taken to be as sensitive as the others", 0.0)
            gains = np.divide(_TAKEN / len(layers), total, out=np.zeros(len(total)), where=total > 0).astype(np.float32)
        else:
            gains = _gains(bench, model, profile, store, total)
    return Sensitivity(quantiser, names, errors, rows, gains, profile.n_tokens, is_measured=not streamed)


def _gains(bench: Bench, model: Model, profile: Profile, store: TileStore, errors: npt.NDArray[np.float64]) -> Floats:
    """Divergence for a unit of error in each layer: that of the layer's experts in the probe's format, measured.

    model: with exact activations. errors: (n_layers,) of the probe. It rounds to the nearest, as what is fitted to
    calibration text errs less there. All other experts are in 8 bits meanwhile, as they are in what is compared with.
    """
    from edgert.trial import Trial

    chunks, weights = trial_chunks(profile, _TRIAL_CHUNKS), weights_of(model)
    base, probe = (
        Bits.uniform(FORMATS[name], profile.n_layers, profile.n_expert, quantiser="rtn").where_they_fit(weights.config)
        for name in (_BASE, PROBE)
    )
    kept = {layer: store.array(f"risen-{layer}") for layer in profile.layers}
    risen = {layer: float(found) for layer, found in kept.items() if found is not None}
    if len(risen) < len(kept):
        with Trial(model) as trial:
            for layer in profile.layers:
                put_layer(trial, weights, base, rounded(weights, base), layer)
            trial.compare_with_this(chunks)
            for layer in [layer for layer in profile.layers if layer not in risen]:
                bench.progress("measuring what each layer's errors cost", len(risen) / len(kept))
                put_layer(trial, weights, probe, rounded(weights, probe), layer)
                risen[layer] = trial.measure(chunks).kl
                store.put_array(f"risen-{layer}", np.array(risen[layer]))
                put_layer(trial, weights, base, rounded(weights, base), layer)
    gains = np.zeros(profile.n_layers)
    for layer, rise in risen.items():
        gains[layer] = max(rise, 0.0) / max(errors[layer], 1e-30)
    known = gains > 0
    if known.any():  # what drowned in rounding is taken for the least of the others
        gains[profile.layers] = np.maximum(gains[profile.layers], gains[known].min())
    return gains.astype(np.float32)


def trial_chunks(profile: Profile, n_chunks: int) -> list[list[int]]:
    """Chunks of the calibration text, of each domain by its share, one at least."""
    shares = {name: share for name, share in profile.shares.items() if share}
    counts, chunks = dict.fromkeys(shares, 1), list[list[int]]()
    while sum(counts.values()) < n_chunks:
        counts[max(shares, key=lambda name: shares[name] / counts[name])] += 1
    for name, count in counts.items():
        whole = profile.domain(name).tokens.reshape(-1, profile.chunk)
        count = min(count, len(whole))
        chunks += whole[np.arange(count) * len(whole) // count].tolist()
    return chunks


def make_tiles(bench: Bench, weights: Weights, states: States, bits: Bits, store: TileStore) -> None:
    """Quantise what `bits` chooses and the store has not yet."""
    missing: list[tuple[int, int, tuple[str, ...]]] = []
    for layer, expert in np.argwhere((bits.choice >= 0).any(axis=2)).tolist():
        names = ["" if format is None else format.name for format in bits.of(layer, expert)]
        there = [not name or store.has((layer, expert, p), _kept_as(names, p)) for p, name in enumerate(names)]
        if not all(there):  # down is made for the gate and up that it goes with
            wanted = [name if not there[2] or not there[place] else "" for place, name in enumerate(names)]
            missing.append((layer, expert, tuple(wanted)))
    meter = Meter(bench.progress, "quantising", len(missing), speed=_experts_a_second)
    jobs = jobs_of(weights, states, iter(missing), bits.quantiser)
    with closing(run_jobs(tiles_of, jobs, dask=bench.dask, notice=bench.tell)) as results:
        for index, tiles in results:
            layer, expert, names_made = missing[index]
            for place, made in enumerate(tiles):
                if made is not None and not store.has((layer, expert, place), _kept_as(names_made, place)):
                    store.put((layer, expert, place), _kept_as(names_made, place), made)
            meter.add(1, f"layer {layer}")


def _kept_as(names: Sequence[str], place: int) -> str:
    """The name under which a store keeps gate, up or down, given all three formats: down depends on gate and up."""
    return names[place] if place < 2 else "-".join((names[2], "after", *names[:2]))


def _experts_a_second(rate: float) -> str:
    return f"{rate:,.1f} experts/s"


def reader(bits: Bits, store: TileStore) -> Read:
    """What a RequantisedSource reads from a store."""

    def read(place: Place, first: int, n_bytes: int) -> Bytes:
        names = ["" if format is None else format.name for format in bits.of(*place[:2])]
        return store.read(place, _kept_as(names, place[2]), first, n_bytes)

    return read


def rounded(weights: Weights, bits: Bits) -> Read:
    """The same of weights that are rounded to the nearest, when they are asked for."""

    def read(place: Place, first: int, n_bytes: int) -> Bytes:
        layer, expert, projection = place
        found = weights.expert(layer, expert)
        matrix = (found.gate, found.up, found.down)[projection]
        made = quantise(matrix.whole().to_float(), _format(bits, place), "rtn").matrix
        tiles = np.zeros(made.format.matrix_bytes(*made.shape), np.uint8)
        made.pack(tiles)
        return tiles[first : first + n_bytes]

    return read


def _format(bits: Bits, place: Place) -> Format:
    format = bits.of(*place[:2])[place[2]]
    assert format is not None, place
    return format


def put_layer(trial: Trial, weights: Weights, bits: Bits, read: Read, layer: int) -> None:
    """Put all experts of a layer of a trial into the formats that `bits` chooses."""
    for expert in range(bits.choice.shape[1]):
        put_expert(trial, weights, bits, read, layer, expert)


def put_expert(trial: Trial, weights: Weights, bits: Bits, read: Read, layer: int, expert: int) -> None:
    """Put one expert of a trial into the formats that `bits` chooses."""
    own, shapes = weights.expert(layer, expert), expert_shapes(weights.config)
    matrices: list[MatrixSource] = [own.gate, own.up, own.down]
    for place, format in enumerate(bits.of(layer, expert)):
        if format is not None:
            matrices[place] = MadeMatrix(shapes[place], format, partial(read, (layer, expert, place)))
    trial.swap(layer, expert, (matrices[0], matrices[1], matrices[2]))
