"""What is known of a pack before any weight is read: the sizes of its choices, and whether one is as was asked.

Losses are in it where the profile knows them; nothing here measures or loads anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgert.allocating import Problem
from edgert.bits import PROJECTIONS, Bits
from edgert.errors import OptionError
from edgert.experts.profile import Profile, Sensitivity
from edgert.experts.profiled_choice import choice_bytes
from edgert.experts.speed_allocation import Tier
from edgert.goal import Goal
from edgert.loading import context_of
from edgert.pack import Packing
from edgert.quant.formats import Format
from edgert.quantising import candidates, profile_counts
from edgert.requantised import Bytes, RequantisedSource
from edgert.storage.tensor_file import TensorFile
from edgert.tier import tier_for
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

    def problem(self, profile: Profile | None) -> Problem:
        """The problem with what a profile knows of losses; where that is nothing, only its sizes mean anything."""
        format, *_ = Weights(self._file, self._config).sizes_of(
            f"blk.{self._config.expert_layers[0]}.ffn_down_exps.weight"
        )
        known = None if profile is None else self.measured(profile)
        return Problem(known or self._unmeasured(profile), self._config, self._hot, format)

    def tier(self, profile: Profile | None, place: Path, options: Mapping[str, Any]) -> tuple[Tier, str] | None:
        """What experts on flash at `place` have to do with, for a goal of speed, and in words; raises as tier_for.

        options: keywords of edgert.load. None for another goal.
        """
        memory, config = self._goal.memory, self._config
        if self._goal.objective != "speed" or memory is None:
            return None
        problem = self.problem(profile)
        weights = Weights(self._file, config, source=unread(self._file, problem.smallest().bits))
        n_context, kv_type = context_of(options.get("context"), config), options.get("kv_type", "f16")
        return tier_for(weights, memory, place, n_context, kv_type, most=problem.most_record_bytes())

    def check(self, profile: Profile | None) -> None:
        """OptionError for a size below the least that the model can be quantised to; without a profile, a lower one."""
        goal = self._goal
        if goal.bits_per_weight is None and goal.n_bytes is None:
            return
        problem = self.problem(profile)
        least = problem.smallest()
        if goal.n_bytes is not None:
            try:
                problem.smallest_within(goal.n_bytes, self.beside(profile, least.bits))
            except OptionError as error:
                besides = "" if profile is not None else ", and room for the profile that is to be made"
                raise OptionError(f"{error}{besides}") from None
            return
        bits = math.ceil(800 * least.n_bytes / problem.n_weights) / 100
        if goal.bits_per_weight is not None and goal.bits_per_weight < bits:
            at_four = f" ({len(problem.never_routed):,} of them, never routed to, at four bits)"
            raise OptionError(
                f"--size {goal.bits_per_weight:g}bpw is below {bits:g}bpw, the least that this model's experts can "
                f"be quantised to{at_four if problem.never_routed else ''}; use --size {bits:g}bpw or more"
            )

    def beside(self, profile: Profile | None, bits: Bits) -> int:
        """Bytes of a bundle beside its experts, its profile too; at most, where that is to be measured."""
        if profile is not None and self.measured(profile) is None:
            profile = profile.with_sensitivity(self._unmeasured(profile).incompressible())
        m = Packing(self._file, silent, unread(self._file, bits)).manifest
        about = 2 * len(m.as_text()) + choice_bytes(m.record_bytes)  # twice the text: a proof is to come
        return m.hot_bytes + m.metadata_bytes + about + (0 if profile is None else profile.file_bytes())

    def _unmeasured(self, profile: Profile | None) -> Sensitivity:
        """What is known of sizes before anything is known of losses; without a profile, as if all experts were used."""
        names, config = candidates(Weights(self._file, self._config)), self._config
        assert config.router is not None
        rows = np.zeros((config.n_layers, config.router.n_expert), np.int32)
        rows[list(config.expert_layers)] = 1
        if profile is not None:
            rows = profile_counts(profile).astype(np.int32)
        errors: Floats = np.zeros((*rows.shape, len(PROJECTIONS), len(names)), np.float32)
        gains: Floats = np.zeros(len(rows), np.float32)
        return Sensitivity(self._goal.quantiser, names, errors, rows, gains, 1 if profile is None else profile.n_tokens)


def unread(file: TensorFile, bits: Bits) -> RequantisedSource:
    """A model's file with experts in these formats, of which only sizes may be asked."""
    return RequantisedSource(file, bits, _no_tiles)


def _no_tiles(place: tuple[int, int, int], first: int, n_bytes: int) -> Bytes:
    raise AssertionError(f"sizes are asked for, and so no tiles: {place}, {first}, {n_bytes}")
