"""tools/prefetch_curve.py and tools/ttft.py on a tiny model, and the drive that a cgroup makes slow; no speeds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import golden_path

from edgert.pack import pack

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
import prefetch_curve  # noqa: E402   # found through the line above
import slow_flash  # noqa: E402
import ttft  # noqa: E402
from cage import CageError  # noqa: E402


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(golden_path("olmoe-q4_0"), tmp_path_factory.mktemp("model") / "m.edge", progress=lambda *_: None)


def call(capsys: Any, monkeypatch: pytest.MonkeyPatch, tool: Any, *arguments: object) -> dict[str, Any]:
    """The document of a tool that did what it should, whatever the speeds were."""
    monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
    code = tool.main()
    out, err = capsys.readouterr()
    assert code in (0, 1) and not err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def test_both_take_turns_with_the_same_tokens(capsys: Any, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    sizes = ["--residency", "40%", "--flash", "0", "--turns", "2", "--tokens", "12", "--warm", "4", "--threads", "1"]
    found = call(capsys, monkeypatch, prefetch_curve, bundle, *sizes)
    (pair,) = found["pairs"]
    assert len(pair["ratios"]) == 2 and pair["off"]["useful_bytes"] == pair["off"]["wasted_bytes"] == 0
    assert 0 < pair["off"]["hit_rate"] < 1 and 0 <= pair["enabled_share"] <= 1 and pair["word"]
    assert pair["off"]["flash_bytes_per_s"] > 0 and found["skipped"] == []
    assert found["replay"]["trace"]["tokens"] >= 4 + 2 * 12
    assert set(found["replay"]["policies"]) > {"belady", "lru"} and "router" in found["replay"]["predictors"]


def test_where_reads_cannot_be_limited_the_reason_is_told(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    def refuse(*_: object) -> None:
        raise CageError("no cgroups here")

    monkeypatch.setattr(prefetch_curve, "SlowFlash", refuse)
    sizes = ["--residency", "40%", "--flash", "30", "--turns", "1", "--tokens", "2", "--warm", "1", "--no-replay"]
    found = call(capsys, monkeypatch, prefetch_curve, bundle, *sizes)
    assert found["pairs"] == [] and found["skipped"] == ["0.4 at 30 MB/s: no cgroups here"]


def test_a_process_is_put_under_a_limit_that_goes_with_it(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(4096))
    try:
        slow = slow_flash.SlowFlash(file, 30_000_000)
    except CageError as problem:
        pytest.skip(str(problem))
    with slow:
        group = slow._group
        told = "".join(path.read_text() for name in ("io.max", slow_flash._V1_FILE) if (path := group / name).exists())
        assert slow_flash.device_of(file) in told and "30000000" in told
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
            slow.add(child.pid)
            assert str(child.pid) in (group / "cgroup.procs").read_text().split()
    assert not group.exists()


def test_a_file_on_no_drive_cannot_be_slow(tmp_path: Path) -> None:
    with pytest.raises(CageError, match="does not lie on a drive"):
        slow_flash.device_of(tmp_path, root=tmp_path)


def test_first_tokens_are_measured_beside_their_bars(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    try:
        ttft.cage.drop_page_cache()
    except CageError as problem:
        pytest.skip(str(problem))
    sizes = ["--prompt", "40", "--runs", "1", "--cold-prompt", "5", "--cold-runs", "1", "--residency", "40%"]
    found = call(capsys, monkeypatch, ttft, bundle, *sizes)
    long, cold = found["long"], found["cold"]
    assert long["bar_s"] == pytest.approx(1.25 * max(long["resident_ttft_s"], long["reading_s"]) + 0.5)
    assert long["reading_s"] == pytest.approx(long["other_bytes"] / long["flash_bytes_per_s"])
    assert cold["bar_s"] == pytest.approx((cold["hot_bytes"] + cold["expert_bytes"]) / cold["flash_bytes_per_s"] + 2)
    assert 0 < cold["of_which_prompt_s"] < cold["first_token_s"] and cold["expert_bytes"] > 0
