"""Processes that run one function call after the other, each with one thread, as a `concurrent.futures.Executor`.

Unlike those of ProcessPoolExecutor they die one by one: a worker that is killed ends the call that it was running, and
no other; the next call has a new process. They end at once when the executor is shut down, and with this process
however it ends. Started anew (numba's threads do not survive a fork), they import only what the function needs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS")
_NICER = 10
_STARTING = threading.Lock()  # the environment is all threads'


class WorkerDied(Exception):
    """The process that ran a call ended before it had answered."""


class _Traceback(Exception):
    """Where in the worker an exception came from; shown as its cause."""


class _Worker:
    """One process, and this side of the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), name="edgert job", daemon=True)
        resource_tracker.ensure_running()  # else the first start does it, and unblocks what this thread blocks
        _ignore_interrupts()
        with _one_thread():
            self._process.start()
        theirs.close()

    def call(self, message: bytes) -> Any:
        """What the call returns or raises; WorkerDied, or OSError, if the process ends within."""
        try:
            self._pipe.send_bytes(message)
            answer = self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            self.end()
            raise WorkerDied(_how(self._process.exitcode)) from error
        value, raised, trace = pickle.loads(answer)
        if raised is not None:
            raise raised from _Traceback(trace)
        return value

    def kill(self) -> None:
        """End the process, from any thread; a call under way raises WorkerDied."""
        self._process.kill()

    def end(self) -> None:
        """Kill the process and wait for its end."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """An environment for processes with one thread: numpy may be loaded there before anything of ours, by the script.

    Two processes whose matrix products take two threads each, on two cores, wait for each other ten times as long.
    """
    with _STARTING:
        before = {name: os.environ.get(name) for name in _THREADS}
        os.environ.update(dict.fromkeys(_THREADS, "1"))
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


class WorkerProcesses(Executor):
    """At most `n_workers` processes, started when they have something to do."""

    def __init__(self, n_workers: int) -> None:
        self._threads = ThreadPoolExecutor(n_workers, "edgert-jobs", initializer=_ignore_interrupts)
        self._idle, self._workers = list[_Worker](), set[_Worker]()
        self._lock, self._closed = threading.Lock(), False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See Executor. The future raises WorkerDied if its process is killed."""
        return self._threads.submit(self._call, fn, args, kwargs)

    def _call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        message = pickle.dumps((function, args, kwargs), pickle.HIGHEST_PROTOCOL)
        with self._lock:
            if self._closed:
                raise WorkerDied("not started: the workers are being shut down")
            worker = self._idle.pop() if self._idle else _Worker()
            self._workers.add(worker)
        try:
            answer = worker.call(message)
        except WorkerDied:
            self._workers.discard(worker)
            raise
        except BaseException:
            self._idle.append(worker)
            raise
        self._idle.append(worker)
        return answer

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End all processes now, whatever they do, so that waiting is short. Calls that did not begin are cancelled."""
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        for worker in workers:
            worker.kill()
        self._threads.shutdown(wait, cancel_futures=True)
        for worker in workers:
            worker.end()


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; it is this one that ends the others.

    They inherit what the thread that starts them blocks, and so never see it, not even while Python starts.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


# ---- in the worker ---------------------------------------------------------------------------------------------------
def _serve(pipe: Connection) -> None:
    """Answer calls until the other side is gone."""
    if hasattr(os, "nice"):
        os.nice(_NICER)
    calls = queue.SimpleQueue[bytes]()
    threading.Thread(target=_receive, args=(pipe, calls), daemon=True).start()
    while True:
        try:
            function, args, kwargs = pickle.loads(calls.get())
            answer = pickle.dumps((function(*args, **kwargs), None, ""), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            answer = _failure(error)
        pipe.send_bytes(answer)


def _receive(pipe: Connection, calls: queue.SimpleQueue[bytes]) -> None:
    """Beside the work, for the other side may go while it is done."""
    try:
        while True:
            calls.put(pipe.recv_bytes())
    finally:
        os._exit(1)


def _failure(error: Exception) -> bytes:
    trace = "\n" + traceback.format_exc()
    try:
        answer = pickle.dumps((None, error, trace))
        pickle.loads(answer)
        return answer
    except Exception:  # an exception that cannot travel
        return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), trace))
