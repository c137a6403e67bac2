"""A real cgroup whose limit is what --memory says, page cache counted: it is never touched, and nobody is killed.

Needs root and writable memory cgroups; skipped elsewhere. The page cache of the machine is dropped first: libraries
that others have read would not count.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import edgert
from edgert import memory

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path[:0] = [str(TOOLS)]  # it is no package

import cage  # noqa: E402   # found through the line above
import capped_peer  # noqa: E402

from edgert.loading import resolve  # noqa: E402
from edgert.plan_model import open_plan_model  # noqa: E402
from edgert.quant import jit  # noqa: E402

pytestmark = [
    pytest.mark.skipif(bool(why := cage.why_not()), reason=f"no memory cgroups to write to: {why}"),
    pytest.mark.skipif(not jit.JIT_ENABLED, reason="what is not compiled takes other memory"),
]
MIB = 1 << 20
EDGERT = [sys.executable, "-c", "from edgert.cli.main import main; main()"]
PROMPT = "Once upon a time " * 90


def test_the_budget_holds_under_a_limit_that_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "taken", lambda: 0)  # by pytest: the process that is measured has none of it
    with edgert.load(context=512) as model:  # its kernels are compiled now: a first run takes more
        text = model.generate(PROMPT, max_tokens=32).text
    with pytest.raises(edgert.EdgertError) as refused:
        edgert.load(context=512, memory="100MiB")
    floor = int(re.findall(r"use --memory (\d+)MiB", str(refused.value))[0])
    cage.drop_page_cache()
    options = ["-p", PROMPT, "--max-tokens", "32", "--context", "512", "--memory", f"{floor}MiB"]
    done = cage.run([*EDGERT, "generate", *options], floor * MIB, timeout_s=300, env=dict(os.environ))
    assert (done.status, done.limit_hits, done.kills) == (0, 0, 0), done
    assert done.stdout.strip() == text.strip(), "the same answer as without a limit"
    assert done.peak_bytes > (floor - 80) * MIB, "the plan asks for much more than is taken"


def test_the_cage_counts_hits_and_kills() -> None:
    fills = [sys.executable, "-c", "held = bytearray(100 << 20)"]
    done = cage.run(fills, 64 * MIB)
    assert done.kills == 1 and done.limit_hits > 0 and done.peak_bytes == 64 * MIB and done.status
    done = cage.run(fills, 200 * MIB)
    assert (done.status, done.kills, done.limit_hits) == (0, 0, 0) and 100 * MIB < done.peak_bytes < 200 * MIB


PEER = """#!{python}
import json
print(json.dumps([{{"n_prompt": 0, "n_gen": 2, "n_depth": 0, "samples_ts": [0.5]}}]))
"""


def test_the_comparison_runs_both_under_the_limit(tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(PEER.format(python=sys.executable))
    program.chmod(0o755)
    words = ["--against", str(program), "--caps", "600", "--pairs", "1", "--generate", "2"]
    model = resolve(None)
    done = subprocess.run([sys.executable, TOOLS / "capped_peer.py", model, *words], capture_output=True, text=True)
    assert done.returncode == 0, done
    document = json.loads(done.stdout.splitlines()[-1])
    (cap,) = document["caps"]
    assert cap["edgert"]["limit_hits"] == cap["edgert"]["kills"] == cap["edgert"]["failed"] == 0
    assert (
        cap["peer"]["median_tokens_per_s"] == 0.5 and cap["median_ratio"] == cap["edgert"]["median_tokens_per_s"] / 0.5
    )
    assert 250 < cap["edgert"]["highest_peak_mib"] <= 600
    assert cap["edgert"]["runs"][0]["report"]["tests"][0]["kind"] == "generate"


def test_the_limit_of_a_residency_is_the_smallest_that_holds_it() -> None:
    needs = open_plan_model("olmoe-1b-7b").needs(512, "f16", 2)
    for share in (0.25, 0.5):
        cap = capped_peer.cap_for(Path("olmoe-1b-7b"), share, 512, 2)
        less, held = (
            memory.plan_memory(needs, memory.Budget(mib * MIB, mib * MIB, mib * MIB, strict=True)).residency
            for mib in (cap - 1, cap)
        )
        assert less < share <= held < share + 0.001


GROWING = """
import mmap, sys, time
from edgert.guard import Guard, GuardPolicy, Sensors

MIB = 1 << 20

class Buffer:
    slot_bytes = 100 * MIB

    def __init__(self):
        self.memory = mmap.mmap(-1, self.slot_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(100):
            self.memory.write(b"x" * MIB)

    def request_bytes(self, n_bytes):
        first = -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory.madvise(mmap.MADV_DONTNEED, first, Buffer.slot_bytes - first)

guard = Guard(Buffer(), GuardPolicy(100 * MIB, 8 * MIB, 64 * MIB), Sensors(), strict=True)
held = []
for _ in range(30):
    held.append(b"y" * 2 * MIB)
    time.sleep(0.06)
    if sys.argv[1] == "guarded":
        guard.look()
print([change.n_bytes // MIB for change in guard.changes], [change.reason for change in guard.changes][:1])
"""


def test_the_guard_gives_experts_back_before_a_limit_is_reached() -> None:
    """Something else in the process grows by 60 MiB beside a buffer of 100 MiB, where 140 MiB are allowed."""
    for how, kills in (("alone", 1), ("guarded", 0)):
        done = cage.run([sys.executable, "-c", GROWING, how], 140 * MIB, env=dict(os.environ))
        assert done.kills == kills, done
    assert "are left below the cgroup's limit" in done.stdout
