"""`edgert chat`: one answer for scripts, or a conversation on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgert.cli import output
from edgert.cli.conversation import Conversation
from edgert.cli.options import Chosen, Json, ModelName, Prompt, command, read_prompt
from edgert.errors import OptionError

if TYPE_CHECKING:
    from edgert.model import Model

System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.", show_default=False)]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--think/--no-think",
        help="Ask for reasoning, or for none, where the model has a switch for it; of gpt-oss and others that take an "
        "effort: high, or low. The model's own way, of gpt-oss medium effort, if not set.",
    ),
]


@command(sampling="model")
def chat(
    model: ModelName = None,
    prompt: Prompt = None,
    system: System = None,
    thinking: Thinking = None,
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
        options = {**chosen.ending, **_variables(opened, thinking)}
        if not text:
            from edgert.cli.session import Session

            return Session(opened, conversation, sampling, options).run()
        stream = opened.chat(conversation.asking(text), stream=True, sampling=sampling, **options)
        completion = output.read_out(stream, silent=json)
        if json:
            output.write_json(output.as_json(completion, opened))
        else:
            output.write("\n")
            less = thinking is not False and bool(opened.template.asking(False))
            output.note_full_context(completion, opened, may_think_less=less)


def _variables(model: Model, thinking: bool | None) -> dict[str, Any]:
    """What the template is told of thinking; a note where it has no switch for it."""
    if thinking is None:
        return {}
    variables = model.template.asking(thinking)
    if not variables:
        output.note(f"{model.name} has no switch for thinking: --{'' if thinking else 'no-'}think changes nothing")
    return {"variables": variables} if variables else {}


def _check_terminal(text: str | None, json: bool) -> None:
    """OptionError where a conversation was asked for and cannot be."""
    if text is not None or json or not sys.stdin or not sys.stdin.isatty() or not sys.stdout.isatty():
        raise OptionError("there is nothing to answer: give --prompt TEXT, pipe a text in, or use a terminal")
