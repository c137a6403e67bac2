"""The memory plan: sizes read, limits held, refusals that name the numbers."""

from __future__ import annotations

import pytest

from edgert import memory
from edgert.errors import MemoryLimitError, OptionError
from edgert.memory import MemoryPlan, parse_size

MIB = 1 << 20
PLAN = MemoryPlan(
    process=200 * MIB,
    hot=100 * MIB,
    cold=50 * MIB,
    kv=30 * MIB,
    work=20 * MIB,
    loading=10 * MIB,
    context=512,
    kv_type="f16",
)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("2GiB", 2 << 30), ("900MiB", 900 << 20), ("1.5 GB", 1_500_000_000), ("4096", 4096), ("7k", 7168), (12345, 12345)],
)
def test_sizes(text: str | int, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 gibi", "1e9", "0", "2GiB extra", "9" * 30, True])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="memory="):
        parse_size(text)


def test_a_plan_above_the_limit_names_both_and_the_remedy() -> None:
    assert PLAN.total == 400 * MIB
    PLAN.require(400 * MIB, "model.gguf")
    with pytest.raises(
        MemoryLimitError, match=r"memory 399 MiB is below what model.gguf needs.* 400 MiB .*--memory 400MiB"
    ):
        PLAN.require(399 * MIB, "model.gguf")


def test_a_plan_above_the_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 300 * MIB)
    with pytest.raises(MemoryLimitError, match="only 300 MiB are available"):
        PLAN.require(None, "model.gguf")


def test_available_memory_is_sane() -> None:
    assert 10 * MIB < memory.available() < 1 << 50
