"""The subcommands of `edgert` and what they have in common; importing it imports no numba."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from edgert.cli import (
    bench,
    cache,
    chat,
    doctor,
    generate,
    inspect,
    pack,
    perplexity,
    plan,
    profile,
    replay,
    report,
    verify,
    warmup,
)

app = typer.Typer(
    name="edgert",
    help="Mixture-of-Experts language models on small machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.command("inspect", cls=inspect.InspectCommand)(inspect.inspect_model)
app.command("perplexity")(perplexity.perplexity)
app.command("bench")(bench.bench)
app.command("plan")(plan.plan)
app.command("replay")(replay.replay)
app.command("profile", cls=profile.ProfileCommand)(profile.profile)
app.command("report")(report.report)
app.command("warmup")(warmup.warmup)
app.command("pack")(pack.pack)
app.command("verify")(verify.verify)
app.add_typer(cache.app, name="cache")
app.command("doctor")(doctor.doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgert {importlib.metadata.version('edgert')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Mixture-of-Experts language models on small machines."""
