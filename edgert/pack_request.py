"""A request for a bundle with chosen bits: what it is made of and compared with, checked before any work."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgert import perplexity
from edgert.chosen_bits import PROFILE, PROOF, profile_digest
from edgert.experts.profile import Profile
from edgert.goal import Goal
from edgert.loading import words
from edgert.profiling import default_out as default_profile
from edgert.profiling import profile_model
from edgert.proof_text import ProofText, proof_text
from edgert.storage.tensor_file import TensorFile
from edgert.weights import Progress

_TOKENS, _HELD_OUT = 20_000, 0.2  # of a profile that is made here; half of what is kept back selects, half proves


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
        proof = {} if self.text is None else {PROOF: hashlib.sha256(self.text.encode()).hexdigest()[:32]}
        return {**self.goal.as_document(), PROFILE: profile_digest(self.profile), **proof}

    def proof_text(self, file: TensorFile) -> ProofText:
        """The text to choose and to prove by; file: the source. Raises as edgert.proof_text does."""
        chunks = None
        if self.text is not None:
            tokenizer, _ = words(file)
            bos = tokenizer.bos_id if tokenizer.add_bos else None
            chunks = perplexity.chunks(tokenizer.encode(self.text), self.profile.chunk, None, bos)
        return proof_text(self.profile, chunks, self.text_name, selects=self.goal.loss is not None)


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
