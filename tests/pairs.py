"""All pairs of choices in few combinations: what goes wrong mostly takes no more than two choices to show."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

_TRIES = 40  # random candidates for each combination, of which the one with most new pairs is taken


def all_pairs(choices: Mapping[str, Sequence[Any]], seed: int = 1) -> list[dict[str, Any]]:
    """Combinations, one value of each choice, in which every two values of two choices meet."""
    draw, names = random.Random(seed), list(choices)
    places = {name: range(len(choices[name])) for name in names}
    left = {((a, i), (b, j)) for a, b in combinations(names, 2) for i in places[a] for j in places[b]}
    found = []
    while left:
        first = dict(min(left))  # each combination closes at least this pair
        candidates = [{name: first.get(name, draw.choice(places[name])) for name in names} for _ in range(_TRIES)]
        closed = [left.intersection(combinations(picked.items(), 2)) for picked in candidates]
        best = max(range(_TRIES), key=lambda i: len(closed[i]))  # called at once
        left -= closed[best]
        found.append({name: choices[name][i] for name, i in candidates[best].items()})
    return found
