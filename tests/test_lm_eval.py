"""Tasks of lm-evaluation-harness on real models, from files of this machine; skipped where lm_eval is not installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from models import golden_path

import edgert
from edgert.errors import ContextLengthError, OptionError

pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # those of that package are not ours

from edgert.lm_eval import EdgertLM, evaluate  # noqa: E402   # after the look whether it is there

PAIRS = [("Hello there", " friend"), ("Hello there", " world"), ("", "abc"), ("Hello ", "there")]


@pytest.fixture(scope="module")
def tiny() -> Iterator[edgert.Model]:
    with edgert.load(golden_path("olmoe-q8_0"), context=32) as model:
        yield model


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def expected(model: edgert.Model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood and greediness, from all logits of the whole text."""
    ids = [*context, *continuation]
    rows = model.logits(ids[:-1])[len(context) - 1 :].astype(np.float64)
    log_p = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    greedy = bool((rows.argmax(axis=1) == continuation).all())
    return float(log_p[np.arange(len(continuation)), continuation].sum()), greedy


def test_likelihoods_are_what_the_logits_say(tiny: edgert.Model) -> None:
    lm = EdgertLM(tiny)
    found = lm.loglikelihood(requests(*PAIRS))
    for (context, rest), (value, greedy) in zip(PAIRS, found, strict=True):
        whole = lm.tok_encode(context + rest)
        split = len(lm.tok_encode(context.rstrip())) if context else 0
        given = whole[:split] or [lm.prefix_token_id]
        assert (value, greedy) == (pytest.approx(expected(tiny, given, whole[split:])[0], abs=1e-4), greedy)
    greedy = tiny.generate(tiny.tokenizer.encode("Hello"), max_tokens=3).token_ids
    assert lm._loglikelihood_tokens([(None, tiny.tokenizer.encode("Hello"), list(greedy))])[0][1]
    long = list(range(40, 140))
    value, _ = lm._loglikelihood_tokens([(None, long, [3, 4])])[0]
    assert value == pytest.approx(expected(tiny, long[-31:], [3, 4])[0], abs=1e-4)
    with pytest.raises(ContextLengthError, match="has 100 tokens, the context holds 32"):
        lm._loglikelihood_tokens([(None, [1], long)])


def test_a_long_text_is_scored_once_a_token(tiny: edgert.Model) -> None:
    lm, text = EdgertLM(tiny), "abcdefgh" * 10
    ids = lm.tok_encode(text, add_special_tokens=False)
    windows = [([lm.prefix_token_id], ids[:32]), *(([ids[i - 1]], ids[i : i + 32]) for i in range(32, len(ids), 32))]
    total = sum(expected(tiny, context, rest)[0] for context, rest in windows[:-1])
    last = len(ids) % 32 or 32  # with as much context as there is room for
    total += expected(tiny, ids[-33:-last], ids[-last:])[0]
    assert lm.loglikelihood_rolling(requests((text,)))[0] == pytest.approx(total, abs=1e-3)


def test_answers(tiny: edgert.Model) -> None:
    lm = EdgertLM(tiny)
    whole = tiny.generate("Hello", max_tokens=12).text
    plain, short, cut, long = lm.generate_until(
        requests(
            ("Hello", {"until": [], "max_gen_toks": 12}),
            ("Hello", {"max_gen_toks": 2, "temperature": 0.0, "do_sample": False}),
            ("Hello", {"until": whole[2:4], "max_gen_toks": 12}),
            ("Hello" * 50, {"max_gen_toks": 5}),
        )
    )
    assert plain == whole and whole.startswith(short) and cut == whole[: whole.index(whole[2:4])] and long
    sampled = [("Hello", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 8})]
    assert lm.generate_until(requests(*sampled)) == lm.generate_until(requests(*sampled)) != [whole[:8]]
    assert "Hello" in lm.apply_chat_template([{"role": "user", "content": "Hello"}]) and lm.tokenizer_name


def test_tasks_from_files_and_our_own(tmp_path: Path) -> None:
    documents = [
        {"text": "The capital of France is", "choices": ["Paris", "London"], "answer": 0},
        {"text": "The opposite of up is", "choices": ["seven", "down"], "answer": 1},
        {"text": "One, two, three,", "choices": ["cow", "four"], "answer": 1},
    ]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    task = {
        "task": "three_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    seen: list[float] = []
    with edgert.load(context=128) as model:
        found = evaluate(model, [tmp_path / "task.yaml"], seen.append)
        assert found["three_questions acc"] == (1.0, 3) and found["three_questions acc_norm"][1] == 3
        value, n = found["everyday acc"]
        assert n == 48 and 0.5 < value <= 1  # chance is a quarter
        assert seen[-1] == 1 and len(seen) == 48 * 4 + 6
        (tmp_path / "broken.yaml").write_text("{")
        for name in ("broken.yaml", "absent.yaml"):
            with pytest.raises(OptionError, match=rf"{name}: lm_eval cannot make a task of it"):
                evaluate(model, [tmp_path / name])
    print(found)
