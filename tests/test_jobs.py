"""Jobs in other processes: same results wherever they run, and workers that are killed cost time alone."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs_to_run import (
    PATIENCE_S,
    Meeting,
    die,
    die_unless_zero,
    ends,
    fail,
    fail_badly,
    is_running,
    length,
    meet,
    square,
    surroundings,
    unsendable,
    wait_for,
)

from edgert.errors import JobError, OptionError
from edgert.expert_jobs import ExpertJob
from edgert.goal import Goal
from edgert.jobs import run_jobs
from edgert.pack_bits import Request, pack_bits
from edgert.profiling import profile_model
from edgert.weights import silent
from tests import tiny_moe


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


# ---- processes -------------------------------------------------------------------------------------------------------
def test_every_job_is_done_once_and_only_as_many_as_run_are_taken() -> None:
    taken = list[int]()

    def jobs() -> Iterator[int]:
        for number in range(40):
            taken.append(number)
            yield number

    found = dict[int, int]()
    for index, result in run_jobs(square, jobs(), workers=2):
        found[index] = result
        assert len(taken) <= len(found) + 4
    assert found == {number: number * number for number in range(40)}
    assert list(run_jobs(square, [], workers=2)) == []


def test_a_worker_is_polite_has_one_thread_and_loads_nothing_that_the_function_does_not_need() -> None:
    ((_, (process, niceness, threads, modules)),) = run_jobs(surroundings, [None], workers=1)
    assert process != os.getpid() and niceness == min(os.nice(0) + 10, 19) and threads == "1"
    assert not {"numba", "numpy", "distributed"} & set(modules)


def test_large_jobs_and_results_travel_both_ways() -> None:
    jobs = [bytes([number]) * 3_000_000 for number in range(6)]
    assert dict(run_jobs(length, jobs, workers=2)) == {index: job + b"!" for index, job in enumerate(jobs)}


def test_a_killed_worker_costs_its_own_job_alone(tmp_path: Path) -> None:
    meetings = [Meeting(tmp_path / f"{number}", tmp_path / f"go{number}") for number in range(2)]
    notices = list[str]()

    def kill() -> None:
        (process,) = wait_for(meetings[0].arrived, 1)
        wait_for(meetings[1].arrived, 1)
        os.kill(int(process), signal.SIGKILL)
        wait_for(meetings[0].arrived, 2)
        for meeting in meetings:
            meeting.go.touch()

    killer = threading.Thread(target=kill)
    killer.start()
    found = dict(run_jobs(meet, meetings, workers=2, notice=notices.append))
    killer.join()
    assert [len(lines(meeting.arrived)) for meeting in meetings] == [2, 1]
    assert found == {index: int(lines(meeting.arrived)[-1]) for index, meeting in enumerate(meetings)}
    assert len(notices) == 1 and "job 0 (Meeting(" in notices[0] and "ended by SIGKILL" in notices[0]


def test_a_job_that_kills_three_workers_is_named_and_what_was_done_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"job 1 \(.*\) is given up: .* \(ended by SIGKILL\).* fewer workers"):
        list(run_jobs(die_unless_zero, [0, 7, 0], workers=2))
    found = list[tuple[int, int]]()
    with pytest.raises(JobError):
        found += run_jobs(die, [tmp_path], workers=2)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_job_of_an_expert_is_named_by_it() -> None:
    weights, rows = np.zeros((2, 2), np.float16), np.zeros((1, 2), np.float16)
    job = ExpertJob(0, 3, weights, weights, weights, rows, np.ones(1, np.float32), (), "rtn", "silu")
    with pytest.raises(JobError, match=r"^job 0 \(layer 0, expert 3\) is given up"):
        list(run_jobs(die_unless_zero, [job], workers=1))


def test_what_a_function_raises_is_raised_with_its_place_in_the_worker() -> None:
    with pytest.raises(ValueError, match="3 is not liked") as caught:
        list(run_jobs(fail, range(100), workers=2))
    assert "jobs_to_run.py" in str(caught.value.__cause__) and "in fail" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="ValueError: with a file"):
        list(run_jobs(fail_badly, [None], workers=1))


def test_what_cannot_travel_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(Exception, match=r"[Pp]ickle|local object"):
        list(run_jobs(lambda job: job, [1], workers=1))
    with pytest.raises(Exception, match=r"[Pp]ickle|local object"):
        list(run_jobs(unsendable, [1], workers=1))
    with pytest.raises(OptionError, match="workers=0"):
        list(run_jobs(square, [1], workers=0))


def test_closing_the_iterator_ends_workers_that_are_busy(tmp_path: Path) -> None:
    go, never = tmp_path / "go", tmp_path / "never"
    go.touch()
    meetings = [
        Meeting(tmp_path / "first", go),
        Meeting(tmp_path / "second", never),
        Meeting(tmp_path / "third", never),
    ]
    with contextlib.closing(run_jobs(meet, meetings, workers=2)) as results:
        assert next(results)[0] == 0
        busy = int(wait_for(meetings[1].arrived, 1)[0])
        assert is_running(busy)
    assert not is_running(busy)


FIRST_WORKERS = """
from jobs_to_run import sees_interrupts
from edgert.jobs import run_jobs

if __name__ == "__main__":
    print([dict(run_jobs(sees_interrupts, [None], workers=1))[0] for _ in range(2)])
"""


def test_no_worker_sees_an_interrupt_the_first_of_a_process_neither(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FIRST_WORKERS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    found = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (found.stdout, found.stderr) == ("[False, False]\n", "")


SCRIPT = """
import sys
from pathlib import Path
from jobs_to_run import Meeting, meet
from edgert.jobs import run_jobs

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    list(run_jobs(meet, [Meeting(folder / str(number), folder / "never") for number in range(2)], workers=2))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_process_that_has_them(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, script, tmp_path]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        workers = [int(wait_for(tmp_path / name, 1)[0]) for name in "01"]
        if number == signal.SIGINT:
            os.killpg(run.pid, number)  # as a terminal does
        else:
            run.kill()
        assert all(ends(worker) for worker in workers)
        _, errors = run.communicate()
        assert run.returncode == -number
        assert errors.count("Traceback") == (number == signal.SIGINT), errors


# ---- a cluster -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def local_cluster() -> Iterator[Any]:
    """A Dask scheduler on this machine with two workers, each watched by a nanny that starts it anew."""
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'edgert[cluster]'")
    from dask import config

    settings = {
        "distributed.scheduler.allowed-failures": 0,  # three by default, which takes longer
        "distributed.deploy.lost-worker-timeout": "10 minutes",  # the start of a worker takes long on a busy machine
    }
    with config.set(settings), distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster
        cluster.wait_for_workers(2, timeout=PATIENCE_S)  # one that is being started cannot be closed cleanly


@pytest.fixture
def cluster(local_cluster: Any) -> str:
    """The address of a scheduler both of whose workers are there, again if need be."""
    local_cluster.wait_for_workers(2, timeout=PATIENCE_S)
    return str(local_cluster.scheduler_address)


def test_a_cluster_gives_the_same_results(cluster: str) -> None:
    expected = dict(run_jobs(square, range(30), workers=2))
    assert dict(run_jobs(square, range(30), dask=cluster)) == expected
    jobs = [bytes([number]) * 12_000_000 for number in range(3)]
    assert dict(run_jobs(length, jobs, dask=cluster)) == {index: job + b"!" for index, job in enumerate(jobs)}


def test_a_cluster_that_may_round_otherwise_is_told_of(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[str]()
    assert dict(run_jobs(square, [3], dask=cluster, notice=told.append)) == {0: 9} and not told
    with monkeypatch.context() as patch:
        patch.setattr(np, "__version__", "0.1")  # here alone
        assert dict(run_jobs(square, [3], dask=cluster, notice=told.append)) == {0: 9}
    (line,) = told
    assert line.startswith("2 workers, tcp://") and f"(NumPy {np.__version__}, here 0.1): a few values may be" in line


def test_a_killed_worker_of_a_cluster_costs_time_alone(cluster: str, tmp_path: Path) -> None:
    meetings = [Meeting(tmp_path / f"{number}", tmp_path / f"go{number}") for number in range(6)]
    for meeting in meetings[1:]:
        meeting.go.touch()

    def kill() -> None:
        (process,) = wait_for(meetings[0].arrived, 1)
        os.kill(int(process), signal.SIGKILL)
        wait_for(meetings[0].arrived, 2)
        meetings[0].go.touch()

    killer = threading.Thread(target=kill)
    killer.start()
    found = dict(run_jobs(meet, meetings, dask=cluster))
    killer.join()
    assert len(lines(meetings[0].arrived)) == 2
    assert found == {index: int(lines(meeting.arrived)[-1]) for index, meeting in enumerate(meetings)}


def test_a_cluster_chooses_and_makes_the_same_bits_though_workers_are_killed(
    local_cluster: Any, cluster: str, tmp_path: Path
) -> None:
    model, text, options = tiny_moe.write(tmp_path / "tiny.gguf"), tmp_path / "text.txt", {"context": 128}
    text.write_text(tiny_moe.text(6000, 1))
    made = profile_model(model, tmp_path / "p.npz", corpora=[text], n_tokens=1024, progress=silent, **options).profile
    killed = list[str]()

    def kill_once(stage: str, fraction: float) -> None:
        """One worker, when the first job of a kind is done and others are under way."""
        kind = stage.partition(":")[0]
        if kind in ("trying formats", "quantising") and kind not in killed:
            killed.append(kind)
            local_cluster.wait_for_workers(2, timeout=PATIENCE_S)
            os.kill(local_cluster.workers[len(killed) - 1].process.pid, signal.SIGKILL)

    found = {}
    for dask, progress in ((None, silent), (cluster, kill_once)):
        out = tmp_path / f"{dask is None}.edge"
        request = Request(model, out, made, Goal(bits_per_weight=3.0), dask=dask, options=options)
        found[dask] = pack_bits(request, progress).bits, (out / "experts.bin").read_bytes()
    assert killed == ["trying formats", "quantising"]
    assert found[None] == found[cluster]


def test_what_a_function_raises_in_a_cluster_is_raised(cluster: str) -> None:
    with pytest.raises(ValueError, match="3 is not liked"):
        list(run_jobs(fail, range(100), dask=cluster))


def test_a_job_that_kills_every_worker_of_a_cluster_is_named(cluster: str) -> None:
    with pytest.raises(JobError, match=r"job 1 \(7\) is given up"):
        list(run_jobs(die_unless_zero, [0, 7, 0], dask=cluster))


def test_a_scheduler_that_is_killed_is_told_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="Dask is not installed: pip install 'edgert[cluster]'")
    place, meeting = tmp_path / "scheduler.json", Meeting(tmp_path / "arrived", tmp_path / "never")
    records = list[Any]()
    listening = logging.Handler()
    listening.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("distributed.client").addHandler(listening)
    with part_of_a_cluster("scheduler", "--port", "0", place) as scheduler, contextlib.ExitStack() as stack:
        wait_for(place, 1)
        stack.enter_context(part_of_a_cluster("worker", "--no-nanny", place))

        def kill() -> None:
            wait_for(meeting.arrived, 1)
            scheduler.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(JobError, match=r"^job 0 \(Meeting.* was dropped: the cluster's scheduler is gone"):
            list(run_jobs(meet, [meeting], dask=json.loads(place.read_text())["address"]))
        killer.join()
    logging.getLogger("distributed.client").removeHandler(listening)
    assert not records


@contextlib.contextmanager
def part_of_a_cluster(kind: str, *options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process of Dask's, killed at the end; the last option is the file in which the scheduler is found."""
    command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--no-dashboard"]
    command += [*map(str, options[:-1]), "--scheduler-file", str(options[-1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense://here", "no host"])
def test_an_address_without_scheduler_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'edgert[cluster]'")
    monkeypatch.setattr("edgert.jobs._CONNECT_S", 0.5)
    with pytest.raises(OptionError, match=f"--dask '{address}': no scheduler answers there"):
        list(run_jobs(square, [1], dask=address))
    clients = [client for client in gc.get_objects() if type(client) is distributed.Client]
    assert not [client for client in clients if client.status == "connecting"]  # which would be closed at any time


def test_a_cluster_with_another_edgert_or_without_workers_is_refused(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import distributed

    with monkeypatch.context() as patch:
        patch.setattr("edgert.jobs._PACKAGES", ("edgert",))  # here alone: the workers import the file as it is
        with pytest.raises(JobError, match=r"2 workers, tcp://.* one of them, run another edgert"):
            list(run_jobs(square, [1], dask=cluster))
    monkeypatch.setattr("edgert.jobs._PATIENCE_S", 0.3)
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0") as empty:
        with pytest.raises(JobError, match="has no worker; start some"):
            list(run_jobs(square, [1], dask=empty.scheduler_address))
