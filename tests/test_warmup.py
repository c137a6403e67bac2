"""`edgert warmup` and `edgert inspect --cpu`: what is compiled ahead, and what is said about the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from models import golden_path

from edgert import machine, model
from edgert.cli import main
from edgert.quant import isa, jit

PROGRAM = """
from edgert.quant import jit
@jit.kernel
def inner(x): return x + 1
@jit.kernel
def outer(x): return 2 * inner(x)
outer(3), outer(4.0)
print(jit.WORK["compiled"], jit.WORK["found"])
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Any:
    """run(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgert", *arguments])
        with pytest.raises(SystemExit) as left:
            main.main()
        out, err = capfd.readouterr()
        return int(left.value.code or 0), out, err

    return call


def test_kernels_are_counted_as_compiled_and_then_as_found(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, str(tmp_path / "program.py")]
    counts = [subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert counts == ["4 0\n", "0 2\n"]  # what was compiled into the outer one is not asked for again


def test_warmup_says_what_it_took(run: Any) -> None:
    path = str(golden_path("olmoe-q4_0"))
    code, out, err = run("warmup", path, "--threads", "2")
    assert code == 0 and not err
    assert (
        "is ready after" in out and f"{jit.WORK['compiled']} kernels compiled" in out and str(jit.cache_root()) in out
    )
    code, out, _ = run("warmup", path, "--threads", "2", "--json")
    document = json.loads(out)
    assert code == 0 and set(document) == {"model", "seconds", "compiled", "found", "kernels"}
    assert document["kernels"]["count"] > 0 and Path(document["kernels"]["folder"]).is_dir()


def test_after_warmup_an_answer_compiles_nothing(run: Any) -> None:
    path = str(golden_path("qwen3moe-q4_0"))
    assert run("warmup", path, "--threads", "2")[0] == 0
    before = jit.WORK["compiled"]
    with model.load(path, threads=2) as loaded:
        loaded.chat([{"role": "user", "content": "how are you " * 20}], max_tokens=3, seed=1)
    assert jit.WORK["compiled"] == before


def test_warmup_of_what_is_no_model_fails(run: Any) -> None:
    code, out, err = run("warmup", "absent.gguf")
    assert code == 2 and not out and "absent.gguf" in err


def test_inspect_tells_the_machine(run: Any) -> None:
    code, out, _ = run("inspect", "--cpu", "--json")
    document = json.loads(out)
    assert code == 0 and set(document) == {"cpu", "instructions", "threads", "caches", "kernels"}
    assert document["instructions"]["chosen"] == isa.choose().name
    assert set(document["instructions"]) == {"chosen", *dict(isa.explain())}
    assert document["cpu"]["logical_cores"] == psutil.cpu_count()
    assert 1 <= document["threads"]["count"] and document["threads"]["reason"]
    code, out, _ = run("inspect", "--cpu")
    assert code == 0 and document["threads"]["reason"] in out and document["kernels"]["folder"] in out


def test_inspect_shows_a_model_or_the_machine(run: Any) -> None:
    for arguments in (["model.gguf"], ["--context", "8"]):
        code, out, err = run("inspect", "--cpu", *arguments)
        assert code == 2 and not out and "--cpu shows the machine alone" in err


def test_the_name_of_the_cpu_is_the_systems_the_boards_or_llvms(tmp_path: Path) -> None:
    info, board = tmp_path / "cpuinfo", tmp_path / "model"
    info.write_text("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\n")
    board.write_text("A Board Rev 1.4\0")
    assert machine.cpu_name(info, board) == "A CPU @ 2 GHz"
    info.write_text("processor\t: 0\nmodel name\t:\nCPU part\t: 0xd0b\n")
    assert machine.cpu_name(info, board) == "A Board Rev 1.4"
    assert machine.cpu_name(tmp_path / "absent", tmp_path / "absent") == machine._llvm_name()


def test_caches_are_read_as_the_system_writes_them(tmp_path: Path) -> None:
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2M"), ("3", "Odd", "1K"), ("", "", "")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(text + "\n")
    expected = {"L1 data": 48 << 10, "L1 instructions": 32 << 10, "L2": 2 << 20}
    assert dict(machine.caches(tmp_path)) == expected
    assert dict(machine.caches(tmp_path / "absent")) == {}
