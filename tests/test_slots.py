"""The expert buffer's places: never lost, never given out twice, whatever sizes come and go."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.experts.slots import Slots

PAGE = 4096
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**31), pages=st.integers(9, 40))
def test_any_sequence_of_places_keeps_its_bytes(sizes: list[int], seed: int, pages: int) -> None:
    random, slots = np.random.default_rng(seed), Slots(pages * PAGE)
    places: dict[int, int] = {}  # start: size
    marks: dict[int, int] = {}

    def moved(old: int, new: int) -> None:
        places[new], marks[new] = places.pop(old), marks.pop(old)

    for number, n_pages in enumerate(sizes):
        n_bytes = n_pages * PAGE
        while (start := slots.take(n_bytes)) is None:
            movable = {at: size for at, size in places.items() if random.random() < 0.8}
            if slots.free_bytes >= n_bytes and slots.join_gaps(n_bytes, movable, moved, pages * PAGE):
                continue
            victim = int(random.choice(list(places)))
            slots.give_back(victim, places.pop(victim))
            del marks[victim]
        places[start], marks[start] = n_bytes, number % 251
        slots.at(start, n_bytes)[:] = number % 251
        assert not slots.check(places)
        assert all((slots.at(at, size) == marks[at]).all() for at, size in places.items())
    assert slots.free_bytes == pages * PAGE - sum(places.values())


def test_movable_records_never_leave_free_bytes_unused() -> None:
    slots = Slots(10 * PAGE)
    starts = [slots.take(2 * PAGE) for _ in range(5)]
    for start in (starts[0], starts[2], starts[4]):
        slots.give_back(start, 2 * PAGE)
    places = {starts[1]: 2 * PAGE, starts[3]: 2 * PAGE}
    assert slots.take(4 * PAGE) is None
    assert not slots.join_gaps(4 * PAGE, {}, lambda old, new: None, 9 * PAGE)
    assert not slots.join_gaps(4 * PAGE, places, lambda old, new: None, PAGE)  # that takes moving two pages
    moves: list[tuple[int, int]] = []
    assert slots.join_gaps(4 * PAGE, places, lambda old, new: moves.append((old, new)), 2 * PAGE)
    assert len(moves) == 1 and slots.take(4 * PAGE) is not None
    assert slots.free_bytes == 2 * PAGE


def test_the_end_of_the_buffer_is_given_back_and_taken_again() -> None:
    slots = Slots(8 * PAGE)
    first, second = slots.take(3 * PAGE), slots.take(3 * PAGE)
    slots.at(second, 3 * PAGE)[:] = 7
    slots.give_back(second, 3 * PAGE)
    slots.set_limit(4 * PAGE)
    assert slots.free_bytes == PAGE and not slots.check({first: 3 * PAGE})
    assert not slots.memory[4 * PAGE :].any()  # pages that were given back read as zeros
    slots.set_limit(8 * PAGE)
    assert slots.free_bytes == 5 * PAGE and slots.take(5 * PAGE) == 3 * PAGE
    slots.give_back(3 * PAGE, 5 * PAGE)
    slots.set_limit(5 * PAGE)
    slots.give_back(first, 3 * PAGE)
    assert not slots.check({}) and slots.free_bytes == 5 * PAGE


def test_places_that_are_kept_leave_the_gaps_between_them() -> None:
    slots = Slots(8 * PAGE)
    slots.take(5 * PAGE)
    kept = {PAGE: 2 * PAGE, 3 * PAGE: PAGE}
    slots.keep(kept)
    assert not slots.check(kept) and slots.free_bytes == 5 * PAGE
    assert [slots.take(4 * PAGE), slots.take(PAGE), slots.take(PAGE)] == [4 * PAGE, 0, None]
