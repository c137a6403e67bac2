"""`edgert plan`: what a board would make of a model, before either is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgert.cli import output, plan_compared, plan_tables
from edgert.cli.options import Chosen, Json, TablesName, command
from edgert.errors import MemoryLimitError, OptionError

if TYPE_CHECKING:
    from edgert.boards import Board
    from edgert.memory import Budget
    from edgert.plan import Plan
    from edgert.plan_model import PlanModel
    from edgert.plan_verify import Compared
    from edgert.weights import Progress

Boards = Annotated[
    str,
    typer.Option(
        "--board",
        "-b",
        metavar="NAME,...",
        help="Boards such as jetson-orin-nano, raspberry-pi-5; `this` is the machine in hand. Several: compare them.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="What edgert may use there, such as 6GiB or 75%; what the system leaves, less some, if not set.",
        show_default=False,
    ),
]
Context = Annotated[
    int | None,
    typer.Option("--context", metavar="N", help="Tokens of prompt and answers together.", show_default=False),
]
Prompt = Annotated[int, typer.Option("--prompt", metavar="N", min=1, help="Tokens of the prompt.")]
Tpot = Annotated[
    str | None,
    typer.Option(
        "--tpot",
        metavar="TIME",
        help="Find the smallest memory that gives a token in TIME, such as 50ms.",
        show_default=False,
    ),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option(
        "--profile", metavar="FILE", help="Measured routes of this model, from `edgert profile`.", show_default=False
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw the roofline as FILE, .svg or .png.", show_default=False),
]

Verify = Annotated[
    bool, typer.Option("--verify", help="Run the model on this machine, and show forecast and measurement.")
]

_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s)")


@command(runtime=False)
def plan(
    model: TablesName = None,
    board: Boards = "this",
    memory: Memory = None,
    context: Context = None,
    prompt: Prompt = 512,
    tpot: Tpot = None,
    profile: ProfileFile = None,
    plot: Plot = None,
    verify: Verify = False,
    json: Json = False,
    *,
    chosen: Chosen,
) -> None:
    """Tell what a board would make of a model: memory, first token, tokens a second, and what would help.

    Needs no weights: the first megabytes of a GGUF file are enough (curl -r 0-16000000 -o head.gguf URL), or the name
    of a well-known model. An estimate with its range; boards that nobody measured with edgert are said to be so.
    """
    from edgert.boards import HERE
    from edgert.plan_model import open_plan_model

    seconds = None if tpot is None else parse_time(tpot)
    if verify and names_of(board) != [HERE]:
        raise OptionError(f"--verify measures the machine in hand: leave --board {board} away")
    if verify and memory is not None:
        raise OptionError("--verify runs with all experts in RAM, and with half of them: leave --memory away")
    if plot is not None:
        from edgert.plan_figure import check_plot

        check_plot(plot)
    with output.progress("reading the header") as progress:
        subject = open_plan_model(model, profile)
        plans = make_plans(subject, board, memory, context, prompt, seconds, progress)
        compared: list[Compared] = []
        if verify:
            from edgert.plan_verify import verify as run_and_compare

            compared = run_and_compare(subject, plans[0].request, progress)
    if plot is not None:
        from edgert.plan_figure import write_roofline

        write_roofline(plans, plot)
    if json:
        measured = {"verify": [row.as_dict() for row in compared]} if verify else {}
        output.write_json({"schema": 1, "plans": [one.as_dict() for one in plans], **measured})
        return
    plan_tables.show(plans)
    if compared:
        plan_compared.show(compared)


def make_plans(
    subject: PlanModel,
    board: str,
    memory: str | None,
    context: int | None,
    prompt: int,
    tpot_s: float | None,
    progress: Progress,
) -> list[Plan]:
    """A plan for each board. MemoryLimitError where the only one has too little memory."""
    from edgert.plan import Request, make_plan
    from edgert.plan_hits import profiled_hits, usual_hits

    n_context = subject.context(context)
    if prompt > n_context:
        raise OptionError(f"--prompt {prompt} is more than the context of {n_context}; use a longer --context")
    request = Request(n_context, prompt, tpot_s=tpot_s)
    if subject.profile is not None:
        progress("replaying the profile's routes", 0.1)
        hits = profiled_hits(subject.profile, subject.record_bytes)
    else:
        hits = usual_hits(subject.name)
    plans = []
    for name in names_of(board):
        progress(f"planning for {name}", 0.5)
        where = _board(name, subject, request.prompt)
        plans.append(make_plan(subject, where, request, hits, _budget(memory, where)))
    if len(plans) == 1 and plans[0].refusal:
        raise MemoryLimitError(f"{plans[0].board.title}: {plans[0].refusal}")
    return plans


def names_of(boards: str) -> list[str]:
    """The names of "a,b", each once; OptionError for none."""
    names = list(dict.fromkeys(name.strip().lower() for name in boards.split(",") if name.strip()))
    if not names:
        raise OptionError("--board names no board; write for example jetson-orin-nano,raspberry-pi-5")
    return names


def _board(name: str, subject: PlanModel, n_prompt: int) -> Board:
    from edgert.boards import HERE, board_named

    if name != HERE:
        return board_named(name)
    from edgert.plan_machine import this_board

    return this_board(subject, n_prompt)


def _budget(memory: str | None, board: Board) -> Budget | None:
    """What --memory states on a board; None if nobody does. OptionError: more than the board has."""
    from edgert.boards import HERE
    from edgert.memory import Budget, budget_for, parse_size

    if board.name == HERE:
        return budget_for(memory)
    if memory is None:
        return None
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", memory)
    n_bytes = int(float(share[1]) / 100 * board.ram_bytes) if share else parse_size(memory)
    if n_bytes > board.ram_bytes:
        raise OptionError(
            f"--memory {memory} is more than the {board.ram_bytes / 2**30:.0f} GiB of the {board.title}; "
            "use less, or another board"
        )
    return Budget(n_bytes, n_bytes, board.ram_bytes - board.system_bytes, strict=True, elsewhere=True)


def parse_time(text: str) -> float:
    """Seconds of "50ms" or "0.2s"; OptionError for anything else."""
    match = _TIME.fullmatch(text.strip().lower())
    seconds = float(match[1]) * (1e-3 if match[2] == "ms" else 1.0) if match else 0.0
    if not seconds > 0:
        raise OptionError(f"--tpot {text!r:.40} is not a time; write for example 50ms or 0.2s")
    return seconds
