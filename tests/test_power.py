"""Energy, heat and throttling read from trees laid out as boards have them; threads that a hot board loses."""

from __future__ import annotations

import json
import os
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from boards import ina3221, orin_nano, rapl, write
from hypothesis import given
from hypothesis import strategies as st
from models import golden_path
from typer.testing import CliRunner

import edgert
from edgert import cooling, sysfs, thermal, vitals
from edgert.cli.app import app
from edgert.cooling import HeatPolicy, thread_counts
from edgert.errors import OptionError
from edgert.power import Counter, Meter, power_source
from edgert.quant.jit import JIT_ENABLED
from edgert.vitals import Vitals, Watch

compiled = pytest.mark.skipif(not JIT_ENABLED, reason="nothing is compiled: no threads to take away")


# ---- energy ----------------------------------------------------------------------------------------------------------
def test_a_jetsons_module_rail_is_the_whole(tmp_path: Path) -> None:
    orin_nano(tmp_path)
    source = power_source(tmp_path)
    assert [rail.name for rail in source.rails] == ["VDD_IN"] and source.covers == "VDD_IN: the module"
    assert source.watts() == pytest.approx(4.960 * 1.480, rel=1e-6)


def test_rails_are_added_where_none_is_the_whole_and_none_twice(tmp_path: Path) -> None:
    """An AGX Orin: memory's rail is fed from VIN_SYS_5V0, and the channels called NC are not connected."""
    ina3221(tmp_path, "1-0040", {"VDD_GPU_SOC": (1000, 3000), "VDD_CPU_CV": (1000, 2000), "VIN_SYS_5V0": (5000, 1000)})
    ina3221(tmp_path, "1-0041", {"NC": (0, 0), "VDDQ_VDD2_1V8AO": (1800, 341)})
    source = power_source(tmp_path)
    assert [rail.name for rail in source.rails] == ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"]
    assert source.watts() == pytest.approx(10.0) and "less than the whole board" in source.covers


def test_the_older_kernels_names_and_the_sensor_of_a_thor(tmp_path: Path) -> None:
    folder = "sys/bus/i2c/drivers/ina3221x/7-0040/iio:device0"
    write(tmp_path / folder, rail_name_0="VDD_IN", in_power0_input=5200, rail_name_1="VDD_SOC", in_power1_input=900)
    assert power_source(tmp_path).watts() == pytest.approx(5.2)
    write(tmp_path / "sys/bus/i2c/drivers/ina238/2-0044/hwmon/hwmon5", name="ina238", power1_input=31_500_000)
    thor = power_source(tmp_path)
    assert thor.watts() == pytest.approx(31.5) and thor.covers.startswith("VIN: the board")


def test_rapl_counts_packages_and_memory_or_the_platform_alone(tmp_path: Path) -> None:
    rapl(tmp_path / "a", package_0=10, core=5, dram=3)
    assert [one.name for one in power_source(tmp_path / "a").counters] == ["package-0", "dram"]
    assert power_source(tmp_path / "a").covers == "RAPL, package-0 + dram: processor and memory alone"
    rapl(tmp_path / "b", package_0=10, psys=3)
    assert [one.name for one in power_source(tmp_path / "b").counters] == ["psys"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_counters_for_root_alone_are_said_to_be_so(tmp_path: Path) -> None:
    for file in rapl(tmp_path, package_0=10).values():
        file.chmod(0)
    assert "sudo chmod a+r" in power_source(tmp_path).problem


def test_counters_that_do_not_answer_are_no_source(tmp_path: Path) -> None:
    rapl(tmp_path, package_0=10)["package_0"].write_text("")
    source = power_source(tmp_path)
    assert not source.tells and "root alone" in source.problem and source.watts() is None
    assert "neither INA nor RAPL" in power_source(tmp_path / "nothing").problem


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_counter_that_began_again_is_added_up(before: int, used: int) -> None:
    most = 10**6
    counter = Counter("package-0", Path(), most)
    after = (before + used) % (most + 1) if used <= most else 0
    assert counter.joules(before, after) == pytest.approx(used / 1e6, abs=2e-6)


def test_the_meter_adds_up_what_changes_meanwhile(tmp_path: Path) -> None:
    hwmon = ina3221(tmp_path, "1-0040", {"VDD_IN": (5000, 1000)})  # 5 W
    meter = Meter(power_source(tmp_path))
    meter.start()
    began = time.perf_counter()
    time.sleep(0.25)
    write(hwmon, curr1_input=3000)  # 15 W
    middle = time.perf_counter()
    time.sleep(0.35)
    watts, ended = meter.stop(), time.perf_counter()
    exact = (5 * (middle - began) + 15 * (ended - middle)) / (ended - began)
    assert watts == pytest.approx(exact, abs=2.5)  # a tenth of a second between two readings
    package = rapl(tmp_path / "x86", package_0=7_000_000)["package_0"]
    counting = Meter(power_source(tmp_path / "x86"))
    counting.start()
    began = time.perf_counter()
    package.write_text("9500000\n")
    time.sleep(0.2)
    watts = counting.stop()
    assert watts is not None and watts * (time.perf_counter() - began) == pytest.approx(2.5, rel=0.2)
    (hwmon / "curr1_input").unlink()
    meter.start()
    assert meter.stop() is None


# ---- heat ------------------------------------------------------------------------------------------------------------
def test_zones_of_a_jetson_by_how_near_they_are(tmp_path: Path) -> None:
    orin_nano(tmp_path, celsius=60)
    found = thermal.zones(tmp_path)
    assert [zone.name for zone in found] == ["tj-thermal", "cpu-thermal", "gpu-thermal"]
    assert found[0] == ("tj-thermal", 60.5, 99.0, True) and found[0].margin == 38.5


def test_zones_elsewhere_have_the_usual_limit_and_strangers_are_left_out(tmp_path: Path) -> None:
    zones = tmp_path / "sys/class/thermal"
    write(zones / "thermal_zone0", type="cpu-thermal", temp=71000, trip_point_0_type="critical")
    write(zones / "thermal_zone0", trip_point_0_temp=110000, trip_point_1_type="passive", trip_point_1_temp=0)
    write(zones / "thermal_zone1", type="iwlwifi_1", temp=95000)
    write(zones / "thermal_zone2", type="acpitz", temp="nonsense")
    write(zones / "thermal_zone3", type="x86_pkg_temp", temp=70000)
    assert thermal.zones(tmp_path) == [
        ("cpu-thermal", 71.0, thermal.USUAL_LIMIT, False),
        ("x86_pkg_temp", 70.0, thermal.PC_LIMIT, False),
    ]


def test_throttling_between_two_moments(tmp_path: Path) -> None:
    orin_nano(tmp_path)
    before = thermal.signs(tmp_path)
    assert thermal.throttled(before, thermal.signs(tmp_path)) == ()
    write(tmp_path / "sys/class/thermal/cooling_device0", cur_state=3)  # the fan may turn
    assert thermal.throttled(before, thermal.signs(tmp_path)) == ()
    write(tmp_path / "sys/class/thermal/cooling_device1", cur_state=1)
    write(tmp_path / "sys/class/hwmon/hwmon3", oc3_event_cnt=7)
    write(tmp_path / "sys/devices/system/cpu/cpufreq/policy0", scaling_max_freq=1190400)
    assert thermal.throttled(before, thermal.signs(tmp_path)) == (
        "cpu-throttle-alert",
        "7 over-current events",
        "the clock was capped at 1.19 GHz, 1.73 before",
    )


def test_throttling_of_a_pc_and_of_a_raspberry_pi(tmp_path: Path) -> None:
    before = thermal.signs(tmp_path)
    write(tmp_path / "sys/devices/system/cpu/cpu3/thermal_throttle", core_throttle_count=2, package_throttle_count=1)
    assert thermal.throttled(before, thermal.signs(tmp_path)) == ("3 thermal events of the processor",)
    write(tmp_path / "sys/devices/system/cpu/cpu2/thermal_throttle", core_throttle_count=1, package_throttle_count=1)
    assert thermal.throttled(before, thermal.signs(tmp_path)) == ("4 thermal events of the processor",)
    pi = tmp_path / "pi"
    write(pi / "sys/devices/platform/soc/soc:firmware", get_throttled="50005")
    write(pi / "sys/class/hwmon/hwmon2", name="rpi_volt", in0_lcrit_alarm=1)
    assert thermal.signs(pi).now == {"too low a voltage", "throttled"}


def test_events_of_a_package_and_of_a_core_count_once_however_many_cpus_tell_them(tmp_path: Path) -> None:
    packages, cores = (5, 7), ((1, 0), (0, 3))  # two packages of two cores of two CPUs each
    for cpu in range(8):
        package, core = cpu // 4, cpu // 2 % 2
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}"
        write(folder / "topology", physical_package_id=package, die_id=0, core_id=core)
        counts = {"core_throttle_count": cores[package][core], "package_throttle_count": packages[package]}
        write(folder / "thermal_throttle", **counts, core_throttle_total_time_ms=90)
    assert thermal.signs(tmp_path).counts == {"thermal events of the processor": 5 + 7 + 1 + 3}


def test_what_a_run_took_and_what_it_did_to_the_board(tmp_path: Path) -> None:
    orin_nano(tmp_path, celsius=98)
    package = tmp_path / "sys/class/hwmon/hwmon3/oc2_event_cnt"

    def run() -> str:
        time.sleep(0.2)
        package.write_text("1\n")
        return "made"

    made, seen = Watch(tmp_path).over(run)
    assert made == "made" and seen.celsius == 98.5 and seen.throttled == ("1 over-current events",)
    assert seen.watts == pytest.approx(4.960 * 1.480)
    found = vitals.as_json([seen, Vitals(5.0, 70.0)], 32, [0.2, 0.4])
    assert found["tokens_per_joule"] == pytest.approx(64 / (4.960 * 1.480 * 0.2 + 5.0 * 0.4))
    assert found["watts"] == pytest.approx((4.960 * 1.480 * 0.2 + 5.0 * 0.4) / 0.6)
    assert found["throttled_runs"] == 1 and found["celsius"] == 98.5
    assert vitals.as_json([seen, Vitals()], 32, [0.2, 0.2])["tokens_per_joule"] is None


# ---- fewer threads ---------------------------------------------------------------------------------------------------
def test_threads_go_step_by_step_and_come_back_when_it_is_calm() -> None:
    policy = HeatPolicy([8, 4, 2, 1])
    assert policy.decide(0, 40, False) == 8
    assert policy.decide(2, 2.9, False) == 4
    assert policy.decide(4, 1, False) == 4  # the last step shows later
    assert policy.decide(12, 1, False) == 2
    assert policy.decide(30, 5, False) == 2  # neither hot nor calm
    assert policy.decide(40, 11, False) == 2
    assert policy.decide(59, 11, False) == 2
    assert policy.decide(60, 11, False) == 4
    assert policy.decide(75, 11, True) == 2  # throttled, whatever the temperature
    assert policy.decide(80, 11, False) == 2
    assert policy.decide(101, 11, False) == 2  # it came back too soon: twice as long
    assert policy.decide(120, 11, False) == 4


@given(st.lists(st.tuples(st.floats(-20, 60), st.booleans()), min_size=1, max_size=300))
def test_threads_are_always_some_of_those_there_are(readings: list[tuple[float, bool]]) -> None:
    policy, last = HeatPolicy([6, 3, 1]), 6
    for second, (margin, slowed) in enumerate(readings):
        now = policy.decide(2.0 * second, margin, slowed)
        assert now in (6, 3, 1)
        if now < last:
            assert margin < HeatPolicy.NEAR or slowed
        last = now


@compiled
def test_a_hot_board_answers_the_same_with_fewer_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orin_nano(tmp_path)
    monkeypatch.setattr(sysfs, "ROOT", tmp_path)
    monkeypatch.setattr(cooling, "LOOK_S", 0.0)
    monkeypatch.setattr(HeatPolicy, "SETTLE_S", 0.0)
    prompt, used = "Once upon a time there was a fox who", []
    with edgert.load(context=256, threads=3) as model:
        expected = model.generate(prompt, max_tokens=24)
    with edgert.load(context=256, threads=3, power="cool") as model:
        assert model.generate(prompt, max_tokens=2).usage.power == ""
        with model.held() as parts:
            device = parts.engine.device
        for _ in (stream := model.generate(prompt, max_tokens=24, stream=True)):
            used.append(device.pool.n_threads)
            write(tmp_path / "sys/class/thermal/thermal_zone2", temp=97500)
        answer = stream.completion
        assert answer.token_ids == expected.token_ids and answer.text == expected.text
        assert used[0] == 3 and used[-1] == 1
        assert answer.usage.power == "1 of 3 threads: tj-thermal 98 °C, limit 99 °C"
    assert parts.cooler is not None
    assert not any(pool._threads for pool in parts.cooler._pools.values())  # all were ended


@compiled
@pytest.mark.parametrize("n_threads", [2, 6, 7])
def test_logits_are_the_same_at_every_step_down(n_threads: int) -> None:
    """At a depth where one token's attention is split among threads by blocks."""
    with edgert.load(context=1024, threads=n_threads) as model, model.held() as parts:
        device = parts.engine.device
        counts, ids = thread_counts(device), list(range(100, 740))
        assert counts[0] == n_threads and counts[-1] == 1
        assert all(2 * after <= before for before, after in pairwise(counts))
        cooler, rows = cooling.Cooler(device), []
        assert sum(parts.engine.prefill(ids, parts.session)) == len(ids)
        for count in counts:
            cooler._use(count)
            del parts.session.tokens[len(ids) :]
            parts.engine.step([7], parts.session)
            rows.append(parts.engine.last_logits(1).copy())
        cooler.close()
    assert all(np.array_equal(rows[0], row) for row in rows)


def test_power_that_cannot_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="full, or cool"):
        edgert.load(power="low")
    monkeypatch.setattr(sysfs, "ROOT", tmp_path)
    with pytest.raises(OptionError, match="shows no temperature"):
        edgert.load(power="cool")
    orin_nano(tmp_path)
    with pytest.raises(OptionError, match="takes threads from device='cpu'"):
        edgert.load(power="cool", device="reference")


@compiled
def test_bench_says_energy_throttling_and_threads_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orin_nano(tmp_path, celsius=97)
    write(tmp_path / "sys/class/thermal/cooling_device1", cur_state=1)
    monkeypatch.setattr(sysfs, "ROOT", tmp_path)
    monkeypatch.setattr(cooling, "LOOK_S", 0.0)
    arguments = ["bench", str(golden_path("olmoe-q4_0")), "-p", "8", "-n", "8", "-r", "2", "--threads", "2"]
    found = CliRunner().invoke(app, [*arguments, "--power", "cool"])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout.splitlines()[-1])
    assert document["machine"]["power"] == "VDD_IN: the module" and document["settings"]["power"] == "cool"
    assert document["machine"]["threads"] == document["ceiling"]["threads"] == 2
    for test in document["tests"]:
        board = test["board"]
        assert board["watts"] == pytest.approx(4.960 * 1.480) and board["celsius"] == 97.5
        assert board["tokens_per_joule"] == pytest.approx(test["n_tokens"] * 2 / sum(board["runs_joules"]))
        assert board["throttled"] == ["cpu-throttle-alert"] and board["throttled_runs"] == 2
        assert board["capped"].startswith("1 of 2 threads: tj-thermal 98 °C")
    text = found.stdout
    assert "tokens a joule, 7" in text and "(VDD_IN: the module)" in text
    assert "the board slowed itself down in 2 of 2 runs at 98 °C: cpu-throttle-alert" in text
    assert "kept cool in the end with 1 of 2 threads" in text


def test_bench_on_a_board_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysfs, "ROOT", tmp_path)
    found = CliRunner().invoke(app, ["bench", str(golden_path("olmoe-q4_0")), "-p", "", "-n", "4", "-r", "1"])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout.splitlines()[-1])
    board = document["tests"][0]["board"]
    assert board["tokens_per_joule"] is board["watts"] is board["celsius"] is None and board["throttled"] == []
    assert "joule" not in "".join(found.stdout.splitlines()[:-1]) and document["machine"]["power"] is None
