"""A chat on disk: what is saved comes back, and what is no chat is neither loaded nor overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgert.cli.conversation import Conversation
from edgert.errors import OptionError


def test_a_conversation_is_saved_and_loaded(tmp_path):
    chat, path = Conversation(), tmp_path / "chat.json"
    chat.set_system("be brief")
    chat.add("grüß", "dich\n🙂")
    chat.save(path, "fake")
    chat.add("more", "text")
    chat.save(path, "fake")
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]
    again = Conversation()
    again.load(path)
    assert again.messages == chat.messages and again.system == "be brief"
    again.reset()
    assert again.messages == [{"role": "system", "content": "be brief"}]
    again.set_system(None)
    assert again.messages == [] and again.system is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        "\udcff",
        '{"format": "other", "messages": []}',
        '{"format": "edgert chat 1"}',
        '{"format": "edgert chat 1", "messages": [{"role": "root", "content": "x"}]}',
        '{"format": "edgert chat 1", "messages": [{"role": "user", "content": 3}]}',
        '{"format": "edgert chat 1", "messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
def test_a_file_that_is_no_chat_is_neither_loaded_nor_overwritten(tmp_path, content):
    path, chat = tmp_path / "notes", Conversation()
    data = content.encode("utf-8", "surrogateescape")
    path.write_bytes(data)
    chat.add("a", "b")
    for act in (lambda: chat.load(path), lambda: chat.save(path, "fake")):
        with pytest.raises(OptionError, match="notes is"):
            act()
    assert path.read_bytes() == data and len(chat.messages) == 2


def test_files_that_cannot_be_read_or_written(tmp_path):
    chat = Conversation()
    with pytest.raises(OptionError, match="absent cannot be read"):
        chat.load(tmp_path / "absent")
    with pytest.raises(OptionError, match="cannot be written"):
        chat.save(tmp_path / "no" / "folder", "fake")
    with pytest.raises(OptionError, match="cannot be written"):
        chat.save(tmp_path / ("x" * 300), "fake")
    for special in (tmp_path, Path("/dev/zero")):
        with pytest.raises(OptionError, match="no regular file"):
            chat.save(special, "fake")
        with pytest.raises(OptionError, match="no regular file"):
            chat.load(special)
    assert list(tmp_path.iterdir()) == []


def test_a_chat_is_saved_whatever_it_holds(tmp_path):
    chat = Conversation()
    chat.add("half \ud800 of a character", "x" * 250)
    chat.save(tmp_path / ("y" * 250), "fake")
    chat.load(tmp_path / ("y" * 250))
    assert chat.messages[0]["content"] == "half ? of a character"


def test_a_file_that_grows_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("edgert.cli.conversation.LARGEST_FILE", 10)
    (tmp_path / "large").write_text(" " * 11)
    with pytest.raises(OptionError, match="too large"):
        Conversation().load(tmp_path / "large")
