"""What a report is about: a profile alone, or a bundle and the profile it was packed by."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgert.architectures import read_config
from edgert.devices.kv_cache import cache_bytes
from edgert.errors import ModelFileError, UnsupportedError
from edgert.experts.predictors import predictor_bytes
from edgert.experts.profile import Profile
from edgert.loading import context_of, name_of
from edgert.memory import WORD_BYTES, Needs
from edgert.model_sizes import config_from
from edgert.needs import needs
from edgert.quant.formats import FORMATS
from edgert.storage.bundle import PROFILE, Bundle, is_bundle
from edgert.streaming import model_key
from edgert.types import Floats, Ids, ModelConfig
from edgert.weights import Weights

_CHUNK, _KV_TYPE, _READERS_BYTES = 32, "f16", 4 << 20


@dataclass(frozen=True)
class Subject:
    """A profile with what is known of the model that will run.

    record_bytes: (n_layers, n_expert) of the bundle, or those that the profile was made with. formats: of gate, up and
    down of each expert, names (n_layers, n_expert, 3), or None without a bundle. needs: memory of the process, None if
    that is not known.
    """

    path: Path
    name: str
    profile: Profile
    config: ModelConfig | None
    record_bytes: Ids
    needs: Needs | None
    bundle: Bundle | None = None

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """(n_out, n_in) of an expert's gate, up and down."""
        d_model, d_expert = self.profile.input_moments.shape[2], self.profile.hidden_moments.shape[2]
        return (d_expert, d_model), (d_expert, d_model), (d_model, d_expert)

    @property
    def weights_per_expert(self) -> int:
        """Weights of gate, up and down together."""
        return sum(n_out * n_in for n_out, n_in in self.shapes)

    def bits(self) -> Floats | None:
        """Bits per weight, scales and minima counted, (n_layers, n_expert), NaN where there are none; of a bundle."""
        if self.bundle is None:
            return None
        manifest = self.bundle.manifest
        kinds = [8 * sum(part.n_bytes for part in parts) / self.weights_per_expert for parts in manifest.kinds]
        found: Floats = np.array([*kinds, np.nan], np.float32)[manifest.record_kind]  # -1: no record
        return found

    def formats(self) -> np.ndarray | None:
        """Names of the formats of gate, up and down, (n_layers, n_expert, 3), "" where there are none; of a bundle."""
        if self.bundle is None:
            return None
        manifest = self.bundle.manifest
        kinds = [[part.format.name for part in parts] for parts in manifest.kinds]
        return np.array([*kinds, [""] * 3])[manifest.record_kind]


def open_subject(path: Path) -> Subject:
    """The subject in a profile's file or a bundle's folder.

    ModelFileError for what is neither, is damaged, for a bundle without a profile, or with that of another model;
    UnsupportedError for formats of a newer edgert.
    """
    if path.is_dir() or is_bundle(path):
        return _of_bundle(path)
    profile = _load(path)
    config = config_of(profile)
    name = profile.model.rpartition(" ModelConfig(")[0] or profile.model or path.name
    needed = None if config is None else _needs_of(profile, config)
    return Subject(path, name, profile, config, profile.record_bytes, needed)


def _load(path: Path) -> Profile:
    profile = Profile.load(path)
    formats = profile.sensitivity.formats if profile.sensitivity is not None else ()
    if unknown := [name for name in formats if name not in FORMATS]:
        raise UnsupportedError(f"{path}: its sensitivity is to {unknown[0]!r}, a format that this edgert does not know")
    return profile


def _of_bundle(path: Path) -> Subject:
    with contextlib.closing(Bundle.open(path)) as bundle:
        file = path / PROFILE
        if not file.exists():
            raise ModelFileError(
                f"{path}: the bundle holds no profile; pack it with `edgert pack MODEL --profile FILE`, or report on "
                "the profile's own file"
            )
        profile = _load(file)
        config = read_config(bundle.metadata, str(path))
        key, digest = model_key(bundle.metadata, config), bundle.manifest.model.get("digest")
        same = profile.model == key if digest is None else profile.digest == digest
        if not same or profile.record_bytes.shape != bundle.record_bytes.shape:
            raise ModelFileError(
                f"{file}: it is the profile of another model, {profile.model[:60]!r}, not of {key[:60]!r} as it was "
                "packed; make one with `edgert profile` and pack the model again"
            )
        needed = needs(Weights(bundle, config), context_of(None, config), _KV_TYPE)
        return Subject(path, name_of(bundle), profile, config, bundle.record_bytes, needed, bundle)


# ---- without a bundle ------------------------------------------------------------------------------------------------
def config_of(profile: Profile) -> ModelConfig | None:
    """The configuration of a profile's model; None where it does not say one, or not one of these experts."""
    sizes = profile.settings.get("model")
    config = config_from(sizes) if isinstance(sizes, dict) else None
    if config is None or config.router is None:
        return None
    found = config.n_layers, config.router.n_expert, config.router.top_k, config.d_model, config.d_expert
    widths = profile.input_moments.shape[2], profile.hidden_moments.shape[2]
    return config if found == (profile.n_layers, profile.n_expert, profile.top_k, *widths) else None


def _needs_of(profile: Profile, config: ModelConfig) -> Needs | None:
    """What the model takes on this machine; None where its sizes are not known."""
    from edgert.devices.cores import choose_threads
    from edgert.devices.work_space import work_bytes

    sizes, context = profile.record_bytes, context_of(None, config)
    hot, words = (profile.settings["model"].get(name) for name in ("hot", "words"))
    if not all(type(count) is int and 0 < count < 1 << 50 for count in (hot, words)):
        return None
    work = work_bytes(config, context, choose_threads().n_threads, float_hidden=False, chunk=_CHUNK)
    return Needs(
        hot=hot,
        kv={_CHUNK: cache_bytes(config, context, _KV_TYPE, _CHUNK)},
        work={_CHUNK: work},
        tokenizer=WORD_BYTES * words,
        context=context,
        kv_type=_KV_TYPE,
        cold=int(sizes.sum()),
        record=int(sizes.max()),
        top_k=profile.top_k,
        working_set=int(sizes.sum()) * profile.top_k // profile.n_expert,
        buffers=_READERS_BYTES + predictor_bytes(profile.n_layers, profile.n_expert),
        streams=True,
    )
