"""`edgert cache`: the packed models that edgert keeps by itself."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

import typer

from edgert.cli import output
from edgert.cli.options import Chosen, Json, command
from edgert.errors import OptionError

app = typer.Typer(help="The packed models that edgert keeps by itself.", no_args_is_help=True)

Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="NAME...", help="Names as `edgert cache list` shows them, or files that were packed."),
]
All = Annotated[bool, typer.Option("--all", help="Remove everything.")]


@app.command("list")
@command(runtime=False)
def list_models(json: Json = False, *, chosen: Chosen) -> None:
    """List packed models: size, state, days since their last use, and what they were packed from."""
    from edgert.cache import cache_folder, cached_models

    models = cached_models()
    if json:
        found = [{**asdict(model), "path": str(model.path)} for model in models]
        return output.write_json({"folder": str(cache_folder()), "models": found})
    width = max((len(model.name) for model in models), default=0)
    for model in models:
        days = max(0.0, time.time() - model.used) / 86400
        size = output.binary_size(model.n_bytes)
        output.write(f"{model.name:<{width}}  {size:>10}  {model.state:<10}  {days:5.0f} days  {model.source}\n")
    total = output.binary_size(sum(model.n_bytes for model in models))
    output.write(f"{cache_folder()}: {len(models)} packed models, {total}\n")


@app.command("remove")
@command(runtime=False)
def remove_models(names: Names = None, everything: All = False, json: Json = False, *, chosen: Chosen) -> None:
    """Remove packed models; a model that is run again is packed again."""
    from edgert.cache import cached_models, remove

    if everything == bool(names):
        raise OptionError("name the packed models to remove, or give --all")
    wanted = [str(model.path) for model in cached_models()] if everything else names or []
    removed = []
    for model in remove(wanted):
        removed.append({"name": model.name, "bytes": model.n_bytes})
        if not json:
            output.write(f"removed {model.name}, {output.binary_size(model.n_bytes)}\n")
    if json:
        output.write_json({"removed": removed})
