"""`edgert doctor`: findings with reasons on machines of all kinds, the table, and settings that later loads find."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from boards import link, orin_nano, write
from models import golden_path

from edgert import doctor, doctor_memory, jetson
from edgert.cache import cache_folder
from edgert.cli import doctor as command
from edgert.cli import main
from edgert.errors import ModelFileError
from edgert.pack import pack
from edgert.storage import flash_probe
from edgert.storage.flash_class import class_of
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
    assert [*dict.fromkeys(finding.area for finding in found)] == [
        "processor",
        "memory",
        "board",
        "software",
        "devices",
        "cache",
    ]
    assert all(finding.value and finding.reason for finding in found)


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


# ---- boards ----------------------------------------------------------------------------------------------------------
def test_a_jetson_in_a_slow_mode_that_is_hot_and_throttled(tmp_path: Path) -> None:
    orin_nano(tmp_path, celsius=92, mode=0)
    write(tmp_path / "sys/class/thermal/cooling_device1", cur_state=1)
    write(tmp_path / "sys/class/hwmon/hwmon3", oc3_event_cnt=27)
    write(tmp_path / "sys/devices/system/cpu", online="0-3", offline="4-5")
    write(tmp_path / "sys/devices/system/cpu/cpu0/cpufreq", scaling_max_freq=1190400)
    found = {finding.name: finding for finding in doctor.findings(tmp_path)}
    assert found["Jetson Linux"].value == "36.4.3 (JetPack 6)" and not found["Jetson Linux"].remedy
    assert (
        found["power mode"].value == "15W (mode 0)" and "sudo nvpmodel -m 2 (MAXN_SUPER)" in found["power mode"].remedy
    )
    assert found["jetson-stats"].value == "not installed here"
    assert found["processors offline"].value == "4-5" and found["clock limit"].value == "1.19 GHz"
    assert found["temperature"].value == "92 °C" and "--power cool" in found["temperature"].remedy
    assert found["throttled now"].value == "cpu-throttle-alert" and "27 over-current" in found["throttled now"].reason
    assert found["energy"].value == "7.3 W" and "VDD_IN" in found["energy"].reason
    assert all(finding.reason for finding in found.values())


def test_a_jetson_as_it_should_be(tmp_path: Path) -> None:
    orin_nano(tmp_path, mode=2)
    found = [finding for finding in doctor.findings(tmp_path) if finding.area == "board"]
    assert [finding.name for finding in found] == [
        "Jetson Linux",
        "power mode",
        "jetson-stats",
        "clock governor",
        "temperature",
        "throttled now",
        "energy",
    ]
    assert all(finding.level == "ok" for finding in found)


def test_what_nvpmodel_chooses_by_itself_and_other_boards(tmp_path: Path) -> None:
    orin_nano(tmp_path)
    (tmp_path / "var/lib/nvpmodel/status").unlink()
    mode = jetson.power_mode(tmp_path)
    assert mode is not None and (mode.number, mode.name, mode.fastest) == (1, "25W", 2)
    conf = "\n".join(f"< POWER_MODEL ID={i} NAME={n} >" for i, n in enumerate(("MODE_10W", "MODE_30W_ALL", "MODE_15W")))
    (tmp_path / "etc/nvpmodel.conf").write_text(conf)
    write(tmp_path, var__lib__nvpmodel__status="pmode:0002 fmode:quiet")
    mode = jetson.power_mode(tmp_path)
    assert mode is not None and (mode.name, mode.fastest) == ("MODE_15W", 1)
    write(tmp_path, etc__nv_tegra_release="# R32 (release), REVISION: 7.1, GCID: 1, BOARD: t186ref, EABI: aarch64")
    old = next(finding for finding in doctor.findings(tmp_path) if finding.name == "Jetson Linux")
    assert old.value == "32.7.1 (JetPack 4)" and "JetPack 6" in old.remedy
    (tmp_path / "etc/nvpmodel.conf").unlink()
    unknown = next(finding for finding in doctor.findings(tmp_path) if finding.name == "power mode")
    assert unknown.value == "mode 2" and "not told" in unknown.reason
    assert jetson.power_mode(tmp_path / "none") is None and jetson.release(tmp_path / "none") == ""


JTOP = """
class JtopException(Exception): pass
class jtop:
    jetson_clocks = {clocks}
    def __enter__(self):
        {entering}
        return self
    def __exit__(self, *_): return False
    def ok(self): return True
"""


@pytest.mark.parametrize(
    ("clocks", "entering", "words"),
    [
        ("True", "pass", "at their most"),
        ("False", "pass", "jetson_clocks is off"),
        ("None", "raise JtopException('the service is not active')", "the service is not active"),
        ("None", "raise FileNotFoundError(2, 'no such file')", "no such file"),
    ],
)
def test_jetson_stats_where_it_is_installed(
    clocks: str, entering: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package with the face of jetson-stats, for its own runs on a Jetson alone."""
    (tmp_path / "jtop.py").write_text(JTOP.format(clocks=clocks, entering=entering))
    write(
        tmp_path / "jetson_stats-4.3.2.dist-info", METADATA="Metadata-Version: 2.1\nName: jetson-stats\nVersion: 4.3.2"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "jtop", raising=False)
    orin_nano(tmp_path / "board")
    found = next(finding for finding in doctor.findings(tmp_path / "board") if finding.name == "jetson-stats")
    monkeypatch.delitem(sys.modules, "jtop", raising=False)
    assert found.value == "4.3.2" and words in found.reason and bool(found.remedy) == ("raise" in entering)


# ---- memory, cache, drive --------------------------------------------------------------------------------------------
def test_swap_of_both_kinds_and_a_limit(tmp_path: Path) -> None:
    swaps = (
        "Filename Type Size Used Priority\n/dev/zram0 partition 1048576 524288 5\n/dev/nvme0n1p3 partition 8388608 0 -2"
    )
    found = machine(
        tmp_path,
        proc__swaps=swaps,
        proc__self__cgroup="0::/app",
        **{"sys/fs/cgroup/app/memory.max": str(2 << 30), "sys/fs/cgroup/app/memory.current": str(1 << 30)},
    )
    assert found["zram"].value == "1.00 GiB" and "in place of experts" in found["zram"].reason
    assert found["zram"].remedy == "close other programs" and not found["swap"].remedy
    assert found["swap"].value == "8.00 GiB" and found["cgroup limit"].value == "2.00 GiB"
    (tmp_path / "proc/swaps").write_text("Filename Type Size Used Priority")
    assert machine(tmp_path)["swap"].value == "none"


def test_a_machine_without_room_is_a_problem() -> None:
    little = doctor_memory._available(100 << 20, 4 << 30)
    assert little.stops and little.level == "problem" and "320 MiB" in little.reason
    assert doctor_memory._available(2 << 30, 4 << 30).reason.startswith("a cgroup")


def test_damaged_and_unfinished_models_in_the_cache(bundle: Path) -> None:
    folder = cache_folder()
    (folder / "broken.edge").mkdir(parents=True)
    (folder / "half.edge.part").mkdir()
    found = {finding.name: finding for finding in doctor.findings() if finding.area == "cache"}
    assert found["damaged"].value == "broken" and found["damaged"].remedy == "edgert cache remove broken"
    assert "goes on when" in found["unfinished"].reason and found["packed models"].value.startswith("2, ")


DRIVES = {
    "sys/devices/pci0/nvme/nvme0/nvme0n1/nvme0n1p1": ("NVMe", {"../device/model": "Samsung 990"}),
    "sys/devices/platform/mmc/mmcblk0/mmcblk0p1": ("microSD", {"../device/type": "SD", "../device/name": "SN64G"}),
    "sys/devices/platform/mmc/mmcblk1": ("eMMC", {"device/type": "MMC"}),
    "sys/devices/pci0/usb2/2-1/host1/sda/sda1": ("USB drive", {"../device/model": "Extreme"}),
    "sys/devices/pci0/ata1/host2/sdb": ("hard disk", {"queue/rotational": "1"}),
    "sys/devices/pci0/ata1/host2/sdc": ("SATA SSD", {"queue/rotational": "0"}),
    "sys/devices/platform/ufshcd/host0/sdd": ("UFS", {}),
    "sys/devices/pci0/virtio1/vda": ("virtual disk", {}),
    "sys/devices/other": ("", {}),
}


@pytest.mark.parametrize("place", DRIVES)
def test_drives_of_all_kinds(place: str, tmp_path: Path) -> None:
    kind, files = DRIVES[place]
    folder = tmp_path / place
    folder.mkdir(parents=True)
    if folder.name.endswith("p1") or folder.name == "sda1":
        write(folder, partition=1)
    for name, content in files.items():
        write(Path(os.path.normpath(folder / name)).parent, **{Path(name).name: content})
    link(tmp_path, "sys/dev/block/8:1", place)
    found = class_of(tmp_path / "sys/dev/block/8:1")
    assert found.kind == kind and found.slow == (kind in ("microSD", "eMMC", "USB drive", "hard disk"))
    mapped = tmp_path / "sys/devices/virtual/block/dm-0"
    (mapped / "slaves").mkdir(parents=True)
    link(tmp_path, f"sys/devices/virtual/block/dm-0/slaves/{folder.name}", place)
    assert class_of(mapped) == found


def test_a_drive_whose_link_could_be_faster(tmp_path: Path) -> None:
    drive = tmp_path / "sys/devices/pci0/nvme0n1"
    write(drive / "device/device", current_link_speed="5.0 GT/s PCIe", current_link_width=1)
    write(drive / "device/device", max_link_speed="16.0 GT/s PCIe", max_link_width=4)
    found = class_of(drive)
    assert (found.link, found.possible_link) == ("5.0 GT/s x1", "16.0 GT/s x4")


def test_a_model_is_measured_at_its_record_size_and_later_loads_find_it() -> None:
    report = doctor.examine(DEMO, seconds=0.01)
    assert report.flash.path == DEMO and report.flash.record_bytes == -(-DEMO_RECORD // 4096) * 4096
    assert report.kept_in == str(settings_path())
    found = flash_settings(DEMO, DEMO_RECORD)
    assert found == report.settings == flash_settings(DEMO.parent / "other.edge") and found.measured
    names = [finding.name for finding in report.findings if finding.area == "flash"]
    assert names == ["drive", "file system", "direct reads"]
    assert "for each expert that is missing" in next(one.reason for one in report.findings if one.name == "drive")
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


def test_the_command_ends_with_1_where_something_keeps_models_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder can be here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert run(monkeypatch, str(DEMO), "--json") == 1
    document = json.loads(capfd.readouterr().out)
    assert not document["healthy"] and document["kept_in"].startswith("not kept")
    assert [one["name"] for one in document["findings"] if one["level"] == "problem"] == ["writable"]


def test_sizes_and_times_for_people() -> None:
    assert [command._chunk(size) for size in (128 << 10, 4 << 20)] == ["128 KiB", "4 MiB"]
    assert [command._duration(seconds) for seconds in (0.0023, 8.9e-5)] == ["2.3 ms", "89 µs"]
