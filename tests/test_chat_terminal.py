"""A chat in a real pseudo-terminal: keys, commands, Ctrl-C, history; at last three turns with the embedded model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path

import pexpect
import pytest

import edgert.demo
from edgert.cli.session import stats, status_line
from edgert.cli.terminal import open_history, unfinished, unquoted
from edgert.generation import Completion, Usage

FAKE = Path(__file__).with_name("fake_model.py")
DEMO = Path(edgert.demo.__file__).with_name("smollm2-moe-q4_0.gguf")
CTRL_C, CTRL_D, UP, ALT_ENTER = "\x03", "\x04", "\x1b[A", "\x1b\r"
STATUS = re.compile(
    r"(\d+) tokens, [\d.]+ tok/s, first after [\d.]+ s; prompt (\d+) new \+ (\d+) reused; "
    r"context ([\d,]+) of ([\d,]+)[];]"
)


class Chat:
    """The program in a terminal of 200 columns, without colours or queries of the cursor."""

    def __init__(self, home: Path, program: list[str], timeout: float = 20, **environment: str) -> None:
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "NO_COLOR"))}
        environment = {
            **keep,
            "TERM": "xterm",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "XDG_STATE_HOME": str(home),
            "PYTHONUNBUFFERED": "1",
            **environment,
        }
        for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):  # compiled kernels stay where they are
            if name in os.environ:
                environment[name] = os.environ[name]
        self.process = pexpect.spawn(
            program[0], program[1:], env=environment, dimensions=(40, 200), encoding="utf-8", timeout=timeout, cwd=home
        )

    def see(self, pattern: str | re.Pattern[str]) -> re.Match[str]:
        self.process.expect(pattern if isinstance(pattern, re.Pattern) else re.escape(pattern))
        return self.process.match

    def ready(self) -> None:
        """Wait until the editor takes keys: it has drawn its prompt and shows the cursor."""
        self.see(re.compile(r"\x1b\[\?2004h.*?>.*?\x1b\[\?25h", re.DOTALL))

    def send(self, keys: str) -> None:
        self.process.send(keys)

    def say(self, text: str) -> None:
        self.process.send(text + "\r")

    def status(self) -> tuple[int, int, int, int]:
        """(generated, new, reused, used) of the next status line."""
        found = self.see(STATUS)
        return tuple(int(number.replace(",", "")) for number in found.groups()[:4])

    def left(self) -> int:
        """Wait for the end; the exit code."""
        self.process.expect(pexpect.EOF)
        self.process.close()
        return self.process.exitstatus


@pytest.fixture
def chat(tmp_path):
    """chat(*arguments, **environment) starts one on the fake model."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, before: str = "", **environment: str) -> Chat:
            started = Chat(tmp_path, [sys.executable, str(FAKE), "chat", *arguments], **environment)
            stack.callback(started.process.close, force=True)
            if before:
                started.see(before)
            started.ready()
            return started

        yield start


def test_three_turns_and_ctrl_d(chat):
    c = chat()
    c.say("one")
    c.see("You said: one")
    assert c.status() == (14, 20, 0, 34)
    c.ready()
    c.say("two")
    c.see("You said: two")
    assert c.status() == (14, len("<user>two<assistant>"), len("<user>one<assistant>You said: one"), 67)
    c.ready()
    c.say("three")
    c.see("You said: three")
    c.ready()
    c.send(CTRL_D)
    assert c.left() == 0


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(chat, tmp_path):
    c = chat(DELAY_S="0.05")
    c.say("x" * 60)
    c.see("You said: xxx")
    c.send(CTRL_C)
    c.see("[stopped; ")
    assert 12 < c.status()[0] < 60
    c.ready()
    c.say("/save kept")
    c.see("2 messages saved")
    messages = json.loads((tmp_path / "kept").read_text())["messages"]
    assert messages[1]["role"] == "assistant" and messages[1]["content"].startswith("You said: xxx")
    assert 12 < len(messages[1]["content"]) < 70
    c.ready()
    c.say("go on")
    c.see("You said: go on")
    c.ready()
    c.say("/exit")
    assert c.left() == 0


def test_ctrl_c_at_the_prompt_clears_the_line_and_hints(chat):
    c = chat()
    c.send("half a thought")
    c.see("half a thought")
    c.send(CTRL_C)
    time.sleep(0.2)
    c.say("new")
    c.see("You said: new")
    c.ready()
    c.send(CTRL_C)
    c.see("Ctrl-D or /exit leaves")
    c.ready()
    c.say("still here")
    c.see("You said: still here")
    c.ready()
    c.say("/quit")
    assert c.left() == 0


def test_two_signals_at_the_prompt_stay_in_the_chat(chat):
    c = chat()
    for pause in (0.04, 0.001, 0.04, 0.001):
        os.kill(c.process.pid, signal.SIGINT)
        time.sleep(pause)
    c.send(CTRL_C + CTRL_C)
    c.see("Ctrl-D or /exit leaves")
    time.sleep(0.2)
    c.say("still here")
    c.see("You said: still here")
    c.ready()
    c.send(CTRL_D)
    assert c.left() == 0


def test_what_goes_wrong_ends_the_turn_only(chat, tmp_path):
    c = chat()
    c.say("hello")
    c.see("You said: hello")
    c.ready()
    for typed, shown in [
        ("/save ~nosuchuser/x", "home directory"),
        ("/save " + "x" * 300, "name another file"),
        ("/save /dev/stdout", "no regular file"),
        ("/load /dev/zero", "no regular file"),
        ("/save kept", "2 messages saved"),
    ]:
        c.say(typed)
        c.see(shown)
        c.ready()
    c.send(CTRL_D)
    assert c.left() == 0


def test_status_lines():
    usage = Usage(prompt_tokens=290, cached_tokens=10, generated_tokens=11)
    whole = Completion("x", (1,), "context", None, None, usage)
    assert "prompt 280 new + 10 reused; context 300 of 300]" in status_line(whole, 300)
    read = replace(usage, expert_hits=3, expert_misses=1, bytes_read=5 << 20)
    assert status_line(replace(whole, usage=read), 300).endswith("; experts 75% in memory, 5.0 MiB read]")
    assert "reading ahead: off: why" in list(stats(replace(read, prefetch="off: why")))
    stopped = replace(whole, finish_reason="cancelled", usage=Usage(prompt_tokens=290))
    assert status_line(stopped, 300) == "[stopped; the prompt of 290 tokens was not read to its end]"
    assert list(stats(stopped.usage)) == ["prompt: 290 tokens, not read to the end"]


def test_several_lines(chat):
    c = chat()
    c.send("a" + ALT_ENTER + "b\\\rc\r")
    c.see("You said: a\r\nb\r\nc\r\n")
    c.ready()
    c.send('"""one\r\rtwo"""\r')
    c.see("You said: one\r\n\r\ntwo\r\n")
    c.ready()
    c.send("\x1b[200~pasted\rlines\x1b[201~\r")
    c.see("You said: pasted\r\nlines\r\n")
    c.ready()
    c.send(CTRL_D)
    assert c.left() == 0


def test_history_lasts_and_is_private(chat, tmp_path):
    c = chat()
    c.say("remember me")
    c.see("You said: remember me")
    c.ready()
    c.send(CTRL_D)
    assert c.left() == 0
    (history,) = (tmp_path / "edgert").iterdir()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    c = chat()
    c.send(UP)
    c.see("remember me")
    c.send("!\r")
    c.see("You said: remember me!")
    c.ready()
    c.send(CTRL_D)
    assert c.left() == 0


def test_commands(chat, tmp_path):
    c = chat("--system", "be brief")
    steps = [
        ("/help", "/save FILE"),
        ("/stats", "no answer yet"),
        ("/system", "system message: be brief"),
        ("hello", "You said: hello"),
        ("/stats", "experts: 3 of 4 were in memory (75.0%)"),
        ("/stats", "read from flash: 2.0 KiB; "),
        ("/stats", "read ahead: 1.0 KiB useful, 0 bytes late, 0 bytes wasted, 0 bytes evicted"),
        ("/save", "/save needs a file name"),
        ("/save my chat", "3 messages saved to my chat"),
        ("/reset", "same system message"),
        ("/system [bold]be long[/bold]", "system message set"),
        ("/system", "system message: [bold]be long[/bold]"),
        ("/load my chat", "3 messages loaded"),
        ("/system", "system message: be brief"),
        ("/load absent", "absent cannot be read"),
        ("/load", "/load needs a file name"),
        ("/nonsense now", "there is no command /nonsense"),
        (" /usr/bin", "You said: /usr/bin"),
        ("more", "You said: more"),
    ]
    for typed, shown in steps:
        c.say(typed)
        c.see(shown)
        c.ready()
    c.say("/exit")
    assert c.left() == 0
    assert len(json.loads((tmp_path / "my chat").read_text())["messages"]) == 3


def test_a_full_context_says_how_to_go_on(chat):
    c = chat(N_CONTEXT="51")
    c.say("one two three")
    c.see("You said: one two thr")
    c.see("is full: /reset begins anew")
    c.ready()
    c.say("more")
    c.see("the prompt has")
    c.see("is full: /reset begins anew")
    c.ready()
    c.say("/reset")
    c.ready()
    c.say("ok")
    c.see("You said: ok")
    c.ready()
    c.send(CTRL_D)
    assert c.left() == 0


def test_what_takes_long_says_so(chat):
    c = chat(before="reading the weights", DELAY_S="1.3")
    c.say("hi")
    c.see("reading the prompt")
    c.see("Y")
    c.send(CTRL_C)
    c.see("[stopped; ")
    c.ready()
    c.send(CTRL_D)
    assert c.left() == 0


def test_a_model_without_a_template_says_so(chat):
    c = chat(before="ChatML is used", CHATML="yes")
    c.send(CTRL_D)
    assert c.left() == 0


@pytest.mark.parametrize(
    ("typed", "is_open", "meant"),
    [
        ("plain", False, "plain"),
        ('"""', True, '"""'),
        ('"""one\ntwo', True, '"""one\ntwo'),
        ('"""\none\n"""', False, "one"),
        ('""""""', False, ""),
        ('"""this""" means', False, '"""this""" means'),
        ('is """ a quote', False, 'is """ a quote'),
    ],
)
def test_three_quotes(typed, is_open, meant):
    assert unfinished(typed) == is_open
    assert unquoted(typed) == meant


def test_without_a_home_the_history_is_in_memory(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    history = open_history()
    history.append_string("x")
    assert history.get_strings() == ["x"]


def test_a_limit_shows(chat):
    c = chat("--max-tokens", "3")
    c.say("hi")
    c.see("You\r\n")
    c.see("[cut at --max-tokens; 3 tokens")
    c.ready()
    c.send(CTRL_D)
    assert c.left() == 0


@pytest.mark.skipif(not DEMO.exists(), reason="the embedded model is not in this checkout")
def test_three_turns_with_the_embedded_model(tmp_path):
    """The second turn computes only the new text; Ctrl-C stops an answer and the chat goes on."""
    program = [sys.executable, "-c", "from edgert.cli.main import main; main()"]
    program += ["chat", "--temperature", "0", "--max-tokens", "200"]
    c = Chat(tmp_path, program, timeout=240)
    try:
        c.ready()
        c.process.timeout = 60
        c.say("What is the capital of France?")
        c.see("Paris")
        generated, new, reused, used = c.status()
        assert reused == 0 and used == new + generated
        c.ready()

        c.say("Tell me a long story about a small robot.")
        c.see("\x1b[?2004l")  # the editor is left
        c.see(re.compile(r"\b(?!reading|prompt)[a-z]{4,}"))
        c.send(CTRL_C)
        c.see("[stopped; ")
        _, new_second, reused_second, _ = c.status()
        assert reused_second >= used - 2 and new_second < 30
        c.ready()

        c.send(UP)
        c.see("small robot.")
        c.send(CTRL_C)
        c.say("Thank you. And the capital of Italy?")  # the answer depends on where the story was stopped
        _, new_third, reused_third, _ = c.status()
        assert reused_third > reused_second and new_third < 30
        c.ready()
        c.send(CTRL_D)
        assert c.left() == 0
    finally:
        c.process.close(force=True)
