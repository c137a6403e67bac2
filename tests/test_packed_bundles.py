"""What a bundle is made with and compared with: the profile it is packed by, and the goal of what is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgert import pack_bits
from edgert.cli.app import app
from edgert.experts.profile import Profile
from edgert.storage.bundle import PROFILE
from tests import tiny_moe

RUN = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe.write(tmp_path_factory.mktemp("bundles") / "tiny.gguf")


def test_without_a_profile_one_is_made_and_kept(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_bits, "_TOKENS", 512)
    monkeypatch.setattr(pack_bits, "_HELD_OUT", 0.4)
    out, kept = tmp_path / "m.edge", tmp_path / "m.profile.npz"
    result = RUN.invoke(
        app, ["pack", str(model), str(out), "--format", "int4", "--context", "128"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert Profile.load(kept).own_text and Profile.load(out / PROFILE).digest == Profile.load(kept).digest
    made = kept.stat()
    result = RUN.invoke(
        app, ["pack", str(model), str(out), "--format", "int4", "--context", "128"], catch_exceptions=False
    )
    assert "packed already" in result.stdout and kept.stat().st_ino == made.st_ino
