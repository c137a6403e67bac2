"""Options that several commands share, written once: sampling, ending, runtime, prompt.

`command` gives a function those options on the command line and hands it what the person set, so that every
default stays where it is written: in Sampling, in the model, in load.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from edgert.cli.output import guarded
from edgert.errors import OptionError
from edgert.memory import parse_share
from edgert.sampling import Sampling

ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A GGUF file, a bundle (.edge) or a Hugging Face folder; none: the embedded model.",
        show_default=False,
    ),
]
TablesName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL|HEADER|PRESET",
        help="A model, the first megabytes of a GGUF file, a config.json, or a preset such as qwen3-30b-a3b, with "
        ":q8_0 and the like for another quantisation; none: the embedded model.",
        show_default=False,
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", "-p", metavar="TEXT", help="Piped in text follows it.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

Row = tuple[Any, str, str]  # type, metavar, help

_SAMPLING: dict[str, Row] = {
    "temperature": (float, "T", "0 always takes the likeliest token; higher values vary more."),
    "top_k": (int, "K", "Choose among the K likeliest tokens; 0 is off."),
    "top_p": (float, "P", "Choose among the likeliest tokens that together hold probability P; 1 is off."),
    "min_p": (float, "P", "Choose among tokens at least P times as likely as the best; 0 is off."),
    "typical_p": (float, "P", "Choose among the most typical tokens that hold probability P; 1 is off."),
    "repetition_penalty": (float, "X", "Above 1, tokens seen lately become less likely; 1 is off."),
    "repetition_window": (int, "N", "How many last tokens the penalties look at."),
    "frequency_penalty": (float, "X", "Taken off a token's logit for each time it was seen."),
    "presence_penalty": (float, "X", "Taken off a token's logit if it was seen."),
    "logit_bias": (list[str], "ID=VALUE", "Add VALUE to a token's logit; -inf bans it. May be repeated."),
    "seed": (int, "N", "The same seed gives the same text."),
}
_ENDING: dict[str, Row] = {
    "max_tokens": (int, "N", "End the answer after N tokens."),
    "stop": (list[str], "TEXT", "End the answer before TEXT. May be repeated."),
}
_RUNTIME: dict[str, Row] = {
    "context": (int, "N", "Tokens of prompt and answers together; the model's own, at most 4096, if not set."),
    "threads": (int, "N", "Threads to compute with; the physical cores if not set."),
    "memory": (str, "SIZE", "What the process may use, such as 900MiB or 50%; what is free, less some, if not set."),
    "residency": (str, "SHARE", "Hold this share of the experts in RAM, such as 25%, instead of what fits."),
    "policy": (
        str,
        "NAME",
        "Which experts stay in RAM: lru, lfu, lfru, edgemoe, cost, topics, far-topics, pinned; auto if not set.",
    ),
    "prefetch": (str, "auto|always|off", "Read experts before they are asked for; auto if not set: where it pays."),
    "trace": (str, "FILE", "Write the routes of the last tokens to a file, for `edgert replay`."),
    "kv_type": (str, "f16|f32|int8", "Precision of the attention cache; f16 if not set, int8 is lossy."),
    "activations": (str, "int8|f32", "Precision of activations, f32 to verify; int8 if not set."),
    "power": (
        str,
        "full|cool",
        "cool takes threads away while the board is hot, answers stay the same; full if not set.",
    ),
    "device": (str, "NAME", "Where to compute: cpu, onnx:PROVIDER, attention=NAME,experts=NAME; auto if not set."),
    "gpu_memory": (
        str,
        "SIZE",
        "Use so much of a graphics card's own memory; nine tenths of what is free if not set. The experts there are "
        "those that a profile found to be used most, without one the first of each layer.",
    ),
}


@dataclass(frozen=True)
class Chosen:
    """What was set on the command line."""

    sampling: Mapping[str, Any]  # fields of Sampling
    ending: Mapping[str, Any]  # max_tokens, stop
    runtime: Mapping[str, Any]  # keywords of edgert.load


def command(
    *, sampling: Literal["greedy", "model"] | None = None, runtime: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a guarded command with the shared options; it gets what was set of them as `chosen`.

    `sampling` says whose sampling defaults hold, Sampling's or the model's; None: no such options.
    """
    shared = []
    if sampling is not None:
        title = "Sampling" if sampling == "greedy" else "Sampling (the model's own, if not set)"
        defaults = Sampling() if sampling == "greedy" else None
        shared += [_option(n, row, title, getattr(defaults, n, None)) for n, row in _SAMPLING.items()]
        shared += [_option(name, row, "Ending") for name, row in _ENDING.items()]
    if runtime:
        shared += [_option(name, row, "Runtime") for name, row in _RUNTIME.items()]
    debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
    shared.append(inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=debug))

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True)
        others = [p for p in shared if p.name not in own.parameters]  # a command may have its own of that name
        parameters = [p for p in own.parameters.values() if p.name != "chosen"] + others

        @functools.wraps(function)
        def gather(**values: Any) -> None:
            if values.get("model") == "":
                raise OptionError(
                    "the model name is empty: give a GGUF file, a bundle or a Hugging Face folder, "
                    "or nothing for the embedded model"
                )
            function(chosen=_chosen(values, others), **values)

        run = guarded(gather)
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]   # what typer reads
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _chosen(values: dict[str, Any], shared: list[inspect.Parameter]) -> Chosen:
    """Take the shared options out of `values`; bad sampling options are refused before a model is loaded."""
    taken = {p.name: values.pop(p.name, None) for p in shared}
    sampling, ending, runtime = (
        {name: value for name in table if (value := taken.get(name)) not in (None, [])}
        for table in (_SAMPLING, _ENDING, _RUNTIME)
    )
    if "logit_bias" in sampling:
        sampling["logit_bias"] = parse_bias(sampling["logit_bias"])
    if "residency" in runtime:
        runtime["residency"], *more = parse_shares(runtime["residency"])
        if more:
            raise OptionError("--residency: give one share; `edgert bench` alone takes several")
    Sampling().changed(**sampling)
    return Chosen(sampling, ending, runtime)


def _option(name: str, row: Row, panel: str, default: Any = None) -> inspect.Parameter:
    """The parameter of one row; None stands for an option that was not set."""
    kind, metavar, text = row
    flag = "--" + name.replace("_", "-")
    default = default if isinstance(default, (int, float)) else None
    option = typer.Option(flag, metavar=metavar, help=text, rich_help_panel=panel)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]   # known at run time only
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def parse_bias(pairs: list[str]) -> dict[int, float]:
    """Texts such as 198=-inf or 5=1.5 as a logit bias; OptionError for another form."""
    bias = {}
    for pair in pairs:
        token, _, value = pair.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise OptionError(f"--logit-bias {pair!r} is not ID=VALUE: give an id and a number") from None
    return bias


def parse_shares(text: str) -> list[float]:
    """The shares of "12.5%,0.25"; OptionError for anything else."""
    shares = [parse_share(part) for part in filter(None, map(str.strip, text.split(",")))]
    if not shares:
        raise OptionError("--residency names no share; write for example 12.5%,25%")
    return shares


def read_prompt(prompt: str | None) -> str | None:
    """The prompt given, and after a blank line what is piped in; None for neither. OptionError: no UTF-8.

    One newline at the end of piped text is the shell's and taken away: it would change what follows.
    """
    if sys.stdin is None or sys.stdin.isatty():
        return prompt
    piped = decode(sys.stdin.buffer.read(), "the text piped in").removesuffix("\n")
    return "\n\n".join(part for part in (prompt, piped) if part) or prompt


def read_file(path: Path) -> str:
    """A text file's content, or OptionError with its name and what is wrong."""
    try:
        return decode(path.read_bytes(), str(path))
    except OSError as problem:
        raise OptionError(f"{path} cannot be read ({problem.strerror}): give a text file") from problem


def decode(content: bytes, name: str) -> str:
    """UTF-8 as text, or OptionError that says where it is none."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise OptionError(f"{name} is not UTF-8 at byte {problem.start}: convert it first") from problem
