"""`edgert perplexity`: how well a model predicts a text file, as llama-perplexity counts it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from edgert.cli import output
from edgert.cli.options import Chosen, Json, ModelName, command, read_file

File = Annotated[Path, typer.Option("--file", "-f", metavar="FILE", help="A text, UTF-8.")]
Chunk = Annotated[int, typer.Option("--chunk", metavar="N", help="Tokens a chunk; half of them scored.")]
Chunks = Annotated[
    int | None, typer.Option("--chunks", metavar="N", help="Only the first N chunks.", show_default=False)
]


@command()
def perplexity(
    model: ModelName = None,
    *,
    file: File,
    chunk: Chunk = 512,
    chunks: Chunks = None,
    json: Json = False,
    chosen: Chosen,
) -> None:
    """Measure a model's perplexity on a text file."""
    text = read_file(file)
    with output.open_model(model, chosen.runtime) as opened:
        with output.progress("perplexity") as report:

            def running(fraction: float, value: float) -> None:
                report(f"perplexity {value:.3f} so far", fraction)

            measured = opened.perplexity(text, chunk=chunk, n_chunks=chunks, progress=running)
        if json:
            output.write_json({"model": opened.name, "file": str(file), "chunk": chunk, **asdict(measured)})
        else:
            spread = f"{measured.value:.3f} +/- {measured.standard_error:.3f}"
            output.write(f"perplexity {spread} ({measured.n_chunks} chunks of {chunk} tokens)\n")
