"""A conversation on a terminal: read a message or a command, show the answer, say what it took.

Ctrl-C stops an answer and keeps what was said; an error ends the turn, never the conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli import interrupts, output
from edgert.cli.conversation import Conversation
from edgert.cli.terminal import Terminal
from edgert.errors import ContextLengthError
from edgert.generation import Completion, Usage
from edgert.sampling import Sampling

if TYPE_CHECKING:
    from edgert.model import Model


class Session:
    """One person, one model, one conversation."""

    def __init__(
        self, model: Model, conversation: Conversation, sampling: Sampling, options: Mapping[str, Any]
    ) -> None:
        self._model = model
        self._conversation = conversation
        self._sampling = sampling
        self._options = options  # of Model.chat besides
        self._last: Usage | None = None
        self._turns = 0
        self._generated = 0
        self._leaving = False

    def run(self) -> None:
        """Until the person leaves."""
        terminal, turns = Terminal(), interrupts.Turns()
        output.note(f"{self._model.name}, context {self._model.n_context:,}; /help for help, Ctrl-D leaves")
        with turns.installed():
            while not self._leaving:
                try:
                    text = terminal.read()
                except EOFError:
                    return
                except KeyboardInterrupt:
                    output.note("Ctrl-D or /exit leaves")
                else:
                    self._turn(text, turns)

    def _turn(self, text: str, turns: interrupts.Turns) -> None:
        """What was typed, and what goes wrong with it in one line."""
        try:
            with turns.turn():
                self.take(text)
        except KeyboardInterrupt:
            output.note("stopped")
        except BrokenPipeError:  # nobody reads on
            raise
        except (*output.FAILURES, ValueError, RuntimeError) as problem:
            output.error(output.reason(problem))

    def take(self, text: str) -> None:
        """One message, or a command: a line that begins with /."""
        if text.startswith("/"):
            name, _, argument = text.strip().partition(" ")
            if name in _COMMANDS:
                _COMMANDS[name][2](self, argument.strip())
            else:
                output.note(f"there is no command {name}: /help lists them; a space first makes it a message")
        elif text.strip():
            self.answer(text.strip())

    def answer(self, text: str) -> None:
        """Ask the model and show its answer; what was said is kept, also when it was stopped."""
        messages = self._conversation.asking(text)
        try:
            stream = self._model.chat(messages, stream=True, sampling=self._sampling, **self._options)
        except ContextLengthError as problem:
            output.error(problem)
            return self._say_how_to_go_on()
        with interrupts.stops(stream):
            completion = output.read_out(stream)
        output.write("\n")
        self._last = completion.usage
        self._turns += 1
        self._generated += completion.usage.generated_tokens
        if completion.text or completion.finish_reason != "cancelled":
            self._conversation.add(text, completion.text, completion.reasoning)
        output.note(status_line(completion, self._model.n_context))
        if completion.finish_reason == "context":
            self._say_how_to_go_on()

    def _say_how_to_go_on(self) -> None:
        full = f"the context of {self._model.n_context:,} tokens is full"
        output.note(f"{full}: /reset begins anew, or start edgert with a larger --context")

    def _help(self, _: str) -> None:
        for name, (argument, text, _command) in _COMMANDS.items():
            output.note(f"{name + ' ' + argument:<13} {text}")
        output.note('Enter sends. For several lines: Alt-Enter, a trailing \\, or """ around the text')
        output.note("Ctrl-C stops an answer, Ctrl-D leaves, the arrow keys bring back what was typed")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        output.note("a new conversation" + (", same system message" if self._conversation.system else ""))

    def _stats(self, _: str) -> None:
        if self._last is None:
            return output.note("no answer yet")
        output.note(f"answers: {self._turns}, {self._generated:,} tokens")
        for line in stats(self._last):
            output.note(line)

    def _system(self, text: str) -> None:
        if text:
            self._conversation.set_system(text)
            output.note("system message set; the next answer reads the whole conversation again")
        else:
            output.note(f"system message: {self._conversation.system or 'none'}")

    def _save(self, name: str) -> None:
        if not name:
            return output.note("/save needs a file name")
        self._conversation.save(Path(name).expanduser(), self._model.name)
        output.note(f"{len(self._conversation.messages)} messages saved to {name}")

    def _load(self, name: str) -> None:
        if not name:
            return output.note("/load needs a file name")
        self._conversation.load(Path(name).expanduser())
        output.note(f"{len(self._conversation.messages)} messages loaded; the chat goes on from there")

    def _exit(self, _: str) -> None:
        self._leaving = True


# name: (argument, help, what it does)
_COMMANDS: dict[str, tuple[str, str, Callable[[Session, str], None]]] = {
    "/help": ("", "this list", Session._help),
    "/reset": ("", "forget the conversation, keep the system message", Session._reset),
    "/stats": ("", "what the last answer took", Session._stats),
    "/system": ("TEXT", "set the system message; without TEXT, show it", Session._system),
    "/save": ("FILE", "keep the conversation in a file", Session._save),
    "/load": ("FILE", "go on with a kept conversation", Session._load),
    "/exit": ("", "leave, as /quit and Ctrl-D do", Session._exit),
    "/quit": ("", "leave", Session._exit),
}


def status_line(completion: Completion, n_context: int) -> str:
    """What an answer took, in one line."""
    usage = completion.usage
    if completion.finish_reason == "cancelled" and not usage.generated_tokens:
        return f"[stopped; the prompt of {usage.prompt_tokens:,} tokens was not read to its end]"
    new, used = usage.prompt_tokens - usage.cached_tokens, usage.prompt_tokens + usage.generated_tokens
    speed = f"{usage.tokens_per_s:.1f} tok/s, first after {usage.ttft_s:.2f} s"
    parts = [
        f"{usage.generated_tokens:,} tokens, {speed}",
        f"prompt {new:,} new + {usage.cached_tokens:,} reused",
        f"context {min(used, n_context):,} of {n_context:,}",
    ]
    if usage.bytes_read and usage.hit_rate is not None:
        parts.append(f"experts {usage.hit_rate:.0%} in memory, {output.binary_size(usage.bytes_read)} read")
    ended = {"cancelled": "stopped", "length": "cut at --max-tokens"}.get(completion.finish_reason or "")
    return "[" + "; ".join([ended, *parts] if ended else parts) + "]"


def stats(usage: Usage) -> Iterator[str]:
    """What an answer took, in lines."""
    if not usage.generated_tokens:
        yield f"prompt: {usage.prompt_tokens:,} tokens, not read to the end"
        return
    yield f"prompt: {usage.prompt_tokens:,} tokens, {usage.cached_tokens:,} of them reused"
    times = f"first after {usage.ttft_s:.2f} s, then {usage.tpot_s * 1e3:.1f} ms each"
    yield f"answer: {usage.generated_tokens:,} tokens, {times}"
    if usage.hit_rate is not None:
        experts = usage.expert_hits + usage.expert_misses
        yield f"experts: {usage.expert_hits:,} of {experts:,} were in memory ({usage.hit_rate:.1%})"
    if usage.bytes_read:
        waited = f"{usage.flash_wait_share:.0%} of the time was spent waiting for it"
        yield f"read from flash: {output.binary_size(usage.bytes_read)}; {waited}"
    ahead = {name: getattr(usage, f"prefetch_{name}") for name in ("useful", "late", "wasted", "evicted")}
    if usage.prefetch:
        yield f"reading ahead: {usage.prefetch}"
    if any(ahead.values()):
        yield "read ahead: " + ", ".join(f"{output.binary_size(size)} {name}" for name, size in ahead.items())
    if usage.power:
        yield f"kept cool: {usage.power}"
