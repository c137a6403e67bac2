"""Deploying, without a board: what a board's answers mean, what is in the way, what is to be done and was planned."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_moe
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fabric", reason="fabric is not installed: pip install edgert[deploy]")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import deploy_report  # found through the line above
from deploy_board import (
    GIB,
    MIB,
    DeployError,
    Facts,
    Python,
    judge,
    judge_memory,
    judge_room,
    plain,
    probe_command,
    read_facts,
    read_power,
    usual_budget,
)
from deploy_bundle import find_bundle
from deploy_forecast import Forecast, compared, forecast
from deploy_steps import Action, State, Wanted, actions, room_needed, superfluous
from orin_nano import BOARD, ORIN


def problems(facts: Facts, **options: bool) -> dict[str, str]:
    return {one.name: one.line for one in judge(facts, **options) if one.refused}


# ---- the board -------------------------------------------------------------------------------------------------------
def test_an_orin_nano_is_read() -> None:
    assert (BOARD.l4t, BOARD.jetpack, BOARD.planned_as) == ("36.4.3", "6.2", "jetson-orin-nano")
    assert BOARD.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert BOARD.pythons == (Python((3, 10), "/usr/bin/python3"), Python((3, 12), "/usr/local/bin/python3.12"))
    assert BOARD.ram == 7802880 << 10 and BOARD.ram_free == 6229000 << 10
    assert BOARD.flash_free == 165000000 << 10 and BOARD.flash_device == "/dev/nvme0n1p1"
    assert (BOARD.glibc, BOARD.cores, BOARD.power, BOARD.uid) == ((2, 35), 6, "15W", 1000)
    assert BOARD.power_modes == ("15W", "25W", "MAXN_SUPER")
    assert BOARD.systemctl and BOARD.systemd and BOARD.session and not BOARD.sudo
    assert not problems(BOARD)


def test_this_machine_answers_the_same_questions() -> None:
    said = subprocess.run(probe_command("~/no/such folder"), capture_output=True, text=True)
    facts = read_facts(said.stdout)
    assert facts.system == "Linux" and facts.bits == 64 and facts.ram > facts.ram_free > 0
    assert facts.flash_free > 0 and facts.home and facts.user and said.stderr == ""


def test_silence_is_no_board() -> None:
    with pytest.raises(DeployError, match="did not answer as a Unix shell"):
        read_facts("This service allows sftp connections only.\n")


@given(st.text(max_size=60), st.sampled_from(sorted(ORIN.split("\n@@ ")[1:])))
def test_any_answer_is_read(answer: str, part: str) -> None:
    name = part.partition("\n")[0]
    said = ORIN.replace(f"@@ {part}", f"@@ {name}\n{answer.replace('@@', '')}\n")
    judge(read_facts(said))


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [
        ("36.4.4", "6.2.1"),
        ("36.4.0", "6.1"),
        ("36.2", "6"),
        ("35.6.0", "5"),
        ("38.2.1", "7.0"),
        ("32.7.1", "4"),
        ("", ""),
    ],
)
def test_releases_have_nvidias_names(l4t: str, jetpack: str) -> None:
    assert replace(BOARD, l4t=l4t).jetpack == jetpack


def test_power_modes_are_read_wherever_they_stand() -> None:
    modes = {"0": "15W", "2": "MAXN_SUPER"}
    assert read_power("NV Power Mode: MODE_30W\n3", {}) == "30W"
    assert read_power("pmode:0002", modes) == "MAXN_SUPER" and read_power("pmode:0001", modes) == "mode 1"
    assert read_power("", modes) == ""
    (slow,) = (one for one in judge(BOARD) if one.name == "power mode")
    assert "15W holds the clocks down" in slow.line and not slow.refused
    (fast,) = (one for one in judge(replace(BOARD, power="MAXN_SUPER")) if one.name == "power mode")
    assert not fast.problem


def test_what_is_in_the_way_is_said_with_its_remedy() -> None:
    old = replace(BOARD, l4t="35.5.0", pythons=(Python((3, 8), "/usr/bin/python3"),), glibc=(2, 27))
    found = problems(old)
    assert found["Python"] == (
        "Python 3.8, but edgert needs 3.10 or newer; JetPack 5 is too old: flash JetPack 6, or install python3.10 "
        "beside its own"
    )
    assert "glibc 2.27, but the wheels need 2.28" in found["glibc"]
    assert "--any-board" in problems(replace(BOARD, l4t=""))["system"]
    assert not problems(replace(BOARD, l4t=""), any_board=True)
    assert "no wheels for armv7l with 32 bits" in problems(replace(BOARD, machine="armv7l", bits=32))["processor"]
    assert "32 bits" in problems(replace(BOARD, bits=32))["processor"]  # a 64-bit kernel below
    assert {one.name for one in judge(BOARD, wanted=(3, 11)) if one.refused} == {"Python"}


def test_memory_that_a_board_lacks_is_refused_with_the_numbers() -> None:
    small = replace(BOARD, ram=4 * GIB, ram_free=3 * GIB)
    lacks = judge_memory(small, 4 * GIB, 5 * GIB, stated=False)
    assert lacks.refused and "4.0 GiB of memory" in lacks.line and "at least 5.0 GiB" in lacks.line
    assert "--memory is 6.0 GiB; use less" in judge_memory(small, 6 * GIB, GIB, stated=True).line
    assert "use --memory 1024MiB or more" in judge_memory(small, 900 * MIB, GIB, stated=True).line
    resting = replace(small, ram_free=GIB // 2, served=GIB)  # what is taken is taken by the service of before
    assert not judge_memory(resting, GIB, GIB, stated=False).problem
    taken = judge_memory(replace(small, ram_free=GIB // 2), 2 * GIB, GIB, stated=False)
    assert taken.refused and "stop other programs" in taken.line
    less = judge_memory(replace(small, ram_free=GIB), 2 * GIB, GIB, stated=False)
    assert less.problem and not less.refused
    assert not judge_memory(small, 2 * GIB, GIB, stated=True).problem


def test_the_usual_budget_does_not_move_with_what_is_free() -> None:
    assert usual_budget(BOARD, 100 * GIB) == usual_budget(replace(BOARD, ram_free=1), 100 * GIB)
    assert GIB < usual_budget(BOARD, GIB) < 1.2 * GIB and usual_budget(BOARD, 100 * GIB) < 0.71 * BOARD.ram


def test_a_drive_without_room_is_refused() -> None:
    assert not judge_room(GIB, GIB, "bundle 1.0 GiB").problem
    full = judge_room(GIB, 3 * GIB, "bundle 3.0 GiB")
    assert full.refused and "1.0 GiB free, but 3.0 GiB are needed (bundle 3.0 GiB); free 2.0 GiB" in full.line


# ---- the bundle ------------------------------------------------------------------------------------------------------
def test_what_is_no_bundle_is_packed_only_if_it_may_be_a_model(tmp_path: Path) -> None:
    file, folder, notes = tmp_path / "my model.gguf", tmp_path / "its folder", tmp_path / "bad name.edge"
    for path in (folder, notes):
        path.mkdir()
    file.touch()
    (folder / "config.json").touch()
    for path, source in ((file, f"'{file}'"), (folder, f"'{folder}'"), (notes, "MODEL.gguf")):
        with pytest.raises(DeployError, match=re.escape(f"{path} is no bundle; make one with: edgert pack {source}, ")):
            find_bundle(path)
    with pytest.raises(DeployError, match=re.escape(f"edgert pack MODEL.gguf '{tmp_path}/no such.edge'")):
        find_bundle(tmp_path / "no such.edge")


# ---- what is to be done ----------------------------------------------------------------------------------------------
WANTED = Wanted("e1", "m-1.edge", "[Unit]\n", "system", 100 * MIB, 300 * MIB, 2 * GIB)


def done(wanted: Wanted, **more: object) -> State:
    releases = {wanted.release: {"env": wanted.env, "model": wanted.model, "scope": wanted.scope}}
    return State([wanted.env], [wanted.model], releases, {}, wanted.release, **more)  # type: ignore[arg-type]


def names(todo: list[Action]) -> list[str]:
    return [action.name for action in todo]


def test_an_empty_board_gets_all_and_a_finished_one_nothing() -> None:
    assert names(actions(State(service="not there"), WANTED)) == ["env", "bundle", "release", "switch", "service"]
    assert actions(done(WANTED), WANTED) == []
    needed, what = room_needed(actions(State(), WANTED))
    assert needed > 100 * MIB + 300 * MIB + 2 * GIB and "bundle 2.0 GiB" in what


def test_what_was_copied_counts() -> None:
    state = State(incoming={"m-1.edge/experts.bin.part": GIB})
    bundle = actions(state, WANTED)[1]
    assert bundle.n_bytes == GIB and "1.0 GiB (the rest of 2.0 GiB)" in bundle.text


def test_a_changed_setting_is_a_release_of_the_same_parts() -> None:
    other = replace(WANTED, unit="[Unit]\nother")
    assert names(actions(done(WANTED), other)) == ["release", "switch", "service"]
    assert names(actions(done(WANTED, service="it is not enabled"), WANTED)) == ["service"]
    assert names(actions(done(WANTED), replace(WANTED, scope="none"))) == ["release", "switch", "service"]


def test_two_releases_are_kept_and_what_only_others_need_is_removed() -> None:
    releases = {name: {"env": f"e{name}", "model": f"m{name}", "scope": "none"} for name in "123"}
    state = State(["e1", "e2", "e3"], ["m1", "m2", "m3"], releases, {"m9/x.part": 5}, "2", "1")
    assert superfluous(state, "3") == ["releases/1", "envs/e1", "models/m1", "incoming/m9"]
    assert superfluous(State(["e1"], ["m1"], {"1": releases["1"]}, {}, "1"), "1") == []
    again = State(["e2", "e3"], ["m2", "m3"], {n: releases[n] for n in "23"}, {}, "3", "2")
    assert superfluous(again, "3") == []


# ---- the report ------------------------------------------------------------------------------------------------------
BENCH = {
    "tests": [
        {"kind": "prompt", "n_tokens": 128, "ttft_s": 2.0, "tokens_per_s": 64.0},
        {"kind": "generate", "n_tokens": 32, "ttft_s": None, "tokens_per_s": 12.5},
    ]
}


def test_what_was_measured_stands_beside_what_was_planned() -> None:
    expected = Forecast("Orin", (8.0, 10.0, 12.0), (3.0, 2.0, 1.5), "memory").as_dict()
    first, rate = compared(expected, BENCH)
    assert first == "first token of 128 after 2 s (as planned: 1.5 to 3, usually 2)"
    assert rate == "tokens a second: 12.5 (faster than planned: 8 to 12, usually 10)"
    *lines, reason = compared(Forecast(reason="no board").as_dict(), BENCH)
    assert len(lines) == 2 and reason == "not compared: no board"


def test_the_plan_is_edgert_s_own(tmp_path: Path) -> None:
    pytest.importorskip("edgert.plan", reason="this edgert has no plan yet")
    from edgert.pack import pack

    bundle = pack(tiny_moe.write(tmp_path / "tiny.gguf"), tmp_path / "tiny.edge", progress=lambda stage, fraction: None)
    found = forecast(bundle, BOARD, GIB, None)
    assert found.board == "Jetson Orin Nano 8GB" and not found.reason
    assert 0 < found.tokens_per_s[0] <= found.tokens_per_s[2] and found.ttft_s[0] >= found.ttft_s[2] > 0
    assert "is below this model's floor" in forecast(bundle, BOARD, 90 * MIB, None).reason


def test_a_board_that_no_plan_knows_is_not_compared() -> None:
    assert "knows no board" in forecast(Path("m.edge"), replace(BOARD, model="Banana"), GIB, None).reason


def test_a_board_cannot_write_to_the_terminal() -> None:
    evil = read_facts(ORIN.replace("NVIDIA Jetson", "\x1b[2J\x1b]0;x\x07 Jetson"))
    text = "\n".join(deploy_report.findings(judge(evil)))
    assert "\x1b" not in text and "\x07" not in text and "Jetson" in text
    odd = read_facts(ORIN.replace("NVIDIA Jetson", "A\x1b[2J\n\x9b2J\u202eB").replace("22.04.5", "\x1b]0;x\x07"))
    assert odd.model.startswith("A[2J 2JB Orin Nano") and odd.os == "Ubuntu ]0;x LTS"


@given(st.recursive(st.text(), lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(), one, max_size=3)))
def test_what_a_board_answers_is_text(said: object) -> None:
    told = json.dumps(plain(said), ensure_ascii=False)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202e\ud800-\udfff]", told)
    assert plain(plain(said)) == plain(said) and plain("Zürich 東京\n\ta 👍") == "Zürich 東京\n\ta 👍"
