"""Processes that pack, for tests that kill, starve and race them: forked from one that has imported everything.

As a program it takes one JSON job a line and answers with one JSON line: {"start": {...}} forks a process that packs
and gives its pid, {"wait": pid} its exit status. `PackServer` is the other end.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


class PackServer:
    """Starts processes that pack, in milliseconds."""

    def __init__(self, model: Path, scratch: Path) -> None:
        command = [sys.executable, __file__, str(model), str(scratch / "warm.edge")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._answer() == "ready"

    def start(self, source: Path, out: Path, **options: Any) -> int:
        """Pack in a new process, its pid; options: see _pack."""
        job = {"source": str(source), "out": str(out), **{name: _plain(value) for name, value in options.items()}}
        return int(self._ask({"start": job}))

    def wait(self, pid: int) -> int:
        """The exit status, negative for a signal."""
        return int(self._ask({"wait": pid}))

    def pack(self, source: Path, out: Path, **options: Any) -> dict[str, Any]:
        """Pack in a new process and wait: what it came to, or the error."""
        log = out.with_name(out.name + ".log")
        log.unlink(missing_ok=True)
        self.wait(self.start(source, out, log=log, **options))
        return last(log)

    def close(self) -> None:
        """End the server."""
        self._process.communicate()

    def _ask(self, job: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def lines(log: Path) -> list[dict[str, Any]]:
    """What a process has told so far."""
    content = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]


def last(log: Path) -> dict[str, Any]:
    """The last thing that it told."""
    return lines(log)[-1]


def wait_for(log: Path, words: str, seconds: float = 30.0) -> None:
    """Wait until a process tells of a stage with these words."""
    end = time.monotonic() + seconds
    while not any(words in line.get("stage", "") for line in lines(log)):
        assert time.monotonic() < end, f"{words!r} never came: {lines(log)}"
        time.sleep(0.005)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


# ---- in the server ---------------------------------------------------------------------------------------------------
def _pack(
    source: str,
    out: str,
    log: str | None = None,
    hold: str | None = None,
    slab_bytes: int | None = None,
    largest_file: int | None = None,
    cgroup: str | None = None,
) -> None:
    """Pack, telling each stage to `log`; wait in the first one for as long as a file `hold` is there.

    slab_bytes: of slabs, and between two syncs: small ones make a small model take many.
    """
    from edgert import pack_meter
    from edgert.pack import pack_model
    from edgert.storage import bundle_writer

    def tell(**line: Any) -> None:
        if log is not None:
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")

    def progress(stage: str, fraction: float) -> None:
        tell(stage=stage, fraction=fraction)
        while hold is not None and stage.startswith("packing") and os.path.exists(hold):
            time.sleep(0.005)

    pack_meter._REPORT_S = 0.0
    if slab_bytes is not None:
        bundle_writer.SLAB_BYTES = bundle_writer._SYNC_BYTES = slab_bytes
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if cgroup is not None:
        Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        packed = pack_model(Path(source), Path(out), progress=progress)
    except BaseException as error:
        tell(error=type(error).__name__, message=str(error), traceback=traceback.format_exc())
        return
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    tell(written=packed.written, resumed=packed.resumed, grown=grown)


def _serve(model: str, out: str) -> None:
    _pack(model, out)  # compiles, or loads, the kernels
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            try:
                _pack(**job["start"])
            finally:
                os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
