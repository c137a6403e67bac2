"""`edgert doctor`: findings with reasons on machines of all kinds, the table, and settings that later loads find."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from models import golden_path

from edgert import doctor
from edgert.cache import cache_folder
from edgert.cli import doctor as command
from edgert.cli import main
from edgert.errors import ModelFileError
from edgert.pack import pack
from edgert.storage import flash_probe
from edgert.storage.flash_settings import flash_settings, settings_path

DEMO = Path(doctor.__file__).parent / "demo" / "smollm2-moe-q4_0.gguf"
DEMO_RECORD = 3 * 576 * 64 // 32 * 18  # of the embedded model: three projections in Q4_0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle, packed with the kernels of the common cache."""
    folder = tmp_path_factory.mktemp("bundle")
    return pack(golden_path("olmoe-q4_0"), folder / "small.edge", progress=lambda stage, fraction: None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(flash_probe, "_ROUNDS", (1, 1))  # the real drive, each setting once


def machine(root: Path, **files: str) -> dict[str, doctor.Finding]:
    """Findings by name on a machine that has these files (path with __ for /)."""
    for name, content in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return {finding.name: finding for finding in doctor.findings(root)}


def test_findings_of_this_machine() -> None:
    found = list(doctor.findings())
    assert {finding.area for finding in found} == {"processor", "memory", "software"}
    assert all(finding.value for finding in found)


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    found = machine(tmp_path)
    assert found["pressure (PSI)"].value == "not in this kernel" and "page faults" in found["pressure (PSI)"].reason
    assert found["huge pages"].value == "not in this kernel" and not found["huge pages"].remedy
    assert "clock governor" not in found and "temperature" not in found


def test_what_is_in_the_way_comes_with_a_remedy(tmp_path: Path) -> None:
    found = machine(
        tmp_path,
        sys__kernel__mm__transparent_hugepage__enabled="always madvise [never]",
        sys__devices__system__cpu__cpu0__cpufreq__scaling_governor="powersave\n",
        sys__class__thermal__thermal_zone0__temp="45000\n",
        sys__class__thermal__thermal_zone1__temp="86500\n",
        proc__pressure__memory="some avg10=12.50 avg60=0.00 avg300=0.00 total=5\nfull avg10=1.00",
    )
    assert found["huge pages"].value == "never" and "echo madvise" in found["huge pages"].remedy
    assert found["clock governor"].value == "powersave" and found["clock governor"].remedy
    assert found["temperature"].value in ("86 °C", "87 °C") and found["temperature"].remedy
    assert found["pressure (PSI)"].value == "12.50 %" and found["pressure (PSI)"].remedy


def test_nothing_in_the_way(tmp_path: Path) -> None:
    found = machine(
        tmp_path,
        sys__kernel__mm__transparent_hugepage__enabled="always [madvise] never",
        sys__devices__system__cpu__cpu0__cpufreq__scaling_governor="powersave\n",
        sys__devices__system__cpu__cpu0__cpufreq__scaling_driver="intel_pstate\n",  # there it is the normal one
        sys__class__thermal__thermal_zone0__temp="nonsense",
        proc__pressure__memory="some avg10=0.00 avg60=0.00 avg300=0.00 total=5",
    )
    assert not any(finding.remedy for finding in found.values() if finding.name != "kernels")
    assert "temperature" not in found


def test_a_model_is_measured_at_its_record_size_and_later_loads_find_it() -> None:
    report = doctor.examine(DEMO, seconds=0.01)
    assert report.flash.path == DEMO and report.flash.record_bytes == -(-DEMO_RECORD // 4096) * 4096
    assert report.kept_in == str(settings_path())
    found = flash_settings(DEMO, DEMO_RECORD)
    assert found == report.settings == flash_settings(DEMO.parent / "other.edge") and found.measured
    names = [finding.name for finding in report.findings if finding.area == "flash"]
    assert names == ["file system", "direct reads"]
    again = doctor.examine(DEMO, seconds=0.01)
    assert [finding.name for finding in again.findings if finding.area == "flash"] == [*names, "measured before"]


def test_a_folder_without_a_large_file_is_measured_with_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "TEMPORARY_BYTES", 64 << 20)
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "small.txt").write_text("nothing to measure")
    report = doctor.examine(folder, seconds=0.01)
    assert report.flash.path.parent == folder and report.flash.record_bytes == doctor.RECORD_BYTES
    assert [file.name for file in folder.iterdir()] == ["small.txt"]


def test_a_folder_with_a_large_file_is_measured_with_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "RECORD_BYTES", 64 << 10)
    with doctor.measurable(DEMO.parent, lambda stage, fraction: None) as found:
        assert found == (DEMO, 64 << 10)


def test_a_bundle_is_measured_by_its_records(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LARGE", 1)
    with doctor.measurable(bundle, lambda stage, fraction: None) as (file, record_bytes):
        assert file == bundle / "experts.bin" and 0 < record_bytes < 1 << 20 and record_bytes % 4096 == 0


def test_without_a_path_the_packed_model_that_was_used_last_is_measured(bundle: Path) -> None:
    assert doctor._own_files() == doctor.existing(cache_folder())
    cache_folder().mkdir(parents=True)
    (cache_folder() / "broken.edge").mkdir()
    (cache_folder() / "small.edge").symlink_to(bundle)
    assert doctor._own_files() == cache_folder() / "small.edge"


def test_paths_that_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file or folder"):
        doctor.examine(tmp_path / "none")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match=r"broken\.gguf"):
        doctor.examine(tmp_path / "broken.gguf")


def test_settings_that_cannot_be_kept_are_no_reason_to_fail() -> None:
    settings_path().mkdir(parents=True)
    report = doctor.examine(DEMO, seconds=0.01)
    assert report.kept_in.startswith("not kept: ") and report.settings.measured


# ---- the command -----------------------------------------------------------------------------------------------------
def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["edgert", "doctor", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    return int(ended.value.code or 0)


def test_the_command_prints_findings_table_and_choice(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(DEMO)) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    for title in (
        "processor",
        "memory",
        "software",
        "flash",
        "GB/s by lanes and chunk size, random records of 64.0 KiB",
    ):
        assert title in lines
    assert any(line.split() == ["lanes", "128K"] for line in lines)
    assert sum(line.strip().partition(" ")[0].rstrip(",") in ("1", "2", "4", "8") for line in lines) >= 4
    assert any(line.startswith("chosen  ") and "GB/s" in line for line in lines)
    assert lines[-1] == f"kept in {settings_path()}"


def test_the_command_as_json(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, str(DEMO), "--json") == 0
    document = json.loads(capfd.readouterr().out)
    assert document["settings"]["lanes"] == flash_settings(DEMO).lanes and document["flash"]["file"] == str(DEMO)
    assert {"lanes", "chunk_bytes", "direct", "bytes_per_s", "turns"} == set(document["flash"]["measured"][0])


def test_the_command_for_a_path_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(tmp_path / "none")) == 2
    assert "no such file or folder" in capfd.readouterr().err


def test_sizes_and_times_for_people() -> None:
    assert [command._chunk(size) for size in (128 << 10, 4 << 20)] == ["128 KiB", "4 MiB"]
    assert [command._duration(seconds) for seconds in (0.0023, 8.9e-5)] == ["2.3 ms", "89 µs"]
