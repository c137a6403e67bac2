"""The model that a plan is for: from a header, a bundle, a folder, a config.json or a preset; no weights are read.

It is what `edgert inspect` shows, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from edgert.architectures import read_config
from edgert.errors import OptionError
from edgert.experts.profile import Profile
from edgert.huggingface import is_huggingface_folder
from edgert.loading import EMBEDDED, context_of, name_of, open_model, resolve
from edgert.memory import WORD_BYTES, Needs
from edgert.needs import needs, record_bytes
from edgert.paper_model import DEFAULT_QUANTISATION, QUANTISATIONS, PaperFile, paper_model, paper_preset
from edgert.preset_keys import KEY_PRESETS
from edgert.presets import PRESETS, TITLES, preset_named
from edgert.storage.bundle import PROFILE, Bundle, is_bundle
from edgert.storage.gguf_file import GgufFile
from edgert.storage.json_file import JsonObject, read_json
from edgert.storage.tensor_file import TensorFile
from edgert.traffic import ModelTraffic
from edgert.types import Ids, ModelConfig
from edgert.weights import Weights


@dataclass(frozen=True)
class PlanModel:
    """A model as its table of tensors tells it. path: None where there is no file that could run."""

    name: str
    source: str  # where the table is from, for people
    path: Path | None
    config: ModelConfig
    weights: Weights
    profile: Profile | None = None

    @property
    def record_bytes(self) -> Ids:
        """(n_layers, n_expert) bytes of the experts' records."""
        return record_bytes(self.weights)

    @property
    def n_parameters(self) -> int:
        """Numbers in all tensors."""
        return self.weights.n_parameters

    @property
    def file_bytes(self) -> int:
        """Of the tensors as they are stored; of a bundle as packed."""
        file = self.weights.file
        if isinstance(file, Bundle):
            return file.n_bytes
        return sum(tensor.n_bytes for tensor in file.tensors.values())

    @property
    def active_parameters(self) -> int:
        """Numbers that one token is multiplied with."""
        traffic = ModelTraffic.of(self.weights, 0.0)
        used = traffic.layers + traffic.head
        n_experts = len(self.config.expert_layers) * self.config.router.top_k if self.config.router else 0
        return int(used.integers + used.floats + n_experts * (traffic.expert.integers + traffic.expert.floats))

    @property
    def is_on_paper(self) -> bool:
        """Whether it is known by its dimensions alone."""
        return isinstance(self.weights.file, PaperFile)

    @property
    def whole_bytes(self) -> int:
        """Of the files that a GGUF's header is of, where not all of them is there; else 0."""
        file = self.weights.file
        if not isinstance(file, GgufFile):
            return 0
        ends = [0] * len(file.parts)
        for tensor in file.tensors.values():
            ends[tensor.part] = max(ends[tensor.part], tensor.offset + tensor.n_bytes)
        is_cut = any(part.stat().st_size < end for part, end in zip(file.parts, ends, strict=True))
        return sum(ends) if is_cut else 0

    def needs(self, context: int, kv_type: str, threads: int | None = None) -> Needs:
        """What it takes on a machine that computes with so many threads and has its kernels compiled.

        None: on this one, as it is; but a model on paper never waits for the compiler.
        """
        found = needs(self.weights, context, kv_type, threads)
        if threads is not None or self.is_on_paper:
            found = replace(found, compiling=False)
        if not self.is_on_paper:
            return found
        return replace(found, tokenizer=2 * WORD_BYTES * self.config.n_vocab)  # about as many merges as tokens

    def context(self, context: int | None) -> int:
        """Positions to plan for; OptionError beyond what the model was made for."""
        return context_of(context, self.config)


def open_plan_model(name: str | None, profile: Path | None = None) -> PlanModel:
    """What `name` stands for (see open_tables), with measured routes of this very model, a bundle's own by default.

    Raises OptionError for another model's profile.
    """
    found = open_tables(name)
    file = found.weights.file
    if profile is None and isinstance(file, Bundle) and (file.path / PROFILE).exists():
        profile = file.path / PROFILE
    return found if profile is None else replace(found, profile=_profile(profile, found.weights))


def open_tables(name: str | None) -> PlanModel:
    """What `name` stands for: a file, a folder, a bundle, config.json, PRESET or either with :QUANTISATION; None: the
    embedded model.

    Raises OptionError for a name that is nothing, ModelFileError and UnsupportedError for what cannot be planned for.
    """
    plain, quantisation = _split(name)
    path = None if plain is None else Path(plain)
    if plain is not None and path is not None and plain != EMBEDDED and not path.exists():
        if plain.lower() in {**PRESETS, **KEY_PRESETS} or path.suffix.lower() not in (".gguf", ".edge"):
            return _preset(plain, quantisation)
    if path is not None and is_huggingface_folder(path):
        if quantisation is not None or not any(path.glob("*.safetensors")):
            path = path / "config.json"
    if path is not None and path.suffix == ".json":
        where = path.parent.name or path.name
        return _on_paper(read_json(path), quantisation, where, path)
    if quantisation is not None:
        raise OptionError(f"{name}: a file has its quantisation; leave :{quantisation} away")
    return _of_file(resolve(path))


def _split(name: str | None) -> tuple[str | None, str | None]:
    """A name and the quantisation behind its last colon, if there is one that is known."""
    if name is None or Path(name).exists():
        return name, None
    before, colon, after = name.rpartition(":")
    if not colon or "/" in after:
        return name, None
    if after.lower() not in QUANTISATIONS:
        raise OptionError(f"{name}: {after!r:.40} is no quantisation known here; use {', '.join(QUANTISATIONS)}")
    return before, after.lower()


def _preset(name: str, quantisation: str | None) -> PlanModel:
    kind, keys = quantisation or DEFAULT_QUANTISATION, KEY_PRESETS.get(name.lower())
    if keys is not None:
        file, config = paper_preset(keys, kind, Path(name))
        return PlanModel(keys.title, f"preset, as {kind.upper()} on paper", None, config, Weights(file, config))
    values = preset_named(name)
    return _on_paper(JsonObject(values, f"the preset {name}"), quantisation, TITLES[name.lower()], None)


def _on_paper(values: JsonObject, quantisation: str | None, name: str, path: Path | None) -> PlanModel:
    kind = quantisation or DEFAULT_QUANTISATION
    file, config = paper_model(values, kind, name, path or Path(name))
    source = f"{'preset' if path is None else path}, as {kind.upper()} on paper"
    return PlanModel(name, source, None, config, Weights(file, config))


def _of_file(path: Path) -> PlanModel:
    file: TensorFile | Bundle
    if is_bundle(path) or path.is_dir():
        file = open_model(path)
    else:
        file = GgufFile.open(path, header_only=True)
    try:
        config = read_config(file.metadata, str(path))
        return PlanModel(name_of(file), str(path), path, config, Weights(file, config))
    finally:
        file.close()


def _profile(path: Path, weights: Weights) -> Profile:
    """A profile whose experts are those of the model; OptionError for another's."""
    found, c = Profile.load(path), weights.config
    shape = (c.n_layers, c.router.n_expert if c.router else 0)
    top_k = c.router.top_k if c.router else 0
    if found.record_bytes.shape != shape or found.top_k != top_k:
        theirs = "{} layers of {} experts".format(*found.record_bytes.shape)
        raise OptionError(
            f"{path}: the profile is of {theirs}, of which {found.top_k} are used; this model has {shape[0]} of "
            f"{shape[1]}, of which {top_k} are used: name its own profile"
        )
    return found
