"""What is known of a pack before any weight is read: the sizes of its choices, and whether one is as was asked.

Losses are in it where the profile knows them; nothing here measures or loads anything.
"""

from __future__ import annotations

import math

import numpy as np

from edgert.allocating import Problem
from edgert.bits import PROJECTIONS, Bits
from edgert.errors import OptionError
from edgert.experts.profile import Profile, Sensitivity
from edgert.experts.profiled_choice import choice_bytes
from edgert.goal import Goal
from edgert.pack import Packing
from edgert.quant.formats import Format
from edgert.quantising import candidates, profile_counts
from edgert.requantised import Bytes, RequantisedSource
from edgert.storage.tensor_file import TensorFile
from edgert.types import Floats, ModelConfig
from edgert.weights import Weights, silent


class Sizes:
    """Sizes of a model's file with its experts in other formats, for a goal; hot: the format of hot weights, if any."""

    def __init__(self, file: TensorFile, config: ModelConfig, goal: Goal, hot: Format | None) -> None:
        self._file, self._config, self._goal, self._hot = file, config, goal, hot

    def measured(self, profile: Profile) -> Sensitivity | None:
        """What a profile knows of losses with the goal's quantiser."""
        found = profile.sensitivity
        return found if found is not None and found.quantiser == self._goal.quantiser else None

    def problem(self, profile: Profile) -> Problem:
        """The problem with what a profile knows of losses; where that is nothing, only its sizes mean anything."""
        format, *_ = Weights(self._file, self._config).sizes_of(
            f"blk.{self._config.expert_layers[0]}.ffn_down_exps.weight"
        )
        return Problem(self.measured(profile) or self._unmeasured(profile), self._config, self._hot, format)

    def check(self, profile: Profile) -> None:
        """OptionError for a size below the least that the model can be quantised to."""
        goal = self._goal
        if goal.bits_per_weight is None and goal.n_bytes is None:
            return
        problem = self.problem(profile)
        least = problem.smallest()
        if goal.n_bytes is not None:
            problem.smallest_within(goal.n_bytes, self.beside(profile, least.bits))
            return
        bits = math.ceil(800 * least.n_bytes / problem.n_weights) / 100
        if goal.bits_per_weight is not None and goal.bits_per_weight < bits:
            at_four = f" ({len(problem.never_routed):,} of them, never routed to, at four bits)"
            raise OptionError(
                f"--size {goal.bits_per_weight:g}bpw is below {bits:g}bpw, the least that this model's experts can "
                f"be quantised to{at_four if problem.never_routed else ''}; use --size {bits:g}bpw or more"
            )

    def beside(self, profile: Profile, bits: Bits) -> int:
        """Bytes of a bundle beside its experts; at most, where its profile is to be measured."""
        if self.measured(profile) is None:
            profile = profile.with_sensitivity(self._unmeasured(profile).incompressible())
        m = Packing(self._file, silent, unread(self._file, bits)).manifest
        about = 2 * len(m.as_text()) + choice_bytes(m.record_bytes)  # twice the text: a proof is to come
        return m.hot_bytes + m.metadata_bytes + about + profile.file_bytes()

    def _unmeasured(self, profile: Profile) -> Sensitivity:
        """What is known of sizes before anything is known of losses."""
        names = candidates(Weights(self._file, self._config))
        rows = profile_counts(profile).astype(np.int32)
        errors: Floats = np.zeros((*rows.shape, len(PROJECTIONS), len(names)), np.float32)
        gains: Floats = np.zeros(len(rows), np.float32)
        return Sensitivity(self._goal.quantiser, names, errors, rows, gains, profile.n_tokens)


def unread(file: TensorFile, bits: Bits) -> RequantisedSource:
    """A model's file with experts in these formats, of which only sizes may be asked."""
    return RequantisedSource(file, bits, _no_tiles)


def _no_tiles(place: tuple[int, int, int], first: int, n_bytes: int) -> Bytes:
    raise AssertionError(f"sizes are asked for, and so no tiles: {place}, {first}, {n_bytes}")
