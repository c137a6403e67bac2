"""States that pass from token to token: whatever is taken back or broken off, the answer is that of a new text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from models import engine_of, golden_path, run

import edgert
from edgert.architectures import read_config
from edgert.chat_template import ChatTemplate
from edgert.cli.conversation import Conversation
from edgert.cli.session import Session as Chat
from edgert.devices.cpu import CpuDevice
from edgert.devices.kv_cache import cache_bytes
from edgert.devices.reference import ReferenceDevice
from edgert.devices.rings import KEPT
from edgert.devices.states import States, places, states_bytes
from edgert.engine import Engine, Session
from edgert.sampling import Sampling
from edgert.storage.gguf_file import GgufFile
from edgert.types import ModelConfig

MODELS = ("lfm2moe-f32", "qwen3next-f32", "qwen35moe-gateup-f32")
# As Qwen3.5's and ChatML: the prompt ends within the reasoning, behind one that is empty, or with the turn's name.
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opens }}{% endif %}"
)
ENDS = {"thinking": "<think>\n", "no thinking": "<think>\n\n</think>\n\n", "plain": ""}
# As Qwen's: what was thought in a turn is shown while it lasts, and no more behind the next question.
DROPS = (
    "{% set now = namespace(at=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set now.at = loop.index %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.index > now.at and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
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
        states.begin(position - 1, 1)
        states.now[:] = position
        states.end(position)
        states.keep()
    assert states.rewind(5) == 5 and (states.now == 5).all()
    assert states.rewind(4) == 4 and (states.now == 4).all()
    assert states.rewind(3) == 0 and (states.now == 0).all()
    states.begin(0, 1)
    assert states.rewind(3) == 0  # a step that did not end


def test_states_that_are_spared_stay() -> None:
    states = States(config_of("qwen3next-f32"))
    for position in range(1, 6):
        states.begin(position - 1, 1)
        states.now[:] = position
        states.end(position)
        states.keep(spare=2)
    assert states.rewind(4) == 2 and (states.now == 2).all()


def test_what_models_without_states_keep() -> None:
    config = config_of("llama-f32")
    states = States(config)
    assert not states and states_bytes(config) == 0 and states.rewind(7) == 7
    states.keep()
    states.begin(3, 1)


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


# ---- conversations -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["lfm2moe-f32", "qwen35moe-gateup-f32"])
def models(request: pytest.FixtureRequest) -> Iterator[tuple[edgert.Model, edgert.Model]]:
    """A model that talks, and one that begins anew for each answer."""
    path = golden_path(request.param)
    with edgert.load(path, context=1024, threads=1) as talks, edgert.load(path, context=1024, threads=1) as anew:
        talks.template = anew.template = ChatTemplate(TURNS, talks.tokenizer)
        yield talks, anew


def asked(
    models: tuple[edgert.Model, edgert.Model], messages: list[dict[str, str]], opens: str = ""
) -> tuple[int, int]:
    """Ask both, who must say the same: how many tokens of the prompt were in the cache, how many are the messages'."""
    talks, anew = models
    anew.logits([1])  # leaves nothing of what it has answered
    options: dict[str, Any] = {"variables": {"opens": opens}, "max_tokens": 8, "temperature": 0, "logprobs": 3}
    found, fresh = talks.chat(messages, **options), anew.chat(messages, **options)
    assert fresh.usage.cached_tokens == 0
    assert (found.token_ids, found.logprobs) == (fresh.token_ids, fresh.logprobs)
    return found.usage.cached_tokens, len(talks.template.encode(messages, add_generation_prompt=False))


@pytest.mark.parametrize("opens", ENDS.values(), ids=ENDS)
def test_a_turn_reads_only_what_is_new(models: tuple[edgert.Model, edgert.Model], opens: str) -> None:
    messages, before, earlier = [{"role": "system", "content": "Be brief. " * 8}], 0, 0
    for turn in range(4):
        messages.append({"role": "user", "content": f"Question {turn}? " * 4})
        cached, n_messages = asked(models, messages, opens)
        assert before <= cached < before + 20 and n_messages > before + 50, turn
        before, earlier = n_messages, before
        messages.append({"role": "assistant", "content": f"Answer {turn}. " * 4})  # not the model's own words
    del messages[-1]
    assert asked(models, messages, opens)[0] >= before  # once more
    messages[-1] = {"role": "user", "content": "Another question?"}
    assert earlier <= asked(models, messages, opens)[0] < before  # the last one taken back
    messages[1] = {"role": "user", "content": "Another beginning?"}
    assert asked(models, messages, opens)[0] < 200
    assert asked(models, messages[:2], opens)[0] < 200


def test_a_turn_after_calls_of_tools_goes_back_to_the_last_question(models: tuple[edgert.Model, edgert.Model]) -> None:
    models[0].template = models[1].template = ChatTemplate(DROPS, models[0].tokenizer)
    messages, question = [{"role": "system", "content": "Be brief."}], 0
    for turn in range(2):
        messages.append({"role": "user", "content": f"Question {turn}?"})
        cached, before = asked(models, messages)
        assert question <= cached < question + 20
        question = before
        for step in range(3):
            called = {"role": "assistant", "content": f"Call {step}.", "reasoning_content": "I should look."}
            messages += [called, {"role": "tool", "content": f"Found {step}."}]
            cached, n_messages = asked(models, messages)
            assert before <= cached < before + 20
            before = n_messages
        messages.append({"role": "assistant", "content": "So it is.", "reasoning_content": "That was it."})


@pytest.mark.parametrize("opens", ENDS.values(), ids=ENDS)
def test_a_chat_in_the_terminal_reads_only_what_is_new(
    models: tuple[edgert.Model, edgert.Model], opens: str, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"variables": {"opens": opens}, "max_tokens": 8}
    chat = Chat(models[0], Conversation(), Sampling(temperature=0), options)
    for turn in range(3):
        chat.take(f"Question {turn}? " * 4)
    found = re.findall(r"prompt (\d+) new \+ (\d+) reused", capfd.readouterr().err)
    new, reused = ([int(text) for text in column] for column in zip(*found, strict=True))
    asks = len(models[0].tokenizer.encode(f"<|im_start|>assistant\n{opens}"))
    assert len(new) == 3 and reused[0] == 0
    assert all(reused[turn + 1] >= reused[turn] + new[turn] - asks for turn in range(2))


def test_a_template_that_does_not_tell_where_messages_end(models: tuple[edgert.Model, edgert.Model]) -> None:
    talks, _ = models
    for source in (
        "{{ messages[0].content }}",
        "{% if not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}?",
    ):
        talks.template = models[1].template = ChatTemplate(source, talks.tokenizer)
        messages = [{"role": "user", "content": "Hello there"}]
        prompt = talks.template.encode(messages)
        assert talks.template.lasting(prompt, messages) == []
        answers = [talks.chat(messages, max_tokens=2, temperature=0) for _ in range(2)]
        assert answers[0].text == answers[1].text and answers[1].usage.cached_tokens == len(prompt) - 1
