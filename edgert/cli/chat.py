"""`edgert chat`: one answer for scripts, or a conversation on a terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from edgert.cli import output
from edgert.cli.conversation import Conversation
from edgert.cli.options import Chosen, Json, ModelName, Prompt, command, read_prompt
from edgert.errors import OptionError

System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.", show_default=False)]


@command(sampling="model")
def chat(
    model: ModelName = None,
    prompt: Prompt = None,
    system: System = None,
    json: Json = False,
    *,
    chosen: Chosen,
) -> None:
    """Talk to a model. Without --prompt and on a terminal: a conversation; /help there lists its commands."""
    text = read_prompt(prompt)
    if not text:
        _check_terminal(text, json)
    with output.open_model(model, chosen.runtime) as opened:
        if opened.template.is_default:
            output.note(f"{opened.name} has no chat template: ChatML is used")
        sampling = opened.defaults.changed(**chosen.sampling)
        conversation = Conversation()
        conversation.set_system(system)
        if not text:
            from edgert.cli.session import Session

            return Session(opened, conversation, sampling, chosen.ending).run()
        stream = opened.chat(conversation.asking(text), stream=True, sampling=sampling, **chosen.ending)
        completion = output.read_out(stream, silent=json)
        if json:
            output.write_json(output.as_json(completion, opened))
        else:
            output.write("\n")
            output.note_full_context(completion, opened)


def _check_terminal(text: str | None, json: bool) -> None:
    """OptionError where a conversation was asked for and cannot be."""
    if text is not None or json or not sys.stdin or not sys.stdin.isatty() or not sys.stdout.isatty():
        raise OptionError("there is nothing to answer: give --prompt TEXT, pipe a text in, or use a terminal")
