"""The proof of a bundle: what it was measured to lose against its source, as its manifest keeps it.

Perplexity, divergence and the best token on text that nothing was fitted to; how often it answers in valid JSON; and,
where the package lm_eval is installed, questions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import json_rate
from edgert.divergence import Comparison, compare
from edgert.storage.json_file import JsonObject

if TYPE_CHECKING:
    from edgert.model import Model
    from edgert.weights import Progress

VALID_JSON = "valid JSON"
_COUNTS = ("n_chunks", "n_tokens")
_UNSURE = 0.5  # of a bound: a larger standard error leaves in doubt whether it is kept


@dataclass(frozen=True)
class Score:
    """What source and bundle reach in one check: the share of `n` answers that are right, or another metric's value."""

    before: float
    after: float
    n: int


@dataclass(frozen=True)
class Proof:
    """What was measured. text: which text it was. scores: by the name of the check."""

    text: str
    comparison: Comparison
    scores: Mapping[str, Score] = field(default_factory=dict)

    def as_document(self) -> dict[str, Any]:
        """For the manifest."""
        scores = {name: asdict(score) for name, score in self.scores.items()}
        return {"text": self.text, **asdict(self.comparison), "scores": scores}

    def words(self) -> dict[str, str]:
        """The proof for a person: by the name of what was measured, what came of it."""
        c = self.comparison
        rise = f"{c.increase:+.2%} +/- {c.standard_error:.2%}"
        found = {
            "text": f"{self.text}: {c.n_tokens:,} tokens of {c.n_chunks:,} chunks",
            "perplexity": f"{c.perplexity_before:.3f} -> {c.perplexity_after:.3f} ({rise})",
            "divergence": f"{c.kl:.4f} nats a token, above {c.kl_99:.3f} for one in a hundred",
            "same best token": f"{c.top1:.1%}",
        }
        for name, score in self.scores.items():
            found[name] = f"{score.before:.1%} -> {score.after:.1%} of {score.n:,}"
        return found

    def lines(self, bound: float | None = None) -> Iterator[str]:
        """The same, a line for each; and whether it says little of a bound that the rise was to keep."""
        yield from (f"{name}: {text}" for name, text in self.words().items())
        error = self.comparison.standard_error
        if bound is not None and error > _UNSURE * bound:
            yield f"unsure: a standard error of {error:.2%} says little of --loss {100 * bound:g}%; prove on more text"

    @classmethod
    def from_document(cls, document: Mapping[str, Any], where: str) -> Proof:
        """What as_document gave; `where` names the document in messages. Raises ModelFileError for anything else."""
        found = JsonObject(dict(document), where)
        counts = {name: found.integer(name) for name in _COUNTS}
        numbers = {name: found.number(name) for name in Comparison.__dataclass_fields__ if name not in _COUNTS}
        scores = found.object("scores")
        return cls(
            text=found.text("text"),
            comparison=Comparison(**counts, **numbers),  # type: ignore[arg-type]   # by name
            scores={name: _score(scores.object(name)) for name in scores.values},
        )


def _score(found: JsonObject) -> Score:
    return Score(found.number("before"), found.number("after"), found.integer("n"))


def prove(
    source: Model,
    bundle: Model,
    chunks: Sequence[Sequence[int]],
    text: str,
    progress: Progress | None = None,
    *,
    checks: bool = True,
) -> Proof:
    """Measure a bundle against its source on chunks of a text, and unless `checks` is False as check() does.

    progress(stage, fraction). Raises as edgert.divergence.compare does.
    """
    report = progress or _silent

    def shown(fraction: float, increase: float) -> None:
        report(f"measuring against the source: perplexity {increase:+.2%}", fraction)

    proof = Proof(text, compare(source, bundle, chunks, shown))
    return check(proof, source, bundle, progress) if checks else proof


def check(
    proof: Proof, source: Model, bundle: Model, progress: Progress | None = None, *, tasks: Sequence[Path] = ()
) -> Proof:
    """The proof with the rate of valid JSON and, where lm_eval is installed, the tasks of these files and edgert's own.

    Takes a minute or so on a small model: both answer two dozen prompts and as many questions twice. Raises OptionError
    for a task's file that is none.
    """
    report = progress or _silent
    before, after = (
        json_rate.valid_json(model, _stage(report, f"asking the {name} for JSON"))
        for name, model in (("source", source), ("bundle", bundle))
    )
    scores = {**proof.scores, VALID_JSON: Score(before[0] / before[1], after[0] / after[1], after[1])}
    if importlib.util.find_spec("lm_eval") is not None:
        from edgert import lm_eval

        first, second = (
            lm_eval.evaluate(model, tasks, _stage(report, f"asking the {name} questions"))
            for name, model in (("source", source), ("bundle", bundle))
        )
        scores |= {name: Score(first[name][0], value, n) for name, (value, n) in second.items()}
    return replace(proof, scores=scores)


def _stage(progress: Progress, stage: str) -> Callable[[float], None]:
    return lambda fraction: progress(stage, fraction)


def _silent(stage: str, fraction: float) -> None:
    """Progress that nobody looks at."""
