"""Streams over made-up tokens: stop strings, limits, cancelling, releasing, counting."""

from __future__ import annotations

import codecs
import gc
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import EdgertError, OptionError
from edgert.generation import StopCutter, StopRules, Stream, TokenLogprob, Usage
from edgert.sampling import log_softmax

steady = settings(deadline=None, derandomize=True, max_examples=200)
EOS = 1000


class Detokenizer:
    """Token i is the bytes vocabulary[i]; whole characters come out."""

    def __init__(self, vocabulary: list[bytes]) -> None:
        self.vocabulary = vocabulary
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self.decoder.decode(self.vocabulary[token_id])

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


class Maker:
    """Yields the ids of a list; counts how many were taken and how often it was begun and released."""

    def __init__(self, ids, logprobs=False, error: BaseException | None = None) -> None:
        self.ids, self.logprobs, self.error = ids, logprobs, error
        self.taken = self.started = self.released = 0

    def tokens(self):
        self.started += 1
        try:
            for i in self.ids:
                self.taken += 1
                yield i, TokenLogprob(i, -float(i)) if self.logprobs else None
            if self.error is not None:
                raise self.error
        finally:
            self.released += 1


def stream_of(maker: Maker, vocabulary: list[bytes], **rules) -> Stream:
    return Stream(maker.tokens(), Detokenizer(vocabulary), StopRules(stop_ids={EOS}, **rules))


def words(*texts: str, end: bool = True, **rules) -> tuple[Stream, Maker]:
    maker = Maker([*range(len(texts)), *([EOS] if end else [])])
    return stream_of(maker, [t.encode() for t in texts], **rules), maker


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the moment that the text ends in a stop string, cut before the longest such."""
    for n in range(len(text) + 1):
        met = [s for s in stops if text[:n].endswith(s)]
        if met:
            longest = max(met, key=len)
            return text[: n - len(longest)], longest
    return text, None


def read(tokens: list[bytes], final: bool) -> str:
    return codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(tokens), final)


TEXT = st.text(alphabet="ab é🙂", max_size=40)
STOPS = st.lists(st.text(alphabet="ab é🙂", min_size=1, max_size=4), max_size=3)


@steady
@given(TEXT, st.lists(st.integers(1, 6), min_size=60, max_size=60), STOPS, st.integers(1, 60), st.booleans())
def test_any_text_in_any_tokens_with_any_stop_strings(text, sizes, stops, limit, end):
    """Tokens cut the UTF-8 bytes anywhere. Pieces are the completion, and it is the naive cut."""
    data, vocabulary = text.encode(), []
    for size in sizes:
        if data:
            vocabulary.append(data[:size])
            data = data[size:]
    n_tokens = len(vocabulary)
    maker = Maker([*range(n_tokens), *([EOS] if end else [])], logprobs=True)
    stream = stream_of(maker, vocabulary, stop=stops, max_tokens=limit)
    pieces = list(stream)
    whole = stream.completion

    said = b"".join(vocabulary[:limit]).decode("utf-8", "replace")
    expected, met = naive(said, stops)
    assert whole.text == "".join(p.text for p in pieces) == expected
    assert whole.stop == met
    assert not any(s in p.text for s in stops for p in pieces)
    assert whole.token_ids == tuple(i for p in pieces for i in p.token_ids)
    assert whole.token_ids == tuple(range(len(whole.token_ids)))
    assert whole.logprobs == (tuple(TokenLogprob(i, -float(i)) for i in whole.token_ids) or None)
    if met is None:
        assert len(whole.token_ids) == min(limit, n_tokens)
        ended = "length" if limit <= n_tokens else "stop" if end else "context"
        assert whole.finish_reason == ended
    else:
        assert whole.finish_reason == "stop"
        n_ids = len(whole.token_ids)  # all that begin before the cut
        assert n_ids == 0 or len(read(vocabulary[: n_ids - 1], final=False)) < len(expected)
        assert len(read(vocabulary[:n_ids], final=True)) >= len(expected)
    assert maker.released == 1 and maker.taken <= limit


@steady
@given(st.text(alphabet="ab", max_size=30), STOPS)
def test_no_text_is_held_that_cannot_begin_a_stop_string(text, stops):
    cutter, free = StopCutter(stops), ""
    for n, character in enumerate(text, 1):
        free += cutter.push(character)
        if cutter.met is not None:
            assert cutter.push("more") == "" == cutter.flush()
            return
        held = text[len(free) : n]
        assert held == "" or any(s.startswith(held) and s != held for s in stops)
    assert free + cutter.flush() == text


def test_a_stop_string_across_tokens_is_never_shown():
    stream, maker = words("Hello", " #", "#", "# more", stop=["###"])
    assert [p.text for p in stream] == ["Hello", " "]
    assert stream.completion.token_ids == (0, 1)
    assert (stream.finish_reason, stream.completion.stop) == ("stop", "###")
    assert maker.taken == 4 and maker.released == 1


def test_text_that_only_looked_like_a_stop_string_comes_out():
    stream, _ = words("a", "##", "b", "##", stop="###")
    pieces = [(p.text, p.token_ids) for p in stream]
    assert pieces == [("a", (0,)), ("##b", (1, 2)), ("##", (3,))]
    assert stream.finish_reason == "stop" and stream.completion.stop is None


def test_the_stop_string_that_is_complete_first_counts():
    for texts in (["abcd"], ["a", "b", "c", "d"]):
        stream, _ = words(*texts, stop=["abcd", "bc"])
        assert (stream.finish().text, stream.completion.stop) == ("a", "bc")


def test_the_last_token_allowed_may_complete_a_stop_string():
    stream, maker = words("x", "y", "z", stop="y", max_tokens=2)
    assert stream.finish().finish_reason == "stop"
    stream, maker = words("x", "y", "z", max_tokens=2)
    assert stream.finish().finish_reason == "length"
    assert maker.taken == 2


def test_half_a_character_waits_and_is_replaced_at_the_end():
    maker = Maker([0, 1, 2])
    stream = stream_of(maker, [b"a", b"\xf0\x9f", b"\x99\x82", b"\xf0"])
    assert [(p.text, p.token_ids) for p in stream] == [("a", (0,)), ("\U0001f642", (1, 2))]
    assert stream.finish_reason == "context"
    assert stream_of(Maker([0, 3]), [b"a", b"", b"", b"\xf0"]).finish().text == "a\ufffd"


def test_tokens_without_text_are_in_the_completion():
    stream, _ = words("", "a", "")
    assert [(p.text, p.token_ids) for p in stream] == [("a", (0, 1)), ("", (2,))]
    assert stream.completion.token_ids == (0, 1, 2)


def test_an_error_releases_and_passes_through():
    maker = Maker([0], error=EdgertError("expert 3 of layer 2 cannot be read"))
    stream = stream_of(maker, [b"a"])
    assert next(stream).text == "a"
    with pytest.raises(EdgertError, match="expert 3"):
        next(stream)
    assert maker.released == 1 and list(stream) == []
    assert stream.completion.finish_reason is None and stream.completion.text == "a"


def test_close_stops_iteration_and_releases_once():
    stream, maker = words("a", "b", "c")
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == [] and maker.released == 1 and maker.taken == 1
    assert stream.completion.text == "a" and stream.finish_reason == "cancelled"
    with words("a", "b")[0] as stream:
        next(stream)
    assert stream.finish_reason == "cancelled"


def test_close_before_the_first_piece_begins_nothing():
    stream, maker = words("a")
    stream.close()
    assert list(stream) == [] and maker.started == maker.released == maker.taken == 0
    assert stream.finish_reason == "cancelled"


def test_close_after_the_end_changes_nothing():
    stream, maker = words("a")
    stream.finish()
    assert maker.released == 1
    stream.close()
    assert maker.released == 1 and stream.finish_reason == "stop"


def test_an_abandoned_stream_releases():
    stream, maker = words("a", "b")
    next(stream)
    gc.disable()  # the release must not wait for the collector of cycles
    try:
        del stream
        assert maker.released == 1
    finally:
        gc.enable()


def test_an_error_in_the_constructor_leaves_nothing_behind():
    with pytest.raises(TypeError):
        Stream()  # type: ignore[call-arg]
    gc.collect()


def test_cancel_gives_out_what_was_held_back():
    stream, maker = words("a", "##", "b", stop="a#b")
    stream.cancel()
    assert [p.text for p in stream] == [] and maker.started == 0
    assert stream.finish_reason == "cancelled"

    cancelled = threading.Event()

    def tokens():  # a cancel comes while the third token is made
        yield 0, None
        yield 1, None
        cancelled.set()

    stream = Stream(tokens(), Detokenizer([b"a", b"##"]), StopRules(stop="###"), cancelled=cancelled)
    assert [p.text for p in stream] == ["a", "##"]
    assert stream.finish_reason == "cancelled" and stream.completion.token_ids == (0, 1)


@pytest.mark.parametrize("way", ["cancel", "close"])
def test_another_thread_may_end_it(way):
    """An endless answer in one thread, ended by another in the middle of a token."""
    inside, go_on, released = threading.Event(), threading.Event(), []

    def tokens():
        try:
            yield 0, None
            inside.set()
            assert go_on.wait(20)
            while True:
                yield 0, None
        finally:
            released.append(1)

    stream = Stream(tokens(), Detokenizer([b"a"]), StopRules())
    reader = threading.Thread(target=stream.finish)
    reader.start()
    assert inside.wait(20)
    getattr(stream, way)()
    assert not released
    go_on.set()
    reader.join(20)
    assert not reader.is_alive() and released == [1]
    assert stream.finish_reason == "cancelled" and set(stream.completion.text) == {"a"}


def test_closed_within_a_token_by_another_thread_it_releases_though_nobody_reads_on():
    inside, go_on, released = threading.Event(), threading.Event(), []

    def tokens():
        try:
            inside.set()
            assert go_on.wait(20)
            yield 0, None
        finally:
            released.append(1)

    stream = Stream(tokens(), Detokenizer([b"a"]), StopRules())
    reader = threading.Thread(target=next, args=(stream,))
    reader.start()
    assert inside.wait(20)
    stream.close()
    go_on.set()
    reader.join(20)
    assert released == [1]


def test_what_fails_on_release_is_not_called_again():
    calls = []

    def tokens():
        try:
            yield 0, None
        finally:
            calls.append(1)
            raise EdgertError("the pool is gone")

    stream = Stream(tokens(), Detokenizer([b"a"]), StopRules())
    next(stream)
    with pytest.raises(EdgertError, match="pool"):
        stream.close()
    stream.close()
    assert calls == [1]


def test_many_threads_that_close_release_once():
    for _ in range(30):
        stream, maker = words(*"abcdefgh")
        threads = [threading.Thread(target=target) for target in (stream.finish, *[stream.close] * 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert maker.released == maker.started <= 1
        assert stream.completion.text == "abcdefgh"[: len(stream.completion.text)]


def test_counts_and_times():
    def tokens():
        for i in (0, 1, 2, EOS):
            time.sleep(0.02)
            yield i, None

    usage = Usage(prompt_tokens=7, cached_tokens=5)
    stream = Stream(
        tokens(),
        Detokenizer([b"a", b"b", b"c"]),
        StopRules(stop_ids={EOS}),
        usage=usage,
        started=time.perf_counter() - 1,
    )
    for _ in stream:
        time.sleep(0.1)  # a slow reader does not count
    assert stream.completion.usage is usage is stream.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.generated_tokens) == (7, 5, 4)
    assert 1.02 <= usage.ttft_s < 2
    assert 0.02 <= usage.tpot_s < 0.1
    assert usage.tokens_per_s == pytest.approx(1 / usage.tpot_s)
    assert Usage().tokens_per_s == 0


def test_nothing_is_computed_before_the_first_piece_is_asked_for():
    stream, maker = words("a")
    assert maker.taken == 0
    stream.finish()
    assert maker.taken == 2


def test_log_probabilities_of_a_token():
    logits = np.array([0, 2, 1, 2], np.float32)
    exact = log_softmax(logits)
    made = TokenLogprob.of(logits, 2, 2)
    assert made == TokenLogprob(2, exact[2], ((1, exact[1]), (3, exact[3])))
    assert TokenLogprob.of(logits, 0, 0).top == ()


@pytest.mark.parametrize(
    ("rules", "shown"),
    [
        ({"stop": ["a", ""]}, "stop=''"),
        ({"stop": ""}, "stop=''"),
        ({"stop": [3]}, "stop=3"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 1.5}, "max_tokens=1.5"),
        ({"max_tokens": True}, "max_tokens=True"),
    ],
)
def test_bad_rules_are_named(rules, shown):
    with pytest.raises(OptionError) as caught:
        StopRules(**rules)
    assert shown in str(caught.value)


def test_a_usage_says_what_share_of_its_time_was_waiting_for_experts():
    usage = Usage(generated_tokens=5, ttft_s=1.0, tpot_s=0.25, flash_wait_s=0.5, expert_hits=1, expert_misses=3)
    assert usage.flash_wait_share == 0.25 and usage.hit_rate == 0.25
    assert Usage().flash_wait_share == 0 and Usage().hit_rate is None
