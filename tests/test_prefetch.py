"""Reading ahead: what is guessed, what is booked, and on a simulated machine its gains, and that it does no harm."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from flash_simulation import Machine, Run, scores

from edgert.devices.base import ABSENT, READING, READY
from edgert.experts.prefetch import Prefetcher
from edgert.experts.prefetch_control import Controller

N_LAYERS, N_EXPERT, TOP_K = 6, 16, 2
PERFECT, FAIR, USELESS = 8.0, 2.0, 0.0  # standard deviations by which routers ahead tell the truth


def routes(n_tokens: int, seed: int = 1) -> np.ndarray:
    """Routes (n_layers, n_tokens, top_k) with some favourites and some persistence, and no more."""
    draw = np.random.default_rng(seed)
    favour = draw.normal(0, 0.8, size=(N_LAYERS, 1, N_EXPERT))
    drift = draw.normal(size=(N_LAYERS, n_tokens, N_EXPERT))
    for token in range(1, n_tokens):
        drift[:, token] += 0.4 * drift[:, token - 1]
    return np.argsort(-(favour + drift), axis=2)[:, :, :TOP_K]


ROUTES = routes(240)
SCORES = {truth: scores(ROUTES, N_EXPERT, truth) for truth in (PERFECT, FAIR, USELESS)}


def against_off(machine: Machine, truth: float) -> tuple[float, Controller, list[bool]]:
    """How many times as fast as without reading ahead, the controller after it, and at which tokens it was on."""
    controller = Controller(N_LAYERS, machine.record_bytes, stuck_bytes=machine.piece)
    sizes = np.full((N_LAYERS, N_EXPERT), machine.record_bytes)
    run = Run(machine, ROUTES, N_EXPERT, Prefetcher(TOP_K, sizes, controller))
    with_it = run.decode(SCORES[truth])
    return without(machine) / with_it, controller, run.on


@functools.cache
def without(machine: Machine) -> float:
    """Seconds of a run that reads nothing ahead."""
    return Run(machine, ROUTES, N_EXPERT, None).decode()


@pytest.mark.parametrize("rate", [30e6, 100e6, 300e6, 1e9, 3e9])
@pytest.mark.parametrize(
    ("record_bytes", "layer_s", "truth"),
    [
        *((3 << 20, 2e-3, truth) for truth in (PERFECT, USELESS)),
        *((512 << 10, 2e-3, truth) for truth in (PERFECT, FAIR, USELESS)),
        *((60 << 10, 1e-4, truth) for truth in (PERFECT, USELESS)),
    ],
)
def test_reading_ahead_is_never_slower_than_doing_without(
    record_bytes: int, layer_s: float, truth: float, rate: float
) -> None:
    gain, _, _ = against_off(Machine(layer_s, record_bytes, rate, n_slots=30), truth)
    assert gain >= 0.98


@pytest.mark.parametrize(("record_bytes", "rate"), [(3 << 20, 1e9), (3 << 20, 3e9), (512 << 10, 300e6)])
def test_it_gains_where_the_flash_idles(record_bytes: int, rate: float) -> None:
    machine = Machine(2e-3, record_bytes, rate, n_slots=30)
    perfect, controller, on = against_off(machine, PERFECT)
    assert perfect > 1.05 and np.mean(on) > 0.7 and controller.useful.reads + controller.late.reads > 400
    assert against_off(machine, FAIR)[0] > 1.02


def test_it_turns_off_where_the_flash_is_busy() -> None:
    gain, controller, on = against_off(Machine(2e-3, 3 << 20, 30e6, n_slots=30), FAIR)
    assert not any(on) and not controller.enabled and gain == 1.0
    assert "the flash is idle" in controller.reason


def test_it_turns_off_where_it_takes_more_from_arithmetic_than_it_saves() -> None:
    machine = Machine(2e-3, 512 << 10, 300e6, n_slots=30, contention=1.5)
    gain, controller, on = against_off(machine, FAIR)
    assert gain >= 0.98 and np.mean(on) < 0.5 and "gained -" in controller.reason


def test_trials_that_fail_come_ever_more_seldom() -> None:
    controller = Controller(N_LAYERS, 1_000_000)
    on = []
    for _ in range(2000):
        on.append(controller.enabled)
        seconds = 0.013 if controller.enabled else 0.010
        controller.step(seconds, 0.004, 0.005, 5_000_000)
    starts = [i for i in range(1, len(on)) if on[i] and not on[i - 1]]
    pauses = np.diff(starts)
    assert len(starts) >= 4 and (pauses[1:] > 3 * pauses[:-1]).all()
    assert sum(on) < 60


def test_what_is_on_is_compared_again_with_what_it_would_be_off() -> None:
    controller = Controller(N_LAYERS, 1_000_000)
    without_s, on = 0.010, []
    for token in range(2000):
        on.append(controller.enabled)
        if token == 600:  # from now on the same costs more than it brings
            without_s = 0.006
        controller.step(0.007 if controller.enabled else without_s, 0.002, 0.004, 5_000_000)
    assert np.mean(on[30:600]) > 0.9 and np.mean(on[1300:]) < 0.1


def test_a_read_is_weighed_by_chance_window_and_queue() -> None:
    controller = Controller(10, 1_000_000, stuck_bytes=1 << 20)
    for _ in range(Controller.FIRST + 1):  # 10 layers of 1 ms, and as much waiting for 10 MB; the flash reads 1 GB/s
        controller.step(0.020, 0.010, 0.010, 10_000_000)
    assert controller.enabled
    controller.step(0.020, 0.010, 0.010, 10_000_000)
    accepts = controller.accepts
    assert accepts(900_000, 0.5, 1, False, 0) and not accepts(900_000, 0.05, 1, False, 0)
    assert accepts(3_000_000, 0.9, 1, False, 0) and not accepts(3_000_000, 0.4, 1, False, 0)  # it would be in the way
    assert not accepts(900_000, 0.9, 1, False, 5_000_000)  # the layer will not be idle for so long
    assert accepts(900_000, 0.9, 2, False, 5_000_000)  # but two of them may
    assert accepts(300_000, 0.9, 1, True, 0)  # behind urgent reads the rest of the layer is left


def test_without_any_idle_or_waiting_time_nothing_is_tried() -> None:
    for wait_s, busy_s, word in ((0.009, 0.0098, "idle 2%"), (0.0001, 0.002, "waiting takes 1%")):
        controller = Controller(N_LAYERS, 1_000_000)
        for _ in range(100):
            controller.step(0.010, wait_s, busy_s, 1_000_000)
            assert not controller.enabled
        assert word in controller.reason


# ---- the prefetcher --------------------------------------------------------------------------------------------------
def forced(sizes: np.ndarray | None = None) -> Prefetcher:
    """One that always reads ahead."""
    sizes = np.full((N_LAYERS, N_EXPERT), 4096) if sizes is None else sizes
    return Prefetcher(TOP_K, sizes, Controller(len(sizes), 4096, mode="always"))


def guesses(prefetcher: Prefetcher, layer: int, target: int | None = None) -> tuple[list, list]:
    """(key, chance) for the next layer, which is `target`, and for the one after it, if nothing is in RAM."""
    target = (layer + 1) % N_LAYERS if target is None else target
    found = prefetcher.guesses(layer, np.full(N_LAYERS * N_EXPERT, ABSENT, np.uint8))
    near = [guess for guess in found if guess[0] // N_EXPERT == target]
    return near, [guess for guess in found if guess not in near]


def pointing_at(*experts: int) -> np.ndarray:
    """Router scores that favour these."""
    made = np.zeros(N_EXPERT + 4, np.float32)  # a device's rows may be padded
    made[list(experts)] = 5.0
    return made


def test_guesses_follow_the_routers_of_the_next_layers_and_wrap_to_the_next_token() -> None:
    prefetcher = forced()
    assert prefetcher.enabled and prefetcher.n_ahead == 2
    prefetcher.routed(2, np.array([[1, 2]]), [pointing_at(3, 7), pointing_at(9, 11)])
    near, far = guesses(prefetcher, 2)
    assert {key for key, _ in near[:2]} == {3 * N_EXPERT + 3, 3 * N_EXPERT + 7}
    assert {key for key, _ in far[:2]} == {4 * N_EXPERT + 9, 4 * N_EXPERT + 11}
    assert [p for _, p in near] == sorted((p for _, p in near), reverse=True) and near[0][1] > 0.5
    for _ in range(40):
        for layer in range(N_LAYERS):
            prefetcher.routed(layer, np.array([[4, 5]]), [])
    near, far = guesses(prefetcher, N_LAYERS - 1)
    assert {key for key, _ in near[:2]} == {4, 5}
    assert {key for key, _ in far[:2]} == {N_EXPERT + 4, N_EXPERT + 5}


def test_layers_without_experts_are_not_guessed_at() -> None:
    sizes = np.full((N_LAYERS, N_EXPERT), 4096)
    sizes[0] = 0
    prefetcher = forced(sizes)
    prefetcher.routed(N_LAYERS - 1, np.array([[1, 2]]), [])
    near, far = guesses(prefetcher, N_LAYERS - 1, target=0)
    assert near == [] and far


def test_only_what_is_away_is_chosen_and_all_that_was_read_is_booked() -> None:
    prefetcher, state = forced(), np.zeros(N_LAYERS * N_EXPERT, np.uint8)
    start = 3 * N_EXPERT
    prefetcher.routed(2, np.array([[1, 2]]), [pointing_at(3, 7, 8, 9, 10)])
    state[start + 8] = READY
    chosen = []
    for key in prefetcher.choose(2, state, False, 0):
        prefetcher.submitted(key)
        state[key] = READING
        chosen.append(key)
    chosen = [key for key in chosen if key // N_EXPERT == 3]  # others are for the layer after it
    assert set(chosen) >= {start + 3, start + 7, start + 9} and start + 8 not in chosen
    state[start + 3], state[start + 9] = READY, ABSENT
    stale = prefetcher.settle(3, np.array([3, 7]), state)
    booked = prefetcher.controller
    assert booked.useful.reads == booked.late.reads == booked.evicted.reads == 1
    assert booked.useful.n_bytes == 4096 and booked.wasted.reads == len(chosen) - 3
    assert set(stale) == set(chosen) - {start + 3, start + 7, start + 9}
    assert prefetcher.settle(3, np.array([3, 7]), state) == []


def test_what_was_not_submitted_is_not_booked() -> None:
    prefetcher, state = forced(), np.zeros(N_LAYERS * N_EXPERT, np.uint8)
    prefetcher.routed(2, np.array([[1, 2]]), [pointing_at(3, 7)])
    next(prefetcher.choose(2, state, False, 0))
    assert prefetcher.settle(3, np.array([3, 7]), state) == []
    assert prefetcher.controller.evicted.reads == 0


def test_off_is_off() -> None:
    controller = Controller(N_LAYERS, 4096, mode="off")
    for _ in range(100):
        controller.step(0.020, 0.010, 0.010, 10_000_000)
    assert not controller.enabled
    assert Prefetcher(TOP_K, np.full((N_LAYERS, N_EXPERT), 4096), controller).n_ahead == 0
