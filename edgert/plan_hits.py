"""How many of the experts asked for will be found in RAM: measured routes of the model, or what other models showed.

A rate of hits is a function of the residency, the expert buffer's share of all experts. Nothing decides it better than
a profile of the very model; without one the range is wide, and says where it is from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgert.experts.choice import DEFAULT_POLICY, Choice
from edgert.experts.policies import make_policy
from edgert.experts.profile import Profile
from edgert.experts.replay import replay_policy
from edgert.experts.trace import Trace
from edgert.plan_parts import PROMPT, even_distinct
from edgert.report_numbers import sampled
from edgert.types import Ids

Curve = Mapping[float, float]  # residency -> share found in RAM; straight lines between, 0 at 0 and 1 at 1

EVEN: Curve = {}  # every expert as likely as any other, whatever the policy
# The embedded model (16 experts of which 2, 30 layers), a dialogue of 160 tokens replayed with the policy `cost`.
DIALOGUE: Curve = {
    0.0625: 0.22,
    0.125: 0.35,
    0.25: 0.53,
    0.375: 0.66,
    0.5: 0.77,
    0.625: 0.85,
    0.75: 0.92,
    0.875: 0.97,
}
# Qwen3-30B-A3B, 75,773 tokens of one user's work (public routing counts, MIT): the most used experts kept, no others.
QWEN3_COUNTS: Curve = {0.05: 0.22, 0.1: 0.36, 0.125: 0.42, 0.2: 0.57, 0.25: 0.65, 0.3: 0.72, 0.4: 0.82, 0.5: 0.89}
# Qwen3-30B-A3B on a phone of 12 GB, 65 to 82 % with 2 to 4 GB of 17.5 GB (published by the makers of BigMoeOnEdge).
QWEN3_PHONE: Curve = {0.115: 0.65, 0.23: 0.82, 0.5: 0.93}

_REPLAYED = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
_UNSURE = 0.25  # by which the misses of text that was not profiled differ from those of text that was


@dataclass(frozen=True)
class Hits:
    """Three rates of hits by residency: what a hard, a usual and an easy text gives. source: where they are from.

    in_play: of the experts that even routing would use in a chunk, the share that is used.
    """

    hard: Curve
    usual: Curve
    easy: Curve
    source: str
    measured: bool = False  # on the very model
    in_play: float = 1.0

    def at(self, residency: float) -> tuple[float, float, float]:
        """(hard, usual, easy) shares of experts found in RAM."""
        hard, usual, easy = (along(curve, residency) for curve in (self.hard, self.usual, self.easy))
        return min(hard, usual), usual, max(usual, easy)


def along(curve: Curve, residency: float) -> float:
    """The rate at a residency."""
    x = [0.0, *curve, 1.0]
    return float(np.interp(residency, x, [0.0, *curve.values(), 1.0]))


def usual_hits(name: str) -> Hits:
    """For a model whose routes nobody has measured here."""
    if "qwen3-30b-a3b" in name.lower().replace(" ", "-"):
        source = "public routing counts of this model; hard: all experts alike; easy: as on a phone with this model"
        return Hits(EVEN, QWEN3_COUNTS, QWEN3_PHONE, source)
    source = "the embedded model's dialogues; hard: all experts alike; easy: as Qwen3-30B-A3B on a phone"
    return Hits(EVEN, DIALOGUE, QWEN3_PHONE, source)


def profiled_hits(profile: Profile, record_bytes: Ids) -> Hits:
    """From a profile's routes, replayed with the default policy; takes seconds."""
    said = f"{profile.n_tokens:,} tokens of this model's profile, replayed with {DEFAULT_POLICY}"
    return replayed_hits(sampled(profile, record_bytes), said)


def replayed_hits(
    trace: Trace, source: str, n_warm: int | None = None, choose: Callable[[float], Choice] = lambda share: Choice()
) -> Hits:
    """From recorded routes, replayed after n_warm tokens, by default half of them.

    choose: the policy at a residency, by default the default one.
    """
    total = int(trace.record_bytes.sum())
    least = (trace.top_k + 1) * int(trace.record_bytes.max()) / max(total, 1)
    found = {}
    for share in _REPLAYED:
        if share >= least:
            choice = choose(share)
            policy = make_policy(choice.policy, trace.record_bytes, choice.profile, choice.topics)
            found[share] = replay_policy(trace, policy, int(share * total), n_warm).byte_rate
    hard, easy = (
        {share: max(0.0, 1 - (1 - rate) * factor) for share, rate in found.items()}
        for factor in (1 + _UNSURE, 1 - _UNSURE)
    )
    return Hits(hard, found, easy, source, measured=True, in_play=_in_play(trace))


def _in_play(trace: Trace) -> float:
    """Experts that the tokens of a trace, or a chunk of them, use beside those that even routing would."""
    ids = trace.ids[trace.layers, :PROMPT]
    used = [len(np.unique(layer)) for layer in ids]
    return min(1.0, float(np.mean(used)) / even_distinct(trace.n_expert, trace.top_k, ids.shape[1])) if used else 1.0
