"""No kernel reads or writes outside its buffers: each of a device's ends at a page that may not be touched.

What lies between a buffer's last byte and that page (64 readable bytes are promised, and the rounding to 64) is filled
with a pattern that must be there afterwards. A fault would end the process, so the models run in a second one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
GUARDED = """
import ctypes, mmap, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from edgert.devices import buffers, cpu
import models

PAGE, libc, made = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True), []

def aligned(n_bytes):
    size = -(-n_bytes // 64) * 64 + 64
    pages = -(-size // PAGE) * PAGE
    memory = np.frombuffer(mmap.mmap(-1, pages + 2 * PAGE), np.uint8)
    start = -memory.ctypes.data % PAGE
    end = start + pages
    assert libc.mprotect(ctypes.c_void_p(memory.ctypes.data + end), PAGE, 0) == 0, ctypes.get_errno()
    whole = memory[start:end]
    whole[:] = 0xA5
    buffer = whole[pages - size : pages - size + n_bytes]
    buffer[:] = 0
    made.append((whole, pages - size, n_bytes))
    return buffer

class Arena:
    take = staticmethod(aligned)

buffers.aligned = cpu.aligned = aligned
cpu.Arena = Arena
for name in sys.argv[2:]:
    for activations in ("int8", "f32"):
        path = models.golden_path(name)
        engine, session = models.engine_of(path, activations=activations, kv_type="f16", threads=3)
        ids = [token % engine.config.n_vocab for token in range(1, 24)]
        for part in (ids[:13], ids[13:14], ids[14:23]):
            engine.step(part, session)
            engine.last_logits(len(part))
        engine.every_layer = True  # outputs kept apart, or (of more tokens) added up group by group
        engine.step(ids[:20], session)
        engine.step(ids[:5], session)
        engine.step(ids[:1], session)
        for whole, start, n_bytes in made:
            assert (whole[:start] == 0xA5).all() and (whole[start + n_bytes :] == 0xA5).all(), (name, start, n_bytes)
        engine.device.close()
        made.clear()
print("inside", len(sys.argv) - 2)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect as Linux has it")
def test_models_stay_inside_their_buffers() -> None:
    names = sorted(path.stem for path in (HERE / "golden").glob("*.gguf"))
    names = [name for name in names if not name.endswith(("-q4_1", "-f16"))][:12]
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, str(HERE), *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"inside {len(names)}\n"
