"""States that pass from token to token beside keys and values: of short convolutions and of gated delta nets.

Keys of tokens that are taken back are simply written over. A state cannot be cut back: it is kept at some positions,
and a text that goes on from elsewhere goes back to the last of these, from where tokens are computed again. So it is
with rings of keys and values (see rings.py), further back than they still hold.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from edgert.devices.rings import KEPT, Rings
from edgert.types import Floats, ModelConfig


class StatePlace(NamedTuple):
    """Where the state of a layer lies, in floats: the convolution's last inputs, and the delta net's memory."""

    inputs: int
    n_inputs: int  # tokens
    width: int  # of one token's inputs, up to a multiple of 16
    memory: int
    n_memory: int


def places(config: ModelConfig) -> tuple[list[StatePlace | None], int]:
    """The place of each layer's state, None if it has none; and the floats of all."""
    found: list[StatePlace | None] = []
    end = 0
    for index in range(config.n_layers):
        mixer, delta = config.layer(index).mixer, config.delta
        if mixer == "attention":
            found.append(None)
            continue
        n_taps, width, n_memory = config.n_taps, config.d_model, 0
        if mixer == "delta":
            assert delta is not None
            n_taps, width, n_memory = delta.n_taps, delta.d_channels, delta.d_values * delta.d_state
        width = -(-width // 16) * 16
        memory = end + (n_taps - 1) * width
        found.append(StatePlace(end, n_taps - 1, width, memory, n_memory))
        end = memory + n_memory
    return found, end


def states_bytes(config: ModelConfig) -> int:
    """Bytes of the states of one sequence, all layers, those that are kept included."""
    return 4 * (KEPT + 1) * places(config)[1]


class States:
    """The states of one sequence, after `position` tokens, and what it takes to bring its rings back there."""

    def __init__(self, config: ModelConfig, rings: Rings | None = None) -> None:
        self._places, n = places(config)
        self._rings = Rings() if rings is None else rings
        self._all = np.zeros((KEPT + 1, n + 16), np.float32)
        first = -self._all.ctypes.data % 64 // 4
        self.now: Floats = self._all[0, first : first + n]
        self._kept: dict[int, int] = {}  # rows of _all by position, ascending
        self._position: int | None = 0  # None: a step did not end, and left them anyhow

    def __bool__(self) -> bool:
        return self.now.size > 0

    @property
    def forget(self) -> bool:
        """Whether there are positions that cannot be come back to."""
        return bool(self) or bool(self._rings)

    def address(self, layer: int, part: str) -> int:
        """Address of the `inputs` or the `memory` of a layer."""
        place = self._places[layer]
        return 0 if place is None else int(self.now.ctypes.data) + 4 * int(getattr(place, part))

    def inputs(self, layer: int) -> Floats:
        """The last inputs of a layer's convolution, (n_taps - 1, width), the latest last."""
        place = self._places[layer]
        assert place is not None
        return self.now[place.inputs : place.memory].reshape(place.n_inputs, place.width)

    def memory(self, layer: int) -> Floats:
        """The memory of a layer's delta net, (n_value_heads * d_state * d_state,)."""
        place = self._places[layer]
        assert place is not None
        return self.now[place.memory : place.memory + place.n_memory]

    def begin(self, start: int, n_tokens: int) -> None:
        """A step begins at position `start`, which must be one that `rewind` has returned, 0 or where it stands."""
        if self._position != start and self.rewind(start) != start:
            raise RuntimeError(f"a step at position {start}, but the states are after {self._position} tokens")
        self._position = None
        self._rings.write(start + n_tokens)

    def end(self, position: int) -> None:
        """The step is done."""
        self._position = position

    def keep(self, spare: int | None = None, position: int | None = None) -> None:
        """Keep the present states, so that `rewind` can come back here; the oldest other than `spare` are given up.

        position: another one to come back to, of the last step; only where no states pass, and rings still hold it.
        """
        position = self._position if position is None else position
        if not self.forget or not position or position in self._kept:
            return
        if position != self._position and (self or position < self._rings.back):
            raise RuntimeError(f"position {position} cannot be kept after {self._position} tokens")
        if len(self._kept) == KEPT:
            del self._kept[min(other for other in self._kept if other != spare)]
        row = next(row for row in range(1, KEPT + 1) if row not in self._kept.values())
        self._all[row, : self.now.size] = self.now
        self._rings.keep(row - 1, position)
        self._kept[position] = row

    def rewind(self, n: int) -> int:
        """Go back to the states after n tokens, or fewer: how many."""
        if not self.forget or n == self._position:
            return n
        self._kept = {position: row for position, row in self._kept.items() if position <= n}
        if not self and n >= self._rings.back:
            self._position = n
            return n
        position, self._position = max(self._kept, default=0), None  # whoever breaks in here finds no position
        if self._kept:
            row = self._kept[position]
            self.now[:] = self._all[row, : self.now.size]
            self._rings.restore(row - 1, position)
        else:
            self.now[:] = 0
            self._rings.clear()
        self._position = position
        return position


class WithoutStates:
    """What a cache says that has none; see devices.base.Cache."""

    has_states = False
    forgets = False

    def begin(self, start: int, n_tokens: int) -> None:
        """Nothing is to be prepared."""

    def end(self, position: int) -> None:
        """Nothing is to be noted."""

    def keep(self, spare: int | None = None, position: int | None = None) -> None:
        """Any position can be come back to."""

    def rewind(self, n: int) -> int:
        """Any position will do."""
        return n


class WithStates:
    """What a cache says of the states in it; see devices.base.Cache."""

    states: States

    @property
    def has_states(self) -> bool:
        """Whether there are any."""
        return bool(self.states)

    @property
    def forgets(self) -> bool:
        """Whether there are positions that cannot be come back to."""
        return self.states.forget

    def begin(self, start: int, n_tokens: int) -> None:
        """A step begins at position `start`."""
        self.states.begin(start, n_tokens)

    def end(self, position: int) -> None:
        """The step is done."""
        self.states.end(position)

    def keep(self, spare: int | None = None, position: int | None = None) -> None:
        """Make this, or a `position` of the last step, one that `rewind` can come back to; let `spare` stay one."""
        self.states.keep(spare, position)

    def rewind(self, n: int) -> int:
        """Go back to the position n, or one before it that was kept; which one."""
        return self.states.rewind(n)
