"""A request for a bundle with chosen bits: what it is made of and compared with, checked before any work."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgert.architectures import read_config
from edgert.bits import hot_format
from edgert.chosen_bits import PROFILE, PROOF, profile_digest
from edgert.corpus import whole_chunks
from edgert.corpus_files import Whole
from edgert.experts.profile import Profile
from edgert.goal import Goal
from edgert.loading import words
from edgert.pack import check_profile, open_source
from edgert.pack_sizes import Sizes
from edgert.profiling import chunk_of, profile_model
from edgert.profiling import default_out as default_profile
from edgert.proof_text import ProofText, check_length, proof_text
from edgert.storage.tensor_file import TensorFile
from edgert.weights import Progress

_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
_TOKENS, _HELD_OUT = 20_000, 0.2  # of a profile that is made here; half of what is kept back selects, half proves


@dataclass(frozen=True)
class Request:
    """A pack with chosen bits.

    text: what to prove on, unseen by calibration, as read_whole gives it, and its name; None takes what the profile
    kept back. options: keywords of edgert.load.
    """

    source: Path
    out: Path
    profile: Profile
    goal: Goal
    text: Whole | None = None
    text_name: str = ""
    dask: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def asked(self) -> dict[str, Any]:
        """What a bundle is compared with, to know whether it is the one that is asked for."""
        asked = {**self.goal.as_document(), PROFILE: profile_digest(self.profile)}
        if self.text is not None:
            text = self.text if isinstance(self.text, str) else json.dumps(self.text)
            asked[PROOF] = hashlib.sha256(text.encode()).hexdigest()[:32]
        return asked

    def proof_text(self, file: TensorFile) -> ProofText:
        """The text to choose and to prove by; file: the source. Raises as edgert.proof_text does."""
        chunks = None
        if self.text is not None:
            chunks = whole_chunks(self.text, *words(file), self.profile.chunk)
        return proof_text(self.profile, chunks, self.text_name, selects=self.goal.loss is not None)


def profile_for(
    source: Path,
    out: Path,
    given: Path | None,
    goal: Goal,
    progress: Progress,
    *,
    text: Whole | None = None,
    text_name: str = "",
    options: Mapping[str, Any] = _NO_OPTIONS,
) -> Profile:
    """The profile that is given, or lies beside the model or the bundle to be; else one that is made now.

    That is of text that the model writes, and is kept beside the bundle: the next pack, with another goal, finds it.
    What no profile would help is refused before one is made, which takes long. The others are fields of a Request.
    """
    beside = out.with_name(f"{out.name.removesuffix('.edge')}.profile.npz")
    with contextlib.closing(open_source(source, keep_pages=False)) as file:
        for path in (given, default_profile(source), beside):
            if path is not None and (path is given or path.exists()):
                found = Profile.load(path)
                check_profile(found, file, source, None if path is given else path)
                return found
        config = read_config(file.metadata, str(file.path))
        if config.router is not None:  # else the profiler says that there is nothing to choose
            sizes = Sizes(file, config, goal, hot_format(goal.hot) if goal.hot else None)
            sizes.check(None)
            sizes.tier(None, out.absolute().parent, options)
        if text is not None:
            chunk = chunk_of(config, options.get("context"))
            check_length(text_name, len(whole_chunks(text, *words(file), chunk)), chunk)
    progress(f"no profile is given: the model writes text to calibrate on, kept in {beside}", 0.0)
    made = profile_model(source, beside, n_tokens=_TOKENS, held_out=_HELD_OUT, progress=progress, **options)
    return made.profile
