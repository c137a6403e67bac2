"""`edgert pack`: make a bundle of a model; and how packing and verifying show that they go on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgert.cli import output
from edgert.cli.interrupts import while_loading
from edgert.cli.options import Chosen, Json, command
from edgert.errors import EdgertError, OptionError

if TYPE_CHECKING:
    from edgert.goal import Goal
    from edgert.pack import Packed
    from edgert.pack_bits import PackedBits

_LINE_S = 5.0  # between two lines about the same work
_BITS = "Bits per expert"

Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="A GGUF file (of a split model the first) or a Hugging Face folder.")
]
Out = Annotated[
    Path | None,
    typer.Argument(metavar="OUT.edge", help="The folder to make; beside SOURCE if not set.", show_default=False),
]


def _option(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, show_default=False, rich_help_panel=_BITS)


Loss = Annotated[
    str | None, _option("--loss", "SHARE", "The smallest bundle whose perplexity rises by at most this, such as 2%.")
]
Size = Annotated[
    str | None, _option("--size", "SIZE", "The least loss at this size: 3.0bpw for the experts, 8GiB for the bundle.")
]
Objective = Annotated[
    str | None, _option("--objective", "size|speed", "What is minimised within --loss: size if not set.")
]
Method = Annotated[
    str | None, _option("--method", "optimal|edgemoe", "How bits are chosen; edgemoe as in the paper, to compare.")
]
FormatName = Annotated[str | None, _option("--format", "NAME", "One format for all experts, such as int4 or int3-k.")]
ProfileFile = Annotated[
    Path | None,
    _option(
        "--profile",
        "FILE",
        "What `edgert profile` wrote; if not set, the one beside SOURCE or OUT, or one that is made now.",
    ),
]
Quantiser = Annotated[str | None, _option("--quantiser", "NAME", "rtn, hqq, awq or gptq; gptq if not set.")]
Hot = Annotated[int | None, _option("--hot", "BITS", "Bits of hot weights that have more: 8 if not set; 0 keeps them.")]
Text = Annotated[
    Path | None,
    _option(
        "--proof",
        "FILE",
        "Text to measure the loss on, instead of what the profile kept back: plain, .jsonl or .json.",
    ),
]
Cluster = Annotated[
    str | None, _option("--dask", "ADDRESS", "Quantise on a Dask cluster, such as tcp://host:8786, instead of here.")
]


@command()
def pack(
    source: Source,
    out: Out = None,
    loss: Loss = None,
    size: Size = None,
    objective: Objective = None,
    method: Method = None,
    format: FormatName = None,
    profile: ProfileFile = None,
    quantiser: Quantiser = None,
    hot: Hot = None,
    proof: Text = None,
    dask: Cluster = None,
    json: Json = False,
    *,
    chosen: Chosen,
) -> None:
    """Pack a model into a bundle: the form that is read from flash, expert by expert.

    By default every weight stays as the source has it; --profile then adds what policies and predictions are chosen
    by. With --loss, --size or --format the experts are quantised, each
    to bits of its own, and the result is measured against the source. What is there and current is left as it is; what
    an interrupted pack left is gone on with. The source stays.
    """
    words = {"loss": loss, "size": size, "objective": objective, "method": method, "format": format}
    others = {"quantiser": quantiser, "hot": hot}
    if all(value is None for value in words.values()):
        told = {**others, "proof": proof, "dask": dask}
        given = [name for name, value in told.items() if value is not None]
        if given:
            raise OptionError(f"--{given[0]} is for choosing bits: add --loss 2%, --size 3.0bpw or --format int4")
        _pack_as_it_is(source, out, profile, json)
        return
    goal = _goal({**words, **others}, chosen.runtime.get("memory"))
    with reporting("packing") as report:
        from edgert.corpus_files import read_whole
        from edgert.pack import check_goal, default_out
        from edgert.pack_bits import Request, pack_bits, profile_for

        target, text = out or default_out(source), None if proof is None else read_whole(proof)
        options = {**chosen.runtime}
        if goal.memory is not None:  # what the runtime will have, not this
            options.pop("memory")
        check_goal(target, goal.as_document())
        with _telling_what_is_kept(target):
            name = str(proof or "")
            found = profile_for(source, target, profile, goal, report, text=text, text_name=name, options=options)
            request = Request(source, target, found, goal, text, name, dask, options)
            packed = pack_bits(request, report)
    _show_bits(packed, json)


@contextlib.contextmanager
def _telling_what_is_kept(out: Path) -> Iterator[None]:
    """Where what is done lies when the pack is stopped or fails: another goal takes experts from there too."""
    from edgert.pack_place import part_of
    from edgert.work_folder import work_of

    try:
        yield
    except (KeyboardInterrupt, EdgertError) as error:
        if kept := [str(path) for path in (work_of(out), part_of(out)) if path.exists()]:
            stopped, them = isinstance(error, KeyboardInterrupt), "them" if len(kept) > 1 else "it"
            done = "stopped; what is done" if stopped else "what is done"
            output.note(f"{done} is kept in {' and '.join(kept)}: pack again to go on, or remove {them}")
        raise


def _goal(words: dict[str, Any], memory: Any) -> Goal:
    """The goal that the options describe."""
    from edgert.goal import Goal, parse_loss, parse_target
    from edgert.memory import parse_size

    fields = {name: value for name, value in words.items() if value is not None and name not in ("loss", "size")}
    if words["loss"] is not None:
        fields["loss"] = parse_loss(words["loss"])
    if words["size"] is not None:
        fields |= parse_target(words["size"])
    if words["objective"] == "speed" and memory is not None:
        fields["memory"] = parse_size(memory)
    return Goal(**fields)


def _pack_as_it_is(source: Path, out: Path | None, profile: Path | None, json: bool) -> None:
    with reporting("packing") as report:
        from edgert.pack import default_out, pack_model
        from edgert.pack_place import part_of
        from edgert.work_folder import work_of

        found = None
        if profile is not None:
            from edgert.experts.profile import Profile

            found = Profile.load(profile)
        try:
            packed = pack_model(source, out, progress=report, profile=found)
        except KeyboardInterrupt:
            if (part := part_of(out or default_out(source))).exists():
                output.note(f"stopped; {part} is kept: pack again to go on, or remove it")
            raise
        if (work := work_of(packed.path)).exists():
            output.note(f"{work} is left of a pack with bits of its own, which this is not: remove it")
    if json:
        output.write_json(_document(packed))
    else:
        _show(packed)


def _document(packed: Packed) -> dict[str, Any]:
    return {
        "bundle": str(packed.path),
        "bytes": packed.n_bytes,
        "written": packed.written,
        "resumed": packed.resumed,
        "seconds": packed.seconds,
        "inexact": packed.inexact,
        "skipped": packed.skipped,
    }


def _show(packed: Packed) -> None:
    size = output.binary_size(packed.n_bytes)
    if not packed.written and not packed.resumed:
        output.write(f"{packed.path}: packed already, {size}\n")
        return
    rate = f"{packed.written / packed.seconds / 1e6:,.0f} MB/s"
    earlier = f", {output.binary_size(packed.resumed)} of it by an earlier pack" if packed.resumed else ""
    output.write(f"{packed.path}: {size} in {packed.seconds:.1f} s, {rate}{earlier}\n")
    for kind, loss in packed.inexact.items():
        output.write(f"not exact: {kind} {loss}\n")
    if packed.skipped:
        output.write(f"not packed: {packed.skipped}\n")


def _show_bits(found: PackedBits, json: bool) -> None:
    """What came of a pack with chosen bits."""
    if json:
        output.write_json({**_document(found.packed), "bits": dict(found.bits), "proof": found.proof.as_document()})
        return
    packed, size = found.packed, output.binary_size(found.packed.n_bytes)
    if not packed.written and not packed.resumed:
        output.write(f"{packed.path}: packed already, {size}\n")
    else:
        output.write(f"{packed.path}: {size} in {packed.seconds:.0f} s\n")
    if packed.skipped:
        output.write(f"not packed: {packed.skipped}\n")
    for line in found.lines():
        output.write(f"{line}\n")


@contextlib.contextmanager
def reporting(first: str) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, else lines on stderr, when the work changes and now and then; Ctrl-C is raised there."""
    if output.console(stderr=True).is_terminal:
        with output.progress(first) as draw, while_loading(draw) as waiting:
            yield waiting.report
    else:
        with while_loading(_lines()) as waiting:
            yield waiting.report


def _lines() -> Callable[[str, float], None]:
    before, last = "", 0.0

    def report(stage: str, fraction: float) -> None:
        nonlocal before, last
        kind, now = stage.partition(":")[0], time.monotonic()
        if kind != before or now - last >= _LINE_S:
            output.note(f"{stage} ({fraction:.0%})" if fraction else stage)
            before, last = kind, now

    return report
