"""States that pass from token to token: whatever is taken back or broken off, the answer is that of a new text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from models import engine_of, golden_path, run

from edgert.architectures import read_config
from edgert.devices.cpu import CpuDevice
from edgert.devices.kv_cache import cache_bytes
from edgert.devices.reference import ReferenceDevice
from edgert.devices.states import KEPT, States, places, states_bytes
from edgert.engine import Engine, Session
from edgert.storage.gguf_file import GgufFile
from edgert.types import ModelConfig

MODELS = ("lfm2moe-f32", "qwen3next-f32", "qwen35moe-gateup-f32")
FIRST, ANSWER, SECOND = [5, 9, 2, 7, 1, 8, 30, 12, 4], [3, 3, 17], [40, 41, 6, 2, 19]


def config_of(name: str) -> ModelConfig:
    with GgufFile.open(golden_path(name)) as file:
        return read_config(file.metadata, name)


def last_logits(engine: Engine, session: Session, text: list[int]) -> tuple[Any, int]:
    """Logits of a text's last token as the model answers it, and how many of its tokens were not run again."""
    kept = session.trim(text)
    chunks = list(engine.prompt(text[kept:], session))
    return engine.last_logits(chunks[-1]).copy(), kept


@pytest.mark.parametrize("device", [CpuDevice, ReferenceDevice])
@pytest.mark.parametrize("name", MODELS)
def test_a_conversation_that_goes_back_answers_as_anew(name: str, device: Any) -> None:
    engine, session = engine_of(golden_path(name), device=device)
    second = FIRST + ANSWER + SECOND
    texts = [
        (FIRST, 0),
        (second, len(FIRST + ANSWER)),  # goes on
        (second, len(second) - 1),  # the same again
        (FIRST + ANSWER + [1, 2], len(FIRST + ANSWER)),  # the last question taken back
        (FIRST + ANSWER + [1, 2, 3], len(FIRST + ANSWER) + 1),
        ([*FIRST[:4], 60, 61], 0),  # nothing is kept so early
    ]
    for text, expected in texts:
        found, kept = last_logits(engine, session, text)
        assert kept == expected, text
        fresh = run(*engine_of(golden_path(name), device=device), text)[-1]
        assert (found == fresh).all(), text
        for token in ANSWER:
            engine.step([token], session)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_that_fails_leaves_nothing_behind(name: str) -> None:
    engine, session = engine_of(golden_path(name))
    last_logits(engine, session, FIRST)
    engine.every_layer, combine, calls = True, engine.device.combine, [0]

    def fails(layer: int) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError("the drive is gone")
        combine(layer)

    engine.device.combine = fails  # type: ignore[method-assign]
    with pytest.raises(OSError, match="the drive"):
        engine.step([11], session)
    engine.device.combine = combine  # type: ignore[method-assign]
    text = [*FIRST, 11]
    found, kept = last_logits(engine, session, text)
    assert kept == len(FIRST) - 1 and (found == run(*engine_of(golden_path(name)), text)[-1]).all()


def test_a_step_elsewhere_is_refused_and_the_beginning_is_not() -> None:
    engine, session = engine_of(golden_path("lfm2moe-f32"))
    run(engine, session, FIRST)
    del session.tokens[4:]
    with pytest.raises(RuntimeError, match="a step at position 4, but the states are after 0 tokens"):
        engine.step([1], session)
    session.tokens.clear()
    assert (run(engine, session, FIRST) == run(*engine_of(golden_path("lfm2moe-f32")), FIRST)).all()


def test_states_are_kept_where_asked_and_the_oldest_is_given_up() -> None:
    states = States(config_of("qwen3next-f32"))
    for position in range(1, 6):
        states.begin(position - 1)
        states.now[:] = position
        states.end(position)
        states.keep()
    assert states.rewind(5) == 5 and (states.now == 5).all()
    assert states.rewind(4) == 4 and (states.now == 4).all()
    assert states.rewind(3) == 0 and (states.now == 0).all()
    states.begin(0)
    assert states.rewind(3) == 0  # a step that did not end


def test_what_models_without_states_keep() -> None:
    config = config_of("llama-f32")
    states = States(config)
    assert not states and states_bytes(config) == 0 and states.rewind(7) == 7
    states.keep()
    states.begin(3)


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_counts_states_and_only_layers_that_attend(name: str) -> None:
    config = config_of(name)
    attending = [layer for layer in range(config.n_layers) if config.layer(layer).mixer == "attention"]
    per_layer = config.n_kv_heads * 64 * (config.d_head + config.d_value) * 2
    assert cache_bytes(config, 64, "f16") == len(attending) * per_layer + states_bytes(config)
    engine, session = engine_of(golden_path(name), n_context=64, kv_type="f16")
    assert session.cache.n_bytes == cache_bytes(config, 64, "f16") and session.cache.has_states
    found, n = places(config)
    assert [place is None for place in found] == [layer in attending for layer in range(config.n_layers)]
    assert states_bytes(config) == 4 * n * (KEPT + 1) and np.isfinite(run(engine, session, FIRST)).all()
