"""Compiled code is kept between processes, and an edit of any kernel source is seen (the trap of stale caches)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgert.quant import jit

PROGRAM = """
import edgert.quant, pathlib, sys
edgert.quant.__path__.insert(0, sys.argv[1])        # a copy of the sources that the test may edit
from edgert.quant import jit
jit._SOURCES = (("edgert.quant", "*.py"),)
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
    (folder,) = (cache / "edgert" / "kernels").iterdir()
    os.utime(folder, (0, 0))
    second = run(sources, cache)
    assert folder.stat().st_mtime > time.time() - 3600, "its use was not noted"
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


def test_a_user_without_a_home_gets_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(jit.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"edgert-{os.getuid()}"
    jit._private_folder.cache_clear()
    assert jit.cache_root() == folder / "edgert" / "kernels" and folder.stat().st_mode & 0o777 == 0o700
    for spoil in (lambda: folder.chmod(0o777), lambda: (folder.rmdir(), folder.symlink_to(tmp_path))):
        spoil()
        jit._private_folder.cache_clear()
        own = jit.cache_root()
        assert folder not in own.parents and own.is_relative_to(tmp_path)
        assert own.parents[1].stat().st_mode & 0o777 == 0o700
    jit._private_folder.cache_clear()


def test_a_new_folder_removes_those_not_used_for_long(tmp_path: Path) -> None:
    old, recent, foreign = (tmp_path / name for name in ("a" * 24, "b" * 24, "foreign"))
    for folder, days in ((old, 31), (recent, 29), (foreign, 400)):
        folder.mkdir()
        (folder / "code.nbc").write_bytes(b"code")
        then = time.time() - 86400 * days
        os.utime(folder, (then, then))
    jit._make_folder(tmp_path / ("c" * 24))
    assert not old.exists() and recent.exists() and foreign.exists() and (tmp_path / ("c" * 24)).is_dir()


def test_the_stamp_covers_all_kernel_sources() -> None:
    stamp = jit.source_stamp()
    assert len(stamp) == 24 and stamp == jit.source_stamp()
    installed = (path for folder, pattern in jit._SOURCES for path in jit._folder(folder).glob(pattern))
    covered = {(path.parent.name, path.name) for path in installed}
    root = Path(__file__).resolve().parents[1]
    sources = [
        path
        for folder in ("quant", "devices", "experts", "storage", "edgert")
        for path in (root / folder).rglob("*.py")
    ]
    with_kernels = {path for path in sources if "\n@kernel" in path.read_text() or "\n@inner" in path.read_text()}
    assert with_kernels and {(path.parent.name, path.name) for path in with_kernels} <= covered


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
