"""What the tests of jobs run in workers: functions that can be imported there, and that leave traces in files."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

PATIENCE_S = 120.0


class Meeting(NamedTuple):
    """Two files: the job writes its process's number into the one and waits for the other."""

    arrived: Path
    go: Path


def square(number: int) -> int:
    return number * number


def length(data: bytes) -> bytes:
    return data + b"!"


def surroundings(_job: object) -> tuple[int, int, str, list[str]]:
    """Process, niceness, a setting of threads, modules."""
    return os.getpid(), os.nice(0), os.environ["OMP_NUM_THREADS"], sorted(sys.modules)


def sees_interrupts(_job: object) -> bool:
    return signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def fail(number: int) -> int:
    if number == 3:
        raise ValueError(f"{number} is not liked")
    return number


def fail_badly(_job: object) -> None:
    error = ValueError("with a file")
    error.file = open(os.devnull)  # type: ignore[attr-defined]   # which cannot be sent
    raise error


def unsendable(_job: object) -> object:
    return lambda: None


def die(marks: Path) -> int:
    """Ends its process after leaving a mark."""
    (marks / f"{os.getpid()}-{time.monotonic_ns()}").touch()
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def die_unless_zero(number: int) -> int:
    if number:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def meet(meeting: Meeting) -> int:
    """The number of the process, once it may go on; each run leaves a line."""
    with open(meeting.arrived, "a") as file:
        file.write(f"{os.getpid()}\n")
    wait_for(meeting.go)
    return os.getpid()


def wait_for(path: Path, n_lines: int = 0) -> list[str]:
    """The lines of a file, once it is there and has so many."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if path.exists() and len(lines := path.read_text().splitlines()) >= n_lines:
            return lines
        time.sleep(0.01)
    raise TimeoutError(path)


def is_running(process: int) -> bool:
    """Whether a process is there and not waiting to be buried."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def ends(process: int) -> bool:
    """Whether a process ends in time."""
    end = time.monotonic() + PATIENCE_S
    while is_running(process):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
