"""`edgert profile` on a tiny model: what it prints and leaves, what it refuses, and Ctrl-C in the middle."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import golden_path
from profiling_runs import write_text

from edgert.cli import main
from edgert.cli import profile as profile_command
from edgert.experts.profile import OWN_TEXT, Profile, Sensitivity
from edgert.profiling import Profiled

Run = Callable[..., tuple[int, str, str]]
QUICK = ("--no-sensitivity", "--context", "64", "--threads", "1")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """run(*arguments) -> (exit code, stdout, stderr), in a folder with a model, m.gguf."""
    shutil.copy(golden_path("qwen3moe-q4_0"), tmp_path / "m.gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgert", "profile", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main.main()
        out, err = capfd.readouterr()
        return int(left.value.code or 0), out, err

    return call


def test_corpora_are_named_as_a_shell_gives_them(run: Run, tmp_path: Path) -> None:
    for name in "abc":
        write_text(tmp_path / f"{name}.txt", seed=ord(name))
    code, out, err = run("m.gguf", *QUICK, "--tokens", 384, "--corpus", "a.txt", "b.txt", "--corpus", "c.txt", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["path"] == "m.profile.npz" or document["path"].endswith("/m.profile.npz")
    assert document["tokens"] == document["run"] == 384 and document["resumed"] == 0 and not document["own_text"]
    assert {name: text["tokens"] for name, text in document["texts"].items()} == dict.fromkeys(
        ("a.txt", "b.txt", "c.txt"), 128
    )
    assert document["experts"] == 6 and 0 < document["entropy"] <= 2.6 and document["sensitivity"] is None
    assert document["recall"]["router"] > 0.2 and "loading" not in out
    assert Profile.load(tmp_path / "m.profile.npz").n_tokens == 384
    code, out, err = run("m.gguf", *QUICK, "--tokens", 384, "--corpus=a.txt", "b.txt", "c.txt")
    assert code == 0 and "m.profile.npz: profiled already on this text, 384 tokens\n" in out
    code, out, err = run("m.gguf", *QUICK, "--tokens", 128, "--corpus", "a.txt")
    assert code == 2 and "with other settings (of a.txt, b.txt, c.txt, not of a.txt): name another file" in err
    assert Profile.load(tmp_path / "m.profile.npz").n_tokens == 384


def test_without_a_corpus_the_model_writes_and_that_is_said(run: Run, tmp_path: Path) -> None:
    code, out, err = run("m.gguf", *QUICK, "--tokens", 128, "--out", "own.npz", "--held-out", "0")
    assert code == 0, err
    first, *lines = out.splitlines()
    assert first.startswith("own.npz: 128 tokens in ") and first.endswith(" tokens/s")
    assert lines[0] == "the model wrote the text itself; name --corpus FILE... for text like yours"
    assert lines[1] == f"  100.0%  {OWN_TEXT}: 128 tokens, none kept back"
    assert lines[2].startswith("2 of 6 experts a token in 2 layers; ")


def test_where_all_was_run_earlier_no_rate_is_said(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path / "t.txt")
    assert run("m.gguf", *QUICK, "--tokens", 128, "--corpus", "t.txt", "--out", "t.npz")[0] == 0
    path = tmp_path / "t.npz"
    profile_command.show(Profiled(Profile.load(path), path, 0, 128, 0.5, ()))
    assert capfd.readouterr().out.startswith(f"{path}: 128 tokens by an earlier run\n")


def test_profiles_are_merged_with_weights(run: Run, tmp_path: Path) -> None:
    for name in "ab":
        write_text(tmp_path / f"{name}.txt", seed=ord(name))
        assert run("m.gguf", *QUICK, "--tokens", 128, "--out", f"{name}.npz", "--corpus", f"{name}.txt")[0] == 0
    assert run("m.gguf", *QUICK, "--tokens", 20_000, "--out", "d.npz", "--corpus", "a.txt", "--held-out", "0")[0] == 0
    code, out, err = run("--merge", "a.npz", "d.npz", "--out", "e.npz")
    assert code == 0 and "chunks kept back were dropped, copies of text that another profile calibrated on\n" in err
    assert sum(len(domain.held_out) for domain in Profile.load(tmp_path / "e.npz").domains) == 0
    code, out, err = run("--merge", "a.npz=0.7", "b.npz=0.3", "--out", "c.npz")
    assert code == 0 and out.startswith("c.npz: 256 tokens of 2 texts\n   70.0%  a.txt: 128 tokens"), err
    assert Profile.load(tmp_path / "c.npz").shares == pytest.approx({"a.txt": 0.7, "b.txt": 0.3})
    code, out, _ = run("--merge", "a.npz", "--merge", "b.npz", "-o", "c.npz", "--json")
    assert code == 0 and json.loads(out)["texts"]["a.txt"]["share"] == 0.5


def test_what_quantising_costs_is_said(run: Run, tmp_path: Path) -> None:
    write_text(tmp_path / "t.txt")
    assert run("m.gguf", *QUICK, "--tokens", 128, "--corpus", "t.txt")[0] == 0
    profile, formats = Profile.load(tmp_path / "m.profile.npz"), ("int3", "int4-g64", "int4")
    errors = np.ones((*profile.record_bytes.shape, 3, 3), np.float32) * [4.0, np.inf, 1.0]
    errors[:, :, 2] *= 2
    rows = np.full(profile.record_bytes.shape, 64, np.int32)
    gains = np.array([0.003, 0.001], np.float32) / 12
    found = Sensitivity("gptq", formats, errors.astype(np.float32), rows, gains, 128)
    profile.with_sensitivity(found).save(tmp_path / "m.profile.npz")
    code, out, err = run("m.gguf", "--context", 64, "--threads", 1, "--tokens", 128, "--corpus", "t.txt")
    assert code == 0, err
    assert out.splitlines()[-2:] == [
        "expected divergence from the source, nats a token: 0.004 with 4 bits, 0.016 with 3 bits for all experts "
        "(gptq)",
        "what costs most of it: layers 0 (75%), 1 (25%); gate 25%, up 25%, down 50%",
    ]
    errors[:, :, 2] = np.inf
    profile.with_sensitivity(replace(found, errors=errors.astype(np.float32))).save(tmp_path / "m.profile.npz")
    code, out, err = run("m.gguf", "--context", 64, "--threads", 1, "--tokens", 128, "--corpus", "t.txt")
    assert code == 0, err
    assert out.splitlines()[-2:] == [
        "expected divergence from the source, nats a token: 0.002 with 4 bits, 0.008 with 3 bits for all experts "
        "(gptq), down left as in the source, for no format fits",
        "what costs most of it: layers 0 (75%), 1 (25%); gate 50%, up 50%",
    ]
    code, out, err = run("m.gguf", "--context", 64, "--tokens", 128, "--corpus", "t.txt", "--quantiser", "rtn")
    assert code == 2 and "with sensitivity to gptq, not rtn: name another file with --out, or remove it" in err


def test_a_disk_that_is_full_while_costs_are_measured_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(Path("t.txt"))

    def write(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("edgert.tile_store.write_aside", write)
    code, out, err = run("m.gguf", "--context", 64, "--threads", 1, "--tokens", 128, "--corpus", "t.txt")
    assert code == 2 and out == ""
    work = r"\S*m\.profile\.npz\.work"
    said = rf"error: {work} cannot be written \(No space .*\); make room, .* goes on .*, or remove {work}"
    assert re.fullmatch(said, err.splitlines()[-1]), err


REFUSED = {
    "a corpus that is absent": (["m.gguf", "--corpus", "no.txt"], r"no.txt cannot be read (No such file"),
    "an empty corpus": (["m.gguf", "--corpus", "empty.txt"], "empty.txt holds nothing"),
    "a model behind texts": (["--corpus", "t.txt", "m.gguf"], "m.gguf is a model, no text: the model comes first"),
    "a model behind one": (["--corpus=t.txt", "m.gguf"], "m.gguf is a model, no text: the model comes first"),
    "a bundle behind one": (["--corpus=t.txt", "m.edge"], "m.edge is a model, no text: the model comes first"),
    "a share": (["m.gguf", "--held-out", "lots"], "--held-out lots must be a share from 0 to below 100%"),
    "a share of all": (["m.gguf", "--held-out", "100%"], "--held-out 100% must be a share"),
    "a quantiser": (
        ["absent.gguf", "--quantiser", "gtpq"],
        "--quantiser 'gtpq' is not known; use one of rtn, hqq, awq, gptq",
    ),
    "a folder that is absent": (["m.gguf", "--out", "no/p.npz"], "no/p.npz cannot be written (No such file"),
    "a folder": (["m.gguf", "--out", "."], ". is there already, and is no profile"),
    "one to merge": (["--merge", "a.npz", "--out", "c.npz"], "--merge names one profile"),
    "nowhere to merge to": (["--merge", "a.npz", "b.npz"], "--merge takes profiles and --out FILE"),
    "a model to merge": (["m.gguf", "--merge", "a.npz", "b.npz", "-o", "c"], "and neither a model nor --corpus"),
    "a place of its own to merge to": (["--merge", "a.npz", "b.npz=2", "--out", "b.npz"], "--out b.npz is one of the"),
    "no corpus named": (["m.gguf", "--corpus", "--tokens", "64"], "--corpus names no file; --tokens follows it"),
    "no profile": (["--merge", "empty.txt=1", "m.gguf", "--out", "c.npz"], "empty.txt is not a profile"),
    "no weight": (["--merge", "a.npz=x", "b.npz", "--out", "c.npz"], "'x' is no weight; write FILE=WEIGHT"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_said_in_one_line(what: str, run: Run, tmp_path: Path) -> None:
    arguments, message = REFUSED[what]
    (tmp_path / "empty.txt").touch()
    write_text(tmp_path / "t.txt")
    (tmp_path / "m.edge").mkdir()
    (tmp_path / "m.edge" / "manifest.json").touch()
    (tmp_path / "a.npz").write_bytes(b"")
    code, out, err = run(*arguments, *(() if "--merge" in arguments else QUICK))
    assert code == 2 and out == "" and message in err, err
    assert err.splitlines()[-1].startswith("error: ")
    assert not {path.name for path in tmp_path.iterdir()} & {"c.npz", "m.profile.npz", "m.profile.npz.part"}


def test_ctrl_c_keeps_what_was_run_and_says_so(run: Run, tmp_path: Path) -> None:
    write_text(tmp_path / "t.txt", 400_000)
    arguments = ["m.gguf", *QUICK, "--tokens", "100000", "--corpus", "t.txt"]
    often = "from edgert import profile_journal; profile_journal._LEAST_S = 0.0"  # else tiny models are done before
    code = f"{often}; from edgert.cli.main import main; main()"
    command = [sys.executable, "-W", "ignore", "-c", code, "profile", *arguments]
    part = tmp_path / "m.profile.npz.part"
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while not part.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and out == "", err
    assert "stopped; what was run is kept beside" in err and part.exists()
    assert not (tmp_path / "m.profile.npz").exists()
    code, out, err = run(*arguments)
    assert code == 0 and " more by an earlier run\n" in out and not part.exists(), err
