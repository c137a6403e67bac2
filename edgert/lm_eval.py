"""A model behind the interface of lm-evaluation-harness (the package `lm_eval`), and tasks run through it.

Import this only where that package is installed. Tasks are files of this machine: nothing is fetched.
"""

from __future__ import annotations

import importlib.resources
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
import numpy as np
from datasets import Dataset
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from edgert.divergence import log_softmax_into
from edgert.errors import ContextLengthError, OptionError
from edgert.sampling import Sampling

if TYPE_CHECKING:
    from edgert.model import Model

_MOST_TOKENS = 256  # of an answer, where a task does not say
_SAMPLED = "temperature", "top_k", "top_p", "min_p"  # what a task may say of sampling, by both packages' names


class EdgertLM(TemplateLM):
    """A model as lm_eval sees it. How texts are cut into context and continuation is lm_eval's own (TemplateLM)."""

    def __init__(self, model: Model, progress: Callable[[float], None] = lambda fraction: None) -> None:
        super().__init__()
        self._model, self._progress = model, progress

    # ---- texts -------------------------------------------------------------------------------------------------------
    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        found = self._model.tokenizer.eos_id
        return min(self._model.tokenizer.stop_ids, default=0) if found is None else found

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        bos = self._model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self._model.n_context

    @property
    def tokenizer_name(self) -> str:
        """A name for caches of requests."""
        return self._model.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text in which control tokens may be written, with one start token if the model wants it."""
        tokenizer = self._model.tokenizer
        start = tokenizer.add_bos and add_special_tokens is not False
        ids = tokenizer.encode(string, special=True, bos=start)
        return ids[1:] if start and ids[1:2] == ids[:1] else ids  # a chat template wrote it too

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        return self._model.template.render(chat_history, add_generation_prompt=add_generation_prompt)

    # ---- requests ----------------------------------------------------------------------------------------------------
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each (context, continuation), and whether it is the greedy answer."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """The same of ((context, continuation), context ids, continuation ids); equal contexts are run once."""
        pairs = [([*context] or [self.prefix_token_id], [*rest]) for _, context, rest in requests]
        answers: dict[int, tuple[float, bool]] = {}
        for place in sorted(range(len(pairs)), key=lambda place: pairs[place][0] + pairs[place][1]):
            answers[place] = self._score(*pairs[place])
            if requests[place][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[place][0], answers[place])
            self._progress(len(answers) / len(pairs))
        return [answers[place] for place in range(len(pairs))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text, in windows of the context's length."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            totals.append(sum(self._score(*utils.make_disjoint_window(window))[0] for window in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
            self._progress(len(totals) / len(requests))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The answer to each (context, options), up to one of options["until"]; greedy unless options say otherwise."""
        answers = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or []
            n_tokens = min(int(options.get("max_gen_toks", _MOST_TOKENS)), self.max_length - 1)
            ids = self.tok_encode(context)[-(self.max_length - n_tokens) :]
            found = self._model.generate(
                ids or [self.prefix_token_id],
                max_tokens=n_tokens,
                stop=[until] if isinstance(until, str) else list(until),
                sampling=_sampling(options),
            )
            answers.append(found.text)
            self.cache_hook.add_partial("generate_until", request.args, found.text)
            self._progress(len(answers) / len(requests))
        return answers

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Log-likelihood of a continuation; of a context that is too long, the end."""
        if len(continuation) > self.max_length:
            raise ContextLengthError(
                f"a text to be scored has {len(continuation)} tokens, the context holds {self.max_length}; load the "
                "model with a larger context"
            )
        ids = [*context, *continuation][-(self.max_length + 1) :]
        first = len(ids) - 1 - len(continuation)
        total, greedy, n_vocab = 0.0, True, self._model.config.n_vocab
        log_p, work = np.empty((2, n_vocab), np.float32)
        with self._model.held() as parts:
            for position, rows in parts.engine.read(ids[:-1], parts.session, first):
                for target, row in zip(ids[position + 1 :], rows, strict=False):
                    log_softmax_into(row, log_p, work)
                    total += float(log_p[target])
                    greedy &= int(row.argmax()) == target
        return total, greedy


def _sampling(options: Any) -> Sampling:
    """The sampling that a task's options ask for."""
    if not options.get("do_sample", False):
        return Sampling()
    given = {name: options[name] for name in _SAMPLED if name in options}
    return Sampling(**{"temperature": 1.0, "seed": 1, **given})


# ---- tasks -----------------------------------------------------------------------------------------------------------
def evaluate(
    model: Model, tasks: Sequence[Path] = (), progress: Callable[[float], None] = lambda fraction: None
) -> dict[str, tuple[float, int]]:
    """Results of a model on edgert's own small task and on tasks of YAML files, by "task metric", with their counts.

    Raises OptionError for a file that lm_eval cannot make a task of.
    """
    manager = TaskManager(include_defaults=False)
    with _quiet():
        loaded: dict[str, Any] = {}
        for task in (_everyday(), *map(str, tasks)):
            try:
                loaded |= manager.load([task])["tasks"]
            except Exception as error:  # of whatever class: a task's file may hold code
                raise OptionError(f"{task}: lm_eval cannot make a task of it: {error}") from error
        found = lm_eval.evaluate(EdgertLM(model, progress), {"tasks": loaded}, log_samples=False, bootstrap_iters=0)
    results: dict[str, tuple[float, int]] = {}
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, _, which = name.partition(",")
            if which == "none" and not metric.endswith("_stderr") and isinstance(value, float):
                results[f"{task} {metric}"] = value, int(found["n-samples"][task]["effective"])
    return results


def _everyday() -> dict[str, Any]:
    """edgert's own task: a text, and which of some words goes on with it best."""
    text = (importlib.resources.files("edgert.tasks") / "everyday.jsonl").read_text()
    documents = [json.loads(line) for line in text.splitlines()]
    return {
        "task": "everyday",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """lm_eval's log without remarks about how tasks are written."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
