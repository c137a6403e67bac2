"""The Python API over the embedded model: whole and streamed answers, prefix reuse, limits, threads, cancelling."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from models import golden_path

import edgert
from edgert.errors import (
    BusyError,
    ContextLengthError,
    EdgertError,
    MemoryLimitError,
    ModelFileError,
    OptionError,
)

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def model() -> Iterator[edgert.Model]:
    """The embedded model with a short context."""
    with edgert.load(context=512) as loaded:
        yield loaded


def test_greedy_answers(model: edgert.Model) -> None:
    answer = model.chat(FRANCE, temperature=0, repetition_penalty=1.0)
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason == "stop"
    assert answer.usage.prompt_tokens == 37 and answer.usage.generated_tokens == 8
    decoded = 30 * 2 * 7  # layers, experts a token, tokens after the first
    assert decoded < answer.usage.expert_hits <= decoded + 30 * 16 and answer.usage.expert_misses == 0
    assert 0 < answer.usage.ttft_s < 60 and answer.usage.tokens_per_s > 0


def test_streamed_pieces_are_the_whole_answer(model: edgert.Model) -> None:
    whole = model.generate("Once upon a time", max_tokens=20)
    stream = model.generate("Once upon a time", max_tokens=20, stream=True)
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == whole.text == stream.completion.text
    assert sum((piece.token_ids for piece in pieces), ()) == whole.token_ids
    assert whole.finish_reason == "length" and len(whole.token_ids) == 20
    assert model.generate(model.tokenizer.encode("Once upon a time"), max_tokens=20).text == whole.text


def test_the_next_turn_computes_only_the_new_text(model: edgert.Model) -> None:
    first = model.chat(FRANCE, temperature=0)
    turn = [*FRANCE, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And of Italy?"}]
    second = model.chat(turn, temperature=0)
    new = second.usage.prompt_tokens - second.usage.cached_tokens
    assert second.usage.cached_tokens >= first.usage.prompt_tokens + first.usage.generated_tokens - 1
    assert new < 25
    model.generate("something else entirely", max_tokens=1)
    again = model.chat(turn, temperature=0)
    assert again.usage.cached_tokens < 5 and again.text == second.text


def test_the_same_seed_gives_the_same_text(model: edgert.Model) -> None:
    options = {"temperature": 0.9, "max_tokens": 24}
    texts = [model.generate("The weather today", seed=seed, **options).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stop_strings_and_log_probabilities(model: edgert.Model) -> None:
    plain = model.generate("Count: one, two, three,", max_tokens=12)
    word = plain.text.split()[1]
    cut = model.generate("Count: one, two, three,", max_tokens=12, stop=word, logprobs=2)
    assert cut.finish_reason == "stop" and cut.stop == word and cut.text == plain.text[: plain.text.index(word)]
    assert cut.logprobs is not None
    for entry in cut.logprobs:
        assert entry.top[0][0] == entry.token_id and entry.top[0][1] == entry.logprob <= 0 and len(entry.top) == 2
    banned = model.generate("Count: one, two, three,", max_tokens=1, logit_bias={plain.token_ids[0]: float("-inf")})
    assert banned.token_ids[0] != plain.token_ids[0]


def test_a_full_context_is_a_stop_reason() -> None:
    with edgert.load(context=32) as small:
        answer = small.generate([5] * 30)
        assert answer.finish_reason == "context" and answer.usage.generated_tokens == 3
        assert small.generate([5] * 32).usage.generated_tokens == 1
        with pytest.raises(ContextLengthError, match="33 tokens, the context holds 32"):
            small.generate([5] * 33)
        assert small.generate([5] * 4, max_tokens=2).finish_reason == "length"


def test_bad_calls_are_refused(model: edgert.Model) -> None:
    for call, message in [
        (lambda: model.generate(""), "prompt is empty"),
        (lambda: model.generate([49152]), "token 49152 is outside"),
        (lambda: model.generate([-1]), "token -1 is outside"),
        (lambda: model.generate("a", temperature=-1), "temperature"),
        (lambda: model.generate("a", logit_bias={99999: 1.0}), "token 99999, outside"),
        (lambda: model.generate("a", max_tokens=-1), "max_tokens"),
        (lambda: model.logits([]), "no tokens"),
        (lambda: model.perplexity("too short"), "less than one chunk"),
    ]:
        with pytest.raises(OptionError, match=message):
            call()


def test_bad_options_of_load() -> None:
    for options, error, message in [
        ({"context": 0}, OptionError, "context=0 must lie between 1 and 8192"),
        ({"context": 9000}, OptionError, "context=9000"),
        ({"device": "tpu"}, OptionError, "device='tpu'"),
        ({"kv_type": "q4"}, OptionError, "kv_type='q4'"),
        ({"activations": "int2"}, OptionError, "activations='int2'"),
        ({"threads": 0}, OptionError, "threads=0"),
        ({"memory": "100MiB"}, MemoryLimitError, "use --memory"),
        ({"memory": "lots"}, OptionError, "memory='lots'"),
    ]:
        with pytest.raises(error, match=message):
            edgert.load(**options)
    with pytest.raises(ModelFileError, match=r"nowhere\.gguf"):
        edgert.load("nowhere.gguf")


def test_an_abandoned_or_cancelled_stream_frees_the_model(model: edgert.Model) -> None:
    stream = model.generate("a b c", stream=True)
    next(stream)
    with pytest.raises(BusyError, match="this thread still reads another answer"):
        model.generate("x", max_tokens=1)
    stream.close()
    stream.close()
    assert model.generate("x", max_tokens=1).finish_reason == "length"
    stream = model.generate("a b c", stream=True)
    next(stream)
    del stream
    gc.collect()
    assert model.generate("x", max_tokens=1).finish_reason == "length"
    stream = model.generate("a b c", stream=True)
    threading.Timer(0.3, stream.cancel).start()
    assert stream.finish().finish_reason == "cancelled"


def test_calls_of_several_threads_queue(model: edgert.Model) -> None:
    alone = [model.generate(f"Number {i}", max_tokens=8).text for i in range(4)]
    together = [""] * 4

    def answer(i: int) -> None:
        together[i] = model.generate(f"Number {i}", max_tokens=8).text

    threads = [threading.Thread(target=answer, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert together == alone


def test_the_turn_belongs_to_the_stream_and_not_to_the_thread_that_began_it(model: edgert.Model) -> None:
    stream = model.generate("a b c", stream=True, max_tokens=40)
    pieces = [next(stream)]
    elsewhere = threading.Thread(target=lambda: pieces.append(next(stream)))  # read on by another thread
    elsewhere.start()
    elsewhere.join(60)
    assert len(pieces) == 2
    threading.Timer(0.3, stream.close).start()
    assert model.generate("x", max_tokens=1).finish_reason == "length"  # this thread waits, no BusyError
    assert stream.finish_reason == "cancelled"


def test_an_answer_that_waits_for_its_turn_can_be_cancelled(model: edgert.Model) -> None:
    first, second = (model.generate("a b c", stream=True, max_tokens=40) for _ in range(2))
    next(first)
    reader = threading.Thread(target=second.finish)
    reader.start()
    time.sleep(0.2)
    assert reader.is_alive() and second.completion.text == ""
    second.cancel()
    reader.join(20)
    assert not reader.is_alive() and second.finish_reason == "cancelled"
    assert next(first).token_ids, "the answer that has the turn goes on"
    first.close()


def test_a_measurement_that_asks_for_an_answer_is_told_so(model: edgert.Model) -> None:
    def ask(fraction: float, value: float) -> None:
        model.generate("x", max_tokens=1)

    with pytest.raises(BusyError):
        model.perplexity("one two three four five six " * 4, chunk=8, progress=ask)
    assert model.generate("x", max_tokens=1).finish_reason == "length"


def test_logits_are_those_of_decoding(model: edgert.Model) -> None:
    ids = model.tokenizer.encode("The quick brown fox")
    logits = model.logits(ids)
    assert logits.shape == (len(ids), model.config.n_vocab) and logits.dtype == np.float32
    assert model.generate("The quick brown fox", max_tokens=1).token_ids == (int(logits[-1].argmax()),)


def test_perplexity_falls_with_sense(model: edgert.Model) -> None:
    sense = "The sun rose over the hills and the birds began to sing in the trees by the river. " * 2
    nonsense = " ".join(sorted(sense.split(), key=lambda word: word[::-1]))
    values = [model.perplexity(text, chunk=16, n_chunks=2) for text in (sense, nonsense)]
    assert values[0].value < values[1].value and values[0].n_tokens == 2 * 7 and values[0].standard_error > 0


def test_a_model_can_be_closed_while_a_stream_is_open() -> None:
    with edgert.load(golden_path("llama-f32")) as model:
        stream = model.generate([1, 2], stream=True)
        next(stream)
    assert stream.finish_reason == "cancelled" and list(stream) == []
    with pytest.raises(EdgertError, match="closed"):
        model.generate([1, 2], max_tokens=1)
    with pytest.raises(ZeroDivisionError), edgert.load(golden_path("llama-f32")) as model:  # and not a BusyError
        for _ in (stream := model.generate([1, 2], stream=True)):
            raise ZeroDivisionError


def test_closing_ends_a_stream_that_another_thread_reads() -> None:
    model = edgert.load(golden_path("llama-f32"), context=4096)
    stream = model.generate([1, 2], stream=True, logit_bias=dict.fromkeys(model.tokenizer.stop_ids, float("-inf")))
    begun = threading.Event()

    def read() -> None:
        for _ in stream:
            begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(20)
    model.close()
    reader.join(20)
    assert not reader.is_alive() and stream.finish_reason == "cancelled"


def test_closing_gives_back_the_memory() -> None:
    model = edgert.load(golden_path("llama-f32"))
    assert model._parts is not None
    device = weakref.ref(model._parts.engine.device)
    stream = model.generate([1, 2], stream=True)
    next(stream)
    finished = model.generate([1, 2], stream=True)
    model.close()
    gc.collect()
    assert device() is None
    assert stream.finish_reason == "cancelled" and finished.finish_reason is None
    with pytest.raises(EdgertError, match="closed"):
        next(finished)


FORKED = """
import os, sys, edgert
with edgert.load(sys.argv[1], threads=2) as model:
    stream = model.generate([1, 2], stream=True, max_tokens=9)
    next(stream)
    child = os.fork()
    if child == 0:
        said = []
        for call in (lambda: next(stream), lambda: model.generate([1, 2]), lambda: model.logits([1])):
            try:
                call()
            except edgert.EdgertError as error:
                said.append(str(error))
        model.close()
        with edgert.load(sys.argv[1], threads=2) as own:
            own.logits([1])
        expected = "this model was loaded before fork; load it in the child, or use the spawn start method"
        os._exit(0 if said == [expected] * 3 else 1)
    _, status = os.waitpid(child, 0)
    stream.finish()
    sys.exit(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_fork_a_model_says_so_and_does_not_hang() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(golden_path("llama-f32"))]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_model_says_so() -> None:
    model = edgert.load(golden_path("llama-f32"))
    before = threading.active_count()
    model.close()
    model.close()
    with pytest.raises(EdgertError, match="closed"):
        model.generate([1, 2], max_tokens=1)
    deadline = time.time() + 10
    while threading.active_count() >= before > 1 and time.time() < deadline:
        time.sleep(0.01)
    assert threading.active_count() < before or before == 1


def test_describe_reads_no_weights(tmp_path: Path) -> None:
    from edgert.describing import describe

    facts = describe()
    assert facts["architecture"] == "granitemoe" and facts["experts"]["count"] == 16 and facts["experts"]["used"] == 2
    assert facts["bytes"]["hot"] + facts["bytes"]["cold"] <= facts["bytes"]["total"] == 129_337_952
    assert facts["vocabulary"]["size"] == 49152 and facts["template"]["source"] == "model"
    assert facts["memory"]["total"] > facts["memory"]["hot"] > 50e6
