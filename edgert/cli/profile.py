"""`edgert profile`: run calibration text through a model and keep what its experts do; and merge such profiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from edgert.cli import output
from edgert.cli.options import Chosen, Json, ModelName, command
from edgert.cli.pack import Cluster, reporting
from edgert.errors import OptionError

if TYPE_CHECKING:
    from edgert.experts.profile import Profile, Sensitivity
    from edgert.profiling import Profiled

Corpus = Annotated[
    list[Path] | None,
    typer.Option(
        "--corpus",
        metavar="FILE...",
        help="Text to calibrate on, UTF-8: plain, .jsonl or .json; none: the model writes its own.",
        show_default=False,
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Calibrate on N tokens, or a few more.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="The profile to write; NAME.profile.npz beside MODEL if not set."),
]
HeldOut = Annotated[
    str,
    typer.Option(
        "--held-out",
        metavar="SHARE",
        help="Keep back this share of each text to prove on, at most as much as is calibrated on, and 16 chunks in sum "
        "if there is text. 0 keeps none.",
    ),
]
Quantiser = Annotated[
    str, typer.Option("--quantiser", metavar="NAME", help="What sensitivity is measured with: rtn, hqq, awq or gptq.")
]
NoSensitivity = Annotated[bool, typer.Option("--no-sensitivity", help="Do not measure what quantising would cost.")]
Merge = Annotated[
    list[str] | None,
    typer.Option(
        "--merge",
        metavar="FILE[=WEIGHT]...",
        help="Merge profiles of one model into --out instead, such as a.npz=0.7 b.npz=0.3.",
        show_default=False,
    ),
]


class ProfileCommand(TyperCommand):
    """Lets --corpus and --merge take all that follows up to the next option, as a shell's * gives it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write the option before each of its values."""
        option, written = "", list[str]()
        for place, arg in enumerate(args):
            if arg.startswith("-"):
                if option and args[place - 1] == option:
                    raise OptionError(f"{option} names no file; {arg} follows it")
                name, _, value = arg.partition("=")
                option = name if name in ("--corpus", "--merge") else ""
                written += [name, value] if option and value else [arg]
            elif option and args[place - 1] != option:
                written += [option, arg]
            else:
                written += [arg]
        return super().parse_args(ctx, written)


@command()
def profile(
    model: ModelName = None,
    corpus: Corpus = None,
    tokens: Tokens = 20_000,
    out: Out = None,
    held_out: HeldOut = "10%",
    quantiser: Quantiser = "gptq",
    no_sensitivity: NoSensitivity = False,
    merge: Merge = None,
    dask: Cluster = None,
    json: Json = False,
    *,
    chosen: Chosen,
) -> None:
    """Learn which experts a model uses, on text of several kinds, and what quantising each would cost.

    Without --corpus the model writes text itself. What an interrupted run did is not done again.
    """
    from edgert.goal import check_quantiser

    check_quantiser(quantiser)
    if merge:
        _show_merged(_merged(merge, out, model, corpus), json)
        return
    with reporting("profiling") as report:
        from edgert.profiling import default_out, profile_model

        try:
            done = profile_model(
                model,
                out,
                corpora=corpus or (),
                n_tokens=tokens,
                held_out=_share(held_out),
                progress=report,
                **chosen.runtime,
            )
            if not no_sensitivity:
                done = _add_sensitivity(done, model, quantiser, report, dask, chosen.runtime)
        except KeyboardInterrupt:
            kept = out or default_out(model)
            output.note(f"stopped; what was run is kept beside {kept}: profile the same again to go on")
            raise
    if json:
        output.write_json(as_json(done))
    else:
        show(done)


def _add_sensitivity(
    done: Profiled, model: str | None, quantiser: str, report: Any, dask: str | None, runtime: Mapping[str, Any]
) -> Profiled:
    """Measure what quantising costs, unless the profile says it already for this quantiser, and write it."""
    if (known := done.profile.sensitivity) is not None:
        if known.quantiser == quantiser:
            return done
        raise OptionError(
            f"{done.path} is there already, with sensitivity to {known.quantiser}, not {quantiser}: name another file "
            "with --out, or remove it"
        )
    from dataclasses import replace

    from edgert.experts.profile import Profile
    from edgert.loading import resolve
    from edgert.quantising import Bench, measure_sensitivity
    from edgert.work_folder import locked_work, storage_errors

    with locked_work(done.path) as work, storage_errors(done.path):
        found = Profile.load(done.path)
        if found.sensitivity is None:  # nor measured by another process in between
            bench = Bench(resolve(model), work, report, dask, runtime)
            found = found.with_sensitivity(measure_sensitivity(bench, found, quantiser))
            found.save(done.path)
            bench.remove()
    return replace(done, profile=found)


def _share(text: str) -> float:
    """The share of "10%" or "0.1"; OptionError unless it lies from 0 to below 1."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise OptionError(f"--held-out {text} must be a share from 0 to below 100%, such as 10% or 0.1")
    return share


# ---- merging ---------------------------------------------------------------------------------------------------------
def _merged(texts: list[str], out: Path | None, model: str | None, corpus: list[Path] | None) -> tuple[Profile, Path]:
    """The profile of several, written."""
    from edgert.errors import StorageError
    from edgert.experts.profile import Profile
    from edgert.experts.profile_merge import Part, merge

    if out is None or model is not None or corpus:
        raise OptionError("--merge takes profiles and --out FILE, and neither a model nor --corpus")
    if len(texts) < 2:
        raise OptionError("--merge names one profile; name at least two, such as a.npz=0.7 b.npz=0.3")
    named = [_weighted(text) for text in texts]
    if any(path.absolute() == out.absolute() for path, _ in named):
        raise OptionError(f"--out {out} is one of the profiles that are merged: name another file")
    parts = [Part(str(path), Profile.load(path), weight) for path, weight in named]
    merged = merge(parts)
    before, after = (
        sum(len(domain.held_out) for one in profiles for domain in one.domains) // merged.chunk
        for profiles in ([part.profile for part in parts], [merged])
    )
    if after < before:
        copies = "copies of text that another profile calibrated on"
        output.note(f"{before - after} of {before} chunks kept back were dropped, {copies}")
    try:
        merged.save(out)
    except OSError as error:
        raise StorageError(f"{out} cannot be written ({error.strerror}); name another file with --out") from error
    return merged, out


def _weighted(text: str) -> tuple[Path, float]:
    """The file and the weight of FILE=WEIGHT; 1 where there is no weight."""
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise OptionError(f"--merge {text}: {weight!r} is no weight; write FILE=WEIGHT, such as a.npz=0.7") from None


# ---- what is printed -------------------------------------------------------------------------------------------------
def as_json(done: Profiled) -> dict[str, Any]:
    """What was run, and what a profile says in a few numbers."""
    return {
        "path": str(done.path),
        "tokens": done.profile.n_tokens,
        "run": done.n_run,
        "resumed": done.n_resumed,
        "seconds": done.seconds,
        "notes": list(done.notes),
        **_about(done.profile),
    }


def _about(profile: Profile) -> dict[str, Any]:
    """The profile in a few numbers; recall one layer ahead."""
    import numpy as np

    from edgert.experts import profile_statistics as statistics

    frequency, reuse = profile.frequency()[profile.layers], statistics.previous_token_reuse(profile)
    return {
        "own_text": profile.own_text,
        "texts": {
            domain.name: {
                "share": profile.shares[domain.name],
                "tokens": len(domain.tokens),
                "held_out": len(domain.held_out),
            }
            for domain in profile.domains
        },
        "layers": len(profile.layers),
        "experts": profile.n_expert,
        "used": profile.top_k,
        "never_used": int((frequency == 0).sum()),
        "entropy": float(np.nanmean(statistics.skew(profile).entropy)),
        "previous_token_reuse": float(np.nanmean(reuse)),
        "recall": {name: _mean(rows[0]) for name, rows in profile.recall.items()},
        "sensitivity": profile.sensitivity and profile.sensitivity.quantiser,
        "costs": profile.sensitivity and _costs(profile.sensitivity),
    }


def _costs(found: Sensitivity) -> dict[str, Any]:
    """What quantising costs: nats a token of divergence expected with all experts at a width, and where it comes from.

    By the format of each width that loses least. layers, projections: shares of that at the smallest width. kept: the
    projections that no format fits, which stay as in the source and cost nothing.
    """
    import numpy as np

    from edgert.bits import PROJECTIONS
    from edgert.quant.formats import FORMATS

    losses, widths = found.loss().astype(np.float64), [FORMATS[name].bits for name in found.formats]
    fits = np.isfinite(losses.sum(axis=(0, 1))).any(axis=1)
    losses[:, :, ~fits] = 0
    shares, divergence = dict[str, Any](), dict[str, float]()
    for width in (4, 3):
        totals = [losses[..., place].sum() if bits == width else np.inf for place, bits in enumerate(widths)]
        best = int(np.argmin(totals))
        if not np.isfinite(totals[best]):
            continue
        total, loss = max(float(totals[best]), 1e-30), losses[..., best]
        divergence[str(width)] = total
        by_layer, by_projection = loss.sum(axis=(1, 2)) / total, loss.sum(axis=(0, 1)) / total
        shares = {
            "layers": {
                str(layer): float(by_layer[layer]) for layer in np.argsort(-by_layer, kind="stable")[:3].tolist()
            },
            "projections": dict(zip(PROJECTIONS, by_projection.tolist(), strict=True)),
        }
    kept = [name for name, fit in zip(PROJECTIONS, fits.tolist(), strict=True) if not fit]
    return {"measured": found.is_measured, "divergence": divergence, **shares, "kept": kept}


def _mean(row: Any) -> float | None:
    """The mean of what is known."""
    known = row[row == row]
    return float(known.mean()) if len(known) else None


def show(done: Profiled) -> None:
    """What was done, for a person."""
    from edgert.proof_text import FEWEST

    for note in done.notes:
        output.note(note)
    if not done.n_run and not done.seconds:
        output.write(f"{done.path}: profiled already on this text, {done.profile.n_tokens:,} tokens\n")
    else:
        rate = f"{done.n_run / max(done.seconds, 1e-9):,.0f} tokens/s"
        ran = [f"{done.n_run:,} tokens in {done.seconds:.1f} s, {rate}"] if done.n_run else []
        earlier = [f"{done.n_resumed:,} {'more' if ran else 'tokens'} by an earlier run"] if done.n_resumed else []
        output.write(f"{done.path}: {', '.join([*ran, *earlier])}\n")
    _show_about(_about(done.profile))
    kept = sum(len(domain.held_out) for domain in done.profile.domains) // done.profile.chunk
    if kept < FEWEST:
        output.note(
            f"{kept} of the {FEWEST} chunks of {done.profile.chunk} tokens are kept back that `edgert pack --loss` "
            "chooses by and proves on: profile more --tokens, or give it --proof FILE"
        )


def _show_merged(merged: tuple[Profile, Path], json: bool) -> None:
    profile, path = merged
    if json:
        output.write_json({"path": str(path), "tokens": profile.n_tokens, **_about(profile)})
    else:
        output.write(f"{path}: {profile.n_tokens:,} tokens of {len(profile.domains)} texts\n")
        _show_about(_about(profile))


def _show_about(about: dict[str, Any]) -> None:
    if about["own_text"]:
        output.write("the model wrote the text itself; name --corpus FILE... for text like yours\n")
    for name, text in about["texts"].items():
        kept = f"{text['held_out']:,} kept back" if text["held_out"] else "none kept back"
        output.write(f"  {text['share']:6.1%}  {output.harmless(name)}: {text['tokens']:,} tokens, {kept}\n")
    all_experts = about["layers"] * about["experts"]
    even = math.log2(about["experts"])
    output.write(
        f"{about['used']} of {about['experts']} experts a token in {about['layers']} layers; {about['never_used']} of "
        f"{all_experts:,} never used; entropy {about['entropy']:.2f} bits, {even:.2f} at most; "
        f"{about['previous_token_reuse']:.0%} as the token before\n"
    )
    recall = ", ".join(f"{name} {share:.0%}" for name, share in about["recall"].items() if share is not None)
    output.write(f"experts of the next layer foreseen: {recall or 'none'}\n")
    if (costs := about["costs"]) and not costs["measured"]:
        output.write(
            f"errors of experts are measured ({about['sensitivity']}), what they cost is not, as not all experts were "
            "in RAM: all layers are taken to be alike\n"
        )
    elif costs and costs["divergence"]:
        found = ", ".join(f"{nats:.2g} with {width} bits" for width, nats in costs["divergence"].items())
        kept = f", {' and '.join(costs['kept'])} left as in the source, for no format fits" if costs["kept"] else ""
        output.write(
            f"expected divergence from the source, nats a token: {found} for all experts ({about['sensitivity']})"
            f"{kept}\n"
        )
        layers = ", ".join(f"{layer} ({share:.0%})" for layer, share in costs["layers"].items())
        shares = [(name, share) for name, share in costs["projections"].items() if name not in costs["kept"]]
        parts = ", ".join(f"{name} {share:.0%}" for name, share in shares)
        output.write(f"what costs most of it: layers {layers}; {parts}\n")
