"""The thread pool as seen from outside, in a process of its own: exits, interrupts, forks, other hosts and systems."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PRELUDE = """
import os, signal, sys, threading, time
import numpy as np
import test_threads as t
from edgert.devices.threads import ThreadPool
"""


def program(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; one that hangs fails."""
    here = str(Path(__file__).resolve().parent)
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True, timeout=300)


def succeeds(text: str, **environment: str) -> str:
    """What a program prints, which must end well and in silence."""
    done = program(text, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(
    "last",
    [
        "pass",  # the workers have just been started
        "t.check(pool)",  # they spin
        "t.until(lambda: t.all_asleep(pool))",
        "threading.Thread(target=pool.run, args=(t.JOBS['linger'], cell.ctypes.data), daemon=True).start(); "
        "t.until(lambda: cell[0] == 1)",
        "keep = [ThreadPool(3) for _ in range(5)]; [t.check(one) for one in keep]; sys.exit()",
        "pool.close()",
    ],
)
def test_the_interpreter_ends_while_workers_live(last: str) -> None:
    succeeds(f"{PRELUDE}\npool, cell = ThreadPool(3), np.zeros(1, np.int64)\n{last}\n")


def test_an_interrupt_comes_after_the_run() -> None:
    printed = succeeds(f"""{PRELUDE}
pool, cell = ThreadPool(2), np.zeros(1, np.int64)
def interrupt():
    t.until(lambda: cell[0] == 1)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
    cell[0] = 2
threading.Thread(target=interrupt).start()
try:
    pool.run(t.JOBS["linger"], cell.ctypes.data)
except KeyboardInterrupt:
    print("interrupted", cell[0])
t.check(pool)
pool.close()
""")
    assert printed == "interrupted 2\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_the_child_of_a_fork_starts_workers_of_its_own() -> None:
    printed = succeeds(f"""{PRELUDE}
import warnings
warnings.simplefilter("ignore", DeprecationWarning)   # newer Pythons warn of a fork beside threads
pool, closed, unused = ThreadPool(3), ThreadPool(2), ThreadPool(2)
closed.close()
t.check(pool)
for depth in range(2):
    child = os.fork()
    if child:
        break
    assert threading.active_count() == 1
    t.check(pool)
    t.check(pool)
    assert threading.active_count() == 3
    try:
        t.check(closed)
    except RuntimeError:
        print("closed", depth, flush=True)
if child:
    assert os.waitpid(child, 0)[1] == 0
t.check(pool)
t.check(unused)
pool.close()
unused.close()
assert threading.active_count() == 1
""")
    assert sorted(printed.split("\n")) == ["", "closed 0", "closed 1"]


def test_a_run_needs_no_gil() -> None:
    """Called so that it keeps the GIL to itself: it ends only if the workers can do without."""
    printed = succeeds(f"""{PRELUDE}
import ctypes
from edgert.devices import threads
from edgert.quant.records import address_of
pool, log = ThreadPool(3), t.Log(3)
t.check(pool)   # now all have come to where they wait
t.until(lambda: t.all_asleep(pool))
integer = ctypes.c_int64
launch = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.POINTER(integer), ctypes.c_void_p, integer, integer, integer)
result = integer(9)
launch(address_of(threads._launch, 3))(result, None, pool._address, t.JOBS["gather"], log.address)
print(result.value, (log.totals == 3 * np.arange(1, 101)).all())
pool.close()
""")
    assert printed == "0 True\n"


def test_a_host_that_uses_numbas_own_threads() -> None:
    printed = succeeds(
        f"""{PRELUDE}
import numba
@numba.njit(parallel=True)
def add_up(values):
    total = 0.0
    for i in numba.prange(len(values)):
        total += values[i]
    return total
values, pool, right = np.ones(1000), ThreadPool(2), []
host = threading.Thread(target=lambda: [right.append(add_up(values) == 1000) for _ in range(100)])
host.start()
for _ in range(100):
    t.check(pool)
host.join()
print(len(right), all(right))
pool.close()
""",
        NUMBA_THREADING_LAYER="workqueue",
    )
    assert printed == "100 True\n"


def test_a_system_without_futex(tmp_path: Path) -> None:
    printed = succeeds(
        f"""
import numba, numpy, psutil, sys
sys.path.insert(0, {str(Path(__file__).resolve().parent)!r})
import conftest, edgert.quant.records, edgert.devices.cores
real, sys.platform = sys.platform, "another"
from edgert.devices import threads
sys.platform = real
import time, test_threads as t
pool = threads.ThreadPool(3)
for _ in range(3):
    t.check(pool)
    time.sleep(0.01)
pool.close()
print(threads._FUTEX)
""",
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert printed == "0\n"


def test_without_the_compiler_the_module_imports_and_says_what_to_use() -> None:
    done = program("from edgert.devices.threads import ThreadPool; ThreadPool(2)", NUMBA_DISABLE_JIT="1")
    assert done.returncode == 1 and done.stderr.rstrip().endswith("use the reference device")
