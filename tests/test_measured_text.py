"""What the measuring tools read: plain text as it is, dialogues as text, and both for other programs too."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
import bits_table  # noqa: E402   # found through the line above
import peer_bits  # noqa: E402
from measured_text import measured_text  # noqa: E402

DIALOGUES = [
    {
        "id": "1",
        "turns": [["USER", "Hi, is there a table?"], ["SYSTEM", "At eight,\r\nor nine."], ["USER", "Ünder nine."]],
    },
    {"turns": [["USER", 'Say "yes".']]},
]
AS_TEXT = 'Hi, is there a table?\nAt eight, or nine.\nÜnder nine.\n\nSay "yes".\n'


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, DIALOGUES)) + "\n\n")
    return path


def test_text_is_read_with_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_bytes("one\r\n\n{} two\u2028three".encode())
    assert measured_text(str(path)) == "one\r\n\n{} two\u2028three"


def test_dialogues_are_read_as_their_texts(dialogues: Path) -> None:
    assert measured_text(str(dialogues)) == AS_TEXT


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "cannot be read"),
        ("latin.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("empty.txt", b" \n", "holds no text"),
        ("empty.jsonl", b"\n", "holds no text"),
        ("bad.jsonl", b'{"turns": []}\n{"turns": [["USER"', "bad.jsonl, line 2 is no dialogue"),
        ("list.jsonl", b"[1, 2]", "line 1 is no dialogue"),
        ("messages.jsonl", b'{"messages": []}', 'write {"turns": [[speaker, text], ...]}'),
        ("numbers.jsonl", b'{"turns": [["USER", 1]]}', "line 1 is no dialogue"),
        ("three.jsonl", b'{"turns": [["USER", "a", "b"]]}', "line 1 is no dialogue"),
    ],
)
@pytest.mark.parametrize("tool", [bits_table, peer_bits])
def test_other_files_are_refused_in_one_line_before_a_model_is_looked_for(
    tool: object,
    name: str,
    content: bytes | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    words = ["absent.gguf", "absent.npz", "--peer", ".", "--calibration", "c.txt"]
    with pytest.raises(SystemExit) as left:
        tool.main([*(words if tool is peer_bits else words[:2]), "--text", name])  # type: ignore[attr-defined]
    *_, last = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and "error: argument --text: " in last and message in last


def test_other_programs_get_the_same_text_in_a_plain_file(dialogues: Path, tmp_path: Path) -> None:
    program = tmp_path / "llama-perplexity"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nassert open(sys.argv[sys.argv.index('-f') + 1], encoding='utf-8').read() == "
        f"{AS_TEXT!r}\nprint('Final estimate: PPL = 12.5 +/- 0.1')\n"
    )
    program.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    text = measured_text(str(dialogues))
    peer = peer_bits.Peer(
        argparse.Namespace(
            peer=tmp_path, model=Path("m.gguf"), work=work, text=[text], chunks=2, threads=1, calibration=Path("c.txt")
        )
    )
    assert peer.sources() == [12.5]
