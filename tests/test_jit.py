"""Compiled code is kept between processes, and an edit of any kernel source is seen (the trap of stale caches)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from edgert.quant import jit

PROGRAM = """
import edgert.quant, pathlib, sys
edgert.quant.__path__.insert(0, sys.argv[1])        # a copy of the sources that the test may edit
from edgert.quant import jit
jit._FOLDERS = ("edgert.quant",)
from edgert.quant import caller
print(caller.twice_plus(3), dict(caller.twice_plus.stats.cache_hits), jit.is_compiled(caller.twice_plus))
"""
CALLED = "from edgert.quant.jit import kernel\n@kernel\ndef called(x):\n    return 2 * x + {}\n"
CALLER = "from edgert.quant import called\nfrom edgert.quant.jit import kernel\nf = called.called\n"
CALLER += "@kernel\ndef twice_plus(x):\n    return f(x)\n"


def run(sources: Path, cache: Path) -> str:
    """What a fresh process prints."""
    env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", PROGRAM, str(sources)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=cache).stdout.strip()


def test_an_edit_in_another_file_is_seen(tmp_path: Path) -> None:
    sources, cache = tmp_path / "sources", tmp_path / "cache"
    sources.mkdir()
    cache.mkdir()
    (sources / "caller.py").write_text(CALLER)
    (sources / "called.py").write_text(CALLED.format(10))
    first = run(sources, cache)
    assert first.startswith("16 {}")
    second = run(sources, cache)
    assert second.startswith("16 {(int64,): 1}"), "the second process compiled again"
    (sources / "called.py").write_text(CALLED.format(100))
    assert run(sources, cache).startswith("106 {}")


def test_a_damaged_or_unwritable_cache_only_costs_time(tmp_path: Path) -> None:
    sources, cache = tmp_path / "sources", tmp_path / "cache"
    sources.mkdir()
    cache.mkdir()
    (sources / "caller.py").write_text(CALLER)
    (sources / "called.py").write_text(CALLED.format(1))
    run(sources, cache)
    for path in cache.rglob("*.nb?"):
        path.write_bytes(path.read_bytes()[:20])
    assert run(sources, cache).startswith("7 ")
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "edgert").write_text("a file where the cache wants a folder")
    assert run(sources, blocked).startswith("7 {}")


def test_the_stamp_covers_all_kernel_sources() -> None:
    stamp = jit.source_stamp()
    assert len(stamp) == 24 and stamp == jit.source_stamp()
    folders = {folder.name for folder in map(jit._folder, jit._FOLDERS)}
    assert folders == {"quant", "devices", "experts"}


def test_without_the_compiler_answers_stay_the_same(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from models import engine_of, run; import hashlib\n"
        "from edgert.devices.reference import ReferenceDevice; from edgert.quant.jit import JIT_ENABLED\n"
        "device = {} if JIT_ENABLED else {'device': ReferenceDevice}\n"
        "logits = run(*engine_of(Path(sys.argv[1]), activations='int8', **device), list(range(20)))\n"
        "print(hashlib.sha256(logits.tobytes()).hexdigest(), JIT_ENABLED)"
    )
    here = Path(__file__).resolve().parent
    answers = []
    for disable in ("0", "1"):
        env = {**os.environ, "NUMBA_DISABLE_JIT": disable, "PYTHONPATH": str(here)}
        command = [sys.executable, "-c", program, str(here / "golden" / "qwen3moe-q4_0.gguf")]
        answers.append(
            subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
        )
    assert [answer[1] for answer in answers] == ["True", "False"]
    assert answers[0][0] == answers[1][0]
