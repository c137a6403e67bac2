"""Work that is cut into jobs and spread over processes of this machine, or over a Dask cluster; one job costs one core.

Jobs are handed out as places become free, so only as many as run are held at a time. A worker that is killed costs
the job that it ran its time, no more. It knows nothing of what a job does.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from edgert.errors import JobError, OptionError
from edgert.worker_processes import WorkerDied, WorkerProcesses

J = TypeVar("J")
R = TypeVar("R")
Notice = Callable[[str], None]

_TRIES = 3
_POLL_S = 5.0  # between looks at the cluster while nothing is done
_CONNECT_S = 10.0
_PATIENCE_S = 120.0  # in which a cluster without workers may have one again
_PACKAGES = ("edgert", "edgert.devices", "edgert.experts", "edgert.quant", "edgert.storage")


def run_jobs(
    function: Callable[[J], R],
    jobs: Iterable[J],
    *,
    dask: str | None = None,
    workers: int | None = None,
    notice: Notice = lambda text: None,
) -> Generator[tuple[int, R], None, None]:
    """(index, function(job)) of every job, in the order in which they are done.

    function: one that workers can import by name. workers: processes, by default one for each core that may be used;
    dask: the address of a Dask scheduler to be used instead. A job whose worker dies is run again, and `notice` is
    told; JobError when it has cost three workers, or when the cluster is gone. What the function raises is raised, and
    the rest is not run. Close the iterator to stop early: `with contextlib.closing(run_jobs(...)) as results`.
    """
    with _processes(workers) if dask is None else _cluster(dask, notice) as place:
        yield from _run(place, function, jobs, notice)


class _Place(NamedTuple):
    """Where jobs run."""

    executor: Executor
    room: Callable[[], int]  # how many jobs to have under way, at least 1
    died: tuple[type[Exception], ...]  # what a future raises whose worker was killed
    tries: int  # times that a job is submitted until it is given up


@dataclass
class _Task(Generic[J]):
    index: int
    job: J
    deaths: int = 0

    @property
    def name(self) -> str:
        return f"job {self.index} ({' '.join(str(self.job).split())[:80]})"


def _run(place: _Place, function: Callable[[J], R], jobs: Iterable[J], notice: Notice) -> Iterator[tuple[int, R]]:
    fresh = (_Task(index, job) for index, job in enumerate(jobs))
    again, running = deque[_Task[J]](), dict[Future[R], _Task[J]]()
    finished = list[tuple[int, R]]()
    failed: Exception | None = None
    while failed is None:
        for task in _next(place, fresh, again, running):
            running[place.executor.submit(function, task.job)] = task
        yield from finished  # while the next ones run
        if not running:
            return
        finished.clear()
        for future in wait(running, _POLL_S, FIRST_COMPLETED).done:
            task = running.pop(future)
            try:
                finished.append((task.index, future.result()))
            except place.died as death:
                task.deaths += 1
                if task.deaths >= place.tries:
                    failed = _given_up(task, death)
                else:
                    notice(f"the worker of {task.name} {_line(death)}; it is run again")
                    again.append(task)
            except CancelledError:
                failed = JobError(f"{task.name} was dropped: the cluster's scheduler is gone; start it and try again")
            except Exception as error:
                failed = error
    yield from finished  # nothing that was done is lost
    raise failed


def _next(place: _Place, fresh: Iterator[_Task[J]], again: deque[_Task[J]], running: Sized) -> Iterator[_Task[J]]:
    """Tasks to start now. A last try waits until the machine, and its memory, is free for it alone."""
    last = place.tries - 1
    while len(running) < place.room():
        if again and again[0].deaths == last and running:
            return
        task = again.popleft() if again else next(fresh, None)
        if task is None:
            return
        yield task
        if task.deaths == last > 0:
            return


def _given_up(task: _Task[J], death: Exception) -> JobError:
    return JobError(
        f"{task.name} is given up: its workers died ({_line(death)}); if for want of memory, use fewer "
        "workers or give them more"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---- processes -------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _processes(workers: int | None) -> Iterator[_Place]:
    if workers is None:
        from edgert.devices.cores import default_threads

        workers = default_threads()
    if workers < 1:
        raise OptionError(f"workers={workers} is not a number of processes; use 1 or more")
    executor = WorkerProcesses(workers)
    try:
        yield _Place(executor, lambda: workers, (WorkerDied,), _TRIES)
    finally:
        executor.shutdown()


# ---- a cluster -------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """No records of a logger: what goes wrong is raised here as an error of one line."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def _cluster(address: str, notice: Notice) -> Iterator[_Place]:
    """Dask runs a job again by itself when its worker dies, three times unless its settings say otherwise.

    It suspects all jobs that were at a worker when it died; the second of our tries, alone, finds the one.
    """
    try:
        config, distributed = (importlib.import_module(name) for name in ("dask.config", "distributed"))
    except ImportError as error:
        raise OptionError(f"--dask needs Dask ({error}); install it with: pip install 'edgert[cluster]'") from error
    settings = {"distributed.admin.large-graph-warning-threshold": "1TiB"}
    with _quiet("distributed.client"), _connected(address, distributed) as client, config.set(settings):
        cluster = _Cluster(address, client, distributed.TimeoutError)
        cluster.check_sources(notice)
        executor = client.get_executor(pure=False)
        try:
            yield _Place(executor, cluster.room, (distributed.KilledWorker,), 2)
        finally:
            executor.shutdown(wait=False)


def _connected(address: str, distributed: Any) -> Any:
    """A client of a scheduler; OptionError where none answers."""
    client = distributed.Client.__new__(distributed.Client)  # in hand also when connecting fails
    try:
        client.__init__(address, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError, distributed.TimeoutError) as error:
        client.close()  # else the garbage collector does, maybe in a thread that starts under the lock closing takes
        raise OptionError(
            f"--dask {address!r}: no scheduler answers there ({_line(error)}); give the address of one that runs, "
            "tcp://HOST:PORT"
        ) from error
    return client


class _Cluster:
    """The workers behind a Dask client."""

    def __init__(self, address: str, client: Any, timeout: type[Exception]) -> None:
        self._address, self._client, self._timeout = address, client, timeout  # which is Python's own from 3.11 on
        self._seen = time.monotonic()

    def room(self) -> int:
        """Two jobs for each thread: one that runs and one on its way. JobError if there is no worker for long."""
        with contextlib.suppress(OSError, self._timeout):
            n_threads = sum(self._client.nthreads().values())
            if n_threads:
                self._seen = time.monotonic()
                return int(2 * n_threads)
        if time.monotonic() > self._seen + _PATIENCE_S:
            raise JobError(f"the cluster at {self._address} has had no worker for {_PATIENCE_S:.0f} s; start some")
        return 1

    def check_sources(self, notice: Notice) -> None:
        """JobError unless the workers run this edgert; `notice` where NumPy or the CPU is another than here.

        The one may give other results, the other results that are rounded otherwise.
        """
        try:
            self._client.wait_for_workers(1, timeout=_PATIENCE_S)
            stamps = self._client.run(sources_stamp)
            here = sources_stamp()
            others = sorted(worker for worker, stamp in stamps.items() if stamp != here)
            kinds = {} if others else self._client.run(machine_kind)
        except self._timeout as error:
            raise JobError(f"the cluster at {self._address} has no worker; start some") from error
        except ImportError as error:
            raise JobError(f"a worker of {self._address} has no edgert ({_line(error)}); install it there") from error
        if others:
            raise JobError(
                f"{len(others)} workers, {others[0]} one of them, run another edgert; install this one there"
            )
        ours = machine_kind()
        if unlike := sorted(worker for worker, kind in kinds.items() if kind != ours):
            how = _difference(kinds[unlike[0]], ours)
            notice(
                f"{len(unlike)} workers, {unlike[0]} one of them, have another NumPy or CPU ({how}): a few values may "
                "be rounded otherwise than here"
            )


def machine_kind() -> tuple[str, tuple[str, ...]]:
    """What rounding depends on: the version of NumPy, and the instruction sets of this CPU."""
    import numpy as np

    from edgert.quant import isa

    return np.__version__, tuple(sorted(isa.cpu_features()))


def _difference(theirs: tuple[str, tuple[str, ...]], ours: tuple[str, tuple[str, ...]]) -> str:
    """What tells two kinds of machines apart, in a few words."""
    if theirs[0] != ours[0]:
        return f"NumPy {theirs[0]}, here {ours[0]}"
    more, fewer = (sorted(set(a) - set(b))[:3] for a, b in ((theirs[1], ours[1]), (ours[1], theirs[1])))
    return ", ".join([*(f"with {name}" for name in more), *(f"without {name}" for name in fewer)])


def sources_stamp() -> str:
    """Digest of edgert's sources as they are installed here."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for path in sorted(Path(folder).glob("*.py")):
                digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
