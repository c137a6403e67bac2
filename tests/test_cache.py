"""The cache of packed models, and the commands pack, verify and cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models import golden_path
from pack_server import PackServer, wait_for

from edgert import cache
from edgert.cli import main
from edgert.cli.pack import reporting
from edgert.errors import OptionError, StorageError
from edgert.pack_meter import Meter, duration
from edgert.storage.bundle import Bundle


def silent(stage: str, fraction: float) -> None:
    """No progress."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgert" / "models"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copy2(golden_path("olmoe-q4_0"), tmp_path / "model.gguf"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Any:
    """run(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgert", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit) as left:
            main.main()
        out, err = capfd.readouterr()
        return int(left.value.code or 0), out, err

    return call


# ---- the cache -------------------------------------------------------------------------------------------------------
def test_a_model_is_packed_once(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache.cached_bundle(source, silent)
    assert path.parent == folder and path.name.startswith("model-") and folder.stat().st_mode & 0o777 == 0o700
    made = (path / "manifest.json").stat().st_mtime_ns
    monkeypatch.chdir(source.parent)
    assert cache.cached_bundle(Path("model.gguf"), silent) == path
    assert (path / "manifest.json").stat().st_mtime_ns == made
    os.utime(source, (5, 5))
    assert [model.state for model in cache.cached_models()] == ["changed"]
    assert cache.cached_bundle(source, silent) == path
    assert (path / "manifest.json").stat().st_mtime_ns != made
    with Bundle.open(path) as bundle:
        assert bundle.manifest.files[0].mtime_ns == 5 * 10**9


def test_two_models_of_one_name(folder: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Path(shutil.copy(golden_path("llama-q4_0"), tmp_path / "other" / "model.gguf"))
    assert cache.cached_bundle(source, silent) != cache.cached_bundle(other, silent)
    assert len(list(folder.iterdir())) == 2


def test_a_damaged_bundle_is_packed_anew(folder: Path, source: Path) -> None:
    path, told = cache.cached_bundle(source, silent), []
    for name, words in (("experts.bin", "is damaged"), ("manifest.json", "is not JSON"), ("hot.bin", "is damaged")):
        os.truncate(path / name, 20)
        cache.cached_bundle(source, lambda stage, fraction: told.append(stage))
        assert any("packing anew: " in stage and words in stage for stage in told), told
        Bundle.open(path).close()


def test_a_cache_that_is_half_removed_is_no_obstacle(folder: Path, source: Path) -> None:
    path = cache.cached_bundle(source, silent)
    (path / "manifest.json").unlink()
    assert [model.state for model in cache.cached_models()] == ["damaged"]
    Bundle.open(cache.cached_bundle(source, silent)).close()


@pytest.fixture
def read_only(folder: Path) -> Iterator[Path]:
    """The cache on a disk that cannot be written."""
    folder.mkdir(parents=True)
    if os.getuid() != 0:
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_cache(read_only: Path, source: Path) -> None:
    with pytest.raises(StorageError, match=r"models: the cache cannot be written \(read-only\); set XDG_CACHE_HOME to"):
        cache.cached_bundle(source, silent)


def test_a_cache_folder_that_cannot_be_made(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))
    with pytest.raises(
        StorageError, match=r"cannot be written \(Not a directory\).*edgert pack .*model\.gguf OUT\.edge"
    ):
        cache.cached_bundle(source, silent)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_folder() == tmp_path / "home" / ".cache" / "edgert" / "models"


def test_a_read_only_cache_still_serves_what_it_has(folder: Path, source: Path) -> None:
    path = cache.cached_bundle(source, silent)
    if os.getuid() == 0:
        bind = ["mount", "--bind", "-o", "ro", str(folder), str(folder)]
        if subprocess.run(bind, capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
    else:
        folder.chmod(0o500)
    try:
        assert cache.cached_bundle(source, silent) == path
    finally:
        if os.getuid() == 0:
            subprocess.run(["umount", str(folder)], check=True)
        folder.chmod(0o700)


def test_list_and_remove(folder: Path, source: Path, tmp_path: Path) -> None:
    assert cache.cached_models() == []
    path = cache.cached_bundle(source, silent)
    gone = Path(shutil.copy(golden_path("llama-q4_0"), tmp_path / "gone.gguf"))
    old = cache.cached_bundle(gone, silent)
    gone.unlink()
    os.utime(old, (7, 7))
    (folder / "half-00000000.edge.part").mkdir()
    (folder / "half-00000000.edge.part" / "hot.bin").write_bytes(bytes(100))
    os.utime(folder / "half-00000000.edge.part", (8, 8))
    found = {model.name: model for model in cache.cached_models()}
    assert [(name.partition("-")[0], model.state) for name, model in found.items()] == [
        ("model", "current"), ("half", "unfinished"), ("gone", "missing")
    ]  # fmt: skip
    assert found[path.name.removesuffix(".edge")].source == str(source)
    assert found["half-00000000"].n_bytes == 100
    with pytest.raises(
        OptionError, match=r"'nothing' is not in the cache, which holds model-\w+, half-00000000, gone-"
    ):
        list(cache.remove(["nothing"]))
    removed = list(cache.remove([str(source), "half-00000000", str(gone)]))
    assert len(removed) == 3 and list(folder.iterdir()) == []
    with pytest.raises(OptionError, match="which holds nothing"):
        list(cache.remove([str(source)]))


def test_what_is_being_packed_is_not_removed(folder: Path, source: Path, tmp_path: Path) -> None:
    folder.mkdir(parents=True)
    server, hold, log = PackServer(source, tmp_path), tmp_path / "hold", tmp_path / "log"
    hold.touch()
    pid = server.start(source, cache.cached_path(source), log=log, hold=hold)
    wait_for(log, "packing model.gguf")
    (model,) = cache.cached_models()
    assert model.state == "unfinished"
    with pytest.raises(OptionError, match="is being packed by another process"):
        list(cache.remove([model.name]))
    hold.unlink()
    assert server.wait(pid) == 0
    server.close()
    assert [model.state for model in cache.cached_models()] == ["current"]


# ---- the commands ----------------------------------------------------------------------------------------------------
def test_pack_and_verify(run: Any, source: Path, tmp_path: Path) -> None:
    code, out, err = run("pack", source)
    bundle = tmp_path / "model.edge"
    assert code == 0 and out.startswith(f"{bundle}: ") and " MB/s" in out and "error" not in err
    code, out, _ = run("pack", source, bundle)
    assert code == 0 and "packed already" in out
    code, out, _ = run("pack", source, bundle, "--json")
    told = json.loads(out)
    assert code == 0 and told["bundle"] == str(bundle) and told["written"] == 0 and told["inexact"] == {}
    assert run("verify", bundle)[:2] == (0, f"{bundle}: sound\n")
    with (bundle / "experts.bin").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff" * 4)
    code, out, err = run("verify", bundle)
    assert code == 2 and out == "" and "error: " in err and "layer 0, expert" in err
    code, out, _ = run("verify", bundle, "--json")
    assert code == 2 and not json.loads(out)["sound"] and len(json.loads(out)["problems"]) == 1


def test_errors_are_one_line(run: Any, source: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (("pack", tmp_path / "nix.gguf"), "no such file"),
        (("pack", source, tmp_path / "nowhere" / "x.edge"), "there is no folder"),
        (("verify", tmp_path), "not a bundle"),
        (("cache", "remove", "x"), "'x' is not in the cache"),
        (("cache", "remove"), "name the packed models to remove, or give --all"),
        (("cache", "remove", "x", "--all"), "name the packed models to remove, or give --all"),
    ):
        code, out, err = run(*arguments)
        assert code == 2 and out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1, err


def test_cache_commands(run: Any, folder: Path, source: Path) -> None:
    assert run("cache", "list")[1] == f"{folder}: 0 packed models, 0 bytes\n"
    path = cache.cached_bundle(source, silent)
    name = path.name.removesuffix(".edge")
    code, out, _ = run("cache", "list")
    first, last = out.splitlines()
    assert code == 0 and first.split()[0] == name and "current" in first and first.endswith(str(source))
    assert last.startswith(f"{folder}: 1 packed models, ")
    (model,) = json.loads(run("cache", "list", "--json")[1])["models"]
    assert model["name"] == name and model["path"] == str(path) and model["state"] == "current"
    assert run("cache", "remove", name)[1].startswith(f"removed {name}, ")
    cache.cached_bundle(source, silent)
    assert json.loads(run("cache", "remove", "--all", "--json")[1])["removed"][0]["name"] == name
    assert list(folder.iterdir()) == []


def test_a_pipe_gets_lines(capfd: Any) -> None:
    """One when the work changes; of the same work one every few seconds."""
    with reporting("packing") as report:
        for stage, fraction in (("waiting: x", 0.0), ("waiting: x", 0.0), ("packing m: a", 0.5), ("packing m: b", 0.6)):
            report(stage, fraction)
    assert capfd.readouterr().err == "waiting: x\npacking m: a (50%)\n"


def test_the_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [0.0], []
    monkeypatch.setattr("edgert.pack_meter.time.perf_counter", lambda: now[0])
    meter = Meter(lambda stage, fraction: told.append((stage, fraction)), "packing m", 1000 << 20, 100 << 20)
    for _ in range(4):
        now[0] += 0.5
        meter.add(50 << 20, "experts")
    assert told[0] == ("packing m: experts", 0.15)  # too early for a rate
    assert told[-1] == ("packing m: experts, 105 MB/s, 7 s left", 0.3)
    assert [duration(seconds) for seconds in (0.2, 99, 180, 7200)] == ["0 s", "99 s", "3 min", "2.0 h"]
