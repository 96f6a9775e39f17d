"""Where the runs of a sweep are computed: each in a process of its own, here or on a Ray cluster.

A run is handed over as its directory, which holds its recipe; what comes back is its result there, or why it failed.
The same recipe gives the same numbers wherever it runs: what a process computes depends on `train.threads`, which the
recipe states, and not on what runs beside it.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from blaq.train.directory import open_run
from blaq.train.run import train

ExecutorName = Literal["local", "ray"]

OUTPUT = "output.txt"  # in a run's directory: what its process wrote, such as the traceback of a failure


class Handle(Protocol):
    """A run that has been started."""

    def done(self) -> bool:
        """Whether it has ended."""
        ...

    def failure(self) -> str | None:
        """Why it failed, once it is done; None for success."""
        ...

    def stop(self) -> None:
        """End it now; its directory can be resumed."""
        ...


class Executor(Protocol):
    """Starts runs; `slots` says how many side by side."""

    slots: int

    def start(self, run: Path, threads: int) -> Handle:
        """Start or resume the run of a directory on so many cores."""
        ...


@contextmanager
def open_executor(name: ExecutorName, workers: int | None, threads: int | None) -> Iterator[Executor]:
    """The executor of a name, for runs of so many threads; without `workers` as many side by side as there are cores for.

    Raises:
        ValueError: `workers` below 1.
        ImportError: Ray is not installed.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: expected at least 1.")
    if name == "local":
        yield LocalExecutor(workers or max(1, cores() // (threads or 1)))
    else:
        with _ray_cluster() as cpus:
            yield RayExecutor(workers or max(1, cpus // (threads or 1)))


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


# --- processes of this machine ----------------------------------------------------------------------------------------


class LocalExecutor:
    """Processes of this machine, forked from one that has imported everything already."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._context = _context()

    def start(self, run: Path, threads: int) -> "LocalRun":
        """Start or resume the run of a directory."""
        return LocalRun(self._context, run)


class LocalRun:
    """A run in a process of this machine."""

    def __init__(self, context: BaseContext, run: Path) -> None:
        self._answer, answer = context.Pipe(duplex=False)
        self._process: Any = context.Process(target=_run_alone, args=(str(run), answer))  # type: ignore[attr-defined]
        self._process.start()
        answer.close()

    def done(self) -> bool:
        """Whether it has ended."""
        return not self._process.is_alive()

    def failure(self) -> str | None:
        """Why it failed; None for success."""
        self._process.join()
        try:
            message: str | None = self._answer.recv()
        except EOFError:
            code = self._process.exitcode
            message = f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self._answer.close()
        return message

    def stop(self) -> None:
        """End it now: a run directory bears that at any moment."""
        self._process.kill()
        self._process.join()


def _context() -> BaseContext:
    """Processes that take seconds to import everything once, not once a run.

    The server they are forked from must have one thread only, so numpy may not start its own there; and a process that
    has met CUDA must not be forked.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods() or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["blaq.train.executors"])
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return context


def _run_alone(run: str, answer: Connection) -> None:
    """The main function of a run's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says what follows from it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    output = Path(run) / OUTPUT
    with output.open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        message = _attempt(run)
    if message is None and not output.stat().st_size:
        output.unlink()
    answer.send(message)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _attempt(run: str) -> str | None:
    """Train the run of a directory to its end; why that failed, or None."""
    try:
        directory, recipe = open_run(Path(run))
        train(recipe, directory.path, resume=True, progress=False)
    except ValueError as error:
        return str(error)
    except SystemExit as error:
        return "its process was ended by SIGTERM" if error.code == 128 + signal.SIGTERM else f"exit status {error.code}"
    except Exception as error:  # whatever happens to one run, the others go on
        traceback.print_exc()
        sys.stderr.flush()
        return f"{type(error).__name__}: {error}"
    return None


# --- a Ray cluster ------------------------------------------------------------------------------------------------------


class RayExecutor:
    """Tasks of a Ray cluster, each in a fresh worker process; all nodes see the run directories under the same path."""

    def __init__(self, slots: int) -> None:
        import ray

        self.slots = slots
        # A worker serves one run: then its peak memory is the run's. Runs are repeated by the user, not by Ray.
        self._attempt = ray.remote(max_calls=1, max_retries=0)(_attempt)

    def start(self, run: Path, threads: int) -> "RayRun":
        """Start or resume the run of a directory."""
        return RayRun(self._attempt.options(num_cpus=threads, name=run.name).remote(str(run.resolve())))


class RayRun:
    """A run that is a task of Ray."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def done(self) -> bool:
        """Whether it has ended."""
        import ray

        ended, _ = ray.wait([self._task], timeout=0)
        return bool(ended)

    def failure(self) -> str | None:
        """Why it failed; None for success."""
        import ray

        try:
            message: str | None = ray.get(self._task)
        except ray.exceptions.RayError as error:
            return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        return message

    def stop(self) -> None:
        """End it now."""
        import ray

        ray.cancel(self._task, force=True)


@contextmanager
def _ray_cluster() -> Iterator[int]:
    """The CPUs of the cluster this process is connected to, else of the one RAY_ADDRESS names, else of a local one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local cluster is started without asking; it tells no one
    try:
        import ray
    except ImportError:
        raise ImportError("--executor ray: Ray is not installed; pip install 'blaq[ray]'.") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield int(ray.cluster_resources().get("CPU", 1))
    finally:
        if ours:
            ray.shutdown()
