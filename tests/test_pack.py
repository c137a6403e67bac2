"""Packing under kills, full disks, changed sources and races: what is published is always whole."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from models import golden_path
from pack_server import PackServer, last, lines, wait_for

from edgert.architectures import read_config
from edgert.errors import ModelFileError, OptionError, StorageError
from edgert.loading import resolve
from edgert.pack import default_out, is_current, pack, pack_model
from edgert.pack_place import Place
from edgert.storage import bundle_writer
from edgert.storage.bundle import FILES, Bundle
from edgert.storage.gguf_file import GgufFile
from edgert.verify import verify
from edgert.weights import Weights

MODEL = "olmoe-q8_0"
SMALL = 32 << 10  # slabs for a small model


def silent(stage: str, fraction: float) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackServer]:
    made = PackServer(golden_path(MODEL), tmp_path_factory.mktemp("server"))
    yield made
    made.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copy2(golden_path(MODEL), tmp_path / "model.gguf"))


def content(bundle: Path) -> dict[str, bytes]:
    """All files of a bundle, the manifest without what tells of time and place."""
    files = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with Bundle.open(bundle) as opened:
        files["manifest.json"] = opened.manifest.content().encode()
    return files


def test_a_pack_that_is_killed_fifty_times(server: PackServer, source: Path, tmp_path: Path) -> None:
    out, log, random_ = tmp_path / "model.edge", tmp_path / "log", random.Random(7)
    server.pack(source, tmp_path / "whole.edge", slab_bytes=SMALL)
    killed = resumed = 0
    seconds = 0.1  # that a pack takes, as it turns out
    while killed < 50:
        pid = server.start(source, out, log=log, slab_bytes=SMALL)
        time.sleep(random_.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        in_time = server.wait(pid) == -signal.SIGKILL
        seconds *= 1.02 if in_time else 0.9
        killed += in_time
        resumed += any(line.get("stage", "").startswith("going on") for line in lines(log))
        if out.exists():
            assert verify(out, silent) == []
            shutil.rmtree(out)
        log.unlink(missing_ok=True)
    assert resumed >= 3, (resumed, seconds)
    assert "error" not in server.pack(source, out)
    assert content(out) == content(tmp_path / "whole.edge") and set(content(out)) == set(FILES)
    assert sorted(path.name for path in tmp_path.iterdir() if "model" in path.name) == [
        "model.edge",
        "model.edge.log",
        "model.gguf",
    ]


def test_a_stopped_pack_goes_on_where_it_was(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(bundle_writer, "SLAB_BYTES", SMALL)
    monkeypatch.setattr(bundle_writer, "_SYNC_BYTES", SMALL)
    monkeypatch.setattr("edgert.pack_meter._REPORT_S", 0.0)
    whole = pack_model(source, tmp_path / "whole.edge", progress=silent)

    def stop(stage: str, fraction: float) -> None:
        if fraction > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "model.edge", progress=stop)
    assert not (tmp_path / "model.edge").exists()
    again = pack_model(source, tmp_path / "model.edge", progress=silent)
    assert again.resumed > 0 and again.written + again.resumed == whole.written
    assert content(again.path) == content(whole.path)


@pytest.mark.parametrize("damage", ["cut", "flip", "shorter hot.bin"])
def test_a_damaged_journal_is_not_believed(source: Path, tmp_path: Path, monkeypatch: Any, damage: str) -> None:
    test_a_stopped_pack_goes_on_where_it_was(source, tmp_path, monkeypatch)
    out, part = tmp_path / "model.edge", tmp_path / "model.edge.part"
    expected = content(out)
    shutil.rmtree(out)
    with pytest.raises(KeyboardInterrupt):
        pack(source, out, progress=_stop_at(0.6))
    journal = bytearray((part / "journal").read_bytes())
    if damage == "cut":
        (part / "journal").write_bytes(journal[:-3])
    elif damage == "flip":
        journal[len(journal) // 2] ^= 4
        (part / "journal").write_bytes(journal)
    else:
        os.truncate(part / "hot.bin", 100)
    pack(source, out, progress=silent)
    assert content(out) == expected


def _stop_at(limit: float) -> Any:
    def stop(stage: str, fraction: float) -> None:
        if fraction > limit:
            raise KeyboardInterrupt

    return stop


def test_two_processes_pack_the_same_model(server: PackServer, source: Path, tmp_path: Path) -> None:
    out, hold, logs = tmp_path / "model.edge", tmp_path / "hold", [tmp_path / "log1", tmp_path / "log2"]
    hold.touch()
    first = server.start(source, out, log=logs[0], hold=hold)
    wait_for(logs[0], "packing model.gguf")
    second = server.start(source, out, log=logs[1])
    wait_for(logs[1], "waiting: another process packs model.edge")
    hold.unlink()
    assert server.wait(first) == server.wait(second) == 0
    assert last(logs[0])["written"] > 0
    assert last(logs[1])["written"] == last(logs[1])["resumed"] == 0  # it found what the first one made
    assert verify(out, silent) == []


def test_a_waiting_process_goes_on_when_the_first_is_killed(server: PackServer, source: Path, tmp_path: Path) -> None:
    out, hold, logs = tmp_path / "model.edge", tmp_path / "hold", [tmp_path / "log1", tmp_path / "log2"]
    hold.touch()
    first = server.start(source, out, log=logs[0], hold=hold)
    wait_for(logs[0], "packing model.gguf")
    second = server.start(source, out, log=logs[1])
    wait_for(logs[1], "waiting")
    os.kill(first, signal.SIGKILL)
    assert server.wait(first) == -signal.SIGKILL and server.wait(second) == 0
    assert last(logs[1])["written"] > 0 and verify(out, silent) == []


def test_the_source_changes(source: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "model.edge", []
    before = content(pack(source, out, progress=silent))
    assert pack_model(source, out, progress=silent).written == 0
    shutil.copy(golden_path("olmoe-q4_0"), source)
    os.utime(source, (1, 1))
    packed = pack_model(source, out, progress=lambda stage, fraction: told.append(stage))
    assert packed.written > 0 and any("has changed since" in stage for stage in told)
    assert content(out) != before and verify(out, silent) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.edge", "model.gguf"]


def test_the_source_changes_while_it_is_packed(server: PackServer, source: Path, tmp_path: Path) -> None:
    out, hold, log = tmp_path / "model.edge", tmp_path / "hold", tmp_path / "log"
    hold.touch()
    pid = server.start(source, out, log=log, hold=hold, slab_bytes=SMALL)
    wait_for(log, "packing model.gguf")
    os.utime(source, (1, 1))
    hold.unlink()
    assert server.wait(pid) == 0
    assert last(log)["error"] == "ModelFileError" and "was changed while" in last(log)["message"]
    assert not out.exists() and not out.with_name("model.edge.part").exists()


# ---- the disk --------------------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 18 MiB, of which a pack keeps 16 free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=18m", "none", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can make a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_the_space_is_looked_at_first(small_disk: Path, source: Path) -> None:
    (small_disk / "other").write_bytes(bytes(4 << 20))
    with pytest.raises(StorageError, match="takes 17 MiB more, but only 13 MiB are free; free 3 MiB"):
        pack(source, small_disk / "model.edge", progress=silent)
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_the_disk_fills_up(server: PackServer, small_disk: Path, source: Path, tmp_path: Path) -> None:
    out, hold, log = small_disk / "model.edge", tmp_path / "hold", tmp_path / "log"
    hold.touch()
    pid = server.start(source, out, log=log, hold=hold, slab_bytes=SMALL)
    wait_for(log, "packing model.gguf")
    with pytest.raises(OSError), (small_disk / "other").open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    hold.unlink()
    assert server.wait(pid) == 0
    assert last(log)["error"] == "StorageError" and "the disk is full" in last(log)["message"]
    assert not out.exists()
    (small_disk / "other").unlink()
    assert server.pack(source, out)["written"] > 0
    assert verify(out, silent) == []


def test_a_limit_on_files_is_a_full_disk(server: PackServer, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.edge"
    told = server.pack(source, out, largest_file=64 << 10, slab_bytes=SMALL)
    assert told["error"] == "StorageError" and "the disk is full (File too large)" in told["message"], told
    assert "goes on where it broke off, or remove" in told["message"]
    assert not out.exists() and out.with_name("model.edge.part").exists()
    assert server.pack(source, out)["resumed"] > 0
    assert verify(out, silent) == []


def test_a_read_only_folder(small_disk: Path, source: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match=r"cannot be written \(Read-only file system\); name a bundle elsewhere"):
        pack(source, small_disk / "model.edge", progress=silent)


def test_a_folder_that_is_not_there(source: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no folder .*nowhere; make it first"):
        pack(source, tmp_path / "nowhere" / "model.edge", progress=silent)


def test_through_the_page_cache(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Where a file system has no direct access."""
    expected = content(pack(source, tmp_path / "direct.edge", progress=silent))
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    monkeypatch.setattr(bundle_writer, "_open", lambda path: (os.open(path, flags, 0o644), False))
    monkeypatch.setattr(bundle_writer, "SLAB_BYTES", SMALL)
    assert content(pack(source, tmp_path / "cached.edge", progress=silent)) == expected


# ---- what is packed, and where ---------------------------------------------------------------------------------------
def test_memory_does_not_grow_with_the_model(server: PackServer, tmp_path: Path) -> None:
    """A tensor of 160 MiB, as embedding table and as head, with 96 MiB: the first uses of kernels are in them."""
    path = tmp_path / "large.gguf"
    tensors = {"token_embd.weight": (20480, 4096), "output_norm.weight": (4096,)}
    shapes = {"attn_q": (64, 4096), "attn_k": (64, 4096), "attn_v": (64, 4096), "attn_output": (4096, 64)}
    shapes |= {"ffn_gate": (32, 4096), "ffn_up": (32, 4096), "ffn_down": (4096, 32)}
    tensors |= {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {f"blk.0.{name}.weight": (4096,) for name in ("attn_norm", "ffn_norm")}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(4096)
    writer.add_head_count(1)
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_feed_forward_length(32)
    writer.add_context_length(64)
    writer.add_vocab_size(20480)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, shape in tensors.items():
        kind = np.float16 if len(shape) == 2 else np.float32
        writer.add_tensor(name, np.zeros(shape, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    told = server.pack(path, tmp_path / "large.edge")
    assert told["written"] > 320 << 20, told
    assert told["grown"] < 96 << 20
    with Bundle.open(tmp_path / "large.edge") as bundle:  # and of a dense model
        weights = Weights(bundle, read_config(bundle.metadata, str(bundle.path)))
        assert bundle.record_bytes.shape == (1, 0) and bundle.experts_path.stat().st_size == 0
        assert weights.shapes["output.weight"] == weights.shapes["token_embd.weight"] == (20480, 4096)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup of 96 MiB, of version 1 or 2."""
    root = Path("/sys/fs/cgroup")
    version = 1 if (root / "memory").is_dir() else 2
    group = (root / "memory" if version == 1 else root) / f"edgert-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version == 1 else "memory.max")).write_text(str(96 << 20))
    except OSError as error:
        pytest.skip(f"memory cgroups cannot be made here: {error}")
    yield group
    group.rmdir()


def test_a_limit_that_counts_the_page_cache_is_never_hit(server: PackServer, cgroup: Path, tmp_path: Path) -> None:
    """Neither what is read nor what is written piles up: 123 MiB go in, 153 MiB come out."""
    told = server.pack(resolve(None), tmp_path / "demo.edge", cgroup=cgroup)
    assert told["written"] > 150 << 20, told
    if (cgroup / "memory.failcnt").exists():
        assert (cgroup / "memory.failcnt").read_text() == "0\n"
    else:
        assert "max 0" in (cgroup / "memory.events").read_text().splitlines()


def test_what_is_in_the_way_stays(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "papers"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(OptionError, match=r"papers exists and is no bundle, it holds thesis.txt"):
        pack(source, other, progress=silent)
    with pytest.raises(OptionError, match="exists and is no bundle"):
        pack(source, source, progress=silent)
    out = pack(source, tmp_path / "model.edge", progress=silent)
    with pytest.raises(OptionError, match=r"was packed from .*model.gguf: remove it, or name another"):
        pack(golden_path("llama-q4_0"), out, progress=silent)
    with pytest.raises(OptionError, match="is a bundle already"):
        pack(out, progress=silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.edge", "model.gguf", "papers"]


def test_a_model_that_is_not_supported_leaves_nothing(source: Path, tmp_path: Path) -> None:
    raw = source.read_bytes()
    source.write_bytes(raw.replace(b"blk.0.attn_norm", b"blk.0.attn_morn", 1))
    with pytest.raises(ModelFileError, match=r"attn_norm\.weight is missing"):
        pack(source, progress=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_weights_that_are_not_finite(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(bundle_writer, "SLAB_BYTES", SMALL)
    monkeypatch.setattr(bundle_writer, "_SYNC_BYTES", SMALL)
    with GgufFile.open(source) as file:
        info = file.tensors["blk.1.ffn_down_exps.weight"]
    raw = bytearray(source.read_bytes())
    raw[info.offset + info.n_bytes - 34 : info.offset + info.n_bytes - 32] = b"\x00\x7c"  # the last scale
    source.write_bytes(raw)
    with pytest.raises(
        ModelFileError, match=r"ffn_down_exps\.weight, expert 5, row 63, holds a weight that is infinite"
    ):
        pack(source, progress=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_split_model(tmp_path: Path) -> None:
    """It is one model: in the bundle, and when one of its parts changes."""
    with GgufFile.open(golden_path(MODEL)) as file:
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "olmoe", split_max_tensors=10)
        for key, value in file.metadata.items():
            if key != "general.architecture":
                _add_key(writer, key, value)
        for name, info in file.tensors.items():
            shape = (*info.shape[:-1], info.row_bytes)
            writer.add_tensor(name, file.read(name).reshape(shape), raw_dtype=info.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    first, *others = sorted(tmp_path.glob("*.gguf"))
    whole = pack(golden_path(MODEL), tmp_path / "whole.edge", progress=silent)
    split = pack(first, progress=silent)
    assert split == tmp_path / "model.edge" and others
    for name in ("hot.bin", "experts.bin"):
        assert (split / name).read_bytes() == (whole / name).read_bytes()
    assert is_current(split, first)
    os.utime(others[-1], (1, 1))
    assert not is_current(split, first)
    assert pack_model(first, progress=silent).written > 0


def _add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, (list, np.ndarray)):
        writer.add_array(key, list(value) if isinstance(value, list) else value.tolist())
    else:
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[type(value)](key, value)


def test_the_same_bytes_without_the_compiler(source: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from edgert.pack import pack\n"
    code += "pack(Path(sys.argv[1]), Path(sys.argv[2]), progress=lambda stage, fraction: None)"
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "slow.edge")]
    subprocess.run(command, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, check=True)
    assert content(tmp_path / "slow.edge") == content(pack(source, progress=silent))


def test_default_names(tmp_path: Path) -> None:
    for name, expected in (
        ("model.gguf", "model.edge"),
        ("model-00001-of-00003.gguf", "model.edge"),
        ("blob", "blob.edge"),
        (".gguf", ".gguf.edge"),
    ):
        assert default_out(tmp_path / name) == tmp_path / expected


def test_a_folder_that_another_process_publishes_before_it_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, raced = os.open, list[Any]()

    def racing(path: Any, *arguments: Any, **options: Any) -> int:
        if not raced:
            raced.append(path)
            os.rename(path, tmp_path / "m.edge")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", racing)
    with Place(tmp_path / "m.edge", lambda: None) as place:
        assert place.is_mine and raced == [place.path]
