"""`edgert generate`: continue a text as it stands, without a chat template; greedy unless told otherwise."""

from __future__ import annotations

from typing import Annotated

import typer

from edgert.cli import output
from edgert.cli.options import Chosen, Json, ModelName, Prompt, command, read_prompt
from edgert.errors import OptionError
from edgert.sampling import Sampling

Echo = Annotated[bool, typer.Option("--echo", help="Print the prompt too.")]
Special = Annotated[bool, typer.Option("--special", help="Recognise control tokens written in the prompt.")]


@command(sampling="greedy")
def generate(
    model: ModelName = None,
    prompt: Prompt = None,
    echo: Echo = False,
    special: Special = False,
    json: Json = False,
    *,
    chosen: Chosen,
) -> None:
    """Continue a text."""
    text = read_prompt(prompt)
    if not text:
        raise OptionError("there is nothing to continue: give --prompt TEXT or pipe a text in")
    with output.open_model(model, chosen.runtime) as opened:
        start = opened.tokenizer.encode(text, special=True) if special else text
        sampling = Sampling().changed(**chosen.sampling)
        stream = opened.generate(start, stream=True, sampling=sampling, **chosen.ending)
        if echo and not json:
            output.write(text)
        completion = output.read_out(stream, silent=json)
        if json:
            output.write_json(output.as_json(completion, opened, before=text if echo else ""))
        else:
            output.write("\n")
            output.note_full_context(completion, opened)
