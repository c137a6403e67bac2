"""What the tools that measure quality read: a text, or dialogues as one.

Both sides of a comparison get the same characters: what is read here is what edgert's tokenizer is given, and what is
written for other programs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from edgert.cli.options import read_file
from edgert.errors import OptionError


def measured_text(name: str) -> str:
    """The text of a file, for argparse: plain UTF-8, or of a .jsonl its dialogues.

    A dialogue is an object with "turns": [[speaker, text], ...]. Its texts follow each other, one a line; a blank line
    lies between dialogues. argparse.ArgumentTypeError, in one line, for a file that is neither, or has no text.
    """
    path = Path(name)
    try:
        text = read_file(path)  # line ends as they are
    except OptionError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from problem
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        text = "\n".join(_dialogue(line, f"{name}, line {number}") for number, line in lines)
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{name} holds no text: name a file with text in it")
    return text


def _dialogue(line: str, where: str) -> str:
    """The texts of one dialogue, a line each."""
    try:
        document: Any = json.loads(line)
        texts = [text for _, text in document["turns"]]
        return "".join(" ".join(text.splitlines()) + "\n" for text in texts)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise argparse.ArgumentTypeError(
            f'{where} is no dialogue ({problem}): write {{"turns": [[speaker, text], ...]}}'
        ) from problem
