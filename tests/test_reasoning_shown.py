"""Reasoning on the command line: pale on a terminal, apart in JSON, not in a pipe, and kept for the template's use."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_chat_terminal import CTRL_C, CTRL_D, FAKE, Chat

from edgert.cli.conversation import Conversation
from edgert.errors import OptionError


def answer(*arguments: str, **environment: str) -> tuple[str, str]:
    """stdout and stderr of one answer of a model that thinks."""
    done = subprocess.run(
        [sys.executable, str(FAKE), "chat", "-p", "hi", *arguments],
        env={**os.environ, "THINKS": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout, done.stderr


def test_a_pipe_gets_the_answer_alone() -> None:
    assert answer() == ("You said: hi\n", "")
    ended = "the model was still thinking when --max-tokens ended it: allow more"
    assert answer("--max-tokens", "12") == ("\n", f"{ended}, or use --no-think\n")
    no_switch = f"fake has no switch for thinking: --no-think changes nothing\n{ended}\n"
    assert answer("--max-tokens", "12", SWITCH="other") == ("\n", f"{ended}\n")
    assert answer("--max-tokens", "12", "--no-think", SWITCH="other") == ("\n", no_switch)
    assert answer("--max-tokens", "12", "--no-think", SWITCH="reasoning_effort") == ("\n", f"{ended}\n")


def test_json_has_both() -> None:
    document = json.loads(answer("--json")[0])
    assert (document["text"], document["reasoning"]) == ("You said: hi", "Hm, so.")


def test_thinking_can_be_switched() -> None:
    document = json.loads(answer("--json", "--no-think")[0])
    assert (document["text"], document["reasoning"]) == ("You said: hi", "")
    assert json.loads(answer("--json", "--think")[0])["reasoning"] == "Hm, so."


def test_effort_can_be_chosen() -> None:
    for option, expected in [(["--no-think"], "So."), ([], "Hm, so."), (["--think"], "Hm, hm, so.")]:
        document = json.loads(answer("--json", *option, SWITCH="reasoning_effort")[0])
        assert (document["text"], document["reasoning"]) == ("You said: hi", expected)


def test_a_model_without_the_switch_says_so() -> None:
    done = subprocess.run(
        [sys.executable, str(FAKE), "chat", "-p", "hi", "--no-think"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "You said: hi\n"
    assert done.stderr == "fake has no switch for thinking: --no-think changes nothing\n"


def test_on_a_terminal_it_is_pale_and_before_the_answer(tmp_path: Path) -> None:
    chat = Chat(tmp_path, [sys.executable, str(FAKE), "chat"], THINKS="1", DELAY_S="0.01")
    try:
        chat.ready()
        chat.say("one")
        shown = chat.see(re.compile(r"((?:\x1b\[2m[^\x1b]+\x1b\[22m)+)\r\n\r\nYou said: one\r\n"))
        assert re.sub(r"\x1b\[\d+m", "", shown[1]) == "Hm, so."
        chat.status()
        chat.ready()
        chat.say("/save kept")
        chat.see("2 messages saved")
        kept = json.loads((tmp_path / "kept").read_text())["messages"][1]
        assert kept == {"role": "assistant", "content": "You said: one", "reasoning_content": "Hm, so."}
        chat.ready()
        chat.say("two")
        chat.see("\x1b[2mH")
        chat.send(CTRL_C)  # within the reasoning: nothing was answered
        chat.see("[stopped; ")
        chat.ready()
        chat.say("/save kept")
        chat.see("2 messages saved")
        chat.ready()
        chat.send(CTRL_D)
        assert chat.left() == 0
    finally:
        chat.process.close(force=True)


def test_a_terminal_that_cannot_gets_plain_text(tmp_path: Path) -> None:
    chat = Chat(tmp_path, [sys.executable, str(FAKE), "chat", "-p", "hi"], THINKS="1", TERM="dumb")
    try:
        chat.see("Hm, so.\r\n\r\nYou said: hi\r\n")
        assert chat.left() == 0
    finally:
        chat.process.close(force=True)


def test_reasoning_is_saved_and_loaded(tmp_path: Path) -> None:
    chat, path = Conversation(), tmp_path / "chat.json"
    chat.add("a", "b", "why")
    chat.add("c", "d")
    chat.save(path, "fake")
    again = Conversation()
    again.load(path)
    assert again.messages == chat.messages and again.messages[1]["reasoning_content"] == "why"
    assert "reasoning_content" not in again.messages[3]
    path.write_text(path.read_text().replace('"why"', "5"))
    with pytest.raises(OptionError, match="damaged"):
        again.load(path)
