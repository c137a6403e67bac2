"""The ledger: sizes read, what is there, which experts fit, refusals that name the numbers."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert import file_pages, memory
from edgert.errors import MemoryLimitError, OptionError
from edgert.memory import PROCESS_BYTES, STARTING_BYTES, Budget, Needs, budget_for, parse_size, plan_memory

MIB = 1 << 20
PROCESS = PROCESS_BYTES // MIB
NEEDS = Needs(
    hot=850 * MIB,
    kv={32: 128 * MIB, 512: 128 * MIB},
    work={32: 12 * MIB, 512: 100 * MIB},
    tokenizer=30 * MIB,
    context=512,
    kv_type="f16",
    loading=MIB,
    cold=3456 * MIB,
    record=3 * MIB,
    top_k=8,
    working_set=400 * MIB,
    buffers=4 * MIB,
    streams=True,
)
FLOOR = (PROCESS + 30 + 850 + 128 + 12 + 4 + 27) * MIB


def stated(n_mib: int, free: int = 1 << 40) -> Budget:
    """A budget that --memory gave, on a machine with room."""
    return Budget(min(n_mib * MIB, free), n_mib * MIB, free, strict=True)


# ---- sizes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("2GiB", 2 << 30),
        ("900MiB", 900 << 20),
        ("1.5 GB", 1_500_000_000),
        ("4096", 4096),
        ("7k", 7168),
        (12345, 12345),
        (1, 1),
        ("50%", 4 << 30),
        ("12.5 %", 1 << 30),
        (0.5, 4 << 30),
        ("0.25", 2 << 30),
        (1.0, 8 << 30),
        ("100%", 8 << 30),
    ],
)
def test_sizes(text: str | int | float, n_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "installed", lambda: 8 << 30)
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "2 gibi", "1e9", "0", "0%", "101%", "%", "2GiB extra", "9" * 30, True, -0.5, 0.0]
)
def test_bad_sizes_are_refused(text: str | float) -> None:
    with pytest.raises(OptionError, match="memory="):
        parse_size(text)


def test_a_budget_is_what_was_stated_as_far_as_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 2048 * MIB)
    monkeypatch.setattr(memory, "held", lambda: PROCESS_BYTES)
    assert budget_for("900MiB") == Budget(900 * MIB, 900 * MIB, 2048 * MIB, strict=True)
    assert budget_for("2050MiB").n_bytes == 2050 * MIB, "what the kernel keeps for a process that lives is planned for"
    assert budget_for("4GiB") == Budget(2048 * MIB, 4096 * MIB, 2048 * MIB, strict=True)


def test_the_default_leaves_a_head_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 3000 * MIB)
    monkeypatch.setattr(memory, "held", lambda: 1)
    for installed, room in ((512, 128), (4096, 409.6), (1 << 20, 2048)):
        monkeypatch.setattr(memory, "installed", lambda n=installed: n * MIB)
        for default in (None, "auto"):
            found = budget_for(default)
            assert (found.n_bytes, found.stated) == (int(3000 * MIB - int(room * MIB)), None)


def test_what_the_process_holds_for_other_things_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "installed", lambda: 8192 * MIB)
    monkeypatch.setattr(memory, "available", lambda: 4096 * MIB)  # with what is held
    monkeypatch.setattr(memory, "held", lambda: PROCESS_BYTES + 600 * MIB)
    assert budget_for("2GiB") == Budget(1448 * MIB, 2048 * MIB, 3496 * MIB, strict=True, taken=600 * MIB)
    assert budget_for("2GiB", 100 * MIB) == Budget(1348 * MIB, 2048 * MIB, 3396 * MIB, strict=True, taken=700 * MIB)
    assert budget_for("4GiB").n_bytes == 3496 * MIB and budget_for("500MiB").n_bytes == 0
    assert budget_for(None).n_bytes == 3496 * MIB - memory.head_room()
    least = FLOOR // MIB
    with pytest.raises(MemoryLimitError) as refused:
        plan_memory(NEEDS, budget_for(f"{least + 100}MiB"))
    assert str(refused.value).startswith(
        f"--memory {least + 100}MiB, of which this process holds 600 MiB for other things, is below this model's floor"
    )
    assert f"; use --memory {least + 600}MiB" in str(refused.value)
    assert plan_memory(NEEDS, budget_for(f"{least + 600}MiB")).total <= FLOOR


# ---- the plan --------------------------------------------------------------------------------------------------------
def test_all_experts_stay_where_they_fit() -> None:
    resident = NEEDS.plan(512).total
    for budget in (stated(resident // MIB), Budget(resident, None, resident)):
        plan = plan_memory(NEEDS, budget)
        assert (plan.total, plan.cold, plan.slots, plan.buffers, plan.residency) == (resident, NEEDS.cold, 0, 0, 1.0)
        assert (plan.chunk, plan.warning, plan.floor) == (512, "", FLOOR)
    short = plan_memory(NEEDS, stated(resident // MIB - 1))
    assert (short.chunk, short.residency) == (32, 1.0), "a shorter chunk comes before experts on flash"


def test_what_is_left_of_a_budget_is_expert_buffer() -> None:
    plan = plan_memory(NEEDS, stated(2200))
    fixed = PROCESS + 30 + 850 + 128 + 4 + 100
    assert (plan.chunk, plan.cold, plan.slots) == (512, 0, (2200 - fixed) * MIB)
    assert plan.total == 2200 * MIB and plan.residency == plan.slots / NEEDS.cold and not plan.warning
    assert plan.least_slots == 27 * MIB


def test_the_chunk_is_short_where_memory_is() -> None:
    short = plan_memory(NEEDS, stated(FLOOR // MIB + 300))
    assert (short.chunk, short.slots) == (32, 327 * MIB)
    longer = plan_memory(NEEDS, stated(FLOOR // MIB + 400))
    assert (longer.chunk, longer.slots) == (512, 339 * MIB), "a prompt reads all experts once a chunk"
    for plan in (short, longer):
        assert "MiB is below one working set, the 400 MiB" in plan.warning
        enough = plan.warning.partition("--memory ")[2].partition(" ")[0]
        assert not plan_memory(NEEDS, stated(parse_size(enough) // MIB)).warning


def test_work_space_that_every_chunk_takes_makes_none_shorter() -> None:
    wide = replace(NEEDS, work={chunk: work + 700 * MIB for chunk, work in NEEDS.work.items()})  # as for a large head
    for more in (300, 400, 1000):
        plain, same = (
            plan_memory(needs, stated(FLOOR // MIB + more + extra)) for needs, extra in ((NEEDS, 0), (wide, 700))
        )
        assert (same.chunk, same.slots) == (plain.chunk, plain.slots)


def test_below_the_floor_the_numbers_are_named() -> None:
    least = FLOOR // MIB
    assert plan_memory(NEEDS, stated(least)).slots == 27 * MIB
    with pytest.raises(MemoryLimitError) as refused:
        plan_memory(NEEDS, stated(900))
    assert str(refused.value) == (
        f"--memory 900MiB is below this model's floor of {least:,} MiB (process {PROCESS} + tokenizer 30 + hot 850 + "
        f"KV 128 + work 12 + read buffers 4 + 9 experts 27); use --memory {least}MiB or a shorter --context"
    )
    with pytest.raises(MemoryLimitError, match=r"1,000 MiB are available, below .* close other programs"):
        plan_memory(NEEDS, stated(4096, free=1000 * MIB))
    with pytest.raises(MemoryLimitError, match=r"1,000 MiB are available"):
        plan_memory(NEEDS, Budget(900 * MIB, None, 1000 * MIB))


def test_the_head_room_is_given_up_before_a_model_is() -> None:
    plan = plan_memory(NEEDS, Budget(FLOOR - 200 * MIB, None, FLOOR + 50 * MIB))
    assert plan.total == FLOOR


def test_a_model_that_cannot_stream_needs_all_of_it() -> None:
    needs = replace(NEEDS, streams=False)
    least = needs.plan(32).total // MIB
    with pytest.raises(MemoryLimitError, match=rf"floor of {least:,} MiB .*experts 3,456\); use --memory {least}MiB"):
        plan_memory(needs, stated(least - 1))
    assert plan_memory(needs, stated(least)).cold == NEEDS.cold
    dense = replace(needs, cold=0, record=0, top_k=0, working_set=0)
    assert "experts" not in dense.plan(32).parts() and plan_memory(dense, stated(least)).residency == 1.0


def test_a_small_model_still_has_to_start() -> None:
    tiny = replace(NEEDS, hot=MIB, kv=dict.fromkeys(NEEDS.kv, MIB), tokenizer=MIB, cold=0, streams=False)
    with pytest.raises(MemoryLimitError, match="while it starts; use --memory") as refused:
        plan_memory(tiny, stated(STARTING_BYTES // MIB - 1))
    assert "--context" not in str(refused.value)
    plan_memory(tiny, stated(STARTING_BYTES // MIB))
    plan_memory(tiny, Budget(STARTING_BYTES // 2, None, STARTING_BYTES // 2))  # nobody counts the page cache there


def test_residency_states_the_same_choice() -> None:
    assert plan_memory(NEEDS, stated(10_000), residency=0.25).slots == NEEDS.cold // 4
    assert plan_memory(NEEDS, stated(10_000), residency=1e-9).slots == NEEDS.least_slots
    assert plan_memory(NEEDS, stated(10_000), residency=1.0).cold == NEEDS.cold
    for residency in (0.5, 1.0):
        with pytest.raises(MemoryLimitError, match=rf"residency {residency:.3g} needs .* use a smaller --residency"):
            plan_memory(NEEDS, stated(1500), residency=residency)
    with pytest.raises(OptionError, match="residency=0 must be above 0"):
        plan_memory(NEEDS, stated(10_000), residency=0)
    with pytest.raises(OptionError, match="does not have"):
        plan_memory(replace(NEEDS, streams=False), stated(10_000), residency=0.5)


def test_more_than_is_there_is_said() -> None:
    assert "only 2,000 MiB of --memory 2500MiB are available" in plan_memory(NEEDS, stated(2500, 2000 * MIB)).warning


@given(budget=st.integers(1, 6000), cold=st.integers(1, 4000), chunks=st.dictionaries(
    st.integers(1, 2048), st.integers(1, 900), min_size=1, max_size=4))  # fmt: skip
def test_a_plan_never_exceeds_its_budget(budget: int, cold: int, chunks: dict[int, int]) -> None:
    work = {chunk: n_mib * MIB for chunk, n_mib in chunks.items()}
    kv = {chunk: (128 + chunk // 32) * MIB for chunk in chunks}
    needs = replace(NEEDS, cold=cold * MIB, kv=kv, work=work)
    try:
        plan = plan_memory(needs, stated(budget))
    except MemoryLimitError:
        assert budget * MIB < needs.floor().total
        return
    assert plan.total <= budget * MIB and (plan.kv, plan.work) == (kv[plan.chunk], work[plan.chunk])
    assert plan.cold or plan.slots >= needs.least_slots
    if plan.slots:
        assert plan.slots <= needs.cold and needs.plan(min(work)).total > budget * MIB


# ---- what is there ---------------------------------------------------------------------------------------------------
def test_available_memory_is_sane() -> None:
    assert 10 * MIB < memory.available() < 1 << 50
    assert memory.installed() >= memory.held() > MIB


def put(folder: Path, **values: int | str) -> None:
    """Files of a cgroup; double underscores stand for dots."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def left_in(cgroups: Path) -> int:
    """What available() says above the memory that this process holds."""
    return memory.available(cgroups.parent / "proc", cgroups) - memory.held()


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup root without groups, on a machine with 8 GiB free."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 << 30))
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


def near(found: int, expected: int) -> bool:
    """Equal but for what the process itself took in between."""
    return abs(found - expected) < 8 * MIB


def test_cgroups_of_version_2_and_those_above_them_limit(cgroups: Path) -> None:
    cgroup = cgroups.parent / "proc" / "self" / "cgroup"
    assert near(left_in(cgroups), 8 << 30)
    cgroup.write_text("0::/user.slice/app.scope\n")
    put(cgroups / "user.slice/app.scope", memory__max="max", memory__current=5 << 30)
    assert near(left_in(cgroups), 8 << 30)
    put(cgroups / "user.slice", memory__max=3 << 30, memory__current=2 << 30)
    assert near(left_in(cgroups), 1 << 30)
    put(cgroups / "user.slice", memory__stat=f"anon {1 << 30}\ninactive_file {512 * MIB}\nactive_file {256 * MIB}")
    assert near(left_in(cgroups), 1792 * MIB)
    put(cgroups / "user.slice/app.scope", memory__max=700 * MIB, memory__current=600 * MIB)
    assert near(left_in(cgroups), 100 * MIB)


def test_cgroups_of_version_1_limit(cgroups: Path) -> None:
    (cgroups.parent / "proc" / "self" / "cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n")
    names = {"memory__limit_in_bytes": 4 << 30, "memory__usage_in_bytes": 3 << 30}
    put(cgroups / "memory/docker/abc", **names, memory__stat=f"inactive_file 1\ntotal_inactive_file {2 << 30}")
    assert near(left_in(cgroups), 3 << 30)
    put(cgroups / "memory", memory__limit_in_bytes=2 << 30, memory__usage_in_bytes=1 << 30)
    assert near(left_in(cgroups), 1 << 30)
    put(cgroups / "memory", memory__limit_in_bytes=9223372036854771712)  # as version 1 says that there is none
    assert near(left_in(cgroups), 3 << 30)


def test_in_a_container_that_sees_its_own_group_at_the_root(cgroups: Path) -> None:
    (cgroups.parent / "proc" / "self" / "cgroup").write_text("0::/docker/not-visible-here\n")
    put(cgroups, memory__max=900 * MIB, memory__current=1000 * MIB)
    assert left_in(cgroups) <= 8 * MIB


# ---- pages of files --------------------------------------------------------------------------------------------------
SMAPS = """\
7f00-8f00 r--p 00000000 fd:00 1  /usr/lib/libllvmlite.so
Rss:                 60 kB
Anonymous:            0 kB
8f00-9f00 rw-p 00001000 fd:00 1  /usr/lib/a folder/libllvmlite.so
Anonymous:           12 kB
Swap:                 4 kB
VmFlags: rd wr
a000-b000 rw-p 00000000 00:00 0
Anonymous:            4 kB
"""


def test_mapped_files_are_read_from_smaps(tmp_path: Path) -> None:
    (tmp_path / "smaps").write_text(SMAPS)
    parts = list(file_pages.mappings(tmp_path / "smaps"))
    assert [(p.start, p.n_bytes, p.permissions, p.own_bytes) for p in parts] == [
        (0x7F00, 0x1000, "r--p", 0),
        (0x8F00, 0x1000, "rw-p", 16 << 10),
        (0xA000, 0x1000, "rw-p", 4 << 10),
    ]
    assert [p.path for p in parts] == ["/usr/lib/libllvmlite.so", "/usr/lib/a folder/libllvmlite.so", ""]
    assert list(file_pages.mappings(tmp_path / "not there")) == []


class Lazy(ModuleType):
    """A module that imports the rest of itself when it is asked for anything."""

    def __getattr__(self, name: str) -> object:
        raise ImportError(f"{self.__name__} has no {name} without a GPU")


def test_lazy_modules_of_others_are_not_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lazy", Lazy("lazy"))
    monkeypatch.setitem(sys.modules, "none", None)
    assert file_pages.__file__ in file_pages._modules()


def test_who_streams_experts_through_sessions_is_told_what_that_takes() -> None:
    needs = Needs(10 << 20, {32: 0}, {32: 1 << 20}, 0, 64, "f16", cold=900 << 20, record=1 << 20, top_k=2, streams=True)
    budget = Budget(600 << 20, 600 << 20, 4 << 30)
    assert "session" not in plan_memory(needs, budget).warning
    assert re.search(r"session for each.*experts=cpu", plan_memory(replace(needs, beside=2.0), budget).warning)
    assert not plan_memory(replace(needs, cold=1 << 20, beside=2.0), budget).warning  # all in RAM
