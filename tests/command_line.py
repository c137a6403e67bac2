"""The command line over fake_model.py, called within a test or run as a program of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import fake_model
import pytest

from edgert.cli import main

FAKE = Path(fake_model.__file__)


def fake(monkeypatch):
    """Put a fake model in the place of all models, and return it."""

    def set_module(name, module):
        monkeypatch.setitem(sys.modules, name, module)

    return fake_model.install(fake_model.Model(), set_module)


def runner(monkeypatch, capfd):
    """run(*arguments, piped=bytes) -> (exit code, stdout, stderr)."""

    def run(*arguments: str, piped: bytes = b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
        monkeypatch.setattr(sys, "argv", ["edgert", *arguments])
        with pytest.raises(SystemExit) as left:
            main.main()
        out, err = capfd.readouterr()
        return left.value.code or 0, out, err

    return run


def program(*arguments: str, code: str | None = None, **environment: str):
    """The command line in a process of its own, its output buffered as usual."""
    start = [sys.executable, "-c", code] if code else [sys.executable, str(FAKE)]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [*start, *arguments],
        env={**kept, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
